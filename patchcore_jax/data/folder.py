"""Folders in the MVTec AD layout -> lists of `Example`.

    ROOT/<category>/train/good/*.png            good parts only
    ROOT/<category>/test/good/*.png             good parts
    ROOT/<category>/test/<defect>/*.png         defective parts
    ROOT/<category>/ground_truth/<defect>/*_mask.png   one mask per defective image

Layout: Bergmann et al., "MVTec AD" (CVPR 2019). Everything is sorted by name, so that no result
depends on the order in which a file system lists its entries.
"""

import os
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


class Example(NamedTuple):
  """One image of a data set.

  Attributes:
    image_path: the image file.
    mask_path: its ground-truth mask; None for good images and for categories without masks.
    label: 0 good, 1 anomalous.
    category: name of the category folder.
    defect: kind of defect, 'good' for label 0.
  """

  image_path: str
  mask_path: str | None
  label: int
  category: str
  defect: str


class Category(NamedTuple):
  """The two splits of a category; `has_masks` says whether pixel metrics are defined."""

  name: str
  train: list[Example]
  test: list[Example]
  has_masks: bool


def list_categories(root: str | os.PathLike) -> list[str]:
  """Names of the categories under `root`, sorted: its folders that hold `train/good`.

  Raises:
    ValueError: `root` does not exist, is not a folder, or holds no category.
  """
  root = _existing_root(root)
  names = sorted(p.name for p in root.iterdir() if (p / 'train' / 'good').is_dir())
  if names:
    return names
  if (root / 'train' / 'good').is_dir():
    raise ValueError(
        f'{root} is itself a category. Pass the folder above it, {root.parent}, as the root and '
        f'choose the category {root.name!r}.')
  raise ValueError(
      f'No category found in {root}: expected <category>/train/good/ with images of good parts '
      f'(MVTec layout), found {_listing(root)}.')


def load_category(root: str | os.PathLike, category: str) -> Category:
  """Lists the images of one category.

  Args:
    root: folder that holds the categories.
    category: name of the category's folder.

  Returns:
    A `Category` whose splits are sorted by defect, then by file name.

  Raises:
    ValueError: the category does not exist (the message lists those that do), has no images in
      `train/good` or `test`, or only some of its defective images have a mask.
  """
  folder = _existing_root(root) / category
  if not folder.is_dir():
    raise ValueError(
        f'No category {category!r} in {root}. There are: {", ".join(list_categories(root))}.')
  good = folder / 'train' / 'good'
  if not good.is_dir():
    raise ValueError(
        f'{folder} has no train/good folder: expected images of good parts in {good}, found '
        f'{_listing(folder)}.')
  train = [Example(str(p), None, 0, category, 'good') for p in _images(good)]
  if not train:
    raise ValueError(f'No images in {good}: expected {_suffixes()}, found {_listing(good)}.')
  if not (folder / 'test').is_dir():
    raise ValueError(f'{folder} has no test folder: expected test/good and test/<defect>.')
  has_masks = (folder / 'ground_truth').is_dir()
  test = []
  for defect in sorted(p for p in (folder / 'test').iterdir() if p.is_dir()):
    label = int(defect.name != 'good')
    for path in _images(defect):
      mask = _mask_of(path, folder) if label and has_masks else None
      test.append(Example(str(path), mask, label, category, defect.name))
  if not test:
    raise ValueError(
        f'No images in {folder / "test"}: expected folders good and <defect> with {_suffixes()}.')
  return Category(category, train, test, has_masks and any(e.label for e in test))


def _mask_of(image: Path, folder: Path) -> str:
  """The mask of a defective image; several spellings are in use (`000_mask.png`, `000.png`)."""
  masks = folder / 'ground_truth' / image.parent.name
  for stem in (image.stem + '_mask', image.stem):
    for suffix in IMAGE_SUFFIXES:
      if (path := masks / (stem + suffix)).is_file():
        return str(path)
  raise ValueError(
      f'No mask for {image}: expected {masks / (image.stem + "_mask.png")}. Add it, or remove '
      f'{folder / "ground_truth"} to evaluate this category without pixel metrics.')


def _images(folder: Path) -> list[Path]:
  return sorted(
      p for p in folder.iterdir()
      if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith('.'))


def _existing_root(root: str | os.PathLike) -> Path:
  path = Path(root)
  if not path.is_dir():
    what = 'is a file' if path.exists() else 'does not exist'
    raise ValueError(f'The data folder {path} {what}: expected a folder in MVTec layout.')
  return path


def _listing(folder: Path, most: int = 8) -> str:
  names = sorted(p.name for p in folder.iterdir())
  shown = ', '.join(names[:most]) + (', ...' if len(names) > most else '')
  return shown or 'nothing'


def _suffixes() -> str:
  return ' '.join(s[1:] for s in IMAGE_SUFFIXES)
