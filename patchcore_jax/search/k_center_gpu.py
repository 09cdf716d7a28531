"""What `k_center` does within a round, as kernels for NVIDIA GPUs (Pallas, Triton).

A round is a few thousand small steps, and each would be a launch of its own, and a copy to the host
wherever the number of steps depends on data. Here a whole round is three kernels:

  refresh   one program for each block of rows: products on the tensor cores, the nearest and the second
            nearest kept in registers, and the few exact distances that decide.
  pairwise  all exact distances within the window, once.
  select    one program, which keeps the window's values in registers: a step is an arg-max, one row of
            the pairwise distances, and a minimum.

The numbers that decide are those of `distances.distances_sq`, summed in the same order, so the selection
is that of the plain loop, pick by pick. On a CPU the kernels run in Pallas' interpret mode, for tests.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from patchcore_jax.search.distances import LARGEST, TENSOR_CORE_ERROR, TENSOR_CORE_PRODUCT, product_error


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the kernels' blocks: powers of two. The result does not depend on them.

  Attributes:
    rows, columns: points and selected points that a program of `refresh` compares at once.
    exact: selected points at once where a row in doubt is compared with all of them.
    pair: points along each side of a block of pairwise distances.
  """

  rows: int = 64
  columns: int = 64
  exact: int = 256
  pair: tuple[int, int] = (32, 64)


SIZES = Sizes()
_LARGEST_DIM = 128  # the most dimensions of rows that a program of `refresh` can hold in its shared memory


def refresh_suits(num_points: int, dim: int) -> bool:
  """Tells whether `refresh` can take points [num_points, dim]; `select` takes any."""
  return dim <= _LARGEST_DIM and num_points * dim < 2**31


def refresh(points, order, num_stale, centers, mean, state, *, sizes: Sizes = SIZES, interpret: bool = False):
  """Brings the distances of the first `num_stale` points in `order` up to date.

  Args:
    points: [n, d] float32.
    order: [n or more] int32, indices of points.
    num_stale: [] int32.
    centers: [m + padding, d], the selected points; the padding is at least `sizes.columns`.
    mean: [d], which is subtracted before products are taken.
    state: a `k_center.State`.

  Returns:
    [n] float32, the distances of all points.
  """
  (n, dim), width = points.shape, max(16, pl.next_power_of_2(points.shape[1]))
  inside = jnp.arange(len(centers)) < state.count
  columns = jnp.pad(centers - mean, ((0, 0), (0, width - dim)))
  squares = jnp.square(columns).sum(axis=1)
  largest = jnp.sqrt(jnp.where(inside, squares, 0).max())
  scalars = jnp.stack([num_stale.astype(jnp.int32), state.count])
  blocks = pl.cdiv(n, sizes.rows)
  fresh = pl.pallas_call(
      functools.partial(_refresh_kernel, dim=dim, width=width, sizes=sizes,
                        precision=lax.Precision.HIGHEST if interpret else TENSOR_CORE_PRODUCT),
      grid=(blocks,),
      out_specs=pl.BlockSpec((sizes.rows,), lambda i: (i,)),
      out_shape=jax.ShapeDtypeStruct((blocks * sizes.rows,), jnp.float32),
      compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
      interpret=interpret, name='k_center_refresh',
  )(scalars, largest[None], order[:n], state.ages, points, jnp.pad(mean, (0, width - dim)), columns,
    jnp.where(inside, squares, jnp.inf), centers.T, state.distances_sq)
  return state.distances_sq.at[jnp.where(jnp.arange(n) < num_stale, order[:n], n)].set(fresh[:n], mode='drop')


