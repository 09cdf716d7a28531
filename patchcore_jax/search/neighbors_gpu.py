"""The shortlist of `neighbors` as one kernel for NVIDIA GPUs (Pallas, Triton).

A program takes a block of queries past all columns of the bank, tile by tile. Distances never leave the
registers: each of `_COLUMNS` slots of a query keeps the smallest three that it saw (column c belongs to
slot c modulo `_COLUMNS`), as integers that hold the distance in their upper bits, rounded down, and the tile
in their lower ones. Positive floats are ordered as their bits are, so two integer minima and maxima sort
both at once. In the end the smallest of all slots are taken out, two of a slot at most; nothing else that
the slot saw is below its third, which bounds all that is not on the list.

With few queries the bank is parted among programs, whose lists are joined.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from patchcore_jax.search.distances import TENSOR_CORE_PRODUCT

_QUERIES, _COLUMNS, _DEPTH = 128, 64, 64  # a tile's sides, and the terms of a product summed at once
_WARPS, _STAGES = 8, 3
_PROGRAMS = 264  # two for each multiprocessor of an H100, so that few queries keep it busy too
_FEWEST_TILES = 8  # tiles that a program takes at least; with fewer, joining takes longer
_MOST_TILES = 8192  # tiles that a program takes at most: ten bits of a distance's fraction stay
_INFINITE = np.int32(0x7F800000)  # the bits of an infinite float32
LONGEST = _COLUMNS // 2  # length of a list; for a longer one, two rows of each slot would often not suffice


def shortlist(queries, queries_sq, columns, squares, length, *, interpret=False):
  """Lists, for every query, the columns of the smallest distances that two of each slot can give.

  Args:
    queries: [q, r] float32 or bfloat16.
    queries_sq: [q] float32, their squared norms.
    columns: [r, m], of the same type.
    squares: [m] float32, their squared norms; infinite for columns that do not count.
    length: at most `LONGEST`.

  Returns:
    distances_sq [q, length] float32, ascending, rounded down by at most 1 / 1024 of each and infinite where
    there are no more; their columns [q, length] int32; and outside [q], a lower bound on
    the distances of all columns that are not on the list.
  """
  (q, depth), m = queries.shape, columns.shape[1]
  half_precision = columns.dtype == jnp.bfloat16
  wide = 2 if half_precision else 1  # tiles at once; the parts of float32 leave no registers for two
  tiles = pl.cdiv(m, _COLUMNS)
  parts = max(
      1, pl.cdiv(tiles, _MOST_TILES), min(_PROGRAMS // pl.cdiv(q, _QUERIES), tiles // _FEWEST_TILES))
  tiles = pl.cdiv(tiles, parts * wide) * wide
  parts = pl.cdiv(m, tiles * _COLUMNS)
  # Behind the end: rows and columns that are loaded, so that no load needs a mask.
  queries = jnp.pad(queries, ((0, -q % _QUERIES), (0, -depth % _DEPTH)))
  queries_sq = jnp.pad(queries_sq, (0, -q % _QUERIES))
  missing = parts * tiles * _COLUMNS - m
  columns = jnp.pad(columns, ((0, -depth % _DEPTH), (0, missing)))
  squares = jnp.pad(squares, (0, missing), constant_values=jnp.inf)
  kernel = functools.partial(
      _kernel, tiles=tiles, wide=wide, terms=len(columns), length=length,
      mask=np.int32((1 << max(1, (tiles - 1).bit_length())) - 1),
      precision=None if half_precision else lax.Precision.HIGHEST if interpret else TENSOR_CORE_PRODUCT)
  block = (_QUERIES, None, length)
  found, at, outside = pl.pallas_call(
      kernel, grid=(parts, len(queries) // _QUERIES),
      in_specs=[
          pl.BlockSpec((_QUERIES, len(columns)), lambda part, i: (i, 0)),
          pl.BlockSpec((_QUERIES,), lambda part, i: (i,)), pl.no_block_spec, pl.no_block_spec],
      out_specs=[pl.BlockSpec(block, lambda part, i: (i, part, 0))] * 2 + [
          pl.BlockSpec((_QUERIES, None), lambda part, i: (i, part))],
      out_shape=[
          jax.ShapeDtypeStruct((len(queries), parts, length), jnp.float32),
          jax.ShapeDtypeStruct((len(queries), parts, length), jnp.int32),
          jax.ShapeDtypeStruct((len(queries), parts), jnp.float32)],
      compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
      interpret=interpret, name='shortlist')(queries, queries_sq, columns, squares)
  found, at, outside = found[:q].reshape(q, -1), at[:q].reshape(q, -1), outside[:q].min(axis=1)
  if parts > 1:
    found, at = lax.sort((found, at), dimension=-1, num_keys=2)
    outside = jnp.minimum(outside, found[:, length])
  return found[:, :length], at[:, :length], outside


def _kernel(
    queries, queries_sq, columns, squares, found, at, outside, *, tiles, wide, terms, length, mask,
    precision):
  begin = pl.program_id(0) * tiles * _COLUMNS
  slot = lax.broadcasted_iota(jnp.int32, (_QUERIES, _COLUMNS), 1)
  own_sq = queries_sq[:]
  whole = queries[...] if terms == _DEPTH else None

  width = wide * _COLUMNS
  part = lax.broadcasted_iota(jnp.int32, (_QUERIES, width), 1) // _COLUMNS

  def products(start):
    if whole is not None:
      return triton.dot(whole, columns[:, pl.ds(start, width)], precision=precision)

    def add(i, total):
      k = pl.ds(i * _DEPTH, _DEPTH)
      return total + triton.dot(queries[:, k], columns[k, pl.ds(start, width)], precision=precision)

    return lax.fori_loop(0, terms // _DEPTH, add, jnp.zeros((_QUERIES, width), jnp.float32))

  def tile(t, carry):
    first, second, third = carry
    start = begin + t * width
    distances_sq = (squares[pl.ds(start, width)][None] + own_sq[:, None]) - 2 * products(start)
    keys = lax.bitcast_convert_type(jnp.maximum(distances_sq, 0), jnp.int32) & ~mask | (t * wide + part)
    near, far = keys, None
    if wide == 2:
      both = keys.reshape(_QUERIES, 2, _COLUMNS)
      near, far = both.min(axis=1), both.max(axis=1)
    first, near = jnp.minimum(first, near), jnp.maximum(first, near)
    second, near = jnp.minimum(second, near), jnp.maximum(second, near)
    third = jnp.minimum(third, near)
    if far is None:
      return first, second, third
    second, far = jnp.minimum(second, far), jnp.maximum(second, far)  # the farther of two is no first
    return first, second, jnp.minimum(third, far)

  def distance(keys):
    return lax.bitcast_convert_type(keys & ~mask, jnp.float32)

  none = jnp.full((_QUERIES, _COLUMNS), _INFINITE | mask)
  first, second, third = lax.fori_loop(0, tiles // wide, tile, (none, none, none))

  def take(i, carry):
    first, second = carry
    smallest = first.min(axis=1)
    own = jnp.where(first == smallest[:, None], slot, _COLUMNS).min(axis=1)
    found[:, i] = distance(smallest)
    at[:, i] = begin + (smallest & mask) * _COLUMNS + own
    own = slot == own[:, None]
    return jnp.where(own, second, first), jnp.where(own, _INFINITE | mask, second)

  first, _ = lax.fori_loop(0, length, take, (first, second))
  outside[:] = distance(jnp.minimum(first.min(axis=1), third.min(axis=1)))
