"""GeoTrans: its transformations, network and Dirichlet distributions, and scores by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.special import digamma, gammaln

from patchcore_jax.detectors import GeoTrans, geotrans
from patchcore_jax.detectors.trained import adam
from tests import trained

SMALL = GeoTrans(size=32, batch_size=4, width=1, at_once=3)
EVERY = jnp.arange(72)


@pytest.fixture(scope='module')
def all_of_one():
  """An image of noise, and what each transformation makes of it."""
  image = np.random.default_rng(0).random((32, 32, 2)).astype(np.float32)
  return image, np.array(jax.jit(geotrans.transformed)(jnp.repeat(image[None], 72, axis=0), EVERY))


class TestTransformations:

  def test_are_72_different_ones(self, all_of_one):
    image, found = all_of_one
    np.testing.assert_array_equal(found[0], image)
    assert len(np.unique(found.reshape(72, -1), axis=0)) == 72
    assert geotrans.TRANSFORMATIONS[71].tolist() == [1, 1, 1, 3]

  def test_equal_numpy(self, all_of_one):
    """Mirrored, moved within mirrored borders, and turned, in that order."""
    image, found = all_of_one
    for (mirrored, down, right, turns), one in zip(geotrans.TRANSFORMATIONS, found):
      expected = image[:, ::-1] if mirrored else image
      expected = np.pad(expected, ((8, 8), (8, 8), (0, 0)), 'symmetric')
      expected = expected[8 + 8 * down:, 8 + 8 * right:][:32, :32]
      np.testing.assert_array_equal(one, np.rot90(expected, turns))

  def test_keep_the_middle(self, all_of_one):
    """Only the eight that do not move are bijections; of the others the opposite brings back the middle."""
    image, found = all_of_one
    moved = geotrans.TRANSFORMATIONS[:, 1:3].any(axis=1)
    assert (~moved).sum() == 8
    pixels = np.sort(image.ravel())
    for row, one in zip(moved, found):
      assert (np.sort(one.ravel()) == pixels).all() == (not row)
    rows = geotrans.TRANSFORMATIONS.tolist()
    there, back = (rows.index([0, sign, -sign, 0]) for sign in (1, -1))
    again = geotrans.transformed(jnp.asarray(found[there][None]), jnp.array([back]))[0]
    np.testing.assert_array_equal(again[8:24, 8:24], image[8:24, 8:24])
    assert (again != image).any()


def test_size_is_the_authors():
  shapes = jax.eval_shape(
      lambda key: geotrans.WideResNet(10, 4).init(key, jnp.zeros((1, 32, 32, 3)), False), jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == 1_214_744


class TestDirichlet:

  def test_equals_scipy_s_maximum(self):
    draws = np.random.default_rng(0).dirichlet([0.5, 2, 0.8, 4], 4000)
    logs = np.log(draws)

    def loss(log_alpha):
      alpha = np.exp(log_alpha)
      return -(gammaln(alpha.sum()) - gammaln(alpha).sum() + ((alpha - 1) * logs.mean(axis=0)).sum())

    def slope(log_alpha):
      alpha = np.exp(log_alpha)
      return -alpha * (digamma(alpha.sum()) - digamma(alpha) + logs.mean(axis=0))

    best = optimize.minimize(loss, np.zeros(4), jac=slope, method='BFGS', options={'gtol': 1e-10})
    np.testing.assert_allclose(geotrans.dirichlet(logs), np.exp(best.x), rtol=1e-5)

  def test_inverse_digamma(self):
    values = np.linspace(-20, 5, 200)
    np.testing.assert_allclose(digamma(geotrans.inverse_digamma(values)), values, atol=1e-8)

  def test_a_probability_of_zero_leaves_it_finite(self):
    logs = np.log(np.random.default_rng(0).dirichlet(np.ones(5), 30))
    logs[3, 2] = -np.inf
    assert np.isfinite(geotrans.dirichlet(logs)).all()

  def test_answers_that_are_all_the_same_leave_it_finite(self):
    assert np.isfinite(geotrans.dirichlet(np.full((10, 72), -np.log(72)))).all()


class TestScores:

  @pytest.fixture
  def answering(self, monkeypatch):
    """Has the network answer by a function of the images; returns the method of a detector."""
    def use(fn, **changes):
      monkeypatch.setattr(geotrans.WideResNet, '__call__', lambda self, x, train: fn(x))
      return geotrans.method.__wrapped__(dataclasses.replace(SMALL, **changes))
    return use

  IMAGES = trained.parts(6, 32)
  NOTHING = {'params': {}, 'batch_stats': {}}

  def test_of_a_network_that_knows_nothing_are_equal(self, answering):
    method = answering(lambda x: jnp.zeros((len(x), 72)))
    finished = method.finish(self.NOTHING, self.IMAGES, self.IMAGES[:0])
    scores = method.score({**self.NOTHING, 'finished': finished}, self.IMAGES).image
    np.testing.assert_allclose(scores, scores[0], rtol=1e-6)

  @pytest.mark.parametrize('score', ['dirichlet', 'simple'])
  def test_by_hand(self, answering, score):
    weights = np.random.default_rng(0).standard_normal((32, 72)).astype(np.float32)
    method = answering(lambda x: 4 * x.mean(axis=(1, 3)) @ weights, score=score)
    finished = method.finish(self.NOTHING, self.IMAGES, self.IMAGES[:0])
    scores = method.score({**self.NOTHING, 'finished': finished}, self.IMAGES)
    assert scores.map is None
    x = 2 * (self.IMAGES / 255) - 1
    total = 0.0
    for i in range(72):
      moved = np.array(geotrans.transformed(jnp.asarray(x), jnp.full(6, i)), np.float64)
      logits = 4 * moved.mean(axis=(1, 3)) @ weights
      logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
      if score == 'simple':
        total += np.exp(logs[:, i])
      else:
        total += ((geotrans.dirichlet(logs) - 1) * logs).sum(axis=1)
    np.testing.assert_allclose(scores.image, -total / 72, rtol=1e-3)


def test_step_has_different_transformations_of_each_image(monkeypatch):
  seen = []
  monkeypatch.setattr(geotrans, 'transformed', lambda x, which: seen.append(which) or x)
  monkeypatch.setattr(geotrans.WideResNet, '__call__', lambda self, x, train: jnp.zeros((len(x), 72)))
  loss = geotrans.method.__wrapped__(SMALL).loss(
      {'params': {}, 'batch_stats': {}}, trained.parts(4, 32), jax.random.key(0))
  assert float(loss) == pytest.approx(np.log(72), rel=1e-5)
  assert all(len(set(row)) == 3 for row in np.reshape(seen[0], (4, 3)).tolist())


def test_decay_is_the_slope_of_the_penalty():
  """Keras's half of 5e-4 times the squared weights has the slope 5e-4 times these."""
  decayed, plain = (adam(1e-3, decay=decay, eps=1e-7) for decay in (5e-4, 0.0))
  weight, slope = jnp.array([2.0, -1.0]), jnp.array([1e-4, 3e-4])
  found, _ = decayed.update(slope, decayed.init(weight), weight)
  expected, _ = plain.update(slope + jax.grad(lambda w: 0.5 * 5e-4 * jnp.square(w).sum())(weight),
                             plain.init(weight), weight)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_learns_parts():
  trained.assert_learns(GeoTrans(batch_size=8, steps=200, at_once=8), factor=1.5)


@pytest.mark.parametrize('changes, words', [
    ({'size': 48}, 'geotrans.size=48: expected a multiple of 32'),
    ({'depth': 12}, 'geotrans.depth=12: expected 6 n'),
    ({'at_once': 73}, 'geotrans.at_once=73: expected 1 to 72'),
    ({'score': 'mean'}, "geotrans.score='mean': expected one of dirichlet, simple")])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    GeoTrans(**changes)
