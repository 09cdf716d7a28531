"""Comparisons of methods on the same images: tests, effect sizes, and intervals of differences.

A test says how surprising a difference would be if there were none; the interval of the difference says how
large it may be. Units are images or categories, never pixels, which depend on one another.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from patchcore_jax.metrics import checks, intervals

TOLERANCE = 1e-3  # differences that AUPIMO's authors take for none
_EXACT = 10  # remaining pairs from which on a normal distribution stands for all signs

Alternative = Literal['two-sided', 'greater', 'less']


class SignedRanks(NamedTuple):
  """The result of Wilcoxon's signed-rank test.

  Attributes:
    p_value: of the alternative.
    positive, negative: sums of the ranks of pairs in which the first is larger, and smaller.
    remaining: pairs that differ.
    effect_size: the rank-biserial correlation (positive - negative) / (positive + negative), from -1 to 1; 0
      where no pair differs.
    method: 'all signs' or 'normal'.
  """

  p_value: float
  positive: float
  negative: float
  remaining: int
  effect_size: float
  method: str


class AurocTest(NamedTuple):
  """The result of a permutation test of two AUROCs.

  Attributes:
    difference: AUROC of the first method less that of the second.
    p_value: two-sided.
    permutations: how many, or 2^n where all were looked at.
    seed: of PCG64, or None where all were looked at or the caller's generator was used.
  """

  difference: float
  p_value: float
  permutations: int
  seed: int | None


class Ranks(NamedTuple):
  """How k methods rank over n data sets.

  Attributes:
    average: [k] mean ranks; 1 is the best.
    statistic: Friedman's, corrected for ties.
    p_value: its, by a chi-squared distribution of k - 1 degrees of freedom.
    critical_difference: mean ranks that are further apart differ (Nemenyi).
    level: of the critical difference: 0.95 keeps the chance of any wrong one at 5 %.
  """

  average: np.ndarray
  statistic: float
  p_value: float
  critical_difference: float
  level: float


def wilcoxon(
    a, b, *, tolerance: float = TOLERANCE, zeros: Literal['wilcox', 'pratt'] = 'wilcox',
    alternative: Alternative = 'two-sided',
) -> SignedRanks:
  """Tests whether values of one method are larger than those of another (Wilcoxon's signed ranks).

  The method is always the same, so that p values can be compared: from 10 pairs that differ on, a normal
  distribution whose variance is corrected for ties, without correction for continuity; below that all 2^n
  signs. Sources: Wilcoxon, Biometrics Bulletin 1, 1945; Pratt, JASA 54, 1959; Kerby, Comprehensive Psychology
  3, 2014, for the effect size. AUPIMO's authors test so, with this tolerance (Bertoldo et al., BMVC 2024).

  Args:
    a, b: [n] values of the same images, such as AUPIMO.
    tolerance: differences of at most this are none.
    zeros: pairs that do not differ are left out ('wilcox'), or have ranks that are then left out ('pratt').
    alternative: 'two-sided', or 'greater' or 'less' for a against b.

  Returns:
    The result; p is 1 if no pair differs.

  Raises:
    ValueError: other than two arrays [n] of finite values, n > 0; a negative tolerance, or unknown names.

  >>> wilcoxon([0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.7])
  SignedRanks(p_value=0.25, positive=9.0, negative=1.0, remaining=4, effect_size=0.8, method='all signs')
  """
  from scipy import special, stats

  differences = _differences(a, b, tolerance)
  if zeros not in ('wilcox', 'pratt'):
    raise ValueError(f"Expected zeros to be 'wilcox' or 'pratt', got {zeros!r}.")
  _check(alternative)
  none = int(np.count_nonzero(differences == 0))
  remaining = differences.size - none
  if not remaining:
    return SignedRanks(1.0, 0.0, 0.0, 0, 0.0, 'all signs')
  if zeros == 'wilcox':
    differences, none = differences[differences != 0], 0
  ranks = stats.rankdata(np.abs(differences))
  positive, negative = (float(ranks[sign * differences > 0].sum()) for sign in (1, -1))
  ranks = ranks[differences != 0]
  if remaining < _EXACT:
    method = 'all signs'
    signs = np.arange(2**remaining)[:, None] >> np.arange(remaining) & 1
    sums = signs @ ranks  # of halves: exact
    upper, lower = (sums >= positive).mean(), (sums <= positive).mean()
  else:
    method, n = 'normal', differences.size
    _, ties = np.unique(ranks, return_counts=True)
    mean = (n * (n + 1) - none * (none + 1)) / 4
    variance = (n * (n + 1) * (2 * n + 1) - none * (none + 1) * (2 * none + 1)) / 24
    variance -= (ties.astype(np.float64)**3 - ties).sum() / 48
    z = (positive - mean) / np.sqrt(variance)
    upper, lower = special.ndtr(-z), special.ndtr(z)
  p = {'greater': upper, 'less': lower, 'two-sided': min(1, 2 * min(upper, lower))}[alternative]
  return SignedRanks(
      float(p), positive, negative, remaining, (positive - negative) / (positive + negative), method)


def sign_test(
    a, b, *, tolerance: float = TOLERANCE, alternative: Alternative = 'two-sided') -> float:
  """Computes the p value of the sign test, which assumes nothing of how large differences are.

  Arguments and errors are those of `wilcoxon`; pairs that do not differ are left out, and p is 1 if none is
  left.

  >>> sign_test([0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.7])
  0.625
  """
  from scipy import stats

  differences = _differences(a, b, tolerance)
  _check(alternative)
  larger, smaller = int((differences > 0).sum()), int((differences < 0).sum())
  if not larger + smaller:
    return 1.0
  return float(stats.binomtest(larger, larger + smaller, alternative=alternative).pvalue)


def paired_t(a, b, *, alternative: Alternative = 'two-sided') -> float:
  """Computes the p value of Student's test of paired values, which takes differences for normal ones.

  Arguments and errors are those of `wilcoxon`; p is 1 if no pair differs.

  Raises:
    NotDefined: one pair only, or differences that are all the same but 0; a ValueError too.

  >>> round(paired_t([0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.7]), 3)
  0.161
  """
  from scipy import stats

  differences = _differences(a, b, 0)
  _check(alternative)
  if not differences.any():
    return 1.0
  if differences.size < 2 or np.ptp(differences) <= 1e-12 * np.abs(differences).max():
    raise checks.NotDefined(
        f'Expected differences that vary, got {differences.size} of {differences[0]:g}: use sign_test.')
  return float(stats.ttest_1samp(differences, 0, alternative=alternative).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjusts p values of several tests, such as of categories, so that any one wrong finding is rare.

  Source: Holm, Scandinavian Journal of Statistics 6, 1979. A test is significant at 5 % where its adjusted
  value is below 0.05: then the chance that any of all tests is wrongly so is below 5 %.

  Raises:
    ValueError: values out of [0, 1].

  >>> holm([0.01, 0.04, 0.03])
  [0.03, 0.06, 0.06]
  """
  values = np.asarray(p_values, np.float64)
  if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
    raise ValueError(f'Expected p values in [0, 1], got {values.tolist()}: leave out None.')
  order = np.argsort(values)
  steps = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
  adjusted = np.empty(values.size)
  adjusted[order] = np.minimum(steps, 1)
  return adjusted.tolist()


def auroc_permutation(
    labels, a, b, *, permutations: int = 10_000, seed: int | np.random.Generator = 0) -> AurocTest:
  """Tests whether two methods have the same AUROC on the same images.

  If methods do not differ, an image's scores by the two may be exchanged. They are turned into ranks among
  all images first, so that units do not matter; every permutation exchanges those of each image or not, at
  random. Source: Venkatraman and Begg, Biometrika 83, 1996; with the difference of AUROCs as the statistic,
  Bandos, Rockette and Gur, Statistics in Medicine 24, 2005. p is (1 + permutations at least as far apart) /
  (1 + permutations); where there are no more than `permutations` ways in all, all are looked at.

  Args:
    labels: [n] bool or 0/1; 1 is anomalous.
    a, b: [n] scores by each method; higher is more anomalous.
    permutations: how many.
    seed: of PCG64, or a generator that goes on from where it is.

  Raises:
    ValueError: as `ranking.auroc`; no permutations.

  >>> auroc_permutation([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], [5, 6, 2, 7])
  AurocTest(difference=0.25, p_value=0.5, permutations=16, seed=None)
  """
  from scipy import stats

  positive, first = checks.of_both_classes(labels, a, scores_name='scores of the first method')
  _, second = checks.of_both_classes(labels, b, scores_name='scores of the second method')
  if permutations < 1:
    raise ValueError(f'Expected at least one permutation, got {permutations}.')
  n, ranks = positive.size, [stats.rankdata(own) for own in (first, second)]
  # Twice the pairs in order, ties one each, of an anomalous image's rank by one method and a good image's by
  # another. The difference of AUROCs of exchanged ranks is linear: each image adds or takes away its share.
  pairs = [[np.sign(u[positive][:, None] - v[~positive]) + 1 for v in ranks] for u in ranks]
  kept, exchanged = pairs[0][0] - pairs[1][1], pairs[0][1] - pairs[1][0]
  shares = np.empty(n)
  shares[positive] = (kept + exchanged).sum(axis=1)
  shares[~positive] = (kept - exchanged).sum(axis=0)
  observed = shares.sum()
  if n < 60 and 2**n <= permutations:
    signs = 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1) - 1
    p, permutations, seed = float(np.mean(np.abs(signs @ shares) >= abs(observed))), 2**n, None
  else:
    rng, far = np.random.default_rng(seed), 0
    for block in intervals.blocks_of(np.empty((permutations, 0)), n):
      signs = 2 * rng.integers(0, 2, (len(block), n)) - 1
      far += int((np.abs(signs @ shares) >= abs(observed)).sum())  # whole numbers: ties are exact
    p = (1 + far) / (1 + permutations)
    seed = None if isinstance(seed, np.random.Generator) else int(seed)
  size = 4 * np.count_nonzero(positive) * np.count_nonzero(~positive)
  return AurocTest(float(observed / size), p, permutations, seed)


