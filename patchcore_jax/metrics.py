"""Scores and maps -> AUROC, AUPRO, F1 and working points. NumPy on the host; exact, ties included.

scikit-learn's curves keep several float64 copies of all scores, 6 GB for the 32 million pixels of a
category at 448 px; pixel metrics are therefore computed here from ranks and sorted normal pixels.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
import sklearn.metrics


class F1Optimum(NamedTuple):
  """The working point of the best F1 over the rule "score >= threshold"."""

  threshold: float
  f1: float
  false_positives: int
  false_negatives: int


def auroc(labels, scores) -> float:
  """Area under the ROC curve, for images or for pixels; ties count one half.

  It is the share of (anomalous, good) pairs in the right order, which a sort of the rarer class alone
  gives without sorting all pixels.

  Args:
    labels: bool or 0/1, any shape; 1 is anomalous.
    scores: the same shape; higher is more anomalous.

  Returns:
    A value in [0, 1].

  Raises:
    ValueError: shapes that differ, labels that are not 0 and 1, scores that are not finite, or only
      one class.

  >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
  0.75
  """
  positive, scores = _checked(labels, scores)
  rare = positive if 2 * positive.sum() <= positive.size else ~positive
  few, many = np.sort(scores[rare]), scores[~rare]
  # Integers as long as possible: counts of pairs are exact.
  below = np.searchsorted(few, many, 'left').sum(dtype=np.int64)
  not_above = np.searchsorted(few, many, 'right').sum(dtype=np.int64)
  # Twice the number of pairs with the rare one below, ties half.
  share = int(below + not_above) / (2 * few.size * many.size)
  return share if rare is not positive else 1 - share


def average_precision(labels, scores) -> float:
  """Average precision: the sum of precision times the steps in recall. Arguments as in `auroc`.

  >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
  0.8333
  """
  return float(sklearn.metrics.average_precision_score(*_checked(labels, scores)))


def f1_optimal(labels, scores) -> F1Optimum:
  """The threshold of the best F1; the lowest of them on ties. Arguments as in `auroc`.

  >>> f1_optimal([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
  F1Optimum(threshold=0.35, f1=0.8, false_positives=1, false_negatives=0)
  """
  positive, scores = _checked(labels, scores)
  thresholds, found, alarms = _working_points(positive, scores)
  # F1 = 2 TP / (TP + FP + TP + FN); thresholds descend, so the last maximum is the lowest.
  f1 = 2 * found / (alarms + positive.sum())
  best = f1.size - 1 - int(np.argmax(f1[::-1]))
  return F1Optimum(
      float(thresholds[best]), float(f1[best]), int(alarms[best] - found[best]),
      int(positive.sum() - found[best]))


def error_at_full_recall(labels, scores) -> float:
  """Share of all images that are wrong at the highest threshold that finds every anomalous one.

  Supplement, section B. Arguments as in `auroc`.

  >>> error_at_full_recall([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
  0.25
  """
  positive, scores = _checked(labels, scores)
  return float((scores[~positive] >= scores[positive].min()).sum() / positive.size)


def aupro(maps, masks, *, max_fpr: float = 0.3, connectivity: int = 8) -> float:
  """Area under the per-region-overlap curve up to a false positive rate (Bergmann et al., IJCV 2021).

  At a threshold, a region (connected component of a mask) has an overlap, the share of its pixels at
  or above the threshold; PRO is the mean over all regions, and the false positive rate is the share
  of normal pixels of all images at or above it. The curve runs through every distinct score, equal
  scores cross together, the last trapezoid is cut at `max_fpr` by interpolation, and the area is
  divided by `max_fpr`.

  Only the normal pixels up to `max_fpr` and those in regions are sorted.

  Args:
    maps: [n, h, w] float.
    masks: [n, h, w] bool or 0/1.
    max_fpr: limit in (0, 1].
    connectivity: 8 (pixels that touch at corners are one region) or 4.

  Returns:
    A value in [0, 1].

  Raises:
    ValueError: as `auroc`; no anomalous or no normal pixel; a limit or connectivity out of range.

  >>> aupro(np.array([[[0.1, 0.9], [0.2, 0.8]]]), np.array([[[0, 1], [0, 1]]]))
  1.0
  """
  if not 0 < max_fpr <= 1 or connectivity not in (4, 8):
    raise ValueError(
        f'Expected 0 < max_fpr <= 1 and connectivity 4 or 8, got {max_fpr} and {connectivity}.')
  maps, masks = np.asarray(maps), np.asarray(masks)
  if maps.ndim != 3:
    raise ValueError(f'Expected maps [n, h, w], got {maps.shape}.')
  flat_masks, flat_maps = _checked(masks, maps)
  masks = flat_masks.reshape(maps.shape)
  scores, weights = _region_pixels(maps, masks, connectivity)

  normal = flat_maps[~flat_masks]
  # Scores above which at least max_fpr of the normal pixels lie: one more closes the trapezoid.
  keep = min(normal.size, int(np.ceil(max_fpr * normal.size)) + 1)
  cut = np.partition(normal, normal.size - keep)[normal.size - keep]
  highest = np.sort(normal[normal >= cut])[::-1]

  # All thresholds, descending, at which the curve has a point.
  thresholds = np.unique(np.concatenate([highest, scores[scores >= cut]]))[::-1]
  fpr = np.searchsorted(-highest, -thresholds, 'right') / normal.size
  order = np.argsort(-scores, kind='stable')
  overlap = np.concatenate([[0.0], np.cumsum(weights[order])])
  # All regions found is 1 by definition, whatever rounding made of the sum; it must not exceed 1.
  overlap = np.minimum(overlap, 1.0)
  overlap[-1] = 1.0
  pro = overlap[np.searchsorted(-scores[order], -thresholds, 'right')]
  fpr, pro = np.concatenate([[0.0], fpr]), np.concatenate([[0.0], pro])
  return min(_area(fpr, pro, max_fpr) / max_fpr, 1.0)


def evaluate(
    labels, scores, masks=None, maps=None, *, max_fpr: float = 0.3
) -> dict[str, Any]:
  """All metrics of one category.

  Args:
    labels: [n] image labels.
    scores: [n] image scores.
    masks: [n, h, w], or None for a category without masks.
    maps: [n, h, w].
    max_fpr: limit of AUPRO.

  Returns:
    {name: value}; None where the metric is not defined: image metrics with one class only, pixel
    metrics without masks or without an anomalous pixel.
  """
  names = ('image_auroc', 'image_ap', 'image_f1', 'image_threshold', 'false_positives',
           'false_negatives', 'error_at_full_recall', 'pixel_auroc', 'aupro')
  result: dict[str, Any] = dict.fromkeys(names)
  labels = np.asarray(labels)
  if labels.min() != labels.max():
    best = f1_optimal(labels, scores)
    result |= {
        'image_auroc': auroc(labels, scores), 'image_ap': average_precision(labels, scores),
        'image_f1': best.f1, 'image_threshold': best.threshold,
        'false_positives': best.false_positives, 'false_negatives': best.false_negatives,
        'error_at_full_recall': error_at_full_recall(labels, scores)}
  if masks is not None and np.min(masks) != np.max(masks):
    result |= {'pixel_auroc': auroc(masks, maps), 'aupro': aupro(maps, masks, max_fpr=max_fpr)}
  return result


def _checked(labels, scores):
  """Flat bool labels and flat scores, or the reason why not."""
  labels, scores = np.asarray(labels), np.asarray(scores)
  if labels.shape != scores.shape:
    raise ValueError(f'Labels {labels.shape} and scores {scores.shape} differ in shape.')
  positive = labels.astype(bool).ravel()
  if labels.dtype != bool and not np.array_equal(positive, labels.ravel()):
    raise ValueError(f'Labels: expected 0 and 1, got {np.unique(labels)[:5].tolist()}.')
  if not np.isfinite(scores).all():
    raise ValueError('Scores hold NaN or infinity.')
  if positive.all() or not positive.any():
    raise ValueError(
        f'Only one class among {positive.size} labels: expected good (0) and anomalous (1) ones.')
  return positive, scores.ravel()


def _working_points(positive, scores):
  """Distinct scores, descending, with the anomalous ones and all at or above each."""
  order = np.argsort(-scores, kind='stable')
  last = np.append(np.flatnonzero(np.diff(scores[order])), scores.size - 1)
  return scores[order][last], np.cumsum(positive[order])[last], last + 1


def _region_pixels(maps, masks, connectivity):
  """Scores of all anomalous pixels, and what each adds to PRO: 1 / (pixels of its region * regions)."""
  structure = np.ones((3, 3)) if connectivity == 8 else None
  scores, shares, regions = [], [], 0
  for values, mask in zip(maps, masks):
    if mask.any():
      labels, count = scipy.ndimage.label(mask, structure)
      labels = labels[mask]
      shares.append(1 / np.bincount(labels)[labels])
      scores.append(values[mask])
      regions += count
  return np.concatenate(scores), np.concatenate(shares) / regions


def _area(x, y, limit):
  """Trapezoids of an ascending curve from x = 0 to the limit, the last one cut by interpolation."""
  inside = int(np.searchsorted(x, limit, 'right'))  # x[:inside] <= limit
  area = np.trapezoid(y[:inside], x[:inside])
  if inside < x.size and x[inside - 1] < limit:
    fraction = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
    y_limit = y[inside - 1] + fraction * (y[inside] - y[inside - 1])
    area += (limit - x[inside - 1]) * (y[inside - 1] + y_limit) / 2
  return float(area)
