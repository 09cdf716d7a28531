"""Runs the parts of `experiments.gpu_check`, which starts this as a process and says what they are."""

import dataclasses
import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import alternatives, entries, equality, gpu_report, timing
from patchcore_jax import detectors
from patchcore_jax.detectors import PatchCore
from patchcore_jax.search import coreset

_HALF = ('tensorfloat32', 'bfloat16')


@dataclasses.dataclass
class Run:
  """What the parts share: the settings, the limits, the time and the report.

  Attributes:
    folder: folder of the report.
    settings: as `gpu_check` gives them.
    limits: what the machine can do.
    until: the time, as `time.time` tells it, at which the present part should have ended.
  """

  folder: Path
  settings: Mapping[str, Any]
  limits: timing.Limits
  until: float

  @property
  def small(self) -> bool:
    return self.settings['small']

  def say(self, *lines: str) -> None:
    """Prints lines, and adds them to the report."""
    gpu_report.say(self.folder, *lines)

  def keep(self, **figures: Any) -> None:
    """Writes figures down at once; a name's double underscore stands for a slash."""
    gpu_report.keep(self.folder, {name.replace('__', '/'): value for name, value in figures.items()})

  def left(self) -> float:
    """Computes the seconds that are left for the present part."""
    return self.until - time.time()

  def race(self, title: str, work: entries.Entries, repeats: int = 3, notes: Callable | Mapping = ()):
    """Runs a race, prints its table, and returns the medians by name."""
    failures = {}
    seconds = timing.race(work, repeats, failures)
    if seconds:
      notes = notes(seconds) if callable(notes) else dict(notes)
      self.say(*timing.table(title, work, seconds, notes, self.limits))
    for name, error in failures.items():
      self.say(f'{name} FAILED: {error}\n')
    return {name: timing.median(values) for name, values in seconds.items()}


  def tell_launches(self, name: str, fn: Callable) -> timing.Profile:
    """Tells what a call launches; its kernels go into kernels.md."""
    seen = timing.profile(fn)
    self.say(f'Launches of {name}: {seen}\n')
    if seen.kernels:
      with open(self.folder / gpu_report.KERNELS, 'a') as f:
        f.write('\n'.join((f'## {name}: {seen}\n', *seen.table(), '')))
    return seen


def main(argv: list[str]) -> None:
  settings = json.loads(argv[1])
  run = Run(Path(argv[0]), settings, timing.limits(settings['small']), settings['until'])
  machine = timing.machine(run.limits).strip()
  if not gpu_report.measured(run.folder):
    run.say('# The package on this machine\n', f'{machine} {_torch_version()}\n')
    run.keep(machine=machine, small=run.small)
  for name in settings['parts']:
    needed, most = settings['limits'][name]
    run.until = min(settings['until'], time.time() + most) - 3
    run.keep(begun=[*gpu_report.measured(run.folder).get('begun', []), name])
    if run.left() < needed and not run.small:
      run.say(f'**{name}: skipped, {run.left():.0f} s are left and it takes {needed:.0f} at the least.**\n')
      continue
    began = time.time()
    run.say(f'## {name}\n')
    try:
      PARTS[name](run)
    except Exception as e:
      run.say(f'**{name} FAILED: {timing.first_line(e)}**\n')
      traceback.print_exc()
    gc.collect()
    alternatives.torch_release()
    run.say(f'({name}: {time.time() - began:.0f} s)\n')


def _torch_version():
  """Names the version and the device of torch."""
  if not alternatives.available('torch'):
    return 'torch is not installed.'
  return f'torch {alternatives.torch_on_all_cores().__version__} on {alternatives.torch_device()}.'


