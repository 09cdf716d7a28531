"""Finds the most anomalous region of an anomaly map."""

from typing import NamedTuple

import numpy as np

# Share of the way from the median, the object's own level, to the peak: half, as for a peak's width.
_SHARE = 0.5
_NEIGHBORS = np.ones((3, 3), bool)  # pixels that touch at a corner belong together


class Region(NamedTuple):
  """A region of a map, in pixels; whole numbers are centres of pixels, but for the box, which has edges.

  Attributes:
    box: left, top, right, bottom; right and bottom exclusive.
    centroid: mean x and y of the region's pixels. It may lie outside a bent region.
    level: what every pixel of the region reaches.
  """

  box: tuple[int, int, int, int]
  centroid: tuple[float, float]
  level: float


def most_anomalous(anomaly_map: np.ndarray, threshold: float | None = None) -> Region:
  """Finds the connected pixels around a map's peak that are anomalous with it.

  They reach the threshold. Where even the peak does not, or no threshold is known, they reach half the way
  from the map's median to its peak: the place that looks least normal, whatever its level.

  Args:
    anomaly_map: [h, w] float; NaN pixels belong to no region.
    threshold: pixels from here on are anomalous, by a calibration; None if not known.

  Returns:
    A `Region`. For a map that is the same everywhere it is the whole map.

  Raises:
    ValueError: no two dimensions, or nothing but NaN.

  >>> values = np.zeros((5, 6))
  >>> values[1:3, 2:5], values[4, 0] = 3, 2
  >>> most_anomalous(values, threshold=2)
  Region(box=(2, 1, 5, 3), centroid=(3.0, 1.5), level=2.0)
  """
  from scipy import ndimage  # 0.2 s to import, which not every command needs

  anomaly_map = np.asarray(anomaly_map)
  if anomaly_map.ndim != 2 or np.isnan(anomaly_map).all():
    raise ValueError(
        f'An anomaly map of shape {anomaly_map.shape}: expected [height, width] with a number in some pixel.')
  peak = np.unravel_index(np.nanargmax(anomaly_map), anomaly_map.shape)
  highest = float(anomaly_map[peak])
  if threshold is None or highest < threshold:
    median = float(np.nanmedian(anomaly_map))
    # At most the peak, which rounding must not leave out.
    threshold = min(median + _SHARE * (highest - median), highest)
  labels, _ = ndimage.label(anomaly_map >= threshold, _NEIGHBORS)
  inside = labels == labels[peak]
  y, x = np.nonzero(inside)
  return Region(
      (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1),
      (float(x.mean()), float(y.mean())), float(threshold))
