"""Exact nearest neighbours in blocks; the full distance matrix never exists.

Within a block |q - b|^2 = |q|^2 + |b|^2 - 2 q.b makes the search a matrix product: of vectors reduced
to fewer dimensions where the bank allows it, and rounded to bfloat16 where the hardware is faster with
it. Neither decides:

  - The reduction never enlarges a distance. It keeps the coordinates along the bank's first principal
    axes and, as one more coordinate, the length of all that is left (`search_bank.reduce`).
  - How far rounding moves a vector is measured, or bounded, for each (its slack): the triangle
    inequality then says what the distance cannot be below.
  - The few rows with the smallest such distances are the shortlist; theirs are computed anew, by
    `distances.distances_sq`. When the k-th of those is below the least distance that a row outside the
    shortlist can have, no other row is nearer.
  - Where it is not, the query is in doubt, and is searched again with a longer shortlist, then with
    vectors neither reduced nor rounded, in the end by comparing it with every row.

The result is therefore the same, bit by bit, in either precision, any block, and any sharding.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from patchcore_jax import parallel
from patchcore_jax.search import neighbors_gpu, slots
from patchcore_jax.search.distances import (
    TENSOR_CORE_ERROR,
    UNIT,
    distances_sq,
    in_blocks,
    may_be_nearer,
    product_error,
    settle,
    smallest,
)
from patchcore_jax.search.search_bank import SearchBank, reduce, unreduced

_QUERY_BLOCK = 512
_BANK_BLOCK = 16384
# Rows on the shortlist beyond the k asked for: at first, and for queries in doubt, this many at once.
_SPARE, _MANY_SPARE, _DOUBTFUL_BLOCK = 7, 63, 64
_WARP = 32  # threads of a GPU that read together
_DOUBTFUL_KERNEL_BLOCK = 512  # the same where `neighbors_gpu` makes the lists
_ALL_BLOCK = 256  # rows that a query is compared with at once when no bound settles it


def nearest_neighbors(
    queries: jax.Array,
    bank: jax.Array | SearchBank,
    *,
    k: int = 1,
    query_block: int = _QUERY_BLOCK,
    bank_block: int = _BANK_BLOCK,
) -> tuple[jax.Array, jax.Array]:
  """Finds the k nearest rows of `bank` for every query.

  Args:
    queries: [q, d] float32.
    bank: [m, d] float32, m >= k, or what `search_bank.prepare` made of it, which is faster to search.
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
    axis_name: str | None = None,
    query_block: int = _QUERY_BLOCK,
    bank_block: int = _BANK_BLOCK,
    kernels: bool = True,
) -> list[tuple[jax.Array, jax.Array]]:
  """Finds the k nearest among the first m rows of `bank`, for every m in `sizes`.

  A memory bank is in order of selection, so its prefixes are the banks of smaller ratios: all of
  them together cost what the largest alone costs.

  Args:
    sizes: prefix lengths, any order, each between k and the length of the bank.
    axis_name: within `jax.pmap` or `jax.shard_map`, for a bank of one shard on each device: every
      device brings its own queries, as many as the others. Every device searches its shard for the queries
      of all, and the nearest are joined; prefixes are then searched one by one.
    kernels: whether `neighbors_gpu` may be used, on its GPUs. It may not in programs that are stored: a
      kernel is tied to the versions that made it.

  Returns:
    What `nearest_neighbors` returns for the first m rows, for each m of `sizes`.
  """
  rows = bank.rows if isinstance(bank, SearchBank) else bank
  if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
    raise ValueError(
        f'Expected queries [q, d] and bank [m, d], got {queries.shape} and {rows.shape}.')
  shards = 1 if axis_name is None else lax.axis_size(axis_name)
  if k < 1 or min(sizes) < k or max(sizes) > len(rows) * shards:
    raise ValueError(
        f'{k} neighbours are asked for in banks of {list(sizes)} patches (of {len(rows) * shards}): '
        'expected 1 <= num_neighbors <= patches in the smallest bank. Lower num_neighbors or raise '
        'the coreset ratio.')
  bank = jax.tree.map(jnp.asarray, bank)  # where this is not compiled, they may be NumPy arrays
  if not isinstance(bank, SearchBank):
    bank = unreduced(bank)
  queries, blocks = jnp.asarray(queries), (query_block, bank_block)
  if axis_name is not None:
    queries = lax.all_gather(queries, axis_name, tiled=True)
    return [_search_shards(queries, bank, size, k, blocks, axis_name, kernels) for size in sizes]
  ordered = tuple(sorted(set(sizes)))
  by_size = dict(zip(ordered, _search(queries, bank, ordered, k, blocks, kernels)))
  return [by_size[size] for size in sizes]


