"""MuSc: mutual scores against NumPy in float64, and what a set of images is to the rest of the house."""

import dataclasses

import numpy as np
import pytest

import patchcore_jax as pc
from patchcore_jax import inspection
from patchcore_jax.banks import store
from patchcore_jax.banks.model import BankError
from patchcore_jax.detectors import MuSc, musc, of_model
from patchcore_jax.evaluation import Settings, experiment
from patchcore_jax.inspection import Inspector
from patchcore_jax.serving import app
from patchcore_jax.settings import DataSpec, MetricsSpec, Preprocessing
from tests import small

pytestmark = pytest.mark.accelerator

DETECTOR, SET = MuSc(degrees=(1, 3), share=0.5), small.images(7)  # by the nearest 3 of the others


def _aggregated(maps, degree):
  maps = maps - maps.mean((1, 2, 3), keepdims=True)
  maps = maps / np.sqrt((maps**2).mean((1, 2, 3), keepdims=True) + 1e-5)
  margin = degree // 2
  padded = np.pad(maps, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
  rows, columns = maps.shape[1:3]
  means = sum(padded[:, y:y + rows, x:x + columns] for y, x in np.ndindex(degree, degree)) / degree**2
  return means / np.linalg.norm(means, axis=-1, keepdims=True)


def _mutual(maps, degree, count):
  """The scores of every patch, image by image."""
  vectors = _aggregated(maps, degree).reshape(len(maps), -1, maps.shape[-1])
  found = []
  for i, queries in enumerate(vectors):
    nearest = [np.linalg.norm(queries[:, None] - other, axis=-1).min(1)
               for j, other in enumerate(vectors) if j != i]
    found.append(np.sort(nearest, 0)[:count].mean(0))
  return np.reshape(found, maps.shape[:3])


@pytest.fixture(scope='module')
def network():
  return small.with_token()


@pytest.fixture(scope='module')
def model(network):
  return small.fit(DETECTOR, SET, network=network)


@pytest.fixture(scope='module')
def inspector(model, network):
  return Inspector(DETECTOR, model, (network,))


class TestFit:

  def test_equals_brute_force(self, model):
    layers = small.maps(SET, ('b', 'c'))
    expected = np.mean([_mutual(layer, degree, 3) for layer in layers for degree in (1, 3)], 0)
    np.testing.assert_allclose(model.arrays['patch_scores'], expected, rtol=0, atol=1e-5 * expected.max())

  def test_description(self, model):
    found = model.description
    assert (found.num_images, found.num_defects, found.grid, found.image_size) == (7, 0, (4, 3), (32, 24))
    assert of_model(model) == DETECTOR

  def test_labels_are_not_looked_at(self, model, network):
    data = small.ArrayData(SET, 8, [f'/line/good/{i}.png' for i in range(7)], labels=[0, 1, 1, 0, 0, 0, 1])
    found = DETECTOR.fit(data, (network,))
    assert found.description == model.description
    for name, array in model.arrays.items():
      np.testing.assert_array_equal(found.arrays[name], array)

  @pytest.mark.parametrize('number, detector, words', [
      (4, MuSc(), 'a share of 0.3 of the others: expected at least 5 images, got 4'),
      (1, MuSc(), 'expected at least 5 images, got 1'), (1, MuSc(share=1.0), 'at least 2 images, got 1'),
      (6, MuSc(neighborhoods=(1, 8)), r'musc.neighborhoods=\(1, 8\): expected at most 6')])
  def test_too_few_images(self, number, detector, words, network):
    with pytest.raises(ValueError, match=words):
      small.fit(detector, SET[:number], network=network)

  def test_a_network_without_class_tokens(self):
    with pytest.raises(ValueError, match='MuSc takes a class token from the last of the .* got 4 x 3'):
      small.fit(DETECTOR, SET)


class TestScores:

  def test_of_the_set_in_any_order_and_batch(self, model, network, tmp_path):
    expected = musc.rescored(model.arrays['maxima'], model.arrays['class_tokens'], (1, 2, 3))
    store.save(tmp_path / 'model', model)
    for kept, batch_size in ((model, 8), (store.restore(tmp_path / 'model'), 2)):
      found = small.predict(DETECTOR, kept, SET[::-1], network=network, batch_size=batch_size)
      np.testing.assert_array_equal(found.image, expected[::-1])
      np.testing.assert_allclose(found.map.max((1, 2)), model.arrays['maxima'][::-1], rtol=1e-6)
      scores = model.arrays['patch_scores'][::-1]
      np.testing.assert_array_equal(found.map[:, ::31, ::23], scores[:, ::3, ::2])  # corners on corners
      np.testing.assert_array_equal(found.evidence['patch'], scores.reshape(7, -1).argmax(1))

  def test_one_by_one(self, inspector, model):
    score = inspection.scorer(inspector, 2)
    assert score.compile(2).map is not None  # as a prediction does first
    np.testing.assert_array_equal(score(SET[3:4]).map.max((1, 2)), model.arrays['maxima'][3:4])

  def test_without_neighborhoods_the_largest_value_of_the_map(self, model, network):
    found = small.predict(dataclasses.replace(DETECTOR, neighborhoods=()), model, SET, network=network)
    np.testing.assert_array_equal(found.image, model.arrays['maxima'])

  def test_equal_images_have_equal_scores(self, network):
    model = small.fit(DETECTOR, SET[[0, 1, 2, 3, 4, 5, 0]], network=network)
    found = small.predict(DETECTOR, model, SET[:5], network=network)
    assert found.image.shape == (5,)
    np.testing.assert_array_equal(model.arrays['patch_scores'][0], model.arrays['patch_scores'][6])

  def test_an_image_that_is_not_of_the_set(self, model, network):
    with pytest.raises(BankError, match='1 of 3 images are none of the 7 that this model of MuSc was'):
      small.predict(DETECTOR, model, np.concatenate([SET[:2], small.images(1, 5)]), network=network)


class TestEvaluation:

  def test_is_of_the_test_images_by_each_other(self, pristine, network):
    preprocessing = Preprocessing(resize=(32, 24), crop=())
    (row,) = pc.evaluate(
        pristine, detector=DETECTOR, backbone=network, categories=['bolt'], preprocessing=preprocessing)
    assert row['num_train'] == row['num_test'] > 5 and 0 <= row['image_auroc'] <= 1

  @pytest.mark.parametrize('data, protocol, words', [
      ({}, 'mvtec_ad_2', 'protocol=mvtec_ad_2 takes a threshold from .* MuSc makes none'),
      ({'shots': 2}, 'paper', 'data.shots=2, .* MuSc takes no training images')])
  def test_what_has_no_use_for_test_images(self, pristine, data, protocol, words):
    settings = Settings(DataSpec(root=str(pristine), **data), DETECTOR, metrics=MetricsSpec(protocol))
    with pytest.raises(ValueError, match=words):
      experiment.Experiment(settings, pristine / 'none').check(())


class TestRescoring:

  def test_alike_images_share_their_scores(self):
    tokens = np.array([[3.0, 0], [2, 0], [0, 1], [0, 5]])
    scores = np.array([2.0, 4, 6, 2])
    by_hand = np.array([[0, 1 / 2, 1, 0], [(9 * 0 + 6 * 0.5) / 15, (6 * 0 + 4 * 0.5) / 10, 1 / 6, 5 / 30]])
    found = musc.rescored(scores, tokens, (2,))
    np.testing.assert_allclose(found, by_hand[1], rtol=1e-6)
    # With k = 1 an image stays itself only where its own product is the largest.
    np.testing.assert_allclose(musc.rescored(scores, tokens, (1,)), [0, 0, 0, 0], atol=1e-12)

  def test_equal_scores(self):
    assert musc.rescored(np.full(3, 2.0), np.eye(3), (1, 2)).tolist() == [0, 0, 0]


class TestWhatItCannotDo:

  def test_thresholds(self, network):
    with pytest.raises(ValueError, match='MuSc has no thresholds: .* none alone. Fit it without .--folds 0'):
      DETECTOR.fit_and_cross_score(small.data(SET), (network,), folds=2)
    inspector = pc.fit(SET, detector=DETECTOR, backbone=network, false_alarm_rate=None)
    finding = inspector.inspect(SET[2])
    assert finding.anomalous is None and 0 <= finding.score <= 1 and finding.map.shape == (32, 24)

  def test_export(self, inspector, tmp_path):
    with pytest.raises(ValueError, match='MuSc cannot be exported: it scores the images of one set'):
      inspector.export(tmp_path / 'exported')

  def test_a_service(self, inspector):
    with pytest.raises(ValueError, match='MuSc has no service: it scores the images of one set'):
      app.create_app(inspector, name='set')

  def test_ensembles(self):
    with pytest.raises(ValueError, match='MuSc has no ensembles'):
      pc.Ensemble(DETECTOR)


@pytest.mark.parametrize('fields, message', [
    ({'degrees': ()}, r'degrees=\(\)'), ({'degrees': (2,)}, r'degrees=\(2,\)'), ({'share': 0.0}, 'share=0.0'),
    ({'neighborhoods': (0,)}, r'neighborhoods=\(0,\)')])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    MuSc(**fields)
