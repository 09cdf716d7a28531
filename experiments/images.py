"""A category's images as batches: read from files, or their feature maps, extracted once for many runs."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments import wiring
from experiments.wiring import Settings
from patchcore_jax import disk_arrays, parallel
from patchcore_jax.backbones import Backbone, FeatureMaps
from patchcore_jax.data.folder import Category, Example
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.data.preprocess import ImageError
from patchcore_jax.detectors import base


class Images:
  """What a run needs to know of a category.

  Attributes:
    name: of the category.
    test_examples: in the order of the batches' `index`.
    num_train: images to fit on.
    shots: names of those, where they are a draw from all; else empty.
    skipped: errors of files that could not be read, of all passes.
  """

  def __init__(self, config: ConfigDict, settings: Settings, category: Category):
    self.name, self.test_examples, self.has_masks = category.name, category.test, category.has_masks
    self._config, self._preprocessing = config, settings.preprocessing
    self._train = drawn(category.train, config.data.shots, config.seed, config.data.draw)
    self.num_train = len(self._train)
    self.shots = [Path(e.image_path).name for e in self._train] if config.data.shots else []
    self.skipped: list[ImageError] = []

  def train_names(self, index: Sequence[int]) -> list[str]:
    """Files of training images, by their `index` in batches."""
    return [self._train[i].image_path for i in index]

  def train_example(self, name: str) -> Example | None:
    """The training image of that file, if there is one."""
    return next((e for e in self._train if e.image_path == name), None)

  def train(self, part: slice = slice(None)) -> Iterator[Batch]:
    """The training images, or a part of them; `index` counts in that."""
    return self._batches(self._train[part])

  def test(self, part: slice = slice(None)) -> Iterator[Batch]:
    return self._batches(self.test_examples[part], with_masks=self.has_masks)

  def _batches(self, examples, with_masks=False):
    return wiring.batches(
        self._config, examples, self._preprocessing, self.skipped, with_masks=with_masks)


class SharedImages(Images):
  """Images whose feature maps are at hand; for `backbones.without_network`."""

  def __init__(self, config, settings, category, features: 'Features'):
    super().__init__(config, settings, category)
    self._features = features

  def _batches(self, examples, with_masks=False):
    return self._features.batches(
        examples, parallel.divisible_batch_size(self._config.data.batch_size), with_masks)


class Features:
  """The feature maps of all of a category's images, on disk as long as this lives.

  Args:
    backbone: whose layers are wanted.
    images: which are read once.
    scratch: folder on the disk to use.
    progress: called with ('features', done, total).
  """

  def __init__(self, backbone: Backbone, images: Images, scratch: Path, progress):
    self.layers, self.skipped = backbone.layers, images.skipped
    self._rows, self._maps, self._masks = {}, {}, {}
    examples = (*images._train, *images.test_examples)
    fn, parameters = base.maps_of(backbone), parallel.replicate(backbone.variables)
    batches = ((part, batch) for part, source in (
        (images._train, images.train()), (images.test_examples, images.test())) for batch in source)
    parts = []

    def noted():
      for part, batch in batches:
        parts.append(part)
        yield batch

    for batch, maps in base.stream(fn, parameters, noted()):
      part, self.image_size = parts.pop(0), batch.image.shape[1:3]
      for row, position in enumerate(batch.index):
        if position < 0:
          continue
        at = len(self._rows)
        self._rows[part[position]] = at
        if batch.mask is not None:
          self._masks[part[position]] = batch.mask[row]
        for layer, values in zip(self.layers, maps, strict=True):
          if layer not in self._maps:
            self._maps[layer] = disk_arrays.DiskArray(scratch, (len(examples), *values.shape[1:]))
          self._maps[layer][at] = values[row]
      progress('features', len(self._rows), len(examples))

  def batches(
      self, examples: Sequence[Example], batch_size: int, with_masks: bool) -> Iterator[Batch]:
    """As `wiring.batches`; what could not be read is left out."""
    known = [(i, e) for i, e in enumerate(examples) if e in self._rows]
    for begin in range(0, len(known), batch_size):
      part = known[begin:begin + batch_size]
      rows = np.array([self._rows[e] for _, e in part])
      missing = batch_size - len(part)
      rows = np.pad(rows, (0, missing), mode='edge')
      maps = {layer: array[rows] for layer, array in self._maps.items()}
      index = np.array([i for i, _ in part] + [-1] * missing, np.int32)
      masks = None
      if with_masks:
        masks = np.stack([self._masks[e] for _, e in part] + [np.zeros(self.image_size, bool)] * missing)
      yield Batch(FeatureMaps(maps, self.image_size), masks, index)


def drawn(
    examples: Sequence[Example], shots: int, seed: int, draw: int) -> list[Example]:
  """`shots` of the examples, in their order; all of them for 0.

  A draw is of its own for each category, and a larger one of the same number contains the smaller.

  Raises:
    ValueError: fewer examples than shots.
  """
  if not shots:
    return list(examples)
  if shots > len(examples):
    raise ValueError(
        f'data.shots={shots}: {examples[0].category} has {len(examples)} training images.')
  category = zlib.crc32(examples[0].category.encode())
  order = np.random.default_rng([seed, draw, category]).permutation(len(examples))
  return [examples[i] for i in sorted(order[:shots])]
