"""Overlapping tiles of images that are larger than a network takes, and their blend."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def starts(length: int, size: int, stride: int) -> list[int]:
  """Lists where tiles begin along an axis; the last one is flush with the end.

  >>> starts(256, 128, 50)
  [0, 50, 100, 128]
  """
  return sorted({*range(0, length - size + 1, stride), length - size})


def blended(images: jax.Array, size: int, stride: int, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Computes `fn` of every tile, and the mean of all tiles that cover a pixel.

  Args:
    images: [b, h, w, c].
    size: side of a tile, at most h and w.
    stride: between two tiles.
    fn: [b, size, size, c] -> [b, size, size, d].

  Returns:
    [b, h, w, d].
  """
  h, w = images.shape[1:3]
  corners = [(y, x) for y in starts(h, size, stride) for x in starts(w, size, stride)]
  tiles = jnp.concatenate([images[:, y:y + size, x:x + size] for y, x in corners])
  total, covers = 0.0, np.zeros((h, w, 1), np.float32)
  for (y, x), found in zip(corners, jnp.split(fn(tiles), len(corners)), strict=True):
    total += jnp.pad(found, ((0, 0), (y, h - size - y), (x, w - size - x), (0, 0)))
    covers[y:y + size, x:x + size] += 1
  return total / covers.astype(images.dtype)
