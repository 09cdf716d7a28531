"""Chooses a bank by density: places where vectors are crowded lose more of them than others (SuperADD,
Roming et al., arXiv 2605.14808)."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from patchcore_jax.search import neighbors

_GROWTH = 1.1  # of the radius of a thinning that keeps too many
_VALUES = 2**23  # of distances that are computed at once: 64 MiB


def thinned(
    vectors: np.ndarray, number: int, *, rounds: int, num_neighbors: int, rng: np.random.RandomState,
    progress: Callable[[int, int], None] | None = None) -> np.ndarray:
  """Chooses vectors that lie apart: dense places lose more of theirs than others.

  In each round a part of the vectors not chosen yet is drawn, and one of them stays with a chance of one in
  the number of its neighbours within a radius, which grows until few enough stay. Where that does not
  happen, for no more neighbours are counted, those nearest to staying do.

  Args:
    vectors: [n, d] float32, an array or what gives rows as one does.
    number: how many; all where there are no more.
    rounds: a round draws n / rounds vectors, of which at most number / rounds stay.
    num_neighbors: the most neighbours that are counted, the vector itself among them.
    rng: draws as the released code does with NumPy's own generator.
    progress: called with (done, total) rounds.

  Returns:
    Indices, int64, ascending, min(number, n) of them.
  """
  n, chosen = len(vectors), np.zeros(len(vectors), bool)
  if n <= number:
    return np.arange(n)
  for i in range(rounds):
    (rest,) = np.nonzero(~chosen)
    part = rng.choice(rest, min(n // rounds, len(rest)), replace=False)
    if len(part):
      chosen[part] = _staying(vectors[part], number // rounds, num_neighbors, rng)
    if progress:
      progress(i + 1, rounds)
  (rest,) = np.nonzero(~chosen)
  rng.shuffle(rest)
  chosen[rest[:number - chosen.sum()]] = True
  return np.flatnonzero(chosen)


def _staying(vectors, number, num_neighbors, rng):
  """Tells which vectors of a part stay, [n] bool."""
  k = min(num_neighbors, len(vectors))
  distances = _nearest_distances(vectors, k)
  radius, chance = distances.mean() / 10, rng.rand(len(vectors))
  while True:
    count = (distances < radius).sum(1) + 1
    stay = chance < 1 / count
    if stay.sum() <= number:
      return stay
    if not radius > 0 or (count > k).all():  # a larger radius counts no more
      return np.isin(np.arange(len(vectors)), np.argsort(chance, kind='stable')[:number])
    radius *= _GROWTH


def _nearest_distances(vectors, k):
  """Computes the distances of each vector [n, d] to the k nearest, itself among them: [n, k] float64."""
  if jax.default_backend() != 'cpu':
    distances_sq, _ = _nearest_fn(k)(vectors, vectors)
    return np.sqrt(np.asarray(distances_sq, np.float64))
  rows = vectors - vectors.mean(axis=0, dtype=np.float64)  # products of smaller numbers cancel less
  squares, block = np.square(rows).sum(axis=1), max(1, _VALUES // len(rows))
  found = np.empty((len(rows), k))
  for begin in range(0, len(rows), block):  # some 15 times faster than a search for so many by XLA
    part = slice(begin, begin + block)
    distances_sq = squares[part, None] + squares - 2 * rows[part] @ rows.T
    found[part] = np.partition(distances_sq, k - 1, axis=1)[:, :k]
  return np.sqrt(np.maximum(found, 0))


@functools.lru_cache(maxsize=4)
def _nearest_fn(k):
  return jax.jit(lambda queries, bank: neighbors.nearest_neighbors(queries, bank, k=k))
