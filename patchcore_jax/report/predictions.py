"""What a prediction run writes: a table of answers, and pictures, a file for each image.

A folder of them appears whole (`unfinished`, then `publish`). What is added to a published one, while images
still arrive, is whole too: tables grow by whole rows, and files appear at once.
"""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from patchcore_jax import atomic_files
from patchcore_jax.inspection import Finding

CSV, JSONL, REPORT = 'predictions.csv', 'predictions.jsonl', 'report.html'
OVERLAYS, MAPS, MASKS, WHY = 'overlays', 'maps', 'masks', 'why'
_ENTRIES = (OVERLAYS, MAPS, MASKS, WHY, CSV, JSONL, REPORT)  # in the order in which they appear
_UNFINISHED = 'predictions.unfinished'
_QUICK = 1  # level of zlib: a third of the time of the usual 6, and a tenth more bytes
# Every row has the same fields, so that its readers need not ask for them.
_NOTHING_FOUND = dict.fromkeys(Finding((0, 0), 0.0).to_json())


class Answer(NamedTuple):
  """A row: what was found in an image file, and the pictures of it.

  Attributes:
    path: path of the image.
    finding: what was found; None where there is no answer.
    overlay, map, mask, why: files of this image, relative to the folder; None for those that were not made.
    error: why there is no answer.
    time: when it was given, as 2026-11-26T10:30:00.250+01:00.
  """

  path: str
  finding: Finding | None = None
  overlay: str | None = None
  map: str | None = None
  mask: str | None = None
  why: str | None = None
  error: str | None = None
  time: str | None = None

  def to_json(self) -> dict[str, Any]:
    """Converts to a row of predictions.jsonl: `Finding.to_json` between the path and the files.

    >>> Answer('a.png', error='a.png is no image.').to_json()['error']
    'a.png is no image.'
    """
    finding = self.finding.to_json() if self.finding else _NOTHING_FOUND
    return {'path': self.path} | finding | {
        k: getattr(self, k) for k in ('overlay', 'map', 'mask', 'why', 'error', 'time')}


_SIDES = ('left', 'top', 'right', 'bottom')
# The columns of predictions.csv, and where in `Answer.to_json` each is: a field, and a place in it or what is
# computed of it.
_PLACES: dict[str, tuple[str, Any]] = {
    'path': ('path', None), 'width': ('image_size', 0), 'height': ('image_size', 1),
    **{k: (k, None) for k in ('score', 'calibrated_score', 'p_value', 'decision')},
    **{side: ('box', i) for i, side in enumerate(_SIDES)},
    'x': ('centroid', 0), 'y': ('centroid', 1),
    **{f'patch_{side}': ('patch_box', i) for i, side in enumerate(_SIDES)},
    'nearest_image': ('nearest', 'image'),
    **{f'nearest_{side}': ('nearest_box', i) for i, side in enumerate(_SIDES)},
    **{k: (k, None) for k in ('overlay', 'map', 'why', 'error')},
    # New columns come last: some read the others by their places.
    'regions': ('regions', len), 'area': ('regions', lambda found: sum(region['area'] for region in found)),
    **{k: (k, None) for k in ('not_inspected', 'outside_range', 'reason', 'mask', 'note', 'time')}}
COLUMNS = tuple(_PLACES)


def cells(values: Mapping[str, Any]) -> list[Any]:
  """Picks the values of `COLUMNS` out of what `Answer.to_json` gave; None is an empty cell."""
  found = ((values.get(field), place) for field, place in _PLACES.values())
  return [value if value is None or place is None else place(value) if callable(place) else value[place]
          for value, place in found]


class Tables:
  """predictions.csv and predictions.jsonl of a folder, to which rows are added."""

  def __init__(self, folder: Path):
    """Begins both files anew."""
    self._files = folder / CSV, folder / JSONL
    for path in self._files:
      path.write_bytes(b'')
    _append(self._files[0], _csv(COLUMNS))

  def add(self, answer: Answer) -> None:
    """Adds a row to both files; if the disk is full, to neither.

    Raises:
      OSError: the row cannot be written.
    """
    sizes = [path.stat().st_size for path in self._files]
    values = answer.to_json()
    try:
      for path, row in zip(self._files, (_csv(cells(values)), _json(values)), strict=True):
        _append(path, row)
    except OSError:
      for path, size in zip(self._files, sizes, strict=True):
        os.truncate(path, size)
      raise


