"""Exact nearest neighbours in blocks; the full distance matrix never exists.

Within a block |q - b|^2 = |q|^2 + |b|^2 - 2 q.b makes the search a matrix product, in float32, or in
bfloat16 where that is faster. Neither decides. From each product a bound is taken that the distance
cannot be below (`_bounds`); the few rows of the bank with the lowest bounds are the shortlist; their
distances are computed by `distances.distances_sq`; and when the k-th of those is not above the lowest
bound outside the shortlist, no other row can be nearer. Where it is above, the query is in doubt, and
is searched again with a tighter bound and a longer list, in the end by comparing it with every row.
The result is therefore the same, bit by bit, in either precision, any block, and any sharding.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from patchcore_jax.distances import distances_sq, product_error, smallest

_QUERY_BLOCK = 512
_BANK_BLOCK = 16384
# Rows on the shortlist beyond the k asked for: at first, and for queries in doubt, this many at once.
_SPARE, _MANY_SPARE, _DOUBTFUL_BLOCK = 3, 63, 64
SHORTLISTS = ('float32', 'bfloat16')


class SearchBank(NamedTuple):
  """A bank made ready for searching; a pytree. See `prepare`.

  Attributes:
    rows: [m, d] float32, as given.
    columns: [d, m] float32 or bfloat16, centred: the layout in which products are fastest.
    center: [d], the mean of the rows: about it, products err least.
    norms: [m] float32, of the centred rows.
    rounding: [m] float32, how far the columns are from the centred rows; 0 in float32.
    count: [] int32, how many of the rows count; those behind are padding.
  """

  rows: jax.Array
  columns: jax.Array
  center: jax.Array
  norms: jax.Array
  rounding: jax.Array
  count: jax.Array


def prepare(
    bank: jax.Array, shortlist: str = 'float32', *, count: int | jax.Array | None = None) -> SearchBank:
  """Centres, transposes and rounds a bank [m, d] once, for many searches.

  Args:
    bank: float32.
    shortlist: precision of the products that find candidates, 'float32' or 'bfloat16'. The result
      of a search is the same; bfloat16 is faster where the hardware has it, and takes less memory.
    count: only the first so many rows count; None for all.

  Raises:
    ValueError: another shortlist, or a bank of another shape.
  """
  if shortlist not in SHORTLISTS:
    raise ValueError(f'shortlist={shortlist!r}: expected one of {SHORTLISTS}.')
  if bank.ndim != 2:
    raise ValueError(f'Expected a bank [m, d], got {bank.shape}.')
  return _prepare(bank, shortlist, len(bank) if count is None else count)


@functools.partial(jax.jit, static_argnums=1)
def _prepare(bank, shortlist, count):
  center = bank.mean(axis=0)
  rounded, norms, rounding = _rounded(bank - center, shortlist)
  return SearchBank(bank, rounded.T, center, norms, rounding, jnp.int32(count))


def nearest_neighbors(
    queries: jax.Array,
    bank: jax.Array | SearchBank,
    *,
    k: int = 1,
    query_block: int = _QUERY_BLOCK,
    bank_block: int = _BANK_BLOCK,
) -> tuple[jax.Array, jax.Array]:
  """The k nearest rows of `bank` for every query.

  Args:
    queries: [q, d] float32.
    bank: [m, d] float32, m >= k, or what `prepare` made of it.
    k: number of neighbours.
    query_block, bank_block: size of the distance tiles held at once; no influence on the result.

  Returns:
    distances_sq [q, k] float32, squared Euclidean, ascending; indices [q, k] int32. Ties go to the
    lowest index.

  Raises:
    ValueError: shapes that do not fit, or k larger than the bank.

  >>> nearest_neighbors(jnp.array([[0., 1.]]), jnp.array([[0., 0.], [3., 1.]]), k=2)
  (Array([[1., 9.]], dtype=float32), Array([[0, 1]], dtype=int32))
  """
  size = len(bank.rows if isinstance(bank, SearchBank) else bank)
  return nested_nearest_neighbors(
      queries, bank, (size,), k=k, query_block=query_block, bank_block=bank_block)[0]


def nested_nearest_neighbors(
    queries: jax.Array,
    bank: jax.Array | SearchBank,
    sizes: Sequence[int],
    *,
    k: int = 1,
    query_block: int = _QUERY_BLOCK,
    bank_block: int = _BANK_BLOCK,
) -> list[tuple[jax.Array, jax.Array]]:
  """`nearest_neighbors` in the first m rows of `bank`, for every m in `sizes`, in one pass.

  A memory bank is in order of selection, so its prefixes are the banks of smaller ratios: all of
  them together cost what the largest alone costs.

  Args:
    sizes: prefix lengths, any order, each between k and the length of the bank.

  Returns:
    For each of `sizes` what `nearest_neighbors(queries, bank[:m])` returns.
  """
  rows = bank.rows if isinstance(bank, SearchBank) else bank
  if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
    raise ValueError(
        f'Expected queries [q, d] and bank [m, d], got {queries.shape} and {rows.shape}.')
  if k < 1 or min(sizes) < k or max(sizes) > len(rows):
    raise ValueError(
        f'{k} neighbours are asked for in banks of {list(sizes)} patches (of {len(rows)}): expected '
        '1 <= num_neighbors <= patches in the smallest bank. Lower num_neighbors or raise the '
        'coreset ratio.')
  if not isinstance(bank, SearchBank):
    bank = prepare(jnp.asarray(bank))
  ordered = tuple(sorted(set(sizes)))
  by_size = dict(zip(ordered, _search(
      jnp.asarray(queries), bank, ordered, k, query_block, bank_block)))
  return [by_size[size] for size in sizes]


def merge_nearest(
    distances_sq: jax.Array, indices: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k nearest of candidates [q, c], c >= k: ascending, ties by the lowest index."""
  distances_sq, indices = lax.sort((distances_sq, indices), dimension=-1, num_keys=2)
  return distances_sq[:, :k], indices[:, :k]


