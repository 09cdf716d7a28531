"""MahalanobisAD against NumPy in float64, the shrinkage too."""

import numpy as np
import pytest

from patchcore_jax import backbones
from patchcore_jax.banks import store
from patchcore_jax.banks.store import BankError
from patchcore_jax.detectors import base, mahalanobis_ad
from patchcore_jax.detectors.mahalanobis_ad import Spec
from patchcore_jax.detectors.model import Model
from tests import precision, small


def _fit(n=20, batch_size=4, spec=None, **kwargs):
  return mahalanobis_ad.fit(
      small.backbone(), small.batches(small.images(n), batch_size), n, spec=spec or Spec(), **kwargs)


def _predict(model, batch_size=4, spec=None):
  return small.joined(list(mahalanobis_ad.predict(
      small.backbone(), model, small.batches(small.images(6, 7), batch_size), spec=spec or Spec())))


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


class TestFitAndPredict:

  @pytest.mark.parametrize('n', [20, 5])  # more images than channels, fewer
  @pytest.mark.parametrize('shrinkage', [None, 0.3, 1.0])
  def test_equals_float64(self, n, shrinkage):
    spec = Spec(shrinkage)
    value = _predict(_fit(n, spec=spec), spec=spec)
    assert value.anomaly_maps is None
    # Features are right to 1e-7; the smallest standard deviation of a level is a few thousandths.
    np.testing.assert_allclose(value.image_scores, _expected(n, shrinkage)[None], rtol=1e-4)

  def test_the_mean_of_each_level_scores_nothing(self):
    images = np.concatenate([small.images(3)] * 2)
    model = _fit()
    for layer, values in zip(small.LAYERS, small.maps(images[:1])):
      model.arrays[f'mean_{layer}'][:] = values.mean(axis=(0, 1, 2))
    (value,) = mahalanobis_ad.predict(small.backbone(), model, small.batches(images, 6), spec=Spec())
    np.testing.assert_allclose(value.image_scores[0, [0, 3]], 0, atol=1e-4)
    assert (value.image_scores[0, [1, 2]] > 1).all()

  def test_batch_size_and_padding_have_no_influence(self):
    expected = _predict(_fit())
    for size in (1, 3, 32):
      value = _predict(_fit(batch_size=size), size)
      assert value.index.tolist() == list(range(6))
      np.testing.assert_allclose(value.image_scores, expected.image_scores, rtol=1e-4)

  def test_progress(self):
    calls = []
    _fit(progress=lambda *call: calls.append(call))
    assert calls == [('embed', done, 20) for done in (4, 8, 12, 16, 20)]

  def test_survives_disk(self, tmp_path):
    model = _fit()
    store.save_arrays(tmp_path / 'm', *model)
    again = Model(*store.restore_arrays(
        tmp_path / 'm', expected=mahalanobis_ad.describe(small.backbone(), Spec())))
    np.testing.assert_array_equal(_predict(again).image_scores, _predict(model).image_scores)

  def test_errors(self):
    with pytest.raises(ValueError, match='two images or more for a covariance, got 1'):
      _fit(1)
    same = small.batches(np.zeros((4, 32, 24, 3), np.uint8), 4)
    with pytest.raises(ValueError, match='covariance of a is singular'):
      mahalanobis_ad.fit(small.backbone(), same, 4, spec=Spec())
    with pytest.raises(BankError, match='settings.shrinkage: the bank has None, asked for is 0.5'):
      _predict(_fit(), spec=Spec(0.5))
    for shrinkage in (0.0, 1.1, float('nan')):
      with pytest.raises(ValueError, match='expected None'):
        Spec(shrinkage)


def test_products_ask_for_the_highest_precision():
  backbone = backbones.create('resnet18', weights='random', precision='float32', layers=('layer1', 'layer2'))
  fn = mahalanobis_ad._predict_fn(
      mahalanobis_ad.models.pooled_fn(base.maps_of(backbone)))
  gaussians = [(np.zeros(c, np.float32), np.zeros((c, c), np.float32)) for c in (64, 128)]
  precision.assert_highest(fn, (backbone.variables, gaussians), np.zeros((1, 64, 64, 3), np.uint8))


def test_number_of_devices_has_no_influence():
  value = small.on_devices(4, 'mahalanobis_ad_test', '_predict(t._fit(batch_size=8), 8).image_scores')
  np.testing.assert_allclose(value, _predict(_fit()).image_scores, rtol=1e-4)
