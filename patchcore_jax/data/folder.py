"""Lists the images in folders as `Example`s. The layout is that of MVTec AD:

    ROOT/<category>/train/good/*.png            good parts only
    ROOT/<category>/test/good/*.png             good parts
    ROOT/<category>/test/<defect>/*.png         defective parts
    ROOT/<category>/ground_truth/<defect>/*_mask.png   one mask per defective image

Layout: Bergmann et al., "MVTec AD" (CVPR 2019). `layouts` has those of other data sets. Everything is
sorted by name, so that no result depends on the order in which a file system lists its entries.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from patchcore_jax.data import image_files, passed_by
from patchcore_jax.data.image_files import folders_in, in_any_case, listing
from patchcore_jax.data.image_finding import pages_of
from patchcore_jax.data.mask_files import MaskFiles


class Example(NamedTuple):
  """One image of a data set.

  Attributes:
    image_path: the image file, or a page of one with several, as NAME#2.
    mask_paths: its ground-truth masks, whose union counts; () for good images and for categories
      without masks.
    label: 0 good, 1 anomalous.
    category: name of the category.
    defect: kind of defect, 'good' for label 0.
    read: gives the bytes of a file named here; None if they are files on disk. It travels to the
      processes that decode, so it must pickle.
    view_paths: further images of the same part, for methods that take several views.
    ignore_paths: masks of pixels that count neither as good nor as anomalous, for metrics that know them.
  """

  image_path: str
  mask_paths: tuple[str, ...]
  label: int
  category: str
  defect: str
  read: Callable[[str], bytes] | None = None
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
    validation: good images for setting thresholds, where the data set has some.
  """

  name: str
  train: list[Example]
  test: list[Example]
  has_masks: bool
  notes: tuple[str, ...] = ()
  unused_masks: tuple[str, ...] = ()
  masks_of_good: tuple[str, ...] = ()
  validation: tuple[Example, ...] = ()


