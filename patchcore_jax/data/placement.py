"""Computes where the network's input lies in the original image, and the way back: maps, boxes, points.

Preprocessing resizes, pads and crops (`preprocess.geometry_of`). An edge at e of the result, in pixels
from its upper left corner, was at offset + scale * e of the original image, on each axis for itself.
"""

from typing import NamedTuple

import numpy as np

from patchcore_jax.data import preprocess
from patchcore_jax.settings import Preprocessing

# Scales such as 500 / 256 are no exact floats: an edge this near to a whole pixel is on it.
_EXACT = 1e-6
_ROWS = 1024  # at once, so that a large map does not take several times its size


class Placement(NamedTuple):
  """The place of the network's input in one original image; every pair is (y, x).

  Attributes:
    original: size of the original image in pixels.
    size: size of the network's input in pixels.
    scale: original pixels per pixel of the input.
    offset: where the input's upper left corner lies in the original, in pixels from the original's
      upper left corner; negative where the input was padded.
  """

  original: tuple[int, int]
  size: tuple[int, int]
  scale: tuple[float, float]
  offset: tuple[float, float]


def placement(height: int, width: int, preprocessing: Preprocessing) -> Placement:
  """Computes the placement for original images of this size.

  Args:
    height, width: size of the original image, upright, in pixels.
    preprocessing: what the images went through.

  Raises:
    ValueError: no positive size, or an image that `preprocess.transform` refuses.

  >>> placement(512, 768, Preprocessing(resize=(256,), crop=(224,)))
  Placement(original=(512, 768), size=(224, 224), scale=(2.0, 2.0), offset=(32.0, 160.0))
  """
  if height < 1 or width < 1:
    raise ValueError(f'An image of {width} x {height} pixels: expected at least 1 x 1.')
  geometry = preprocess.geometry_of(height, width, preprocessing)
  scale = height / geometry.resized[0], width / geometry.resized[1]
  first = [crop - before for crop, (before, _) in zip(geometry.crop, geometry.pad)]
  return Placement(
      (height, width), geometry.size, scale, (scale[0] * first[0], scale[1] * first[1]))


def to_original(anomaly_map: np.ndarray, placement: Placement) -> np.ndarray:
  """Lays a map of the network's input over the original image.

  The map is enlarged bilinearly, corners not aligned: between the centres of its pixels values are
  interpolated, and beyond the outermost centres they are continued. Maps are smooth, so nothing is
  averaged where the original is smaller than the input.

  Args:
    anomaly_map: [h, w] float, at the input's size.
    placement: that of the original image.

  Returns:
    [height, width] float32; NaN in pixels whose centre the network did not see, because it was cropped
    away.

  Raises:
    ValueError: a map of another size.

  >>> p = placement(2, 6, Preprocessing(resize=(), crop=(2,)))
  >>> to_original(np.array([[1., 2.], [3., 4.]]), p)
  array([[nan, nan,  1.,  2., nan, nan],
         [nan, nan,  3.,  4., nan, nan]], dtype=float32)
  """
  anomaly_map = np.asarray(anomaly_map, np.float32)
  if anomaly_map.shape != placement.size:
    raise ValueError(
        f"An anomaly map of shape {anomaly_map.shape}: expected {placement.size}, the size of the network's "
        'input.')
  rows, columns = (_samples(axis, placement) for axis in (0, 1))
  result = np.full(placement.original, np.nan, np.float32)
  part = _interpolated(anomaly_map, rows, axis=0)
  seen = result[rows.seen, columns.seen]
  for i in range(0, len(seen), _ROWS):
    seen[i:i + _ROWS] = _interpolated(part[i:i + _ROWS], columns, axis=1)
  return result


def box_to_original(
    box: tuple[float, float, float, float], placement: Placement) -> tuple[int, int, int, int]:
  """Converts a box in pixels of the input to the smallest box of whole original pixels around it.

  Args:
    box: left, top, right, bottom; right and bottom exclusive.
    placement: that of the original image.

  Returns:
    The box (left, top, right, bottom) in the original image, inside of it and at least one pixel large: a
    box that lies in the padding is moved to the nearest pixel.

  Raises:
    ValueError: an empty box.

  >>> box_to_original((0, 0, 10, 20), placement(512, 768, Preprocessing()))
  (160, 32, 180, 72)
  """
  left, top, right, bottom = box
  if not (left < right and top < bottom):
    raise ValueError(f'The box {box} is empty: expected left < right and top < bottom.')
  (y0, y1), (x0, x1) = (
      _edges(low, high, axis, placement) for axis, low, high in ((0, top, bottom), (1, left, right)))
  return x0, y0, x1, y1


def point_to_original(point: tuple[float, float], placement: Placement) -> tuple[float, float]:
  """Converts a point (x, y) of the input to the original image; whole numbers are centres of pixels.

  A point in the padding is moved to the nearest pixel.

  >>> point_to_original((0, 0), placement(512, 768, Preprocessing()))
  (160.5, 32.5)
  """
  x, y = (
      placement.offset[axis] + placement.scale[axis] * (value + 0.5) - 0.5
      for axis, value in ((1, point[0]), (0, point[1])))
  height, width = placement.original
  return min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)


class _Samples(NamedTuple):
  """Along one axis: which original pixels were seen, and for each the map's pixels around its centre."""

  seen: slice
  low: np.ndarray
  high: np.ndarray
  weight: np.ndarray  # of `high`


def _samples(axis, placement) -> _Samples:
  length, size = placement.original[axis], placement.size[axis]
  centre = (np.arange(length) + 0.5 - placement.offset[axis]) / placement.scale[axis]
  seen = np.flatnonzero((centre >= 0) & (centre < size))
  position = np.clip(centre[seen] - 0.5, 0, size - 1)
  low = np.floor(position + _EXACT).astype(int)
  # One slice: centres ascend. It is empty if a crop lies between the centres of a tiny image.
  span = slice(seen[0], seen[-1] + 1) if len(seen) else slice(0, 0)
  return _Samples(
      span, low, np.minimum(low + 1, size - 1), np.maximum(position - low, 0).astype(np.float32))


def _interpolated(values, samples, axis):
  weight = samples.weight[:, None] if axis == 0 else samples.weight
  low = values.take(samples.low, axis)
  return low + weight * (values.take(samples.high, axis) - low)


def _edges(low, high, axis, placement):
  scale, offset, length = (x[axis] for x in (placement.scale, placement.offset, placement.original))
  begin = int(np.floor(offset + scale * low + _EXACT))
  end = int(np.ceil(offset + scale * high - _EXACT))
  begin = min(max(begin, 0), length - 1)
  return begin, min(max(end, begin + 1), length)
