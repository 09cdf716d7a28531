"""A category's images as batches: read from files, or their feature maps, extracted once for many runs."""

import copy
import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchcore_jax import disk_arrays, parallel
from patchcore_jax.backbones import Backbone, FeatureMaps
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.folder import Category, Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import streaming
from patchcore_jax.evaluation import leaks
from patchcore_jax.evaluation.leaks import DigestedData
from patchcore_jax.evaluation.protocols import PROTOCOLS
from patchcore_jax.evaluation.settings import Settings
from patchcore_jax.settings import Preprocessing


class Images:
  """The images of a category, and what a run needs to know of it.

  Attributes:
    name: name of the category.
    preprocessing: what is done to them: that of the settings, with the value range of the training images.
    train, test: its images; those of the test with masks where there are any.
    validation: good images that are neither, where the protocol needs them; else empty.
    noise: anomalous images among the training images, behind the good ones, which pass for good. They were
      test images, and are none any more.
    defects: labelled defects among the training images, behind these. They were test images too.
    files: training and test images, also where `train` and `test` are feature maps.
    has_masks: whether there are masks.
    batch_size: images that pass through the network at once.
    shots: names of the training images, where they are a draw from all; else empty.
    skipped: errors of files that could not be read, of all passes.
    digests: of the images that have passed by, by the paths of their files: see `leaks`.
  """

  def __init__(self, settings: Settings, category: Category):
    self.name, self.has_masks = category.name, category.has_masks
    self.skipped: list[ImageError] = []
    train = [example for own in _by_category(category.train)
             for example in drawn(own, settings.data.shots, settings.seed, settings.data.draw)]
    self.shots = tuple(Path(e.image_path).name for e in train) if settings.data.shots else ()
    self.defects = labelled_defects(category.test, len(train), settings)
    taken = {e.image_path for e in self.defects}
    self.noise = noise([e for e in category.test if e.image_path not in taken], len(train), settings)
    taken |= {e.image_path for e in self.noise}
    tested = [e for e in category.test if e.image_path not in taken]
    self.batch_size = parallel.divisible_batch_size(settings.data.batch_size)
    self.digests: dict[str, bytes] = {}
    train, test = (
        DigestedData(**vars(data_of(settings, examples, self.skipped, with_masks=with_masks)),
                     digests=self.digests)
        for examples, with_masks in (
            (train + self.noise + self.defects, False), (tested, category.has_masks)))
    self.train = train.measured()
    self.preprocessing = self.train.preprocessing
    self.test = dataclasses.replace(test, preprocessing=self.preprocessing)
    wanted = category.validation if PROTOCOLS[settings.metrics.protocol].validation else ()
    self.validation = dataclasses.replace(
        data_of(settings, wanted, self.skipped), preprocessing=self.preprocessing)
    self.files = self.train, self.test

  def use(self, preprocessing: Preprocessing) -> None:
    """Has the images read otherwise, as a bank says that its training images were."""
    self.preprocessing = preprocessing
    self.files = tuple(dataclasses.replace(data, preprocessing=preprocessing) for data in self.files)
    if isinstance(self.train, FileData):
      self.train, self.test = self.files
      self.validation = dataclasses.replace(self.validation, preprocessing=preprocessing)

  def train_example(self, name: str) -> Example | None:
    """Finds the training image of that file; None if there is none."""
    return next((e for e in self.train.examples if e.image_path == name), None)

  def leaks(self, tested: Sequence[int]) -> leaks.Leaks:
    """Compares training and test images. Of several processes, each is asked, of those that it tested.

    Args:
      tested: positions of the test images that this process has read.
    """
    train, test = self.files
    leaks.read(train)
    return leaks.find(
        {train.examples[i].image_path: digest for i, digest in leaks.gathered(train)},
        [(test.examples[i], digest) for i, digest in leaks.gathered(test, tested)])

  def with_features(self, features: 'Features') -> 'Images':
    """Makes the same with feature maps in the place of pixels, for `backbones.without_network`."""
    images = copy.copy(self)
    images.train, images.test, images.validation = (
        FeatureData(data, features) for data in (self.train, self.test, self.validation))
    images.preprocessing = features.preprocessing
    self.digests.update(features.digests)
    return images


class Features:
  """The feature maps of all of a category's images, on disk as long as this lives.

  Args:
    backbone: the network whose layers are wanted.
    images: the images, which are read once.
    scratch: folder on the disk to use.
    progress: called with ('features', done, total).
  """

  def __init__(self, backbone: Backbone, images: Images, scratch: Path, progress):
    self.layers, self.image_size = backbone.layers, (0, 0)
    self.rows, self.maps, self.masks = {}, {}, {}
    self.preprocessing, self.digests = images.preprocessing, images.digests
    fn, parameters = streaming.maps_of(backbone), parallel.replicate(backbone.variables)
    parts = images.train, images.test, images.validation
    total = sum(map(len, parts))
    for data in parts:
      for batch, maps in streaming.stream(fn, parameters, data.batches()):
        self.image_size = batch.image.shape[1:3]
        for row, position in enumerate(batch.index):
          if position >= 0:
            self._add(data.examples[position], batch, row, maps, scratch, total)
        progress('features', len(self.rows), total)

  def _add(self, example, batch, row, maps, scratch, total):
    """Adds the feature maps and the mask of one image."""
    at = self.rows[example.image_path] = len(self.rows)
    if batch.mask is not None:
      self.masks[example.image_path] = batch.mask[row]
    for layer, values in zip(self.layers, maps, strict=True):
      if layer not in self.maps:
        self.maps[layer] = disk_arrays.DiskArray(scratch, (total, *values.shape[1:]))
      self.maps[layer][at] = values[row]


