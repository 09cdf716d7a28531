"""The one-class SVM against scikit-learn's on the same features in float64."""

import numpy as np
import pytest
from sklearn.svm import OneClassSVM

from patchcore_jax import backbones
from patchcore_jax.banks import store
from patchcore_jax.banks.store import BankError
from patchcore_jax.detectors import base, ocsvm
from patchcore_jax.detectors.model import Model
from patchcore_jax.detectors.ocsvm import Spec
from tests import precision, small


def _fit(n=20, batch_size=4, spec=None, **kwargs):
  return ocsvm.fit(
      small.backbone(), small.batches(small.images(n), batch_size), n, spec=spec or Spec(), **kwargs)


def _predict(model, batch_size=4, spec=None):
  return small.joined(list(ocsvm.predict(
      small.backbone(), model, small.batches(small.images(6, 7), batch_size), spec=spec or Spec())))


def _features(images):
  return np.concatenate([m.mean(axis=(1, 2)) for m in small.maps(images)], axis=1)


class TestFitAndPredict:

  @pytest.mark.parametrize('spec', [Spec(), Spec(nu=0.5), Spec(nu=0.3, gamma=0.7)])
  def test_equals_scikit_learn(self, spec):
    value = _predict(_fit(spec=spec), spec=spec)
    assert value.anomaly_maps is None
    # Features differ by 1e-7, and libsvm stops within its tolerance of the optimum: 1e-3 by default.
    for fields, atol in (({'tol': 1e-5}, 5e-5), ({}, 2e-3)):
      svm = OneClassSVM(nu=spec.nu, gamma=spec.gamma or 'scale', **fields)
      svm.fit(_features(small.images(20)))
      expected = -svm.decision_function(_features(small.images(6, 7)))
      assert np.ptp(expected) > 0.1
      np.testing.assert_allclose(value.image_scores, expected[None], atol=atol)

  def test_a_far_image_is_outside(self):
    model = _fit()
    far = np.full((1, 32, 24, 3), 255, np.uint8)
    (value,) = ocsvm.predict(small.backbone(), model, small.batches(far, 1), spec=Spec())
    # As far out as there is: no support vector is near, and the boundary alone is left.
    assert 0 < value.image_scores[0, 0] <= model.arrays['offset']
    assert (_predict(model).image_scores < value.image_scores).all()

  def test_images_that_are_all_equal(self):
    same = np.repeat(small.images(1), 4, axis=0)
    model = ocsvm.fit(small.backbone(), small.batches(same, 4), 4, spec=Spec())
    (value,) = ocsvm.predict(small.backbone(), model, small.batches(same, 4), spec=Spec())
    np.testing.assert_allclose(value.image_scores, 0, atol=1e-6)

  def test_batch_size_and_padding_have_no_influence(self):
    expected = _predict(_fit())
    for size in (1, 3, 32):
      value = _predict(_fit(batch_size=size), size)
      assert value.index.tolist() == list(range(6))
      np.testing.assert_allclose(value.image_scores, expected.image_scores, atol=5e-5)

  def test_survives_disk(self, tmp_path):
    model = _fit()
    store.save_arrays(tmp_path / 'm', *model)
    again = Model(*store.restore_arrays(
        tmp_path / 'm', expected=ocsvm.describe(small.backbone(), Spec())))
    np.testing.assert_array_equal(_predict(again).image_scores, _predict(model).image_scores)

  def test_errors(self):
    with pytest.raises(ValueError, match='No images'):
      _fit(0)
    with pytest.raises(BankError, match='settings.nu: the bank has 0.1, asked for is 0.2'):
      _predict(_fit(), spec=Spec(nu=0.2))
    for name, value in (('nu', 0.0), ('nu', 1.5), ('gamma', -1.0)):
      with pytest.raises(ValueError, match=f'{name}={value}'):
        Spec(**{name: value})


def test_products_ask_for_the_highest_precision():
  backbone = backbones.create('resnet18', weights='random', precision='float32', layers=('layer1', 'layer2'))
  fn = ocsvm._predict_fn(ocsvm.models.pooled_fn(base.maps_of(backbone)))
  arrays = {
      'support_vectors': np.zeros((5, 192), np.float32), 'weights': np.ones(5, np.float32),
      'gamma': np.float32(1), 'offset': np.float32(1)}
  precision.assert_highest(fn, (backbone.variables, arrays), np.zeros((1, 64, 64, 3), np.uint8))


def test_number_of_devices_has_no_influence():
  value = small.on_devices(2, 'ocsvm_test', '_predict(t._fit(batch_size=8), 8).image_scores')
  np.testing.assert_allclose(value, _predict(_fit()).image_scores, atol=5e-5)
