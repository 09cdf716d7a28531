"""A row for each defect: where it lies, how large it is, and how well it is found; and regions found in vain.

AU-PRO weighs a region of one pixel as one of 10,000. The table shows which ones it is made of.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchcore_jax.metrics import checks
from patchcore_jax.metrics import curve as curves

AREAS = (10, 100, 1000)  # pixels, where classes of size begin


class Region(NamedTuple):
  """A connected component of an image's mask.

  Attributes:
    image: the image's position, from 0 on.
    number: of the component within its image, from 1 on, in the order of rows.
    area: in pixels.
    left, top, right, bottom: the box in pixels; right and bottom lie outside.
    centroid_x, centroid_y: mean of the pixels' positions, where the first pixel's is 0.
    touches_border: whether it reaches the image's edge.
    maximum: the highest score, which is the highest threshold at which it is touched.
    mean: of its scores.
    half_found_at: the highest threshold that half of its pixels or more reach.
    overlap: share of its pixels at or above the threshold that was given.
    auroc: of its pixels against all normal ones of all images; None where there are none.
  """

  image: int
  number: int
  area: int
  left: int
  top: int
  right: int
  bottom: int
  centroid_x: float
  centroid_y: float
  touches_border: bool
  maximum: float
  mean: float
  half_found_at: float
  overlap: float
  auroc: float | None


class FalseRegions(NamedTuple):
  """Connected components of marked pixels that meet no mask.

  Attributes:
    in_good: how many there are in good images.
    in_anomalous: and in the others.
    good: the number of good images.
    pixels: the number of pixels of all images.
    marked_share: the mean over good images of the share of pixels that are marked, which is AUPIMO's F; None
      without good images.
  """

  in_good: int
  in_anomalous: int
  good: int
  pixels: int
  marked_share: float | None

  @property
  def per_good_image(self) -> float | None:
    """False regions of good images, for each of them; None without any."""
    return self.in_good / self.good if self.good else None

  @property
  def per_megapixel(self) -> float:
    """False regions of all images, for each million of their pixels."""
    return 1e6 * (self.in_good + self.in_anomalous) / self.pixels


class RegionTable(NamedTuple):
  """All regions of a category, in the order of images, and the false ones at the same threshold."""

  threshold: float
  regions: tuple[Region, ...]
  false: FalseRegions


class SizeClass(NamedTuple):
  """How well regions of about one size are found.

  Attributes:
    least, below: areas in pixels, the second outside of the class; None where there is no bound.
    regions: how many there are.
    touched: how many of them have an overlap above 0.
    half_found: how many of at least 0.5.
    overlap: its mean; None for no regions.
  """

  least: float
  below: float | None
  regions: int
  touched: int
  half_found: int
  overlap: float | None


def tabulate_regions(
    maps: Sequence, masks: Sequence, *, threshold: float, connectivity: int = 8,
    curve: curves.Curve | None = None) -> RegionTable:
  """Describes each region of a category's masks, and counts the regions that are marked in vain.

  Every image is read once, and twice more for the curve where that is not at hand.

  Args:
    maps: n maps [h, w] of scores, of any sizes, read one at a time.
    masks: n masks of the same sizes, bool or 0/1; their connected components are the regions.
    threshold: a score; pixels at or above it are marked.
    connectivity: 8 (pixels that touch at corners are one region) or 4.
    curve: that of the same images (`curve.of_regions`).

  Raises:
    ValueError: as `checks.images`; a threshold that is not finite, another connectivity, or a curve of other
      images.

  >>> maps = np.array([[[5.0, 4.0, 0.0, 1.0]], [[0.0, 3.0, 0.0, 0.0]]])
  >>> found = tabulate_regions(maps, np.array([[[1, 1, 0, 1]], [[0, 0, 0, 0]]]), threshold=3)
  >>> [(region.area, region.overlap, region.auroc) for region in found.regions]
  [(2, 1.0, 1.0), (1, 0.0, 0.8)]
  >>> found.false.per_good_image
  1.0
  """
  from scipy import ndimage  # 0.2 s to import, for where there are masks

  if not math.isfinite(threshold):
    raise ValueError(f'Expected a finite threshold, got {threshold}.')
  if connectivity not in (4, 8):
    raise ValueError(f'Expected connectivity 4 or 8, got {connectivity}.')
  curve = curve or curves.of_regions(maps, masks, connectivity=connectivity)
  structure = np.ones((3, 3)) if connectivity == 8 else None
  regions, shares, in_good, in_anomalous, pixels = [], [], 0, 0, 0
  for i, values, mask in checks.images(maps, masks):
    pixels += values.size
    marked = values >= np.float64(threshold)  # a Python number would be rounded to the maps' type
    parts, count = ndimage.label(marked, structure)
    if not mask.any():
      shares.append(np.count_nonzero(marked) / marked.size)
      in_good += count
      continue
    met = np.unique(parts[mask])
    in_anomalous += count - int(np.count_nonzero(met))
    labels, _ = ndimage.label(mask, structure)
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
      y, x = np.nonzero(labels[rows, columns] == number)
      scores = np.sort(values[rows, columns][y, x])
      regions.append(Region(
          i, number, scores.size, columns.start, rows.start, columns.stop, rows.stop,
          columns.start + float(x.mean()), rows.start + float(y.mean()),
          0 in (rows.start, columns.start) or rows.stop == mask.shape[0] or columns.stop == mask.shape[1],
          float(scores[-1]), float(scores.mean(dtype=np.float64)), float(scores[scores.size // 2]),
          int(np.count_nonzero(marked[rows, columns][y, x])) / scores.size, _auroc(scores, curve)))
  if sum(region.area for region in regions) != curve.anomalous or pixels != curve.anomalous + curve.good:
    raise ValueError(
        f'Expected the curve of these images, got one of {curve.anomalous} anomalous and {curve.good} good '
        f'pixels for {sum(region.area for region in regions)} and {pixels} in all: leave it out.')
  share = float(np.mean(shares)) if shares else None
  return RegionTable(
      float(threshold), tuple(regions), FalseRegions(in_good, in_anomalous, len(shares), pixels, share))


def by_area(regions: Sequence[Region], areas: Sequence[float] = AREAS) -> tuple[SizeClass, ...]:
  """Summarises regions by classes of size.

  Args:
    regions: as of `tabulate_regions`.
    areas: where classes begin but for the first, ascending, in pixels.

  Returns:
    A record for each class, also for those without regions.

  >>> table = tabulate_regions(np.array([[[5.0, 4.0, 0.0, 1.0]]]), np.array([[[1, 1, 0, 1]]]), threshold=3)
  >>> [(c.least, c.below, c.regions, c.half_found) for c in by_area(table.regions, (2, 10))]
  [(0, 2, 1, 0), (2, 10, 1, 1), (10, None, 0, 0)]
  """
  if not len(areas) or any(low >= high for low, high in zip((0, *areas), areas)):
    raise ValueError(f'Expected areas above 0 that ascend, got {tuple(areas)}.')
  classes = []
  for least, below in zip((0, *areas), (*areas, None)):
    overlaps = [region.overlap for region in regions
                if region.area >= least and (below is None or region.area < below)]
    classes.append(SizeClass(
        least, below, len(overlaps), sum(overlap > 0 for overlap in overlaps),
        sum(overlap >= 0.5 for overlap in overlaps), float(np.mean(overlaps)) if overlaps else None))
  return tuple(classes)


def area_quartiles(regions: Sequence[Region]) -> tuple[float, ...]:
  """Computes the quartiles of the regions' areas, distinct ones only, for `by_area`.

  Raises:
    NotDefined: no regions.
  """
  if not regions:
    raise checks.NotDefined('Expected at least one region, got none: they have no quartiles.')
  return tuple(map(float, np.unique(np.quantile([region.area for region in regions], (0.25, 0.5, 0.75)))))


def _auroc(scores, curve):
  """Looks up how many normal pixels lie above each score, which is one of the curve's, and how many at it."""
  if not curve.good:
    return None
  wrong = 0
  for part in curve.parts:
    inside = scores[(scores >= part.thresholds[-1]) & (scores <= part.thresholds[0])]
    at = part.thresholds.size - np.searchsorted(part.thresholds[::-1], inside, 'right')
    wrong += int(part.above[at].sum() + part.alarms[at].sum())  # once if above, half of twice if equal
  return 1 - wrong / (2 * scores.size * curve.good)