@dataclasses.dataclass(frozen=True)
class FeatureData:
  """Images in the form of their feature maps; what could not be read is left out.

  Attributes:
    data: the images.
    features: theirs, among others.
  """

  data: FileData
  features: Features

  @property
  def examples(self) -> Sequence[Example]:
    return self.data.examples

  @property
  def preprocessing(self) -> Preprocessing:
    return self.data.preprocessing

  def __len__(self) -> int:
    return len(self.data)

  def part(self, positions: Sequence[int]) -> 'FeatureData':
    """Selects the examples at these positions, as data of their own."""
    return dataclasses.replace(self, data=self.data.part(positions))

  def batches(self, *, shuffle: int | None = None, augment: Any = None) -> Iterator[Batch]:
    """Yields every image once, in order.

    Raises:
      ValueError: another order, or augmentation, which is of pixels.
    """
    if shuffle is not None or augment is not None:
      raise ValueError('Feature maps that are shared are neither shuffled nor augmented: fit on the images.')
    features, batch_size = self.features, self.data.batch_size
    known = [(i, e.image_path) for i, e in enumerate(self.examples) if e.image_path in features.rows]
    for begin in range(0, len(known), batch_size):
      part = known[begin:begin + batch_size]
      missing = batch_size - len(part)
      rows = np.pad(np.array([features.rows[path] for _, path in part]), (0, missing), mode='edge')
      maps = {layer: array[rows] for layer, array in features.maps.items()}
      index = np.array([i for i, _ in part] + [-1] * missing, np.int32)
      masks = None
      if self.data.with_masks:
        masks = np.stack(
            [features.masks[path] for _, path in part] + [np.zeros(features.image_size, bool)] * missing)
      yield Batch(FeatureMaps(maps, features.image_size), masks, index)


def data_of(
    settings: Settings, examples: Sequence[Example], skipped: list[ImageError], *,
    with_masks: bool = False) -> FileData:
  """Makes the data of examples; with data.on_error='skip', unreadable files are added to `skipped`."""
  return FileData(
      examples, settings.preprocessing, parallel.divisible_batch_size(settings.data.batch_size),
      num_workers=settings.data.num_workers, with_masks=with_masks,
      max_pixels=int(settings.data.max_megapixels * 1e6),
      on_error=skipped.append if settings.data.on_error == 'skip' else None)


def drawn(
    examples: Sequence[Example], shots: int, seed: int, draw: int) -> list[Example]:
  """Draws `shots` of the examples, and keeps their order; 0 stands for all of them.

  Each category has a draw of its own, and a larger draw of the same number contains the smaller.

  Raises:
    ValueError: fewer examples than shots.
  """
  if not shots:
    return list(examples)
  if shots > len(examples):
    raise ValueError(
        f'data.shots={shots}: {examples[0].category} has {len(examples)} training images.')
  return _some_of(examples, shots, seed, draw)


def _by_category(examples):
  """Parts examples by their category, of which there are several where all have one model."""
  parts = {}
  for example in examples:
    parts.setdefault(example.category, []).append(example)
  return parts.values()


def labelled_defects(test: Sequence[Example], num_train: int, settings: Settings) -> list[Example]:
  """Draws from the test images the defects to learn from, and keeps their order; [] where none are wanted.

  Args:
    test: all test images.
    num_train: good training images, of whose number there is a share.
    settings: of the run.

  Raises:
    ValueError: so many that no defect would be left to test.
  """
  if not settings.data.labelled_defects:
    return []
  count = max(1, round(settings.data.labelled_defects * num_train))
  defects = [example for example in test if example.label]
  if count >= len(defects):
    raise ValueError(
        f'data.labelled_defects={settings.data.labelled_defects}: {count} of the {len(defects)} defects '
        f'among the test images of {test[0].category} would be learned from: expected fewer.')
  return _some_of(defects, count, settings.seed, settings.data.draw)


def noise(test: Sequence[Example], num_train: int, settings: Settings) -> list[Example]:
  """Draws from the test images the defects that pass for good training images, and keeps their order.

  Args:
    test: all test images, but for those that are learned from as defects.
    num_train: training images, of whose number there is a share.
    settings: of the run.

  Returns:
    The images with the label of good ones; [] where none are wanted.

  Raises:
    ValueError: a share that is no image, or so many that no defect would be left to test.
  """
  if not settings.data.noise:
    return []
  count = int(settings.data.noise * num_train)
  defects = [example for example in test if example.label]
  if not 0 < count < len(defects):
    raise ValueError(
        f'data.noise={settings.data.noise}: {count} of the {len(defects)} anomalous test images of '
        f'{test[0].category} would join the {num_train} training images: expected at least one, and fewer '
        'than there are.')
  return [e._replace(label=0) for e in _some_of(defects, count, settings.seed, settings.data.draw)]


def _some_of(examples, count, seed, draw):
  """Draws so many of some images of a category, in their order."""
  category = zlib.crc32(examples[0].category.encode())
  order = np.random.default_rng([seed, draw, category]).permutation(len(examples))
  return [examples[i] for i in sorted(order[:count])]
