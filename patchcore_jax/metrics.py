"""Scores and maps -> AUROC, AUPRO, F1 and working points. NumPy on the host; exact, ties included.

Pixel metrics are computed here from ranks and sorted pixels: for the 32 million pixels of a
category at 448 px, scikit-learn 1.9's `roc_auc_score` takes 1.5 GiB beside its input and 20 s on
one core, `auroc` 0.3 GiB and 2 to 4 s; scikit-learn has no AUPRO.
"""

from typing import NamedTuple

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

  It is the share of (anomalous, good) pairs in the right order.

  Args:
    labels: bool or 0/1, any shape; 1 is anomalous.
    scores: the same shape; higher is more anomalous.

  Returns:
    A value in [0, 1].

  Raises:
    ValueError: nothing or shapes that differ, labels that are not 0 and 1, scores that are not
      finite, or only one class.

  >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
  0.75
  """
  positive, scores = _checked(labels, scores)
  rare = positive if 2 * positive.sum() <= positive.size else ~positive
  few, many = scores[rare], scores[~rare]
  # Both are sorted: sorted queries walk through memory in order, and with the rarer class as
  # queries the ranks take the room of that class only.
  few.sort()
  many.sort()
  # Integers as long as possible: counts of pairs are exact.
  below = np.searchsorted(many, few, 'left').sum(dtype=np.int64)
  not_above = np.searchsorted(many, few, 'right').sum(dtype=np.int64)
  # Twice the number of pairs with the rare one above, ties half.
  share = int(below + not_above) / (2 * few.size * many.size)
  return share if rare is positive else 1 - share


def average_precision(labels, scores) -> float:
  """Average precision: the sum of precision times the steps in recall. Arguments as in `auroc`.

  Tied scores are one step. Made for image scores; 32 million pixels take 1 GiB and 13 s.

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
  """Area under the per-region-overlap curve up to a false positive rate.

  Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section on PRO; the PatchCore
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
  flat_masks, flat_maps = _checked(masks, maps, 'masks', 'maps')
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


def evaluate(
    labels, scores, masks=None, maps=None, *, max_fpr: float = 0.3, connectivity: int = 8
) -> dict[str, float | int | None]:
  """All metrics of one category.

  Args:
    labels: [n] image labels.
    scores: [n] image scores.
    masks: [n, h, w], or None for a category without masks.
    maps: [n, h, w]; not looked at without masks.
    max_fpr, connectivity: of AUPRO.

  Returns:
    {name: value}; None where the metric is not defined: image metrics with one class only, pixel
    metrics without masks, without an anomalous pixel or without a normal one.

  Raises:
    ValueError: as the single functions, but for one class only; masks or maps of other than n
      images.

  >>> evaluate([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])['error_at_full_recall']
  0.25
  >>> print(evaluate([0, 0], [0.1, 0.4])['image_auroc'])
  None
  """
  names = ('image_auroc', 'image_ap', 'image_f1', 'image_threshold', 'false_positives',
           'false_negatives', 'error_at_full_recall', 'pixel_auroc', 'aupro')
  result: dict[str, float | int | None] = dict.fromkeys(names)
  # Checked whether or not the metrics are defined: bad input must not pass for an absent metric.
  positive, scores = _flat(labels, scores)
  if _has_both(positive):
    best = f1_optimal(positive, scores)
    result |= {
        'image_auroc': auroc(positive, scores), 'image_ap': average_precision(positive, scores),
        'image_f1': best.f1, 'image_threshold': best.threshold,
        'false_positives': best.false_positives, 'false_negatives': best.false_negatives,
        'error_at_full_recall': error_at_full_recall(positive, scores)}
  if masks is not None:
    if maps is None:
      raise ValueError('Expected maps beside masks, got None: pass maps, or masks=None.')
    if len(masks) != positive.size:
      raise ValueError(
          f'Expected a mask per image, got {len(masks)} masks and {positive.size} labels: '
          'drop the same images from both.')
    if _has_both(_flat(masks, maps, 'masks', 'maps')[0]):
      result |= {
          'pixel_auroc': auroc(masks, maps),
          'aupro': aupro(maps, masks, max_fpr=max_fpr, connectivity=connectivity)}
  return result


def _flat(labels, scores, labels_name='labels', scores_name='scores'):
  """Flat bool labels and flat float scores, or the reason why not."""
  labels, scores = np.asarray(labels), np.asarray(scores)
  if labels.shape != scores.shape:
    raise ValueError(
        f'{labels_name} {labels.shape} and {scores_name} {scores.shape} differ in shape: '
        'expected one score per label.')
  if not labels.size:
    raise ValueError(
        f'Expected at least one score, got {scores_name} {scores.shape}: nothing to rate.')
  positive = labels.astype(bool).ravel()
  if labels.dtype != bool and not np.array_equal(positive, labels.ravel()):
    raise ValueError(
        f'{labels_name}: expected 0 (good) and 1 (anomalous), got values such as '
        f'{np.unique(labels)[:5].tolist()}: compare with a threshold first.')
  if scores.dtype.kind != 'f':
    scores = scores.astype(np.float64)  # differences of unsigned integers would wrap around
  finite = np.isfinite(scores)
  if not finite.all():
    raise ValueError(
        f'{scores_name}: expected finite values, got {finite.size - finite.sum()} NaN or infinite '
        f'ones of {finite.size}: look for the images and weights that they come from.')
  return positive, scores.ravel()


def _checked(labels, scores, labels_name='labels', scores_name='scores'):
  """The same, of both classes."""
  positive, scores = _flat(labels, scores, labels_name, scores_name)
  if not _has_both(positive):
    raise ValueError(
        f'Only one class among {positive.size} {labels_name}: expected good (0) and anomalous (1) '
        f'ones, all are {int(positive[0])}. The metric is not defined; evaluate() gives None.')
  return positive, scores


def _has_both(positive):
  return bool(positive.any() and not positive.all())


def _working_points(positive, scores):
  """Distinct scores, descending, with the anomalous ones and all at or above each."""
  order = np.argsort(scores)[::-1]
  scores = scores[order]
  last = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)
  return scores[last], np.cumsum(positive[order])[last], last + 1


def _region_pixels(maps, masks, connectivity):
  """Scores of all anomalous pixels; what each adds to PRO, 1 / (pixels of its region * regions)."""
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
