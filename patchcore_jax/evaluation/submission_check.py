"""Checks and packs a submission to the server of MVTec AD 2, made here or elsewhere.

    <name>/anomaly_images/<object>/{test_private,test_private_mixed}/NNN_{regular,mixed}.tiff
    <name>/anomaly_images_thresholded/<object>/{test_private,test_private_mixed}/NNN_{regular,mixed}.png

The rules are those of the data set's public utilities (Heckler-Kram et al., arXiv 2503.21622), as read in a
copy, and some that those leave unchecked.
"""

import concurrent.futures
import gzip
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from patchcore_jax import atomic_files
from patchcore_jax.data import image_contents, map_files
from patchcore_jax.data.image_errors import ImageError

# Images of each object in either split.
COUNTS = {'can': 321, 'fabric': 314, 'fruit_jelly': 255, 'rice': 277, 'sheet_metal': 142, 'vial': 276,
          'wallplugs': 232, 'walnuts': 228}
SPLITS = {'test_private': 'regular', 'test_private_mixed': 'mixed'}  # and how names end there
MAPS, MARKS = 'anomaly_images', 'anomaly_images_thresholded'
SUFFIXES = {MAPS: '.tiff', MARKS: '.png'}
_SHOWN = 3  # names in a line
_COMPRESSION = 1  # mantissas hardly compress, and there are tens of gigabytes of them

Progress = Callable[[str, int, int], None]


def silent(*_: Any) -> None:
  """Tells nobody."""


class Finding(NamedTuple):
  """Something that is wrong with a submission.

  Attributes:
    path: where, below its folder; '' for the folder itself.
    problem: what.
    is_error: whether MVTec's checker refuses it, or the file cannot be used; otherwise it is probably a
      mistake.
  """

  path: str
  problem: str
  is_error: bool = True


def check(
    folder: str | os.PathLike, *, data: str | os.PathLike = '', counts: Mapping[str, int] | None = None,
    progress: Progress = silent) -> list[Finding]:
  """Looks for what is wrong with a submission: names and counts, and what each file holds.

  Beyond the rules of MVTec's checker, maps must be finite and as large as their marks. Constant maps, marks
  that do not lie where the map is highest, and maps of another size than the image are told.

  Args:
    folder: the submission, as it is to be packed.
    data: folder of the data set, with whose images sizes are compared; '' for not.
    counts: how many images each object has in either split; None for `COUNTS`.
    progress: called with ('check', done, total).

  Returns:
    What was found, in the order of the folders; empty where all is well.

  Raises:
    ValueError: there is no such folder.
  """
  folder, counts = Path(folder), COUNTS if counts is None else counts
  if not folder.is_dir():
    raise ValueError(f'There is no folder {folder}: expected that of a submission.')
  kinds = [MAPS, MARKS] if os.path.lexists(folder / MARKS) else [MAPS]
  found = _compared(folder, '', kinds)
  if kinds == [MAPS]:
    found.append(Finding(MARKS, 'is missing: no metric that takes a threshold will be computed', False))
  for kind in kinds:
    found += _compared(folder, kind, counts)
    for name, count in counts.items():
      found += _compared(folder, f'{kind}/{name}', SPLITS)
      for split in SPLITS:
        names = [stem + SUFFIXES[kind] for stem in stems(split, count)]
        found += _compared(folder, f'{kind}/{name}/{split}', names, files=True)
  below = [f'{name}/{split}/{stem}' for name, count in counts.items() for split in SPLITS
           for stem in stems(split, count)]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for done, findings in enumerate(pool.map(lambda name: _of_image(folder, name, data), below), 1):
      found += findings
      progress('check', done, len(below))
  return found


def pack(folder: str | os.PathLike) -> Path:
  """Packs the files of a submission as <folder>.tar.gz beside it, unchecked.

  Its members are <folder's name>/..., files only. The same files give the same archive, which appears whole,
  or not at all.

  Returns:
    The archive.

  Raises:
    OSError: a file cannot be read, or the archive not be written.
  """
  folder = Path(os.path.abspath(folder))
  archive = folder.with_name(f'{folder.name}.tar.gz')
  paths = sorted(path for path in folder.rglob('*') if path.is_file())
  with (atomic_files.written(archive) as aside, aside.open('wb') as out,
        gzip.GzipFile('', 'wb', _COMPRESSION, out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode='w') as tar):
    for path in paths:
      member = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
      member.size = path.stat().st_size
      with path.open('rb') as file:
        tar.addfile(member, file)
  return archive


