"""MH-PatchCore and the whitening that it rests on, against scikit-learn and NumPy in float64; `parity_test`
has its released code beside it."""

import functools

import numpy as np
import pytest
from sklearn.covariance import shrunk_covariance
from sklearn.decomposition import IncrementalPCA

from patchcore_jax import whitening
from patchcore_jax.detectors import MHPatchCore, Run, patchcore
from patchcore_jax.settings import EmbeddingSpec
from tests import small

pytestmark = pytest.mark.accelerator

_RNG = np.random.default_rng(0)
ROWS = (_RNG.standard_normal((90, 6)) * [9, 5, 3, 2, 1, 0.1]) @ _RNG.standard_normal((6, 6)) + 4
BLOCKS = np.split(ROWS, [20, 47, 55])


def _moments(blocks):
  return functools.reduce(whitening.merged, map(whitening.moments, blocks))


class TestWhitening:

  def test_blocks_are_merged_exactly(self):
    for found in (_moments(BLOCKS), _moments(BLOCKS[::-1]), whitening.moments(ROWS)):
      assert found.count == 90
      np.testing.assert_allclose(found.mean, ROWS.mean(0), rtol=1e-13)
      np.testing.assert_allclose(found.covariance, np.cov(ROWS.T), rtol=1e-11, atol=1e-11)

  def test_components_are_those_of_incremental_pca(self):
    expected = IncrementalPCA()
    for block in BLOCKS:  # each has more rows than columns: nothing is cut off
      expected.partial_fit(block)
    found = whitening.principal_components(_moments(BLOCKS))
    np.testing.assert_allclose(found.variance, expected.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(found.ratio, expected.explained_variance_ratio_, rtol=1e-9)
    signs = np.sign(np.sum(found.axes * expected.components_, axis=1))
    np.testing.assert_allclose(found.axes, signs[:, None] * expected.components_, atol=1e-8)
    assert (found.axes.max(1) == np.abs(found.axes).max(1)).all()

  def test_components_that_are_needed(self):
    found = whitening.Components(np.zeros(3), np.array([0.5, 0.25, 0.25 - 1e-12]), np.eye(3))
    assert [found.needed(share) for share in (0.1, 0.5, 0.51, 0.75, 1.0)] == [1, 1, 2, 2, 3]

  def test_shrinkage(self):
    covariance = np.cov(ROWS.T)
    np.testing.assert_allclose(
        whitening.shrunk(covariance, 0.07), shrunk_covariance(covariance, 0.07), rtol=1e-10)
    flat = whitening.shrunk(np.diag([1.0, 0.0]), 0)  # no direction is without variance
    np.testing.assert_allclose(flat, np.diag([1.0, 0.5e-8]), rtol=1e-6, atol=1e-20)

  def test_what_is_whitened_has_the_identity(self):
    covariance = np.cov(ROWS.T)
    rows = (ROWS - ROWS.mean(0)) @ whitening.whitening_matrix(covariance).T
    np.testing.assert_allclose(np.cov(rows.T), np.eye(6), atol=1e-9)

  def test_a_covariance_without_a_factor(self):
    found = whitening.whitening_matrix(np.diag([1.0, -1e-9]))
    np.testing.assert_allclose(found[1, 1], (1e-8 - 1e-9) ** -0.5)
    with pytest.raises(ValueError, match='not positive'):
      whitening.whitening_matrix(-2 * np.eye(2))

  def test_vectors_that_are_equal(self):
    with pytest.raises(ValueError, match='All 3 vectors are equal'):
      whitening.principal_components(whitening.moments(np.ones((3, 2))))


DETECTOR = MHPatchCore('mean', bank_patches=30, block_images=1, block_patches=12, support_neighbors=3)
GOOD = small.images(7)


def _outermost(points, rows, size):
  """Selects rows of points from the outermost on; all, in their order, where there are no more."""
  if len(rows) <= size:
    return rows
  picks, own = [], points[rows]
  distances = np.linalg.norm(own - own.mean(0), axis=1)
  while len(picks) < size:
    picks.append(int(distances.argmax()))
    nearer = np.linalg.norm(own - own[picks[-1]], axis=1)
    distances = np.minimum(distances, nearer) if len(picks) > 1 else nearer
  return rows[picks]


def _bank_of(points, per_block):
  """The rows of the bank, by the definition: a counter of blocks in base two."""
  levels = {}
  for begin in range(0, len(points), per_block):
    part, level = _outermost(points, np.arange(begin, min(begin + per_block, len(points))), 12), 0
    while level in levels:
      part, level = _outermost(points, np.concatenate([levels.pop(level), part]), 12), level + 1
    levels[level] = part
  return _outermost(points, np.concatenate([levels[level] for level in sorted(levels)]), 30)


@pytest.fixture(scope='module')
def fitted():
  lines = []
  return DETECTOR.fit(small.data(GOOD), (small.backbone(),), Run(notify=lines.append)), lines


@pytest.fixture(scope='module')
def whitened():
  """Makes images what whitens them by the definition, in float64: [n * 48, k]."""
  def embedded(images):
    found, _ = patchcore.embed(small.backbone(), small.data(images), embedding=EmbeddingSpec('mean'))
    return found.reshape(-1, found.shape[-1]).astype(np.float64)

  points = embedded(GOOD)
  variance, axes = np.linalg.eigh(np.cov(points.T))
  variance, axes = variance[::-1], axes[:, ::-1]
  kept = int(np.argmax(np.cumsum(variance) / variance.sum() >= 0.99)) + 1
  scale = np.sqrt(0.93 * variance[:kept] + 0.07 * variance[:kept].mean())
  assert 1 < kept < points.shape[1]
  return lambda images: (embedded(images) - points.mean(0)) @ axes[:, :kept] / scale


class TestFit:

  def test_the_bank_by_definition(self, fitted, whitened):
    model, lines = fitted
    points = whitened(GOOD)
    expected = _bank_of(points, 48)
    np.testing.assert_array_equal(model.arrays['indices'], expected)
    signs = np.sign(np.sum(model.arrays['embeddings'] * points[expected], axis=0))
    np.testing.assert_allclose(model.arrays['embeddings'], signs * points[expected], rtol=0, atol=1e-4)
    (line,) = lines
    assert line.startswith(
        f'30 of {7 * 48} patches, of {points.shape[1]} of 18 values, which have 99 % of the variance; every')
    reached = np.linalg.norm(points[:, None] - points[expected], axis=-1).min(1).max()
    assert reached <= float(line.split()[-5])

  def test_scores_by_definition(self, fitted, whitened):
    model, _ = fitted
    new = small.images(3, 7)
    rows = whitened(GOOD)[model.arrays['indices']]
    squares = np.square(whitened(new).reshape(3, 48, 1, -1) - rows).sum(-1)
    found = small.predict(DETECTOR, model, new)
    expected = []
    for each in squares:
      worst = each.min(1).argmax()
      nearest = each[worst].argmin()
      others = np.square(rows - rows[nearest]).sum(1).argsort(kind='stable')[:3]
      weights = np.exp(each[worst][others] - each[worst][others].max())
      expected.append((1 - weights[0] / weights.sum()) * each[worst, nearest])
    np.testing.assert_allclose(found.image, expected, rtol=1e-4)
    np.testing.assert_array_equal(found.evidence['patch'], squares.min(-1).argmax(-1))

  def test_batches_have_no_influence_on_the_bank(self, fitted):
    model = small.fit(DETECTOR, GOOD, batch_size=3)
    np.testing.assert_array_equal(model.arrays['indices'], fitted[0].arrays['indices'])


@pytest.mark.parametrize('fields, message', [
    ({'embedding': 'other'}, "embedding='other'"), ({'variance': 0.0}, 'variance=0.0'),
    ({'variance': 1.1}, 'variance=1.1'), ({'shrinkage': -0.1}, 'shrinkage=-0.1'),
    ({'bank_patches': 0}, 'bank_patches=0'), ({'block_images': 0}, 'block_images=0'),
    ({'block_patches': 0}, 'block_patches=0'), ({'support_neighbors': 0}, 'support_neighbors=0'),
    ({'sigma': -1.0}, 'sigma=-1.0')])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    MHPatchCore(**fields)
