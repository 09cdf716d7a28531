"""Studies how often intervals of the AUROC of images hold the truth, on simulated test sets.

    python -m experiments.benchmark --subject=intervals
    python -m experiments.benchmark --subject=intervals --sets=1000

Scores of good and of anomalous images are drawn from distributions whose AUROC is known (`SHAPES`). The way
of `metrics.auroc_interval` was chosen by this study; the others are those of the literature, and of the
bootstrap.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from patchcore_jax.metrics import intervals

AUROCS = (0.8, 0.95, 0.995)
SIZES = ((40, 60), (150, 150))  # good and anomalous images
LEVEL = 0.95
_Z = special.ndtri((1 + LEVEL) / 2)
_BLOCK = 500  # test sets at a time
_RESAMPLES = 400  # of the bootstrap: its tails are as good as 5,000 test sets can tell


class Sample(NamedTuple):
  """Test sets of one size and what intervals are made of.

  Attributes:
    auroc: [sets] estimates.
    good_variance, anomalous_variance: [sets] of the placements of a class's images among the other's.
    good, anomalous: numbers of images.
  """

  auroc: np.ndarray
  good_variance: np.ndarray
  anomalous_variance: np.ndarray
  good: int
  anomalous: int

  @property
  def variance(self) -> np.ndarray:
    """DeLong's variance of the AUROC."""
    return self.good_variance / self.good + self.anomalous_variance / self.anomalous


class Coverage(NamedTuple):
  """How intervals did: shares of the test sets, and a mean.

  Attributes:
    held: whose interval holds the truth.
    above, below: whose interval lies above the truth, and below it.
    width: the intervals' mean width.
  """

  held: float
  above: float
  below: float
  width: float


# Shapes of scores: of the AUROC, a generator and the shape [sets, good], [sets, anomalous].


def _normal(scale, auroc, rng, good, anomalous):
  """Draws normal scores; those of anomalous images have another standard deviation."""
  shift = special.ndtri(auroc) * np.hypot(1, scale)
  return rng.standard_normal(good), shift + scale * rng.standard_normal(anomalous)


def _exponential(auroc, rng, good, anomalous):
  """Draws exponential scores."""
  return rng.standard_exponential(good), auroc / (1 - auroc) * rng.standard_exponential(anomalous)


def _reversed_exponential(auroc, rng, good, anomalous):
  """Draws exponential scores with tails to the left."""
  far, near = _exponential(auroc, rng, anomalous, good)
  return -near, -far


def _heavy(auroc, rng, good, anomalous):
  """Draws scores of Student's t with 3 degrees of freedom."""
  return rng.standard_t(3, good), _heavy_shift(auroc) + rng.standard_t(3, anomalous)


@functools.cache
def _heavy_shift(auroc):
  """Finds the shift of Student's t that has the AUROC."""
  places = stats.t.ppf((np.arange(20_000) + 0.5) / 20_000, 3)
  return optimize.brentq(lambda shift: stats.t.cdf(places + shift, 3).mean() - auroc, 0, 60)


def _some_missed(auroc, rng, good, anomalous):
  """Draws anomalous images that are plain or look good, so that the AUROC tells how many are missed."""
  missed = rng.random(anomalous) < 2 * (1 - auroc)
  return rng.standard_normal(good), np.where(missed, 0, 20) + rng.standard_normal(anomalous)


def _some_odd(auroc, rng, good, anomalous):
  """Draws good images some of which look anomalous, such as those with dust."""
  odd = rng.random(good) < 2 * (1 - auroc)
  return np.where(odd, 20, 0) + rng.standard_normal(good), 20 + rng.standard_normal(anomalous)


SHAPES: dict[str, Callable] = {
    'normal': functools.partial(_normal, 1.0),
    'normal, anomalous twice as wide': functools.partial(_normal, 2.0),
    'normal, anomalous three times as wide': functools.partial(_normal, 3.0),
    'normal, anomalous half as wide': functools.partial(_normal, 0.5),
    'exponential': _exponential,
    'exponential to the left': _reversed_exponential,
    "Student's t, 3 degrees": _heavy,
    'some anomalous look good': _some_missed,
    'some good look anomalous': _some_odd,
}


# Ways to make an interval, of `Sample`: (lower limits, upper limits).


def delong(sample: Sample):
  """Adds and takes away DeLong's standard errors."""
  error = _Z * np.sqrt(sample.variance)
  return sample.auroc - error, sample.auroc + error


def logit(sample: Sample):
  """Does so on the scale of log-odds; at 1, by the smaller class alone (Clopper and Pearson)."""
  theta = sample.auroc
  with np.errstate(divide='ignore', invalid='ignore'):
    error = _Z * np.sqrt(sample.variance) / (theta * (1 - theta))
    low, high = special.expit(special.logit(theta) - error), special.expit(special.logit(theta) + error)
  low[theta == 1] = ((1 - LEVEL) / 2) ** (1 / min(sample.good, sample.anomalous))
  high[theta == 1] = 1
  return low, high


def effective_wilson(sample: Sample):
  """Takes Wilson's interval of a share, of as many images as have the AUROC's variance."""
  theta, least = sample.auroc, min(sample.good, sample.anomalous)
  with np.errstate(divide='ignore', invalid='ignore'):
    size = np.where(sample.variance > 0, theta * (1 - theta) / sample.variance, least)
  size = np.clip(size, least, None)
  middle = (theta + _Z**2 / 2 / size) / (1 + _Z**2 / size)
  error = _Z / (1 + _Z**2 / size) * np.sqrt(theta * (1 - theta) / size + (_Z / 2 / size) ** 2)
  return middle - error, middle + error


