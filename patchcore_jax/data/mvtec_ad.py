"""MVTec AD as prepared by TensorFlow Datasets (extra [tfds]). Needs no TensorFlow.

The files of images and masks are stored byte for byte, in the order of the folder layout, in
ArrayRecord files (random access). So this source and the folders give the same arrays.

  prepare(data_dir, folder, ['screw'])
  load_category(data_dir, 'screw')
"""

import functools
import os
from collections.abc import Callable, Sequence

from patchcore_jax import extras
from patchcore_jax.data.folder import Category, Example, existing_root

NAME, VERSION = 'mvtec_ad', '1.0.0'  # folders of TensorFlow Datasets

CATEGORIES = (
    'bottle', 'cable', 'capsule', 'carpet', 'grid', 'hazelnut', 'leather', 'metal_nut', 'pill', 'screw',
    'tile', 'toothbrush', 'transistor', 'wood', 'zipper')

# These are from third_party/datasets.md.
HOMEPAGE = 'https://www.mvtec.com/company/research/datasets/mvtec-ad'
ARCHIVE_URL = (
    'https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f283/download/'
    '420938113-1629960298/mvtec_anomaly_detection.tar.xz')
ARCHIVE_SHA256 = 'cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d'
LICENCE = (
    'MVTec AD, copyright 2019 MVTec Software GmbH. Creative Commons Attribution-NonCommercial-ShareAlike '
    '4.0 (CC BY-NC-SA 4.0), https://creativecommons.org/licenses/by-nc-sa/4.0/: not for commercial use '
    "without MVTec's permission.")
CITATION = """@inproceedings{bergmann2019mvtec,
  title={{MVTec AD} -- A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection},
  author={Bergmann, Paul and Fauser, Michael and Sattlegger, David and Steger, Carsten},
  booktitle={CVPR}, pages={9584--9592}, year={2019}
}"""


def prepare(
    data_dir: str | os.PathLike, folder: str | os.PathLike, categories: Sequence[str] = CATEGORIES, *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
  """Writes the records of extracted categories; those that are there already are left alone.

  A category appears whole or not at all.

  Args:
    data_dir: the folder of TensorFlow Datasets to write to; made if absent.
    folder: the extracted archive, with a folder for each category.
    categories: names of the categories to write.
    progress: called as `progress(done, total)` after each category.

  Raises:
    ValueError: a category that MVTec AD does not have or that `folder` does not, without masks, or with
      a file that is no image.
  """
  check_categories(categories)
  for done, category in enumerate(categories, 1):
    if not is_prepared(data_dir, category):
      _builder(data_dir, category).write(folder)
    if progress is not None:
      progress(done, len(categories))


def is_prepared(data_dir: str | os.PathLike, category: str) -> bool:
  """Tells whether a category is prepared, so that `load_category` finds it."""
  builder = _builder(data_dir, category)
  return builder.data_path.exists() and builder.is_prepared()  # the latter alone warns


def list_categories(data_dir: str | os.PathLike) -> list[str]:
  """Lists the prepared categories by name, sorted.

  Raises:
    ValueError: no such folder, or none prepared in it.
  """
  root = existing_root(data_dir)
  names = [category for category in CATEGORIES if is_prepared(root, category)]
  if names:
    return names
  above = next((p for p in root.parents if any(is_prepared(p, c) for c in CATEGORIES)), None)
  raise ValueError(
      f'No prepared category of MVTec AD in {root}: expected {NAME}/<category>/{VERSION}. '
      + (f'Pass the folder {above}.' if above else
         'Prepare it: python -m experiments.prepare --dataset=mvtec_ad --data_dir=FOLDER.'))


def load_category(data_dir: str | os.PathLike, category: str) -> Category:
  """Lists the images of one prepared category, in the order of the folder layout.

  Paths are those below the root of the data set ('screw/test/good/000.png'), and `Example.read` gives
  the bytes of the files.

  Raises:
    ValueError: not a category of MVTec AD, or not prepared.
  """
  check_categories([category])
  existing_root(data_dir)
  if not is_prepared(data_dir, category):
    raise ValueError(
        f'The category {category!r} is not prepared in {data_dir}. There are: '
        f'{", ".join(list_categories(data_dir))}. Prepare it: python -m experiments.prepare '
        f'--dataset=mvtec_ad --data_dir={data_dir} --categories={category}.')
  metadata = _builder(data_dir, category).info.metadata
  splits = []
  for split in ('train', 'test'):
    read = _Records(os.fspath(data_dir), category, split, {
        path: (i, field) for i, (image, masks, *_) in enumerate(metadata[split])
        for field, paths in (('image', [image]), ('mask', masks)) for path in paths})
    splits.append([
        Example(image, tuple(masks), label, category, defect, read)
        for image, masks, label, defect in metadata[split]])
  return Category(category, *splits, has_masks=True)


def check_categories(categories: Sequence[str]) -> None:
  """Checks names of categories: raises ValueError for one that MVTec AD does not have."""
  for category in categories:
    if category not in CATEGORIES:
      raise ValueError(f'No category {category!r} in MVTec AD. There are: {", ".join(CATEGORIES)}.')


def _builder(data_dir, category):
  """Makes the builder of a category, which reads and writes its records."""
  with extras.needed_for('A data set of TensorFlow Datasets'):
    from patchcore_jax.data.mvtec_ad_builder import MVTecAD  # half a second to import

  return MVTecAD(config=category, data_dir=data_dir)


class _Records:
  """The bytes of the files of one split. It is pickled without its open files: each process opens its own."""

  def __init__(self, data_dir: str, category: str, split: str, index: dict[str, tuple[int, str]]):
    self._place, self._index = (data_dir, category, split), index

  def __call__(self, path: str) -> bytes:
    position, field = self._index[path]
    return self._source[position][field]

  @functools.cached_property
  def _source(self):
    data_dir, category, split = self._place
    return _builder(data_dir, category).files(split)

  def __getstate__(self):
    return {'_place': self._place, '_index': self._index}

  def __repr__(self) -> str:
    return 'records of {1}/{2} in {0}'.format(*self._place)