def stems(split: str, count: int) -> list[str]:
  """Lists the names of a split's images without their suffix."""
  return [f'{i:03}_{SPLITS[split]}' for i in range(count)]


def some(names: Sequence[str]) -> str:
  """Lists the first of some names."""
  return ', '.join(names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')


def _compared(folder: Path, where: str, expected: Any, *, files: bool = False) -> list[Finding]:
  """Compares what a folder holds, if it is there, with what it should; hidden files count."""
  if not (folder / where).is_dir():
    return []  # which is told of the folder above
  expected, what = list(expected), 'files' if files else 'folders'
  with os.scandir(folder / where) as entries:
    kinds = {entry.name: entry.is_file() if files else entry.is_dir() for entry in entries}
  missing = [name for name in expected if not kinds.get(name)]
  others = sorted(name for name, right in kinds.items() if name not in expected or not right)
  found = []
  if missing:
    found.append(Finding(where, f'lacks {len(missing)} of {len(expected)} {what}: {some(missing)}'))
  if others:
    found.append(Finding(where, f'holds {len(others)} that do not belong there: {some(others)}'))
  return found


def _of_image(folder: Path, name: str, data: str | os.PathLike) -> list[Finding]:
  """Looks at the map and the marks of one image."""
  found, values = [], None
  where = f'{MAPS}/{name}{SUFFIXES[MAPS]}'
  if (folder / where).is_file():
    try:
      values = map_files.read_map(folder / where)
    except ImageError as e:
      found.append(Finding(where, str(e)))
    else:
      if values.dtype != np.float16:
        found.append(Finding(where, f'has values of {values.dtype}: expected float16'))
      if values.min() == values.max():
        found.append(Finding(where, f'is {values.min():.4g} everywhere', False))
      found += _of_size(where, values.shape, Path(data) / f'{name}.png' if data else None)
  where = f'{MARKS}/{name}{SUFFIXES[MARKS]}'
  if (folder / where).is_file():
    found += [Finding(where, problem, is_error) for problem, is_error in _of_marks(folder / where, values)]
  return found


def _of_size(where: str, shape: tuple[int, int], image: Path | None) -> list[Finding]:
  """Compares the size of a map with that of its image."""
  if image is None:
    return []
  try:
    width, height = image_contents.contents(image).size
  except ImageError as e:
    return [Finding(where, f'has no image to compare its size with: {e}', False)]
  if shape == (height, width):
    return []
  return [Finding(
      where, f'is {shape[1]} x {shape[0]} pixels, its image {width} x {height} (width x height)', False)]


def _of_marks(path: Path, values: np.ndarray | None) -> Iterator[tuple[str, bool]]:
  """Tells what is wrong with a thresholded image, and whether that is an error."""
  try:
    contents = image_contents.contents(path)
    with Image.open(path) as image:
      kind, marks = image.format, np.asarray(image)
  except (ImageError, *image_contents.DECODING_ERRORS) as e:
    yield f'cannot be read: {e}', True
    return
  if kind != 'PNG' or contents.mode != 'L' or contents.bits != 8 or contents.pages > 1 or contents.alpha:
    yield f'is a {kind} of mode {contents.mode} with {contents.bits} bits: expected a PNG, gray, 8 bits', True
    return
  if (other := np.flatnonzero(np.bincount(marks.ravel(), minlength=256)[1:255])).size:
    yield f'has other values than 0 and 255, such as {other[0] + 1}', True
    return
  if values is None:
    return
  if marks.shape != values.shape:
    yield (f'is {marks.shape[1]} x {marks.shape[0]} pixels, its map {values.shape[1]} x {values.shape[0]} '
           '(width x height)', True)
  elif marks.any() and not marks.all() and values[marks > 0].min() < values[marks == 0].max():
    yield 'marks pixels whose score is lower than that of some it does not mark', False
