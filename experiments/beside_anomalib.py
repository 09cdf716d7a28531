r"""Fits and tests with this package and with anomalib's PatchCore, in turn, and compares the times.

    python -m venv ENV && ENV/bin/pip install anomalib torch
    python -m experiments.beside_anomalib --anomalib_python=ENV/bin/python --images=PATH/transistor \
        --workdir=runs/beside_anomalib

IMAGES is one category in MVTec's layout, of which the first training images are taken and test images of
all kinds. Both sides are whole commands in processes of their own (experiments/anomalib_peer.py and
experiments.fit_and_test): the same files, resolution, WideResNet-50 to layer3 and coreset, and
configs/parity/anomalib.py, with which this package does what anomalib does. Weights are random on both
sides, so that nothing is downloaded: they decide about scores, not about time. Ours runs twice, with a
cache of compiled programs, and with nothing compiled before, as the first run on a machine does.

Each run is added to WORKDIR/runs.jsonl; a command that was stopped goes on when it is given again. Prints
medians and ranges as a Markdown table.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, timing
from patchcore_jax.cli import terminal

cli.key_flags('workdir', 'images')

_PYTHON = flags.DEFINE_string(
    'anomalib_python', None, 'Interpreter of an environment with anomalib and torch.')
_RATIOS = flags.DEFINE_list('ratios', ['0.01', '0.1'], 'Of the coreset.')
_RUNS = flags.DEFINE_integer('runs', 3, 'Runs of each, in turn.', lower_bound=1)
_NUM_TRAIN = flags.DEFINE_integer('num_train', 90, 'Training images.', lower_bound=2)
_NUM_TEST = flags.DEFINE_integer('num_test', 38, 'Test images.', lower_bound=2)

_PEER = Path(__file__).with_name('anomalib_peer.py')
_CONFIG = Path(__file__).parents[1] / 'configs/parity/anomalib.py'
THEIRS, OURS, FIRST = 'anomalib', 'ours', 'ours, nothing compiled before'
_STAGES = ('start', 'fit', 'test', 'whole')


def main(_) -> None:
  run(_PYTHON.value, cli.IMAGES.value, cli.WORKDIR.value)


def run(python: str, images: str | os.PathLike, workdir: str | os.PathLike) -> None:
  """Runs what is missing, and prints the table.

  Raises:
    ValueError: too few images, no such interpreter, or a command that failed.
  """
  if not shutil.which(python):
    raise ValueError(f'No interpreter {python}: expected that of an environment with anomalib and torch.')
  workdir, ratios = Path(workdir), [float(ratio) for ratio in _RATIOS.value]
  folder = chosen_images(Path(images), workdir / 'images/part', _NUM_TRAIN.value, _NUM_TEST.value)
  for repeat in range(_RUNS.value):
    for ratio in ratios:
      compiled = workdir / f'compiled/{ratio:g}-{repeat}'
      for side, command in commands(python, folder, ratio, compiled).items():
        if any((r['side'], r['ratio'], r['repeat']) == (side, ratio, repeat) for r in read(workdir)):
          continue
        if side == FIRST:
          shutil.rmtree(compiled, ignore_errors=True)
          compiled.mkdir(parents=True)
        found = {'side': side, 'ratio': ratio, 'repeat': repeat, **measured(command)}
        with open(workdir / 'runs.jsonl', 'a') as f:
          f.write(json.dumps(found) + '\n')
        terminal.say(f'{ratio:g} {side}: {found["whole"]:.1f} s')
  print('\n'.join(table(read(workdir))))
  print(timing.machine())


def chosen_images(images: Path, to: Path, num_train: int, num_test: int) -> Path:
  """Copies the first training images, and test images evenly through all kinds, unless they are there.

  Raises:
    ValueError: fewer images than that.
  """
  if to.exists():
    return to
  train, test = (sorted(images.glob(pattern)) for pattern in ('train/good/*', 'test/*/*'))
  if len(train) < num_train or len(test) < num_test or not (images / 'test/good').is_dir():
    raise ValueError(
        f'{images} has {len(train)} training and {len(test)} test images: expected a category in the layout '
        f'of MVTec (train/good, test/good, test/KIND), with at least {num_train} and {num_test}. '
        '--num_train and --num_test take fewer.')
  test = [test[i * len(test) // num_test] for i in range(num_test)]
  aside = to.with_name(f'{to.name}.unfinished')
  shutil.rmtree(aside, ignore_errors=True)
  for path in (*train[:num_train], *test):
    target = aside / path.relative_to(images)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
  return aside.rename(to)


def commands(python: str, folder: Path, ratio: float, compiled: Path) -> dict[str, list[str]]:
  """Lists the commands that are compared, by side; the second fills the cache that the third has."""
  ours = [
      sys.executable, '-m', 'experiments.fit_and_test', f'--config={_CONFIG}', f'--config.data.root={folder}',
      '--config.backbone.weights=random', f'--config.coreset.ratios={ratio},',
      f'--compilation_cache={compiled}']
  return {THEIRS: [python, str(_PEER), str(folder), f'--ratio={ratio}'], FIRST: ours, OURS: ours}


def measured(command: Sequence[str]) -> dict[str, Any]:
  """Runs a command, and adds to what its last line says the seconds of the whole, and those before the fit.

  Raises:
    ValueError: it failed, or its last line is no JSON.

  >>> found = measured([sys.executable, '-c', '''print('{"fit": 0.0, "test": 0.0}')'''])
  >>> found['fit'], 0 < found['start'] == found['whole']
  (0.0, True)
  """
  began = time.perf_counter()
  done = subprocess.run(command, capture_output=True, text=True, cwd=_CONFIG.parents[2])
  whole = time.perf_counter() - began
  try:
    done.check_returncode()
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, 'start': whole - found['fit'] - found['test'], 'whole': whole}
  except (subprocess.CalledProcessError, IndexError, KeyError, TypeError, ValueError) as e:
    last = (done.stderr.strip() or done.stdout.strip() or 'it said nothing').splitlines()[-1]
    raise ValueError(f'{" ".join(command)} failed with code {done.returncode}: {last}') from e


def read(workdir: Path) -> list[dict[str, Any]]:
  """Reads the runs so far."""
  path = workdir / 'runs.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
  """Writes runs as Markdown: medians, ranges, and by how much anomalib takes longer.

  >>> run = {'ratio': 0.01, 'start': 1, 'fit': 2, 'test': 1, 'bank_size': 9, 'num_train': 9, 'num_test': 2}
  >>> table([{**run, 'side': 'ours', 'whole': 4, 'versions': 'a'},
  ...        {**run, 'side': 'anomalib', 'whole': 9, 'versions': 'b'}])[5]
  '| 1 % | whole command | 9 s | 4 s | 2.2 | - | - |'
  """
  lines = [f'| coreset | stage | anomalib | ours | times ours | {FIRST} | times that |',
           '|---|---|---|---|---|---|---|']
  for ratio in sorted({r['ratio'] for r in runs}):
    for stage in _STAGES:
      of = {side: [r[stage] for r in runs if (r['side'], r['ratio']) == (side, ratio)]
            for side in (THEIRS, OURS, FIRST)}
      words = {'start': 'imports, network', 'whole': 'whole command'}.get(stage, stage)
      lines.append(
          f'| {100 * ratio:g} % | {words} | {_spread(of[THEIRS])} | {_spread(of[OURS])} | '
          f'{_times(of[THEIRS], of[OURS])} | {_spread(of[FIRST])} | {_times(of[THEIRS], of[FIRST])} |')
  first = runs[0]
  sizes = sorted({(r['ratio'], r['bank_size']) for r in runs})
  return [*lines, '', (
      f'{first["num_train"]} training and {first["num_test"]} test images; banks of '
      f'{", ".join(str(size) for _, size in sizes)} patches; '
      f'{"; ".join(sorted({r["versions"] for r in runs}))}. Medians, and the range.')]


def _spread(seconds):
  """Writes the median, and the range where there are several."""
  if not seconds:
    return '-'
  middle = timing.duration(timing.median(seconds))
  several = f' ({min(seconds):.3g} to {max(seconds):.3g})' if len(seconds) > 1 else ''
  return middle + several


def _times(theirs, ours):
  """Writes how many times as long theirs take."""
  return f'{timing.median(theirs) / timing.median(ours):.1f}' if theirs and ours else '-'


if __name__ == '__main__':
  flags.mark_flags_as_required(['anomalib_python', 'images', 'workdir'])
  cli.run(main)
