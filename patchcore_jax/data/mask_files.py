"""Finds which mask files belong to which image, by their names, in capitals or not."""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from patchcore_jax.data import image_files


class MaskFiles:
  """The masks of one kind of defect.

  Args:
    folder: where they lie; it may be absent.
    images: the images of that kind, by their paths below the folder of the kind.
    names: where the masks of an image lie in the folder, as in `FolderLayout.mask_names`; the first that
      finds any counts.
  """

  def __init__(self, folder: Path, images: Iterable[PurePath], names: Sequence[str]):
    self.folder, self._names = folder, names
    self._stems = {image.with_suffix('').as_posix() for image in images}
    self.all = sorted(map(Path, image_files.listed(folder).images)) if folder.is_dir() else []
    self._exact, self._folded = collections.defaultdict(list), collections.defaultdict(list)
    for path in self.all:
      for key in _beginnings(path.relative_to(folder).as_posix()):
        self._exact[key].append(path)
        self._folded[key.casefold()].append(path)
    # A mask that has an image's name to the letter is not another's.
    self._taken = {path for stem in self._stems for path in self._named(stem)}

  def of(self, stem: str) -> tuple[str, ...]:
    """Lists the masks of the image of this name without its suffix, sorted; () if there are none."""
    if found := self._named(stem):
      return tuple(map(str, found))
    for name in self._names:
      near = self._folded.get(_key(name, stem).casefold(), ())
      if found := [path for path in near if path not in self._taken]:
        return tuple(map(str, found))
    return ()

  def of_images(self) -> list[str]:
    """Lists the files that are the mask of an image, sorted."""
    return sorted({path for stem in self._stems for path in self.of(stem)})

  def of_no_image(self) -> list[str]:
    """Lists the others, sorted."""
    used = set(self.of_images())
    return [str(path) for path in self.all if str(path) not in used]

  def _named(self, stem: str) -> list[Path]:
    """Finds the masks whose names agree to the letter."""
    return next((found for name in self._names if (found := self._exact.get(_key(name, stem)))), [])


def _key(name: str, stem: str) -> str:
  """Computes how the path of an image's masks begins."""
  return name.replace('{}', stem).removesuffix('*')


def _beginnings(path: str) -> list[str]:
  """Lists the beginnings of a path that can name an image: those that end at a point or a slash.

  >>> _beginnings('000/1.png')
  ['000/', '000/1.', '000/1.png']
  """
  return [path[:i + 1] for i, character in enumerate(path) if character in './'] + [path]
