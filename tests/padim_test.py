"""PaDiM against NumPy in float64."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from patchcore_jax import backbones
from patchcore_jax.banks import store
from patchcore_jax.banks.store import BankError
from patchcore_jax.detectors import base, padim
from patchcore_jax.detectors.model import Model
from tests import precision, small

pytestmark = pytest.mark.accelerator

SPEC = padim.Spec(num_dims=9, seed=3)


def _fit(n=20, batch_size=4, spec=SPEC, **kwargs):
  return padim.fit(
      small.backbone(), small.batches(small.images(n), batch_size), n, spec=spec, **kwargs)


def _predict(model, batch_size=4, spec=SPEC):
  return small.joined(list(padim.predict(
      small.backbone(), model, small.batches(small.images(6, 7), batch_size), spec=spec)))


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


class TestFitAndPredict:

  # More images than dimensions, as many, fewer, one: the two forms of the factor.
  @pytest.mark.parametrize('n, size', [(20, 9), (9, 9), (6, 6), (1, 1)])
  @pytest.mark.parametrize('fields', [{}, {'sigma': 0.0}, {'image_score': 'map'}])
  def test_equals_float64(self, n, size, fields):
    spec = dataclasses.replace(SPEC, **fields)
    model = _fit(n, spec=spec)
    assert model.arrays['factor'].shape == (48, size, 9)
    value = _predict(model, spec=spec)
    scores, maps = _expected(model, n, spec)
    # Covariances have a condition of up to 300; float32 loses that many times its 6e-8.
    np.testing.assert_allclose(value.image_scores, scores[None], rtol=3e-5)
    np.testing.assert_allclose(value.anomaly_maps, maps[None], rtol=3e-5)

  def test_an_image_at_the_mean_scores_nothing(self):
    images = np.repeat(small.images(1), 5, axis=0)
    model = padim.fit(small.backbone(), small.batches(images, 5), 5, spec=SPEC)
    (value,) = padim.predict(small.backbone(), model, small.batches(images[:1], 1), spec=SPEC)
    np.testing.assert_allclose(value.anomaly_maps, 0, atol=1e-5)

  def test_dimensions_are_a_seeded_choice(self):
    dims = _fit().arrays['dims']
    assert len(set(dims.tolist())) == 9 and dims.max() < 18 and dims.tolist() == sorted(dims)
    np.testing.assert_array_equal(dims, _fit().arrays['dims'])
    other = _fit(spec=dataclasses.replace(SPEC, seed=4)).arrays['dims']
    assert dims.tolist() != other.tolist()
    every = _fit(spec=dataclasses.replace(SPEC, num_dims=0)).arrays['dims']
    assert every.tolist() == list(range(18))

  def test_blocks_and_scratch_have_no_influence(self, monkeypatch, tmp_path):
    expected = _fit()
    monkeypatch.setattr(padim, '_BLOCK', 7 * 9 * 20)  # blocks of 7 positions; 48 is no multiple
    calls = []
    model = _fit(scratch=str(tmp_path), progress=lambda *call: calls.append(call))
    for name, array in expected.arrays.items():  # entries up to 10, and conditions up to 300
      np.testing.assert_allclose(model.arrays[name], array, rtol=0, atol=2e-4)
    assert calls[4:6] == [('embed', 20, 20), ('covariance', 7, 48)]
    assert calls[-1] == ('covariance', 48, 48) and not list(tmp_path.iterdir())

  def test_batch_size_and_padding_have_no_influence(self):
    expected = _predict(_fit())
    for size in (1, 3, 32):
      value = _predict(_fit(batch_size=size), size)
      assert value.index.tolist() == list(range(6))
      np.testing.assert_allclose(value.image_scores, expected.image_scores, rtol=1e-4)
      np.testing.assert_allclose(value.anomaly_maps, expected.anomaly_maps, rtol=1e-4)

  def test_survives_disk(self, tmp_path):
    model = _fit()
    store.save_arrays(tmp_path / 'm', *model)
    again = Model(*store.restore_arrays(
        tmp_path / 'm', expected=padim.describe(small.backbone(), SPEC)))
    np.testing.assert_array_equal(_predict(again).anomaly_maps, _predict(model).anomaly_maps)

  def test_errors(self):
    with pytest.raises(ValueError, match='No images: none were given'):
      padim.fit(small.backbone(), iter(()), 0, spec=SPEC)
    with pytest.raises(ValueError, match='num_dims=550: the layers a, b, c of small have 18 channels'):
      _fit(spec=padim.Spec())
    with pytest.raises(BankError, match='settings.epsilon: the bank has 0.01, asked for is 0.1'):
      _predict(_fit(), spec=dataclasses.replace(SPEC, epsilon=0.1))
    wide = small.batches(np.zeros((4, 32, 32, 3), np.uint8), 4)
    with pytest.raises(BankError, match=r'image_size: the bank has \[32, 24\], asked for is \[32, 32\]'):
      list(padim.predict(small.backbone(), _fit(), wide, spec=SPEC))


@pytest.mark.parametrize('fields, message', [
    ({'num_dims': -1}, 'num_dims=-1'), ({'seed': -1}, 'seed=-1'), ({'epsilon': 0.0}, 'epsilon=0.0'),
    ({'epsilon': float('nan')}, 'epsilon=nan'), ({'sigma': -1.0}, 'sigma=-1.0'),
    ({'image_score': 'other'}, "image_score='other'")])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    padim.Spec(**fields)


def test_products_ask_for_the_highest_precision():
  backbone = backbones.create(
      'resnet18', weights='random', precision='float32', layers=('layer1', 'layer2', 'layer3'))
  for n, low_rank in ((50, True), (100, False)):
    fn = padim._predict_fn(base.maps_of(backbone), low_rank, SPEC)
    arrays = np.arange(100), np.zeros((256, 100), np.float32), np.zeros((256, n, 100), np.float32)
    precision.assert_highest(fn, (backbone.variables, *arrays), np.zeros((1, 64, 64, 3), np.uint8))
    precision.assert_highest(padim._gaussians, np.zeros((n, 4, 100), np.float32), 0.01)


def test_number_of_devices_has_no_influence():
  value = small.on_devices(4, 'padim_test', '_predict(t._fit(batch_size=8), 8).image_scores')
  np.testing.assert_allclose(value, _predict(_fit()).image_scores, rtol=1e-4)
