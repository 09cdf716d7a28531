"""SPADE against comparing every pixel with every pixel, in float64."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from patchcore_jax.detectors import SPADE, spade
from patchcore_jax.search import neighbors, search_bank
from patchcore_jax.settings import SearchSpec
from tests import precision, small

pytestmark = pytest.mark.accelerator

DETECTOR = SPADE(num_images=3)


@pytest.fixture(scope='module')
def model():
  """No setting is of the fit, so that one serves all."""
  return small.fit(DETECTOR, small.images(10))


def predict(model, detector=DETECTOR, images=None, **arguments):
  return small.predict(detector, model, small.images(6, 7) if images is None else images, **arguments)


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


class TestFitAndScore:

  @pytest.mark.parametrize('detector', [
      DETECTOR, SPADE(num_images=10, num_neighbors=4), SPADE(num_images=1, distance='root', sigma=0.0)])
  def test_equals_brute_force(self, model, detector):
    value = predict(model, detector)
    scores, maps = _expected(detector)
    np.testing.assert_allclose(value.image, scores, rtol=1e-4)  # features within 1e-7
    np.testing.assert_allclose(value.map, maps, rtol=1e-4)

  def test_a_training_image_scores_nothing(self, model):
    value = predict(model, SPADE(num_images=1), small.images(10))
    np.testing.assert_allclose(value.image, 0, atol=1e-10)
    np.testing.assert_allclose(value.map, 0, atol=1e-10)

  def test_the_search_has_no_influence(self, model):
    value = predict(model, search=SearchSpec('bfloat16'))
    np.testing.assert_array_equal(value.map, predict(model).map)
    with pytest.raises(ValueError, match="search.bank='sharded'"):
      predict(model, search=SearchSpec(bank='sharded'))

  def test_features_reduced_for_the_search(self):
    # Wide features of few directions, which `search_bank.prepare` reduces, unlike those of `small`.
    rng = np.random.default_rng(0)
    pyramids = (rng.standard_normal((4, 30, 3)) @ rng.standard_normal((3, 400))).astype(np.float32)
    prepared = search_bank.prepare(pyramids.reshape(-1, 400))
    assert prepared.basis is not None
    bank = spade._part(prepared, 4, np.array([2, 0]))
    rows = pyramids[[2, 0]].reshape(-1, 400)
    queries = rng.standard_normal((20, 400)).astype(np.float32)
    np.testing.assert_array_equal(bank.rows, rows)
    found = neighbors.nearest_neighbors(queries, jax.device_put(bank), k=2)
    for value, expected in zip(found, neighbors.nearest_neighbors(queries, rows, k=2)):
      np.testing.assert_array_equal(value, expected)

  def test_scratch_holds_the_features(self, tmp_path):
    model = small.fit(DETECTOR, small.images(10), scratch=str(tmp_path))
    assert isinstance(model.arrays['pyramids'].base, np.memmap) and not list(tmp_path.iterdir())

  def test_errors(self, model):
    with pytest.raises(ValueError, match='one for the image, got a. Set the layers'):
      small.fit(DETECTOR, network=small.backbone(('a',)))
    with pytest.raises(ValueError, match='num_images=50: .* there are 10 training images'):
      small.fit(SPADE(), small.images(10))
    with pytest.raises(ValueError, match='num_images=11: .* there are 10 training images'):
      predict(model, SPADE(num_images=11))


@pytest.mark.parametrize('fields, message', [
    ({'num_images': 0}, 'num_images=0'), ({'num_neighbors': 0}, 'num_neighbors=0'),
    ({'distance': 'other'}, "distance='other'"), ({'sigma': -1.0}, 'sigma=-1.0')])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    SPADE(**fields)


def test_products_of_the_search_ask_for_the_highest_precision():
  # Those on the device are looked at with those of all detectors; this is what the step on the host calls.
  bank = search_bank.prepare(np.eye(50, 192, dtype=np.float32), 'float32')
  precision.assert_highest(
      spade._pixels_fn((16, 16), (64, 64), DETECTOR), bank, np.zeros((1, 256, 192), np.float32))
