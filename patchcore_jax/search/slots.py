"""The columns that may be nearest to each row, by products of matrices, as a CPU does them fastest.

Rows go past all columns, tile by tile, and each of `SLOTS` slots of a row keeps the smallest three distances
that it saw (column c belongs to slot c modulo `SLOTS`), as integers that hold the distance in their upper
bits, rounded down, and the group of columns in their lower ones. Positive floats are ordered as their bits
are, so integer minima and maxima, which compilers vectorise, sort both at once. A tile is read where the
product left it, in the cache of the core. Two of each slot may be listed; nothing else that it saw is below
its third. `neighbors_gpu` does the like in registers.

A CPU that multiplies bfloat16 several times faster than float32 (AMX) is given bfloat16; `reduce` measures
what that rounding moves, so that no result depends on it.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax.search.distances import in_blocks

SLOTS = 32
WIDTH = 512  # columns of a tile; with the rows of `ROWS` it takes 2 MB
ROWS = 1024
_INFINITE = np.int32(0x7F800000)  # the bits of an infinite float32
_WORTHWHILE = 1.5  # how many times faster products in bfloat16 must be


class Keys(NamedTuple):
  """What the slots of some rows keep: the smallest keys of each, ascending, [r, SLOTS] int32."""

  first: jax.Array
  second: jax.Array
  third: jax.Array


def mask_for(num_columns: int) -> int:
  """Computes the lower bits of a key, which number groups of `SLOTS` columns.

  >>> mask_for(65_536)
  2047
  """
  return (1 << (-(-num_columns // SLOTS) - 1).bit_length()) - 1


def see(
    vectors: jax.Array, vectors_sq: jax.Array, tile: Callable, num_tiles: jax.Array | int, mask: int) -> Keys:
  """Takes rows past tiles of columns.

  Args:
    vectors: [r, d] float32 or bfloat16.
    vectors_sq: [r] float32, their squared norms.
    tile: the number of a tile -> its columns [d, WIDTH], of the same type, and their squared norms [WIDTH]
      float32, infinite for columns that do not count.
    num_tiles: tiles that are seen.
    mask: of `mask_for`, for the columns of all tiles.
  """
  doubled = -2 * vectors  # exact

  def step(k, keys):
    columns, squares = tile(k)
    products = jnp.dot(
        doubled, columns, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    distances_sq = squares + vectors_sq[:, None] + products
    group = k * (WIDTH // SLOTS) + jnp.arange(WIDTH, dtype=jnp.int32) // SLOTS
    found = lax.bitcast_convert_type(jnp.maximum(distances_sq, 0), jnp.int32) & np.int32(~mask) | group
    first, second, third = keys
    for i in range(0, WIDTH, SLOTS):
      new = found[:, i:i + SLOTS]
      first, new = jnp.minimum(first, new), jnp.maximum(first, new)
      second, new = jnp.minimum(second, new), jnp.maximum(second, new)
      third = jnp.minimum(third, new)
    return Keys(first, second, third)

  none = jnp.full((len(vectors), SLOTS), _INFINITE)
  return lax.fori_loop(0, num_tiles, step, Keys(none, none, none))


def best(keys: Keys, length: int, mask: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Lists the columns of the smallest keys of each row, two of each slot at most.

  Args:
    length: at most `SLOTS`.

  Returns:
    distances_sq [r, length], ascending, rounded down, infinite where there are no more; columns [r, length]
    int32; and outside [r], the distance that nothing else that was seen is below.
  """
  slot = jnp.arange(SLOTS, dtype=jnp.int32)

  def take(left_of, _):  # ten times faster than a sort, or a top-k and a gather
    left, second = left_of
    smallest = left.min(axis=1, keepdims=True)
    own = jnp.where(left == smallest, slot, SLOTS).min(axis=1, keepdims=True)
    left, second = jnp.where(slot == own, second, left), jnp.where(slot == own, _INFINITE, second)
    return (left, second), (smallest[:, 0], (smallest & mask)[:, 0] * SLOTS + own[:, 0])

  (left, _), (smallest, columns) = lax.scan(take, (keys.first, keys.second), length=length)
  outside = jnp.minimum(left.min(axis=1), keys.third.min(axis=1))
  return _distance_sq(smallest.T, mask), columns.T, _distance_sq(outside, mask)


def _distance_sq(keys, mask):
  """Reads squared distances, rounded down, out of keys; infinite where there was no column."""
  return lax.bitcast_convert_type(jnp.minimum(keys & np.int32(~mask), _INFINITE), jnp.float32)


def shortlist(
    queries: jax.Array, queries_sq: jax.Array, columns: jax.Array, squares: jax.Array, length: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Lists, for every query, the columns of the smallest distances: `neighbors_gpu.shortlist` on a CPU.

  Args:
    queries: [q, r] float32 or bfloat16.
    queries_sq: [q] float32, their squared norms.
    columns: [r, m], of the same type.
    squares: [m] float32, their squared norms; infinite for columns that do not count.
    length: at most `SLOTS`.

  Returns:
    What `best` returns, of [q, length] and [q].
  """
  if (missing := WIDTH - columns.shape[1]) > 0:
    columns = jnp.pad(columns, ((0, 0), (0, missing)))
    squares = jnp.pad(squares, (0, missing), constant_values=jnp.inf)
  m = columns.shape[1]
  num_tiles = -(-m // WIDTH)
  mask, last = mask_for(num_tiles * WIDTH), (num_tiles - 1) * WIDTH

  def tile(k):
    """Cuts a tile out; the last reaches back, to columns that do not count there."""
    begin = jnp.minimum(k * WIDTH, m - WIDTH)
    new = begin + jnp.arange(WIDTH) >= k * WIDTH
    return (lax.dynamic_slice_in_dim(columns, begin, WIDTH, 1),
            jnp.where(new, lax.dynamic_slice_in_dim(squares, begin, WIDTH), jnp.inf))

  def block(queries, queries_sq):
    found, column, outside = best(see(queries, queries_sq, tile, num_tiles, mask), length, mask)
    return found, jnp.where(column >= last, column - (last - (m - WIDTH)), column), outside

  return in_blocks(block, ROWS, queries, queries_sq)


@functools.cache
def fastest_dtype() -> str:
  """Finds out whether this CPU multiplies bfloat16 much faster than float32: the name of the better one.

  Several processes take float32: what they measure may differ, and they share programs.
  """
  alone = jax.process_count() == 1
  fast = alone and _may_be_fast() and _product_seconds('bfloat16') * _WORTHWHILE < _product_seconds('float32')
  return 'bfloat16' if fast else 'float32'


def product_seconds() -> float:
  """Measures how long this CPU takes to multiply two values and add the result, among many, of that type."""
  return _product_seconds(fastest_dtype())


@functools.cache
def _product_seconds(dtype):
  """Measures a value of a product of a tile's size."""
  dim = 128
  a, b = jnp.ones((ROWS, dim), dtype), jnp.ones((dim, WIDTH), dtype)
  product = jax.jit(functools.partial(
      jnp.dot, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32))
  product(a, b).block_until_ready()
  times = []
  for _ in range(5):
    began = time.perf_counter()
    product(a, b).block_until_ready()
    times.append(time.perf_counter() - began)
  return min(times) / (ROWS * WIDTH * dim)


def _may_be_fast() -> bool:
  """Tells whether the CPU has instructions for bfloat16, or does not say: measuring takes a while."""
  try:
    return 'bf16' in Path('/proc/cpuinfo').read_text()
  except OSError:
    return True
