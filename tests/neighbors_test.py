"""Nearest neighbours against NumPy in float64."""

import functools

import jax
import numpy as np
import pytest

from patchcore_jax import neighbors
from tests import precision


def _data(q=100, m=300, d=32, offset=0.0):
  rng = np.random.default_rng(0)
  return (rng.standard_normal((q, d)).astype(np.float32) + np.float32(offset),
          rng.standard_normal((m, d)).astype(np.float32) + np.float32(offset))


def _oracle(queries, bank, k):
  distances_sq = ((queries[:, None].astype(np.float64) - bank[None]) ** 2).sum(-1)
  indices = np.argsort(distances_sq, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(distances_sq, indices, 1), indices


class TestNearestNeighbors:

  @pytest.mark.parametrize('k', [1, 3, 9])
  @pytest.mark.parametrize('blocks', [(1024, 4096), (32, 64), (100, 300), (7, 11), (1, 1)])
  def test_equals_float64(self, k, blocks):
    queries, bank = _data()
    distances_sq, indices = jax.jit(
        neighbors.nearest_neighbors, static_argnames=('k', 'query_block', 'bank_block'))(
            queries, bank, k=k, query_block=blocks[0], bank_block=blocks[1])
    expected, expected_indices = _oracle(queries, bank, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances_sq, expected, rtol=1e-6)

  def test_small_distances_far_from_the_origin(self):
    # |a|^2 is 32,000 here: |a|^2 + |b|^2 - 2ab would lose distances of 1e-3 in float32.
    _, bank = _data(offset=1000.0)
    queries = bank[:50] + np.float32(0.01)
    distances_sq, indices = neighbors.nearest_neighbors(queries, bank)
    expected, expected_indices = _oracle(queries, bank, 1)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances_sq, expected, rtol=1e-6)

  def test_a_row_of_the_bank_is_at_zero(self):
    _, bank = _data()
    distances_sq, indices = neighbors.nearest_neighbors(bank, bank)
    assert not np.asarray(distances_sq).any()
    np.testing.assert_array_equal(indices[:, 0], np.arange(len(bank)))

  @pytest.mark.parametrize('k', [1, 2])
  def test_ties_go_to_the_lowest_index(self, k):
    bank = np.zeros((10, 4), np.float32)
    indices = neighbors.nearest_neighbors(np.ones((3, 4), np.float32), bank, k=k, bank_block=3)[1]
    np.testing.assert_array_equal(indices, np.tile(np.arange(k), (3, 1)))

  @pytest.mark.parametrize('k', [1, 3])
  def test_products_ask_for_the_highest_precision(self, k):
    precision.assert_highest(
        functools.partial(neighbors.nearest_neighbors, k=k, query_block=32, bank_block=64), *_data())

  @pytest.mark.parametrize('queries, bank, k, words', [
      ((3, 4), (5, 6), 1, 'Expected queries'), ((3,), (5, 3), 1, 'Expected queries'),
      ((3, 4), (5, 4), 6, '6 neighbours .* banks of .5. patches'), ((3, 4), (5, 4), 0, 'neighbours')])
  def test_errors(self, queries, bank, k, words):
    with pytest.raises(ValueError, match=words):
      neighbors.nearest_neighbors(np.zeros(queries), np.zeros(bank), k=k)


class TestNestedNearestNeighbors:

  @pytest.mark.parametrize('k', [1, 4])
  def test_equals_a_search_in_each_prefix(self, k):
    queries, bank = _data()
    sizes = (300, 4, 77, 128)
    found = neighbors.nested_nearest_neighbors(queries, bank, sizes, k=k, bank_block=50)
    for size, (distances_sq, indices) in zip(sizes, found):
      expected, expected_indices = _oracle(queries, bank[:size], k)
      np.testing.assert_array_equal(indices, expected_indices)
      np.testing.assert_allclose(distances_sq, expected, rtol=1e-6)
