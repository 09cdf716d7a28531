"""DSEBM: its energy, the gradient that is the reconstruction error, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.detectors import DSEBM, dsebm
from patchcore_jax.learned import starts, transforms
from tests import trained

SMALL = DSEBM(size=16, batch_size=4, filters=4, hidden=8)
NETWORK = dsebm.Energy(4, 8, 'relu')
IMAGES = trained.parts(4, 16)
X = 2 * transforms.scaled(jnp.asarray(IMAGES)) - 1


@pytest.fixture(scope='module')
def variables():
  """Variables of a network whose prior and statistics are not those of the start."""
  rng = np.random.default_rng(0)
  start = jax.device_get(starts.variables(NETWORK, jax.random.key(0), X, False))
  return jax.tree.map(lambda leaf: leaf + rng.uniform(0, 0.3, leaf.shape).astype(np.float32), start)


def _of_zero_features(variables, prior):
  """Makes the encoder give zeros for every image."""
  dense = {name: np.zeros_like(leaf) for name, leaf in variables['params']['encoder']['Dense_0'].items()}
  return {**variables, 'params': {
      'prior': prior, 'encoder': {**variables['params']['encoder'], 'Dense_0': dense}}}


@functools.partial(jax.jit, static_argnums=2)
def _both(variables, x, train=False):
  return dsebm.with_gradient(
      lambda x: NETWORK.apply(variables, x, train, mutable=['batch_stats'])[0], x)


@jax.jit
def _loss(variables, key):
  return dsebm.method(SMALL).loss(variables, IMAGES, key)


@pytest.mark.parametrize('size, expected', [(32, 1_423_616), (64, 3_660_000)])
def test_parameters_are_the_reference_s(size, expected):
  params = dsebm.method(DSEBM(size=size)).task.init(jax.random.key(0))['variables']['params']
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert abs(count - expected) <= (0 if size == 32 else 5_000)  # of what is told in millions
  assert params['encoder']['Dense_0']['kernel'].shape == (4 * 4 * size * 8, 256)
  assert params['prior'].shape == (size, size, 3)


class TestEnergy:

  def test_of_one_linear_layer_by_hand(self, monkeypatch):
    """f(x) = b + W 1[W'x > 0] for E(x) = |x - b|^2 / 2 - sum relu(W'x), in float64."""
    rng = np.random.default_rng(0)
    x, prior, weights = rng.normal(size=(5, 2, 2, 3)), rng.normal(size=(2, 2, 3)), rng.normal(size=(12, 7))
    monkeypatch.setattr(
        dsebm.Encoder, '__call__', lambda encoder, x, train: jax.nn.relu(x.reshape(len(x), -1) @ weights))
    with jax.enable_x64(True):
      energies, gradients = jax.device_get(dsebm.with_gradient(
          lambda x: NETWORK.apply({'params': {'prior': prior}}, x, False), jnp.asarray(x)))
    features = x.reshape(5, -1) @ weights
    restored = prior.ravel() + (features > 0) @ weights.T
    np.testing.assert_allclose((x - gradients).reshape(5, -1), restored, rtol=1e-13)
    np.testing.assert_allclose(
        energies, 0.5 * ((x - prior) ** 2).sum(axis=(1, 2, 3)) - features.clip(0).sum(axis=1), rtol=1e-13)

  @pytest.mark.parametrize('activation', ['relu', 'softplus'])
  def test_gradient_equals_differences(self, variables, activation):
    network = dsebm.Energy(4, 8, activation)
    with jax.enable_x64(True):
      exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
      energy = jax.jit(lambda x: network.apply(exact, x, False))
      x = jnp.asarray(np.asarray(X[:1]), jnp.float64)
      _, gradient = jax.jit(lambda x: dsebm.with_gradient(energy, x))(x)
      for way in np.random.default_rng(0).normal(size=(5, *x.shape)):
        slope = (energy(x + 1e-6 * way) - energy(x - 1e-6 * way))[0] / 2e-6
        assert float((gradient * way).sum()) == pytest.approx(float(slope), rel=1e-6)

  def test_does_not_depend_on_other_images(self, variables):
    energies, gradients = _both(variables, X)
    order = np.array([2, 2, 0, 2])
    again, other = _both(variables, X[order])
    np.testing.assert_allclose(again, energies[order], rtol=1e-5)
    np.testing.assert_allclose(other, gradients[order], rtol=1e-4, atol=1e-5)

  def test_in_training_it_does(self, variables):
    energies, _ = _both(variables, X, True)
    assert abs(_both(variables, X[np.array([0, 0, 0, 1])], True)[0][0] - energies[0]) > 1e-2

  def test_without_features_every_image_is_restored_as_the_prior(self, variables):
    zeros = _of_zero_features(variables, variables['params']['prior'])
    energies, gradients = _both(zeros, X)
    np.testing.assert_allclose(X - gradients, np.broadcast_to(zeros['params']['prior'], X.shape), atol=1e-6)
    np.testing.assert_allclose(energies, 0.5 * np.square(gradients).sum(axis=(1, 2, 3)), rtol=1e-5)


class TestLoss:

  def test_is_the_variance_of_pixels_about_the_best_prior(self, variables):
    """The loss is that where there are no features, whatever the noise; and the mean image is the best."""
    mean = np.asarray(X).mean(axis=0)
    best = float(_loss(_of_zero_features(variables, mean), jax.random.key(3)))
    assert best == pytest.approx(float(np.asarray(X, np.float64).var(axis=0).mean()), rel=1e-5)
    for way in np.random.default_rng(0).normal(0, 0.1, (2, *mean.shape)).astype(np.float32):
      other = float(_loss(_of_zero_features(variables, mean + way), jax.random.key(4)))
      assert other == pytest.approx(best + float(np.square(way).mean()), rel=1e-4)

  def test_compares_images_with_what_is_restored_of_noisy_ones(self, variables):
    key = jax.random.key(5)
    noisy = X + 0.5 * jax.random.normal(key, X.shape)
    _, gradients = _both(variables, noisy)
    assert float(_loss(variables, key)) == pytest.approx(
        float(jnp.square(X - (noisy - gradients)).mean()), rel=1e-5)


def test_scores(variables):
  energies, gradients = _both(variables, X)
  squares = np.square(gradients).sum(axis=-1)
  for score, expected in (('energy', energies), ('reconstruction', squares.sum(axis=(1, 2)))):
    detector = DSEBM(size=16, batch_size=4, filters=4, hidden=8, score=score)
    scores = jax.jit(dsebm.method(detector).score)(variables, IMAGES)
    np.testing.assert_allclose(scores.image, expected, rtol=1e-4)
    np.testing.assert_allclose(scores.map, squares, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_learns_parts():
  trained.assert_learns(DSEBM(size=32, batch_size=16, steps=150, filters=16, hidden=64), factor=2, level=0.99)


@pytest.mark.parametrize('changes, words', [
    ({'size': 48}, 'dsebm.size=48: expected a power of two'),
    ({'score': 'map'}, "dsebm.score='map': expected one of energy, reconstruction"),
    ({'activation': 'tanh'}, "dsebm.activation='tanh': expected one of relu, softplus"),
    ({'hidden': 0}, 'dsebm.filters=64, hidden=0: expected at least 1'),
    ({'noise': 0.0}, 'dsebm.noise=0.0: expected more than 0')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    DSEBM(**changes)
