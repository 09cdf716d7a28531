"""Measures how fast this machine does the work of a fit, on a few of its patches, and tells the time left."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax.detectors.base import Run
from patchcore_jax.detectors.patchcore import fit_time
from patchcore_jax.detectors.patchcore.fit_time import Rates, Work
from patchcore_jax.search import coreset, k_center, neighbors, search_bank

_LONG = 4.0  # seconds that are worth a line
_WORTH_MEASURING = 20.0  # seconds, by the default rates
# Patches of the sample, and how many are selected of them; queries and the largest bank of a sample's search.
_POINTS, _SHARE_SELECTED, _QUERIES, _BANK = 16384, 16, 2048, 8192
_USUAL_SHARE = 0.41  # of the pairs that such a selection compares: 0.35 to 0.45, measured as in `fit_time`
_LEAST, _MOST = 0.5, 2.5  # how far a sample may move what is usual


class Teller:
  """Passes progress on, and tells once, after a few batches, how long the fit will take.

  Args:
    run: whom to tell. Where nobody listens, nothing is measured.
    work: what the fit has to do.
    sample: a function that returns embeddings [b, rows, columns, d] of some of the images.
    num_neighbors: neighbours that a search for thresholds asks for.
  """

  def __init__(self, run: Run, work: Work, *, sample: Callable[[], np.ndarray], num_neighbors: int = 1):
    self._run, self._work, self._sample, self._neighbors = run, work, sample, num_neighbors
    self._times, self._told = [], run.notify is Run.notify

  def __call__(self, stage: str, done: int, total: int) -> None:
    """Is called as `Run.progress` is, by the embedding."""
    self._run.progress(stage, done, total)
    if self._told or stage != 'embed':
      return
    self._times.append((time.monotonic(), done))
    if len(self._times) == 3 or done >= total:
      self._told = True
      self._tell(done, total)

  def _tell(self, done, total):
    (first, before), (last, after) = self._times[0], self._times[-1]
    # The first batch compiles. Where there is no other, nothing is left either.
    rates = Rates(image=(last - first) / max(1, after - before))
    left = fit_time.estimate(self._work, rates, images_left=total - done)
    if left.selection + left.thresholds >= _WORTH_MEASURING:
      left = fit_time.estimate(
          self._work, measure(self._sample(), self._work, rates, k=self._neighbors), images_left=total - done)
    if left.total >= _LONG:
      self._run.notify(str(left))


def measure(embeddings: np.ndarray, work: Work, rates: Rates, *, k: int = 1) -> Rates:
  """Measures all rates but that of the network, in a few seconds.

  Most of them are for compiling programs for the sample, which are the same for every fit with this network:
  where compiled programs are kept, as the command line keeps them, a second is left.

  Args:
    embeddings: [b, rows, columns, d], or [n, d].
    work: the work that is to be estimated.
    rates: what is known; parts that `work` does not need stay as they are.
    k: neighbours of a search.
  """
  patches = np.asarray(embeddings, np.float32).reshape(-1, embeddings.shape[-1])
  rng = np.random.default_rng(0)
  patches = patches[rng.permutation(len(patches))[:_POINTS + _QUERIES]]
  if work.greedy:
    rates = _selection_rates(patches[:_POINTS], work, rates)
  if work.folds:
    rates = _search_rates(patches, work, rates, k)
  return rates


def _selection_rates(patches, work, rates):
  """Measures a selection of a few, its pure products, and the share of pairs that it compares."""
  points = coreset.random_projection(patches, work.points_dim, key=jax.random.key(0))
  n, m = len(points), max(2, len(points) // _SHARE_SELECTED)
  if n < 1024:
    return rates
  rounds = []

  def note(state):
    rounds.append((time.monotonic(), state.ages.sum(dtype=jnp.float32).item() / n))

  began = time.monotonic()
  coreset.greedy_k_center(points, m, start=[0], checkpoint=note)
  compared = rounds[-1][1]
  seconds, first = rounds[-1][0] - rounds[0][0], rounds[0][0] - began
  # A selection goes on that has compared nothing with those selected so far, and one that has with all.
  taken = []
  for ages in (0, m - 1) * 2:
    state = k_center.initial_state(jnp.full(n, 1e30), m)._replace(
        ages=jnp.full(n, ages, jnp.int32), indices=jnp.asarray(np.arange(m) * (n // m), jnp.int32),
        count=jnp.int32(m - 1))
    jax.block_until_ready(state)
    before = time.monotonic()
    coreset.greedy_k_center(points, m, start=[0], resume=state)
    taken.append(time.monotonic() - before)
  all_pairs, none = min(taken[0::2]), min(taken[1::2])
  product = max(all_pairs - none, 0.1 * all_pairs) / (n * (m - 1) * work.points_dim)
  expected = fit_time.others_seconds(n, m, len(rounds) - 1, dataclasses.replace(work, num_devices=1))
  other = (seconds - product * compared * n * work.points_dim) / expected
  return dataclasses.replace(
      rates, product=product, other=_bounded(other, 0.2, 20), compile_selection=max(0.0, first - none),
      structure=_bounded(compared / m / _USUAL_SHARE, _LEAST, _MOST))


def _search_rates(patches, work, rates, k):
  """Measures a search: of patches for neighbours among others."""
  queries, rows = patches[-min(_QUERIES, len(patches) // 2):], patches[:len(patches) // 2]
  rows = rows[:max(k, min(_BANK, work.num_selected, len(rows)))]
  taken = []
  for _ in range(2):
    before = time.monotonic()
    bank = search_bank.prepare(rows)
    ready = time.monotonic()
    jax.block_until_ready(neighbors.nearest_neighbors(jnp.asarray(queries), bank, k=k))
    taken.append((ready - before, time.monotonic() - ready))
  (_, first), (prepared, second) = taken
  return dataclasses.replace(
      rates, pair=second / (len(queries) * len(rows)), row=prepared / len(rows),
      compile_search=max(0.0, first - second))


def _bounded(value, low, high):
  return float(min(max(value, low), high))
