"""MahalanobisAD against NumPy in float64, the shrinkage too."""

import numpy as np
import pytest

from patchcore_jax.detectors import MahalanobisAD
from tests import small


def _shrunk(values, share):
  """Ledoit and Wolf's (2004) estimate, or a given share: shrunk as far as S is uncertain beside its
  distance to the multiple of I."""
  n, d = values.shape
  x = values - values.mean(axis=0)
  s = x.T @ x / n
  target = np.trace(s) / d * np.eye(d)
  if share is None:
    distance = np.square(s - target).sum()
    spread = sum(np.square(np.outer(row, row) - s).sum() for row in x) / n**2
    share = min(spread, distance) / distance
  return (1 - share) * s + share * target


def _expected(n, share):
  total = 0
  for train, test in zip(small.maps(small.images(n)), small.maps(small.images(6, 7))):
    train, test = train.mean(axis=(1, 2)), test.mean(axis=(1, 2))
    z = test - train.mean(axis=0)
    total += np.sqrt(np.einsum('ni,ij,nj->n', z, np.linalg.inv(_shrunk(train, share)), z))
  return total


class TestFitAndScore:

  @pytest.mark.parametrize('n', [20, 5])  # more images than channels, fewer
  @pytest.mark.parametrize('shrinkage', [None, 0.3, 1.0])
  def test_equals_float64(self, n, shrinkage):
    detector = MahalanobisAD(shrinkage)
    value = small.predict(detector, small.fit(detector, small.images(n)), small.images(6, 7))
    # Features are right to 1e-7; the smallest standard deviation of a level is a few thousandths.
    np.testing.assert_allclose(value.image, _expected(n, shrinkage), rtol=1e-4)

  def test_the_mean_of_each_level_scores_nothing(self):
    images = np.concatenate([small.images(3)] * 2)
    model = small.fit(MahalanobisAD(), small.images(20))
    for layer, values in zip(small.LAYERS, small.maps(images[:1])):
      model.arrays[f'mean_{layer}'][:] = values.mean(axis=(0, 1, 2))
    value = small.predict(MahalanobisAD(), model, images)
    np.testing.assert_allclose(value.image[[0, 3]], 0, atol=1e-4)
    assert (value.image[[1, 2]] > 1).all()

  def test_errors(self):
    with pytest.raises(ValueError, match='two images or more for a covariance, got 1'):
      small.fit(MahalanobisAD(), small.images(1))
    with pytest.raises(ValueError, match='covariance of a is singular'):
      small.fit(MahalanobisAD(), np.zeros((4, 32, 24, 3), np.uint8))
    for shrinkage in (0.0, 1.1, float('nan')):
      with pytest.raises(ValueError, match='expected None'):
        MahalanobisAD(shrinkage)
