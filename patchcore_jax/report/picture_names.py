"""What the pictures of images are called: as the image, and never as the picture of another."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from patchcore_jax.data import image_files

_LONGEST = 200  # bytes of a name: file systems take 255, with a suffix and '.tmp' while it is written


class PictureNames:
  """Names pictures by their images: that of left/001.jpg is left/001, with a suffix for what it shows.

  Where that is taken, because another image has the name with another suffix, or was here under the same name
  before, it is left/001.jpg, left/001.2, left/001.3 and so on. No more is remembered than the names that wait
  for their files.

  Args:
    folder: where the pictures lie.
    kinds: (folder in it, suffix) of each file that an image may have, as ('overlays', '.png').
  """

  def __init__(self, folder: Path, kinds: Sequence[tuple[str, str]]):
    self._folder, self._kinds, self._waiting = folder, kinds, set()
    other = Path(folder).name.swapcase()
    self._capitals_differ = other == Path(folder).name or not os.path.lexists(Path(folder).with_name(other))

  def reserve(self, name: str) -> str:
    """Chooses the name for the pictures of an image, and keeps it from others until it is released.

    Args:
      name: what the image is called, relative to the folder that all lie in; it may be a page, NAME#2.
    """
    chosen = next(filter(self._is_free, candidates(name)))
    self._waiting.add(self._key(chosen))
    return chosen

  def release(self, name: str) -> None:
    """Says that the files of this name are written."""
    self._waiting.discard(self._key(name))

  def _is_free(self, name: str) -> bool:
    return self._key(name) not in self._waiting and not any(
        os.path.lexists(self._folder / kind / f'{name}{suffix}') for kind, suffix in self._kinds)

  def _key(self, name: str) -> str:
    """Returns what is the same for names that the file system does not tell apart."""
    return name if self._capitals_differ else name.casefold()


def candidates(name: str) -> Iterator[str]:
  """Yields names for the pictures of an image without end, the best first.

  >>> import itertools
  >>> list(itertools.islice(candidates('left/001.jpg'), 4))
  ['left/001', 'left/001.jpg', 'left/001.2', 'left/001.3']
  >>> next(candidates('stack.tif#2'))
  'stack#2'
  """
  file = image_files.file_of(name)
  folder, page = PurePath(file).parent, name[len(file):]
  stem, suffix = os.path.splitext(PurePath(file).name)
  stem = _fitting(''.join('_' if ord(c) < 32 or ord(c) == 127 else c for c in stem))
  different = (f'{suffix}{page}',) if suffix and suffix.lower() != '.png' else ()
  for last in (page, *different):
    yield (folder / f'{stem}{last}').as_posix()
  number = 2
  while True:
    yield (folder / f'{stem}{page}.{number}').as_posix()
    number += 1


def _fitting(stem: str) -> str:
  """Shortens a name until a file system takes it with what is added."""
  while len(os.fsencode(stem)) > _LONGEST:
    stem = stem[:-1]
  return stem
