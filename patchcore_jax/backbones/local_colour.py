"""A layer without weights: how light and how coloured each place is, against the whole image.

A network that is trained to see the same part in any light becomes blind to faint stains and to threads
of a wrong dye. This layer sees nothing else. The logarithm makes the light of a lamp, which multiplies, a
constant, and the mean of the image takes that away: the same part under a stronger or a redder lamp looks
the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NAME = 'colour'
STRIDE = 4
# These were chosen with the built-in data: docs/pretrained.md.
WINDOWS = (8, 16)
_LIGHTNESS, _COLOUR = 0.5, 3.0
# Added to values in 0..1, so that the noise of dark pixels does not count for more than that of light ones.
_DARK = 0.1


def local_colour(images: jax.Array) -> jax.Array:
  """Computes the lightness and the colour of every place, in two sizes of neighbourhood.

  Args:
    images: [b, h, w, 3] float32 RGB in 0..1.

  Returns:
    [b, ceil(h / 4), ceil(w / 4), 8] float32, cells centred as those of a ResNet's layer1. The values
    are, in a neighbourhood of 8 and in one of 16 pixels, the mean of the logarithm over the three channels,
    and what each channel has beyond it, both without their mean over the image.

  >>> grey = jnp.full((1, 8, 8, 3), 0.5).at[:, :, 4:].set(0.6)
  >>> dimmed = 0.9 * (grey + _DARK) - _DARK
  >>> bool(jnp.allclose(local_colour(grey), local_colour(dimmed), atol=1e-6))
  True
  """
  logs = jnp.log(jnp.maximum(images, 0) + _DARK)
  logs -= logs.mean(axis=(1, 2), keepdims=True)
  lightness = logs.mean(axis=-1, keepdims=True)
  values = jnp.concatenate([_LIGHTNESS * lightness, _COLOUR * (logs - lightness)], axis=-1)
  rows, columns = images.shape[1:3]
  return jnp.concatenate([
      jnp.einsum('yi,bijc,xj->byxc', _means(rows, window), values, _means(columns, window),
                 precision=lax.Precision.HIGHEST)
      for window in WINDOWS], axis=-1)


def _means(size: int, window: int) -> np.ndarray:
  """Makes the matrix [ceil(size / 4), size] float32 of means over a window around every fourth pixel.

  Beyond the edges the last pixel is repeated.
  """
  offsets = np.arange(-window // 2, window // 2 + 1)
  weights = np.where(np.abs(offsets) == window // 2, 0.5, 1.0) / window
  result = np.zeros((-(-size // STRIDE), size), np.float32)
  for row, centre in enumerate(range(0, size, STRIDE)):
    np.add.at(result[row], np.clip(centre + offsets, 0, size - 1), weights)
  return result