def _refresh_kernel(
    scalars, largest, order, ages, points, mean, columns, squares, centers, values, fresh_out, *, dim, width,
    sizes, precision):
  num_stale, count = scalars[0], scalars[1]
  begin = pl.program_id(0) * sizes.rows
  row = lax.broadcasted_iota(jnp.int32, (sizes.rows,), 0)
  slot = lax.broadcasted_iota(jnp.int32, (sizes.rows, sizes.columns), 1)

  @pl.when(begin < num_stale)
  def _():
    inside = begin + row < num_stale
    at = triton.load(order.at[begin + row], mask=inside, other=0)
    # The order is by age: the first of a block is the most outdated, and the others have missed little less.
    first = triton.load(ages.at[at], mask=inside, other=2**30).min()
    old = triton.load(values.at[at], mask=inside, other=-jnp.inf)
    k = lax.broadcasted_iota(jnp.int32, (width,), 0)
    rows = triton.load(points.at[at[:, None], k[None]], mask=(k < dim)[None] & inside[:, None], other=0)
    rows -= mean[:][None]
    rows_sq = jnp.square(rows).sum(axis=1)

    def tile(t, carry):
      best, which, second = carry
      start = first + t * sizes.columns
      tile_columns = columns[pl.ds(start, sizes.columns), :]
      scores = squares[pl.ds(start, sizes.columns)][None] - 2 * triton.dot(
          rows, tile_columns, trans_b=True, precision=precision)
      better = scores < best
      return (jnp.where(better, scores, best), jnp.where(better, t, which),
              jnp.where(better, best, jnp.minimum(second, scores)))

    far = jnp.full((sizes.rows, sizes.columns), jnp.inf, jnp.float32)
    best, which, second = lax.fori_loop(
        0, pl.cdiv(count - first, sizes.columns), tile, (far, jnp.zeros_like(slot), far))

    nearest = best.min(axis=1)
    own = jnp.where(best == nearest[:, None], slot, sizes.columns).min(axis=1)
    own = slot == own[:, None]
    column = first + jnp.where(own, which * sizes.columns + slot, 0).sum(axis=1, dtype=jnp.int32)
    runner_up = jnp.where(own, second, best).min(axis=1)
    limit = TENSOR_CORE_ERROR * product_error(dim, jnp.sqrt(rows_sq), largest[0]) - rows_sq
    closer = inside & (nearest <= old + limit)
    column = jnp.where(closer, column, 0)

    exact = _by_halves(dim, lambda i: points[at, i] - centers[i, column], (sizes.rows,))
    fresh = jnp.where(closer, jnp.minimum(old, exact), old)
    doubtful = (closer & (runner_up <= fresh + limit)).astype(jnp.int32)

    def settle(carry):
      """Computes all distances of one row in doubt."""
      doubtful, fresh = carry
      chosen = row == jnp.where(doubtful > 0, row, sizes.rows).min()
      own_at = jnp.where(chosen, at, 0).sum(dtype=jnp.int32)

      def tile(t, smallest):
        c = first + t * sizes.exact + lax.broadcasted_iota(jnp.int32, (sizes.exact,), 0)
        there = c < count
        exact = _by_halves(dim, lambda i: points[own_at, i] - triton.load(
            centers.at[i, c], mask=there, other=0), (sizes.exact,))
        return jnp.minimum(smallest, jnp.where(there, exact, jnp.inf))

      smallest = lax.fori_loop(
          0, pl.cdiv(count - first, sizes.exact), tile,
          jnp.full((sizes.exact,), jnp.inf, jnp.float32)).min()
      return jnp.where(chosen, 0, doubtful), jnp.where(chosen, jnp.minimum(fresh, smallest), fresh)

    _, fresh = lax.while_loop(lambda carry: carry[0].max() > 0, settle, (doubtful, fresh))
    fresh_out[:] = fresh


def select(rows, values, ids, threshold, cutoff, centers, state, *, sizes: Sizes = SIZES,
           interpret: bool = False):
  """Selects in a window: the arguments and the results are those of `k_center.select`."""
  window = len(values)
  padded = pl.next_power_of_2(max(window, *sizes.pair))
  missing = (0, padded - window)
  distances = _pairwise(jnp.pad(rows, (missing, (0, 0))).T, sizes, interpret)
  values = jnp.pad(values, missing, constant_values=-jnp.inf)
  scalars = jnp.stack([cutoff, jnp.minimum(len(state.indices) - state.count, window)]).astype(jnp.int32)
  picks, counts, values = pl.pallas_call(
      functools.partial(_select_kernel, window=padded),
      out_shape=(jax.ShapeDtypeStruct((padded,), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32),
                 jax.ShapeDtypeStruct((padded,), jnp.float32)),
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
      interpret=interpret, name='k_center_select',
  )(distances, values, jnp.pad(ids, missing), threshold[None], scalars)
  place = jnp.arange(padded)
  place = jnp.where(place < counts[0], state.count + place, len(centers))
  picks = jnp.minimum(picks, window - 1)  # behind the last pick there are arbitrary numbers
  return (values[:window], centers.at[place].set(rows[picks], mode='drop'),
          state.indices.at[place].set(ids[picks], mode='drop'), state.count + counts[0],
          state.num_covered + counts[1])


