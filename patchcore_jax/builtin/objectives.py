"""What a training step minimises: it is low where features of the same place are alike, and others not.

Each takes first and second [k, d] float32, the outputs of a head at k places in the first and the second
view, and weights [k] float32, 0 for places that only one view shows; and returns a scalar.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def info_nce(
    first: jax.Array, second: jax.Array, weights: jax.Array, *, temperature: float = 0.1
) -> jax.Array:
  """Computes how hard it is to find each place again among all of the batch, its own image included.

  The loss is the mean over both directions of -log softmax(cosine / temperature) (van den Oord et al. 2018;
  the normalised, symmetric form of Chen et al. 2020). Places of weight 0 are neither asked for nor offered.
  """
  first, second = _normalized(first), _normalized(second)
  logits = first @ second.T / temperature
  absent = jnp.where(weights > 0, 0.0, -1e9)
  right = jnp.diagonal(logits)
  loss = 0.5 * (jax.nn.logsumexp(logits + absent, axis=1)
                + jax.nn.logsumexp(logits + absent[:, None], axis=0)) - right
  return (loss * weights).sum() / weights.sum()


def _normalized(x):
  return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def vicreg(
    first: jax.Array, second: jax.Array, weights: jax.Array, *, invariance: float = 25.0,
    variance: float = 25.0, covariance: float = 1.0,
) -> jax.Array:
  """Computes a loss that is low where views agree, dimensions spread by at least 1, and none are related.

  It is that of Bardes et al. 2022, with places instead of images.
  """
  total = weights.sum()
  alike = (jnp.square(first - second).mean(-1) * weights).sum() / total

  def spread(x):
    x = (x - (x * weights[:, None]).sum(0) / total) * jnp.sqrt(weights)[:, None]
    matrix = x.T @ x / (total - 1)
    deviations = jnp.sqrt(jnp.diagonal(matrix) + 1e-4)
    related = jnp.square(matrix).sum() - jnp.square(jnp.diagonal(matrix)).sum()
    return jax.nn.relu(1 - deviations).mean(), related / x.shape[-1]

  (low_1, related_1), (low_2, related_2) = spread(first), spread(second)
  return invariance * alike + variance * (low_1 + low_2) / 2 + covariance * (related_1 + related_2)


OBJECTIVES: dict[str, Callable[..., jax.Array]] = {'info_nce': info_nce, 'vicreg': vicreg}
