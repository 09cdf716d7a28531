"""`preprocess.transform` as a function of arrays: camera frames of one size, inside a compiled program.

Pillow resizes 8-bit images in whole numbers: along each axis a new pixel is a sum of old ones, weighted by
integers in units of 2^-22, and rounded to 8 bits before the other axis has its turn (its source,
src/libImaging/Resample.c). The same sums in int32 give the same pixels, to the last bit.

Along which axis it goes first is Pillow's own affair: up to version 12 always along the rows, since 13 along
the columns where that is less work (its pull request 9549). The order is found by comparison.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from jax import lax
from PIL import Image

from patchcore_jax.data import preprocess
from patchcore_jax.settings import Preprocessing

_BITS = 22
_ROWS, _COLUMNS = 1, 2  # the axes of [b, h, w, 3]


def transform_fn(
    height: int, width: int, preprocessing: Preprocessing) -> Callable[[jax.Array], jax.Array]:
  """Builds a function that resizes, pads and crops frames of one size.

  The function has been compared with `preprocess.transform` on a frame of noise when it is returned.

  Args:
    height, width: size of the frames in pixels.
    preprocessing: sizes.

  Returns:
    A pure function: frames [b, height, width, 3] uint8 -> images [b, h, w, 3] uint8.

  Raises:
    ValueError: what `preprocess.geometry_of` raises, or a Pillow that computes in another way.

  >>> fn = transform_fn(500, 700, Preprocessing())
  >>> fn(jnp.zeros((2, 500, 700, 3), jnp.uint8)).shape
  (2, 224, 224, 3)
  """
  if height < 1 or width < 1:
    raise ValueError(f'Frames of {width} x {height} pixels: expected positive sizes.')
  geometry = preprocess.geometry_of(height, width, preprocessing)
  resized = geometry.resized
  # Which row of the resized frame each row of the result is, and which column each column. Padding repeats
  # the edge.
  rows, columns = (
      np.clip(np.arange(n) + first - before, 0, limit - 1)
      for n, first, (before, _), limit in zip(geometry.size, geometry.crop, geometry.pad, resized))
  steps = {_ROWS: _step(height, resized[0], rows), _COLUMNS: _step(width, resized[1], columns)}
  noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
  expected = np.asarray(preprocess.transform(Image.fromarray(noise), preprocessing))
  for order in ((_COLUMNS, _ROWS), (_ROWS, _COLUMNS)):
    fn = functools.partial(_transform, steps=tuple((axis, *steps[axis]) for axis in order))
    if np.array_equal(jax.jit(fn)(noise[None])[0], expected):
      return fn
  raise ValueError(
      f'Pillow {PIL.__version__} resizes {width} x {height} pixels to {resized[1]} x {resized[0]} in a way '
      'that is not known here, so frames cannot be prepared by a program as it prepares them. Export without '
      'a camera, or install another version of Pillow.')


def _step(old, new, wanted):
  """Finds what the new pixels `wanted` are made of along an axis: sources [n, t], weights [n, t] or None."""
  if old == new:
    return wanted[:, None], None
  sources, weights = _weights(old, new)
  return sources[wanted], weights[wanted]


def _weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Computes each new pixel's triangle filter: positions [new, t] of old pixels, their weights in 2^-22."""
  scale = old / new
  reach = max(scale, 1.0)
  begins, filters = [], []
  for center in (np.arange(new) + 0.5) * scale:
    begin, end = max(0, int(center - reach + 0.5)), min(old, int(center + reach + 0.5))
    values = [max(0.0, 1 - abs((x - center + 0.5) / reach)) for x in range(begin, end)]
    total = functools.reduce(operator.add, values)  # one after the other, as C; `sum` is more exact than that
    begins.append(begin)
    filters.append([int(0.5 + value / total * 2**_BITS) for value in values])
  weights = np.zeros((new, max(map(len, filters))), np.int32)
  for row, values in zip(weights, filters):
    row[:len(values)] = values
  return np.minimum(np.array(begins)[:, None] + np.arange(weights.shape[1]), old - 1), weights


def _transform(frames, *, steps):
  """Resizes along one axis after the other, after cutting off what no wanted pixel is made of."""
  for axis, sources, _ in steps:
    frames = lax.slice_in_dim(frames, int(sources.min()), int(sources.max()) + 1, axis=axis)
  for axis, sources, weights in steps:
    frames = _along(frames, axis, sources - sources.min(), weights)
  return frames


def _along(frames, axis, sources, weights):
  if weights is None:
    return jnp.take(frames, sources[:, 0], axis=axis)
  # The weights sum up to about 2^22, so that 255 times as much is within int32.
  total = jnp.int32(2 ** (_BITS - 1))
  for source, weight in zip(sources.T, weights.T):  # a few, each an array over the new pixels
    shape = [-1 if i == axis else 1 for i in range(frames.ndim)]
    total += jnp.take(frames, source, axis=axis).astype(jnp.int32) * weight.reshape(shape)
  return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)
