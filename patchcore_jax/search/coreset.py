"""The choice of the patch embeddings to keep: greedy k-center selection (the paper's algorithm 1).

Greedy selection is incremental: the first m of its picks are what a run for m picks returns. One run
at the largest ratio therefore serves every smaller one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patchcore_jax.search import k_center
from patchcore_jax.settings import check_ratio

# Rows that are moved to the device at once: 32 MB of 1024-dim embeddings.
_BLOCK = 8192
# Values compared in a selection that the dense loop finishes before the lazy one is compiled.
DENSE_BELOW = 3e9


def coreset_size(num_points: int, ratio: float) -> int:
  """Computes the number of points kept at `ratio`: floor(num_points * ratio) as in the paper's code.

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


def projection_matrix(key: jax.Array, in_dim: int, dim: int, kind: str = 'dense') -> jax.Array:
  """Draws a random projection matrix [in_dim, dim].

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
  """Computes how many dimensions keep all distances within a factor of 1 +- eps with high probability.

  The number is 4 ln n / (eps^2 / 2 - eps^3 / 3), truncated (Dasgupta and Gupta 2003); eps 0.9 is anomalib's.

  >>> johnson_lindenstrauss_dim(2000)
  187
  """
  return int(4 * math.log(num_points) / (eps**2 / 2 - eps**3 / 3))


def random_projection(
    points, dim: int, *, key: jax.Array, kind: str = 'dense', out: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
  """Projects points to fewer dimensions, so that selecting among them costs less.

  Distances stay the same to within a few percent (Johnson and Lindenstrauss).

  Args:
    points: [n, d] float32, on the host or the device; moved in blocks.
    dim: size of the result. With 'dense', points of just that size are returned as they are.
    key: PRNG key.
    kind: see `projection_matrix`.
    out: [n, dim] on the host, to be filled, where the result is not to lie on the device.
    progress: called with (done, n) after every block.

  Returns:
    [n, dim] float32 on the device, or `out`.

  >>> random_projection(jnp.ones((5, 64)), 16, key=jax.random.key(0)).shape
  (5, 16)
  """
  if points.shape[1] == dim and kind == 'dense':
    return jnp.asarray(points) if out is None else points
  return project(
      points, projection_matrix(key, points.shape[1], dim, kind), out=out, progress=progress)


def project(points, matrix, *, out=None, progress=None) -> Any:
  """Projects points as `random_projection` does, by a given matrix [d, dim]: for replaying a selection."""
  blocks = []
  for i in range(0, len(points), _BLOCK):
    if isinstance(points, jax.Array):
      # The place is an argument: a program for each would take longer to compile than to run.
      block = _product_of(points, i, matrix, min(_BLOCK, len(points) - i))
    else:
      block = _product(jnp.asarray(points[i:i + _BLOCK]), matrix)
    if out is None:
      blocks.append(block)
    else:
      out[i:i + len(block)] = np.asarray(block)
    if progress:
      progress(min(i + _BLOCK, len(points)), len(points))
  return jnp.concatenate(blocks) if out is None else out


@jax.jit
def _product(points, matrix):
  return jnp.dot(points, matrix, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=3)
def _product_of(points, first, matrix, length):
  """Projects the `length` points that begin at `first`."""
  return _product(lax.dynamic_slice_in_dim(points, first, length), matrix)


def greedy_k_center(
    points,
    num_selected: int,
    *,
    start,
    select_start: bool = False,
    mesh: Mesh | None = None,
    valid: np.ndarray | None = None,
    stream: bool = False,
    capacity: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Callable[[k_center.State], None] | None = None,
    resume: k_center.State | None = None,
    steps: k_center.Steps | None = None,
) -> np.ndarray:
  """Selects points one by one, each the farthest from all selected before it.

  As in the paper's released code, a point's distance starts as its mean distance to the points in
  `start`, which are not selected by that, and the minimum with that mean stays. Ties go to the lowest
  index. A point is never selected twice: when all are covered (each has a selected one at its place),
  the rest follow in order of index, and a warning says how many.

  The selection is that of `dense_greedy_k_center`, index by index, and does not depend on the mesh or
  on `stream`; `k_center` explains why, and where the time goes.

  Args:
    points: [n, d] float32, on the host or a device. With `stream`, a NumPy array or `DiskArray`. With
      a mesh over several processes, the same in each, or in pieces as `processes.spread` makes them.
    num_selected: how many to select, 1 to n.
    start: [s] indices of the starting points, s >= 1.
    select_start: the (single) starting point is the first selected, as in anomalib.
    mesh: a mesh of one axis called `k_center.AXIS`, over which the points are split; it may span processes,
      which then all call this with the same arguments. None for the first local device.
    valid: [n] bool, on the host; a row that is not valid is no point and is never selected. None for all.
    stream: leave the points on the host; one device then holds 12 bytes for each, and the selected.
    capacity: at least num_selected; selections of the same points with the same capacity run one program,
      which is compiled once. None for num_selected. No influence on the result.
    progress: called with (selected so far, num_selected) after every round, some tens to hundreds
      of times.
    checkpoint: called with the state after every round; copy it (or have Orbax save it) before
      returning, the arrays are used again.
    resume: such a state, of the same points and arguments, from which to go on.
    steps: how a round is computed, without influence on the result; None for what is fastest on the
      mesh's devices.

  Returns:
    [num_selected] int32 indices, in order of selection.

  Raises:
    ValueError: sizes or indices out of range, points that are not finite, or a state of another
      selection.

  >>> greedy_k_center(jnp.array([[0.], [1.], [5.], [9.]]), 3, start=[0]).tolist()
  [3, 2, 1]
  """
  start = _checked(points, num_selected, start, select_start)
  n, dim = points.shape
  if valid is not None and num_selected > valid.sum():
    raise ValueError(f'num_selected={num_selected}: only {valid.sum()} of {n} points are valid.')
  capacity = max(capacity or 0, num_selected)
  if resume is not None and (
      resume.indices.shape != (capacity,) or len(resume.distances_sq) < n):
    raise ValueError(
        f'resume: the state is of {len(resume.distances_sq)} points and {len(resume.indices)} '
        f'selected, expected {n} and {capacity}.')
  plain = mesh is None and not stream and checkpoint is None and resume is None
  if plain and n * num_selected * dim < DENSE_BELOW:
    indices = dense_greedy_k_center(
        points, num_selected, start=start, select_start=select_start, valid=valid, capacity=capacity)
    if progress:
      progress(num_selected, num_selected)
    return indices
  if mesh is None:
    mesh = Mesh(np.array(jax.local_devices()[:1]), (k_center.AXIS,))
  if stream and mesh.size > 1:
    raise ValueError(f'stream uses one device, got a mesh of {mesh.size}.')
  rows = points if stream or _in_pieces(points) else k_center.put(_float32(points), mesh)
  # Any place near the middle does: it only keeps the error of products small.
  mean = _rows_of(points, np.arange(0, n, max(1, n // 4096))).mean(axis=0)
  centers = np.zeros((capacity + k_center.PADDING, dim), np.float32)
  if resume is None:
    # On a CPU they lie where they were: turned all at once, they would be there twice.
    by_blocks = isinstance(points, np.ndarray) and mesh.size == 1 and mesh.devices.flat[0].platform == 'cpu'
    state = k_center.initial_state(
        _start_distances_sq(
            points if by_blocks else rows,
            np.ones(n, bool) if valid is None else valid, _rows_of(points, start)), capacity)
    if select_start:  # farther than any other, so that it is picked first
      state = state._replace(distances_sq=state.distances_sq.at[start[0]].set(jnp.inf))
  else:
    count = int(resume.count)
    centers[:count] = points[np.asarray(resume.indices[:count])]
    missing = len(rows) - n  # the padding may be another
    state = resume._replace(
        distances_sq=jnp.pad(resume.distances_sq[:n], (0, missing), constant_values=-2.0),
        ages=jnp.pad(resume.ages[:n], (0, missing)))
  # Placed as a round leaves them, so that there is one program.
  state = jax.tree.map(jax.device_put, state, k_center.state_sharding(mesh))
  centers, mean = jax.device_put((centers, mean), NamedSharding(mesh, PartitionSpec()))
  steps = steps or k_center.steps_for(mesh.local_devices[0], -(-len(rows) // mesh.size), dim)
  step = functools.partial(k_center.streamed_round, steps=steps) if stream else k_center.lazy_round(
      mesh, steps)
  while (count := int(state.count)) < num_selected:
    centers, state = step(rows, centers, mean, state)
    if progress and int(state.count) > count:
      progress(min(int(state.count), num_selected), num_selected)
    if checkpoint:
      checkpoint(state)
  _warn_if_covered(state)
  return np.asarray(state.indices)[:num_selected]


def dense_greedy_k_center(
    points, num_selected: int, *, start, select_start: bool = False, valid: np.ndarray | None = None,
    capacity: int | None = None) -> np.ndarray:
  """Selects as `greedy_k_center` does, by the loop that defines it: each step reads all points.

  >>> dense_greedy_k_center(jnp.array([[0.], [1.], [5.], [9.]]), 3, start=[0]).tolist()
  [3, 2, 1]
  """
  start = _checked(points, num_selected, start, select_start)
  points = jnp.asarray(points, jnp.float32)
  distances_sq = _start_distances_sq(
      points, np.ones(len(points), bool) if valid is None else valid, points[start])
  if select_start:
    distances_sq = distances_sq.at[start[0]].set(jnp.inf)
  state = k_center.initial_state(distances_sq, max(capacity or 0, num_selected))
  state = k_center.dense_steps(jnp.array(points.T), state, num_selected)
  _warn_if_covered(state)
  return np.asarray(state.indices)[:num_selected]


def _checked(points, num_selected, start, select_start):
  """Returns `start` as an array [s] int32; raises ValueError for arguments out of range."""
  if points.ndim != 2 or not 1 <= num_selected <= len(points):
    raise ValueError(
        f'Expected points [n, d] and 1 <= num_selected <= n, got {points.shape} and {num_selected}.')
  start = np.atleast_1d(np.asarray(start, np.int32))
  if select_start and start.size != 1:
    raise ValueError(f'select_start takes a single starting point, got {start.size}.')
  if not start.size or start.min() < 0 or start.max() >= len(points):
    raise ValueError(f'start: expected indices in [0, {len(points)}), got {start.tolist()}.')
  return start


def _in_pieces(points):
  """Tells whether other processes hold some of the points."""
  return isinstance(points, jax.Array) and not points.is_fully_addressable


def _rows_of(points, indices):
  """Brings the rows at `indices` to the host of every process."""
  if _in_pieces(points):
    everywhere = NamedSharding(points.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(jnp.take, static_argnums=2, out_shardings=everywhere)(points, indices, 0))
  return np.asarray(points[indices], np.float32)


def _start_distances_sq(rows, valid, starts):
  """Computes the distances with which a selection starts: -2 for a row that is padding or not valid."""
  if isinstance(rows, jax.Array):
    distances_sq, finite = _start(rows, starts)
  else:
    blocks = [_start(np.asarray(rows[i:i + _BLOCK]), starts) for i in range(0, len(rows), _BLOCK)]
    distances_sq, finite = jnp.concatenate([b[0] for b in blocks]), all(b[1] for b in blocks)
  if not finite:
    raise ValueError('points hold NaN or infinity: check the backbone and its input.')
  return jnp.where(np.pad(valid, (0, len(rows) - len(valid))), distances_sq, -2.0)


@jax.jit
def _start(rows, starts):
  return k_center.start_distances_sq(rows, starts), jnp.isfinite(rows).all()


def _warn_if_covered(state):
  if covered := int(state.num_covered):
    logging.warning(
        '%d of %d selected points coincide with others: there are no more distinct ones. A smaller '
        'coreset ratio gives the same memory bank without repeats.', covered, int(state.count))


def _float32(points):
  return points.astype(np.float32) if points.dtype != np.float32 else points