def selection(run: Run) -> None:
  """Measures a selection, and compares its picks with those of torch's loop and of the definition."""
  points, what = _points(run)
  size = coreset.coreset_size(len(points), 0.1)
  work, picks = entries.selection_entries(
      points, size, steps=min(size, 100 if run.small else 3000), dense_steps=min(size, 1000), anomalib=True)
  medians = run.race(
      f'{size} of {len(points)} points of {points.shape[1]} values, {what}', work, 3,
      lambda _: entries.picks_notes(work, picks))
  if 'lazy' in medians:
    others = [name for name in ('our dense loop', 'torch, a norm per step') if name in picks]
    same = all((picks[name] == picks['lazy'][:len(picks[name])]).all() for name in others)
    run.keep(selection__ours=medians['lazy'], selection__but='' if same else ', but other picks')
  if 'torch, a norm per step' in medians:
    run.keep(selection__torch=medians['torch, a norm per step'])
  run.tell_launches('selection', work['lazy'].run)
  _large_selection(run)


def _points(run):
  """Reads or makes the points of the selection, and says what they are."""
  if path := run.settings['points']:
    return np.load(path), f'from {Path(path).name}'
  return entries.clustered(3000 if run.small else 250_880, 16 if run.small else 128), 'made clusters'


def _large_selection(run):
  """Measures a selection of a tenth of 1,000,000 points."""
  n = 6000 if run.small else 1_000_000
  points, size = jax.numpy.asarray(entries.clustered(n)), n // 10
  seconds = []
  for _ in range(2):
    began = time.perf_counter()
    coreset.greedy_k_center(points, size, start=entries.start_of(n))
    seconds.append(time.perf_counter() - began)
  first, second = seconds
  run.say(f'{size} of {n} made points: {second:.2f} s; the first time, compiling too, {first:.2f} s\n')
  run.keep(selection_large__ours=second)


def network(run: Run) -> None:
  """Measures networks at two sizes: images a second, and how far the maps are from float32."""
  architecture = 'resnet18' if run.small else entries.WIDE_RESNET
  made = {}
  for size, batch in _sizes(run):
    made[size, batch] = entries.network_entries(
        entries.pictures(batch, size), _HALF, architecture=architecture,
        torch_compile=run.settings['torch_compile'])
  timing.compile_side_by_side(entry for work, _ in made.values() for entry in work.values())
  for (size, batch), (work, maps) in made.items():
    medians = run.race(
        f'{architecture} to layer3, {size} px, one of {batch} images', work, 10,
        lambda seconds, work=work, maps=maps: entries.rate_notes(work, seconds, maps))
    _keep_rates(run, f'network_{size}', medians)


def _sizes(run):
  """Lists (size of images in pixels, batch size)."""
  return ((64, 2),) if run.small else ((224, 64), (448, 16))


def _keep_rates(run, name, medians):
  """Writes down images a second, ours and torch's, by precision."""
  for precision in _HALF:
    for side, entry in (('ours', f'JAX {precision}'), ('torch', f'torch {precision}')):
      if entry in medians:
        run.keep(**{f'{name}_{precision}__{side}': 1 / medians[entry]})
        if side == 'torch':  # a row of batches takes it as long as each by itself
          run.keep(**{f'{name}_{precision}_row__torch': 1 / medians[entry]})
    if in_a_row := [value for entry, value in medians.items() if entry.startswith(f'JAX {precision},')]:
      run.keep(**{f'{name}_{precision}_row__ours': 1 / in_a_row[0]})


def search(run: Run) -> None:
  """Measures three searches, and checks a sample of each in float64."""
  shapes = ((256, 2000, 256, 8),) if run.small else (
      (50_176, 250_000, 1024, 64), (50_176, 25_000, 1024, 64), (6272, 25_000, 1024, 1024))
  for i, (num_queries, num_rows, dim, rank) in enumerate(shapes):
    queries, bank = entries.of_rank(num_queries, num_rows, dim, rank)
    work, found, notes = entries.search_entries(queries, bank, plain=False)
    shape = f'rank {rank}' if rank < dim else 'the same in every direction'
    timing.compile_side_by_side(work.values())
    medians = run.race(
        f'{num_queries} queries in {num_rows} x {dim}, {shape}', work, 10,
        lambda _, search=(found, notes, queries, bank): _search_notes(*search))
    alternatives.torch_release()
    if i == 0:
      run.tell_launches('search', work['bfloat16 shortlist'].run)
      ours = min(medians[name] for name in medians if 'shortlist' in name)
      run.keep(search__ours=ours)
      if theirs := [value for name, value in medians.items() if name.startswith('torch cdist')]:
        run.keep(search__torch=theirs[0])  # in float32
      if not (found['float32 shortlist'] == found['bfloat16 shortlist']).all():
        run.keep(search__but=', but the two shortlists differ')


