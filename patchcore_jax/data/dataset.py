"""Images to fit on or to score, read as often as wanted from files or from an array."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from patchcore_jax.data import pipeline, value_range
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.settings import Preprocessing

Augment = Callable[[np.random.Generator, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class FileData:
  """Image files, decoded and preprocessed whenever they are asked for.

  Attributes:
    examples: what to read.
    preprocessing: what is done to them.
    batch_size: images per batch, a multiple of the number of local devices.
    num_workers, on_error: see `pipeline.batches`.
    with_masks: also reads masks.
    original_size: (width, height) that most of the files have, upright; None where nobody looked.
    max_pixels: as of `decoding.decode`.
    outside_range: the largest share of one image's pixels that lie outside of the value range; None where it
      was not measured yet.
  """

  examples: Sequence[Example]
  preprocessing: Preprocessing
  batch_size: int
  num_workers: int = 0
  with_masks: bool = False
  on_error: Callable[[ImageError], None] | None = None
  original_size: tuple[int, int] | None = None
  max_pixels: int | None = None
  outside_range: float | None = None

  def __len__(self) -> int:
    return len(self.examples)

  def measured(self) -> 'FileData':
    """Measures the value range of files with more than 8 bits, unless that is done (`value_range.measured`).

    Raises:
      ValueError: no range fits all files.
    """
    if self.outside_range is not None or any(example.read for example in self.examples):
      return self
    preprocessing, outside = value_range.measured(
        [example.image_path for example in self.examples], self.preprocessing, max_pixels=self.max_pixels)
    return dataclasses.replace(self, preprocessing=preprocessing, outside_range=outside)

  def batches(self, *, shuffle: int | None = None, augment: Augment | None = None) -> Iterator[Batch]:
    """Yields the images in batches, as `detectors.base.Data` describes.

    Raises:
      ImageError: a file cannot be used and `on_error` is None.
      ValueError: images of different sizes after preprocessing.
    """
    order = _order(len(self), shuffle)
    batches = pipeline.batches(
        [self.examples[i] for i in order], self.preprocessing, batch_size=self.batch_size,
        num_workers=self.num_workers, with_masks=self.with_masks,
        max_pixels=self.max_pixels, on_error=self.on_error)
    return (_changed(batch, order, shuffle, augment) for batch in batches)

  def part(self, positions: Sequence[int]) -> 'FileData':
    """Returns the data of the examples at `positions`."""
    return dataclasses.replace(self, examples=[self.examples[i] for i in positions])


@dataclasses.dataclass(frozen=True)
class ArrayData:
  """Images that are at hand, of one size.

  Attributes:
    images: [n, h, w, 3] uint8 RGB, as the network is to see them.
    batch_size: images per batch, a multiple of the number of local devices.
    names: [n] names of the images; () for none.
    labels: [n] 0 for good ones and 1 for labelled defects; () where all are good.
    preprocessing: what was done to them; None for nothing.
    original_size: (width, height) that they had before; None where nobody looked.

  >>> data = ArrayData(np.zeros((3, 8, 8, 3), np.uint8), batch_size=2)
  >>> [batch.index.tolist() for batch in data.batches()]
  [[0, 1], [2, -1]]
  """

  images: np.ndarray
  batch_size: int = 32
  names: Sequence[str] = ()
  preprocessing: Preprocessing | None = None
  original_size: tuple[int, int] | None = None
  labels: Sequence[int] = ()

  def __len__(self) -> int:
    return len(self.images)

  @property
  def examples(self) -> list[Example]:
    """An example for each image, which names no file where the image has no name."""
    names, labels = self.names or [''] * len(self), self.labels or [0] * len(self)
    return [Example(name, (), label, '', 'defect' if label else 'good')
            for name, label in zip(names, labels, strict=True)]

  def batches(self, *, shuffle: int | None = None, augment: Augment | None = None) -> Iterator[Batch]:
    """Yields the images in batches, as `detectors.base.Data` describes."""
    order = _order(len(self), shuffle)
    for begin in range(0, len(order), self.batch_size):
      index = np.full(self.batch_size, -1, np.int32)
      part = order[begin:begin + self.batch_size]
      index[:len(part)] = np.arange(begin, begin + len(part))
      images = np.zeros((self.batch_size, *self.images.shape[1:]), np.uint8)
      images[:len(part)] = self.images[part]
      yield _changed(Batch(images, None, index), order, shuffle, augment)

  def part(self, positions: Sequence[int]) -> 'ArrayData':
    """Returns the data of the images at `positions`."""
    positions = np.asarray(positions, int)
    names, labels = ([kept[i] for i in positions] if kept else () for kept in (self.names, self.labels))
    return dataclasses.replace(self, images=self.images[positions], names=names, labels=labels)


def _order(n: int, shuffle: int | None) -> np.ndarray:
  """Lists the positions of n examples in the order in which they come."""
  return np.arange(n) if shuffle is None else np.random.default_rng(shuffle).permutation(n)


def _changed(batch: Batch, order, shuffle, augment) -> Batch:
  """Augments a batch, and gives its images the positions that they have among the examples."""
  index = np.where(batch.valid, order[batch.index], -1).astype(np.int32)
  if augment is None:
    return batch._replace(index=index)
  # The generator depends on the seed and the image alone: another batch size gives the same images.
  images = [
      augment(np.random.default_rng([shuffle or 0, i]), image) if i >= 0 else image
      for i, image in zip(index, batch.image, strict=True)]
  return batch._replace(image=np.stack(images), index=index)
