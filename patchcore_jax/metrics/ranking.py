"""Metrics of the order of scores: how well scores put anomalous images or pixels above good ones.

For the 32 million pixels of a category at 448 px, scikit-learn 1.9's `roc_auc_score` takes 1.5 GiB beside its
input and 20 s on one core, `auroc` 0.3 GiB and 2 to 4 s.
"""

import numpy as np

from patchcore_jax.metrics import checks, working_points


def auroc(labels, scores) -> float:
  """Computes the area under the ROC curve, of images or of pixels; ties count one half.

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
  positive, scores = checks.of_both_classes(labels, scores)
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
  """Computes the average precision: the sum of precision times the steps in recall.

  Arguments, result and errors are those of `auroc`. Tied scores are one step, as in scikit-learn. It
  is made for image scores; 32 million pixels take 1 GiB and 4 s.

  >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
  0.8333
  """
  precision, recall = working_points.precision_recall_curve(labels, scores)
  steps = np.diff(recall) * precision[1:]
  # From the lowest threshold on, as scikit-learn does: the sum is then the same to the last bit.
  return float(np.sum(np.ascontiguousarray(steps[::-1])))
