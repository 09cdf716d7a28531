"""Where the network's input lies in the original image: the way back from an anomaly map.

Coordinates are of edges, not of centres: x runs from 0 at the left edge of the first pixel to the width at
the right edge of the last one.
"""

import math
from typing import NamedTuple

import numpy as np

from patchcore_jax.data.preprocess import Preprocessing, crop_offset, padding, resized_size


class Placement(NamedTuple):
  """original = scale * (input + offset), for each axis.

  Attributes:
    size: (height, width) of the original image in pixels.
    input_size: (height, width) of what the network sees.
    scale: (y, x), original pixels for a pixel of the input.
    offset: (y, x), pixels of the input that were cropped away before the first; negative where it was padded.
  """

  size: tuple[int, int]
  input_size: tuple[int, int]
  scale: tuple[float, float]
  offset: tuple[int, int]


def placement(height: int, width: int, preprocessing: Preprocessing) -> Placement:
  """Where `preprocess.transform` places the input, of an image of that size.

  >>> placement(500, 700, Preprocessing(resize=(250,), crop=(224,)))
  Placement(size=(500, 700), input_size=(224, 224), scale=(2.0, 2.0), offset=(13, 63))
  """
  resized = resized_size(height, width, preprocessing)
  before, after = padding(resized, preprocessing)
  padded = tuple(b + r + a for b, r, a in zip(before, resized, after))
  top, left, *size = crop_offset(padded, preprocessing)
  return Placement(
      (height, width), tuple(size), (height / resized[0], width / resized[1]),
      (top - before[0], left - before[1]))


def to_original(anomaly_map: np.ndarray, place: Placement) -> np.ndarray:
  """An anomaly map at the size of the original image.

  Args:
    anomaly_map: [h, w], of the input's size.
    place: from `placement`.

  Returns:
    [height, width] float32, bilinear; NaN where the network saw nothing.

  Raises:
    ValueError: a map of another size than the input's.

  >>> place = placement(2, 4, Preprocessing(resize=(), crop=(2,)))
  >>> to_original(np.ones((2, 2)), place)
  array([[nan,  1.,  1., nan],
         [nan,  1.,  1., nan]], dtype=float32)
  """
  if anomaly_map.shape != place.input_size:
    raise ValueError(f'The map is of {anomaly_map.shape}, and its image of {place.input_size}.')
  result = np.asarray(anomaly_map, np.float32)
  for axis in (0, 1):
    position = (np.arange(place.size[axis]) + 0.5) / place.scale[axis] - place.offset[axis]
    seen = (position >= 0) & (position <= place.input_size[axis])
    index = np.clip(position - 0.5, 0, place.input_size[axis] - 1)
    low = index.astype(int)
    high = np.minimum(low + 1, place.input_size[axis] - 1)
    share = np.where(seen, index - low, np.nan).astype(np.float32)
    share = share[:, None] if axis == 0 else share
    below, above = np.take(result, low, axis), np.take(result, high, axis)
    result = below + share * (above - below)
  return result


def box_to_original(
    box: tuple[int, int, int, int], place: Placement) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of the input, right and bottom exclusive, as whole original pixels around it.

  Cut at the edges of the original; never empty.
  """
  left, top, right, bottom = box
  (y0, x0), (y1, x1) = _to_original(top, left, place), _to_original(bottom, right, place)
  height, width = place.size
  left, top = min(max(math.floor(x0), 0), width - 1), min(max(math.floor(y0), 0), height - 1)
  return left, top, max(min(math.ceil(x1), width), left + 1), max(min(math.ceil(y1), height), top + 1)


def point_to_original(point: tuple[float, float], place: Placement) -> tuple[float, float]:
  """(x, y) of the input as (x, y) of the original, held inside it."""
  y, x = _to_original(point[1], point[0], place)
  return float(min(max(x, 0), place.size[1])), float(min(max(y, 0), place.size[0]))


def _to_original(y, x, place):
  return tuple(s * (v + o) for s, v, o in zip(place.scale, (y, x), place.offset))