@dataclasses.dataclass(frozen=True)
class FolderLayout:
  """A data set whose folders say what is good and what is not. The defaults are MVTec AD's.

  Hidden folders are no data, and images below a folder belong to it, however deep they lie.

  Attributes:
    good: names of the folders of good parts, in `train` and in `test`; () for the usual ones, such as good,
      OK or normal (`image_files.is_good`).
    test: folder of a category that holds the test images, a folder for each kind of defect.
    masks: folder of a category that holds the masks, a folder for each kind of defect.
    mask_names: where the masks of an image lie in that folder; {} stands for the image's name without its
      suffix, a * may follow at the end, and the first that finds any counts. Capitals make no difference.
    validation: folder of a category with a folder of good images for setting thresholds; '' for none.
  """

  good: tuple[str, ...] = ()
  test: str = 'test'
  masks: str = 'ground_truth'
  mask_names: tuple[str, ...] = ('{}_mask.*', '{}.*')
  validation: str = ''

  def list_categories(self, root: str | os.PathLike) -> list[str]:
    """Lists the categories under `root` by name, sorted: its folders that hold `train/good`.

    Raises:
      ValueError: `root` does not exist, is not a folder, or holds no category; or a folder in it has images
        to train on, of which none are known to be good.
    """
    root = existing_root(root)
    if names := self._categories(root):
      for folder in folders_in(root):
        if folder.name not in names:
          self._check_is_none(folder)
      return names
    if self.is_category(root):
      raise ValueError(
          f'{root} is itself a category. Pass the folder above it, {root.parent}, as the root and '
          f'choose the category {root.name!r}.')
    for inner in folders_in(root):
      if self._categories(inner):
        raise ValueError(f'No category in {root}, but in {inner}: pass that folder as the root.')
    for folder in (root, *folders_in(root)):
      self._check_is_none(folder)
    raise ValueError(
        f'No category found in {root}: expected <category>/train/{self._good} with images of good '
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
          f'No category {category!r} in {root}. There are: {", ".join(self._categories(Path(root)))}.')
    folder = self._unwrapped(folder)
    good = self._good_in(in_any_case(folder, 'train'))
    if not good:
      self._check_is_none(folder)
      raise ValueError(
          f'{folder} has no train/{self._good} folder: expected images of good parts in it, found '
          f'{listing(folder)}.')
    train = _good_images(good, category)
    if not train:
      raise ValueError(
          f'No images in {_some(good)}: expected {image_files.suffixes()}, found {listing(good[0])}.')
    tests, masks = in_any_case(folder, self.test), in_any_case(folder, self.masks)
    if not tests.is_dir():
      raise ValueError(
          f'{folder} has no {self.test} folder: expected {self.test}/{self._good} and '
          f'{self.test}/<defect>.')
    has_masks = masks.is_dir()
    test, all_masks = [], []
    for kind in (p for p in folders_in(tests) if p != masks):
      label = int(not image_files.is_good(kind.name, self.good))
      found = _Kind(kind, in_any_case(masks, kind.name), self.mask_names)
      all_masks.append((label, found.masks))
      for image, pages in found.images.items():
        for page in pages:
          test.append(Example(
              page, found.masks_of(image, page) if label and has_masks else (), label, category,
              kind.name if label else 'good'))
    if not test:
      raise ValueError(
          f'No images in {tests}: expected folders {self._good} and <defect> with {image_files.suffixes()}.')
    validation = []
    if self.validation:
      validation = _good_images(self._good_in(in_any_case(folder, self.validation)), category)
    return Category(
        category, train, test, has_masks and any(e.label for e in test),
        notes=tuple(self._notes(folder, tests, masks, good, train, test, validation)),
        unused_masks=tuple(_unused(masks, [found for _, found in all_masks])),
        masks_of_good=tuple(m for label, found in all_masks if not label for m in found.of_images()),
        validation=tuple(validation))

  def is_category(self, folder: str | os.PathLike) -> bool:
    """Tells whether a folder holds the images of good parts that make it a category."""
    return bool(self._good_in(in_any_case(self._unwrapped(Path(folder)), 'train')))

  @property
  def _good(self) -> str:
    """Names the folder of good parts, for messages."""
    return self.good[0] if self.good else 'good'

  def _categories(self, root: Path) -> list[str]:
    return [p.name for p in folders_in(root) if self.is_category(p)]

  def _good_in(self, folder: Path) -> list[Path]:
    """Lists the folders of good parts in a folder."""
    return [p for p in folders_in(folder) if image_files.is_good(p.name, self.good)]

  def _check_is_none(self, folder: Path) -> None:
    """Raises ValueError for a folder that would be a category if it were said what is good in it."""
    train = in_any_case(self._unwrapped(folder), 'train')
    if not self._good_in(train) and train.is_dir() and _below(train):
      expected = ', '.join(self.good) if self.good else 'good, OK, normal or the like'
      raise ValueError(
          f'{train} has images, and no folder of good parts: expected one called {expected}, found '
          f'{listing(train)}. Name the folder of good parts (--good NAME, or data.good), or choose other '
          'categories.')

  def _unwrapped(self, folder: Path) -> Path:
    """Finds the folder of a category, which an archive may have unpacked into <name>/<name>."""
    inner = folder / folder.name
    return inner if (inner / 'train').is_dir() else folder

  def _notes(self, folder, tests, masks, good, train, test, validation) -> list[str]:
    """Tells in lines which folders count as good, and what was passed by."""
    splits = [good, self._good_in(tests)]
    unusual = any(p.name != 'good' for split in splits for p in split) and not self.good
    notes = []
    if unusual or any(len(split) > 1 for split in splits):
      notes.append(f'good parts are those in {_some([p for split in splits for p in split])}')
    if all(e.label for e in test):
      kinds = ', '.join(dict.fromkeys(e.defect for e in test))
      notes.append(
          f'no good image in {tests}: all of {kinds} count as defective, and image AUROC is not defined. If '
          'one holds good parts, name it: --good NAME, or data.good')
    taken = [e.image_path for e in (*train, *test, *validation)]
    return notes + passed_by.unread_of(folder, taken, aside=masks)


