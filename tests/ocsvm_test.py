"""The one-class SVM against scikit-learn's on the same features in float64."""

import numpy as np
import pytest
from sklearn.svm import OneClassSVM

from patchcore_jax.detectors import OCSVM
from tests import small


def _features(images):
  return np.concatenate([m.mean(axis=(1, 2)) for m in small.maps(images)], axis=1)


class TestFitAndScore:

  @pytest.mark.parametrize('detector', [OCSVM(), OCSVM(nu=0.5), OCSVM(nu=0.3, gamma=0.7)])
  def test_equals_scikit_learn(self, detector):
    value = small.predict(detector, small.fit(detector, small.images(20)), small.images(6, 7))
    # Features differ by 1e-7, and libsvm stops within its tolerance of the optimum: 1e-3 by default.
    for fields, atol in (({'tol': 1e-5}, 5e-5), ({}, 2e-3)):
      svm = OneClassSVM(nu=detector.nu, gamma=detector.gamma or 'scale', **fields)
      svm.fit(_features(small.images(20)))
      expected = -svm.decision_function(_features(small.images(6, 7)))
      assert np.ptp(expected) > 0.1
      np.testing.assert_allclose(value.image, expected, atol=atol)

  def test_a_far_image_is_outside(self):
    model = small.fit(OCSVM(), small.images(20))
    far = np.full((1, 32, 24, 3), 255, np.uint8)
    *others, outside = small.predict(OCSVM(), model, np.concatenate([small.images(6, 7), far])).image
    # As far out as there is: no support vector is near, and the boundary alone is left.
    assert 0 < outside <= model.arrays['offset'] and max(others) < outside

  def test_images_that_are_all_equal(self):
    same = np.repeat(small.images(1), 4, axis=0)
    value = small.predict(OCSVM(), small.fit(OCSVM(), same), same)
    np.testing.assert_allclose(value.image, 0, atol=1e-6)

  def test_values_out_of_range(self):
    for name, value in (('nu', 0.0), ('nu', 1.5), ('gamma', -1.0)):
      with pytest.raises(ValueError, match=f'{name}={value}'):
        OCSVM(**{name: value})
