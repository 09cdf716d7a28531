"""Times pieces of work in turn, and sees them against what the machine can do.

An `Entry` is one line of a race; `limits` measures how fast products and copies can be at all; and
`kernels` asks the profiler what a call launches on the device. Nothing here needs a config or a flag.
"""

import collections
import contextlib
import dataclasses
import datetime
import os
import platform
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PRECISIONS = ('float32', 'tensorfloat32', 'bfloat16')
NOT_COUNTED = 'not counted'


class Entry(NamedTuple):
  """One line of a race.

  Attributes:
    run: () -> result; it returns when the result is there.
    scale: factor by which its time is multiplied, where only a part is run, or the time of one of many is
      told.
    flops: operations in the products of the scaled run, by their precision.
    traffic: bytes that the scaled run reads and writes at the least.
    prepare: compiles what `run` runs, without running it; see `compile_side_by_side`.
  """

  run: Callable[[], Any]
  scale: float = 1.0
  flops: Mapping[str, float] = MappingProxyType({})
  traffic: float = 0.0
  prepare: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the machine can do, measured.

  Attributes:
    products: operations a second in large matrix products, by precision.
    copies: bytes a second, read and written.
  """

  products: Mapping[str, float]
  copies: float

  def least_seconds(self, entry: Entry) -> float:
    """Computes in what time the machine could do the products and the traffic of an entry, one by one.

    >>> Limits({'float32': 2e9}, 1e9).least_seconds(Entry(print, flops={'float32': 1e9}, traffic=1e9))
    1.5
    """
    products = sum(flops / self.products[precision] for precision, flops in entry.flops.items())
    return products + entry.traffic / self.copies

  def __str__(self) -> str:
    rates = ', '.join(f'{rate / 1e12:.3g} in {name}' for name, rate in self.products.items())
    return f'Products, TFLOP/s: {rates}; memory {self.copies / 1e9:.0f} GB/s'


def limits(small: bool = False) -> Limits:
  """Measures what the machine can do.

  On an accelerator several products are in flight, so that no launch is seen.

  Args:
    small: for trying out; the figures mean nothing.
  """
  on_cpu = jax.default_backend() == 'cpu'
  size = 256 if small else 4096 if on_cpu else 8192
  in_flight = 1 if on_cpu else 8
  values = jax.random.normal(jax.random.key(0), (size, size))
  rates = {}
  for precision in PRECISIONS:
    if on_cpu and precision == 'tensorfloat32':
      rates[precision] = rates['float32']  # a CPU has none
      continue
    x, product = values.astype(_dtype(precision)), _product(precision)
    seconds = _median_of(lambda x=x, f=product: jax.block_until_ready([f(x) for _ in range(in_flight)]), 3)
    rates[precision] = in_flight * 2 * size**3 / seconds
  x = [jnp.zeros(2**18 if small else 2**27 if on_cpu else 2**28)]
  add = jax.jit(lambda x: x + 1, donate_argnums=0)

  def copy():
    for _ in range(in_flight):
      x.append(add(x.pop()))
    jax.block_until_ready(x)

  seconds = _median_of(copy, 5)
  return Limits(rates, in_flight * 2 * x[0].nbytes / seconds)


def _dtype(precision):
  """Chooses the type of the arrays of a precision."""
  return jnp.bfloat16 if precision == 'bfloat16' else jnp.float32


def _product(precision):
  """Makes the function that multiplies a matrix by itself, its sums in float32."""
  accuracy = {'float32': lax.Precision.HIGHEST, 'tensorfloat32': lax.Precision.HIGH}.get(precision)
  result = jnp.float32 if jax.default_backend() == 'cpu' else _dtype(precision)
  return jax.jit(lambda x: jnp.dot(x, x, precision=accuracy, preferred_element_type=result))


def machine(measured: Limits | None = None) -> str:
  """Tells date, machine, and what it can do: the limits to see the figures against."""
  measured = measured or limits()
  device = jax.devices()[0]
  kind = _processor() if device.platform == 'cpu' else device.device_kind
  return (
      f'{datetime.date.today()}, {kind} ({jax.device_count()} device, {os.cpu_count()} cores), '
      f'Python {platform.python_version()}, JAX {jax.__version__}. {measured}.\n')


def _processor():
  """Names the CPU."""
  try:
    with open('/proc/cpuinfo') as f:
      return next(line.partition(':')[2].strip() for line in f if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


# Races.


def race(
    entries: Mapping[str, Entry], repeats: int, failures: dict[str, str] | None = None,
) -> dict[str, list[float]]:
  """Runs all in turn, and measures the seconds of each; before that all run once, which compiles.

  Args:
    entries: by name.
    repeats: runs of each that count.
    failures: where given, an entry that fails is left out, and its error is put here.
  """
  seconds = {}
  for name, entry in entries.items():
    try:
      entry.run()
      seconds[name] = []
    except Exception as e:
      if failures is None:
        raise
      failures[name] = first_line(e)
      traceback.print_exc()
  for _ in range(repeats):
    for name, values in seconds.items():
      began = time.perf_counter()
      entries[name].run()
      values.append((time.perf_counter() - began) * entries[name].scale)
  return seconds


def compile_side_by_side(entries: Iterable[Entry]) -> None:
  """Compiles all that can say how, before their races; on a CPU they are compiled when they first run.

  For an accelerator it takes long, most of it on one core of the host.
  """
  if jax.default_backend() == 'cpu':
    return
  with ThreadPoolExecutor(8) as pool:
    for future in [pool.submit(entry.prepare) for entry in entries if entry.prepare]:
      future.exception()  # told when the entry runs


def table(
    title: str, entries: Mapping[str, Entry], seconds: Mapping[str, list[float]],
    notes: Mapping[str, str], measured: Limits | None = None,
) -> Iterator[str]:
  """Yields a race as Markdown; the first entry is ours, to which the others are compared."""
  ours = median(next(iter(seconds.values())))
  yield f'### {title}\n'
  yield '| what | median | range | times ours | of the limit | |'
  yield '|---|---|---|---|---|---|'
  for name, values in seconds.items():
    middle, share = median(values), ''
    if measured and (least := measured.least_seconds(entries[name])):
      share = f'{100 * least / middle:.0f} %'
    yield (f'| {name} | {duration(middle)} | {duration(min(values))} to {duration(max(values))} | '
           f'{middle / ours:.2f} | {share} | {notes.get(name, "")} |')
  yield ''


def median(values) -> float:
  """Computes the median, as a float."""
  return float(np.median(values))


def _median_of(run, repeats):
  """Measures the median seconds of a function."""
  return median(race({'': Entry(run)}, repeats)[''])


def duration(seconds: float) -> str:
  """Writes a time with three digits, in the unit that suits.

  >>> duration(0.01234), duration(1.5)
  ('12.3 ms', '1.5 s')
  """
  return f'{seconds:.3g} s' if seconds >= 0.1 else f'{1000 * seconds:.3g} ms'


def first_line(error: BaseException) -> str:
  """Tells what went wrong, short enough for a table."""
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:200]}'.replace('|', '/')


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
  """Raises TimeoutError in a block that takes longer; in the main thread, between two steps of Python."""

  def stop(*_):
    raise TimeoutError(f'not done in {seconds:.0f} s')

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# Launches.


class Kernel(NamedTuple):
  """What the profiler saw of all launches of one kernel, or of one kind of copy."""

  launches: int
  seconds: float


class Profile(NamedTuple):
  """What ran on the accelerators. Both are empty where the profiler tells nothing, as on a CPU.

  Attributes:
    kernels: by name, copies included.
    calls: launches by the host, by the name of the call; a graph of many kernels is one.
  """

  kernels: Mapping[str, Kernel]
  calls: Mapping[str, int]

  @property
  def launches(self) -> tuple[int, int] | str:
    """The numbers of (kernels, memory copies and fills); or `NOT_COUNTED`.

    >>> Profile({'gemm': Kernel(3, 0.1), 'MemcpyD2H': Kernel(2, 0.1)}, {}).launches
    (3, 2)
    """
    if not self.kernels:
      return NOT_COUNTED
    copies = sum(kernel.launches for name, kernel in self.kernels.items() if _COPY.search(name))
    return sum(kernel.launches for kernel in self.kernels.values()) - copies, copies

  def __str__(self) -> str:
    if not self.kernels:
      return NOT_COUNTED
    busy = sum(kernel.seconds for kernel in self.kernels.values())
    calls = ', '.join(f'{number} {name}' for name, number in self.calls.items())
    return '{} kernels, {} copies'.format(*self.launches) + f', {duration(busy)} together' + (
        f' ({calls})' if calls else '')

  def table(self, most: int = 60) -> Iterator[str]:
    """Yields what takes the most time, as Markdown."""
    yield '| kernel | launches | ms together |'
    yield '|---|---|---|'
    for name, kernel in sorted(self.kernels.items(), key=lambda item: -item[1].seconds)[:most]:
      yield f'| {name[:90].replace("|", "/")} | {kernel.launches} | {1000 * kernel.seconds:.3f} |'
    yield ''


_COPY = re.compile(r'mem(cpy|set)', re.IGNORECASE)
_LAUNCH = re.compile(r'^cu(da)?(LaunchKernel|GraphLaunch)')


def profile(fn: Callable, *args) -> Profile:
  """Runs `fn(*args)`, which should be compiled, under the profiler."""
  if jax.default_backend() == 'cpu':
    return Profile({}, {})
  with tempfile.TemporaryDirectory() as folder:
    try:
      jax.profiler.start_trace(folder, profiler_options=_options())
      try:
        jax.block_until_ready(fn(*args))
      finally:
        jax.profiler.stop_trace()
      return read_profile([
          jax.profiler.ProfileData.from_file(str(path)) for path in Path(folder).glob('**/*.xplane.pb')])
    except Exception as e:  # a measurement goes on without its profile
      print(f'No profile: {first_line(e)}', flush=True)
      return Profile({}, {})


def _options():
  """Makes the profiler's options, which leave out the Python of the host: it slows what is measured."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  options.host_tracer_level = 1
  return options


def read_profile(traces: Iterable[jax.profiler.ProfileData]) -> Profile:
  """Reads what ran on streams, and what the host launched; other lines of a device derive from these."""
  kernels, calls = {}, collections.Counter()
  for trace in traces:
    for plane in trace.planes:
      on_device = plane.name.startswith('/device:GPU')
      for line in plane.lines:
        if on_device and line.name.startswith('Stream'):
          for event in line.events:
            launches, seconds = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = Kernel(launches + 1, seconds + event.duration_ns / 1e9)
        elif plane.name.startswith('/host'):
          calls.update(event.name for event in line.events if _LAUNCH.match(event.name))
  return Profile(kernels, calls)