def image_difference_interval(
    function: Callable[[np.ndarray, np.ndarray], float], labels, a, b, *, strata: Sequence | None = None,
    level: float = 0.95, method: str = 'percentile', resamples: int = 10_000,
    seed: int | np.random.Generator = 0,
) -> intervals.Interval:
  """Computes a bootstrap interval of the difference of a metric of images, with the same draws for both.

  Of means of values of images take `intervals.mean_interval` of the differences, with bounds (-1, 1).

  Args:
    function, strata, level, method, resamples, seed: as `intervals.image_interval`.
    labels: [n] bool or 0/1; 1 is anomalous.
    a, b: [n] scores by each method.

  Returns:
    The interval of the first's value less the second's; without limits where no resample differs.

  Raises:
    ValueError: as `intervals.image_interval`.

  >>> from patchcore_jax.metrics import auroc
  >>> labels, a, b = [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], [5, 6, 2, 7]
  >>> image_difference_interval(auroc, labels, a, b, resamples=1000).text()
  '0.250 [0.000, 1.000]'
  """
  positive, a = checks.of_both_classes(labels, a, scores_name='scores of the first method')
  _, b = checks.of_both_classes(labels, b, scores_name='scores of the second method')
  intervals.check(level, method, ('percentile', 'basic'), resamples)
  first, second = intervals.image_resamples(
      function, positive, [a, b], strata=strata, resamples=resamples, seed=seed)
  return intervals.of_resamples(
      float(function(positive, a)) - float(function(positive, b)), first - second, level=level,
      method=method, seed=seed, notes=intervals.few(positive))


