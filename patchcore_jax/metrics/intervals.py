"""Intervals of metrics: how far a number may be off because the test set has so few images.

The image is the unit, because the pixels and regions of an image depend on one another. Good images are drawn
with replacement among the good ones and anomalous ones among the anomalous, so that classes keep their sizes.
Nothing is fitted again: an interval tells of other test images, not of other seeds or training images.

Two kinds: `auroc_interval` solves an equation and draws nothing; the others are bootstrap intervals (Efron
and Tibshirani, "An Introduction to the Bootstrap", 1993). `pixel_resamples` has those of pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from patchcore_jax.metrics import checks, ranking

FEW = 10  # anomalous images below which an interval has a note
# As many wrong pairs as are 1 / 4 of the pairs of one image: then the observed variance counts as much as the
# model's. `experiments.coverage` chose it.
_PRIOR = 0.25
_CELLS = 2**22  # of arrays with a row for each resample, which are made in blocks


class Interval(NamedTuple):
  """A value and where its truth may lie.

  Attributes:
    estimate: the value of the test set as it is.
    low, high: the limits, in the value's unit; None where the data cannot tell.
    method: how the limits were made, as words.
    level: the share of test sets whose intervals hold the truth, as intended.
    resamples: how many, or None where none were drawn.
    seed: of PCG64, or None where nothing was drawn or the caller's generator was used.
    notes: what to tell beside it; sentences.
  """

  estimate: float
  low: float | None
  high: float | None
  method: str
  level: float = 0.95
  resamples: int | None = None
  seed: int | None = None
  notes: tuple[str, ...] = ()

  def text(self, digits: int = 3) -> str:
    """Formats it.

    >>> Interval(0.931, 0.9149, 0.9441, 'score').text()
    '0.931 [0.915, 0.944]'
    >>> Interval(1.0, None, None, 'percentile').text()
    '1.000 [-, -]'
    """
    low, high = ('-' if v is None else f'{v:.{digits}f}' for v in (self.low, self.high))
    return f'{self.estimate:.{digits}f} [{low}, {high}]'

  @property
  def caption(self) -> str:
    """What a table says below it: level, method, number of resamples, seed and unit.

    >>> Interval(0.9, 0.8, 0.95, 'percentile', resamples=1000, seed=7).caption
    '95 % percentile intervals, 1,000 resamples of images within classes, seed 7'
    """
    drawn = '' if self.resamples is None else f', {self.resamples:,} resamples of images within classes'
    seed = '' if self.seed is None else f', seed {self.seed}'
    return f'{100 * self.level:g} % {self.method} intervals{drawn}{seed}'

  def excludes(self, value: float) -> bool:
    """Tells whether a value lies outside; never where the data cannot tell.

    >>> Interval(0.02, 0.01, 0.03, 'percentile').excludes(0), Interval(0.0, None, None, '').excludes(0)
    (True, False)
    """
    return self.low is not None and not self.low <= value <= self.high


# AUROC of images, in closed form.


def auroc_interval(labels, scores, *, level: float = 0.95) -> Interval:
  """Computes a score interval of the AUROC of images; nothing is drawn.

  It holds the values t with |estimate - t| <= z * sqrt(V(t)): the variance is that of the value in question,
  not of the estimate, so the interval stays within [0, 1] and is no point where the estimate is 1 (Newcombe,
  "Confidence intervals for an effect size measure based on the Mann-Whitney statistic", part 2, Statistics in
  Medicine 25, 2006, his method 5). V is the geometric mean of two models of both classes, exponential scores
  (Hanley and McNeil, Radiology 143, 1982, with Newcombe's mean of the sizes) and normal scores of equal
  variance, times the ratio of the observed variance (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988)
  to the model's at the estimate. The ratio is drawn towards 1 where too few pairs are in the wrong order to
  tell it; see `auroc_limits`.

  `python -m experiments.benchmark --subject=intervals` shows how often it holds the truth: 94.6 to 96.6 % for
  normal scores; 94 to 96 % for scores of eight other shapes with 150 images of each class, but less with 40
  good and 60 anomalous ones, down to 91 % for heavy tails. Other levels than 0.95 were not studied.

  Args:
    labels: [n] bool or 0/1; 1 is anomalous.
    scores: [n]; higher is more anomalous.
    level: in (0, 1).

  Raises:
    ValueError: as `ranking.auroc`; a level out of range.

  >>> auroc_interval([0] * 40 + [1] * 60, [0.0] * 40 + [1.0] * 60).text()
  '1.000 [0.965, 1.000]'
  """
  positive, scores = checks.of_both_classes(labels, scores)
  good, anomalous = scores[~positive], scores[positive]
  value = ranking.auroc(positive, scores)
  low, high = auroc_limits(value, delong_variance(positive, scores), good.size, anomalous.size, level=level)
  return Interval(value, float(low), float(high), 'score', level, notes=few(positive))


def delong_variance(labels, scores) -> float:
  """Computes the variance of an AUROC by DeLong's method; 0 where a class has one image only.

  Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988.

  Args:
    labels, scores: as `auroc_interval`.

  >>> round(delong_variance([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
  0.125
  """
  positive, scores = checks.of_both_classes(labels, scores)
  classes = [np.sort(scores[~positive]), np.sort(scores[positive])]
  if min(v.size for v in classes) < 2:
    return 0.0
  good, anomalous = classes
  return float(sum(
      np.var(np.searchsorted(theirs, own, 'left') + np.searchsorted(theirs, own, 'right'), ddof=1)
      / (4 * theirs.size**2 * own.size) for own, theirs in ((good, anomalous), (anomalous, good))))


def auroc_limits(auroc, variance, good: int, anomalous: int, *, level: float = 0.95):
  """Computes the limits of the score interval for AUROCs of test sets of the same size, all at once.

  Args:
    auroc: [...] estimates.
    variance: [...] their variances, by DeLong's method.
    good, anomalous: numbers of images.
    level: in (0, 1).

  Returns:
    Lower and upper limits, both [...] float64 in [0, 1].

  Raises:
    ValueError: a level out of range.
  """
  from scipy import special

  auroc, variance = np.asarray(auroc, np.float64), np.asarray(variance)

  def model(t):
    """Computes the variance of an AUROC that is truly t, between the two models."""
    spread = t * (1 - t)
    size = (good + anomalous) / 2
    exponential = spread * (1 + (size - 1) * ((1 - t) / (2 - t) + t / (1 + t)))
    # Two of a class on the same side of one of the other: a bivariate normal of correlation 1/2.
    pairs = spread - 2 * special.owens_t(special.ndtri(t), 3**-0.5)
    normal = spread + (good + anomalous - 2) * np.maximum(pairs, 0)
    return np.sqrt(exponential * normal) / (good * anomalous)

  margin = 1 / (2 * good * anomalous)
  wrong = np.minimum(auroc, 1 - auroc) * min(good, anomalous)
  weight = np.where(variance > 0, wrong / (wrong + _PRIOR), 0)
  ratio = weight * variance / model(np.clip(auroc, margin, 1 - margin)) + 1 - weight
  return score_limits(auroc, lambda t: ratio * model(t), level=level)


def score_limits(auroc: np.ndarray, variance: Callable[[np.ndarray], np.ndarray], *, level: float = 0.95):
  """Solves |estimate - t| = z * sqrt(variance(t)) for t below and above the estimates.

  Args:
    auroc: [...] float64 estimates.
    variance: of values [...] in [0, 1] that are taken for true; 0 at 0 and 1.
    level: in (0, 1).

  Returns:
    Lower and upper limits, both [...] float64.

  >>> wilson = score_limits(np.array(0.5), lambda t: t * (1 - t) / 10)
  >>> [round(float(limit), 3) for limit in wilson]
  [0.237, 0.763]
  """
  z, limits = _normal_quantile(level), []
  for end in (0.0, 1.0):
    inside, outside = auroc, np.full(auroc.shape, end)
    for _ in range(54):  # halvings, to the last bit
      middle = (inside + outside) / 2
      far = (middle - auroc)**2 > z**2 * variance(middle)
      inside, outside = np.where(far, inside, middle), np.where(far, middle, outside)
    limits.append(outside)
  return tuple(limits)


# Resamples.


def resampled(
    sizes: Sequence[int], resamples: int, seed: int | np.random.Generator = 0) -> list[np.ndarray]:
  """Draws images with replacement within strata: all draws of the first stratum, then all of the next.

  Args:
    sizes: number of images of each stratum.
    resamples: how many times.
    seed: of PCG64, or a generator that goes on from where it is.

  Returns:
    For each stratum the positions drawn, [resamples, size] int64.

  Raises:
    ValueError: no resamples, or an empty stratum.

  >>> [a.tolist() for a in resampled((3, 1), 2, seed=7)]
  [[[2, 1, 2], [2, 1, 2]], [[0], [0]]]
  """
  if resamples < 1 or not sizes or min(sizes) < 1:
    raise ValueError(
        f'Expected resamples and strata of at least 1 image, got {resamples} of strata of {list(sizes)}.')
  rng = np.random.default_rng(seed)
  return [rng.integers(0, size, (resamples, size)) for size in sizes]


def mean_interval(
    values, *, strata: Sequence | None = None, bounds: tuple[float, float] = (0.0, 1.0), level: float = 0.95,
    method: str = 'bca', resamples: int = 10_000, seed: int | np.random.Generator = 0,
) -> Interval:
  """Computes an interval of a mean of values of images, such as AUPIMO, or differences of two methods.

  Where all n values are equal no resample differs. Then at most a share 1 - (1 - level)^(1 / n), about 3 / n,
  of other images have another value ("rule of three", Hanley and Lippman-Hand, JAMA 249, 1983), and the
  bounds of a value say how far the mean may be off.

  Args:
    values: [n], one for an image.
    strata: [n] such as kinds of defects, within which images are drawn; one stratum without it.
    bounds: the least and the largest value that there can be; (-1, 1) for differences of shares.
    level: in (0, 1).
    method: 'bca' (Efron, JASA 82, 1987; with 1,000 resamples or more), 'percentile' or 'basic'.
    resamples, seed: see `resampled`.

  Raises:
    ValueError: no values, values that are not finite or out of bounds, an unknown method, too few resamples
      for 'bca', a level out of range.

  >>> mean_interval([0.1, 0.4, 0.8, 0.9, 1.0], seed=1).text(2)
  '0.64 [0.30, 0.90]'
  >>> mean_interval([1.0] * 30).text()
  '1.000 [0.905, 1.000]'
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size or not np.isfinite(values).all():
    raise ValueError(f'Expected finite values [n] of at least one image, got {values.shape}: leave out None.')
  if values.min() < bounds[0] or values.max() > bounds[1]:
    raise ValueError(
        f'Expected values from {bounds[0]:g} to {bounds[1]:g}, got {values.min():g} to {values.max():g}: '
        'pass their bounds.')
  check(level, method, ('percentile', 'basic', 'bca'), resamples)
  notes = (f'Only {values.size} images.',) if values.size < FEW else ()
  # A mean of equal values may differ from them in the last bit.
  estimate = float(values[0]) if np.ptp(values) == 0 else float(values.mean())
  if np.ptp(values) == 0:
    share = 1 - (1 - level)**(1 / values.size)
    low, high = (estimate + share * (bound - estimate) for bound in bounds)
    return Interval(
        estimate, low, high, 'rule-of-three', level, notes=(*notes, 'All images have the same value.'))
  groups = groups_of(strata, values.size)
  drawn = np.zeros(resamples)
  for group, positions in zip(groups, resampled([g.size for g in groups], resamples, seed), strict=True):
    drawn += values[group][positions].sum(axis=1)
  drawn /= values.size
  # Without image i the mean is (sum - value) / (n - 1).
  left_out = (values.sum() - values) / max(1, values.size - 1)
  return of_resamples(
      estimate, drawn, level=level, method=method, seed=seed, notes=notes, left_out=left_out)


def image_interval(
    function: Callable[[np.ndarray, np.ndarray], float], labels, scores, *, strata: Sequence | None = None,
    level: float = 0.95, method: str = 'percentile', resamples: int = 10_000,
    seed: int | np.random.Generator = 0,
) -> Interval:
  """Computes a bootstrap interval of any metric of images. Of the AUROC `auroc_interval` is the better one.

  `ranking.auroc` and `ranking.average_precision` are computed for all resamples at once; another function is
  called for each.

  Args:
    function: of labels [n] bool and scores [n]; gives a number.
    labels, scores: [n], as the function takes them.
    strata: [n] such as kinds of defects, within which images are drawn, none of them of both labels; good and
      anomalous images without it.
    level: in (0, 1).
    method: 'percentile' or 'basic'.
    resamples, seed: see `resampled`.

  Returns:
    The interval; without limits where no resample differs from another, as then the data cannot tell.

  Raises:
    ValueError: as `ranking.auroc`; strata of both labels; an unknown method, a level out of range.

  >>> image_interval(ranking.average_precision, [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], resamples=1000).text()
  '0.833 [0.500, 1.000]'
  """
  positive, scores = checks.of_both_classes(labels, scores)
  check(level, method, ('percentile', 'basic'), resamples)
  drawn = image_resamples(function, positive, [scores], strata=strata, resamples=resamples, seed=seed)[0]
  return of_resamples(
      float(function(positive, scores)), drawn, level=level, method=method, seed=seed, notes=few(positive))


def image_resamples(
    function: Callable, labels, scores: Sequence[np.ndarray], *, strata: Sequence | None = None,
    resamples: int = 10_000, seed: int | np.random.Generator = 0,
) -> list[np.ndarray]:
  """Computes a metric of images on resamples, the same ones for every method's scores.

  Args:
    function, labels, strata, resamples, seed: as `image_interval` takes them.
    scores: [n] of each method.

  Returns:
    For each method the values, [resamples] float64.

  Raises:
    ValueError: as `image_interval`.
  """
  methods = [checks.of_both_classes(labels, own) for own in scores]
  positive = methods[0][0]
  groups = groups_of(positive if strata is None else strata, positive.size, positive)
  picks = np.concatenate(
      [group[drawn] for group, drawn in zip(
          groups, resampled([g.size for g in groups], resamples, seed), strict=True)], axis=1)
  together = _TOGETHER.get(function)
  if together:
    weights = weights_of(picks, positive.size)
    return [together(positive, own, weights) for _, own in methods]
  return [np.array([function(positive[p], own[p]) for p in picks], np.float64) for _, own in methods]


def _aurocs(positive, scores, weights):
  """Computes AUROCs of resamples: twice the ordered pairs of images, ties one each, by products."""
  anomalous, good = scores[positive], scores[~positive]
  pairs = (anomalous[:, None] > good).astype(np.float64) + (anomalous[:, None] >= good)
  size = 2 * anomalous.size * good.size
  return np.concatenate([
      np.einsum('bg,bg->b', block[:, positive] @ pairs, block[:, ~positive])
      for block in blocks_of(weights, positive.size)]) / size


def _average_precisions(positive, scores, weights):
  """Computes average precisions of resamples: images are sorted once."""
  order = np.argsort(-scores, kind='stable')
  last = np.append(np.flatnonzero(np.diff(scores[order])), positive.size - 1)
  found = [precision_of_steps(np.cumsum(block[:, order] * positive[order], axis=1)[:, last],
                  np.cumsum(block[:, order], axis=1)[:, last]) for block in blocks_of(weights, positive.size)]
  return np.concatenate(found)


def precision_of_steps(found: np.ndarray, alarms: np.ndarray) -> np.ndarray:
  """Adds up precision times the steps in recall; [b, k] counts of what is found, and of all that alarm."""
  steps = np.diff(found, axis=1, prepend=0)
  return (steps * found / np.maximum(alarms, 1)).sum(axis=1) / found[:, -1]


_TOGETHER = {ranking.auroc: _aurocs, ranking.average_precision: _average_precisions}


def weights_of(picks: np.ndarray, size: int) -> np.ndarray:
  """Counts how often each image was drawn: [b, k] positions -> [b, size] float64."""
  rows = np.arange(len(picks))[:, None] * size
  return np.bincount((picks + rows).ravel(), minlength=len(picks) * size).reshape(-1, size).astype(np.float64)


def blocks_of(weights: np.ndarray, width: int) -> Iterator[np.ndarray]:
  """Yields rows of weights, as many at a time as may have `width` numbers each in memory."""
  step = max(1, _CELLS // width)
  for i in range(0, len(weights), step):
    yield weights[i:i + step]


def groups_of(
    strata: Sequence | None, size: int, positive: np.ndarray | None = None) -> list[np.ndarray]:
  """Lists the positions of the images of each stratum: good ones first, then by name."""
  if strata is None:
    return [np.arange(size)]
  strata = np.asarray(strata)
  if strata.shape != (size,):
    raise ValueError(f'Expected a stratum for each of {size} images, got {strata.shape}.')
  names, kinds = np.unique(strata, return_inverse=True)
  groups = [np.flatnonzero(kinds == k) for k in range(len(names))]
  if positive is None:
    return groups
  for name, group in zip(names, groups, strict=True):
    if positive[group].any() and not positive[group].all():
      raise ValueError(f'Expected good or anomalous images in a stratum, got both in {str(name)!r}.')
  return sorted(groups, key=lambda group: positive[group[0]])  # stable: by name within a class


def few(positive: np.ndarray) -> tuple[str, ...]:
  """Makes the note on test sets with few anomalous images; [n] bool."""
  number = int(np.count_nonzero(positive))
  return (f'Only {number} anomalous images.',) if number < FEW else ()


def _normal_quantile(level):
  """Finds how many standard deviations hold the level."""
  from scipy import special

  if not 0 < level < 1:
    raise ValueError(f'Expected 0 < level < 1, got {level}.')
  return special.ndtri((1 + level) / 2)


def check(level: float, method: str, methods: Sequence[str], resamples: int) -> None:
  """Refuses what no bootstrap interval can be made with."""
  _normal_quantile(level)
  if method not in methods:
    raise ValueError(f'Expected a method of {", ".join(methods)}, got {method!r}.')
  if method == 'bca' and resamples < 1000:
    raise ValueError(f"Expected 1,000 resamples or more with 'bca', got {resamples}: or use 'percentile'.")


def of_resamples(
    estimate: float, drawn: np.ndarray, *, level: float = 0.95, method: str = 'percentile',
    seed: int | np.random.Generator | None = None, notes: tuple[str, ...] = (),
    left_out: np.ndarray | None = None,
) -> Interval:
  """Makes an interval of the values of all resamples.

  Args:
    estimate: the value of the test set.
    drawn: [resamples] values; NaN where the metric is not defined.
    level: in (0, 1).
    method: 'percentile', 'basic' or 'bca'.
    seed: what they were drawn with.
    notes: of the interval.
    left_out: the values without each of the images, for 'bca'.

  Returns:
    The interval, without limits where all resamples agree.

  >>> of_resamples(0.5, np.linspace(0, 1, 1001)).text()
  '0.500 [0.025, 0.975]'
  """
  resamples, seed = len(drawn), None if seed is None or isinstance(seed, np.random.Generator) else int(seed)
  defined = drawn[np.isfinite(drawn)]
  if defined.size < drawn.size:
    notes = (*notes, f'Not defined on {drawn.size - defined.size:,} resamples, which are left out.')
  if not defined.size or np.ptp(defined) <= 1e-12 * abs(estimate):
    return Interval(estimate, None, None, method, level, resamples, seed, (
        *notes, 'All resamples agree: the data cannot tell how far it may be off.'))
  tails = np.array([(1 - level) / 2, (1 + level) / 2])
  if method == 'bca':
    tails = _corrected(tails, estimate, defined, left_out)
  low, high = np.quantile(defined, tails)
  if method == 'basic':
    low, high = 2 * estimate - high, 2 * estimate - low
  return Interval(estimate, float(low), float(high), method, level, resamples, seed, notes)


def _corrected(tails, estimate, drawn, left_out):
  """Shifts the tails for bias and skewness (Efron, JASA 82, 1987), as scipy.stats.bootstrap does."""
  from scipy import special

  bias = special.ndtri(((drawn < estimate).mean() + (drawn <= estimate).mean()) / 2)
  pulls = left_out.mean() - left_out
  skewness = (pulls**3).sum() / (6 * (pulls**2).sum()**1.5)
  shifted = bias + special.ndtri(tails)
  return special.ndtr(bias + shifted / (1 - skewness * shifted))
