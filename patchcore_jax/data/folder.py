"""Lists the images in folders as `Example`s. The layout is that of MVTec AD:

    ROOT/<category>/train/good/*.png            good parts only
    ROOT/<category>/test/good/*.png             good parts
    ROOT/<category>/test/<defect>/*.png         defective parts
    ROOT/<category>/ground_truth/<defect>/*_mask.png   one mask per defective image

Layout: Bergmann et al., "MVTec AD" (CVPR 2019). `layouts` has those of other data sets. Everything is
sorted by name, so that no result depends on the order in which a file system lists its entries.
"""

import dataclasses
import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from patchcore_jax.data.mask_files import MaskFiles

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


class Example(NamedTuple):
  """One image of a data set.

  Attributes:
    image_path: the image file.
    mask_paths: its ground-truth masks, whose union counts; () for good images and for categories
      without masks.
    label: 0 good, 1 anomalous.
    category: name of the category.
    defect: kind of defect, 'good' for label 0.
    read: gives the bytes of a file named here; None if they are files on disk. It travels to the
      processes that decode, so it must pickle.
    page: number of the page or frame of the image file, from 0.
    view_paths: further images of the same part, for methods that take several views.
    ignore_paths: masks of pixels that count neither as good nor as anomalous, for metrics that know them.
  """

  image_path: str
  mask_paths: tuple[str, ...]
  label: int
  category: str
  defect: str
  read: Callable[[str], bytes] | None = None
  page: int = 0
  view_paths: tuple[str, ...] = ()
  ignore_paths: tuple[str, ...] = ()