def average_ranks(values, *, higher_is_better: bool = True) -> np.ndarray:
  """Computes mean ranks of methods over data sets or images; 1 is the best, equal ones share their mean rank.

  Args:
    values: [n, k], a column for each method.
    higher_is_better: whether the largest value has rank 1.

  Returns:
    [k] float64.

  Raises:
    ValueError: other than finite values [n, k], n > 0.

  >>> average_ranks([[0.9, 0.8, 0.8], [0.7, 0.6, 0.5]])
  array([1.  , 2.25, 2.75])
  """
  from scipy import stats

  values = np.asarray(values, np.float64)
  if values.ndim != 2 or not values.size or not np.isfinite(values).all():
    raise ValueError(f'Expected finite values [data sets, methods], got {values.shape}: leave out None.')
  return stats.rankdata(-values if higher_is_better else values, axis=1).mean(axis=0)


def compare_ranks(values, *, higher_is_better: bool = True, level: float = 0.95) -> Ranks:
  """Compares several methods over several data sets by their ranks: Friedman's test, and what differs.

  Source: Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7, 2006, section 3.2.
  The critical difference is Nemenyi's, q * sqrt(k (k + 1) / (6 n)), q the quantile of the studentised range
  over sqrt(2).

  Args:
    values, higher_is_better: as `average_ranks`, of two methods or more on two data sets or more.
    level: in (0, 1).

  Raises:
    ValueError: fewer methods or data sets, values that are not finite, a level out of range.

  >>> ranks = compare_ranks([[0.9, 0.8, 0.7], [0.8, 0.7, 0.6], [0.9, 0.6, 0.5], [0.8, 0.7, 0.3]])
  >>> ranks.average, round(ranks.critical_difference, 3), round(ranks.p_value, 4)
  (array([1., 2., 3.]), 1.657, 0.0183)
  """
  from scipy import special, stats

  average, values = average_ranks(values, higher_is_better=higher_is_better), np.asarray(values, np.float64)
  n, k = values.shape
  if n < 2 or k < 2 or not 0 < level < 1:
    raise ValueError(f'Expected 2 methods and data sets or more and 0 < level < 1, got {k}, {n} and {level}.')
  ties = sum((counts.astype(float)**3 - counts).sum() for counts in (
      np.unique(row, return_counts=True)[1] for row in values))
  spread = 1 - ties / (n * (k**3 - k))  # 0 where all methods tie everywhere
  deviation = n * ((average - (k + 1) / 2)**2).sum() * 12 / (k * (k + 1))
  statistic = float(deviation / spread) if spread > 0 else 0.0
  quantile = stats.studentized_range.ppf(level, k, np.inf) / np.sqrt(2)
  return Ranks(
      average, statistic, float(special.chdtrc(k - 1, statistic)),
      float(quantile * np.sqrt(k * (k + 1) / (6 * n))), level)


def _differences(a, b, tolerance):
  """Subtracts values, and takes differences of at most the tolerance for none."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or a.ndim != 1 or not a.size or not np.isfinite([a, b]).all():
    raise ValueError(
        f'Expected finite values [n] of the same images by both methods, got {a.shape} and {b.shape}: '
        'leave out images where either is None.')
  if tolerance < 0:
    raise ValueError(f'Expected a tolerance of 0 or more, got {tolerance}.')
  differences = a - b
  differences[np.abs(differences) <= tolerance] = 0
  return differences


def _check(alternative):
  """Refuses unknown alternatives."""
  if alternative not in ('two-sided', 'greater', 'less'):
    raise ValueError(f"Expected 'two-sided', 'greater' or 'less', got {alternative!r}.")
