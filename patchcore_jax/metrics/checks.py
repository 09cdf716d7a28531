"""Checks of the labels and scores that every metric makes before it computes."""

import numpy as np


def flat(
    labels, scores, labels_name: str = 'labels', scores_name: str = 'scores',
) -> tuple[np.ndarray, np.ndarray]:
  """Flattens labels and scores, whatever classes there are.

  Args:
    labels: bool or 0/1, any shape; 1 is anomalous.
    scores: the same shape, any type of number; higher is more anomalous.
    labels_name, scores_name: what the messages call them.

  Returns:
    Labels [n] bool and scores [n] of a floating type, views of the input where its types allow.

  Raises:
    ValueError: nothing or shapes that differ, labels that are not 0 and 1, or scores that are not finite.

  >>> flat([[0, 1]], [[2, 3]])
  (array([False,  True]), array([2., 3.]))
  """
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


def of_both_classes(
    labels, scores, labels_name: str = 'labels', scores_name: str = 'scores',
) -> tuple[np.ndarray, np.ndarray]:
  """Flattens labels and scores as `flat` does, and refuses (ValueError) labels of one class only."""
  positive, scores = flat(labels, scores, labels_name, scores_name)
  if not has_both_classes(positive):
    raise ValueError(
        f'Only one class among {positive.size} {labels_name}: expected good (0) and anomalous (1) '
        f'ones, all are {int(positive[0])}. The metric is not defined; evaluate() gives None.')
  return positive, scores


def has_both_classes(positive: np.ndarray) -> bool:
  """Tells whether flat labels hold an anomalous one and a good one."""
  return bool(positive.any() and not positive.all())