class Category(NamedTuple):
  """The two splits of a category.

  Attributes:
    name: its name.
    train, test: its images.
    has_masks: whether there are masks, so that pixel metrics are defined.
    notes: lines to tell the user, such as which folders were taken for what.
    unused_masks: mask files that belong to no image.
    masks_of_good: mask files of good images, which are not read: nothing of these counts as anomalous.
  """

  name: str
  train: list[Example]
  test: list[Example]
  has_masks: bool
  notes: tuple[str, ...] = ()
  unused_masks: tuple[str, ...] = ()
  masks_of_good: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FolderLayout:
  """A data set whose folders say what is good and what is not. The defaults are MVTec AD's.

  Attributes:
    good: name of the folders of good parts, in `train` and in `test`.
    test: folder of a category that holds the test images, a folder for each kind of defect.
    masks: folder of a category that holds the masks, a folder for each kind of defect.
    mask_names: where the masks of an image lie in that folder; {} stands for the image's name without its
      suffix, a * may follow at the end, and the first that finds any counts. Capitals make no difference.
  """

  good: str = 'good'
  test: str = 'test'
  masks: str = 'ground_truth'
  mask_names: tuple[str, ...] = ('{}_mask.*', '{}.*')

  def list_categories(self, root: str | os.PathLike) -> list[str]:
    """Lists the categories under `root` by name, sorted: its folders that hold `train/good`.

    Raises:
      ValueError: `root` does not exist, is not a folder, or holds no category.
    """
    root = existing_root(root)
    names = sorted(p.name for p in root.iterdir() if self.is_category(p))
    if names:
      return names
    if self.is_category(root):
      raise ValueError(
          f'{root} is itself a category. Pass the folder above it, {root.parent}, as the root and '
          f'choose the category {root.name!r}.')
    for inner in sorted(p for p in root.iterdir() if p.is_dir()):
      if any(self.is_category(p) for p in inner.iterdir()):
        raise ValueError(f'No category in {root}, but in {inner}: pass that folder as the root.')
    raise ValueError(
        f'No category found in {root}: expected <category>/train/{self.good}/ with images of good '
        f'parts, found {listing(root)}.')

  def load_category(self, root: str | os.PathLike, category: str) -> Category:
    """Lists the images of one category.

    Args:
      root: folder that holds the categories.
      category: name of the category's folder.

    Returns:
      A `Category` whose splits are sorted by defect, then by file name.

    Raises:
      ValueError: the category does not exist (the message lists those that do), has no images of
        good parts or none to test, or only some of its defective images have a mask.
    """
    folder = existing_root(root) / category
    if not folder.is_dir():
      raise ValueError(
          f'No category {category!r} in {root}. There are: {", ".join(self.list_categories(root))}.')
    folder = self._unwrapped(folder)
    good = folder / 'train' / self.good
    if not good.is_dir():
      raise ValueError(
          f'{folder} has no train/{self.good} folder: expected images of good parts in {good}, found '
          f'{listing(folder)}.')
    train = [Example(str(p), (), 0, category, 'good') for p in images_in(good)]
    if not train:
      raise ValueError(f'No images in {good}: expected {_suffixes()}, found {listing(good)}.')
    tests, masks = folder / self.test, _in_any_case(folder, self.masks)
    if not tests.is_dir():
      raise ValueError(
          f'{folder} has no {self.test} folder: expected {self.test}/{self.good} and '
          f'{self.test}/<defect>.')
    has_masks = masks.is_dir()
    test, all_masks = [], []
    for kind in sorted(p for p in tests.iterdir() if p.is_dir() and p != masks):
      label = int(kind.name != self.good)
      images = images_in(kind)
      masks_of_kind = MaskFiles(_in_any_case(masks, kind.name), images, self.mask_names, is_image)
      all_masks.append((label, masks_of_kind))
      for path in images:
        test.append(Example(
            str(path), self._masks_of(path, masks, masks_of_kind) if label and has_masks else (), label,
            category, kind.name if label else 'good'))
    if not test:
      raise ValueError(
          f'No images in {tests}: expected folders {self.good} and <defect> with {_suffixes()}.')
    return Category(
        category, train, test, has_masks and any(e.label for e in test),
        unused_masks=tuple(_unused(masks, [found for _, found in all_masks])),
        masks_of_good=tuple(m for label, found in all_masks if not label for m in found.of_images()))

  def is_category(self, folder: str | os.PathLike) -> bool:
    """Tells whether a folder holds the images of good parts that make it a category."""
    return (self._unwrapped(Path(folder)) / 'train' / self.good).is_dir()

  def _unwrapped(self, folder: Path) -> Path:
    """Finds the folder of a category, which an archive may have unpacked into <name>/<name>."""
    inner = folder / folder.name
    return inner if (inner / 'train').is_dir() else folder

  def _masks_of(self, image: Path, folder: Path, masks: MaskFiles) -> tuple[str, ...]:
    """Finds the masks of an image among those of its kind; raises ValueError where there is none."""
    if found := masks.of(image.stem):
      return found
    inner = folder / image.parent.name
    expected = inner / self.mask_names[0].replace('{}', image.stem).replace('.*', '.png')
    there = f'found {listing(inner)}' if inner.is_dir() else f'there is no folder {inner}'
    raise ValueError(
        f'No mask for {image}: expected {expected}, {there}. Add it or name it so, or remove {folder} to '
        'evaluate this category without pixel metrics.')


MVTEC = FolderLayout()


def is_image(path: Path) -> bool:
  """Tells whether a file is an image by its name; hidden files do not count."""
  return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')


def _in_any_case(folder: Path, name: str) -> Path:
  """Finds the folder of this name in a folder, or the first whose name differs in capitals only."""
  if (folder / name).is_dir() or not folder.is_dir():
    return folder / name
  near = sorted(p for p in folder.iterdir() if p.name.casefold() == name.casefold() and p.is_dir())
  return near[0] if near else folder / name


def _unused(masks: Path, used: Sequence[MaskFiles]) -> list[str]:
  """Lists the masks of no image, those of kinds of defects that have no images among them."""
  if not masks.is_dir():
    return []
  known = {found.folder for found in used}
  others = [p for p in masks.iterdir() if p.is_dir() and p not in known and not p.name.startswith('.')]
  return sorted(path for found in (*used, *(MaskFiles(p, (), (), is_image) for p in others))
                for path in found.of_no_image())


def images_in(folder: Path) -> list[Path]:
  """Lists the image files of a folder, sorted."""
  return sorted(filter(is_image, folder.iterdir()))


