"""Counts of pixels and images that a given threshold marks, and their F1.

Source: Heckler-Kram et al., "The MVTec AD 2 Dataset", arXiv 2503.21622: SegF1. The threshold comes from good
validation images (`thresholds`). Where the test images themselves choose it, or where F1 is a mean over
images or leaves good images out, it is another number and none of these.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from patchcore_jax.metrics import checks, thresholds


class Counts(NamedTuple):
  """Pixels or images that a threshold marks, rightly or wrongly, and that it misses.

  >>> Counts(3, 1, 2).f1, Counts(0, 0, 0).f1
  (0.6666666666666666, None)
  """

  true_positives: int
  false_positives: int
  false_negatives: int

  @property
  def f1(self) -> float | None:
    """2 TP / (2 TP + FP + FN), in [0, 1]; None where nothing is anomalous and nothing is marked."""
    total = 2 * self.true_positives + self.false_positives + self.false_negatives
    return 2 * self.true_positives / total if total else None


class Segmentation(NamedTuple):
  """What a threshold marks in the test images of one category.

  Attributes:
    threshold: the score.
    rule: 'greater_equal' marks scores at or above it, 'greater' scores above it.
    pixels: counts over all pixels of all images, good ones included.
    images: counts of images; one is marked where any of its pixels is.
  """

  threshold: float
  rule: str
  pixels: Counts
  images: Counts

  @property
  def seg_f1(self) -> float | None:
    """The F1 of pixels, SegF1."""
    return self.pixels.f1

  @property
  def class_f1(self) -> float | None:
    """The F1 of images by any marked pixel. Which rule MVTec's server has for ClassF1 is not public."""
    return self.images.f1


def count_marked(
    maps: Sequence, masks: Sequence, *, threshold: float,
    rule: Literal['greater_equal', 'greater'] = 'greater_equal', labels: Sequence | None = None,
) -> Segmentation:
  """Counts what a threshold marks in the test images of one category, each read once.

  For several categories (objects) compute each for itself; a figure for all is the plain mean.

  Args:
    maps: n maps [h, w] of scores, of any sizes, read one at a time.
    masks: n masks of the same sizes, bool or 0/1.
    threshold: a score, compared in float64 whatever the type of the maps.
    rule: whether scores at the threshold are marked.
    labels: [n] bool or 0/1, which images are anomalous; None takes those with an anomalous pixel.

  Raises:
    ValueError: as `checks.images`; a threshold that is not finite, an unknown rule, or not n labels.

  >>> maps, masks = np.array([[[1.0, 3.0]], [[2.0, 0.0]]]), np.array([[[1, 1]], [[0, 0]]])
  >>> found = count_marked(maps, masks, threshold=2)
  >>> found.pixels, found.seg_f1, found.class_f1
  (Counts(true_positives=1, false_positives=1, false_negatives=1), 0.5, 0.6666666666666666)
  """
  if not np.isfinite(threshold):
    raise ValueError(f'Expected a finite threshold, got {threshold}.')
  if rule not in ('greater_equal', 'greater'):
    raise ValueError(f"Expected the rule 'greater_equal' or 'greater', got {rule!r}.")
  if labels is not None:
    if len(labels) != len(masks):
      raise ValueError(f'{len(labels)} labels and {len(masks)} masks: expected a label for each mask.')
    labels = checks.flat(labels, np.zeros(len(labels)))[0]
  compare = np.greater if rule == 'greater' else np.greater_equal
  pixels, images = np.zeros(3, np.int64), np.zeros(3, np.int64)
  for i, values, mask in checks.images(maps, masks):
    marked = compare(values, np.float64(threshold))  # a Python number would be rounded to the maps' type
    found, alarms, anomalous = map(np.count_nonzero, (marked & mask, marked, mask))
    pixels += found, alarms - found, anomalous - found
    label = anomalous > 0 if labels is None else labels[i]
    images += label and alarms > 0, not label and alarms > 0, label and not alarms
  return Segmentation(float(threshold), rule, *(Counts(*map(int, counts)) for counts in (pixels, images)))


def beyond_validation(
    maps: Sequence, masks: Sequence, validation: Sequence, labels: Sequence) -> Segmentation:
  """Counts what is marked at the mean + 3 standard deviations of all pixels of good validation images.

  Args:
    maps, masks, labels: as for `count_marked`.
    validation: maps of good images that the model has not seen, read one at a time.

  Raises:
    ValueError: as `count_marked` and `thresholds.k_sigma`.
    NotDefined: no anomalous pixel.
  """
  found = count_marked(maps, masks, threshold=thresholds.k_sigma(validation), labels=labels)
  if not found.pixels.true_positives + found.pixels.false_negatives:
    raise checks.NotDefined('Only one class: expected an anomalous pixel, got none. SegF1 is not defined.')
  return found