@contextlib.contextmanager
def claimed(out: str | os.PathLike) -> Iterator[None]:
  """Keeps other runs from writing to `out` in a block, where the system has locks.

  Raises:
    ValueError: another run writes to it, or `out` is a file.
    OSError: the folder cannot be made.
  """
  out = Path(out)
  if out.exists() and not out.is_dir():
    raise ValueError(f'{out} is a file: expected a folder, or a name for a new one.')
  out.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    try:
      import fcntl  # not on Windows

      handle = os.open(out, os.O_RDONLY)
      stack.callback(os.close, handle)
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(
          f'Another prediction writes to {out}: wait until it is done, or choose another --out.') from e
    except (ImportError, OSError):
      pass  # some shares have no locks
    yield


def unfinished(out: str | os.PathLike) -> Path:
  """Makes an empty folder inside `out` to write to; what lies in `out` stays as it is for now.

  Raises:
    ValueError: `out` is a file, or holds files of these names that no prediction run wrote.
    OSError: the folder cannot be made.
  """
  out = Path(out)
  if out.exists() and not out.is_dir():
    raise ValueError(f'{out} is a file: expected a folder, or a name for a new one.')
  others, folder = [name for name in _ENTRIES if (out / name).exists()], out / _UNFINISHED
  if others and JSONL not in others and not folder.exists():  # a run may have been killed in `publish`
    raise ValueError(
        f'{out} holds {", ".join(others)}, and no prediction run wrote that: choose another folder.')
  out.mkdir(parents=True, exist_ok=True)
  if folder.exists():
    shutil.rmtree(folder)
  folder.mkdir()
  return folder


def publish(folder: Path) -> Path:
  """Moves everything from an `unfinished` folder to its place, replacing an earlier run.

  Returns:
    The folder in which everything now lies.
  """
  out = folder.parent
  replaced = folder / 'replaced'
  replaced.mkdir()
  for name in _ENTRIES:
    if (out / name).exists():
      os.rename(out / name, replaced / name)
    if (folder / name).exists():
      os.rename(folder / name, out / name)
  shutil.rmtree(folder)
  return out


def discard(folder: Path) -> None:
  """Removes an `unfinished` folder, and the one around it if it holds nothing else."""
  shutil.rmtree(folder, ignore_errors=True)
  with contextlib.suppress(OSError):
    folder.parent.rmdir()


def is_of_a_run(path: str | os.PathLike, out: str | os.PathLike) -> bool:
  """Tells whether a file lies where runs with the folder `out` put pictures, which are not to be scored."""
  kinds = OVERLAYS, MAPS, MASKS, WHY, _UNFINISHED
  folders = [os.path.join(os.path.abspath(out), name, '') for name in kinds]
  return os.path.abspath(path).startswith(tuple(folders))


def file_for(kind: str, name: str, suffix: str) -> str:
  """Names the file for the picture of an image.

  Args:
    kind: `OVERLAYS`, `MAPS`, `MASKS` or `WHY`.
    name: what its pictures are called: see `picture_names`.

  >>> file_for('maps', 'left/001', '.npy')
  'maps/left/001.npy'
  """
  return Path(kind, f'{name}{suffix}').as_posix()


def write_png(path: Path, image: np.ndarray) -> None:
  """Writes an image [h, w, 3] or [h, w] uint8."""
  with atomic_files.written(path) as aside:
    Image.fromarray(image).save(aside, 'PNG', compress_level=_QUICK)


def write_map(path: Path, values: np.ndarray) -> None:
  """Writes a map [h, w] float32 as the suffix of `path` says: .npy for NumPy, .tif for a 32-bit TIFF."""
  with atomic_files.written(path) as aside, aside.open('wb') as f:
    if path.suffix == '.npy':
      np.save(f, values, allow_pickle=False)
    else:
      Image.fromarray(values).save(f, 'TIFF')


def _csv(values):
  row = io.StringIO()
  csv.writer(row, lineterminator='\n').writerow(values)
  # Names of files may hold bytes that are no UTF-8.
  return row.getvalue().encode('utf-8', 'surrogateescape')


def _json(values):
  return (json.dumps(values, allow_nan=False) + '\n').encode()


def _append(path, data):
  """Appends in one piece, so that a reader that follows the file sees whole rows."""
  with path.open('ab', buffering=0) as f:
    if f.write(data) != len(data):
      raise OSError(28, 'No space left on device', str(path))