def find_images(where: str | os.PathLike) -> list[str]:
  """Lists image files without labels, sorted: those of a folder, one file, or those of a pattern.

  Args:
    where: a folder, whose own images count, or where it has none, those of its `train/good` or `good`; a
      file; or a pattern with *, ? or [, in which ** stands for any folders, such as 'parts/**/*.png'.

  Raises:
    ValueError: nothing there, or no images in it.
  """
  where = os.fspath(where)
  path = Path(where)
  if path.is_file():
    return [where]
  if path.is_dir():
    for inner in (path, path / 'train' / 'good', path / 'good'):
      if inner.is_dir() and (found := images_in(inner)):
        return list(map(str, found))
    raise ValueError(
        f'No images in {path}: expected {_suffixes()} in it, in train/good or in good; found '
        f'{listing(path)}. For images in several folders give a pattern, such as \'{path}/**/*.png\'.')
  if not is_pattern(where):
    raise ValueError(f'{where} does not exist: expected a folder of images, a file, or a pattern such as '
                     "'parts/*.png'.")
  found = matching(where)
  if not found:
    raise ValueError(f'The pattern {where!r} matches no image: expected files named {_suffixes()}.')
  return found


def left_out(where: str | os.PathLike, paths: Sequence[str], out: str | os.PathLike = '') -> list[str]:
  """Tells in lines what `find_images` passed by in a folder: folders beside, and files not named as images.

  Args:
    where: what it was given.
    paths: what it found.
    out: a folder that is written to, whose pictures are no images to look at.
  """
  where = Path(where)
  if not where.is_dir() or not paths:
    return []
  taken, lines = Path(paths[0]).parent, []
  if taken != where:
    lines.append(f'{where} itself holds no images: those of {taken} are taken')
  beside = sorted(
      p.relative_to(where).as_posix() for p in (*where.iterdir(), *taken.iterdir())
      if p.is_dir() and p != taken and p not in taken.parents and p.absolute() != Path(out).absolute()
      and any(map(is_image, p.rglob('*'))))
  if beside:
    lines.append(
        f'not looked into: {", ".join(dict.fromkeys(beside))}. For the images there too give a pattern, such '
        f"as '{where}/**/*.png'")
  others = sorted(
      p.name for p in taken.iterdir() if p.is_file() and not is_image(p) and not p.name.startswith('.'))
  if others:
    lines.append(
        f'not read, because of their names: {len(others)} file{"s" if len(others) > 1 else ""}, such as '
        f'{others[0]}; images are {_suffixes()}')
  return lines


def matching(pattern: str) -> list[str]:
  """Lists the image files that a pattern matches, sorted; ** stands for any folders."""
  return sorted(p for p in glob.glob(pattern, recursive=True) if is_image(Path(p)))


def is_pattern(where: str) -> bool:
  """Tells whether `where` is a pattern: whether it holds *, ? or [."""
  return glob.has_magic(where)


def root_of(where: str) -> Path:
  """Finds the folder relative to which images of `find_images(where)` are named.

  >>> root_of('parts/*/2026/*.png').as_posix()
  'parts'
  """
  path = Path(where)
  if path.is_dir():
    return path
  if path.is_file() or not is_pattern(where):
    return path.parent
  parts = path.parts
  return Path(*parts[:next(i for i, part in enumerate(parts) if is_pattern(part))])


def existing_root(root: str | os.PathLike) -> Path:
  """Returns `root` as a path; raises ValueError if that is no folder."""
  path = Path(root)
  if not path.is_dir():
    what = 'is a file' if path.exists() else 'does not exist'
    raise ValueError(f'The data folder {path} {what}: expected the folder of a data set.')
  return path


def listing(folder: Path, most: int = 8) -> str:
  """Lists the first names in a folder, for messages."""
  names = sorted(p.name for p in folder.iterdir())
  shown = ', '.join(names[:most]) + (', ...' if len(names) > most else '')
  return shown or 'nothing'


def _suffixes() -> str:
  """Lists the suffixes of image files, for messages."""
  return ' '.join(s[1:] for s in IMAGE_SUFFIXES)
