"""Checks of the labels and scores that every metric makes before it computes."""

from collections.abc import Iterator, Sequence

import numpy as np


class NotDefined(ValueError):
  """A metric has no value for data that are right: there is one class only, or there is too little of one."""


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
  """Flattens labels and scores as `flat` does, and refuses (NotDefined) labels of one class only."""
  positive, scores = flat(labels, scores, labels_name, scores_name)
  if positive.all() or not positive.any():
    raise one_class(positive.size, labels_name, int(positive[0]))
  return positive, scores


def one_class(number: int, what: str, only: int) -> NotDefined:
  """Makes the error of labels of one class only."""
  return NotDefined(
      f'Only one class among {number} {what}: expected good (0) and anomalous (1) ones, all are {only}. '
      'The metric is not defined; evaluate() gives None.')


def images(
    maps: Sequence, masks: Sequence, *, checked: bool = False,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Yields the maps and masks of images one by one, as (position, scores of a floating type, bool mask).

  Args:
    maps, masks: n arrays each, of the same sizes, read one at a time.
    checked: whether their values were looked at before.

  Raises:
    ValueError: none, or other numbers of maps than of masks; what `flat` raises, with the image's position.
  """
  if len(maps) != len(masks):
    raise ValueError(
        f'{len(masks)} masks and {len(maps)} maps differ in shape: expected a map for each mask.')
  if not len(maps):
    raise ValueError('Expected at least one score, got no maps: nothing to rate.')
  for i in range(len(maps)):
    values, mask = np.asarray(maps[i]), np.asarray(masks[i])
    if values.ndim != 2:
      raise ValueError(f'Expected maps [n, h, w], got {np.shape(maps[i])} for one of them.')
    if not checked or mask.dtype != bool or values.dtype.kind != 'f':
      shape = values.shape
      mask, values = flat(mask, values, f'image {i}, masks', f'image {i}, maps')
      mask, values = mask.reshape(shape), values.reshape(shape)
    # Exact, and quicker to sort.
    yield i, values.astype(np.float32) if values.dtype == np.float16 else values, mask
