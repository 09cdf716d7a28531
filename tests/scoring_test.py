"""Scores and maps against SciPy and the paper's formula. `parity_test` compares with the originals."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from patchcore_jax import scoring
from patchcore_jax.scoring import ScoringSpec
from patchcore_jax.search import neighbors

pytestmark = pytest.mark.accelerator


class TestPatchScores:

  def test_mean_of_squares_or_roots(self):
    distances_sq = jnp.array([[[1.0, 9.0]]])
    assert scoring.patch_scores(distances_sq, ScoringSpec()).tolist() == [[5.0]]
    assert scoring.patch_scores(distances_sq, ScoringSpec(distance='root')).tolist() == [[2.0]]


class TestImageScores:

  def test_maximum(self):
    assert scoring.image_scores(jnp.array([[[1.0, 7.0], [3.0, 2.0]]])).tolist() == [7.0]


class TestReweightedImageScores:

  def _inputs(self, b=3, p=20, m=50, d=6):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((b, p, d)).astype(np.float32),
            rng.standard_normal((m, d)).astype(np.float32))

  def _value(self, embeddings, bank, spec):
    b, p, d = embeddings.shape
    distances_sq, indices = neighbors.nearest_neighbors(embeddings.reshape(-1, d), bank)
    return scoring.reweighted_image_scores(
        embeddings, distances_sq.reshape(b, p, 1), indices.reshape(b, p, 1), bank, spec)

  @pytest.mark.parametrize('distance, image_score', [
      ('root', 'reweighted'), ('squared', 'reweighted'), ('squared', 'reweighted_squared')])
  @pytest.mark.parametrize('support', [2, 9])
  def test_equals_equation_7(self, distance, image_score, support):
    embeddings, bank = self._inputs()
    spec = ScoringSpec(distance=distance, image_score=image_score, support_neighbors=support)
    expected = []
    for image in embeddings.astype(np.float64):
      distances = np.linalg.norm(image[:, None] - bank, axis=-1)
      patch = distances.min(1).argmax()
      nearest = distances[patch].argmin()
      others = np.linalg.norm(bank - bank[nearest], axis=-1).argsort(kind='stable')[:support]
      power = 2 if image_score == 'reweighted_squared' else 1
      exponentials = np.exp(distances[patch][others]**power)
      weight = 1 - np.exp(distances[patch, nearest]**power) / exponentials.sum()
      score = distances[patch, nearest]
      expected.append(weight * (score if distance == 'root' else score**2))
    np.testing.assert_allclose(self._value(embeddings, bank, spec), expected, rtol=2e-6)

  def test_duplicates_in_the_bank(self):
    embeddings, bank = self._inputs(b=1)
    spec = ScoringSpec(distance='root', image_score='reweighted', support_neighbors=3)
    twice = np.concatenate([bank, bank])
    distances_sq, indices = neighbors.nearest_neighbors(embeddings[0], twice)
    value = scoring.reweighted_image_scores(
        embeddings, distances_sq[None], indices[None] + len(bank), twice, spec)
    expected = scoring.reweighted_image_scores(
        embeddings, distances_sq[None], indices[None], twice, spec)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


class TestAnomalyMaps:

  @pytest.mark.parametrize('upsampling, edges', [('bilinear', 'symmetric'), ('nearest', 'reflect')])
  @pytest.mark.parametrize('grid, size, sigma', [
      ((28, 28), (224, 224), 4), ((5, 9), (40, 70), 4), ((7, 7), (7, 7), 1.5), ((3, 4), (9, 8), 4),
      ((28, 28), (224, 224), 0)])
  def test_equals_enlarging_then_scipy(self, grid, size, sigma, upsampling, edges):
    scores = np.random.default_rng(0).random((2, *grid)).astype(np.float32)

    def enlarge(values, axis, pixels):  # corners not aligned
      cells = values.shape[axis]
      if upsampling == 'nearest':
        return np.take(values, np.arange(pixels) * cells // pixels, axis)
      position = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
      return np.apply_along_axis(lambda v: np.interp(position, np.arange(cells), v), axis, values)

    expected = enlarge(enlarge(scores.astype(np.float64), 1, size[0]), 2, size[1])
    if sigma:
      mode = {'symmetric': 'reflect', 'reflect': 'mirror'}[edges]  # SciPy's names for numpy.pad's
      expected = np.stack([scipy.ndimage.gaussian_filter(e, sigma, mode=mode) for e in expected])
    value = scoring.anomaly_maps(
        jnp.asarray(scores), size,
        ScoringSpec(sigma=sigma, upsampling=upsampling, blur_edges=edges))
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)

class TestErrors:

  @pytest.mark.parametrize('kwargs, words', [
      ({'distance': 'cosine'}, 'scoring.distance'), ({'upsampling': 'cubic'}, 'scoring.upsampling'),
      ({'blur_edges': 'wrap'}, 'scoring.blur_edges'), ({'image_score': 'mean'}, 'image_score'),
      ({'num_neighbors': 0}, 'num_neighbors'), ({'support_neighbors': 1}, 'support_neighbors'),
      ({'sigma': -1.0}, 'sigma'), ({'top_share': 0.0}, 'top_share'), ({'top_share': 1.1}, 'top_share')])
  def test_spec_names_the_field(self, kwargs, words):
    with pytest.raises(ValueError, match=words):
      ScoringSpec(**kwargs)
