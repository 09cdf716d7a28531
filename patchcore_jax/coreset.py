"""Patch embeddings -> which of them to keep: greedy k-center selection (the paper's algorithm 1).

Greedy selection is incremental: the first m of its picks are what a run for m picks returns. One run
at the largest ratio therefore serves every smaller one.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Rows that are moved to the device at once: 256 MB of 1024-dim embeddings.
_BLOCK = 65536


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


def projection_matrix(key: jax.Array, in_dim: int, dim: int) -> jax.Array:
  """Dense random projection [in_dim, dim], uniform in +-1/sqrt(in_dim) as the paper's code draws it.

  The scale does not matter to the selection.
  """
  bound = in_dim**-0.5
  return jax.random.uniform(key, (in_dim, dim), minval=-bound, maxval=bound)


def random_projection(points, dim: int, *, key: jax.Array) -> jax.Array:
  """Projects points to fewer dimensions, which keeps distances to a few percent (Johnson and
  Lindenstrauss) and makes the selection cheaper by as much.

  Args:
    points: [n, d] float32, on the host or the device; moved in blocks.
    dim: size of the result. Points of just that size are returned as they are.
    key: PRNG key.

  Returns:
    [n, dim] float32 on the device.

  >>> random_projection(jnp.ones((5, 64)), 16, key=jax.random.key(0)).shape
  (5, 16)
  """
  if points.shape[1] == dim:
    return jnp.asarray(points)
  matrix = projection_matrix(key, points.shape[1], dim)
  return jnp.concatenate(
      [_project(jnp.asarray(points[i:i + _BLOCK]), matrix) for i in range(0, len(points), _BLOCK)])


@jax.jit
def _project(points, matrix):
  return jnp.dot(points, matrix, precision=lax.Precision.HIGHEST)


def greedy_k_center(
    points,
    num_selected: int,
    *,
    start,
    progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
  """Selects points one by one, each the farthest from all selected before it.

  As in the paper's released code, a point's distance starts as its mean distance to the points in
  `start`, which are not selected by that, and the minimum with that mean stays. Ties go to the lowest
  index. A point is never selected twice: when all are covered, the rest follow in order of index.

  This is the dense loop: every step reads all points once. It is the definition that a faster
  selection has to equal.

  Args:
    points: [n, d] float32.
    num_selected: how many to select, 1 to n.
    start: [s] indices of the starting points, s >= 1.
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
  if not start.size or start.min() < 0 or start.max() >= n:
    raise ValueError(f'start: expected indices in [0, {n}), got {start.tolist()}.')
  distances_sq = _start_distances_sq(points, start)
  # One number tells: any NaN or infinity in a row reaches its distance.
  if not bool(jnp.isfinite(distances_sq).all()):
    raise ValueError('points hold NaN or infinity: check the backbone and its input.')
  indices = jnp.zeros(num_selected, jnp.int32)
  stride = max(1, num_selected // 100) if progress else num_selected
  for begin in range(0, num_selected, stride):
    end = min(begin + stride, num_selected)
    distances_sq, indices = _select(points, distances_sq, indices, begin, end)
    if progress:
      indices.block_until_ready()
      progress(end, num_selected)
  return indices


@jax.jit
def _start_distances_sq(points, start):
  """[n]: (mean distance to the starting points)^2; squares keep the order and spare roots later."""

  def add(i, total):
    return total + jnp.sqrt(_distances_sq(points, points[start[i]]))

  total = lax.fori_loop(0, len(start), add, jnp.zeros(len(points)))
  return jnp.square(total / len(start))


@functools.partial(jax.jit, donate_argnums=(1, 2))
def _select(points, distances_sq, indices, begin, end):
  """Picks begin to end. A selected point's distance becomes -1, below that of any other."""

  def step(i, state):
    distances_sq, indices = state
    pick = jnp.argmax(distances_sq).astype(jnp.int32)
    distances_sq = jnp.minimum(distances_sq, _distances_sq(points, points[pick]))
    return distances_sq.at[pick].set(-1.0), indices.at[i].set(pick)

  return lax.fori_loop(begin, end, step, (distances_sq, indices))


def _distances_sq(points, center):
  # Differences, not |a|^2 + |b|^2 - 2ab: no cancellation, and a point is at 0 from itself.
  return jnp.sum(jnp.square(points - center), axis=-1)
