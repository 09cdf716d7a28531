"""Functions that run in several threads: in order, and ended together."""

import concurrent.futures
import threading
import time

import pytest

from patchcore_jax import parallel


def test_several_run_at_the_same_time_and_results_keep_their_order():
  both = threading.Barrier(2, timeout=30)

  def function(stopped, item):
    both.wait()  # which one alone would never pass
    time.sleep(0.02 * (item % 2 == 0))
    return item

  assert list(parallel.in_threads(function, range(6), 2)) == list(range(6))


@pytest.mark.parametrize('how', ['error', 'caller'])
def test_what_is_not_wanted_any_more_ends(how):
  begun, ended = [], []

  def function(stopped, item):
    begun.append(item)
    if item == 0:
      while how == 'error' and len(begun) < 2:
        time.sleep(0.001)
      if how == 'error':
        raise OSError('no room')
      return item
    try:
      while True:
        stopped()
        time.sleep(0.001)
    except concurrent.futures.CancelledError:
      ended.append(item)
      raise

  results = parallel.in_threads(function, range(9), 2)
  if how == 'error':
    with pytest.raises(OSError, match='no room'):
      next(results)
  else:
    assert next(results) == 0
    results.close()
  assert ended and set(begun) == {0, *ended} and len(begun) < 9
