"""Structural similarity (Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility
to Structural Similarity", IEEE Transactions on Image Processing 13, 2004).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The constants of a range of 1: (0.01)^2 and (0.03)^2, or as the AE-SSIM paper writes them.
CONSTANTS = {'squared': (1e-4, 9e-4), 'as_written': (0.01, 0.03)}


def window(size: int, sigma: float) -> np.ndarray:
  """Computes the weights of a window along one axis, [size] float64 with the sum 1; uniform with sigma 0."""
  places = np.arange(size) - (size - 1) / 2
  weights = np.exp(-0.5 * (places / sigma) ** 2) if sigma else np.ones(size)
  return weights / weights.sum()


def similarity(
    x: jax.Array, y: jax.Array, *, size: int = 11, sigma: float = 1.5, constants: str = 'squared',
) -> jax.Array:
  """Computes SSIM at every window that lies wholly within the images, for each channel.

  Args:
    x, y: [b, h, w, c] in [0, 1].
    size: of the window, in pixels.
    sigma: standard deviation of its weights; 0 for equal ones. Moments are those of the window itself,
      without the correction for a sample.
    constants: one of `CONSTANTS`.

  Returns:
    [b, h - size + 1, w - size + 1, c], at most 1.

  >>> one = jnp.ones((1, 11, 11, 1))
  >>> float(similarity(one, one)[0, 0, 0, 0])
  1.0
  """
  first, second = CONSTANTS[constants]
  # Moments about the middle of the range, so that little cancels in float32.
  a, b = x - 0.5, y - 0.5
  moments = jnp.concatenate([a, b, a * a, b * b, a * b], axis=-1)
  mean_a, mean_b, aa, bb, ab = jnp.split(_averaged(moments, size, sigma), 5, axis=-1)
  spread = aa - mean_a * mean_a + bb - mean_b * mean_b
  shared = ab - mean_a * mean_b
  mean_x, mean_y = mean_a + 0.5, mean_b + 0.5
  light = (2 * mean_x * mean_y + first) / (mean_x * mean_x + mean_y * mean_y + first)
  return light * (2 * shared + second) / (spread + second)


def _averaged(x, size, sigma):
  """Averages over windows along both axes, by one product with a band matrix each."""
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  down, across = (_band(x.shape[axis], size, sigma) for axis in (1, 2))
  x = product('bhwc,hk->bkwc', x, down.astype(x.dtype))
  return product('bkwc,wl->bklc', x, across.astype(x.dtype))


def _band(length, size, sigma):
  """Computes the matrix [length, length - size + 1] that averages over windows."""
  matrix, weights = np.zeros((length, length - size + 1)), window(size, sigma)
  for i in range(matrix.shape[1]):
    matrix[i:i + size, i] = weights
  return matrix


def dissimilarity_map(x: jax.Array, y: jax.Array, **arguments) -> jax.Array:
  """Computes 1 - SSIM, the mean over channels, [b, h, w]: at the border, that of the nearest whole window.

  Args:
    **arguments: those of `similarity`.
  """
  found = 1 - similarity(x, y, **arguments).mean(axis=-1)
  missing = x.shape[1] - found.shape[1]
  before = missing // 2
  return jnp.pad(found, ((0, 0), (before, missing - before), (before, missing - before)), 'edge')