def _search(queries, bank, sizes, k, query_block, bank_block):
  """[(distances_sq, indices)] of each size, ascending."""
  blocks = query_block, bank_block
  found, doubtful = _by_shortlist(queries, bank, sizes, k, k + _SPARE, blocks)

  def more_exactly(queries):
    again = bank
    if bank.columns.dtype != jnp.float32:
      columns, norms, rounding = _rounded(bank.rows - bank.center, jnp.float32)
      again = bank._replace(columns=columns.T, norms=norms, rounding=rounding)
    return _by_shortlist(queries, again, sizes, k, k + _MANY_SPARE, blocks)

  found, doubtful = _repeat(more_exactly, _DOUBTFUL_BLOCK, queries, found, doubtful)
  return _repeat(lambda q: _by_all(q, bank, sizes, k), 1, queries, found, doubtful)[0]


def _by_shortlist(queries, bank, sizes, k, length, blocks):
  """Compares each query with a shortlist from each block of the bank; says whether a nearer row may
  have been missed."""
  query_block, bank_block = blocks
  rounded = _rounded(queries - bank.center, bank.columns.dtype)
  best = jnp.full((len(queries), k), jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
  outside = jnp.full(len(queries), jnp.inf)  # the lowest bound of all rows not compared

  def compare(first, width, best, outside):
    columns, norms, rounding = (
        lax.dynamic_slice_in_dim(x, first, width, axis=x.ndim - 1)
        for x in (bank.columns, bank.norms, bank.rounding))
    counts = first + jnp.arange(width) < bank.count
    count = min(length, width)

    def block(queries, rounded, nearest, indices, outside):
      bounds = jnp.where(counts, _bounds(rounded, (columns, norms, rounding)), jnp.inf)
      lowest, column = smallest(bounds, min(count + 1, width))
      if count < width:
        outside = jnp.minimum(outside, lowest[:, -1])
      column = column[:, :count]
      exact = jnp.where(
          counts[column], distances_sq(bank.rows[column + first], queries[:, None], axis=-1), jnp.inf)
      return *merge_nearest(
          jnp.concatenate([nearest, exact], 1), jnp.concatenate([indices, column + first], 1),
          k), outside

    *best, outside = _in_blocks(block, query_block, queries, rounded, *best, outside)
    return tuple(best), outside

  found, doubtful, begin = [], jnp.zeros(len(queries), bool), 0
  for end in sizes:
    whole = (end - begin) // bank_block
    if whole:
      def step(i, carry, begin=begin):
        return compare(begin + i * bank_block, bank_block, *carry)
      best, outside = lax.fori_loop(0, whole, step, (best, outside))
    if rest := (end - begin) % bank_block:
      best, outside = compare(end - rest, rest, best, outside)
    found.append(best)
    doubtful |= (outside <= best[0][:, -1]) & (outside < jnp.inf)
    begin = end
  return found, doubtful


def _bounds(queries, bank):
  """[q, m]: what the squared distances cannot be below. Arguments as `_rounded` returns them, the
  bank's vectors transposed.

  The error of a product of rounded vectors is at most |q - q'| |b| + |q'| |b - b'| (Cauchy and
  Schwarz), besides that of summing, which is counted four times: tensor cores sum less carefully.
  """
  rounded, norms, rounding = queries
  columns, bank_norms, bank_rounding = bank
  products = jnp.dot(
      rounded, columns, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
  norms, rounding = norms[:, None], rounding[:, None]
  error = product_error(len(columns), norms, bank_norms)
  if columns.dtype != jnp.float32:
    # |q'| is at most |q| + |q - q'|; the last digits of the norms are covered by 2.0002.
    error = 4 * error + 2.0002 * (rounding * bank_norms + (norms + rounding) * bank_rounding)
  return jnp.square(norms) + jnp.square(bank_norms) - 2 * products - error


def _rounded(vectors, dtype):
  """Vectors in another type, the norms they had, and how far rounding moved them."""
  rounded = vectors.astype(dtype)
  return rounded, _norm(vectors), _norm(vectors - rounded.astype(jnp.float32))


def _norm(vectors):
  return jnp.sqrt(jnp.square(vectors).sum(axis=1))


def _repeat(search, size, queries, found, doubtful):
  """Searches the queries in doubt again, `size` at a time: (found, those that still are)."""
  n = len(queries)

  def step(carry):
    found, doubtful, still = carry
    at = jnp.nonzero(doubtful, size=size, fill_value=n)[0]
    better, unsure = search(queries[jnp.minimum(at, n - 1)])
    found = jax.tree.map(lambda old, new: old.at[at].set(new, mode='drop'), found, better)
    return (found, doubtful.at[at].set(False, mode='drop'), still.at[at].set(unsure, mode='drop'))

  found, _, still = lax.while_loop(
      lambda carry: carry[1].any(), step, (found, doubtful, jnp.zeros_like(doubtful)))
  return found, still


def _by_all(queries, bank, sizes, k):
  """Every distance by the definition: for the queries that no bound settles."""
  exact = lax.map(lambda row: distances_sq(row, queries, axis=-1), bank.rows, batch_size=256).T
  exact = jnp.where(jnp.arange(len(bank.rows)) < bank.count, exact, jnp.inf)
  found = []
  for size in sizes:
    values, indices = lax.top_k(-exact[:, :size], k)  # the lower index first, where they tie
    found.append((-values, indices.astype(jnp.int32)))
  return found, jnp.zeros(len(queries), bool)


def _in_blocks(fn, size, *queries):
  """Runs `fn` on `size` rows of every array at a time and joins the results."""
  n = len(queries[0])
  if n <= size:
    return fn(*queries)
  whole = n // size * size
  blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), queries)
  results = lax.map(lambda block: fn(*block), blocks)
  results = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), results)
  if whole == n:
    return results
  rest = fn(*jax.tree.map(lambda x: x[whole:], queries))
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), results, rest)
