"""Thresholds from good images alone, with a finite-sample guarantee (conformal prediction).

n good images that the model has not seen have scores s_1 <= ... <= s_n. If a new good image is exchangeable
with them, its score is equally likely to take any of the n + 1 places among theirs, so it exceeds s_k with
a probability of at most 1 - k / (n + 1), whatever the distribution of the scores (Vovk, Gammerman and
Shafer, "Algorithmic Learning in a Random World", 2005; for anomaly detection: Laxhammar and Falkman, 2010).
`threshold` takes the smallest k that meets the rate asked for. The probability is over images and
calibration together.

With images held out of the bank that is exact. With cross-fitted scores of the training images themselves
(`Detector.fit_and_cross_score`), each is scored against a bank of the others, and a new image against the
bank of all. What is proven of such a scheme is CV+ (Barber, Candes, Ramdas and Tibshirani, "Predictive
inference with the jackknife+", 2021, theorem 4): where a is the rate above, K the number of folds, and a new
image is compared with each score by that score's own bank, it alarms with a probability of at most 2 a, and
min(2 (1 - 1/K) / (n/K + 1), (1 - K/n) / (K + 1)) more. Where the bank in use holds all patches of the folds'
banks (a ratio of 1), no score against it is larger than against theirs, so that the same holds. A selected
bank does not hold theirs; it is larger, and as a rule nearer to a new image, which nothing proves. A first
look by `experiments.thresholds`, at one draw of two built-in parts, gave about a (docs/own_images.md).

One partition into folds is used. The mean of an image's scores over several partitions is no score that a
new image could have: it has lost the part of the spread that comes from the bank, which the score of a new
image still has, so that thresholds come out too low.

Neither holds if images to come differ from these: another lamp, another batch of material, or, for
cross-fitting, bursts of nearly equal images, which vouch for each other.

A bank may be made on one kind of device and used on another that rounds otherwise. As far as scores of good
images are off there, thresholds are larger: the allowances.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchcore_jax.banks.model import Calibration

# Robust standard deviations above the median of the logarithm of the scores. With eight defective images
# among 213 good ones of a transistor this named five, and no good one.
_FAR = 4.5
_LEAST = 8  # fewer scores have no spread worth the name
_ROUNDING = 1e-5  # relative: scores of other batch sizes differed by 1e-7 to 1e-6
_TINY = 1e-30  # in place of 0, which has no logarithm
_MUCH = 0.1


def allows_much(found: Calibration) -> bool:
  """Tells whether the allowance takes over a tenth of the way from a usual good image to the threshold.

  A defect that a threshold without it would just have found is then lost too often for comfort.
  """
  room = found.image_threshold - found.image_allowance - float(np.median(found.image_scores))
  return found.image_allowance > _MUCH * max(room, 0)


def calibrate(
    image_scores: Sequence[float], map_maxima: Sequence[float] | None, *, false_alarm_rate: float,
    method: str = 'held out', allowances: tuple[float, float] = (0.0, 0.0)) -> Calibration:
  """Computes thresholds from scores of good images.

  Args:
    image_scores, map_maxima: [n], see `Calibration`; no maxima (None or ()) where the method has no maps.
    false_alarm_rate: in (0, 1).
    method: how the scores came about, for the record.
    allowances: for images and pixels, see `Calibration`; `inspection.differences` measures them.

  Raises:
    ValueError: no images, scores that are not finite, lengths that differ, or a rate out of range.

  >>> found = calibrate([1, 2, 3, 4], [5, 6, 7, 8], false_alarm_rate=0.4, allowances=(0.25, 0.5))
  >>> round(found.image_threshold, 3), round(found.pixel_threshold, 3)
  (3.25, 7.5)
  """
  map_maxima = tuple(() if map_maxima is None else map(float, map_maxima))
  if map_maxima and len(image_scores) != len(map_maxima):
    raise ValueError(f'Got {len(image_scores)} image scores and {len(map_maxima)} maxima of maps.')
  image_threshold, rate = threshold(image_scores, false_alarm_rate)
  pixel_threshold = threshold(map_maxima, false_alarm_rate)[0] + allowances[1] if map_maxima else None
  return Calibration(
      float(false_alarm_rate), rate, tuple(map(float, image_scores)), map_maxima,
      image_threshold + allowances[0], pixel_threshold, method, *map(float, allowances))


def threshold(scores: Sequence[float], false_alarm_rate: float) -> tuple[float, float]:
  """Finds the smallest threshold that n good images can vouch for.

  Args:
    scores: [n] scores of good images that the model has not seen.
    false_alarm_rate: the share of new good images whose score may reach the threshold.

  Returns:
    The threshold, just above the k-th smallest score with k = ceil((1 - rate) (n + 1)): by more than its
    last digits differ between batch sizes, so that an image does not alarm that it was set by. And the rate
    1 - k / (n + 1) that it guarantees. Where n < 1 / rate - 1, no score is large enough: then it is just
    above the largest, which guarantees 1 / (n + 1).

  Raises:
    ValueError: no scores, some that are not finite, or a rate out of range.

  >>> threshold([1.0, 2.0, 3.0, 4.0], 0.4)
  (3.00003, 0.4)
  >>> round(threshold([1.0, 2.0, 3.0, 4.0], 0.01)[1], 3)  # too few images
  0.2
  """
  if not 0 < false_alarm_rate < 1:
    raise ValueError(
        f'false_alarm_rate={false_alarm_rate}: expected a share between 0 and 1; 1 % is 0.01.')
  scores = np.sort(np.asarray(scores, np.float32))
  n = len(scores)
  if not n or not np.isfinite(scores).all():
    raise ValueError('A threshold needs at least one good image, and scores that are finite.')
  # A hair less, because 0.95 * 20 is 19 but for rounding.
  k = min(n, math.ceil((1 - false_alarm_rate) * (n + 1) - 1e-9))
  score = float(scores[k - 1])
  return score + _ROUNDING * max(abs(score), _TINY), 1 - k / (n + 1)


def p_value(calibration: Calibration, score: float) -> float:
  """Computes the share of good images, this one counted in, that score at least as high.

  A small share is suspicious.

  >>> p_value(calibrate([1, 2, 3, 4], [1, 1, 1, 1], false_alarm_rate=0.4), 3.5)
  0.4
  """
  reached = sum(s + calibration.image_allowance >= score for s in calibration.image_scores)
  return (1 + reached) / (1 + len(calibration.image_scores))


def calibrated_score(calibration: Calibration, score: float) -> float:
  """Converts a score to one between 0 and 1 that does not depend on the bank's units, and rises with it.

  It is 0.5 at the threshold and 0.1 for the median good image; 0.9 lies as far above the threshold as that
  lies below. The scale is logarithmic, or linear where the method gives good images negative scores. Like a
  probability it is easy to read, but it is none: `p_value` is.

  >>> c = calibrate([1, 2, 4, 8], [1, 1, 1, 1], false_alarm_rate=0.2)
  >>> [round(calibrated_score(c, s), 3) for s in (0, 8**0.5, 8, 8 * 8**0.5)]
  [0.0, 0.1, 0.5, 0.9]
  """
  return float(calibrated_scores(calibration, np.float64(score)))


def calibrated_scores(calibration: Calibration, scores: Any, xp: Any = np) -> Any:
  """Computes `calibrated_score` of many, in NumPy or, with `xp=jax.numpy`, inside a compiled program.

  Args:
    scores: any shape.
    xp: the module of the array's kind.
  """
  if min(calibration.image_scores) < 0:  # distances are never negative; a boundary has an inside
    reach = max(calibration.image_threshold - float(np.median(calibration.image_scores)), 1e-6)
    distance = (scores - calibration.image_threshold) / reach
    return 1 / (1 + xp.power(9.0, -xp.clip(distance, -100, 100)))
  threshold = max(calibration.image_threshold, _TINY)
  middle = float(np.median(np.log(np.maximum(calibration.image_scores, _TINY))))
  reach = max(math.log(threshold) - middle, 1e-6)  # it is 0 where all score the same
  # log(score / threshold), precise near the threshold in float32 too.
  positive = scores > 0  # others have no logarithm
  distance = xp.log1p((xp.where(positive, scores, threshold) - threshold) / threshold) / reach
  return xp.where(positive, 1 / (1 + xp.power(9.0, -xp.clip(distance, -100, 100))), 0)


def suspicious(scores: Sequence[float]) -> list[int]:
  """Lists positions of images that look unlike the others, most so first: perhaps they are not good.

  Their scores lie 4.5 standard deviations above the median, the deviation taken from the median absolute
  one, which outliers hardly move. The scale is that of `calibrated_score`. With fewer than 8 images there
  are none.

  Args:
    scores: [n], cross-fitted: an image that is in the model itself would hide.

  >>> suspicious([1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.1, 30.0, 1.0, 9.0])
  [7, 9]
  """
  if len(scores) < _LEAST:
    return []
  values = np.asarray(scores, np.float64)
  if values.min() >= 0:
    values = np.log(np.maximum(values, _TINY))
  middle = np.median(values)
  deviation = 1.4826 * np.median(np.abs(values - middle))  # that of a normal distribution
  order = np.argsort(-values, kind='stable')
  return [int(i) for i in order if values[i] > middle + _FAR * deviation]
