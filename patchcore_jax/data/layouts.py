"""How the data sets that people use lie on disk: `LAYOUTS[name]` lists the categories and images of one.

Each takes the extracted data set as it was published; third_party/datasets.md names the sources.
"""

import csv
import dataclasses
import os
from pathlib import Path

import numpy as np

from patchcore_jax.data import decoding
from patchcore_jax.data.folder import (
    MVTEC,
    Category,
    Example,
    FolderLayout,
    existing_root,
    paired_pages,
)
from patchcore_jax.data.image_files import images_in, is_file, listing
from patchcore_jax.data.passed_by import unread_of


@dataclasses.dataclass(frozen=True)
class SplitFileLayout:
  """A data set with a CSV file that names every image: columns object, split, label, image, mask.

  split is 'train' or 'test', label 'normal' or 'anomaly'; image and mask are paths below the root,
  and mask is empty for normal images.

  Attributes:
    split_file: the CSV file, below the root.
  """

  split_file: str

  def list_categories(self, root: str | os.PathLike) -> list[str]:
    """Lists the objects in the split file, sorted.

    Raises:
      ValueError: no root, no split file, or a bad one.
    """
    return sorted({row['object'] for row in self._rows(root)})

  def load_category(self, root: str | os.PathLike, category: str) -> Category:
    """Lists the images of one object, sorted by label, then by file name.

    Raises:
      ValueError: what `list_categories` raises; an object that is not in the file; a file that is missing; an
        anomaly to train on, or one without a mask.
    """
    root = existing_root(root)
    rows = self._rows(root)
    splits = {'train': [], 'test': []}
    for row in rows:
      if row['object'] != category:
        continue
      label = int(row['label'] == 'anomaly')
      if label and (row['split'] == 'train' or not row['mask']):
        raise ValueError(
            f'{root / self.split_file}: expected anomalies in the test split only and with a mask, got '
            f'{",".join(row.values())}.')
      masks = (str(root / row['mask']),) if label else ()
      for page, found in paired_pages(str(root / row['image']), masks):
        splits[row['split']].append(Example(page, found, label, category, 'anomaly' if label else 'good'))
    if not splits['train'] or not splits['test']:
      raise ValueError(
          f'No images to train on or to test for {category!r} in {root / self.split_file}. There are: '
          f'{", ".join(sorted({row["object"] for row in rows}))}.')
    examples = [e for split in splits.values() for e in split]
    missing = [p for e in examples for p in (e.image_path, *e.mask_paths) if not is_file(p)]
    if missing:
      raise ValueError(
          f'{len(missing)} files that {root / self.split_file} names are missing, {missing[0]} among '
          'them. Extract the data set again, or take them out of the split file.')
    by_name = [sorted(split, key=lambda e: (e.defect, e.image_path)) for split in splits.values()]
    return Category(category, *by_name, any(e.label for e in splits['test']))

  def _rows(self, root) -> list[dict[str, str]]:
    """Reads and checks the split file."""
    root = existing_root(root)
    path = root / self.split_file
    if not path.is_file():
      raise ValueError(
          f'No split file {path}.' + _other_level(root, lambda p: (p / self.split_file).is_file()))
    with path.open(newline='', encoding='utf-8') as file:
      reader = csv.DictReader(file)
      columns = ('object', 'split', 'label', 'image', 'mask')
      if tuple(reader.fieldnames or ()) != columns:
        raise ValueError(
            f'{path}: expected the columns {",".join(columns)}, got {reader.fieldnames}.')
      rows = list(reader)
    for number, row in enumerate(rows, 2):
      if (row['split'] not in ('train', 'test') or row['label'] not in ('normal', 'anomaly')
          or None in row.values()):
        raise ValueError(
            f"{path}, line {number}: expected split 'train' or 'test', label 'normal' or 'anomaly', "
            f'and five columns, got {row}.')
    return rows


@dataclasses.dataclass(frozen=True)
class BesideLayout:
  """One category, whose masks lie beside the images and say which of them are defective.

      ROOT/train/<image>.png, ROOT/train/<image><suffix>.png, and the same in ROOT/test

  Defective images of `train` are left out: the detectors learn from good ones only.

  Attributes:
    category: its name.
    suffix: what a mask's name has after the name of its image.
  """

  category: str
  suffix: str

  def list_categories(self, root: str | os.PathLike) -> list[str]:
    """Lists the one category, and checks that its folders are there.

    Raises:
      ValueError: no root, or one without train and test.
    """
    root = existing_root(root)
    if not self._is_root(root):
      raise ValueError(
          f'{root} has no folders train and test: found {listing(root)}.'
          + _other_level(root, self._is_root))
    return [self.category]

  def load_category(self, root: str | os.PathLike, category: str) -> Category:
    """Lists the images, sorted by name; reads all masks (thousands in some seconds).

    Raises:
      ValueError: what `list_categories` raises; another category; no images; an image without a mask.
      ImageError: a mask that cannot be read.
    """
    if category not in self.list_categories(root):
      raise ValueError(f'No category {category!r} in {root}. There is: {self.category}.')
    of_train, test = (self._examples(Path(root) / split) for split in ('train', 'test'))
    train = [e for e, _ in of_train if not e.label]
    if not train or not test:
      raise ValueError(f'No good images in {root}/train, or no images in {root}/test.')
    files = [path for e, mask in (*of_train, *test) for path in (e.image_path, mask)]
    test = [e for e, _ in test]
    return Category(category, train, test, any(e.label for e in test), tuple(unread_of(root, files)))

  def _examples(self, folder: Path) -> list[tuple[Example, str]]:
    """Lists the images of `train` or `test`, labelled by their masks, each with its mask."""
    result, images = [], images_in(folder)
    masks = {p.stem.casefold(): p for p in reversed(images)}
    for image in images:
      if image.stem.casefold().endswith(self.suffix.casefold()):
        continue
      mask = masks.get((image.stem + self.suffix).casefold())
      if mask is None:
        expected = image.with_name(f'{image.stem}{self.suffix}.png')
        raise ValueError(f'No mask for {image}: expected {expected}. Add it, or remove the image.')
      for page, (found,) in paired_pages(str(image), [str(mask)]):
        label = int(np.asarray(decoding.read_mask(found)).any())
        result.append((Example(
            page, (found,) if label else (), label, self.category, 'defect' if label else 'good'), found))
    return result

  def _is_root(self, folder: Path) -> bool:
    return (folder / 'train').is_dir() and (folder / 'test').is_dir()


def _other_level(root: Path, is_root) -> str:
  """Says what to pass instead, where the data set begins at a folder nearby."""
  near = [root.parent, root.parent.parent, *sorted(p for p in root.iterdir() if p.is_dir())]
  right = next(filter(is_root, near), None)
  return ' Pass the folder of the extracted data set' + (f': {right}.' if right else '.')


LAYOUTS = {
    'folder': MVTEC,
    'mpdd': MVTEC,
    'btad': FolderLayout(good=('ok',)),
    # Several masks for an image, in a folder of its name.
    'mvtec_loco': FolderLayout(mask_names=('{}/*',), validation='validation'),
    # Only the public test images come with labels.
    'mvtec_ad_2': FolderLayout(
        test='test_public', masks='test_public/ground_truth', validation='validation'),
    'visa': SplitFileLayout('split_csv/1cls.csv'),
    'kolektor_sdd2': BesideLayout('kolektor_sdd2', '_GT'),
}
