"""Attention by gradients: hand cases, and what keeps images apart."""

import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax.learned import attention

FEATURES = jax.random.normal(jax.random.key(0), (3, 4, 5, 2))
KERNEL = jax.random.normal(jax.random.key(1), (4, 5, 2))


def _linear(features):
  return (KERNEL * features).sum(axis=(1, 2, 3))


def test_of_a_linear_scalar_by_hand():
  found = attention.weights(_linear, FEATURES)
  np.testing.assert_allclose(found, np.tile(KERNEL.mean(axis=(0, 1)), (3, 1)), rtol=1e-6)
  expected = sum(KERNEL[..., k].mean() * FEATURES[..., k] for k in range(2))
  np.testing.assert_allclose(attention.combined(found, FEATURES), expected, rtol=1e-5, atol=1e-6)


def test_images_do_not_mix():
  def scalar(features):
    return jnp.square(_linear(features))

  together = attention.weights(scalar, FEATURES)
  for i in range(3):
    np.testing.assert_allclose(attention.weights(scalar, FEATURES[i:i + 1])[0], together[i], rtol=1e-5)


def test_normalised_each_by_itself():
  maps = attention.combined(attention.weights(_linear, FEATURES), FEATURES)
  for how in attention.NORMALISATIONS:
    found = attention.normalised(maps, how)
    assert (found >= 0).all() and (found <= 1).all()
    np.testing.assert_allclose(attention.normalised(maps[1:2], how)[0], found[1], rtol=1e-6)
  found = attention.normalised(maps, 'minmax')
  np.testing.assert_allclose(found.min(axis=(1, 2)), 0)
  np.testing.assert_allclose(found.max(axis=(1, 2)), 1)
  gradient = jax.grad(lambda x: attention.normalised(x, 'minmax').sum())(jnp.full((1, 2, 2), 3.0))
  assert np.isfinite(gradient).all()  # of a flat map


def test_can_be_differentiated_again():
  def loss(scale):  # of weights that depend on a parameter: 2 scale^2 x, twice in the weights
    return attention.combined(
        attention.weights(lambda x: jnp.square(scale * x).sum(axis=(1, 2, 3)), FEATURES), FEATURES).sum()

  np.testing.assert_allclose(jax.grad(loss)(3.0), 2 * loss(3.0) / 3.0, rtol=1e-5)
