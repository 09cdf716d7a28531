"""Shortlists by slots, on a CPU, against sorting all distances."""

import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.search import slots

pytestmark = pytest.mark.as_shipped


def _shortlist(queries, rows, length, dtype='float32', count=None):
  queries, columns = jnp.asarray(queries, dtype), jnp.asarray(rows.T, dtype)
  squares = jnp.square(columns.astype(jnp.float32)).sum(axis=0)
  if count is not None:
    squares = jnp.where(jnp.arange(len(rows)) < count, squares, jnp.inf)
  return [np.asarray(x) for x in slots.shortlist(
      queries, jnp.square(queries.astype(jnp.float32)).sum(axis=1), columns, squares, length)]


def _points(n, dim, seed):
  return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


class TestShortlist:

  # Fewer columns than a tile, a whole one, and a last that reaches back; fewer rows than a block, and more.
  @pytest.mark.parametrize('m', [20, slots.WIDTH, 2 * slots.WIDTH + 7])
  @pytest.mark.parametrize('q', [3, slots.ROWS + 5])
  def test_lists_the_nearest_and_bounds_the_rest(self, q, m):
    queries, rows = _points(q, 5, 0), _points(m, 5, 1)
    found, column, outside = _shortlist(queries, rows, 8)
    exact = np.square(queries[:, None].astype(np.float64) - rows).sum(axis=2)
    listed = np.take_along_axis(exact, column, axis=1)
    assert (np.diff(found) >= 0).all()
    np.testing.assert_array_equal([len(set(row)) for row in column], 8)
    assert (found <= listed * (1 + 1e-4) + 1e-4).all()
    assert (found >= listed * (1 - 2.0**-13) - 1e-4).all()  # rounded down, by the bits that number groups
    np.put_along_axis(exact, column, np.inf, axis=1)
    assert (outside <= exact.min(axis=1) + 1e-4).all()

  def test_finds_the_nearest_among_many_in_one_slot(self):
    rows = _points(3 * slots.WIDTH, 4, 2) + 100
    near = np.arange(5) * slots.SLOTS + 3  # all in slot 3
    rows[near] = np.arange(1, 6)[:, None]
    found, column, outside = _shortlist(np.zeros((1, 4), np.float32), rows, 4)
    assert column[0, :2].tolist() == near[:2].tolist()
    assert outside[0] <= 4 * 3**2  # the third of the slot is not listed, and bounds what is not

  def test_columns_that_do_not_count(self):
    queries, rows = _points(4, 3, 0), _points(700, 3, 1)
    found, column, outside = _shortlist(queries, rows, 4, count=2)
    assert (np.sort(column[:, :2]) == [0, 1]).all()
    assert np.isinf(found[:, 2:]).all() and np.isinf(outside).all()

  def test_bfloat16(self):
    rows = np.round(4 * _points(600, 6, 1))  # whole numbers, which bfloat16 has
    found, column, _ = _shortlist(rows[:50], rows, 1, 'bfloat16')
    assert (found == 0).all()
    np.testing.assert_array_equal(rows[column[:, 0]], rows[:50])


def test_the_fastest_type_is_measured_where_the_cpu_may_have_another(monkeypatch):
  monkeypatch.setattr(slots, '_may_be_fast', lambda: False)
  assert slots.fastest_dtype.__wrapped__() == 'float32'
  monkeypatch.setattr(slots, '_may_be_fast', lambda: True)
  assert 0 < slots.product_seconds() < 1e-6
  monkeypatch.setattr(slots, '_WORTHWHILE', 0)
  assert slots.fastest_dtype.__wrapped__() == 'bfloat16'
  monkeypatch.setattr(slots, '_WORTHWHILE', np.inf)
  assert slots.fastest_dtype.__wrapped__() == 'float32'
