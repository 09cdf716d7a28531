"""The whole detector on small arrays: against NumPy in float64, any batch size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import backbones, scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.store import BankError
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import fit_plan, patchcore
from patchcore_jax.detectors.fit_plan import FitPlan
from patchcore_jax.detectors.patchcore import CoresetSpec
from patchcore_jax.embedding import EmbeddingSpec, patch_embeddings
from patchcore_jax.scoring import ScoringSpec
from patchcore_jax.search import coreset
from tests import precision

pytestmark = pytest.mark.accelerator

EMBEDDING = EmbeddingSpec('mean', 3)
SPEC = CoresetSpec(ratio=0.2, projection_dim=8, num_start_points=3)
ON_DEVICE = (False, False, False, True)


def _plan(embeddings_on_disk, points_on_disk, stream, embeddings_on_device=False):
  return FitPlan(480, 96, embeddings_on_disk, points_on_disk, stream, 0, 0, embeddings_on_device)


def _apply(variables, images):
  x = jnp.tanh(jnp.einsum('bhwc,cd->bhwd', images, variables, precision='highest'))
  return {'a': x[:, ::4, ::4], 'b': x[:, ::8, ::8]}


def _backbone():
  weights = np.random.default_rng(1).standard_normal((3, 12)).astype(np.float32)
  return Backbone(_apply, jnp.asarray(weights), ('a', 'b'), (0.5,) * 3, (0.25,) * 3, 'small')


def _images(n, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (n, 32, 24, 3), np.uint8)


def _batches(images, size):
  for i in range(0, len(images), size):
    part = images[i:i + size]
    index = np.full(size, -1, np.int32)
    index[:len(part)] = np.arange(i, i + len(part))
    yield Batch(np.pad(part, [(0, size - len(part))] + [(0, 0)] * 3), None, index)


def _fit(batch_size=4, **kwargs):
  return patchcore.fit(
      _backbone(), _batches(_images(10), batch_size), 10, embedding=EMBEDDING, coreset_spec=SPEC,
      **kwargs)


def _predict(bank, batch_size=4, **kwargs):
  kwargs = {'scoring_spec': ScoringSpec()} | kwargs
  parts = list(patchcore.predict(
      _backbone(), bank, _batches(_images(6, 7), batch_size), embedding=EMBEDDING, **kwargs))
  return patchcore.Prediction(
      np.concatenate([p.index for p in parts]),
      np.concatenate([p.image_scores for p in parts], axis=1),
      np.concatenate([p.anomaly_maps for p in parts], axis=1))


class TestFit:

  def test_bank_is_the_greedy_selection_of_all_patches(self):
    bank = _fit()
    assert bank.embeddings.shape == (96, 24)  # 20 % of 10 * 8 * 6
    with jax.enable_x64(True):
      pixels = (_images(10) / 255 - 0.5) / 0.25
      maps = _apply(jnp.asarray(_backbone().variables, jnp.float64), pixels)
      points = np.asarray(patch_embeddings([maps['a'], maps['b']], EMBEDDING)).reshape(-1, 24)
    np.testing.assert_allclose(bank.embeddings, points[bank.indices], atol=1e-6)
    keys = jax.random.split(jax.random.key(0))
    projected = points @ np.asarray(coreset.projection_matrix(keys[0], 24, 8), np.float64)
    start = jax.random.choice(keys[1], 480, (3,), replace=False)
    assert bank.indices.tolist() == coreset.greedy_k_center(projected, 96, start=start).tolist()

  def test_description_says_how_it_was_made(self):
    description = _fit().description
    json.dumps(description)
    assert description['backbone']['name'] == 'small' and description['num_patches'] == 480
    assert description['grid'] == [8, 6] and description['image_size'] == [32, 24]
    assert description['coreset']['ratio'] == 0.2 and 'jax' in description['versions']

  def test_batch_size_has_no_influence(self):
    expected = _fit(4)
    for size in (1, 3, 16):
      bank = _fit(size)
      np.testing.assert_array_equal(bank.indices, expected.indices)
      np.testing.assert_allclose(bank.embeddings, expected.embeddings, rtol=0, atol=1e-6)

  @pytest.mark.parametrize('where', [(False, False, True), (True, False, False), (True, False, True),
                                     (True, True, True), ON_DEVICE])
  def test_where_the_arrays_lie_has_no_influence(self, monkeypatch, tmp_path, where):
    expected = _fit()
    plans = []
    monkeypatch.setattr(
        fit_plan, 'plan', lambda *args, **kwargs: _plan(*where))
    bank = _fit(scratch=tmp_path, notify=plans.append)
    assert len(plans) == 1 and not list(tmp_path.iterdir())
    np.testing.assert_array_equal(bank.indices, expected.indices)
    np.testing.assert_array_equal(bank.embeddings, expected.embeddings)
    assert bank.description == expected.description

  def test_fewer_images_than_announced(self, monkeypatch, tmp_path):
    expected = _fit()
    for where in ((False,) * 3, (True,) * 3, ON_DEVICE):
      monkeypatch.setattr(
          fit_plan, 'plan', lambda *args, where=where, **kwargs: _plan(*where))
      bank = patchcore.fit(_backbone(), _batches(_images(10), 4), 13, embedding=EMBEDDING,
                           coreset_spec=SPEC, scratch=tmp_path)
      np.testing.assert_array_equal(bank.embeddings, expected.embeddings)
      assert bank.description['num_patches'] == 480

  def test_other_subsets(self):
    everything = patchcore.embed(
        _backbone(), _batches(_images(10), 4), 10, embedding=EMBEDDING).reshape(480, -1)

    def fit(**fields):
      return patchcore.fit(
          _backbone(), _batches(_images(10), 4), 10, embedding=EMBEDDING,
          coreset_spec=dataclasses.replace(SPEC, **fields))

    whole = fit(method='identity', ratio=1.0)
    np.testing.assert_array_equal(whole.indices, np.arange(480))
    np.testing.assert_array_equal(whole.embeddings, everything)
    few, more = (fit(method='random', ratio=r) for r in (0.1, 0.2))
    assert len(set(more.indices)) == 96
    np.testing.assert_array_equal(few.indices, more.indices[:48])  # one fit serves every ratio
    np.testing.assert_array_equal(more.embeddings, everything[more.indices])
    assert (more.indices != fit(method='random', seed=1).indices).any()

  def test_cluster_centers(self):
    spec = dataclasses.replace(SPEC, method='kmeans', ratio=0.05)
    bank, again = (patchcore.fit(
        _backbone(), _batches(_images(10), size), 10, embedding=EMBEDDING, coreset_spec=spec)
                   for size in (4, 5))
    assert bank.embeddings.shape == (24, 24) and bank.indices.max() < 480
    # The last digits of embeddings depend on the batch size, on some processors.
    np.testing.assert_allclose(bank.embeddings, again.embeddings, rtol=0, atol=1e-6)
    points = patchcore.embed(
        _backbone(), _batches(_images(10), 4), 10, embedding=EMBEDDING).reshape(480, -1)

    def spread(centers):
      return np.square(points[:, None] - centers).sum(-1).min(1).mean()

    random = dataclasses.replace(spec, method='random')
    other = patchcore.fit(
        _backbone(), _batches(_images(10), 4), 10, embedding=EMBEDDING, coreset_spec=random)
    assert spread(bank.embeddings) < 0.9 * spread(other.embeddings)

  def test_progress(self):
    calls = []
    _fit(progress=lambda *call: calls.append(call))
    assert ('embed', 10, 10) in calls and calls[-1] == ('coreset', 96, 96)

  @pytest.mark.parametrize('fields, words', [
      ({'method': 'best'}, "coreset.method='best': expected 'greedy', 'random'"),
      ({'method': 'identity'}, 'keeps all patches: expected ratio 1, got 0.1')])
  def test_spec_errors(self, fields, words):
    with pytest.raises(ValueError, match=words):
      CoresetSpec(**fields)

  def test_errors(self):
    with pytest.raises(ValueError, match='No images: none were given'):
      patchcore.fit(_backbone(), iter(()), 0, embedding=EMBEDDING, coreset_spec=SPEC)
    with pytest.raises(ValueError, match='keeps none of 480 patches'):
      patchcore.fit(_backbone(), _batches(_images(10), 4), 10, embedding=EMBEDDING,
                    coreset_spec=CoresetSpec(ratio=0.001))
    with pytest.raises(ValueError, match=r'fit.memory_gb=0.01: the fit takes at least \d.\d GB'):
      _fit(memory_gb=0.01)


class TestFitAndCrossScore:

  def _run(self, **kwargs):
    return patchcore.fit_and_cross_score(
        _backbone(), _batches(_images(10), 4), 10, embedding=EMBEDDING, coreset_spec=SPEC,
        scoring_spec=ScoringSpec(), folds=3, **kwargs)

  def test_each_part_as_new_images_of_a_bank_fitted_on_the_others(self):
    bank, scores = self._run()
    np.testing.assert_array_equal(bank.embeddings, _fit().embeddings)
    images = _images(10)
    fold_of = np.random.default_rng(SPEC.seed).permutation(np.arange(10) % 3)
    for fold in range(3):
      others, part = images[fold_of != fold], images[fold_of == fold]
      other_bank = patchcore.fit(
          _backbone(), _batches(others, 4), len(others), embedding=EMBEDDING, coreset_spec=SPEC)
      predictions = list(patchcore.predict(
          _backbone(), other_bank, _batches(part, 4), embedding=EMBEDDING, scoring_spec=ScoringSpec()))
      found = np.concatenate([p.image_scores[0] for p in predictions])
      maxima = np.concatenate([p.anomaly_maps[0].max((1, 2)) for p in predictions])
      np.testing.assert_allclose(scores.image_scores[fold_of == fold], found, rtol=1e-5)
      np.testing.assert_allclose(scores.map_maxima[fold_of == fold], maxima, rtol=1e-5)

  @pytest.mark.parametrize('where', [
      (True, False, True), (True, True, True), (False, False, True), ON_DEVICE])
  def test_where_the_arrays_lie_does_not_matter(self, where, tmp_path, monkeypatch):
    expected = self._run()[1]
    monkeypatch.setattr(fit_plan, 'plan', lambda *args, **kwargs: _plan(*where))
    found = self._run(scratch=tmp_path)[1]
    np.testing.assert_allclose(found.image_scores, expected.image_scores, rtol=1e-5)
    assert not list(tmp_path.iterdir())

  def test_errors(self):
    for spec, folds in (SPEC, 1), (dataclasses.replace(SPEC, method='kmeans'), 3):
      with pytest.raises(ValueError, match='expected at least 2, and a method that selects patches'):
        patchcore.fit_and_cross_score(
            _backbone(), _batches(_images(4), 4), 4, embedding=EMBEDDING, coreset_spec=spec,
            scoring_spec=ScoringSpec(), folds=folds)
    with pytest.raises(ValueError, match='One image'):
      patchcore.fit_and_cross_score(
          _backbone(), _batches(_images(1), 1), 1, embedding=EMBEDDING, coreset_spec=SPEC,
          scoring_spec=ScoringSpec(), folds=2)


class TestPredict:

  @pytest.mark.parametrize('spec', [
      ScoringSpec(), ScoringSpec(num_neighbors=3), ScoringSpec(distance='root'),
      ScoringSpec(distance='root', image_score='reweighted', support_neighbors=4)])
  def test_equals_float64(self, spec):
    bank = _fit()
    value = _predict(bank, scoring_spec=spec, sizes=(96, 10))
    with jax.enable_x64(True):
      maps = _apply(jnp.asarray(_backbone().variables, jnp.float64),
                    (_images(6, 7) / 255 - 0.5) / 0.25)
      queries = np.asarray(patch_embeddings([maps['a'], maps['b']], EMBEDDING)).reshape(6, 48, 24)
    for i, size in enumerate((96, 10)):
      rows = bank.embeddings[:size].astype(np.float64)
      distances = np.linalg.norm(queries[:, :, None] - rows, axis=-1)
      nearest = np.sort(distances, axis=-1)[..., :spec.num_neighbors]
      patches = (nearest if spec.distance == 'root' else nearest**2).mean(-1)
      scores = patches.max(-1)
      if spec.image_score == 'reweighted':
        for j, patch in enumerate(distances.min(-1).argmax(-1)):
          m = distances[j, patch].argmin()
          support = np.linalg.norm(rows - rows[m], axis=-1).argsort()[:4]
          e = np.exp(distances[j, patch])
          scores[j] *= 1 - e[m] / e[support].sum()
      np.testing.assert_allclose(value.image_scores[i], scores, rtol=1e-5)
      expected = scoring.anomaly_maps(jnp.asarray(patches.reshape(6, 8, 6)), (32, 24), spec)
      np.testing.assert_allclose(value.anomaly_maps[i], expected, rtol=1e-5)

  def test_sizes_equal_separate_banks(self):
    bank = _fit()
    both = _predict(bank, sizes=(96, 7))
    alone = _predict(jax.tree.map(lambda x: x[:7], bank))
    np.testing.assert_allclose(both.image_scores[1], alone.image_scores[0], rtol=1e-6)
    np.testing.assert_allclose(both.anomaly_maps[1], alone.anomaly_maps[0], rtol=1e-5)

  def test_batch_size_and_padding_have_no_influence(self):
    bank = _fit()
    expected = _predict(bank, 6)
    assert expected.index.tolist() == list(range(6))
    for size in (1, 4, 9):
      value = _predict(bank, size)
      assert value.index.tolist() == list(range(6))
      np.testing.assert_allclose(value.image_scores, expected.image_scores, rtol=1e-5)
      np.testing.assert_allclose(value.anomaly_maps, expected.anomaly_maps, rtol=1e-5)

  def test_compiles_once_whatever_the_last_batch(self):
    traces = []

    def counted(variables, images):
      traces.append(images.shape)
      return _apply(variables, images)

    backbone = dataclasses.replace(_backbone(), apply=counted)
    bank = _fit()
    for n in (6, 7, 9):
      list(patchcore.predict(
          backbone, bank, _batches(_images(n), 4), embedding=EMBEDDING, scoring_spec=ScoringSpec()))
    assert len(traces) == 1

  def test_another_network_or_size_is_named(self):
    bank = _fit()
    other = dataclasses.replace(_backbone(), variables=_backbone().variables * 2, name='other')
    with pytest.raises(BankError, match="backbone.name: the bank has 'small', asked for is 'other'"):
      list(patchcore.predict(other, bank, [], embedding=EMBEDDING, scoring_spec=ScoringSpec()))
    wide = np.zeros((4, 32, 32, 3), np.uint8)
    with pytest.raises(BankError, match=r'image_size: the bank has \[32, 24\], asked for is \[32, 32\]'):
      list(patchcore.predict(_backbone(), bank, _batches(wide, 4), embedding=EMBEDDING,
                             scoring_spec=ScoringSpec()))

  def test_more_neighbours_than_patches(self):
    with pytest.raises(ValueError, match='30 neighbours are asked for'):
      _predict(_fit(), scoring_spec=ScoringSpec(num_neighbors=30), sizes=(96, 10))


def test_products_ask_for_the_highest_precision():
  backbone = backbones.create('resnet18', weights='random', precision='float32')
  for spec in (ScoringSpec(), ScoringSpec(image_score='reweighted', num_neighbors=2)):
    fn = patchcore._predict_fn(patchcore._embed_fn_of(backbone, EmbeddingSpec()), spec, (96, 10))
    precision.assert_highest(
        fn, (backbone.variables, np.zeros((96, 1024), np.float32)), np.zeros((1, 64, 64, 3), np.uint8))


def test_default_precision_has_no_influence():
  # Vacuous on a CPU, where every product is float32; on a GPU or TPU it is the thing itself.
  bank = _fit()
  value = _predict(bank)
  with jax.default_matmul_precision('bfloat16'):
    low = _fit()
    low_value = _predict(bank)
  np.testing.assert_array_equal(low.indices, bank.indices)
  np.testing.assert_allclose(low_value.image_scores, value.image_scores, rtol=1e-6)
  np.testing.assert_allclose(low_value.anomaly_maps, value.anomaly_maps, rtol=1e-6)
