"""Metrics of decisions: what happens at a threshold that the labels choose."""

from typing import NamedTuple

import numpy as np

from patchcore_jax.metrics import checks
from patchcore_jax.metrics import curve as curves


class F1Optimum(NamedTuple):
  """The working point of the best F1 under the rule "score >= threshold"."""

  threshold: float
  f1: float
  false_positives: int
  false_negatives: int


def f1_optimal(labels, scores) -> F1Optimum:
  """Finds the threshold of the best F1, the lowest of them on ties.

  Arguments and errors are those of `auroc`. Source: Roth et al., CVPR 2022, supplement, section C.4.

  >>> f1_optimal([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
  F1Optimum(threshold=0.35, f1=0.8, false_positives=1, false_negatives=0)
  """
  return f1_optimal_of(curves.of_scores(labels, scores))


def f1_optimal_of(curve: curves.Curve) -> F1Optimum:
  """Finds the threshold of the best F1 of a curve, which is an anomalous score: good ones only add alarms.

  Raises:
    NotDefined: only one class.
  """
  curve.check()
  best = None
  for part in curve.parts:
    f1 = 2 * part.found / (part.found + part.alarms + curve.anomalous)  # 2 TP / (TP + FP + TP + FN)
    i = f1.size - 1 - int(np.argmax(f1[::-1]))  # thresholds descend, so the last maximum is the lowest
    if best is None or f1[i] >= best.f1:
      best = F1Optimum(
          float(part.thresholds[i]), float(f1[i]), int(part.alarms[i]), int(curve.anomalous - part.found[i]))
  return best


def error_at_full_recall(labels, scores) -> float:
  """Computes the share of images that are wrong at the highest threshold that finds every anomalous one.

  Arguments, result and errors are those of `auroc`. Source: Roth et al., CVPR 2022, supplement, section B.

  >>> error_at_full_recall([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
  0.25
  """
  positive, scores = checks.of_both_classes(labels, scores)
  return float((scores[~positive] >= full_recall_threshold(positive, scores)).sum() / positive.size)


def full_recall_threshold(labels, scores) -> float:
  """Finds the highest threshold that finds every anomalous image, under the rule "score >= threshold".

  Arguments and errors are those of `auroc`.

  >>> full_recall_threshold([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
  0.35
  """
  positive, scores = checks.of_both_classes(labels, scores)
  return float(scores[positive].min())


def roc_curve(labels, scores) -> tuple[np.ndarray, np.ndarray]:
  """Computes the ROC curve: false alarms and what is found, at thresholds from the highest to the lowest.

  Arguments and errors are those of `auroc`; tied scores are one threshold, and the first point is without
  alarms.

  Returns:
    The share of good ones that are alarms and the share of anomalous ones that are, both [t + 1] float64
    from 0 to 1, for t distinct scores.

  >>> roc_curve([0, 1, 1], [0.1, 0.1, 0.8])
  (array([0., 0., 1.]), array([0. , 0.5, 1. ]))
  """
  positive, scores = checks.of_both_classes(labels, scores)
  _, found, alarms = _working_points(positive, scores)
  found, alarms = np.append(0, found), np.append(0, alarms)
  return (alarms - found) / (positive.size - found[-1]), found / found[-1]


def precision_recall_curve(labels, scores) -> tuple[np.ndarray, np.ndarray]:
  """Computes precision and recall at thresholds from the highest to the lowest.

  Arguments and errors are those of `auroc`; tied scores are one threshold. The first point is without
  alarms, where precision is taken as 1.

  Returns:
    The share of alarms that are right and the share of anomalous ones that are found, both [t + 1] float64
    in [0, 1], for t distinct scores.

  >>> precision_recall_curve([0, 1, 1], [0.4, 0.1, 0.8])
  (array([1.        , 1.        , 0.5       , 0.66666667]), array([0. , 0.5, 0.5, 1. ]))
  """
  positive, scores = checks.of_both_classes(labels, scores)
  _, found, alarms = _working_points(positive, scores)
  return np.append(1, found / alarms), np.append(0, found / found[-1])


def _working_points(positive, scores):
  """Lists the distinct scores, descending, and counts the anomalous images and all images that reach each."""
  order = np.argsort(scores)[::-1]
  scores = scores[order]
  last = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)
  return scores[last], np.cumsum(positive[order])[last], last + 1
