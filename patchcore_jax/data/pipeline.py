"""Examples -> batches of one fixed shape, read ahead by Grain.

The shape never changes, the last batch included (it is padded, and `Batch.index` tells the padding
apart), so that everything behind it compiles once per image size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from patchcore_jax.data import preprocess
from patchcore_jax.data.folder import Example


class Batch(NamedTuple):
  """A batch of b images.

  Attributes:
    image: [b, h, w, 3] uint8 RGB.
    mask: [b, h, w] bool, or None if masks were not asked for.
    index: [b] int32, position of each image in the list of examples; -1 marks padding.
  """

  image: np.ndarray
  mask: np.ndarray | None
  index: np.ndarray

  @property
  def valid(self) -> np.ndarray:
    """[b] bool, False for padding."""
    return self.index >= 0


def batches(
    examples: Sequence[Example],
    preprocessing: preprocess.Preprocessing,
    *,
    batch_size: int,
    num_workers: int = 0,
    with_masks: bool = False,
    on_error: Callable[[preprocess.ImageError], None] | None = None,
) -> Iterator[Batch]:
  """Yields all examples once, in order, in batches of exactly `batch_size`.

  Args:
    examples: what to read.
    preprocessing: sizes.
    batch_size: images per batch.
    num_workers: worker processes that decode; 0 decodes in threads of this process, which is
      quicker for a few hundred images (a process takes seconds to start).
    with_masks: also read masks.
    on_error: called with the `ImageError` of each file that cannot be used, which is then left
      out; by default the error is raised.

  Raises:
    ImageError: a file cannot be used and `on_error` is None.
    ValueError: images of different sizes after preprocessing.
  """
  if batch_size < 1 or num_workers < 0:
    raise ValueError(f'Expected batch_size >= 1, num_workers >= 0, got {batch_size}, {num_workers}.')
  dataset = (
      grain.MapDataset.source(_Source(examples))
      .map(_Load(preprocessing, with_masks))
      .batch(batch_size, drop_remainder=False, batch_fn=list))
  # Grain's element is a whole batch: workers then take turns batch by batch, and order is kept.
  stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4))
  if num_workers:
    if not flags.FLAGS.is_parsed():  # Grain's workers read its own flags, in programs without absl too
      flags.FLAGS.mark_as_parsed()
    stream = stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
  size = None
  for records in stream:
    good = []
    for record in records:
      if record['error']:
        error = preprocess.ImageError(str(record['error']))
        if on_error is None:
          raise error
        on_error(error)
      else:
        good.append(record)
    if not good:
      continue
    size = size or (good[0]['image'].shape, examples[good[0]['index']].image_path)
    for record in good:
      if record['image'].shape != size[0]:
        raise ValueError(
            f'Images differ in size after preprocessing: {size[1]} has {size[0][:2]}, '
            f'{examples[record["index"]].image_path} has {record["image"].shape[:2]} (height, '
            'width). Set preprocess.crop, preprocess.pad, or preprocess.resize=(height, width).')
    yield _collate(good, batch_size)


class _Source:
  """Random access to (index, example); Grain wants a type of its own with a short repr."""

  def __init__(self, examples):
    self._examples = list(examples)

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, index):
    return index, self._examples[index]

  def __repr__(self):
    return f'examples({len(self)})'


class _Load:
  """Runs in threads or worker processes. Errors travel as text, to be raised where they are seen."""

  def __init__(self, preprocessing, with_masks):
    self._preprocessing, self._with_masks = preprocessing, with_masks

  def __call__(self, item):
    index, example = item
    try:
      image, mask = preprocess.load(example, self._preprocessing, with_mask=self._with_masks)
    except preprocess.ImageError as e:
      return {'index': index, 'error': str(e)}
    record = {'index': index, 'error': '', 'image': image}
    return record | {'mask': mask} if self._with_masks else record


def _collate(records, batch_size) -> Batch:
  def stack(name):
    # Copies out of the workers' shared memory, which is freed with the record.
    rows = np.stack([np.array(r[name]) for r in records])
    padding = [(0, batch_size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(rows, padding)

  index = np.full(batch_size, -1, np.int32)
  index[:len(records)] = [r['index'] for r in records]
  return Batch(stack('image'), stack('mask') if 'mask' in records[0] else None, index)
