"""Thresholds of pixels from maps of good images alone, which the model has not seen.

Every rule reads the maps one at a time, and none keeps them. A pixel is marked where its score is at least
the threshold, or above it where a function says so. For a rule with a guarantee for whole images see
`banks.calibration.threshold` (conformal prediction). A threshold that test labels choose, as
`working_points.f1_optimal` does, is an upper bound, and none of these.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from patchcore_jax.metrics import checks
from patchcore_jax.metrics.false_positive_rate import HighestScores

_DIGIT = 16  # bits of a score that are looked at in one pass


def k_sigma(maps: Sequence, *, k: float = 3.0) -> float:
  """Computes mean + k standard deviations of all pixels, the deviation that of a population.

  Source: what MVTec advises for AD 2, with k = 3. It guarantees nothing: heavy tails alarm.

  Args:
    maps: n maps [h, w] of good images, of any sizes, read one at a time.
    k: how many deviations.

  Returns:
    The threshold, in the unit of the scores. Sums are in float64.

  Raises:
    ValueError: no maps; scores that are not finite; k that is not.

  >>> k_sigma([np.array([[1.0, 3.0]]), np.array([[2.0, 2.0]])], k=2)
  3.414213562373095
  """
  if not math.isfinite(k):
    raise ValueError(f'Expected a finite number of standard deviations, got k={k}.')
  size, mean, squares = 0, 0.0, 0.0
  for values in _checked(maps):
    # Moments of images are merged: sums of squares alone would cancel (Chan, Golub and LeVeque, 1983).
    own_mean = float(values.mean(dtype=np.float64))
    own_squares = float(np.square(values - np.float64(own_mean)).sum())
    total = size + values.size
    shift = own_mean - mean
    squares += own_squares + shift * shift * size * values.size / total
    mean += shift * values.size / total
    size = total
  return mean + k * math.sqrt(squares / size)


def maximum(maps: Sequence) -> float:
  """Finds the highest score of all pixels. It grows with the number of images, and one outlier decides.

  Arguments and errors are those of `k_sigma`. Marked is what lies above it.

  >>> maximum([np.array([[1.0, 3.0]]), np.array([[2.0, 2.0]])])
  3.0
  """
  return max(float(values.max()) for values in _checked(maps))


def quantile(
    maps: Sequence, *, share: float = 0.999, method: Literal['higher', 'lower', 'linear'] = 'higher',
) -> float:
  """Finds the score that a share of all pixels does not exceed.

  Equal to `np.quantile` of all pixels together. Nothing is sorted: digits of 16 bits are counted, so that
  maps of float32 are read twice, of float64 four times, and memory does not grow with their number.

  Args:
    maps: as for `k_sigma`, all of one type.
    share: in [0, 1].
    method: 'higher' takes the higher of the two scores between which the quantile lies, so that no more
      pixels alarm (lie above) than asked; 'lower' the other; 'linear' interpolates.

  Raises:
    ValueError: as `k_sigma`; a share or method out of range; maps of several types.

  >>> maps = [np.array([[1.0, 3.0]]), np.array([[2.0, 4.0]])]
  >>> quantile(maps, share=0.5), quantile(maps, share=0.5, method='linear')
  (3.0, 2.5)
  """
  if not 0 <= share <= 1 or method not in ('higher', 'lower', 'linear'):
    raise ValueError(
        "Expected a share in [0, 1] and the method 'higher', 'lower' or 'linear', "
        f'got {share} and {method!r}.')
  low, high, part = _neighbours(maps, share)
  if method != 'linear':
    return high if method == 'higher' else low
  # From the nearer end, as NumPy does it: the last bit is the same.
  return low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)


def scaled_quantile(maps: Sequence, *, share: float = 0.95, factor: float = 1.421) -> float:
  """Computes a quantile times a factor, whose defaults were tuned on MVTec AD 2.

  Source: SuperADD, made for MVTec AD 2. It is linear between scores; errors are those of `quantile`.

  >>> scaled_quantile([np.array([[0.0, 1.0]])], share=1, factor=1.5)
  1.5
  """
  return factor * quantile(maps, share=share, method='linear')


def largest_area(maps: Sequence, *, area: int, connectivity: int = 8) -> float:
  """Finds the smallest threshold at which no image has a marked component of more pixels than an area.

  Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section on thresholds.

  Args:
    maps: as for `k_sigma`.
    area: the largest component that may stay marked, in pixels; 0 marks none, as just above the maximum.
    connectivity: 8 (pixels that touch at corners are one component) or 4.

  Returns:
    The smallest number of the maps' type above the last score that marks too much.

  Raises:
    ValueError: as `k_sigma`; a connectivity or area out of range, or one that no map could exceed.

  >>> largest_area([np.array([[5.0, 1.0, 3.0, 4.0]])], area=1) > 3.0
  True
  """
  from scipy import ndimage  # 0.2 s to import, for where it is needed

  if area < 0 or connectivity not in (4, 8):
    raise ValueError(f'Expected an area from 0 on and connectivity 4 or 8, got {area} and {connectivity}.')
  structure = np.ones((3, 3)) if connectivity == 8 else None

  def too_much(marked):
    if np.count_nonzero(marked) <= area:
      return False
    return np.bincount(ndimage.label(marked, structure)[0][marked]).max() > area

  lowest, constrained = -np.inf, False
  for values in _checked(maps):
    if values.size <= area:
      continue
    constrained = True
    if not too_much(values > lowest):
      continue
    # Components only grow as the threshold falls: the highest score that marks too much is found by halves.
    scores = np.unique(values[values > lowest])
    low, high = 0, scores.size  # too much at low, not at high
    while high - low > 1:
      middle = (low + high) // 2
      if too_much(values >= scores[middle]):
        low = middle
      else:
        high = middle
    lowest = scores[low]
  if not constrained:
    raise ValueError(f'Expected an area below that of a map, got {area} pixels: no threshold marks more.')
  return float(np.nextafter(lowest, np.inf, dtype=lowest.dtype))


def at_false_positive_rate(maps: Sequence, *, rate: float = 1e-4) -> float:
  """Finds the lowest score that a share of the pixels of good images at most reaches.

  The share is the mean over images of each one's. AUPIMO's bounds, 1e-4 and 1e-5, make working points of
  it (Bertoldo et al., "AUPIMO", BMVC 2024).

  Args:
    maps: as for `k_sigma`.
    rate: in (0, 1].

  Raises:
    ValueError: as `k_sigma`; a rate out of range, or one that too few pixels can show.

  >>> at_false_positive_rate([np.array([[1.0, 2.0, 3.0, 4.0]])], rate=0.5)
  3.0
  """
  if not 0 < rate <= 1:
    raise ValueError(f'Expected a false positive rate in (0, 1], got {rate}.')
  highest = HighestScores(rate, len(maps))
  for values in _checked(maps):
    highest.add(values)
  scores, rates = highest.scores()
  reached = np.flatnonzero(rates <= rate * (1 + 1e-12))  # sums of shares of unequal images are rounded
  if not reached.size:
    raise ValueError(
        f'Expected at most a share of {rate:.3g} of good pixels to have the highest score, got '
        f'{rates[-1]:.3g}: take at least {math.ceil(1 / rate)} pixels with few that are equal.')
  return float(scores[reached[0]])


# By name, for commands that offer a choice. Each takes maps, and keywords of its own.
RULES: dict[str, Callable[..., float]] = {
    rule.__name__: rule
    for rule in (k_sigma, maximum, quantile, scaled_quantile, largest_area, at_false_positive_rate)}


def _checked(maps: Sequence) -> Iterator[np.ndarray]:
  """Yields maps one by one."""
  if not len(maps):
    raise ValueError('Expected at least one map of a good image, got none: nothing to set a threshold by.')
  for i in range(len(maps)):
    values = np.asarray(maps[i])
    if values.ndim != 2 or not values.size:
      raise ValueError(f'image {i}, maps: expected [height, width], got {values.shape}.')
    checks.flat(np.zeros(values.shape, bool), values, scores_name=f'image {i}, maps')
    yield values if values.dtype.kind == 'f' else values.astype(np.float64)


def _neighbours(maps: Sequence, share: float) -> tuple[float, float, float]:
  """Finds the scores between which a quantile lies, digit by digit, and its distance from the lower one."""
  dtype = np.asarray(maps[0]).dtype if len(maps) else None
  dtype = dtype if dtype and dtype.kind == 'f' else np.dtype(np.float64)
  bits, part = 8 * dtype.itemsize, 0.0
  places = [(0, None), (0, None)]  # digits found so far, and the place among the scores that begin with them
  for shift in range(bits - _DIGIT, -1, -_DIGIT):
    counts = {prefix: np.zeros(2**_DIGIT, np.int64) for prefix, _ in places}
    for i, values in enumerate(_checked(maps)):
      if values.dtype != dtype:
        raise ValueError(f'image {i}, maps: expected {dtype} as of image 0, got {values.dtype}.')
      keys = _ordered(values)
      for prefix, count in counts.items():
        here = keys if shift + _DIGIT == bits else keys[keys >> keys.dtype.type(shift + _DIGIT) == prefix]
        count += np.bincount((here >> here.dtype.type(shift)).astype(np.uint16), minlength=2**_DIGIT)
    if shift + _DIGIT == bits:  # now the number of pixels is known
      at = share * (int(counts[0].sum()) - 1)
      part = at - math.floor(at)
      places = [(0, math.floor(at)), (0, math.ceil(at))]
    for j, (prefix, place) in enumerate(places):
      reached = np.cumsum(counts[prefix])
      digit = int(np.searchsorted(reached, place, 'right'))
      places[j] = prefix << _DIGIT | digit, place - int(reached[digit - 1] if digit else 0)
  low, high = (_score(key, dtype) for key, _ in places)
  return low, high, part


def _ordered(values: np.ndarray) -> np.ndarray:
  """Converts scores to whole numbers of the same order, of as many bits."""
  keys = (values.ravel() + values.dtype.type(0)).view(f'u{values.dtype.itemsize}')  # -0 + 0 is 0
  sign = keys.dtype.type(1 << 8 * keys.itemsize - 1)
  return np.where(keys & sign, ~keys, keys | sign)


def _score(key: int, dtype: np.dtype) -> float:
  """Converts one such number back."""
  sign = 1 << 8 * dtype.itemsize - 1
  key = key ^ sign if key & sign else key ^ (2 * sign - 1)
  return float(np.array(key, f'u{dtype.itemsize}').view(dtype))