def sharded_nearest_neighbors(
    queries, bank: SearchBank, mesh: Mesh, *, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Finds the nearest rows of a bank that is split over a mesh of one axis, of one process or several.

  Args:
    queries: [q, d] float32 on the host, the same in every process.
    bank: `parallel.split(search_bank.prepare(rows, num_shards=mesh.size), mesh)`.
    mesh: its axis may have any name.
    k: number of neighbours.

  Returns:
    What `nearest_neighbors` returns, as NumPy arrays, in every process.
  """
  padded = np.pad(queries, ((0, -len(queries) % mesh.size), (0, 0)))
  stacked = parallel.split(padded.reshape(mesh.size, -1, padded.shape[1]), mesh)
  found = _sharded_search(mesh, k)(stacked, bank)
  return tuple(np.asarray(x.addressable_data(0))[:len(queries)] for x in found)


def merge_nearest(
    distances_sq: jax.Array, indices: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Sorts candidates [q, c], c >= k, and keeps the k nearest of each query; ties go to the lowest index."""
  distances_sq, indices = lax.sort((distances_sq, indices), dimension=-1, num_keys=2)
  return distances_sq[:, :k], indices[:, :k]


def bank_rows(bank: jax.Array | SearchBank, indices: jax.Array, axis_name: str | None = None) -> jax.Array:
  """Gathers rows [..., d] of a bank by index; every device brings its own indices to a bank in shards."""
  rows = jnp.asarray(bank.rows if isinstance(bank, SearchBank) else bank)
  if axis_name is None:
    return rows[indices]
  shards, shard = lax.axis_size(axis_name), lax.axis_index(axis_name)
  wanted = lax.all_gather(indices, axis_name)
  mine = (wanted % shards == shard)[..., None]
  # One device holds the row, and the others have zeros: the sum over devices is exact.
  found = lax.psum(jnp.where(mine, rows[wanted // shards], 0), axis_name)
  return found[shard]


def _search_shards(queries, bank, size, k, blocks, axis_name, kernels):
  """Searches this device's shard for the `queries` of all devices; returns the nearest for its own."""
  shards, shard = lax.axis_size(axis_name), lax.axis_index(axis_name)
  longest = -(-size // shards)
  count = jnp.minimum(bank.count, (size - shard + shards - 1) // shards)
  shortened = bank._replace(
      rows=bank.rows[:longest], columns=bank.columns[:, :longest], squares=bank.squares[:longest],
      count=count)
  nearest, indices = _search(queries, shortened, (longest,), min(k, longest), blocks, kernels)[0]
  indices = jnp.where(nearest < jnp.inf, indices * shards + shard, np.iinfo(np.int32).max)

  def share(x):  # [shards * q, k] -> [q, shards * k]
    x = lax.all_to_all(x.reshape(shards, -1, x.shape[1]), axis_name, 0, 0)
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)

  return merge_nearest(share(nearest), share(indices), k)


@functools.lru_cache(maxsize=16)
def _sharded_search(mesh, k):
  """Compiles the search of `sharded_nearest_neighbors`."""
  (axis_name,) = mesh.axis_names

  def search(queries, bank):
    bank = jax.tree.map(lambda x: x[0], bank)
    size = len(bank.rows) * mesh.size  # the padding does not count
    (found,) = nested_nearest_neighbors(queries[0], bank, (size,), k=k, axis_name=axis_name)
    return jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), found)

  split = PartitionSpec(axis_name)
  return jax.jit(jax.shard_map(
      search, mesh=mesh, in_specs=(split, split), out_specs=PartitionSpec(), check_vma=False))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _search(queries, bank, sizes, k, blocks, kernels):
  """Searches the prefixes of each size, ascending: [(distances_sq, indices)]."""
  if bank.columns is None:  # `in_one_pass`; whole blocks would be a loop, of one step
    blocks = len(queries), len(bank.rows) + 1
    return _by_shortlist(queries, unreduced(bank.rows), sizes, k, k + _MANY_SPARE, blocks)[0]
  plain = functools.partial(_in_stages, sizes=sizes, k=k, blocks=blocks)
  # Elsewhere the kernel's stages would be traced for nothing, which takes as long as all the others do.
  device = jax.local_devices()[0]
  if kernels and parallel.has_kernels(device) and k + _SPARE <= neighbors_gpu.LONGEST:
    return lax.platform_dependent(
        queries, bank, cuda=functools.partial(plain, kernel=neighbors_gpu.shortlist), default=plain)
  if kernels and device.platform == 'cpu' and k + _SPARE <= slots.SLOTS:
    return plain(queries, bank, kernel=slots.shortlist)
  return plain(queries, bank)


def _in_stages(queries, bank, *, sizes, k, blocks, kernel=None):
  """Searches as `_search` does, again and with more and more care for the queries in doubt.

  Args:
    kernel: `neighbors_gpu.shortlist`, for the first two stages; `slots.shortlist`, for the first; or None.
  """
  longer = functools.partial(
      _by_shortlist, bank=bank, sizes=sizes, k=k, length=k + _MANY_SPARE, blocks=blocks)
  at_once = _DOUBTFUL_BLOCK
  if kernel is None:
    found, doubtful = _by_shortlist(queries, bank, sizes, k, k + _SPARE, blocks)
  else:
    found, doubtful = _by_kernel(queries, bank, sizes, k, k + _SPARE, kernel)
    if kernel is neighbors_gpu.shortlist:
      longer = functools.partial(
          _by_kernel, bank=bank, sizes=sizes, k=k, length=neighbors_gpu.LONGEST, kernel=kernel)
      at_once = _DOUBTFUL_KERNEL_BLOCK

  def as_they_are(queries):  # whose columns would be as large as the bank: they are made block by block
    whole = bank._replace(columns=None, basis=None)
    return _by_shortlist(queries, whole, sizes, k, k + _MANY_SPARE, blocks)

  def repeat(search, size, found, doubtful):
    return settle(lambda at, _: search(queries[at]), size, found, doubtful)

  def again(found, doubtful):
    found, doubtful = repeat(longer, at_once, found, doubtful)
    if bank.basis is not None or bank.columns.dtype != jnp.float32:
      found, doubtful = repeat(as_they_are, _DOUBTFUL_BLOCK, found, doubtful)
    return repeat(lambda q: _by_all(q, bank, sizes, k), 1, found, doubtful)[0]

  # Asked once, since a host that is asked by its GPU keeps it waiting; most often the answer is no.
  return lax.cond(doubtful.any(), again, lambda found, doubtful: found, found, doubtful)


def _by_kernel(queries, bank, sizes, k, length, kernel):
  """Searches as `_by_shortlist` does, with lists that a kernel makes as `neighbors_gpu.shortlist` does."""
  reduced, queries_sq, slack = reduce(queries, bank.center, bank.basis, bank.columns.dtype.name)
  squares = jnp.where(jnp.arange(len(bank.rows)) < bank.count, bank.squares, jnp.inf)
  largest = jnp.sqrt(jnp.where(squares < jnp.inf, squares, 0).max())
  error = TENSOR_CORE_ERROR * product_error(reduced.shape[1], jnp.sqrt(queries_sq), largest)
  scores, indices = (jnp.zeros((len(queries), 0), dtype) for dtype in (jnp.float32, jnp.int32))
  found, doubtful, begin = [], False, 0
  outside = jnp.full(len(queries), jnp.inf, jnp.float32)
  for end in sizes:
    lowest, column, rest = kernel(
        reduced, queries_sq, bank.columns[:, begin:end], squares[begin:end], length)
    scores, indices = jnp.concatenate([scores, lowest], 1), jnp.concatenate([indices, column + begin], 1)
    outside = jnp.minimum(outside, rest)
    if begin:
      scores, indices = merge_nearest(scores, indices, 2 * length)
      outside = jnp.minimum(outside, scores[:, length])
      scores, indices = scores[:, :length], indices[:, :length]
    if kernel is slots.shortlist:  # the lists' rows would take more memory than all else
      exact = functools.partial(_nearest_of, rows=bank.rows, k=k)
      found.append(in_blocks(exact, slots.ROWS, queries, scores, indices))
    else:
      found.append(_nearest_of(queries, scores, indices, rows=bank.rows, k=k, pause=_WARP))
    doubtful |= _in_doubt(found[-1][0], outside - error, slack + bank.slack, outside)
    begin = end
  return found, doubtful


def _nearest_of(queries, scores, indices, *, rows, k, pause=0):
  """Finds the k nearest of each query's shortlist, by exact distances; a score of infinity means no row."""
  exact = distances_sq(rows[jnp.minimum(indices, len(rows) - 1)], queries[:, None], axis=-1, pause=pause)
  return merge_nearest(jnp.where(scores < jnp.inf, exact, jnp.inf), indices, k)


def _in_doubt(nearest, outside_sq, slack, outside):
  """Tells whether a row outside the shortlist may be as near as the k-th on it.

  Args:
    nearest: [q, k] exact squared distances.
    outside_sq: [q], the least squared reduced distance that such a row can have, but for the slack.
    slack: [q], the slacks of the query and of the bank together.
    outside: [q], infinite where there is no such row.
  """
  return may_be_nearer(nearest[:, -1], outside_sq, slack) & (outside < jnp.inf)


def _by_shortlist(queries, bank, sizes, k, length, blocks):
  """Compares each query with the `length` rows of the smallest reduced distances.

  Returns what each size finds, and whether a nearer row may have been missed.
  """
  query_block, bank_block = blocks
  dtype = 'float32' if bank.columns is None else bank.columns.dtype.name
  reduced, queries_sq, slack = reduce(queries, bank.center, bank.basis, dtype)
  counts = jnp.arange(len(bank.rows)) < bank.count
  largest = jnp.sqrt(jnp.where(counts, bank.squares, 0).max())
  bank_slack = bank.slack
  if bank.columns is None:  # the squares are of reduced rows
    largest += bank.slack
    bank_slack = 1.01 * 2 * UNIT * largest  # as `reduce` has it without a basis

  def block_of(first, width):
    """Cuts a block out of the bank: columns [r, width] and their squares, infinite for padding."""
    def part(x, axis=0):
      return lax.dynamic_slice_in_dim(x, first, width, axis)

    if bank.columns is None:
      vectors, squares, _ = reduce(part(bank.rows), bank.center, None, dtype)
      columns = vectors.T
    else:
      columns, squares = part(bank.columns, axis=1), part(bank.squares)
    return columns, jnp.where(part(counts), squares, jnp.inf)

  def shorten(first, width, *shortlist):
    """Adds a block to the shortlist and to the smallest score of all rows that are not on it."""
    columns, block_squares = block_of(first, width)

    def block(reduced, scores, indices, outside):
      products = jnp.dot(
          reduced, columns, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
      # The reduced distances, but for the query's own square.
      lowest, column = smallest(block_squares - 2 * products, min(length + 1, width))
      scores, indices = merge_nearest(
          jnp.concatenate([scores, lowest], 1), jnp.concatenate([indices, column + first], 1), length + 1)
      return scores[:, :length], indices[:, :length], jnp.minimum(outside, scores[:, length])

    return in_blocks(block, query_block, reduced, *shortlist)

  def decide(queries, scores, indices):
    return _nearest_of(queries, scores, indices, rows=bank.rows, k=k)

  error = product_error(reduced.shape[1], jnp.sqrt(queries_sq), largest)
  error *= 1 if reduced.dtype == jnp.float32 else TENSOR_CORE_ERROR

  shortlist = (
      jnp.full((len(queries), length), jnp.inf), jnp.zeros((len(queries), length), jnp.int32),
      jnp.full(len(queries), jnp.inf))
  found, doubtful, begin = [], jnp.zeros(len(queries), bool), 0
  for end in sizes:
    if whole := (end - begin) // bank_block:
      def step(i, shortlist, begin=begin):
        return shorten(begin + i * bank_block, bank_block, *shortlist)
      shortlist = lax.fori_loop(0, whole, step, shortlist)
    if rest := (end - begin) % bank_block:
      shortlist = shorten(end - rest, rest, *shortlist)
    *listed, outside = shortlist
    found.append(in_blocks(decide, query_block, queries, *listed))
    doubtful |= _in_doubt(found[-1][0], outside + queries_sq - error, slack + bank_slack, outside)
    begin = end
  return found, doubtful


def _by_all(queries, bank, sizes, k):
  """Searches by `distances_sq` to every row, for the queries that no bound settles."""
  m = len(bank.rows)
  width = min(m, _ALL_BLOCK)

  def part(i, exact):
    first = jnp.minimum(i * width, m - width)  # the last block reaches back: a copy cut to size is a bank
    rows = lax.dynamic_slice_in_dim(bank.rows, first, width)
    return lax.dynamic_update_slice(exact, distances_sq(rows[None], queries[:, None], axis=-1), (0, first))

  exact = lax.fori_loop(0, -(-m // width), part, jnp.zeros((len(queries), m)))
  exact = jnp.where(jnp.arange(len(bank.rows)) < bank.count, exact, jnp.inf)
  found = []
  for size in sizes:
    values, indices = lax.top_k(-exact[:, :size], k)  # the lower index first, where they tie
    found.append((-values, indices.astype(jnp.int32)))
  return found, jnp.zeros(len(queries), bool)
