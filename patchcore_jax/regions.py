"""The most anomalous region of an anomaly map: where to look."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

# Without a threshold that the peak reaches: the region goes down to the middle between the map's median and
# its peak.
_SHARE = 0.5
_NEIGHBORS = np.ones((3, 3), bool)  # pixels that touch at a corner belong together


class Region(NamedTuple):
  """A region of a map, in its pixels.

  Attributes:
    box: (left, top, right, bottom), right and bottom exclusive.
    centroid: (x, y), weighted by the map's excess over the region's limit; whole numbers are centres of
      pixels.
    peak: the largest value.
  """

  box: tuple[int, int, int, int]
  centroid: tuple[float, float]
  peak: float


def most_anomalous(anomaly_map: np.ndarray, threshold: float | None = None) -> Region:
  """The connected region around the map's peak.

  Args:
    anomaly_map: [h, w].
    threshold: pixels from here on belong to it; where the peak does not reach that, or it is None, those
      above the middle between the median and the peak.

  >>> m = np.zeros((6, 8)); m[2:4, 5:7] = 1; m[3, 6] = 2; m[0, 0] = 1
  >>> most_anomalous(m, 1).box
  (5, 2, 7, 4)
  """
  peak = float(anomaly_map.max())
  if threshold is None or peak < threshold:
    median = float(np.median(anomaly_map))
    threshold = median + _SHARE * (peak - median)
  labels, _ = ndimage.label(anomaly_map >= threshold, _NEIGHBORS)
  at = np.unravel_index(np.argmax(anomaly_map), anomaly_map.shape)
  rows, columns = np.nonzero(labels == labels[at])
  # A little more than the excess, so that a region of one value has a centre too.
  weights = anomaly_map[rows, columns].astype(np.float64) - threshold + 1e-6 * (abs(peak) + 1e-30)
  x, y = (float(np.average(v, weights=weights)) for v in (columns, rows))
  box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
  return Region(box, (x, y), peak)
