"""SoftPatch and what it weighs patches by, against scikit-learn and NumPy; `parity_test` has its released
code beside it."""

import dataclasses

import numpy as np
import pytest
from sklearn.neighbors import LocalOutlierFactor

from patchcore_jax import foreground, outliers
from patchcore_jax.cli import bank
from patchcore_jax.detectors import Run, SoftPatch, patchcore, soft_patch
from patchcore_jax.settings import EmbeddingSpec
from tests import small

pytestmark = pytest.mark.accelerator

GROUPS = np.random.default_rng(0).standard_normal((5, 14, 9)).astype(np.float32)


def _factors(points, k):
  return -LocalOutlierFactor(k).fit(points.astype(np.float64)).negative_outlier_factor_


class TestOutliers:

  @pytest.mark.parametrize('k', [1, 4, 13])
  def test_local_outlier_factors_are_those_of_scikit_learn(self, k):
    expected = [_factors(points, k) for points in GROUPS]
    np.testing.assert_allclose(outliers.local_outlier_factors(GROUPS, k), expected, rtol=2e-6)

  def test_by_hand(self):
    # Of 0, 1, 2 and 9 with two neighbours: k-distances 2, 1, 2, 8, densities 1/1.5, 1/2, 1/1.5, 1/7.5.
    points = np.float32([0, 1, 2, 9]).reshape(1, 4, 1)
    dense, less, lonely = 1 / 1.5, 1 / 2, 1 / 7.5
    expected = [(less + dense) / 2 / dense, dense / less, (less + dense) / 2 / dense,
                (less + dense) / 2 / lonely]
    np.testing.assert_allclose(outliers.local_outlier_factors(points, 2)[0], expected, rtol=1e-6)

  def test_points_that_coincide(self):
    points = np.repeat(np.float32([[[0, 1]]]), 6, axis=1)
    np.testing.assert_allclose(outliers.local_outlier_factors(points, 3), np.ones((1, 6)), rtol=1e-6)
    points[0, 5] = 3
    found = np.asarray(outliers.local_outlier_factors(points, 3))[0]
    np.testing.assert_allclose(found[:5], 1, rtol=1e-6)
    assert found[5] > 1e9  # the others are as dense as can be

  def test_other_measures(self):
    distances = np.linalg.norm(GROUPS[:, :, None].astype(np.float64) - GROUPS[:, None], axis=-1)
    distances[:, np.arange(14), np.arange(14)] = np.inf
    np.testing.assert_allclose(outliers.nearest_distances(GROUPS), distances.min(-1), rtol=1e-6)
    expected = []
    for points in GROUPS.astype(np.float64):
      centred = points - points.mean(0)
      inverse = np.linalg.inv(np.cov(points.T) + 0.01 * np.eye(9))
      expected.append(np.sqrt(np.einsum('ni,ij,nj->n', centred, inverse, centred)))
    np.testing.assert_allclose(outliers.mahalanobis_distances(GROUPS), expected, rtol=1e-5)

  def test_groups_come_in_blocks(self, monkeypatch):
    whole = outliers.local_outlier_factors(GROUPS, 3)
    monkeypatch.setattr(outliers, '_VALUES', 2 * 14**2)  # two groups at a time
    np.testing.assert_array_equal(outliers.local_outlier_factors(GROUPS, 3), whole)

  @pytest.mark.parametrize('k', [0, 14])
  def test_errors(self, k):
    with pytest.raises(ValueError, match=f'num_neighbors={k}: expected 1 to 13 for 14 points'):
      outliers.local_outlier_factors(GROUPS, k)


# Features of 7 values, in which 7 dimensions leave nothing to project.
NETWORK = small.backbone(('a',))
DETECTOR = SoftPatch(0.25, 'mean', num_neighbors=3, projection_dim=7, num_start_points=9)
PATCHES = 8 * 6


@pytest.fixture(scope='module')
def good():
  """Images that are alike, and a defect in the third."""
  rng = np.random.default_rng(2)
  images = np.clip(rng.integers(0, 256, (32, 24, 3)) + rng.normal(0, 6, (9, 32, 24, 3)), 0, 255)
  images[2, :12, :8] = 255 - images[2, :12, :8]
  return images.astype(np.uint8)


@pytest.fixture(scope='module')
def fitted(good):
  lines = []
  model = DETECTOR.fit(small.data(good), (NETWORK,), Run(notify=lines.append))
  return model, lines


