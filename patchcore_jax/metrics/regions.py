"""Metrics of regions: how much of each connected defect is found."""

import numpy as np

from patchcore_jax.metrics import checks


def aupro(maps, masks, *, max_fpr: float = 0.3, connectivity: int = 8) -> float:
  """Computes the area under the per-region-overlap curve up to a false positive rate.

  Sources: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section on PRO; the PatchCore
  paper's table S3. At a threshold, a region (connected component of a mask) has an overlap, the
  share of its pixels at or above the threshold; PRO is the mean over all regions, and the false
  positive rate is the share of normal pixels of all images at or above it. The curve runs through
  every distinct score, equal scores cross together, the last trapezoid is cut at `max_fpr` by
  interpolation, and the area is divided by `max_fpr`.

  Only the pixels above the threshold that reaches `max_fpr` are sorted.

  Args:
    maps: [n, h, w] float.
    masks: [n, h, w] bool or 0/1.
    max_fpr: limit in (0, 1].
    connectivity: 8 (pixels that touch at corners are one region) or 4.

  Returns:
    A value in [0, 1], never above; exactly 1 if every anomalous pixel is above every normal one.

  Raises:
    ValueError: what `auroc` raises; no anomalous or no normal pixel; a limit or connectivity out of range.

  >>> aupro(np.array([[[0.1, 0.9], [0.2, 0.8]]]), np.array([[[0, 1], [0, 1]]]))
  1.0
  """
  if not 0 < max_fpr <= 1 or connectivity not in (4, 8):
    raise ValueError(
        f'Expected 0 < max_fpr <= 1 and connectivity 4 or 8, got {max_fpr} and {connectivity}.')
  maps, masks = np.asarray(maps), np.asarray(masks)
  if maps.ndim != 3:
    raise ValueError(f'Expected maps [n, h, w], got {maps.shape}.')
  flat_masks, flat_maps = checks.of_both_classes(masks, maps, 'masks', 'maps')
  masks, maps = flat_masks.reshape(maps.shape), flat_maps.reshape(maps.shape)
  found, weights = _region_pixels(maps, masks, connectivity)

  normal = flat_maps[~flat_masks]
  # The score that at least max_fpr of the normal pixels reach; one more closes the last trapezoid.
  keep = min(normal.size, int(np.ceil(max_fpr * normal.size)) + 1)
  cut = np.partition(normal, normal.size - keep)[normal.size - keep]
  normal_size, region_size = normal.size, found.size
  normal = np.sort(normal[normal >= cut])
  found, weights = found[found >= cut], weights[found >= cut]
  # Stable: the order of tied pixels, and so the last bit of the sum, is the same on every machine.
  order = np.argsort(found, kind='stable')
  found, weights = found[order], weights[order]

  overlap = np.concatenate([[0.0], np.cumsum(weights[::-1])])  # of the k highest region pixels
  np.minimum(overlap, 1.0, out=overlap)  # rounding may lift the sum above 1
  if found.size == region_size:
    overlap[-1] = 1.0  # all regions whole, whatever rounding made of the sum
  # Every distinct score is a point of the curve. Sizes less ranks count the pixels at or above it.
  thresholds = np.unique(np.concatenate([normal, found]))[::-1]
  alarms = normal.size - np.searchsorted(normal, thresholds, 'left')
  pro = overlap[found.size - np.searchsorted(found, thresholds, 'left')]
  # Counts, not rates, on the axis: whole numbers add up exactly, so an overlap of 1 everywhere
  # gives an area equal to the limit, a lower one cannot give more, and no clipping is needed.
  limit = max_fpr * normal_size
  return _area(np.append(0, alarms), np.append(0.0, pro), limit) / limit


def _region_pixels(maps, masks, connectivity):
  """Collects the scores of anomalous pixels; each adds 1 / (its region's size * number of regions) to PRO."""
  from scipy import ndimage  # 0.2 s to import, for where there are masks

  structure = np.ones((3, 3)) if connectivity == 8 else None
  scores, shares, regions = [], [], 0
  for values, mask in zip(maps, masks):
    if mask.any():
      labels, count = ndimage.label(mask, structure)
      labels = labels[mask]
      shares.append(1 / np.bincount(labels)[labels])
      scores.append(values[mask])
      regions += count
  return np.concatenate(scores), np.concatenate(shares) / regions


def _area(x, y, limit):
  """Adds up trapezoids from x = 0 to the limit, the last one cut by interpolation; x ascends."""
  inside = int(np.searchsorted(x, limit, 'right'))  # x[:inside] <= limit
  area = np.trapezoid(y[:inside], x[:inside])
  if inside < x.size and x[inside - 1] < limit:
    fraction = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
    y_limit = y[inside - 1] + fraction * (y[inside] - y[inside - 1])
    area += (limit - x[inside - 1]) * (y[inside - 1] + y_limit) / 2
  return float(area)
