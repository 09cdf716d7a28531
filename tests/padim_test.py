"""PaDiM against NumPy in float64."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from patchcore_jax.detectors import PaDiM, padim
from tests import precision, small

pytestmark = pytest.mark.accelerator

DETECTOR = PaDiM(num_dims=9)


def fit(n=20, detector=DETECTOR, **run):
  return small.fit(detector, small.images(n), seed=3, **run)


def _embeddings(images, dims):
  first, *deeper = small.maps(images)
  # Cells of the deeper maps are twice as high and wide.
  enlarged = [m.repeat(2, axis=1).repeat(2, axis=2) for m in deeper]
  return np.concatenate([first, *enlarged], axis=-1)[..., dims]


def _expected(model, n, spec):
  train, test = (_embeddings(x, model.arrays['dims']) for x in (small.images(n), small.images(6, 7)))
  distances = np.empty(test.shape[:3])
  for y, x in np.ndindex(distances.shape[1:]):
    covariance = spec.epsilon * np.eye(train.shape[-1])
    if n > 1:
      covariance += np.cov(train[:, y, x], rowvar=False)
    z = test[:, y, x] - train[:, y, x].mean(axis=0)
    distances[:, y, x] = np.sqrt(np.einsum('ni,ij,nj->n', z, np.linalg.inv(covariance), z))
  maps = np.stack([_enlarge(d) for d in distances])
  if spec.sigma:
    maps = np.stack([ndimage.gaussian_filter(m, spec.sigma) for m in maps])
  return (maps if spec.image_score == 'map' else distances).max(axis=(1, 2)), maps


def _enlarge(values):
  """[8, 6] -> [32, 24], bilinear, corners not aligned, the edge continued."""
  position = np.meshgrid(*((np.arange(4 * n) + 0.5) / 4 - 0.5 for n in values.shape), indexing='ij')
  return ndimage.map_coordinates(values, position, order=1, mode='nearest')


class TestFitAndScore:

  # More images than dimensions, as many, fewer, one: the two forms of the factor.
  @pytest.mark.parametrize('n, size', [(20, 9), (9, 9), (6, 6), (1, 1)])
  def test_equals_float64(self, n, size):
    model = fit(n)
    assert model.arrays['factor'].shape == (48, size, 9)
    for fields in ({}, {'sigma': 0.0}, {'image_score': 'map'}):
      detector = dataclasses.replace(DETECTOR, **fields)
      value = small.predict(detector, model, small.images(6, 7))
      scores, maps = _expected(model, n, detector)
      # Covariances have a condition of up to 300; float32 loses that many times its 6e-8.
      np.testing.assert_allclose(value.image, scores, rtol=3e-5)
      np.testing.assert_allclose(value.map, maps, rtol=3e-5)

  def test_an_image_at_the_mean_scores_nothing(self):
    images = np.repeat(small.images(1), 5, axis=0)
    value = small.predict(DETECTOR, small.fit(DETECTOR, images), images)
    np.testing.assert_allclose(value.map, 0, atol=1e-5)

  def test_dimensions_are_a_seeded_choice(self):
    dims = fit().arrays['dims']
    assert len(set(dims.tolist())) == 9 and dims.max() < 18 and dims.tolist() == sorted(dims)
    assert dims.tolist() != small.fit(DETECTOR, small.images(20), seed=4).arrays['dims'].tolist()
    assert fit(detector=PaDiM(num_dims=0)).arrays['dims'].tolist() == list(range(18))

  def test_blocks_have_no_influence(self, monkeypatch):
    expected = fit()
    monkeypatch.setattr(padim, '_BLOCK', 7 * 9 * 20)  # blocks of 7 positions; 48 is no multiple
    calls = []
    model = fit(progress=lambda *call: calls.append(call))
    for name, array in expected.arrays.items():  # entries up to 10, and conditions up to 300
      np.testing.assert_allclose(model.arrays[name], array, rtol=0, atol=2e-4)
    assert calls[2:4] == [('embed', 20, 20), ('covariance', 7, 48)]
    assert calls[-1] == ('covariance', 48, 48)

  def test_errors(self):
    with pytest.raises(ValueError, match='num_dims=550: the layers a, b, c of small have 18 channels'):
      fit(detector=PaDiM())
    # Of two images the covariance has one direction; to the others float32 leaves nothing of epsilon.
    with pytest.raises(ValueError, match='singular in float32. Raise padim.epsilon=1e-12'):
      small.fit(PaDiM(num_dims=9, epsilon=1e-12), np.tile(small.images(2), (10, 1, 1, 1)))


@pytest.mark.parametrize('fields, message', [
    ({'num_dims': -1}, 'num_dims=-1'), ({'epsilon': 0.0}, 'epsilon=0.0'),
    ({'epsilon': float('nan')}, 'epsilon=nan'), ({'sigma': -1.0}, 'sigma=-1.0'),
    ({'image_score': 'other'}, "image_score='other'")])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    PaDiM(**fields)


def test_products_of_the_fit_ask_for_the_highest_precision():
  for n in (5, 20):
    precision.assert_highest(padim._gaussians, np.zeros((n, 4, 9), np.float32), 0.01)
