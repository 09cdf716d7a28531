"""Greedy k-center against a float64 loop. `parity_test` replays the originals' selections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.search import coreset, k_center, k_center_gpu, slots
from tests import precision

pytestmark = [pytest.mark.accelerator, pytest.mark.as_shipped]


def _points(n=300, d=8, seed=0):  # more than a block of lanes, and not a multiple
  return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def _oracle(points, num_selected, start):
  points = points.astype(np.float64)
  distance = np.mean([np.linalg.norm(points - points[s], axis=1) for s in start], axis=0)
  picks = []
  for _ in range(num_selected):
    picks.append(int(np.argmax(distance)))
    distance = np.minimum(distance, np.linalg.norm(points - points[picks[-1]], axis=1))
    distance[picks] = -1
  return picks


class TestGreedyKCenter:

  def test_by_hand(self):
    points = np.array([[0], [1], [2], [10]], np.float32)
    # mean distances to {0, 3}: 5, 5, 5, 5; the tie goes to 0, then 10 is farthest, then 2.
    assert coreset.greedy_k_center(points, 3, start=[0, 3]).tolist() == [0, 3, 2]

  @pytest.mark.parametrize('start', [[0], [3, 17, 60]])
  def test_equals_a_float64_loop(self, start):
    points = _points()
    assert coreset.greedy_k_center(points, 50, start=start).tolist() == _oracle(points, 50, start)

  def test_a_longer_run_begins_with_the_shorter(self):
    points = _points()
    longer = coreset.greedy_k_center(points, 80, start=[1, 2])
    assert longer[:20].tolist() == coreset.greedy_k_center(points, 20, start=[1, 2]).tolist()

  def test_all_points_and_no_repeats_when_all_are_covered(self, caplog):
    points = np.tile(_points(6, 2), (4, 1))
    coreset.greedy_k_center(points, 6, start=[0, 3])
    assert 'coincide' not in caplog.text
    picks = coreset.greedy_k_center(points, 24, start=[0, 3]).tolist()
    assert '18 of 24 selected points coincide with others' in caplog.text
    assert sorted(picks) == list(range(24))
    assert len({tuple(points[i]) for i in picks[:6]}) == 6  # the distinct ones first
    assert picks[6:] == sorted(picks[6:])

  @pytest.mark.parametrize('dense_below', [0, 1e10])
  def test_progress(self, monkeypatch, dense_below):
    monkeypatch.setattr(coreset, 'DENSE_BELOW', dense_below)
    calls = []
    coreset.greedy_k_center(
        _points(), 150, start=[0], progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(set(calls)) and calls[-1] == (150, 150)

  def test_the_starting_point_can_be_the_first_selected(self):
    points = np.array([[0], [1], [5], [9]], np.float32)
    picks = coreset.greedy_k_center(points, 4, start=[1], select_start=True)
    assert picks.tolist() == [1, 3, 2, 0]
    with pytest.raises(ValueError, match='single starting point'):
      coreset.greedy_k_center(points, 2, start=[0, 1], select_start=True)

  @pytest.mark.parametrize('size, start, words', [
      (0, [0], 'num_selected'), (301, [0], 'num_selected'), (5, [], 'start'), (5, [300], 'start'),
      (5, [-1], 'start')])
  def test_errors(self, size, start, words):
    with pytest.raises(ValueError, match=words):
      coreset.greedy_k_center(_points(), size, start=start)

  def test_nan_is_an_error(self):
    points = _points()
    points[7, 3] = np.nan
    with pytest.raises(ValueError, match='NaN'):
      coreset.greedy_k_center(points, 5, start=[0])


def _clustered(n=1200, d=16, seed=0):
  rng = np.random.default_rng(seed)
  centers = 10 * rng.standard_normal((20, d))
  return (centers[rng.integers(20, size=n)] + rng.standard_normal((n, d))).astype(np.float32)


def _in_16(points):
  """Adds coordinates that are 0, which makes one program do for all clouds."""
  return np.pad(points, ((0, 0), (0, 16 - points.shape[1]))).astype(np.float32)


# What the lazy loop could get wrong: few and many rounds, distances that tie or nearly so, products
# that cancel, points that coincide.
_CLOUDS = {
    'normal': _points(1200, 16),
    'clusters': _clustered(),
    'far from the origin': _clustered() + np.float32(1000),
    'grid': _in_16(np.random.default_rng(0).integers(0, 4, (1200, 5))),
    'three values': _in_16(np.random.default_rng(0).integers(0, 3, (1200, 1))),
    'doubled': _in_16(np.tile(_points(400, 7), (3, 1))),
    'all equal': _in_16(np.ones((1200, 3))),
    'a wide range': (_points(1200, 16) * 10.0 ** _points(1200, 1, seed=1)).astype(np.float32),
}


@pytest.fixture
def small_sizes(monkeypatch):
  """A small window and small tiles, which make many rounds of a small cloud; for `k_center.PLAIN`: kernels
  have sizes of their own, and would read past so little padding."""
  def compile_anew():
    k_center.lazy_round.cache_clear()
    jax.clear_caches()

  for module, name, value in (
      (k_center, '_WINDOW', 32), (k_center, 'PADDING', 16),
      (slots, 'ROWS', 64), (slots, 'WIDTH', 16), (slots, 'SLOTS', 4)):
    monkeypatch.setattr(module, name, value)
  compile_anew()
  yield
  compile_anew()


@functools.cache
def _kernels():
  options = {'sizes': k_center_gpu.Sizes(16, 16, 32, (8, 8)), 'interpret': True}
  refresh, select = (functools.partial(f, **options) for f in (k_center_gpu.refresh, k_center_gpu.select))
  return k_center.Steps(refresh, select, 32)


@functools.cache
def _dense(cloud, select_start):
  points = _CLOUDS[cloud]
  return coreset.dense_greedy_k_center(
      points, len(points), start=[3] if select_start else [0, 5, 77], select_start=select_start)


@pytest.fixture
def lazy(monkeypatch):
  """Without the dense loop, which small selections get."""
  monkeypatch.setattr(coreset, 'DENSE_BELOW', 0)


@pytest.mark.usefixtures('lazy')
class TestLazyEqualsDense:

  @pytest.mark.parametrize('steps, stream', [
      (k_center.PLAIN, False), (k_center.PLAIN, True), (k_center.BFLOAT16, False)],
      ids=['float32', 'stream', 'bfloat16'])
  def test_in_many_rounds(self, small_sizes, steps, stream):
    for cloud, points in _CLOUDS.items():
      np.testing.assert_array_equal(
          coreset.greedy_k_center(points, len(points), start=[0, 5, 77], stream=stream, steps=steps),
          _dense(cloud, select_start=False), err_msg=cloud)

  @pytest.mark.parametrize('cloud', ['clusters', 'grid'])
  def test_in_rounds_of_the_usual_size(self, cloud):
    points = _CLOUDS[cloud]
    np.testing.assert_array_equal(
        coreset.greedy_k_center(points, len(points), start=[3], select_start=True),
        _dense(cloud, select_start=True))

  @pytest.mark.parametrize('stream', [False, True])
  def test_rows_that_are_no_points(self, small_sizes, stream):
    points = _points(900)
    valid = np.random.default_rng(1).random(900) < 0.7
    rows = np.where(valid[:, None], points, 1e3)  # far from all: they would be picked first
    place = np.flatnonzero(valid)
    picks = coreset.greedy_k_center(
        rows, 200, start=place[[5, 9]], valid=valid, stream=stream, steps=k_center.PLAIN)
    expected = coreset.dense_greedy_k_center(points[valid], 200, start=[5, 9])
    assert picks.tolist() == place[expected].tolist()
    with pytest.raises(ValueError, match='only .* of 900 points are valid'):
      coreset.greedy_k_center(rows, 900, start=place[:1], valid=valid)

  def test_goes_on_from_a_state(self):
    points, states = _clustered(3000), []
    whole = coreset.greedy_k_center(
        points, 1500, start=[0],
        checkpoint=lambda state: states.append(jax.tree.map(np.array, state)))
    assert len(states) > 10
    for state in states[::4]:
      for stream in (False, True):
        rest = coreset.greedy_k_center(points, 1500, start=[0], resume=state, stream=stream)
        np.testing.assert_array_equal(rest, whole)
    with pytest.raises(ValueError, match='resume: the state is of 3000 points and 1500 selected'):
      coreset.greedy_k_center(points, 1000, start=[0], resume=states[0])

  def test_streams_from_a_memory_map(self, tmp_path):
    points = _clustered(3000)
    np.save(tmp_path / 'points.npy', points)
    mapped = np.load(tmp_path / 'points.npy', mmap_mode='r')
    np.testing.assert_array_equal(
        coreset.greedy_k_center(mapped, 300, start=[1], stream=True),
        coreset.greedy_k_center(points, 300, start=[1]))

  def test_by_kernels(self):
    # Interpreted, on a CPU. All of one shape, so that they are compiled once; 11 is no power of two.
    for cloud in ('normal', 'grid', 'doubled', 'all equal', 'a wide range'):
      points = np.resize(_CLOUDS[cloud], (300, 11))
      found = coreset.greedy_k_center(points, 300, start=[0, 5, 77], steps=_kernels())
      expected = coreset.dense_greedy_k_center(points, 300, start=[0, 5, 77])
      np.testing.assert_array_equal(found, expected, err_msg=cloud)
    valid = np.random.default_rng(1).random(300) < 0.8
    start = [np.flatnonzero(valid)[3]]
    found, streamed, expected = (
        coreset.greedy_k_center(
            points, 200, start=start, select_start=True, valid=valid, stream=stream, steps=steps)
        for steps, stream in ((_kernels(), False), (_kernels(), True), (k_center.PLAIN, False)))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(streamed, expected)

  def test_products_ask_for_the_highest_precision(self):
    def refresh(rows, values, first, centers, count, mean):
      columns = k_center.columns_of(centers, mean, count, 'float32')
      return k_center.refresh(rows, values, first, centers, columns, count, mean)

    precision.assert_highest(
        refresh, np.zeros((64, 8), np.float32), np.zeros(64, np.float32),
        0, np.zeros((5 + k_center.PADDING, 8), np.float32), 5, np.zeros(8, np.float32))


class TestRandomProjection:

  def test_keeps_distances(self):
    points = _points(100, 512)
    projected = np.asarray(coreset.random_projection(points, 128, key=jax.random.key(0)))
    i, j = np.triu_indices(100, 1)
    ratio = (np.linalg.norm(projected[i] - projected[j], axis=1)
             / np.linalg.norm(points[i] - points[j], axis=1))
    assert ratio.std() / ratio.mean() < 0.09  # 1 / sqrt(2 * 128) = 0.0625 for a dense projection

  def test_blocks_do_not_change_the_result(self, monkeypatch):
    points, key = _points(100, 32), jax.random.key(1)
    whole = coreset.random_projection(points, 16, key=key)
    monkeypatch.setattr(coreset, '_BLOCK', 33)
    np.testing.assert_allclose(
        coreset.random_projection(points, 16, key=key), whole, rtol=0, atol=1e-6)

  def test_left_out_at_the_same_size(self):
    points = _points(10, 16)
    np.testing.assert_array_equal(
        coreset.random_projection(points, 16, key=jax.random.key(0)), points)


  def test_sparse(self):
    matrix = np.asarray(coreset.projection_matrix(jax.random.key(0), 1024, 200, 'sparse'))
    assert (matrix != 0).mean() == pytest.approx(1 / 32, rel=0.05)
    np.testing.assert_allclose(np.abs(matrix[matrix != 0]), (32 / 200) ** 0.5, rtol=1e-6)
    points = _points(100, 1024)
    projected = np.asarray(coreset.random_projection(
        points, 200, key=jax.random.key(0), kind='sparse'))
    ratio = np.linalg.norm(np.diff(projected, axis=0), axis=1) / np.linalg.norm(
        np.diff(points, axis=0), axis=1)
    assert ratio.mean() == pytest.approx(1, abs=0.05) and ratio.std() < 0.1

  @pytest.mark.parametrize('num_points, dim', [(300, 140), (2000, 187), (3000, 197), (5000, 210)])
  def test_dimension_of_the_bound(self, num_points, dim):
    assert coreset.johnson_lindenstrauss_dim(num_points) == dim  # anomalib's, through scikit-learn

  def test_products_ask_for_the_highest_precision(self):
    precision.assert_highest(coreset._product, _points(), np.zeros((8, 4), np.float32))


class TestCoresetSize:

  @pytest.mark.parametrize('ratio', [0, -0.1, 1.1, float('nan')])
  def test_ratio_outside(self, ratio):
    with pytest.raises(ValueError, match='0 < ratio <= 1'):
      coreset.coreset_size(100, ratio)

  def test_keeps_nothing(self):
    with pytest.raises(ValueError, match='keeps none of 100 patches: expected at least 0.01'):
      coreset.coreset_size(100, 0.005)

  def test_all(self):
    assert coreset.coreset_size(100, 1) == 100


def test_points_on_the_device_are_accepted():
  assert coreset.greedy_k_center(jnp.asarray(_points()), 1, start=[0]).shape == (1,)
