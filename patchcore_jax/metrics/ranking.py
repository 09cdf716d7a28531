"""Metrics of the order of scores: how well scores put anomalous images or pixels above good ones.

Each is read off a curve (`curve.Curve`), of images or of pixels.
"""

import numpy as np

from patchcore_jax.metrics import curve as curves


def auroc(labels, scores) -> float:
  """Computes the area under the ROC curve, of images or of pixels; ties count one half.

  It is the share of (anomalous, good) pairs in the right order.

  Args:
    labels: bool or 0/1, any shape; 1 is anomalous.
    scores: the same shape; higher is more anomalous.

  Returns:
    A value in [0, 1].

  Raises:
    ValueError: nothing or shapes that differ, labels that are not 0 and 1, or scores that are not finite.
    NotDefined: only one class; a ValueError too.

  >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
  0.75
  """
  return auroc_of(curves.of_scores(labels, scores))


def auroc_of(curve: curves.Curve) -> float:
  """Computes the area under the ROC curve of a curve.

  Raises:
    NotDefined: only one class.
  """
  curve.check()
  wrong, tied, before = 0, 0, 0
  for part in curve.parts:
    # Whole numbers: counts of pairs are exact. Those of 3e9 pixels of each class still fit into 64 bits.
    counts = np.diff(part.found, prepend=before)
    wrong += int(counts @ part.above)
    tied += int(counts @ (part.alarms - part.above))
    before = part.found[-1]
  return 1 - (2 * wrong + tied) / (2 * curve.anomalous * curve.good)


def average_precision(labels, scores) -> float:
  """Computes the average precision: the sum of precision times the steps in recall.

  Arguments, result and errors are those of `auroc`. Tied scores are one step, as in scikit-learn.

  >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
  0.8333
  """
  return average_precision_of(curves.of_scores(labels, scores))


def average_precision_of(curve: curves.Curve) -> float:
  """Computes the average precision of a curve: recall rises where an anomalous score lies, and nowhere else.

  Raises:
    NotDefined: only one class.
  """
  curve.check()
  area, before = 0.0, 0
  for part in curve.parts:
    counts = np.diff(part.found, prepend=before)
    area += float(np.sum(counts * (part.found / (part.found + part.alarms))))
    before = part.found[-1]
  return area / curve.anomalous  # divided last: a precision of 1 everywhere gives 1
