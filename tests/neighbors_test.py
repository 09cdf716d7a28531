"""Nearest neighbours against NumPy in float64."""

import functools

import jax
import numpy as np
import pytest

from patchcore_jax.search import distances, neighbors, neighbors_gpu, search_bank
from patchcore_jax.settings import SearchSpec
from tests import precision

pytestmark = [pytest.mark.accelerator, pytest.mark.as_shipped]


def _data(q=100, m=300, d=32, offset=0.0):
  rng = np.random.default_rng(0)
  return (rng.standard_normal((q, d)).astype(np.float32) + np.float32(offset),
          rng.standard_normal((m, d)).astype(np.float32) + np.float32(offset))


def _low_rank(q=80, m=500, d=256, rank=20):
  """Vectors that lie near a subspace, as those of a pretrained network do: searches reduce them."""
  rng = np.random.default_rng(1)
  rows = rng.standard_normal((q + m, rank)) @ rng.standard_normal((rank, d)) / 4
  rows = (rows + 0.05 * rng.standard_normal(rows.shape) + 2).astype(np.float32)
  return rows[:q], rows[q:]


def _crowded():
  """The true neighbour is one of 400 that no product can tell apart: every query is in doubt."""
  queries, bank = _low_rank()
  rng = np.random.default_rng(2)
  crowd = bank[:1] + np.float32(1e-5) * rng.standard_normal((400, 256), np.float32)
  return (np.concatenate([queries[:20], crowd[:20] + np.float32(1e-3)]),
          rng.permutation(np.concatenate([bank, crowd])))