def newcombe(sample: Sample):
  """Solves for the AUROC with the variance of exponential scores (Newcombe 2006, method 5)."""
  size = (sample.good + sample.anomalous) / 2

  def variance(t):
    return t * (1 - t) * (1 + (size - 1) * ((1 - t) / (2 - t) + t / (1 + t))) / sample.good / sample.anomalous

  return intervals.score_limits(sample.auroc, variance, level=LEVEL)


def ours(sample: Sample):
  """Does as `metrics.auroc_interval`."""
  return intervals.auroc_limits(
      sample.auroc, sample.variance, sample.good, sample.anomalous, level=LEVEL)


WAYS: dict[str, Callable] = {
    'auroc_interval': ours, 'Newcombe 5': newcombe, 'Wilson, effective size': effective_wilson,
    'logit': logit, 'DeLong': delong}


def sample_of(good: np.ndarray, anomalous: np.ndarray) -> Sample:
  """Computes what intervals are made of, for scores [sets, good] and [sets, anomalous] without ties.

  >>> s = sample_of(np.array([[0.1, 0.4]]), np.array([[0.35, 0.8]]))
  >>> s.auroc, s.variance
  (array([0.75]), array([0.125]))
  """
  n = good.shape[1], anomalous.shape[1]
  ranks = _ranks(np.concatenate([good, anomalous], axis=1))
  # How many of the other class lie below an image: its rank among all less that among its own.
  above, below = ranks[:, :n[0]] - _ranks(good), ranks[:, n[0]:] - _ranks(anomalous)
  return Sample(
      below.mean(axis=1) / n[0], (above / n[1]).var(axis=1, ddof=1), (below / n[0]).var(axis=1, ddof=1), *n)


def _ranks(scores):
  return np.argsort(np.argsort(scores, axis=1), axis=1)


def simulate(
    shape: str, auroc: float, size: tuple[int, int], sets: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields scores of good and of anomalous images, some test sets [s, n] at a time."""
  rng = np.random.default_rng(seed)
  for start in range(0, sets, _BLOCK):
    count = min(_BLOCK, sets - start)
    yield SHAPES[shape](auroc, rng, *((count, n) for n in size))


def coverage(
    shape: str, auroc: float, size: tuple[int, int], sets: int, seed: int = 0, bootstrap: bool = False,
) -> tuple[float, dict[str, Coverage]]:
  """Measures the ways on simulated test sets.

  Args:
    shape: of `SHAPES`.
    auroc: the truth.
    size: numbers of good and of anomalous images.
    sets: number of test sets.
    seed: of what is drawn.
    bootstrap: whether the percentile bootstrap is measured too, which takes longer.

  Returns:
    The share of test sets whose estimate is 1, and {way: coverage}.
  """
  ways, limits, perfect = dict(WAYS), {}, []
  for good, anomalous in simulate(shape, auroc, size, sets, seed):
    sample = sample_of(good, anomalous)
    perfect.append(sample.auroc == 1)
    for name, way in ways.items():
      limits.setdefault(name, []).append(np.stack(way(sample)))
    if bootstrap:
      limits.setdefault('percentile bootstrap', []).append(_percentiles(good, anomalous, seed))
  return float(np.concatenate(perfect).mean()), {
      name: _coverage(*np.concatenate(own, axis=1), auroc) for name, own in limits.items()}


def _percentiles(good, anomalous, seed):
  """Makes percentile intervals by the bootstrap, with the same draws for every test set."""
  picks = intervals.resampled((good.shape[1], anomalous.shape[1]), _RESAMPLES, seed)
  weights = [intervals.weights_of(drawn, drawn.shape[1]) for drawn in picks]
  drawn = np.stack([
      np.einsum('bg,bg->b', weights[1] @ (y[:, None] > x).astype(np.float64), weights[0])
      for x, y in zip(good, anomalous, strict=True)]) / good.shape[1] / anomalous.shape[1]
  return np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)


def _coverage(low, high, truth):
  return Coverage(
      float(((low <= truth) & (truth <= high)).mean()), float((low > truth).mean()),
      float((high < truth).mean()), float((np.minimum(high, 1) - np.maximum(low, 0)).mean()))


def table(sets: int, shapes: Sequence[str] = tuple(SHAPES), seed: int = 0) -> Iterator[str]:
  """Yields a table in Markdown: the share of intervals that hold the truth, in percent."""
  error = 100 * np.sqrt(LEVEL * (1 - LEVEL) / sets)
  yield (f'### Coverage of {100 * LEVEL:g} % intervals of image AUROC, in percent of {sets:,} simulated test '
         f'sets (standard error {error:.1f}), seed {seed}\n')
  yield (f'In brackets: intervals above the truth, and below it, and mean width. The bootstrap has '
         f'{_RESAMPLES} resamples, of normal scores only.\n')
  names = [*WAYS, 'percentile bootstrap']
  yield f'| scores | AUROC | images | estimate is 1 | {" | ".join(names)} |'
  yield '|---|---|---|---|' + '---|' * len(names)
  for shape in shapes:
    for auroc in AUROCS:
      for size in SIZES:
        perfect, found = coverage(shape, auroc, size, sets, seed, bootstrap=shape == 'normal')
        cells = [_cell(found[name]) if name in found else '' for name in names]
        yield (f'| {shape} | {auroc} | {size[0]} + {size[1]} | {100 * perfect:.1f} | '
               f'{" | ".join(cells)} |')
  yield ''


def _cell(own):
  return f'{100 * own.held:.1f} ({100 * own.above:.1f}, {100 * own.below:.1f}; {own.width:.3f})'
