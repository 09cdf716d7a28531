"""SPADE against comparing every pixel with every pixel, in float64."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from patchcore_jax import backbones
from patchcore_jax.banks import store
from patchcore_jax.banks.store import BankError
from patchcore_jax.detectors import base, spade
from patchcore_jax.detectors.model import Model
from patchcore_jax.detectors.spade import Spec
from patchcore_jax.search import neighbors
from patchcore_jax.search.neighbors import SearchSpec
from tests import precision, small

pytestmark = pytest.mark.accelerator

SPEC = Spec(num_images=3)


def _fit(n=10, batch_size=4, spec=SPEC, backbone=None, **kwargs):
  return spade.fit(
      backbone or small.backbone(), small.batches(small.images(n), batch_size), n, spec=spec, **kwargs)


def _predict(model, batch_size=4, spec=SPEC, **kwargs):
  return small.joined(list(spade.predict(
      small.backbone(), model, small.batches(small.images(6, 7), batch_size), spec=spec, **kwargs)))


def _enlarge(values, factor):
  """[h, w] -> factor times that, bilinear, corners not aligned, the edge continued."""
  position = np.meshgrid(
      *((np.arange(factor * n) + 0.5) / factor - 0.5 for n in values.shape), indexing='ij')
  return ndimage.map_coordinates(values, position, order=1, mode='nearest')


def _features(images):
  """(pyramids [n, 8, 6, 13], pooled [n, 5])."""
  fine, coarse, last = small.maps(images)
  enlarged = np.stack([
      np.stack([_enlarge(m[..., c], 2) for c in range(m.shape[-1])], axis=-1) for m in coarse])
  return np.concatenate([fine, enlarged], axis=-1), last.mean(axis=(1, 2))


def _expected(spec, n=10):
  (gallery, known), (queries, pooled) = _features(small.images(n)), _features(small.images(6, 7))
  scores, maps = [], []
  for image, pyramid in zip(pooled, queries):
    distances = np.linalg.norm(known - image, axis=1)
    nearest = distances.argsort()[:spec.num_images]
    pixels = gallery[nearest].reshape(-1, gallery.shape[-1])
    each = np.linalg.norm(pyramid[:, :, None] - pixels, axis=-1)
    each = np.sort(each, axis=-1)[..., :spec.num_neighbors]
    power = 2 if spec.distance == 'squared' else 1
    scores.append((distances[nearest]**power).mean())
    maps.append(_enlarge((each**power).mean(-1), 4))
  if spec.sigma:
    maps = [ndimage.gaussian_filter(m, spec.sigma) for m in maps]
  return np.array(scores), np.array(maps)


class TestFitAndPredict:

  @pytest.mark.parametrize('spec', [
      SPEC, Spec(num_images=10, num_neighbors=4), Spec(num_images=1, distance='root', sigma=0.0)])
  def test_equals_brute_force(self, spec):
    value = _predict(_fit(spec=spec), spec=spec)
    scores, maps = _expected(spec)
    np.testing.assert_allclose(value.image_scores, scores[None], rtol=1e-4)  # features within 1e-7
    np.testing.assert_allclose(value.anomaly_maps, maps[None], rtol=1e-4)

  def test_a_training_image_scores_nothing(self):
    spec = Spec(num_images=1)
    model = _fit(spec=spec)
    (value,) = spade.predict(
        small.backbone(), model, small.batches(small.images(10), 10), spec=spec)
    np.testing.assert_allclose(value.image_scores, 0, atol=1e-10)
    np.testing.assert_allclose(value.anomaly_maps, 0, atol=1e-10)

  def test_the_search_has_no_influence(self):
    model = _fit()
    expected = _predict(model)
    value = _predict(model, search=SearchSpec('bfloat16'))
    np.testing.assert_array_equal(value.anomaly_maps, expected.anomaly_maps)
    with pytest.raises(ValueError, match="search.bank='sharded'"):
      _predict(model, search=SearchSpec(bank='sharded'))

  def test_features_reduced_for_the_search(self):
    # Wide features of few directions, which `neighbors.prepare` reduces, unlike those of `small`.
    rng = np.random.default_rng(0)
    pyramids = (rng.standard_normal((4, 30, 3)) @ rng.standard_normal((3, 400))).astype(np.float32)
    prepared = neighbors.prepare(pyramids.reshape(-1, 400))
    assert prepared.basis is not None
    bank = spade._part(prepared, 4, np.array([2, 0]))
    rows = pyramids[[2, 0]].reshape(-1, 400)
    queries = rng.standard_normal((20, 400)).astype(np.float32)
    np.testing.assert_array_equal(bank.rows, rows)
    found = neighbors.nearest_neighbors(queries, jax.device_put(bank), k=2)
    for value, expected in zip(found, neighbors.nearest_neighbors(queries, rows, k=2)):
      np.testing.assert_array_equal(value, expected)

  def test_batch_size_and_padding_have_no_influence(self):
    expected = _predict(_fit())
    for size in (1, 3, 32):
      value = _predict(_fit(batch_size=size), size)
      assert value.index.tolist() == list(range(6))
      np.testing.assert_allclose(value.image_scores, expected.image_scores, rtol=1e-4)
      np.testing.assert_allclose(value.anomaly_maps, expected.anomaly_maps, rtol=1e-4)

  def test_scratch_has_no_influence(self, tmp_path):
    model = _fit(scratch=str(tmp_path))
    assert isinstance(model.arrays['pyramids'].base, np.memmap) and not list(tmp_path.iterdir())
    np.testing.assert_array_equal(_predict(model).anomaly_maps, _predict(_fit()).anomaly_maps)

  def test_survives_disk(self, tmp_path):
    model = _fit()
    store.save_arrays(tmp_path / 'm', *model)
    again = Model(*store.restore_arrays(
        tmp_path / 'm', expected=spade.describe(small.backbone())))
    np.testing.assert_array_equal(_predict(again).anomaly_maps, _predict(model).anomaly_maps)

  def test_errors(self):
    with pytest.raises(ValueError, match='No images'):
      spade.fit(small.backbone(), iter(()), 10, spec=SPEC)
    with pytest.raises(ValueError, match='one for the image, got a. Set the layers'):
      _fit(backbone=small.backbone(('a',)))
    with pytest.raises(ValueError, match='num_images=50: .* there are 10 training images'):
      _fit(spec=Spec())
    with pytest.raises(ValueError, match='num_images=11: .* there are 10 training images'):
      _predict(_fit(), spec=Spec(num_images=11))
    wide = small.batches(np.zeros((4, 32, 32, 3), np.uint8), 4)
    with pytest.raises(BankError, match=r'image_size: the bank has \[32, 24\], asked for is \[32, 32\]'):
      list(spade.predict(small.backbone(), _fit(), wide, spec=SPEC))


@pytest.mark.parametrize('fields, message', [
    ({'num_images': 0}, 'num_images=0'), ({'num_neighbors': 0}, 'num_neighbors=0'),
    ({'distance': 'other'}, "distance='other'"), ({'sigma': -1.0}, 'sigma=-1.0')])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    Spec(**fields)


def test_products_ask_for_the_highest_precision():
  backbone = backbones.create(
      'resnet18', weights='random', precision='float32', layers=('layer1', 'layer2', 'layer4'))
  features = spade._features_fn(base.maps_of(backbone))
  known = neighbors.prepare(np.eye(9, 512, dtype=np.float32), 'float32')
  precision.assert_highest(
      spade._images_fn(features, 5, 'squared'), (backbone.variables, known),
      np.zeros((1, 64, 64, 3), np.uint8))
  bank = neighbors.prepare(np.eye(50, 192, dtype=np.float32), 'float32')
  precision.assert_highest(
      spade._pixels_fn((16, 16), (64, 64), SPEC), bank, np.zeros((1, 256, 192), np.float32))


def test_number_of_devices_has_no_influence():
  value = small.on_devices(4, 'spade_test', '_predict(t._fit(batch_size=8), 8).anomaly_maps')
  np.testing.assert_allclose(value, _predict(_fit()).anomaly_maps, rtol=1e-4)