def _search_notes(found, notes, queries, bank):
  """Counts indices that differ, and those of a sample that are nearest in float64."""
  sample = np.random.default_rng(0).permutation(len(queries))[:64]
  nearest = _float64_distances_sq(queries[sample], bank)
  least, notes = nearest.min(1), dict(notes)
  for name, indices in found.items():
    theirs = np.take_along_axis(nearest, indices[sample][:, None].astype(int), 1)[:, 0]
    exact = int((theirs <= least * (1 + 1e-5) + 1e-9).sum())  # but for ties within float32
    different = int((indices != found['float32 shortlist']).sum())
    notes[name] = '; '.join(filter(None, [
        f'{different} indices differ', f'{exact} of {len(sample)} nearest in float64', notes.get(name)]))
  return notes


def _float64_distances_sq(queries, bank, rows=25_000):
  """Computes the squared distances of queries to all rows in float64, some rows at a time."""
  queries = queries.astype(np.float64)
  parts = []
  for begin in range(0, len(bank), rows):
    part = bank[begin:begin + rows].astype(np.float64)
    parts.append((queries**2).sum(1)[:, None] + (part**2).sum(1) - 2 * queries @ part.T)
  return np.concatenate(parts, axis=1)


def predict(run: Run) -> None:
  """Measures predictions: images a second with the maps on the host, and what a batch launches."""
  architecture = 'resnet18' if run.small else entries.WIDE_RESNET
  rows = np.random.default_rng(1).standard_normal(
      (256 if run.small else entries.BANK_SIZE, 1024), np.float32)
  made = {}
  for size, batch in _sizes(run):
    made[size, batch] = entries.prediction_entries(
        entries.pictures(batch, size), rows, _HALF, architecture=architecture, stream=8)
  timing.compile_side_by_side(entry for work, _ in made.values() for entry in work.values())
  for (size, batch), (work, batches) in made.items():
    medians = run.race(
        f'predict: {architecture}, {size} px, one of {batch} images, bank of {len(rows)} made rows', work, 10,
        functools.partial(entries.rate_notes, work))
    _keep_rates(run, f'predict_{size}', medians)
    for precision, one in batches.items():
      seen = run.tell_launches(f'predict_{size}_{precision}', one)
      if seen.kernels:
        most = gpu_report.measured(run.folder).get('launches/ours', 0)
        run.keep(launches__ours=max(seen.launches[0], most))


def same_as_cpu(run: Run) -> None:
  """Compares answers with those of this machine's CPU."""
  with_cpu = equality.compare(Path(run.settings['scratch']), small=run.small, seconds=run.left())
  run.say('| what | difference | allowed | |', '|---|---|---|---|')
  for row in with_cpu:
    run.say(f'| {row.what} | {row.difference} | {row.allowed} | {"pass" if row.passed else "FAIL"} |')
  run.say('')
  run.keep(equality={row.what: row.passed for row in with_cpu})


def parity(run: Run) -> None:
  """Compares the package with the reference arrays that lie in the project."""
  folder = Path(run.settings['golden'])
  if not folder.is_dir():
    run.say(f'Not compared: no folder {folder} (--golden).\n')
    return
  if missing := _missing('ml_collections', 'rich'):
    run.say(f'Not compared: {missing} cannot be imported.\n')
    return
  from experiments import parity as checks
  run.say(f'Arrays in {folder}.\n', '| what | passed | failed | |', '|---|---|---|---|')
  every = (checks.selections, checks.embeddings, checks.end_to_end_paper, checks.end_to_end_anomalib,
           checks.networks)  # the others run on the host
  passed, failed = 0, []
  for check in every[:1] if run.small else every:
    rows = []
    for row in check(folder):
      rows.append(row)
      if run.left() < 0:
        break
    bad = [row for row in rows if not row.passed]
    passed, failed = passed + len(rows) - len(bad), failed + bad
    run.say(f'| {check.__name__.replace("_", " ")} | {len(rows) - len(bad)} | {len(bad)} | '
            + '; '.join(f'{row.quantity} ({row.origin}): {row.absolute:.1e}, relative {row.relative:.1e}, '
                        f'allowed {row.tolerance:.0e}' for row in bad) + ' |')
    run.keep(parity={'passed': passed, 'failed': [row.quantity for row in failed]})
    if run.left() < 0:
      run.say('\nThe time was over before the end.')
      break
  run.say('')