def _good_images(folders: Iterable[Path], category: str) -> list[Example]:
  """Lists the images below folders of good parts."""
  return [Example(page, (), 0, category, 'good')
          for folder in folders for image in _below(folder) for page in pages_of(image)]


class _Kind:
  """The images of a folder of `test`, and the masks among which theirs are.

  Attributes:
    images: {image file: its pages}, sorted.
    masks: the mask files.
  """

  def __init__(self, folder: Path, masks: Path, mask_names: Sequence[str]):
    self._folder, self._mask_names = folder, mask_names
    self.images = {image: pages_of(image) for image in _below(folder)}
    names = {name for image, pages in self.images.items() for name in (image, *map(_page_of_file, pages))}
    self.masks = MaskFiles(
        masks, [PurePath(name).relative_to(folder) for name in names], mask_names)

  def masks_of(self, image: str, page: str) -> tuple[str, ...]:
    """Finds the masks of a page of an image: those of its own, or the same page of the image's.

    Raises:
      ValueError: there is none, or one with more or fewer pages than the image.
    """
    own, name = (PurePath(path).relative_to(self._folder).with_suffix('').as_posix()
                 for path in (_page_of_file(page), image))
    if own != name and (found := self.masks.of(own)):
      return found
    if found := self.masks.of(name):
      return dict(paired_pages(image, found))[page]
    expected = self.masks.folder / self._mask_names[0].replace('{}', name).replace('.*', '.png')
    inner = expected.parent
    there = f'found {listing(inner)}' if inner.is_dir() else f'there is no folder {inner}'
    raise ValueError(
        f'No mask for {page}: expected {expected}, {there}. Add it or name it so, or remove '
        f'{self.masks.folder.parent} to evaluate this category without pixel metrics.')


def paired_pages(image: str, masks: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
  """Lists the pages of an image file, each with its masks: the same page of every mask file.

  Raises:
    ValueError: a mask with more or fewer pages than its image.
  """
  pages, masks_of_pages = pages_of(image), []
  for mask in masks:
    masks_of_pages.append(pages_of(mask))
    if len(masks_of_pages[-1]) != len(pages):
      raise ValueError(
          f'The mask {mask} has {_pages(masks_of_pages[-1])}, and its image {image} has {len(pages)}: '
          'expected as many.')
  return [(page, tuple(of_mask[i] for of_mask in masks_of_pages)) for i, page in enumerate(pages)]


MVTEC = FolderLayout()


def existing_root(root: str | os.PathLike) -> Path:
  """Returns `root` as a path; raises ValueError if that is no folder."""
  path = Path(root)
  if not path.is_dir():
    what = 'is a file' if path.exists() else 'does not exist'
    raise ValueError(f'The data folder {path} {what}: expected the folder of a data set.')
  return path


def _unused(masks: Path, used: Sequence[MaskFiles]) -> list[str]:
  """Lists the masks of no image, those of kinds of defects that have no images among them."""
  if not masks.is_dir():
    return []
  known = {found.folder for found in used}
  others = [p for p in folders_in(masks) if p not in known]
  loose = map(str, image_files.images_in(masks))
  return sorted([*loose, *(path for found in (*used, *(MaskFiles(p, (), ()) for p in others))
                           for path in found.of_no_image())])


def _below(folder: Path) -> list[str]:
  """Lists the image files in a folder and below it."""
  return image_files.listed(folder).images


def _pages(pages: Sequence[str]) -> str:
  return f'{len(pages)} page{"s" if len(pages) > 1 else ""}'


def _page_of_file(page: str) -> str:
  """Puts the number of a page before the suffix, where the name of a mask has it.

  >>> _page_of_file('stack.tif#2'), _page_of_file('part.png')
  ('stack#2.tif', 'part.png')
  """
  file = image_files.file_of(page)
  base, suffix = os.path.splitext(file)
  return base + page[len(file):] + suffix


def _some(folders: Sequence[Path]) -> str:
  """Lists folders, for messages."""
  return ', '.join(map(str, folders))
