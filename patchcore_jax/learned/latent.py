"""Latent codes of variational auto-encoders (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014).

A code is not one point but a normal distribution, independent in each number: its mean and the logarithm of
its variance, [b, ...] each.
"""

import math

import jax
import jax.numpy as jnp

_LEAST_LOG_VARIANCE = -10.0  # of a decoder: an image that is restored exactly would need none at all


def sample(mean: jax.Array, log_variance: jax.Array, key: jax.Array) -> jax.Array:
  """Draws one code from each distribution, in a way that has gradients with regard to both arguments."""
  return mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)


def kl(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
  """Computes the Kullback-Leibler divergence from N(0, I), summed over all numbers of an image's code: [b].

  >>> kl(jnp.array([[0.0, 0.0], [1.0, -2.0]]), jnp.zeros((2, 2))).tolist()
  [0.0, 2.5]
  """
  each = jnp.exp(log_variance) + mean ** 2 - 1 - log_variance
  return 0.5 * each.sum(axis=tuple(range(1, each.ndim)))


def gaussian_loss(squared_error: jax.Array, count: int, log_variance: jax.Array) -> jax.Array:
  """Computes minus the logarithm of the likelihood of images under N(restored, variance I): [b].

  Its minimum over the variance is where that is the mean squared error of a value.

  Args:
    squared_error: [b], summed over the values of an image.
    count: how many values an image has.
    log_variance: (), one for all values; at least -10 is taken, so that the loss stays finite.
  """
  log_variance = jnp.maximum(log_variance, _LEAST_LOG_VARIANCE)
  return 0.5 * (count * (math.log(2 * math.pi) + log_variance) + squared_error * jnp.exp(-log_variance))
