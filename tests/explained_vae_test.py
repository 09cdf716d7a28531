"""Visually explained VAE: its codes, its maps by hand, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.detectors import ExplainedVAE, explained_vae
from patchcore_jax.learned import attention, latent
from tests import trained

SMALL = ExplainedVAE(size=32, latent=3, width=4, batch_size=4)
IMAGES = trained.parts(3, 32)


def started(detector):
  """Makes the method, and variables of it with running statistics that are not those of the start."""
  method = explained_vae.method(detector)
  variables = method.task.init(jax.random.key(0))['variables']
  rng = np.random.default_rng(0)

  def other(path, leaf):
    low, high = (-0.1, 0.1) if path[-1].key == 'mean' else (0.5, 1.5)
    return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

  statistics = jax.tree_util.tree_map_with_path(other, variables['batch_stats'])
  return method, {**variables, 'batch_stats': statistics}


class TestCodes:

  def test_divergence_is_that_of_samples(self):
    mean, log_variance = jnp.array([[0.5, -1.0]]), jnp.array([[-1.0, 0.3]])
    n = 200_000
    codes = latent.sample(
        jnp.repeat(mean, n, axis=0), jnp.repeat(log_variance, n, axis=0), jax.random.key(0))
    np.testing.assert_allclose(codes.mean(axis=0), mean[0], atol=0.02)
    np.testing.assert_allclose(codes.var(axis=0), jnp.exp(log_variance[0]), rtol=0.02)
    of_code = -0.5 * ((codes - mean) ** 2 / jnp.exp(log_variance) + log_variance)
    of_normal = -0.5 * codes ** 2
    estimate = (of_code - of_normal).sum(axis=1).mean()
    np.testing.assert_allclose(latent.kl(mean, log_variance)[0], estimate, rtol=0.01)

  def test_divergence_of_maps_of_codes_is_summed(self):
    mean = jnp.ones((2, 3, 3, 5))
    np.testing.assert_allclose(latent.kl(mean, jnp.zeros_like(mean)), [22.5, 22.5])


class TestMaps:

  def test_of_a_linear_encoder_by_hand(self):
    rng = np.random.default_rng(0)
    features, matrix = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((5, 6))

    def codes(x):
      return x.mean(axis=(1, 2)) @ matrix

    by_latent = features @ matrix / 12  # a gradient of 1/12 of a column at every place
    found = explained_vae.attention_map(codes, jnp.asarray(features), 'mean_sum')
    np.testing.assert_allclose(found, abs(by_latent.sum(axis=-1)), atol=1e-5)
    found = explained_vae.attention_map(codes, jnp.asarray(features), 'per_latent')
    np.testing.assert_allclose(found, by_latent.clip(0).mean(axis=-1), atol=1e-5)

  def test_with_one_latent_both_inferences_agree(self):
    features = jax.random.normal(jax.random.key(0), (2, 4, 4, 5))

    def codes(x):
      return jnp.tanh(x[..., :1] * x[..., 1:2]).sum(axis=(1, 2))

    of_sum, of_each = (
        explained_vae.attention_map(codes, features, inference) for inference in ('mean_sum', 'per_latent'))
    signed = attention.combined(attention.weights(lambda x: codes(x)[:, 0], features), features)
    np.testing.assert_allclose(of_sum, abs(signed), atol=1e-6)
    np.testing.assert_allclose(of_each, jnp.maximum(signed, 0), atol=1e-6)
    assert (signed > 0).any() and (signed < 0).any()

  @pytest.mark.slow
  @pytest.mark.parametrize('inference', ['mean_sum', 'per_latent'])
  def test_are_of_the_images_size_and_of_one_image(self, inference):
    method, variables = started(dataclasses.replace(SMALL, inference=inference))
    scores = jax.jit(method.score)(variables, IMAGES)
    assert scores.map.shape == (3, 32, 32) and scores.map.min() >= 0 and scores.map.max() > 0
    np.testing.assert_array_equal(scores.image, scores.map.max(axis=(1, 2)))
    alone = jax.jit(method.score)(variables, IMAGES[1:2])
    np.testing.assert_allclose(alone.map[0], scores.map[1], atol=1e-5 * scores.map.max())

  def test_layers_have_their_place_in_the_network(self):
    _, variables = started(SMALL)
    network = explained_vae.Network(32, 3, 4)
    x = 2 * (IMAGES / np.float32(255)) - 1

    @jax.jit
    def seen(variables):
      maps = {layer: network.apply(variables, x, layer, method='features') for layer in (1, 2, 4)}
      codes = {layer: [network.apply(variables, x, layer, share * found, method='codes') for share in (1, 0)]
               for layer, found in maps.items()}
      return maps, codes

    maps, codes = seen(variables)
    assert [each.shape for each in maps.values()] == [(3, 16, 16, 4), (3, 8, 8, 8), (3, 2, 2, 32)]
    for same, other in codes.values():
      np.testing.assert_allclose(same, codes[1][0], atol=1e-5)
      assert abs(other - same).max() > 1e-3


def test_loss_by_hand():
  method, variables = started(dataclasses.replace(SMALL, deviation=0.2))
  key = jax.random.key(5)
  x = 2 * (IMAGES / np.float32(255)) - 1
  apply = jax.jit(explained_vae.Network(32, 3, 4).apply, static_argnums=3)
  restored, kl = apply(variables, x, jax.random.split(key)[1], False)
  assert restored.shape == x.shape
  expected = (np.square(x - restored).sum(axis=(1, 2, 3)) / 0.08 + kl).mean()
  np.testing.assert_allclose(jax.jit(method.loss)(variables, IMAGES, key), expected, rtol=1e-4)


@pytest.mark.slow
def test_a_decoder_of_zeros_has_a_finite_gradient():
  method, variables = started(SMALL)
  zeros = jax.tree.map(jnp.zeros_like, variables['params']['decoder'])
  variables['params'] = {**variables['params'], 'decoder': zeros}
  gradient = jax.jit(jax.grad(method.loss))(variables, IMAGES, jax.random.key(0))
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_learns_parts():
  # Its maps show what the code depends on, more than what is unusual: the square is among it.
  trained.assert_learns(
      ExplainedVAE(size=64, batch_size=16, steps=150, learning_rate=2e-3, latent=16, inference='per_latent'),
      factor=2, level=0.7)


@pytest.mark.parametrize('changes, words', [
    ({'size': 80}, 'explained_vae.size=80: expected a multiple of 32'),
    ({'layer': 5}, 'explained_vae.layer=5, turn=90.0: expected 1 to 4'),
    ({'inference': 'sum'}, "explained_vae.inference='sum': expected one of mean_sum, per_latent"),
    ({'flip': 'up'}, "explained_vae.flip='up': expected one of"),
    ({'deviation': 0.0}, 'explained_vae.latent=32, width=16, deviation=0.0: expected')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    ExplainedVAE(**changes)
