"""Patch embeddings -> which of them to keep: greedy k-center selection (the paper's algorithm 1).

Greedy selection is incremental: the first m of its picks are what a run for m picks returns. One run
at the largest ratio therefore serves every smaller one.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax

# Rows that are moved to the device at once: 256 MB of 1024-dim embeddings.
_BLOCK = 65536
# Points side by side in memory in the greedy loop, which then adds up vectors instead of rows: 1.6
# times as fast on CPUs.
_LANES = 256


def coreset_size(num_points: int, ratio: float) -> int:
  """Number of points kept at `ratio`, floor(num_points * ratio) as in the paper's code.

  Raises:
    ValueError: a ratio outside (0, 1], or one that keeps nothing.

  >>> coreset_size(250_880, 0.1)
  25088
  """
  check_ratio(ratio)
  size = int(num_points * ratio)
  if size == 0:
    raise ValueError(
        f'coreset ratio {ratio} keeps none of {num_points} patches: expected at least '
        f'{1 / num_points:.2g}, which keeps one.')
  return size


def check_ratio(ratio: float) -> None:
  """Raises ValueError for a ratio outside (0, 1]."""
  if not 0 < ratio <= 1:
    raise ValueError(f'coreset ratio {ratio}: expected 0 < ratio <= 1.')


def projection_matrix(key: jax.Array, in_dim: int, dim: int, kind: str = 'dense') -> jax.Array:
  """A random projection [in_dim, dim].

  'dense' is uniform in +-1/sqrt(in_dim), as the paper's released code draws it (PyTorch's Linear).
  'sparse' is 0 but for a share of 1/sqrt(in_dim) of entries of either sign (Li, Hastie and Church
  2006), as anomalib draws it. The scale does not matter to the selection.

  Raises:
    ValueError: another kind.
  """
  if kind == 'dense':
    bound = in_dim**-0.5
    return jax.random.uniform(key, (in_dim, dim), minval=-bound, maxval=bound)
  if kind != 'sparse':
    raise ValueError(f"coreset.projection={kind!r}: expected 'dense' or 'sparse'.")
  density = in_dim**-0.5
  sign_key, place_key = jax.random.split(key)
  signs = jax.random.rademacher(sign_key, (in_dim, dim), jnp.float32)
  return (density * dim) ** -0.5 * jnp.where(
      jax.random.bernoulli(place_key, density, (in_dim, dim)), signs, 0)


def johnson_lindenstrauss_dim(num_points: int, eps: float = 0.9) -> int:
  """Dimensions that keep all distances within a factor of 1 +- eps with high probability.

  4 ln n / (eps^2 / 2 - eps^3 / 3), truncated (Dasgupta and Gupta 2003); eps 0.9 is anomalib's.

  >>> johnson_lindenstrauss_dim(2000)
  187
  """
  return int(4 * math.log(num_points) / (eps**2 / 2 - eps**3 / 3))


def random_projection(points, dim: int, *, key: jax.Array, kind: str = 'dense') -> jax.Array:
  """Projects points to fewer dimensions, which keeps distances to a few percent (Johnson and
  Lindenstrauss) and makes the selection cheaper by as much.

  Args:
    points: [n, d] float32, on the host or the device; moved in blocks.
    dim: size of the result. With 'dense', points of just that size are returned as they are.
    key: PRNG key.
    kind: see `projection_matrix`.

  Returns:
    [n, dim] float32 on the device.

  >>> random_projection(jnp.ones((5, 64)), 16, key=jax.random.key(0)).shape
  (5, 16)
  """
  if points.shape[1] == dim and kind == 'dense':
    return jnp.asarray(points)
  return project(points, projection_matrix(key, points.shape[1], dim, kind))


def project(points, matrix) -> jax.Array:
  """points [n, d] times a given matrix [d, dim], in blocks: for replaying a selection."""
  return jnp.concatenate(
      [_product(jnp.asarray(points[i:i + _BLOCK]), matrix) for i in range(0, len(points), _BLOCK)])


@jax.jit
def _product(points, matrix):
  return jnp.dot(points, matrix, precision=lax.Precision.HIGHEST)


def greedy_k_center(
    points,
    num_selected: int,
    *,
    start,
    select_start: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
  """Selects points one by one, each the farthest from all selected before it.

  As in the paper's released code, a point's distance starts as its mean distance to the points in
  `start`, which are not selected by that, and the minimum with that mean stays. Ties go to the lowest
  index. A point is never selected twice: when all are covered (each has a selected one at its place),
  the rest follow in order of index, and a warning says how many.

  This is the dense loop: every step reads all points once. It is the definition that a faster
  selection has to equal.

  Args:
    points: [n, d] float32.
    num_selected: how many to select, 1 to n.
    start: [s] indices of the starting points, s >= 1.
    select_start: the (single) starting point is the first selected, as in anomalib.
    progress: called with (selected so far, num_selected) about a hundred times.

  Returns:
    [num_selected] int32 indices, in order of selection.

  Raises:
    ValueError: sizes or indices out of range, or points that are not finite.

  >>> greedy_k_center(jnp.array([[0.], [1.], [5.], [9.]]), 3, start=[0]).tolist()
  [3, 2, 1]
  """
  points = jnp.asarray(points, jnp.float32)
  start = np.atleast_1d(np.asarray(start, np.int32))
  n = len(points)
  if points.ndim != 2 or not 1 <= num_selected <= n:
    raise ValueError(
        f'Expected points [n, d] and 1 <= num_selected <= n, got {points.shape} and {num_selected}.')
  if select_start and start.size != 1:
    raise ValueError(f'select_start takes a single starting point, got {start.size}.')
  if not start.size or start.min() < 0 or start.max() >= n:
    raise ValueError(f'start: expected indices in [0, {n}), got {start.tolist()}.')
  blocks = _blocked(points)
  distances_sq = _start_distances_sq(blocks, start, n)
  # One number tells: any NaN or infinity in a row reaches its distance.
  if not bool(jnp.isfinite(distances_sq).all()):
    raise ValueError('points hold NaN or infinity: check the backbone and its input.')
  if select_start:  # farther than any other, so that it is picked first
    distances_sq = distances_sq.at[start[0]].set(jnp.inf)
  state = distances_sq, jnp.zeros(num_selected, jnp.int32), jnp.int32(0)
  stride = max(1, num_selected // 100) if progress else num_selected
  for begin in range(0, num_selected, stride):
    end = min(begin + stride, num_selected)
    state = _select(blocks, state, begin, end)
    if progress:
      state[1].block_until_ready()
      progress(end, num_selected)
  _, indices, num_covered = state
  if num_covered:
    logging.warning(
        '%d of %d selected points coincide with others: there are no more distinct ones. A smaller '
        'coreset ratio gives the same memory bank without repeats.', num_covered, num_selected)
  return indices


@jax.jit
def _blocked(points):
  """[n, d] -> [blocks, d, _LANES], padded with zeros."""
  padded = jnp.pad(points, ((0, -len(points) % _LANES), (0, 0)))
  return padded.reshape(-1, _LANES, points.shape[1]).transpose(0, 2, 1)


@functools.partial(jax.jit, static_argnums=2)
def _start_distances_sq(blocks, start, n):
  """(mean distance to the starting points)^2: squares keep the order and spare roots later.

  One value per point; those of the padding lie below all others, so it is never selected.
  """

  def add(i, total):
    return total + jnp.sqrt(_distances_sq(blocks, start[i]))

  total = lax.fori_loop(0, len(start), add, jnp.zeros(blocks.shape[0] * _LANES))
  return jnp.where(jnp.arange(len(total)) < n, jnp.square(total / len(start)), -2.0)


@functools.partial(jax.jit, donate_argnums=1)
def _select(blocks, state, begin, end):
  """Picks begin to end. A selected point's distance becomes -1, below that of any other."""

  def step(i, state):
    distances_sq, indices, num_covered = state
    pick = jnp.argmax(distances_sq).astype(jnp.int32)
    num_covered += distances_sq[pick] <= 0
    distances_sq = jnp.minimum(distances_sq, _distances_sq(blocks, pick))
    return distances_sq.at[pick].set(-1.0), indices.at[i].set(pick), num_covered

  return lax.fori_loop(begin, end, step, state)


def _distances_sq(blocks, index):
  """From every point to the one at `index`. Differences, not |a|^2 + |b|^2 - 2ab: nothing cancels, and
  a point is at 0 from itself."""
  center = blocks[index // _LANES, :, index % _LANES]
  return jnp.sum(jnp.square(blocks - center[:, None]), axis=1).reshape(-1)