def _oracle(queries, bank, k):
  distances_sq = ((queries[:, None].astype(np.float64) - bank[None]) ** 2).sum(-1)
  indices = np.argsort(distances_sq, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(distances_sq, indices, 1), indices


def _by_definition(queries, bank, k):
  """In float32, every distance by `distances_sq`; ties by the lowest index."""
  values = np.asarray(jax.vmap(lambda q: distances.distances_sq(bank, q, axis=-1))(queries))
  indices = np.argsort(values, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(values, indices, 1), indices


class TestNearestNeighbors:

  @pytest.mark.slow_for('blocks1', 'blocks2', '3')
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

  def test_equals_a_search_in_each_prefix_of_a_prepared_bank(self):
    queries, bank = _low_rank()
    sizes = (500, 9, 130)
    prepared = search_bank.prepare(bank, 'bfloat16')
    for size, found in zip(sizes, neighbors.nested_nearest_neighbors(queries, prepared, sizes, k=2)):
      for value, expected in zip(found, _by_definition(queries, bank[:size], 2)):
        np.testing.assert_array_equal(value, expected)


class TestPrepare:

  @pytest.mark.slow_for('5')
  @pytest.mark.parametrize('shortlist', ['float32', 'bfloat16'])
  @pytest.mark.parametrize('k', [1, 5])
  @pytest.mark.parametrize('data', [_data, _low_rank])
  def test_the_result_is_that_of_the_bank_as_it_is(self, data, k, shortlist):
    queries, bank = data()
    found = neighbors.nearest_neighbors(queries, search_bank.prepare(bank, shortlist), k=k)
    for value, expected in zip(found, _by_definition(queries, bank, k)):
      np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(found[1], _oracle(queries, bank, k)[1])

  @pytest.mark.parametrize('k, shortlist', [(1, 'float32'), (1, 'bfloat16'), (5, 'bfloat16')])
  def test_rows_closer_than_the_rounding(self, k, shortlist):
    queries, bank = _crowded()
    found = neighbors.nearest_neighbors(queries, search_bank.prepare(bank, shortlist), k=k)
    for value, expected in zip(found, _by_definition(queries, bank, k)):
      np.testing.assert_array_equal(value, expected)

  def test_columns_are_never_farther_apart_than_rows(self):
    _, bank = _low_rank()
    for shortlist in ('float32', 'bfloat16'):
      prepared = search_bank.prepare(bank, shortlist)
      assert prepared.columns.shape == (64, 500)
      columns = np.asarray(prepared.columns, np.float64).T
      reduced = np.linalg.norm(columns[:, None] - columns, axis=-1)
      true = np.linalg.norm(bank[:, None].astype(np.float64) - bank, axis=-1)
      assert (reduced <= true + 2 * prepared.slack).all()
      assert np.median(reduced[true > 0] / true[true > 0]) > 0.95  # or else it would be of no use

  def test_a_search_takes_little_beside_the_bank(self):
    m, dim, reduced = 500_000, 256, 64  # reduced: queries in doubt are compared with the rows themselves
    shapes = search_bank.SearchBank(
        (m, dim), (reduced, m), (m,), (), (dim,), (dim, reduced - 1), ())
    bank = search_bank.SearchBank(*(jax.ShapeDtypeStruct(s, np.float32) for s in shapes))
    bank = bank._replace(count=jax.ShapeDtypeStruct((), np.int32))
    queries = jax.ShapeDtypeStruct((64, dim), np.float32)
    memory = jax.jit(neighbors.nearest_neighbors).lower(queries, bank).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * 4 * m * dim

  def test_what_has_no_main_axes_is_not_reduced(self):
    assert search_bank.prepare(_data()[1]).basis is None

  def test_shards_hold_rows_in_turn(self):
    _, bank = _low_rank()
    prepared = search_bank.prepare(bank, num_shards=3)
    assert prepared.rows.shape == (3, 167, 256) and prepared.columns.shape == (3, 64, 167)
    assert prepared.count.tolist() == [167, 167, 166]
    np.testing.assert_array_equal(prepared.rows.swapaxes(0, 1).reshape(-1, 256)[:500], bank)

  def test_errors(self):
    with pytest.raises(ValueError, match="shortlist='float16': expected 'auto'"):
      search_bank.prepare(np.zeros((3, 2), np.float32), 'float16')
    with pytest.raises(ValueError, match=r'a bank \[m, d\], got \(3,\)'):
      search_bank.prepare(np.zeros(3, np.float32))

  @pytest.mark.parametrize('shortlist', ['float32', 'bfloat16'])
  def test_products_ask_for_the_highest_precision(self, shortlist):
    queries, bank = _low_rank()
    precision.assert_highest(neighbors.nearest_neighbors, queries, search_bank.prepare(bank, shortlist))


def _by_kernel(queries, bank, sizes, k):
  """A search as on an NVIDIA GPU, interpreted."""
  kernel = functools.partial(neighbors_gpu.shortlist, interpret=True)
  return jax.jit(functools.partial(
      neighbors._in_stages, sizes=sizes, k=k, blocks=(64, 128), kernel=kernel))(queries, bank)


class TestKernel:

  @pytest.mark.parametrize('data, shortlist, k', [(_data, 'float32', 5), (_low_rank, 'bfloat16', 1)])
  def test_equals_the_plain_search(self, data, shortlist, k):
    queries, bank = data()
    sizes = (90, len(bank))
    for size, found in zip(sizes, _by_kernel(queries, _on_device(bank, shortlist), sizes, k)):
      for value, expected in zip(found, neighbors.nearest_neighbors(queries, bank[:size], k=k)):
        np.testing.assert_array_equal(value, expected)

  def test_queries_that_no_list_settles(self):
    queries, bank = _crowded()
    (found,) = _by_kernel(queries, _on_device(bank, 'bfloat16'), (len(bank),), 1)
    for value, expected in zip(found, _by_definition(queries, bank, 1)):
      np.testing.assert_array_equal(value, expected)

  @pytest.mark.parametrize('dtype, q, m, length', [('bfloat16', 300, 3000, 8), ('float32', 100, 50, 16)])
  def test_lists_what_is_near_and_bounds_the_rest(self, dtype, q, m, length):
    rng = np.random.default_rng(0)
    queries, columns = (jax.numpy.asarray(rng.standard_normal(shape), dtype) for shape in ((q, 70), (70, m)))
    a, b = (np.asarray(x, np.float64) for x in (queries, columns))
    squares = jax.numpy.where(np.arange(m) < m - 7, (b**2).sum(0), np.inf)  # the last ones do not count
    found, at, outside = neighbors_gpu.shortlist(
        queries, (a**2).sum(1), columns, squares, length, interpret=True)
    true = (a**2).sum(1)[:, None] + np.asarray(squares) - 2 * a @ b
    listed = np.take_along_axis(true, np.asarray(at), 1)
    np.testing.assert_allclose(found, listed, rtol=1e-3)
    assert (found <= listed * (1 + 1e-5)).all()  # rounded down
    np.put_along_axis(true, np.asarray(at), np.inf, 1)
    assert (outside <= true.min(1) * (1 + 1e-5)).all()
    assert np.median(outside / true.min(1)) > 0.99  # or else it would be of no use


def _on_device(bank, shortlist):
  return jax.tree.map(jax.numpy.asarray, search_bank.prepare(bank, shortlist))


class TestInOnePass:

  def test_the_nearest_without_a_loop(self):
    rng = np.random.default_rng(3)
    bank = rng.standard_normal((700, 40)).astype(np.float32)
    queries = np.concatenate([bank[5:9], rng.standard_normal((50, 40)).astype(np.float32)])

    def search(queries):
      return neighbors.nested_nearest_neighbors(queries, search_bank.in_one_pass(bank), (700, 90), k=3)

    for got, size in zip(search(queries), (700, 90)):
      want = neighbors.nearest_neighbors(queries, bank[:size], k=3)
      np.testing.assert_array_equal(got[0], want[0])
      np.testing.assert_array_equal(got[1], want[1])
    jaxpr = str(jax.make_jaxpr(search)(queries))
    assert 'while' not in jaxpr and 'scan' not in jaxpr

  def test_a_bank_smaller_than_the_shortlist(self):
    bank = np.eye(3, dtype=np.float32)
    distances_sq, indices = neighbors.nearest_neighbors(bank[::-1], search_bank.in_one_pass(bank), k=2)
    np.testing.assert_array_equal(indices, [[2, 0], [1, 0], [0, 1]])
    np.testing.assert_array_equal(distances_sq, [[0, 2]] * 3)


class TestSearchSpec:

  def test_errors(self):
    for field, values in (('shortlist', 'float64'), ('bank', 'split')):
      with pytest.raises(ValueError, match=f"search.{field}='{values}': expected '.*' or '.*'"):
        SearchSpec(**{field: values})


def test_merge_and_take_by_hand():
  values, indices = neighbors.merge_nearest(
      np.array([[3., 1., 2., 1.]]), np.array([[0, 7, 5, 2]]), 3)
  assert values.tolist() == [[1, 1, 2]] and indices.tolist() == [[2, 7, 5]]
  bank = np.arange(6., dtype=np.float32).reshape(3, 2)
  assert neighbors.bank_rows(search_bank.prepare(bank), np.array([[2], [0]])).tolist() == [[[4, 5]], [[0, 1]]]
