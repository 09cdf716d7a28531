"""gamma-VAE: its network, its loss, its stop, and that it learns. What moves images has a test of its own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.detectors import GammaVAE, gamma_vae
from patchcore_jax.learned import latent
from tests import trained

SMALL = GammaVAE(size=16, latent=4, batch_size=4)


def started(detector, seed=0):
  """Makes the method, and its variables as they start."""
  method = gamma_vae.method(detector)
  return method, method.task.init(jax.random.key(seed))['variables']


@pytest.fixture
def restoring(monkeypatch):
  """Has the network restore images by a given function."""
  def restore(fn):
    monkeypatch.setattr(gamma_vae.Network, 'restored', lambda network, x: fn(x))
    gamma_vae.method.cache_clear()
  yield restore
  gamma_vae.method.cache_clear()


def test_parameters_are_those_of_ae_ssim_and_two_heads():
  network = gamma_vae.Network(128, 100)
  key = jax.random.key(0)
  variables = jax.eval_shape(network.init, key, jnp.zeros((1, 128, 128, 3)), key)
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
  assert count == 1_050_599 + 2 * (100 * 100 + 100) + 1


def test_the_best_variance_is_the_mean_squared_error():
  errors, count = jnp.array([3.0, 5.0]), 40
  best = jnp.log(errors.mean() / count)
  loss = jax.value_and_grad(lambda v: latent.gaussian_loss(errors, count, v).mean())
  value, slope = loss(best)
  assert abs(float(slope)) < 1e-5 and value < min(loss(best - 0.1)[0], loss(best + 0.1)[0])
  np.testing.assert_allclose(value, 20 * (math.log(2 * math.pi * 0.1) + 1), rtol=1e-6)
  assert np.isfinite(latent.gaussian_loss(jnp.zeros(1), count, jnp.array(-1e9)))


@pytest.mark.slow
def test_loss_by_hand():
  images, key = trained.parts(4, 16), jax.random.key(3)
  drawing = jax.random.split(key)[1]
  losses = []
  for rate in (20.0, 0.0):
    method, variables = started(dataclasses.replace(SMALL, variance_rate=rate))
    variables['params']['log_gamma'] = jnp.array(-0.1)
    x = images / np.float32(255)
    restored, kl, _ = jax.jit(gamma_vae.Network(16, 4).apply)(variables, x, drawing)
    errors = np.square(x - restored).sum(axis=(1, 2, 3))
    gamma = math.exp(20 * -0.1) if rate else errors.mean() / 768
    expected = (384 * math.log(2 * math.pi * gamma) + errors / (2 * gamma) + kl).mean()
    np.testing.assert_allclose(jax.jit(method.loss)(variables, images, key), expected, rtol=1e-4)
    losses.append(expected)
  assert losses[1] < losses[0]


def test_moves_stop_at_the_least_error_of_the_training_images(restoring):
  restoring(jnp.zeros_like)
  images = trained.parts(40, 16)  # more than are computed together
  images[37] //= 2
  method = gamma_vae.method(SMALL)
  expected = np.square(images / 255).sum(axis=(1, 2, 3))
  assert np.argmin(expected) == 37
  np.testing.assert_allclose(method.finish({}, images, images[:0])['stop'], expected.min(), rtol=1e-5)


def test_an_image_that_is_restored_as_it_is_has_an_empty_map(restoring):
  restoring(lambda x: x)
  for kind in ('projection', 'residual'):
    scores = gamma_vae.method(dataclasses.replace(SMALL, map=kind)).score(
        {'finished': {'stop': 0.0}}, trained.parts(2, 16))
    assert not scores.map.any() and not scores.image.any()


def test_maps_are_how_far_pixels_moved(restoring):
  restoring(lambda x: jnp.full_like(x, 0.5))
  images = np.full((1, 16, 16, 3), 255, np.uint8)
  score = {kind: gamma_vae.method(dataclasses.replace(SMALL, moves=1, map=kind, closeness=0.0)).score
           for kind in ('projection', 'residual')}
  scores = score['projection']({'finished': {'stop': 0.0}}, images)
  np.testing.assert_allclose(scores.map, 0.5 * 2 * 0.5 ** 3, rtol=1e-5)
  assert (scores.evidence['moves'].tolist(), scores.evidence['halvings'].tolist()) == ([1], [0])
  scores = score['residual']({'finished': {'stop': 0.0}}, images)
  np.testing.assert_allclose(scores.map, 0.5, rtol=1e-5)
  assert scores.evidence == {}


def test_settings_of_scoring_have_an_effect(restoring):
  restoring(lambda x: x / 2)
  images = np.full((1, 16, 16, 3), 255, np.uint8)

  def moved(**changes):
    detector = dataclasses.replace(SMALL, moves=1, **changes)
    return float(gamma_vae.method(detector).score({'finished': {'stop': 0.0}}, images).image[0])

  # The gradient is x / 2, or x where it does not pass the network; the squared residual 1 / 4.
  np.testing.assert_allclose(moved(), 0.5 * 0.5 / 4, rtol=1e-5)
  np.testing.assert_allclose(moved(through_network=False), 0.5 / 4, rtol=1e-5)
  np.testing.assert_allclose(moved(rate=0.25), 0.25 * 0.5 / 4, rtol=1e-5)
  detector = dataclasses.replace(SMALL, moves=3)
  score = {weight: gamma_vae.method(dataclasses.replace(detector, closeness=weight)).score
           for weight in (0.0, 0.3)}
  plain, close = (score[weight]({'finished': {'stop': 0.0}}, images).image[0] for weight in score)
  assert moved() < close < plain


@pytest.mark.slow
def test_learns_parts():
  # The loss has no least value: it falls below 0.
  trained.assert_learns(
      GammaVAE(size=64, batch_size=16, steps=150, learning_rate=2e-3, latent=16), factor=2, level=0.95)


@pytest.mark.slow
def test_learns_parts_in_pieces():
  trained.assert_learns(
      GammaVAE(size=64, crop=32, batch_size=16, steps=100, learning_rate=2e-3, latent=16, stride=16,
               moves=10),
      factor=2)


@pytest.mark.parametrize('changes, words', [
    ({'size': 100}, 'gamma_vae.size=100: expected a multiple of 16'),
    ({'map': 'heat'}, "gamma_vae.map='heat': expected one of projection, residual"),
    ({'moves': 0}, 'gamma_vae.moves=0, rate=0.5: expected at least 1, and more than 0'),
    ({'rate': 0.0}, 'gamma_vae.moves=50, rate=0.0: expected'),
    ({'closeness': -1.0}, 'closeness=-1.0: expected 0 or more'),
    ({'crop': 256}, 'gamma_vae.crop=256: expected a multiple of 16, at most size=128')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    GammaVAE(**changes)
