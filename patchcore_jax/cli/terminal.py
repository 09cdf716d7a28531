"""What commands have in common: words and progress bars on the terminal, errors as one readable line.

The binaries in experiments/ share it. Nothing is imported here that a slip of the user would wait for.
"""

import contextlib
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console

from patchcore_jax.data.image_files import shown

DISTRIBUTED = ('distributed', 'coordinator_address', 'num_processes', 'process_id')
# Not by their flags, which the binaries write otherwise.
_ALL_THREE = "the coordinator's address, the number of processes and the id of this one"
_WORTH_KEEPING = 0.3  # seconds that compiling took; shorter ones would fill the disk with files

console = Console(highlight=False, soft_wrap=True)  # the first of several processes prints
notices = Console(highlight=False, soft_wrap=True)  # all of them print


class Interrupted(KeyboardInterrupt):
  """Ctrl-C in work of which part is kept; the message says what the same command would do."""


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
  """Yields `update(stage, done, total)`: bars with time left, or lines where there is no terminal."""
  if not console.is_terminal:
    yield _plain_progress(title)
    return
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

  columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
             TimeRemainingColumn(elapsed_when_finished=True))
  with Progress(*columns, console=console) as bars:
    tasks = {}

    def update(stage, done, total):
      if stage not in tasks:
        tasks[stage] = bars.add_task(f'{title}: {stage}')
      bars.update(tasks[stage], completed=done, total=total)

    yield update


def _plain_progress(title, every_seconds=30.0):
  """Makes `update` of `progress_bar` print a line when a stage ends, and now and then while it lasts."""
  began = said = time.monotonic()  # a stage begins where the one before ended

  def update(stage, done, total):
    nonlocal began, said
    now = time.monotonic()
    if done >= total:
      console.print(f'{title}: {stage} {done}/{total}, {now - began:.1f} s', markup=False)
      began = said = now
    elif now - said >= every_seconds:
      left = (now - began) * (total - done) / done
      console.print(f'{title}: {stage} {done}/{total}, about {left:.0f} s left', markup=False)
      said = now

  return update


def say(text: str, *, loud: bool = False) -> None:
  """Prints a line; `loud` makes it stand out on a terminal. Names of files never break it (`shown`)."""
  console.print(shown(text), style='bold red' if loud else None, markup=False)


def notice(text: str) -> None:
  """Prints a line, in each of several processes."""
  notices.print(shown(text), markup=False)


def listener() -> Any:
  """Makes the `evaluation.experiment.Listener` that shows a run on the terminal."""
  from patchcore_jax.evaluation import experiment

  return experiment.Listener(progress_bar, say, notice, say_which)


def say_which(names: Iterable[str]) -> None:
  """Says so where a network is not the best choice.

  Args:
    names: names of the networks.
  """
  from patchcore_jax import backbones
  from patchcore_jax.backbones import checkpoints

  for name in names:
    if name.endswith(f'.{backbones.RANDOM}'):
      say('RANDOM WEIGHTS: these numbers do not show what PatchCore can do.', loud=True)
    if advice := checkpoints.better_than(name):
      say(advice)


def keep_compiled(folder: str) -> None:
  """Has JAX keep the programs that it compiles, for this and later processes.

  A damaged entry is compiled anew. Programs for a CPU are for one kind of it, so each kind has a folder of
  its own. Where the user's cache folder cannot be written to, nothing is kept.

  Args:
    folder: a folder; 'auto' for one in the user's cache folder, or JAX_COMPILATION_CACHE_DIR; 'off' for none.

  Raises:
    ValueError: a folder that was named cannot be made.
  """
  import jax

  if folder == 'off' or folder == 'auto' and jax.config.jax_compilation_cache_dir:
    return
  named = folder != 'auto'
  if not named:
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(base, 'patchcore_jax', 'compiled', f'jax-{jax.__version__}-{_kind_of_cpu()}')
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError as e:
    if named:
      raise ValueError(
          f"The compilation cache {folder} cannot be made: {e.strerror or e}. Name another folder, or 'off' "
          'for none.') from e
    return
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', _WORTH_KEEPING)
  # XLA's own cache of what suits a GPU is not made for several processes at once, and whole programs hold it.
  jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')


def _kind_of_cpu():
  """Names what this CPU can do, in 8 hexadecimal digits."""
  try:
    with open('/proc/cpuinfo') as f:
      abilities = next((line for line in f if line.startswith(('flags', 'Features'))), '')
  except OSError:
    abilities = ''
  return hashlib.sha256((platform.machine() + platform.processor() + abilities).encode()).hexdigest()[:8]


def join_processes(
    distributed: bool = False, coordinator_address: str | None = None, num_processes: int | None = None,
    process_id: int | None = None) -> None:
  """Joins the other processes of a job, before anything else that asks JAX; alone, this does nothing.

  Args:
    distributed: Slurm, Open MPI or the TPU pod tells which process this is.
    coordinator_address, num_processes, process_id: elsewhere these do, all three.

  Raises:
    ValueError: nothing tells which process this is.
  """
  named = coordinator_address, num_processes, process_id
  if not distributed and named == (None, None, None):
    return
  if not distributed and None in named:
    raise ValueError(f'Expected {_ALL_THREE} together.')
  import jax

  try:
    jax.distributed.initialize(*named)
  except ValueError as e:
    raise ValueError(
        f'Nothing tells which process this is ({e}) Outside of Slurm, Open MPI and TPU pods give '
        f'{_ALL_THREE}.') from e
  console.quiet = jax.process_index() > 0


@contextlib.contextmanager
def readable_errors(debug: bool = False) -> Iterator[None]:
  """Turns a mistake of the user, and Ctrl-C, into one line on the standard error and an exit code.

  The code is 1, or 130 for Ctrl-C. Other errors are bugs, and show their trace.

  Args:
    debug: shows the trace of every error.
  """
  try:
    yield
  except KeyboardInterrupt as e:
    fail(f'interrupted. {e}'.strip(), code=130)
  except (ValueError, OSError) as e:
    if debug:
      raise
    for line in getattr(e, 'lines', ()):  # of `inspection.acceptance.NotAccepted`: one for each image
      print(one_line(line), file=sys.stderr)
    fail(_said(e))
  except RuntimeError as e:  # JAX's errors are such
    if debug or 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    fail(f'out of memory: use a smaller batch size. ({str(e).splitlines()[0]})')


def _said(error):
  """Says an error in words; Python's own of a file, such as "[Errno 13] Permission denied: 'a'", as ours."""
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f'{error.filename}: {error.strerror}. Look at the path, at its permissions and at the disk.'
  return str(error) or type(error).__name__


def one_line(text: str) -> str:
  """Puts a text on one line."""
  return shown(' '.join(text.split()))


def fail(message: str, code: int = 1) -> None:
  """Prints an error as one line and ends the process."""
  jax = sys.modules.get('jax')
  several = jax is not None and jax.distributed.is_initialized()
  who = f'process {jax.process_index()}: ' if several else ''
  if several and 'closed by peer' in message:
    message = f'another process ended, and has said why. ({message})'
  print(f'error: {who}{one_line(message)}', file=sys.stderr, flush=True)
  if several:
    os._exit(code)  # an orderly exit would wait for the others, and they for this one
  sys.exit(code)
