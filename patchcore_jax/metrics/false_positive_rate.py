"""The false positive rate of good images, of which only the few highest scores matter."""

import numpy as np

_ROOM = 2**16  # scores that may gather before it is worth to cut them down


class HighestScores:
  """Keeps the highest scores of good images: as many as the rate of false alarms needs, up to a limit.

  The rate F(t) is the mean over images of the share of pixels at or above t, so that each image counts the
  same, whatever its size (Bertoldo et al., "AUPIMO", BMVC 2024, section 3). It is exact at every threshold
  from `lowest` on; below that it is larger than the limit. Of n pixels about limit * n are kept, however
  many images are added, and equal scores are one.

  Args:
    limit: the largest rate that will be asked for.
    most_images: no more images than these will be added.

  >>> highest = HighestScores(0.5, most_images=2)
  >>> highest.add(np.array([[1.0, 2.0, 3.0, 4.0]]))
  >>> highest.add(np.array([[3.0, 3.0, 2.0, 0.0]]))
  >>> highest.rates(np.array([3.0, 4.0]))
  array([0.5  , 0.125])
  """

  def __init__(self, limit: float, most_images: int):
    self.images, self.minimum, self.maximum, self.lowest = 0, np.inf, -np.inf, -np.inf
    self._share = limit * most_images  # of an image's pixels, once all images are added
    self._unit = self._largest = 0
    self._scores, self._weights, self._waiting, self._length = None, None, [], 0

  def add(self, values: np.ndarray) -> None:
    """Adds the scores of an image: finite, of any shape and of a floating type."""
    self._unit = self._unit or values.size
    self._largest = max(self._largest, values.size)
    self.images += 1
    self.minimum, self.maximum = min(self.minimum, values.min()), max(self.maximum, values.max())
    kept = values[values >= self.lowest]
    # Pixels of the first image weigh 1: where all are of its size, sums are of whole numbers, and exact.
    self._waiting.append((kept, self._unit / values.size))
    self._length += kept.size
    if self._length > max(2 * self._enough, _ROOM):
      self._cut()

  def scores(self) -> tuple[np.ndarray, np.ndarray]:
    """Lists the distinct scores that were kept, ascending, and the rate at each."""
    self._cut()
    rates = np.minimum(np.cumsum(self._weights[::-1])[::-1] / (self._unit * self.images), 1.0)
    if self.lowest == -np.inf:
      rates[0] = 1.0  # all pixels, whatever rounding made of the sum
    return self._scores, rates

  def rates(self, thresholds: np.ndarray) -> np.ndarray:
    """Computes the rate at thresholds, none of them below `lowest`."""
    scores, rates = self.scores()
    return np.append(rates, 0.0)[np.searchsorted(scores, thresholds, 'left')]

  @property
  def _enough(self) -> int:
    """So many scores make a rate above the limit, though all were of the largest image."""
    return int(np.ceil(self._share * self._largest)) + 1

  def _cut(self):
    """Joins what was added, and drops what no rate up to the limit can need."""
    if not self._waiting:
      return
    scores = np.concatenate([values for values, _ in self._waiting])
    weights = np.concatenate([np.full(values.size, weight) for values, weight in self._waiting])
    if self._scores is not None:
      scores, weights = np.append(self._scores, scores), np.append(self._weights, weights)
    if scores.size > self._enough:
      self.lowest = np.partition(scores, scores.size - self._enough)[scores.size - self._enough]
      scores, weights = scores[scores >= self.lowest], weights[scores >= self.lowest]
    self._scores, inverse = np.unique(scores, return_inverse=True)
    self._weights = np.bincount(inverse, weights)
    self._waiting, self._length = [], self._scores.size
