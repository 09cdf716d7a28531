"""The numbers of VisA's own evaluation code, for comparison with papers that used it, and nothing else.

Source: amazon-science/spot-diff, commit 2a692ab57500 (Apache-2.0), for Zou et al., "SPot-the-Difference
Self-supervised Pre-training for Anomaly Detection and Segmentation", ECCV 2022. Its pixel areas come from 202
thresholds instead of every score, are rounded to four decimals, and are wrong where scores tie: constant maps
have 0 in place of 0.5, perfect ones 0.5 in place of 1. Its precision-recall areas are trapezoids, which give
more than average precision. Rely on `auroc` and `average_precision`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchcore_jax.metrics import checks, working_points

_MARGIN = 1e-8  # which vanishes in float32, as in the original


class VisaPixels(NamedTuple):
  """What VisA's code computes of pixels.

  Attributes:
    roc_auc, pr_auc: areas under the curves, rounded to four decimals.
    thresholds: [202] float64, descending.
    false_positive_rate, true_positive_rate, precision, f1: [202] float64 in [0, 1], of pixels above each
      threshold; precision is 1 where there are none.
  """

  roc_auc: float
  pr_auc: float
  thresholds: np.ndarray
  false_positive_rate: np.ndarray
  true_positive_rate: np.ndarray
  precision: np.ndarray
  f1: np.ndarray


def visa_pixels(maps: Sequence, masks: Sequence) -> VisaPixels:
  """Computes VisA's pixel metrics by its own rule, good images included.

  Every image is read twice. The scores of anomalous pixels are kept.

  Args:
    maps: n maps [h, w] of scores, of any sizes, read one at a time.
    masks: n masks of the same sizes, bool or 0/1. (The original has no anomaly in masks of 0 and 255, and
      stops with a ValueError, too.)

  Raises:
    ValueError: as `checks.images`.
    NotDefined: no anomalous or no normal pixel.

  >>> found = visa_pixels(np.array([[[0.1, 0.4, 0.35, 0.8]]]), np.array([[[0, 0, 1, 1]]]))
  >>> found.roc_auc, found.pr_auc  # the exact AUROC is 0.75
  (0.625, 0.75)
  """
  anomalous, lowest, highest, pixels = [], [], [], 0
  for _, values, mask in checks.images(maps, masks):
    anomalous.append(values[mask])
    lowest.append(values.min())
    highest.append(values.max())
    pixels += values.size
  scores = np.concatenate(anomalous)
  if scores.size in (0, pixels):
    raise checks.one_class(pixels, 'pixels', int(scores.size > 0))
  # In the type of the maps, as the original does it: its rounding decides where scores tie.
  thresholds = np.sort(np.concatenate([
      np.percentile(scores, np.linspace(100, 0, 100)), np.linspace(scores.max(), scores.min(), 100),
      [min(lowest) - _MARGIN, max(highest) + _MARGIN]]))
  counts = np.zeros((2, thresholds.size + 1), np.int64)  # normal and anomalous, by thresholds below the score
  for _, values, mask in checks.images(maps, masks, checked=True):
    for count, some in zip(counts, (values[~mask], values[mask])):
      count += np.bincount(np.searchsorted(thresholds, some, 'left'), minlength=count.size)
  false, true = np.cumsum(counts[:, :0:-1], axis=1)
  alarms = false + true
  precision = np.where(alarms > 0, true / np.maximum(alarms, 1), 1.0)
  false_rate, true_rate = false / (pixels - scores.size), true / scores.size
  areas = (np.trapezoid(true_rate, false_rate), np.trapezoid(precision, true_rate))
  return VisaPixels(
      *(round(float(area), 4) for area in areas), thresholds[::-1], false_rate, true_rate, precision,
      2 * true / (alarms + scores.size))


def visa_image_au_pr(labels, scores) -> float:
  """Computes the area under the precision-recall curve of images by trapezoids, as VisA's code does.

  Arguments, result and errors are those of `auroc`.

  >>> round(visa_image_au_pr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
  0.7917
  """
  precision, recall = working_points.precision_recall_curve(labels, scores)
  return float(np.trapezoid(precision, recall))
