"""The images that training chooses from: many at a time, and always new ones among them."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable

import numpy as np

from patchcore_jax.builtin import procedural

_CHUNK = 16  # images that a worker draws at a time


class Pool:
  """A window over the endless row `procedural.draw(seed, 0), draw(seed, 1), ...` that moves with the steps.

  Step s chooses from the images [s * fresh, s * fresh + size): what it sees depends on the seed and s
  alone, so a run that was stopped goes on as if it had not been.
  """

  def __init__(
      self, seed: int, size: int, *, image_size: int = 128, fresh: int = 4, num_workers: int = 0):
    """Starts a pool of `size` images, with `fresh` new ones for each step.

    The images are drawn by `num_workers` processes; with 0, by this one.
    """
    if size < 1 or fresh < 0 or num_workers < 0:
      raise ValueError(
          f'pool.size={size}, fresh={fresh}, num_workers={num_workers}: expected at least 1, 0 and 0.')
    self._seed, self._fresh = seed, fresh
    self._images = np.zeros((size, image_size, image_size, 3), np.uint8)
    self._stream = self._next = None  # images in their order, and the index of the next
    self._ahead = 4 * num_workers  # chunks that may be under way
    self._workers = concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context('spawn'), _end_with_parent) if num_workers else None

  def close(self) -> None:
    if self._workers:
      self._workers.shutdown(cancel_futures=True)

  def batch(
      self, step: int, count: int, progress: Callable[[int, int], None] = lambda done, total: None
  ) -> np.ndarray:
    """Chooses the images of a step: [count, image_size, image_size, 3] uint8.

    Args:
      step: number of the step, at least that of the call before.
      count: at most `size`; no image twice.
      progress: told about (done, total) images while the first window is drawn.

    Raises:
      ValueError: a count larger than the pool.
    """
    size = len(self._images)
    if count > size:
      raise ValueError(f'batch_size={count}: expected at most pool.size={size}.')
    start = step * self._fresh
    self._advance(start, start + size, progress)
    rng = np.random.default_rng((self._seed, step, 1))
    return self._images[(start + rng.permutation(size)[:count]) % size]

  def _advance(self, start, stop, progress):
    """Draws the images up to `stop`, in place of the oldest."""
    if self._stream is None:
      self._stream, self._next = self._draw_from(start), start
    first, total = self._next, stop - self._next
    while self._next < stop:
      self._images[self._next % len(self._images)] = next(self._stream)
      self._next += 1
      progress(self._next - first, total)

  def _draw_from(self, start):
    """Yields images in their order, which the workers draw ahead."""
    size, pending = self._images.shape[1], collections.deque()
    for first in itertools.count(start, _CHUNK):
      if self._workers is None:
        yield from _draw(self._seed, first, size)
        continue
      pending.append(self._workers.submit(_draw, self._seed, first, size))
      if len(pending) > self._ahead:
        yield from pending.popleft().result()


def _end_with_parent():
  """Ends a worker with its parent; else it would outlive a training that is killed, waiting for work."""
  parent = multiprocessing.parent_process()

  def watch():
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _draw(seed, first, size):
  return [procedural.draw(seed, i, size) for i in range(first, first + _CHUNK)]
