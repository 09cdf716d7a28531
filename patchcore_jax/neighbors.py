"""Exact nearest neighbours in blocks; the full distance matrix never exists.

Within a block |q - b|^2 = |q|^2 + |b|^2 - 2 q.b makes the search a matrix product. Its rounding error
grows with the norms, so both sides are centred on the mean of the bank first, and the distances of
the neighbours found are computed once more from differences.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_QUERY_BLOCK = 1024
_BANK_BLOCK = 4096


def nearest_neighbors(
    queries: jax.Array,
    bank: jax.Array,
    *,
    k: int = 1,
    query_block: int = _QUERY_BLOCK,
    bank_block: int = _BANK_BLOCK,
) -> tuple[jax.Array, jax.Array]:
  """The k nearest rows of `bank` for every query.

  Args:
    queries: [q, d] float32.
    bank: [m, d] float32, m >= k.
    k: number of neighbours.
    query_block, bank_block: size of the distance tiles held at once; no influence on the result
      beyond float32 rounding.

  Returns:
    distances_sq [q, k] float32, squared Euclidean, ascending; indices [q, k] int32. Ties go to the
    lowest index.

  Raises:
    ValueError: shapes that do not fit, or k larger than the bank.

  >>> nearest_neighbors(jnp.array([[0., 1.]]), jnp.array([[0., 0.], [3., 1.]]), k=2)
  (Array([[1., 9.]], dtype=float32), Array([[0, 1]], dtype=int32))
  """
  return nested_nearest_neighbors(
      queries, bank, (len(bank),), k=k, query_block=query_block, bank_block=bank_block)[0]


def nested_nearest_neighbors(
    queries: jax.Array,
    bank: jax.Array,
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
  if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
    raise ValueError(
        f'Expected queries [q, d] and bank [m, d], got {queries.shape} and {bank.shape}.')
  if k < 1 or min(sizes) < k or max(sizes) > len(bank):
    raise ValueError(
        f'{k} neighbours are asked for in banks of {list(sizes)} patches (of {len(bank)}): expected '
        '1 <= num_neighbors <= patches in the smallest bank. Lower num_neighbors or raise the '
        'coreset ratio.')
  ordered = sorted(set(sizes))
  center = bank[:ordered[-1]].mean(axis=0)
  search = functools.partial(
      _search, bank=bank[:ordered[-1]] - center, sizes=ordered, k=k, block=bank_block)
  found = _in_blocks(search, queries - center, query_block)
  by_size = {}
  for size, indices in zip(ordered, found):
    by_size[size] = _exact(queries, bank, indices, query_block)
  return [by_size[size] for size in sizes]


def _search(queries, *, bank, sizes, k, block):
  """Indices [q, k] for each prefix of a centred bank; the running best is carried from one to the next."""
  best = (jnp.full((len(queries), k), jnp.inf), jnp.zeros((len(queries), k), jnp.int32))
  found, begin = [], 0
  for end in sizes:
    whole = (end - begin) // block
    if whole:
      def step(i, best, begin=begin):
        first = begin + i * block
        return _merge(best, queries, lax.dynamic_slice_in_dim(bank, first, block), first, k)
      best = lax.fori_loop(0, whole, step, best)
    if rest := (end - begin) % block:
      best = _merge(best, queries, bank[end - rest:end], end - rest, k)
    found.append(best[1])
    begin = end
  return tuple(found)


def _merge(best, queries, block, first, k):
  """Joins the k best so far with those of one block, whose rows count from `first`."""
  # |q|^2 is the same for all rows of the bank, so it is left out of the comparison.
  scores = jnp.sum(jnp.square(block), axis=-1) - 2 * jnp.dot(
      queries, block.T, precision=lax.Precision.HIGHEST)
  if k == 1:
    index = jnp.argmin(scores, axis=-1, keepdims=True)
    value = jnp.take_along_axis(scores, index, axis=-1)
    better = value < best[0]  # strict: the lower index wins a tie
    return (jnp.where(better, value, best[0]),
            jnp.where(better, index.astype(jnp.int32) + first, best[1]))
  value, index = lax.top_k(-scores, min(k, len(block)))
  values = jnp.concatenate([best[0], -value], axis=-1)
  indices = jnp.concatenate([best[1], index.astype(jnp.int32) + first], axis=-1)
  value, position = lax.top_k(-values, k)
  return -value, jnp.take_along_axis(indices, position, axis=-1)


def _exact(queries, bank, indices, query_block):
  """Squared distances to the rows found, from differences, and both in their ascending order."""

  def refine(queries, indices):
    difference = queries[:, None, :] - bank[indices]
    distances_sq = jnp.sum(jnp.square(difference), axis=-1)
    if indices.shape[1] == 1:
      return distances_sq, indices
    return lax.sort((distances_sq, indices), dimension=-1, num_keys=2)

  return _in_blocks(refine, queries, query_block, indices)


def _in_blocks(fn, queries, size, *more):
  """Runs `fn` on `size` queries at a time and joins the results."""
  n = len(queries)
  if n <= size:
    return fn(queries, *more)
  whole = n // size * size
  blocks = [x[:whole].reshape(-1, size, *x.shape[1:]) for x in (queries, *more)]
  results = lax.map(lambda block: fn(*block), tuple(blocks))
  results = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), results)
  if whole == n:
    return results
  rest = fn(*(x[whole:] for x in (queries, *more)))
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), results, rest)
