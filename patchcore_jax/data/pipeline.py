"""Turns examples into batches of one fixed shape, which are read ahead.

The shape never changes, the last batch included (it is padded, and `Batch.index` tells the padding
apart), so that everything behind it compiles once per image size.
"""

import collections
import concurrent.futures
import gc
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from patchcore_jax import extras
from patchcore_jax.data import preprocess
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError

_MOST_THREADS = 16  # they decode, one for each core


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
    max_pixels: int | None = None,
    on_error: Callable[[ImageError], None] | None = None,
) -> Iterator[Batch]:
  """Yields all examples once, in order, in batches of exactly `batch_size`.

  Args:
    examples: what to read.
    preprocessing: what is done to them.
    batch_size: images per batch.
    num_workers: worker processes that decode, by Grain (extra [workers]); 0 decodes in threads of this
      process, which is quicker unless many cores wait for a fast accelerator.
    with_masks: also read masks.
    max_pixels: as of `decoding.decode`.
    on_error: called with the `ImageError` of each file that cannot be used, which is then left
      out; by default the error is raised.

  Raises:
    ImageError: a file cannot be used and `on_error` is None.
    ValueError: images of different sizes after preprocessing, or Grain is needed and not installed.
  """
  if batch_size < 1 or num_workers < 0:
    raise ValueError(f'Expected batch_size >= 1, num_workers >= 0, got {batch_size}, {num_workers}.')
  load = _Load(preprocessing, with_masks, max_pixels)
  if num_workers:
    stream = _in_processes(load, examples, batch_size, num_workers)
  else:
    stream = _in_threads(load, examples, batch_size)
  try:
    yield from _checked(stream, examples, batch_size, on_error)
  finally:
    stream.close()


def _in_threads(load, examples, batch_size) -> Iterator[dict[str, Any]]:
  """Loads examples in threads of this process, up to two batches ahead, and yields them joined in batches."""
  threads = min(_MOST_THREADS, max(4, os.cpu_count() or 1))
  items, pending = enumerate(examples), collections.deque()
  executor = concurrent.futures.ThreadPoolExecutor(threads, 'decode')

  def submit(count):
    pending.extend(executor.submit(load, item) for item in itertools.islice(items, count))

  try:
    submit(2 * batch_size + threads)
    while pending:
      records = []
      while pending and len(records) < batch_size:
        records.append(pending.popleft().result())
        submit(1)
      yield _join(records)
  finally:
    executor.shutdown(cancel_futures=True)


def _in_processes(load, examples, batch_size, num_workers) -> Iterator[dict[str, Any]]:
  """Loads examples in worker processes, by Grain, and yields them joined in batches."""
  with extras.needed_for(
      f'Decoding in {num_workers} processes', otherwise='set data.num_workers=0 to decode in threads'):
    import grain
  from absl import flags

  if not flags.FLAGS.is_parsed():  # Grain's workers read its own flags, in programs without absl too
    flags.FLAGS.mark_as_parsed()
  # Grain's element is a whole batch: workers then take turns batch by batch, and order is kept.
  dataset = (
      grain.MapDataset.source(_Source(examples)).map(load)
      .batch(batch_size, drop_remainder=False, batch_fn=_join))
  threads = min(_MOST_THREADS, max(4, os.cpu_count() or 1))  # of each worker
  try:
    yield from (
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)))
  finally:
    # Grain's iterators are in a reference cycle with the last batch: without this its shared memory
    # is freed at exit only, with a warning of Python's.
    gc.collect()


def _checked(stream, examples, batch_size, on_error):
  """Reports the errors of each batch, checks that sizes agree, and yields the batches, padded."""
  first = None
  for joined in stream:
    for message in joined['errors']:
      error = ImageError(message)
      if on_error is None:
        raise error
      on_error(error)
    for index, size in joined['sizes']:
      first = first or (index, size)
      if size != first[1]:
        raise ValueError(
            f'Images differ in size after preprocessing: {examples[first[0]].image_path} has '
            f'{first[1]}, {examples[index].image_path} has {size} (height, width). Set '
            'preprocess.crop, preprocess.pad, or preprocess.resize=(height, width).')
    if joined['sizes']:
      yield _padded(joined, batch_size)


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
  """Loads an example, in a thread or a worker process. Errors are returned as text, to be raised later."""

  def __init__(self, preprocessing, with_masks, max_pixels):
    self._preprocessing, self._with_masks, self._max_pixels = preprocessing, with_masks, max_pixels

  def __call__(self, item):
    index, example = item
    try:
      image, mask = preprocess.load(
          example, self._preprocessing, with_mask=self._with_masks, max_pixels=self._max_pixels)
    except ImageError as e:
      return {'index': index, 'error': str(e)}
    record = {'index': index, 'error': '', 'image': image}
    return record | {'mask': mask} if self._with_masks else record


def _join(records):
  """Joins the readable records of a batch to arrays, in the worker: few large pieces are quicker to send."""
  good = [r for r in records if not r['error']]
  joined = {
      'errors': [r['error'] for r in records if r['error']],
      'sizes': [(r['index'], r['image'].shape[:2]) for r in good]}
  if len({size for _, size in joined['sizes']}) == 1:
    for name in good[0].keys() & {'image', 'mask'}:
      joined[name] = np.stack([r[name] for r in good])
  return joined


def _padded(joined, batch_size) -> Batch:
  index = np.full(batch_size, -1, np.int32)
  index[:len(joined['sizes'])] = [i for i, _ in joined['sizes']]

  def pad(name):
    if name not in joined:
      return None
    # Copies out of the worker's shared memory, which is freed with the record.
    rows = joined[name]
    whole = np.zeros((batch_size, *rows.shape[1:]), rows.dtype)
    whole[:len(rows)] = rows
    return whole

  return Batch(pad('image'), pad('mask'), index)
