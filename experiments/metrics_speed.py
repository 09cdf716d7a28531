"""Measures the time and memory of metrics of a category's maps, beside anomalib and MVTec's script.

    python -m experiments.benchmark --subject=metrics [--anomalib=ENV/bin/python] [--official=FOLDER]

Every computation is a process of its own (experiments/metrics_peer.py) that is given the same files: float32
maps and bool masks that `draw` makes. Imports and reading are outside of the time, except
in the last row, where each map is read from its file whenever it is asked for. anomalib computes pixel AUROC,
AP, F1-max and AUPRO, each by a class of its own, as its engine does; MVTec's script its AU-PRO and the AUROC
of images. Ours computes the same metrics beside each, and all of its table at once.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import timing

_PEER = Path(__file__).with_name('metrics_peer.py')
_SCRIPT = ('pro_curve_util.py', 'roc_curve_util.py', 'generic_util.py')
_CELLS = 28  # of a map, in each direction, whose scores are alike
# What ours computes, by the names of the peer.
_OURS = {
    'all': 'all metrics of the table', 'ad': 'all but those of AD 2 and LOCO', 'pixel_auroc': 'pixel AUROC',
    'aupro': 'AUPRO', 'aupimo': 'AUPIMO', 'aupimo_nearest': "AUPIMO by the authors' rule"}
_HEAD = ('| what | side | median | range | memory beyond maps | times ours |', '|---|---|---|---|---|---|')


def draw(i: int, images: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws the map and the mask of one image; the first quarter of the images is good.

  Scores are within [0, 1], where anomalib leaves them as they are. A defect is one to three boxes, of a
  thousandth to a sixteenth of the image each, whose pixels score higher by a constant of the image.

  Args:
    i: which image.
    images: of how many.
    size: height and width in pixels, from 28 on.

  Returns:
    A map [size, size] float32 and a mask, bool.

  >>> scores, mask = draw(3, 4, 28)
  >>> scores.dtype.name, scores.shape, bool(mask.any()), bool(draw(0, 4, 28)[1].any())
  ('float32', (28, 28), True, False)
  """
  rng = np.random.default_rng((i, size))
  at = np.arange(size) * _CELLS // size
  scores = 0.4 * rng.random((_CELLS, _CELLS), np.float32)[at[:, None], at]
  scores += 0.2 * rng.random((size, size), np.float32)
  mask = np.zeros((size, size), bool)
  if i >= images // 4:
    for _ in range(rng.integers(1, 4)):
      height, width = np.ceil(size * rng.uniform(0.03, 0.25, 2)).astype(int)
      top, left = rng.integers(0, size - height), rng.integers(0, size - width)
      mask[top:top + height, left:left + width] = True
    scores += np.float32(rng.uniform(0.05, 0.4)) * mask
  return scores, mask


def measure(
    images: int = 160, size: int = 448, large: int = 2000, repeats: int = 3, *, anomalib: str | None = None,
    official: str | None = None) -> Iterator[str]:
  """Measures all sides, and yields a table of times and memory, and one of the values side by side.

  Args:
    images: how many.
    size: of maps that lie in memory.
    large: of as many maps that are read from files; 0 leaves them out.
    repeats: runs of ours; the others run once.
    anomalib: an interpreter that has it.
    official: the folder of MVTec's script (`mvtec_ad_evaluation`), run by this interpreter.

  Raises:
    ValueError: no such interpreter, no script in the folder, or a process that failed.
  """
  if anomalib and not shutil.which(anomalib):
    raise ValueError(f'No interpreter {anomalib}: expected that of an environment with anomalib.')
  if official and (absent := [name for name in _SCRIPT if not (Path(official) / name).is_file()]):
    raise ValueError(f"{official} has no {absent[0]}: expected the folder of MVTec's evaluation script.")
  yield f'### Metrics of {images} images of {size} px, float32\n'
  yield from _HEAD
  with tempfile.TemporaryDirectory(prefix='metrics_speed') as folder:
    write(folder, images, size)
    for what, title in _OURS.items():
      yield _row(title, 'ours', run(folder, 'ours', what, repeats=repeats))
    values = []
    for side, given, what, title in (
        ('anomalib', anomalib, 'four', 'pixel AUROC, AP, F1-max, AUPRO'),
        ('official', official, 'official', 'AU-PRO 0.3 and image AUROC')):
      own = run(folder, 'ours', what, repeats=repeats)
      yield _row(title, 'ours', own)
      if given:
        python, more = (given, ()) if side == 'anomalib' else (sys.executable, (f'--official={given}',))
        other = run(folder, side, what, *more, python=python)
        yield _row(title, side, other, own)
        values.append((side, own['values'], other['values']))
      else:
        yield f'| {title} | {side} | not given | | | |'
  if large:
    with tempfile.TemporaryDirectory(prefix='metrics_speed') as folder:
      write(folder, images, large)
      title = f'{_OURS["all"]}, {images} images of {large} px read from files'
      yield _row(title, 'ours', run(folder, 'ours', 'all', '--read_each_time'))
  yield ''
  if values:
    yield '| metric | side | value | ours | difference |'
    yield '|---|---|---|---|---|'
    for side, ours, theirs in values:
      for name, value in theirs.items():
        yield f'| {name} | {side} | {value:.12f} | {ours[name]:.12f} | {value - ours[name]:.1e} |'
    yield ''


def write(folder: str | Path, images: int, size: int) -> None:
  """Writes maps and masks as the peer reads them."""
  for i in range(images):
    for name, array in zip(('map', 'mask'), draw(i, images, size), strict=True):
      np.save(Path(folder) / f'{i}.{name}.npy', array)


def run(
    folder: str | Path, side: str, what: str, *more: str, repeats: int = 1,
    python: str = sys.executable) -> dict[str, Any]:
  """Runs the peer, and returns what it found: seconds of each run, bytes beyond the maps, and the values.

  Raises:
    ValueError: it failed.
  """
  command = [
      python, str(_PEER), str(folder), f'--side={side}', f'--what={what}', f'--repeats={repeats}', *more]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    said = (done.stderr.strip() or 'it said nothing').splitlines()[-1]
    raise ValueError(f'{" ".join(command)} failed with code {done.returncode}: {said}')
  return json.loads(done.stdout.splitlines()[-1])


def _row(title: str, side: str, found: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> str:
  """Writes a line of the table; `own` is what ours found of the same metrics."""
  seconds = found['seconds']
  middle = timing.median(seconds)
  times = f'{middle / timing.median(own["seconds"]):.1f}' if own else ''
  spread = f'{timing.duration(min(seconds))} to {timing.duration(max(seconds))}' if len(seconds) > 1 else ''
  memory = f'{found["bytes"] / 1e9:.2f} GB'
  return f'| {title} | {side} | {timing.duration(middle)} | {spread} | {memory} | {times} |'
