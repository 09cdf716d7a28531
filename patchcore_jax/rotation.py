"""Turns images about their centre: more references from a few, in other orientations."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def tables(size: tuple[int, int], degrees: float) -> tuple[np.ndarray, np.ndarray]:
  """Finds which pixels each pixel of a turned image is made of: bilinear, borders mirrored without the edge.

  The canvas stays, and what leaves it is lost.

  Args:
    size: height and width, in pixels.
    degrees: the angle, counterclockwise as seen.

  Returns:
    Positions in the flattened image, [height * width, 4] int32, and their weights, float32.

  >>> taps, weights = tables((2, 2), 0)
  >>> taps[:, 0].tolist(), weights[:, 0].tolist()
  ([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0])
  """
  height, width = size
  y, x = np.mgrid[:height, :width] - np.array([height / 2, width / 2])[:, None, None]
  cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
  # Rounded, so that a quarter turn does not take a pixel of no weight for one of its own.
  source = [np.round(v, 9) for v in (sine * x + cosine * y + height / 2, cosine * x - sine * y + width / 2)]
  low = [np.floor(v).astype(int) for v in source]
  taps, weights = [], []
  for down in (0, 1):
    for right in (0, 1):
      row, column = (_mirrored(v + step, n) for v, step, n in zip(low, (down, right), size))
      taps.append(row * width + column)
      shares = (v - at if step else 1 - (v - at) for v, at, step in zip(source, low, (down, right)))
      weights.append(np.prod(list(shares), axis=0))
  return tuple(np.stack(values, -1).reshape(-1, 4).astype(dtype)
               for values, dtype in ((taps, np.int32), (weights, np.float32)))


def _mirrored(positions, n):
  """Continues positions beyond 0 .. n - 1 by mirrors at the centres of the edge pixels."""
  period = max(2 * (n - 1), 1)
  positions = positions % period
  return np.where(positions < n, positions, period - positions)


def turned(images: jax.Array, taps: jax.Array, weights: jax.Array) -> jax.Array:
  """Turns images [b, h, w, 3] uint8 by what `tables` made for their size; values are rounded."""
  pixels = images.reshape(len(images), -1, images.shape[-1]).astype(jnp.float32)
  # One tap after the other: all at once would take four times the memory.
  total = sum(pixels[:, taps[:, i]] * weights[:, i, None] for i in range(taps.shape[1]))
  return jnp.clip(jnp.round(total), 0, 255).astype(images.dtype).reshape(images.shape)


def tables_of_angles(size: tuple[int, int], number: int) -> tuple[np.ndarray, np.ndarray]:
  """Makes `tables` for so many angles, spread evenly over the circle from 0 on: [number, ...] each."""
  taps, weights = zip(*(tables(size, 360 * i / number) for i in range(number)), strict=True)
  return np.stack(taps), np.stack(weights)


@functools.lru_cache(maxsize=16)
def embed_turned(embed: Callable) -> Callable:
  """Makes a function that embeds images at several angles.

  Args:
    embed: (variables, images) -> [b, rows, columns, d].

  Returns:
    ((variables, taps, weights), images) -> [b, angles, rows, columns, d], with what `tables_of_angles` made.
  """

  def turned_embeddings(parameters, images):
    variables, *of_angles = parameters

    def at_angle(table):
      return embed(variables, turned(images, *table))

    return jnp.moveaxis(lax.map(at_angle, tuple(of_angles)), 0, 1)

  return turned_embeddings


def upright_patches(
    taps: np.ndarray, weights: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
  """Finds for each patch of a turned image that of the upright one in which its middle lies.

  Args:
    taps, weights: of `tables_of_angles`.
    size: that of the images.
    grid: (rows, columns) of their patches.

  Returns:
    [angles, rows * columns] int.
  """
  middle = [((np.arange(cells) + 0.5) * pixels / cells).astype(int) for cells, pixels in zip(grid, size)]
  pixel = (middle[0][:, None] * size[1] + middle[1]).reshape(-1)
  nearest = weights[:, pixel].argmax(2)[..., None]
  source = np.divmod(np.take_along_axis(taps[:, pixel], nearest, 2)[..., 0], size[1])
  row, column = (at * cells // pixels for at, cells, pixels in zip(source, grid, size))
  return row * grid[1] + column
