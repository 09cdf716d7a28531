"""Ensembles: statistics against NumPy in float64, and what combining must leave alone."""

import numpy as np
import pytest

from patchcore_jax import backbones
from patchcore_jax.banks.store import BankError
from patchcore_jax.detectors import ensemble, patchcore
from patchcore_jax.detectors.ensemble import Statistics
from patchcore_jax.detectors.patchcore import CoresetSpec, Prediction
from patchcore_jax.embedding import EmbeddingSpec
from patchcore_jax.scoring import ScoringSpec
from tests import precision, small

EMBEDDING = EmbeddingSpec('mean', 1)
LAYERS = ('a',)


def _bank(ratio=0.3, layers=LAYERS, n=10):
  return patchcore.fit(
      small.backbone(layers), small.batches(small.images(n), 4), n, embedding=EMBEDDING,
      coreset_spec=CoresetSpec(ratio, projection_dim=4, num_start_points=3))


def _statistics(bank, batch_size=4, n=10, layers=LAYERS, scoring_spec=None, **kwargs):
  return ensemble.statistics(
      small.backbone(layers), bank, small.batches(small.images(n), batch_size), embedding=EMBEDDING,
      scoring_spec=scoring_spec or ScoringSpec(), **kwargs)


def _predict(bank, layers=LAYERS, images=None, **kwargs):
  return list(patchcore.predict(
      small.backbone(layers), bank, small.batches(small.images(6, 7) if images is None else images, 4),
      embedding=EMBEDDING, scoring_spec=ScoringSpec(), **kwargs))


class TestStatistics:

  @pytest.mark.parametrize('ratio, sizes', [(0.3, (144, 40)), (1.0, (480,))])
  @pytest.mark.parametrize('spec', [ScoringSpec(), ScoringSpec(2, 'root')])
  def test_equals_float64(self, ratio, sizes, spec):
    bank = _bank(ratio)
    value = _statistics(bank, scoring_spec=spec, sizes=sizes)
    patches = small.maps(small.images(10), LAYERS)[0].reshape(10, 48, 7)
    for i, size in enumerate(sizes):
      rows, image = patches.reshape(-1, 7)[bank.indices[:size]], bank.indices[:size] // 48
      scores = []
      for number, queries in enumerate(patches):
        others = rows[image % 2 != number % 2]
        nearest = np.sort(np.linalg.norm(queries[:, None] - others, axis=-1))[:, :spec.num_neighbors]
        scores.append((nearest if spec.distance == 'root' else nearest**2).mean(-1))
      np.testing.assert_allclose(value.mean[i], np.mean(scores), rtol=1e-5)
      np.testing.assert_allclose(value.std[i], np.std(scores), rtol=1e-5)

  def test_batch_size_has_no_influence(self):
    bank, calls = _bank(), []
    expected = _statistics(bank, progress=lambda *call: calls.append(call))
    assert calls[-1] == ('statistics', 10, 10)
    for size in (1, 3, 16):
      np.testing.assert_allclose(_statistics(bank, size), expected, rtol=1e-6)

  def test_errors(self):
    bank = _bank()
    with pytest.raises(ValueError, match='8 images were given, the bank was fitted on 10'):
      _statistics(bank, n=8)
    with pytest.raises(ValueError, match='has 0 patches of every other of the 1 training images'):
      _statistics(_bank(n=1), n=1)
    with pytest.raises(BankError, match="backbone.layers: the bank has .'a'., asked for is .'b'"):
      _statistics(bank, layers=('b',))
    flat = np.zeros((4, 32, 24, 3), np.uint8)
    bank = patchcore.fit(
        small.backbone(LAYERS), small.batches(flat, 4), 4, embedding=EMBEDDING,
        coreset_spec=CoresetSpec(1.0, projection_dim=4))
    with pytest.raises(ValueError, match='scores have no scale'):
      ensemble.statistics(
          small.backbone(LAYERS), bank, small.batches(flat, 4), embedding=EMBEDDING,
          scoring_spec=ScoringSpec())


