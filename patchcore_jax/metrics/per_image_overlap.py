"""AUPIMO: how much of each image's defect is found while good images show almost no false alarm.

Source: Bertoldo, Ameln, Vaidya and Akcay, "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High
Speed and Low Tolerance", BMVC 2024. At a threshold t, F(t) is the mean over good images of the share of
pixels at or above t, and T_j(t) the share of the mask's pixels of image j. The value of an image is the
integral of T_j over ln F from a lower bound L to an upper bound U, divided by ln(U / L): 1 if all of the mask
lies above what good images reach, and (U - L) / ln(U / L), 3.9e-5, by chance. Normal pixels of anomalous
images are not looked at.

There are two rules. `aupimo` is that of the authors' library, for comparison with published numbers:
thresholds are evenly spaced, and the integral runs between those whose F is nearest to the bounds. With n
good pixels F is a multiple of 1 / n, so that the width is not ln(U / L): a perfect image may have 0.9987,
and another's 0.9947 may be shown as 1. `aupimo_interpolated` has every score as a threshold and cuts the
curve at the bounds. It is exact, and depends on nothing but the order of scores: rely on this one.

Either reads good images once and anomalous ones twice, one at a time. Of n good pixels about 2 U n are kept.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchcore_jax.metrics import checks
from patchcore_jax.metrics.false_positive_rate import HighestScores

BOUNDS = (1e-5, 1e-4)  # section 4 of the paper
_FEWEST, _FEW = 31, 300  # thresholds between the bounds: fewer are refused, or noted


class Aupimo(NamedTuple):
  """The recall of each anomalous image, averaged over rates of false alarms between two bounds.

  Attributes:
    values: [n] in [0, 1]; None for good images.
    mean: of the anomalous images. It hides much: look at the smallest, and at the shares of 0 and of 1.
    rule: 'nearest' or 'interpolated', for `aupimo` and `aupimo_interpolated`.
    bounds: the rates asked for, lower and upper.
    reached: the rates between which the integral runs.
    thresholds: scores at the lower and at the upper bound; for 'interpolated' the lowest scores of good
      images whose rate is not above the bounds.
    points: how many thresholds there are between the bounds.
    notes: what a reader must know, in sentences without a full stop.
  """

  values: tuple[float | None, ...]
  mean: float
  rule: str
  bounds: tuple[float, float]
  reached: tuple[float, float]
  thresholds: tuple[float, float]
  points: int
  notes: tuple[str, ...]


def aupimo(
    maps: Sequence, masks: Sequence, *, bounds: tuple[float, float] = BOUNDS,
    num_thresholds: int | None = 300_000, force: bool = False) -> Aupimo:
  """Computes the AUPIMO of each anomalous image by the rule of the authors' library.

  Args:
    maps: n maps [h, w] of scores, of any sizes, read one at a time.
    masks: n masks of the same sizes, bool or 0/1. An image without a marked pixel is a good one.
    bounds: lower and upper rate of false alarms, 0 < L < U <= 1.
    num_thresholds: how many, evenly spaced from the lowest to the highest score of good images, in the type
      of the maps, for float16 in float32; None for every distinct score, which is the limit of many.
    force: goes on where only 30 thresholds or fewer lie between the bounds.

  Raises:
    ValueError: as `checks.images`; bounds out of range, or fewer than 2 thresholds.
    NotDefined: no good or no anomalous image; more good pixels at their highest score than the lower bound
      allows, as where there are fewer than 1 / L; too few thresholds, or thresholds that coincide.

  >>> maps = np.stack([np.arange(10_000.0).reshape(100, 100), np.full((100, 100), 9950.0)])
  >>> masks = np.stack([np.zeros((100, 100), bool), np.eye(100, dtype=bool)])
  >>> aupimo(maps, masks, bounds=(1e-3, 1e-1), num_thresholds=10_000).values  # found from F = 0.005 on
  (None, 0.6527084789088667)
  """
  if num_thresholds is not None and num_thresholds < 2:
    raise ValueError(f'Expected at least 2 thresholds, or None for every score, got {num_thresholds}.')
  highest, anomalous = _sorted_out(maps, masks, bounds)
  scores, rates = highest.scores()
  if num_thresholds is not None:
    # Even spacing in float64, then rounded: the authors' thresholds, bit for bit.
    ends = float(highest.minimum), float(highest.maximum)
    spaced = np.linspace(*ends, num_thresholds).astype(scores.dtype)
    if not (np.diff(spaced) > 0).all():
      raise checks.NotDefined(
          f'Expected scores of good images with room for {num_thresholds:,} thresholds, got '
          f'{ends[0]:.6g} to {ends[1]:.6g} in {scores.dtype}: take fewer thresholds.')
    scores = spaced[spaced >= highest.lowest]
    rates = highest.rates(scores)
  lower, upper = bounds
  # The first of equal distances is the lowest threshold.
  first, last = (int(np.argmin(np.abs(rates - bound))) for bound in (upper, lower))
  points = last - first + 1
  if points == 1:
    raise checks.NotDefined(
        f'Expected a threshold for each of the bounds {lower:.3g} and {upper:.3g}, got {scores[first]:.6g} '
        'for both: take more good images or thresholds.')
  if points < _FEWEST and not force:
    raise checks.NotDefined(
        f'Expected at least {_FEWEST} thresholds between the bounds, got {points}: take more good images or '
        'thresholds, or force=True.')
  scores, rates = scores[first:last + 1], rates[first:last + 1]
  notes = [f'the rate nearest to {bound:.3g} is {rate:.3g}'
           for bound, rate in ((lower, rates[-1]), (upper, rates[0])) if abs(rate / bound - 1) > 0.01]
  if points < _FEW:
    notes.append(f'only {points} thresholds lie between the bounds')
  width = -np.diff(np.log(rates)) / math.log(upper / lower)
  if num_thresholds is None:
    reached, beyond = np.append(width / 2, 0), np.append(width / 2, 0)
  else:
    reached, beyond = np.append(width / 2, 0) + np.append(0, width / 2), np.zeros(scores.size)
  values = _values(maps, masks, anomalous, scores, reached, beyond)
  return _record(values, 'nearest', bounds, (rates[-1], rates[0]), (scores[-1], scores[0]), points, notes)


def aupimo_interpolated(
    maps: Sequence, masks: Sequence, *, bounds: tuple[float, float] = BOUNDS) -> Aupimo:
  """Computes the AUPIMO of each anomalous image, exactly between the bounds, with every score as a threshold.

  The curve between two points is T linear in ln F. An image whose mask lies above all that counts has 1.

  Args:
    maps, masks, bounds: as for `aupimo`.

  Raises:
    ValueError: as `checks.images`; bounds out of range.
    NotDefined: no good or no anomalous image; more good pixels at their highest score than the lower bound
      allows, as where there are fewer than 1 / L.

  >>> maps = np.stack([np.arange(100.0).reshape(10, 10), np.full((10, 10), 95.0)])
  >>> masks = np.stack([np.zeros((10, 10), bool), np.eye(10, dtype=bool)])
  >>> round(aupimo_interpolated(maps, masks, bounds=(0.01, 0.1)).mean, 3)  # found from F = 0.05 on
  0.349
  """
  highest, anomalous = _sorted_out(maps, masks, bounds)
  scores, rates = highest.scores()
  lower, upper = bounds
  within = (rates >= lower) & (rates <= upper)
  points, notes = int(within.sum()), []
  if points < _FEWEST:
    notes.append(f'good images have only {points} different rates of false alarms between the bounds')
  thresholds = tuple(scores[np.argmax(rates <= bound)] for bound in bounds)

  # Scores ascend and rates descend. From one good score up to the next, T falls from what reaches the first
  # to what lies beyond it, along ln F; then more of the mask may be lost at the second's F.
  first, last = np.flatnonzero(rates >= upper)[-1], np.flatnonzero(rates <= lower)[0]
  scores, x = scores[first:last + 1], np.log(rates[first:last + 1])
  right, left = np.minimum(x[:-1], math.log(upper)), np.maximum(x[1:], math.log(lower))
  middle = ((right + left) / 2 - x[1:]) / (x[:-1] - x[1:])  # of the piece that is inside, from left to right
  width = (right - left) / math.log(upper / lower)
  reached, beyond = np.append(width * middle, 0), np.append(width * (1 - middle), 0)
  values = _values(maps, masks, anomalous, scores, reached, beyond, whole=1.0)
  return _record(values, 'interpolated', bounds, bounds, thresholds, points, notes)


def _sorted_out(maps, masks, bounds):
  """Collects the highest scores of good images and the positions of anomalous ones."""
  if len(bounds) != 2 or not 0 < bounds[0] < bounds[1] <= 1:
    raise ValueError(f'Expected bounds of the rate of false alarms, 0 < lower < upper <= 1, got {bounds}.')
  highest, anomalous = HighestScores(2 * bounds[1], len(maps)), []
  for i, values, mask in checks.images(maps, masks):
    if mask.any():
      anomalous.append(i)
    else:
      highest.add(values)
  if not anomalous or not highest.images:
    raise checks.one_class(len(maps), 'images', int(not highest.images))
  least = highest.scores()[1][-1]
  if least > bounds[0]:
    raise checks.NotDefined(
        f'Expected good images with a rate of false alarms down to {bounds[0]:.3g}, got {least:.3g} at their '
        f'highest score: take at least {math.ceil(1 / bounds[0]):,} pixels with few that are equal, or other '
        'bounds.')
  return highest, anomalous


def _values(maps, masks, anomalous, thresholds, reached, beyond, whole=None):
  """Adds up, of each anomalous image, weights of the thresholds that pixels of its mask reach or lie beyond.

  `whole` is what pixels beyond all thresholds add, whatever rounding makes of the sum.
  """
  reached, beyond = (np.append(0.0, np.cumsum(weights)) for weights in (reached, beyond))
  values: list[float | None] = [None] * len(maps)
  for i in anomalous:
    ((_, scores, mask),) = checks.images([maps[i]], [masks[i]], checked=True)
    scores = scores[mask]
    found = scores[scores >= thresholds[0]]
    ranks = np.searchsorted(thresholds, found, 'right')
    shares = reached[ranks] + beyond[np.searchsorted(thresholds, found, 'left')]
    if whole is not None:
      shares[ranks == thresholds.size] = whole
    values[i] = min(float(shares.sum() / scores.size), 1.0)
  return values


def _record(values, rule, bounds, reached, thresholds, points, notes):
  mean = float(np.mean([value for value in values if value is not None]))
  return Aupimo(
      tuple(values), mean, rule, *(tuple(map(float, pair)) for pair in (bounds, reached, thresholds)), points,
      tuple(notes))