class TestFit:

  def test_weights_noise_and_bank(self, good, fitted):
    model, _ = fitted
    embeddings, _ = patchcore.embed(NETWORK, small.data(good), embedding=EmbeddingSpec('mean'))
    points = embeddings.reshape(9, PATCHES, 7)
    weights = np.stack([_factors(points[:, p], 3) for p in range(PATCHES)], axis=1)
    noise = weights > np.quantile(weights, 0.85)
    np.testing.assert_array_equal(model.arrays['noise'], noise.sum(axis=1))
    assert model.arrays['noise'].argmax() == 2
    assert noise[2].reshape(8, 6)[:3, :2].all()  # the defect
    indices = model.arrays['indices']
    assert len(indices) == len(set(indices.tolist())) == int(0.25 * 9 * PATCHES)
    assert not noise.reshape(-1)[indices].any()
    np.testing.assert_allclose(model.arrays['weights'], weights.reshape(-1)[indices], rtol=1e-5)
    np.testing.assert_array_equal(model.arrays['embeddings'], points.reshape(-1, 7)[indices])

  def test_tells_how_much_is_noise(self, fitted):
    model, lines = fitted
    noise = model.arrays['noise']
    (line,) = lines
    assert line.startswith(
        f'{noise.sum()} of {9 * PATCHES} patches are taken for noise, up to {noise[2]} of the ')
    assert '0 of them in the bank of 108' in line
    info = bank.info(model)
    assert f'{noise.sum()} of {9 * PATCHES} patches were taken for noise' in info
    assert any(line.endswith(f'patches of /line/good/2.png, {noise[2]} taken for noise') for line in info)

  def test_scores_by_definition(self, good, fitted):
    model, _ = fitted
    new = small.images(3, 7)
    queries, _ = patchcore.embed(NETWORK, small.data(new), embedding=EmbeddingSpec('mean'))
    rows = model.arrays['embeddings'].astype(np.float64)
    squares = np.square(queries.reshape(3, PATCHES, 1, 7) - rows).sum(-1)
    for weighted in (True, False):
      detector = dataclasses.replace(DETECTOR, weighted=weighted)
      found = small.predict(detector, model, new, network=NETWORK)
      scores = squares.min(-1) * (model.arrays['weights'][squares.argmin(-1)] if weighted else 1)
      np.testing.assert_allclose(found.image, scores.max(-1), rtol=1e-5)
      worst = scores.argmax(-1)
      np.testing.assert_array_equal(found.evidence['patch'], worst)
      np.testing.assert_array_equal(found.evidence['nearest'], squares.argmin(-1)[np.arange(3), worst])
      detector = dataclasses.replace(detector, image_score='top_share', top_share=0.25, foreground='pca')
      found = small.predict(detector, model, new, network=NETWORK)
      seen = np.asarray(foreground.objects(queries)).reshape(3, PATCHES)
      assert 0 < seen.mean() < 1
      np.testing.assert_allclose(found.image, np.sort(scores * seen)[:, -12:].mean(-1), rtol=1e-5)
      np.testing.assert_allclose(found.evidence['background_share'], 1 - seen.mean(-1), rtol=1e-5)


class TestSelect:
  POINTS = np.float32([[0, 0], [1, 0], [0, 1], [1, 1], [30, 30], [2, 0], [-9, 5]])

  def test_the_first_may_be_noise_and_no_other(self):
    noise = np.isin(np.arange(7), [4, 6])
    found = soft_patch.select(self.POINTS, noise, 4, np.array([6, 0]), 'any')
    assert found[0] == 4 and not noise[found[1:]].any()
    found = soft_patch.select(self.POINTS, noise, 4, np.array([6, 0]), 'inlier')
    assert not noise[found].any()
    assert noise.tolist() == np.isin(np.arange(7), [4, 6]).tolist()


class TestErrors:

  @pytest.mark.parametrize('fields, message', [
      ({'ratio': 0.0}, 'ratio=0.0: expected more than 0, and at most 0.85'),
      ({'ratio': 0.9}, 'ratio=0.9: expected more than 0, and at most 0.85'),
      ({'noise_share': 1.0}, 'noise_share=1.0'), ({'noise_share': -0.1}, 'noise_share=-0.1'),
      ({'outlyingness': 'other'}, "outlyingness='other': expected 'lof' or 'nearest' or 'gaussian'"),
      ({'first_pick': 'other'}, "first_pick='other'"), ({'embedding': 'other'}, "embedding='other'"),
      ({'num_neighbors': 0}, 'num_neighbors=0'), ({'projection_dim': 0}, 'projection_dim=0'),
      ({'num_start_points': 0}, 'num_start_points=0'), ({'sigma': -1.0}, 'sigma=-1.0'),
      ({'image_score': 'reweighted'}, "image_score='reweighted': expected 'max' or 'top_share'"),
      ({'foreground': 'other'}, "foreground='other'"), ({'top_share': 0.0}, 'top_share=0.0')])
  def test_values_out_of_range(self, fields, message):
    with pytest.raises(ValueError, match=message):
      SoftPatch(**fields)

  @pytest.mark.parametrize('detector, number, needed', [
      (DETECTOR, 3, 4), (dataclasses.replace(DETECTOR, outlyingness='nearest'), 1, 2)])
  def test_too_few_images(self, detector, number, needed):
    with pytest.raises(ValueError, match=f'^{number} images: .* at least {needed}, .*[^\n]$'):
      detector.fit(small.data(small.images(number)), (NETWORK,))