class TestCombine:

  def test_by_hand(self):
    def member(scale):
      return [Prediction(np.arange(2), scale * np.float32([[1, 3]]), scale * np.ones((1, 2, 1, 1)))]

    one = Statistics(np.array([1.0]), np.array([2.0]))
    other = Statistics(np.array([0.0]), np.array([5.0]))
    (value,) = ensemble.combine([member(1), member(10)], [one, other])
    np.testing.assert_allclose(value.image_scores, [[1, 3.5]])  # (0 + 2) / 2, (1 + 6) / 2
    np.testing.assert_allclose(value.anomaly_maps[0, :, 0, 0], 1)
    assert value.image_scores.dtype == value.anomaly_maps.dtype == np.float32

  def test_members_twice_or_in_another_unit_change_nothing(self):
    bank = _bank()
    sizes = (144, 40)
    statistics, predictions = _statistics(bank, sizes=sizes), _predict(bank, sizes=sizes)
    alone = list(ensemble.combine([predictions], [statistics]))
    scaled = [
        p._replace(image_scores=7 * p.image_scores, anomaly_maps=7 * p.anomaly_maps)
        for p in predictions]
    both = list(ensemble.combine(
        [predictions, scaled], [statistics, Statistics(7 * statistics.mean, 7 * statistics.std)]))
    assert len(both) == len(alone) == 2
    for value, expected in zip(both, alone):
      np.testing.assert_array_equal(value.index, expected.index)
      np.testing.assert_allclose(value.image_scores, expected.image_scores, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(value.anomaly_maps, expected.anomaly_maps, rtol=1e-5, atol=1e-5)

  def test_what_else_is_tested_has_no_influence(self):
    members = [(layers, _bank(layers=layers)) for layers in (('a',), ('b',))]
    statistics = [_statistics(bank, layers=layers) for layers, bank in members]

    def scores(images):
      predictions = [_predict(bank, layers, images) for layers, bank in members]
      return small.joined(list(ensemble.combine(predictions, statistics))).image_scores

    images = small.images(6, 7)
    np.testing.assert_allclose(scores(images)[:, :2], scores(images[:2]), rtol=1e-5)

  def test_errors(self):
    bank = _bank()
    statistics, predictions = _statistics(bank), _predict(bank)
    for members, found in (([], []), ([predictions], [])):
      with pytest.raises(ValueError, match='Expected statistics for each member'):
        list(ensemble.combine(members, found))
    other = [p._replace(index=p.index + 1) for p in predictions]
    for wrong in (other, predictions[:1]):
      with pytest.raises(ValueError, match='same images in the same batches'):
        list(ensemble.combine([predictions, wrong], [statistics] * 2))
    larger = [p._replace(anomaly_maps=p.anomaly_maps.repeat(2, axis=2)) for p in predictions]
    with pytest.raises(ValueError, match=r'maps .* of \[\(1, 4, 32, 24\), \(1, 4, 64, 24\)\]'):
      list(ensemble.combine([predictions, larger], [statistics] * 2))
    two = Statistics(np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match=r'statistics of \[1, 2\] banks'):
      list(ensemble.combine([predictions] * 2, [statistics, two]))


def test_products_ask_for_the_highest_precision():
  backbone = backbones.create('resnet18', weights='random', precision='float32')
  fn = ensemble._scores_fn(
      patchcore._embed_fn_of(backbone, EmbeddingSpec()), ScoringSpec(), ((40, 9), (40, 11)))
  bank = np.zeros((40, 1024), np.float32)
  precision.assert_highest(
      fn, (backbone.variables, (bank, bank)), np.zeros((1, 64, 64, 3), np.uint8))


def test_number_of_devices_has_no_influence():
  value = small.on_devices(2, 'ensemble_test', '_statistics(t._bank(), 8).mean')
  np.testing.assert_allclose(value, _statistics(_bank()).mean, rtol=1e-5)
