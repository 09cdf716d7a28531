"""Attention of a network by gradients (Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks
via Gradient-based Localization", ICCV 2017), as functions that can be differentiated again.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

NORMALISATIONS = ('sigmoid', 'minmax')


def weights(scalar_fn: Callable[[jax.Array], jax.Array], features: jax.Array) -> jax.Array:
  """Computes how much each channel of the features counts for a number that a network makes of them.

  Args:
    scalar_fn: features [b, h, w, c] -> [b], where each number depends on the features of its image alone.
    features: of a layer, [b, h, w, c].

  Returns:
    [b, c], the mean of the gradient over positions.

  >>> features = jnp.ones((1, 2, 2, 1))
  >>> weights(lambda x: 3 * x.sum(axis=(1, 2, 3)), features).tolist()
  [[3.0]]
  """
  # Each number has a gradient in its own image only, so that the gradient of their sum is all of them.
  return jax.grad(lambda x: scalar_fn(x).sum())(features).mean(axis=(1, 2))


def combined(channel_weights: jax.Array, features: jax.Array) -> jax.Array:
  """Adds up the channels by their weights: [b, c] and [b, h, w, c] -> [b, h, w], of any sign."""
  return jnp.einsum('bc,bhwc->bhw', channel_weights, features)


def normalised(maps: jax.Array, how: str) -> jax.Array:
  """Brings maps [b, h, w] to the range from 0 to 1, each by itself.

  Args:
    how: 'sigmoid', which leaves what is positive between 1/2 and 1; or 'minmax', by the least and the largest
      value of each map, where a map of one value becomes 0.

  >>> normalised(jnp.array([[[1.0, 2.0, 5.0]]]), 'minmax').tolist()
  [[[0.0, 0.25, 1.0]]]
  """
  if how == 'sigmoid':
    return jax.nn.sigmoid(maps)
  least, most = (reduce(axis=(1, 2), keepdims=True) for reduce in (maps.min, maps.max))
  spread = most - least
  return (maps - least) / jnp.where(spread > 0, spread, 1)
