"""The most anomalous region of a map."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.cluster import DBSCAN

from patchcore_jax.inspection import regions


def _smooth(seed, shape=(40, 60)):
  return ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 3)


class TestMostAnomalous:

  def test_by_hand(self):
    values = np.zeros((6, 8))
    values[1, 1:4] = 5, 9, 5  # the peak's
    values[2, 4] = 5  # touches it at a corner
    values[4:, 5:] = 8  # larger, but not the peak's
    found = regions.most_anomalous(values, threshold=5)
    assert found.box == (1, 1, 5, 3) and found.level == 5
    assert found.centroid == ((1 + 2 + 3 + 4) / 4, (1 + 1 + 1 + 2) / 4)

  def test_below_the_threshold_half_the_peak_counts(self):
    values = np.full((5, 30), 2.0)
    values[2, 10:15] = 2.9, 3, 4, 3.1, 2.9
    for threshold in (None, 4.5):
      found = regions.most_anomalous(values, threshold)
      assert found.box == (11, 2, 14, 3) and found.level == 3
    assert regions.most_anomalous(values, 3.5).box == (12, 2, 13, 3)

  def test_a_peak_on_the_threshold_is_anomalous(self):
    values = np.zeros((3, 3))
    values[1, 1] = 2
    assert regions.most_anomalous(values, 2.0) == ((1, 1, 2, 2), (1, 1), 2)

  def test_a_flat_map_is_one_region(self):
    for value in (0.1, 0.0, 1e30):
      assert regions.most_anomalous(np.full((3, 4), value, np.float32))[:2] == ((0, 0, 4, 3), (1.5, 1))

  def test_nan_belongs_to_no_region(self):
    values = np.zeros((5, 5))
    values[2] = 1, 1, np.nan, 1, 2
    found = regions.most_anomalous(values, 1)
    assert found.box == (3, 2, 5, 3) and found.centroid == (3.5, 2)

  @pytest.mark.parametrize('seed', range(5))
  def test_is_the_cluster_around_the_peak(self, seed):
    """Against scikit-learn: density clusters of touching pixels are connected components."""
    values = _smooth(seed)
    threshold = np.quantile(values, 0.8)
    points = np.argwhere(values >= threshold)
    labels = DBSCAN(eps=1.5, min_samples=1).fit(points).labels_
    peak = np.argmax(values[points[:, 0], points[:, 1]])
    cluster = points[labels == labels[peak]]
    found = regions.most_anomalous(values, threshold)
    (top, left), (bottom, right) = cluster.min(axis=0), cluster.max(axis=0) + 1
    assert found.box == (left, top, right, bottom)
    np.testing.assert_allclose(found.centroid, cluster.mean(axis=0)[::-1])

  def test_moves_and_scales_with_the_map(self):
    values = np.pad(_smooth(7), 5)
    threshold = np.quantile(values, 0.9)
    one = regions.most_anomalous(values, threshold)
    moved = regions.most_anomalous(np.roll(values, (2, -3), (0, 1)) * 4, threshold * 4)
    assert moved.box == tuple(np.add(one.box, (-3, 2, -3, 2)))
    np.testing.assert_allclose(moved.centroid, np.add(one.centroid, (-3, 2)))

  @pytest.mark.parametrize('values', [np.zeros(4), np.full((2, 2), np.nan), np.zeros((0, 3))])
  def test_no_map(self, values):
    with pytest.raises(ValueError, match='expected \\[height, width\\] with a number'):
      regions.most_anomalous(values)