def demo(run: Run) -> None:
  """Runs the demo config as a user does, twice."""
  if missing := _missing('ml_collections'):
    run.say(f'Not run: {missing} cannot be imported.\n')
    return
  folder = Path(run.settings['scratch'])
  environment = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'XLA_PYTHON_CLIENT_MEM_FRACTION': '.25'}
  extra = ['--config.data.categories=circuit_board', '--config.data.shots=8'] if run.small else []
  for i, name in enumerate(('first', 'second')):
    command = [sys.executable, '-m', 'experiments.mvtec', '--config=configs/demo.py',
               f'--workdir={folder}/{name}', f'--config.data.root={folder}/synthetic', *extra]
    began = time.perf_counter()
    done = subprocess.run(
        command, env=environment, timeout=max(1, run.left()), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
      run.say(f'The {name} time it ended with {done.returncode}: {done.stderr[-500:]}\n')
      return
    run.say(f'The {name} time: {seconds:.1f} s\n')
    if i:
      run.keep(demo__ours=seconds)
  run.say('```', *done.stdout.strip().splitlines()[-12:], '```', '')


def resolution(run: Run) -> None:
  """Measures fits and predictions at high resolution, with layers 1 to 3 and a bank of 10 %."""
  sizes = ((64, 4, 2),) if run.small else ((448, 56, 8), (768, 20, 4))
  total = 0.0
  run.say('| px | images | told before | embed | project | coreset | predict an image | memory |',
          '|---|---|---|---|---|---|---|---|')
  for size, number, batch in sizes:
    seconds = _resolution_row(run, size, number, batch)
    total += sum(seconds)
  run.say('')
  run.keep(resolution__ours=total)


def _resolution_row(run, size, number, batch):
  """Measures a fit and predictions at one size: prints a row, and returns the seconds of its parts."""
  from patchcore_jax.data.dataset import ArrayData
  from patchcore_jax.detectors import streaming
  backbone = entries.network(
      'float32' if run.small else 'tensorfloat32', 'resnet18' if run.small else entries.WIDE_RESNET,
      ('layer1', 'layer2', 'layer3'))
  images = [entries.pictures(batch, size, seed=i) for i in range(number // batch)]
  data, detector = ArrayData(np.concatenate(images), batch), PatchCore(0.1)
  plans, ends, began = [], {}, time.perf_counter()

  def progress(stage, done, total):
    ends[stage] = time.perf_counter()

  model = detector.fit(data, (backbone,), detectors.Run(notify=plans.append, progress=progress))
  stages = np.diff([began, *(ends.get(stage, began) for stage in ('embed', 'project', 'coreset'))])
  seconds, batches = [], list(data.batches())
  began = time.perf_counter()
  for _ in streaming.predict(detector.score_fn(model, (backbone,)), batches):
    seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
  memory = jax.local_devices()[0].memory_stats() or {}
  peak = f'{memory["peak_bytes_in_use"] / 1e9:.1f} GB so far' if 'peak_bytes_in_use' in memory else '-'
  times = [timing.duration(x) for x in (*stages, timing.median(seconds) / batch)]
  run.say('| ' + ' | '.join([str(size), str(number), plans[0], *times, peak]) + ' |')
  return [*stages, *seconds]


def _missing(*modules):
  """Lists those of the modules that are not installed."""
  return ', '.join(m for m in modules if importlib.util.find_spec(m) is None)


PARTS: dict[str, Callable[[Run], None]] = {
    'selection': selection, 'network': network, 'search': search, 'predict': predict,
    'equality': same_as_cpu, 'parity': parity, 'demo': demo, 'resolution': resolution}


if __name__ == '__main__':
  main(sys.argv[1:])
