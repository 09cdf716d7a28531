"""Finds the regions of an anomaly map, in pixels of the original image.

A region is a connected part of the image whose map reaches the pixel threshold. Maps are smooth, and near two
defects that lie close to each other one such part may hold both: what has a peak of its own, at least twice
as high as all that lies between it and a higher one, is a region of its own.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from patchcore_jax.data import placement
from patchcore_jax.data.placement import Placement

# Share of the way from the median, the object's own level, to the peak: half, as for a peak's width.
_SHARE = 0.5
_NEIGHBORS = np.ones((3, 3), bool)  # pixels that touch at a corner belong together
_STEP = 2 ** 0.25  # between the levels at which peaks are looked for
# In larger images every second pixel of a row and column is looked at, or every third, and so on.
_MOST_PIXELS = 2**24

Point = tuple[float, float]


class Region(NamedTuple):
  """A part of an image whose map reaches a threshold, in pixels of the original image.

  Attributes:
    box: left, top, right, bottom; right and bottom exclusive.
    outline: closed lines (x, y) around it and around its holes, in edges of pixels as the box is: what lies
      within an odd number of them belongs to it.
    area: number of its pixels.
    maximum: largest value of the map in it.
    centroid: mean x and y of its pixels, whole numbers are their centres. It may lie outside a bent region.
  """

  box: tuple[int, int, int, int]
  outline: tuple[tuple[Point, ...], ...]
  area: int
  maximum: float
  centroid: Point


class Peak(NamedTuple):
  """The place of a map that looks least normal, in pixels of the map: box and centroid as of a `Region`."""

  box: tuple[int, int, int, int]
  centroid: Point


def above(anomaly_map: np.ndarray, threshold: float, place: Placement) -> list[Region]:
  """Finds all regions of the original image in which the map, laid over it, reaches a threshold.

  Together they are `placement.to_original(anomaly_map, place) >= threshold`, which is not made as a whole: an
  image may be large, and its regions are small. Beyond 17 megapixels they are that to a few pixels.

  Args:
    anomaly_map: [h, w] float at the size of the network's input; NaN pixels belong to no region.
    threshold: pixels from here on belong to a region.
    place: where the input lies in the original image.

  Returns:
    The regions, largest first.

  >>> values = np.zeros((5, 6))
  >>> values[1:3, 2:5], values[4, 0] = 3, 2
  >>> found = above(values, 2, Placement((5, 6), (5, 6), (1.0, 1.0), (0.0, 0.0)))
  >>> [(r.box, r.area, r.maximum, r.centroid) for r in found]
  [((2, 1, 5, 3), 6, 3.0, (3.0, 1.5)), ((0, 4, 1, 5), 1, 2.0, (0.0, 4.0))]
  """
  from scipy import ndimage  # 0.2 s to import, which not every command needs

  height, width = place.original
  every, place = _thinned(place)
  # Maps are smooth: nothing that they know is lost.
  tolerance, step = max(0.5, 0.25 * max(place.scale)), max(1, int(0.5 * min(place.scale)))
  found = []
  for (top, left), labels, values in _windows(anomaly_map, threshold, place):
    for number, part in enumerate(ndimage.find_objects(labels), 1):
      inside = labels[part] == number
      y0, x0 = top + part[0].start, left + part[1].start
      y1, x1 = y0 + inside.shape[0], x0 + inside.shape[1]
      rows, columns, area = inside.sum(1), inside.sum(0), int(np.count_nonzero(inside))
      lines = outlines(inside, min(tolerance, 0.25 * min(inside.shape)), step)
      x, y = columns @ np.arange(x0, x1) / area, rows @ np.arange(y0, y1) / area
      found.append(Region(
          (every * x0, every * y0, min(every * x1, width), min(every * y1, height)),
          tuple(tuple((every * float(a + x0), every * float(b + y0)) for a, b in line) for line in lines),
          every**2 * area, float(values[part].max(where=inside, initial=-np.inf)),
          (every * (float(x) + 0.5) - 0.5, every * (float(y) + 0.5) - 0.5)))
  return sorted(found, key=lambda r: (-r.area, -r.maximum))


def mask(anomaly_map: np.ndarray, threshold: float, place: Placement, min_area: float = 0) -> np.ndarray:
  """Draws the regions that `above` finds and that have at least `min_area` pixels: [height, width] bool."""
  height, width = place.original
  every, place = _thinned(place)
  drawn = np.zeros(place.original, bool)
  for (top, left), labels, _ in _windows(anomaly_map, threshold, place):
    kept = every**2 * np.bincount(labels.ravel()) >= min_area
    kept[0] = False  # what is in no region
    drawn[top:top + labels.shape[0], left:left + labels.shape[1]] |= kept[labels]
  return drawn if every == 1 else drawn.repeat(every, 0).repeat(every, 1)[:height, :width]


def most_anomalous(anomaly_map: np.ndarray) -> Peak:
  """Finds the connected pixels around a map's peak, whatever its level.

  They reach half the way from the map's median to its peak: the place that looks least normal.

  Args:
    anomaly_map: [h, w] float; NaN pixels belong to no region.

  Returns:
    A `Peak`. For a map that is the same everywhere it is the whole map.

  Raises:
    ValueError: no two dimensions, or nothing but NaN.

  >>> most_anomalous(np.array([[0, 0, 0], [0, 4, 3], [0, 0, 1]]))
  Peak(box=(1, 1, 3, 2), centroid=(1.5, 1.0))
  """
  from scipy import ndimage

  anomaly_map = np.asarray(anomaly_map)
  if anomaly_map.ndim != 2 or np.isnan(anomaly_map).all():
    raise ValueError(
        f'An anomaly map of shape {anomaly_map.shape}: expected [height, width] with a number in some pixel.')
  peak = np.unravel_index(np.nanargmax(anomaly_map), anomaly_map.shape)
  highest, median = float(anomaly_map[peak]), float(np.nanmedian(anomaly_map))
  # At most the peak, which rounding must not leave out.
  labels, _ = ndimage.label(anomaly_map >= min(median + _SHARE * (highest - median), highest), _NEIGHBORS)
  y, x = np.nonzero(labels == labels[peak])
  return Peak((int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1),
              (float(x.mean()), float(y.mean())))


def outlines(inside: np.ndarray, tolerance: float, step: int = 1) -> list[np.ndarray]:
  """Traces the closed lines around the parts of a mask and around their holes.

  Args:
    inside: [h, w] bool.
    tolerance: points that lie within so many pixels of a line are dropped.
    step: only every so many pixels are looked at.

  Returns:
    For each line its points [n, 2] (x, y) in edges of pixels, which follow the mask to half a step.
  """
  import contourpy

  thinned = np.pad(inside[step // 2::step, step // 2::step], 1).astype(np.float32)
  if step > 1 and not thinned.any():  # it is thinner
    return outlines(inside, tolerance)
  # Centres of pixels lie at whole numbers, those of the first row of padding at 0.
  lines = [step * (line[:-1] - 0.5) for line in contourpy.contour_generator(z=thinned).lines(0.5)]
  return [np.clip(_simplified(line, tolerance), 0, inside.shape[::-1]) for line in lines]


def _thinned(place) -> tuple[int, Placement]:
  """Chooses how many pixels of a large image stand for one: that number, and the placement in those."""
  every = max(1, int(np.ceil(np.sqrt(np.prod(place.original, dtype=float) / _MOST_PIXELS))))
  return every, Placement(
      tuple(-(-n // every) for n in place.original), place.size, tuple(s / every for s in place.scale),
      tuple(o / every for o in place.offset))


def _windows(anomaly_map, threshold, place) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
  """Lays the parts of a map that reach a threshold over the original image, one after the other.

  Yields:
    For each part (top, left) of a window of the original image, and in it the regions, numbered from 1, and
    the map; all else in the window is in no region.
  """
  from scipy import ndimage

  anomaly_map = np.asarray(anomaly_map, np.float32)
  # Between the centres of its pixels the map is interpolated: what reaches the threshold has a pixel that
  # does beside it.
  wide = ndimage.binary_dilation(anomaly_map >= np.float32(threshold), _NEIGHBORS)
  parts, _ = ndimage.label(wide, _NEIGHBORS)
  lowest = min(np.nanmin(anomaly_map), np.nextafter(np.float32(threshold), np.float32(-np.inf)))
  for number, part in enumerate(ndimage.find_objects(parts), 1):
    own = (parts[part] == number) & ~np.isnan(anomaly_map[part])
    values = np.where(own, anomaly_map[part], lowest)
    first = [o + s * p.start for o, s, p in zip(place.offset, place.scale, part, strict=True)]
    last = [o + s * p.stop for o, s, p in zip(place.offset, place.scale, part, strict=True)]
    top, left = (max(int(np.floor(f)), 0) for f in first)
    bottom, right = (min(int(np.ceil(e)), n) for e, n in zip(last, place.original, strict=True))
    if bottom <= top or right <= left:
      continue  # in the padding
    parts_of_peaks = _parts(values, threshold)
    window = Placement(
        (bottom - top, right - left), values.shape, place.scale, (first[0] - top, first[1] - left))
    laid = placement.to_original(values, window)
    labels, _ = ndimage.label(laid >= np.float32(threshold), _NEIGHBORS)
    if parts_of_peaks is not None:
      # The nearest pixel of the map tells which peak one of the image belongs to.
      rows, columns = (
          np.clip((np.arange(n) + 0.5 - o) // s, 0, size - 1).astype(int)
          for n, o, s, size in zip(window.original, window.offset, window.scale, window.size, strict=True))
      pairs = labels * (parts_of_peaks.max() + 1) + parts_of_peaks[np.ix_(rows, columns)]
      pairs[labels == 0] = 0
      used = np.bincount(pairs.ravel()) > 0
      used[0] = False
      labels = np.cumsum(used)[pairs]
    yield (top, left), labels, laid


def _parts(values, threshold) -> np.ndarray | None:
  """Parts a map among its peaks: the highest, and those at least twice as high as what lies between.

  As water falls from the highest peak to the threshold, islands appear; where two meet of which one is not
  twice as high as the water, they become one, and else new land belongs to the nearest. What lies between is
  known to a step of the water, which counts against a peak.

  Returns:
    The number of the peak that each pixel belongs to, [h, w]; None where there is one peak.
  """
  from scipy import ndimage

  highest = float(values.max())
  if threshold <= 0 or highest < 2 * threshold:
    return None
  parts, heights = np.zeros(values.shape, np.int32), [0.0]
  for level in np.geomspace(highest, threshold, int(np.log(highest / threshold) / np.log(_STEP)) + 2)[1:]:
    labels, _ = ndimage.label(values >= np.float32(level), _NEIGHBORS)
    for label, island in enumerate(ndimage.find_objects(labels), 1):
      inside, own = labels[island] == label, parts[island]
      present = sorted(set(own[inside].tolist()) - {0}, key=lambda number: -heights[number])
      if not present:
        present = [len(heights)]
        heights.append(float(values[island][inside].max()))
      kept = present[:1] + [number for number in present[1:] if heights[number] >= 2 * level * _STEP]
      if len(kept) == 1:
        own[inside] = kept[0]
        continue
      taken = inside & np.isin(own, kept)
      nearest = ndimage.distance_transform_edt(~taken, return_distances=False, return_indices=True)
      own[inside] = own[tuple(nearest)][inside]
  if len(set(parts.ravel().tolist()) - {0}) < 2:
    return None
  # Around what reaches the threshold too: pixels of the image lie between those of the map.
  nearest = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
  return parts[tuple(nearest)]


def _simplified(points, tolerance):
  """Drops points of a closed line that lie within the tolerance of it: Douglas and Peucker, 1973."""
  far = int(np.argmax(((points - points[0]) ** 2).sum(1)))
  kept, todo = {0, far}, [(0, far), (far, len(points))]
  closed = np.concatenate([points, points[:1]])
  while todo:
    begin, end = todo.pop()
    between = closed[begin + 1:end] - closed[begin]
    if not len(between):
      continue
    direction = closed[end] - closed[begin]
    length = np.hypot(*direction)
    if length:
      distances = np.abs(between[:, 0] * direction[1] - between[:, 1] * direction[0]) / length
    else:
      distances = np.hypot(*between.T)
    middle = int(np.argmax(distances))
    if distances[middle] > tolerance:
      middle += begin + 1
      kept.add(middle)
      todo += [(begin, middle), (middle, end)]
  return points[sorted(kept)]
