"""Collects the items of concurrent requests into batches for one thread.

A batch is what has come while the one before was running, so that a busy service runs full batches and an
idle one answers a lone item after a few milliseconds.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class BatchError(Exception):
  """The batch that an item was in failed; the cause is what was raised."""


class Batcher:
  """Runs `score` on up to `batch_size` items at a time, in one thread of its own.

  It is made, used and closed in one event loop. It takes whatever is submitted: how many items may wait is
  for the caller to say, who knows what each costs.

  Args:
    score: a function of a list of 1 to `batch_size` items that returns as many results, in their order. It is
      never called twice at a time.
    batch_size: the most items of a batch.
    wait_seconds: how long a batch that is not full waits for more.
  """

  def __init__(
      self, score: Callable[[list[Any]], Sequence[Any]], *, batch_size: int, wait_seconds: float):
    if batch_size < 1 or wait_seconds < 0:
      raise ValueError(
          f'batch_size={batch_size}, wait_seconds={wait_seconds}: expected at least 1 and 0.')
    self._score, self._batch_size, self._wait_seconds = score, batch_size, wait_seconds
    self._queue: asyncio.Queue = asyncio.Queue()
    self._thread = ThreadPoolExecutor(1, 'scorer')
    self._closed = False
    self._task = asyncio.create_task(self._run())

  @property
  def waiting(self) -> int:
    """Items that are in no batch yet."""
    return self._queue.qsize()

  async def submit(self, item: Any) -> Any:
    """Submits one item, and waits for its result.

    Raises:
      BatchError: its batch failed. The items of other batches are not affected.
      RuntimeError: the batcher is closed.
    """
    if self._closed:
      raise RuntimeError('The batcher is closed: nothing can be submitted any more.')
    future = asyncio.get_running_loop().create_future()
    self._queue.put_nowait((item, future))
    return await future

  async def run(self, function: Callable[[], Any]) -> Any:
    """Calls a function in the thread of the batches, between two of them, and waits for its result."""
    return await asyncio.get_running_loop().run_in_executor(self._thread, function)

  async def close(self, *, wait: bool = True) -> None:
    """Finishes what was submitted, and ends the thread, which is waited for if `wait` says so."""
    if not self._closed:
      self._closed = True
      self._queue.put_nowait(None)
    await self._task
    self._thread.shutdown(wait)

  async def _run(self):
    """Scores one batch after another, until the batcher is closed."""
    more = True
    while more:
      batch, more = await self._next_batch()
      batch = [entry for entry in batch if not entry[1].done()]  # done: nobody waits for it any more
      if not batch:
        continue
      items, futures = zip(*batch)
      try:
        results = await self.run(lambda items=items: self._score(list(items)))
        if len(results) != len(items):
          raise ValueError(f'{len(results)} results for {len(items)} items')
      except Exception as e:
        for future in futures:
          if not future.done():
            error = BatchError(f'{type(e).__name__}: {e}')
            error.__cause__ = e
            future.set_exception(error)
        continue
      for future, result in zip(futures, results):
        if not future.done():
          future.set_result(result)

  async def _next_batch(self):
    """Collects the entries of the next batch; tells, too, whether more may come."""
    entries = [await self._queue.get()]
    deadline = asyncio.get_running_loop().time() + self._wait_seconds
    while entries[-1] is not None and len(entries) < self._batch_size:
      try:
        # What lies in the queue already is taken even past the deadline.
        async with asyncio.timeout_at(deadline):
          entries.append(await self._queue.get())
      except TimeoutError:
        break
    return [entry for entry in entries if entry is not None], entries[-1] is not None