def _pairwise(columns, sizes, interpret):
  """Computes `distances_sq` of all pairs of points [d, w]."""
  (dim, window), (height, width) = columns.shape, sizes.pair

  def kernel(columns, out):
    first, second = pl.program_id(0) * height, pl.program_id(1) * width
    out[...] = _by_halves(dim, lambda i: (
        columns[i, pl.ds(first, height)][:, None] - columns[i, pl.ds(second, width)][None]), sizes.pair)

  return pl.pallas_call(
      kernel, grid=(window // height, window // width),
      in_specs=[pl.BlockSpec((dim, window), lambda i, j: (0, 0))],
      out_specs=pl.BlockSpec(sizes.pair, lambda i, j: (i, j)),
      out_shape=jax.ShapeDtypeStruct((window, window), jnp.float32),
      compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
      interpret=interpret, name='k_center_pairwise')(columns)


def _select_kernel(distances, values, ids, threshold, scalars, picks, counts_out, values_out, *, window):
  iota = lax.broadcasted_iota(jnp.int32, (window,), 0)
  threshold, cutoff, most = threshold[0], scalars[0], scalars[1]

  def farthest(values):
    top = values.max()
    return top, jnp.where(values == top, iota, window).min()  # the lowest index, where they tie

  def certain(carry):
    _, count, _, (top, pick) = carry
    inside = (top > threshold) | ((top == threshold) & (ids[jnp.minimum(pick, window - 1)] < cutoff))
    return inside & (top >= 0) & (count < most)

  def step(carry):
    values, count, covered, (top, pick) = carry
    picks[count] = pick
    values = jnp.where(iota == pick, -1.0, jnp.minimum(values, distances[pick, :]))
    return values, count + 1, covered + (top <= 0).astype(jnp.int32), farthest(values)

  first = values[:]
  values, count, covered, _ = lax.while_loop(
      certain, step, (first, jnp.int32(0), jnp.int32(0), farthest(first)))
  counts_out[0], counts_out[1], values_out[:] = count, covered, values


def _by_halves(
    dim: int, difference: Callable[[Any], jax.Array], shape: tuple[int, ...], unrolled: int = 8) -> jax.Array:
  """Computes `distances_sq` from the differences of single coordinates: the same sums in the same order.

  It goes down one branch of the sum after the other, so that few partial sums are alive at once.

  Args:
    dim: number of coordinates.
    difference: a function from the index of a coordinate to the array of its differences.
    shape: the shape of that array.
    unrolled: branches of at most so many coordinates are written out; the others are loops, because
      compiling takes minutes otherwise.
  """
  lengths = [dim]
  while lengths[-1] > 1:
    lengths.append((lengths[-1] + 1) // 2)

  def branch(level, i):
    if level == 0:
      return jnp.minimum(jnp.square(difference(i)), LARGEST)
    half, length = lengths[level], lengths[level - 1]
    if 2**level > unrolled:
      # The last one has no second half, where the length is odd. Adding to zero is exact.
      parts = 2 if 2 * half == length else 1 + (i + half < length).astype(jnp.int32)
      return lax.fori_loop(
          0, parts, lambda part, total: total + branch(level - 1, i + part * half),
          jnp.zeros(shape, jnp.float32))
    first = branch(level - 1, i)
    if 2 * half == length:
      return first + branch(level - 1, i + half)
    return jnp.where(i + half < length, first + branch(level - 1, jnp.minimum(i + half, length - 1)), first)

  return branch(len(lengths) - 1, jnp.int32(0))
