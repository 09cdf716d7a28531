"""A bank made ready for searching: reduced to fewer dimensions, rounded, with bounds on what that moves.

Neither decides what is found; `neighbors` explains how.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from threadpoolctl import threadpool_limits

from patchcore_jax.search import slots
from patchcore_jax.search.distances import UNIT
from patchcore_jax.settings import SearchSpec

# Share of the bank's variance that a reduction keeps, and the share of the dimensions it may take.
_VARIANCE, _WORTHWHILE = 0.985, 0.6
_DIM_STEP = 64  # reduced vectors have a multiple of so many dimensions
_SAMPLE = 8192  # rows that show the bank's principal axes
_PREPARED_BLOCK = 65536


class SearchBank(NamedTuple):
  """A bank made ready for searching; a pytree. See `prepare`.

  Attributes:
    rows: [m, d] float32, as given.
    columns: [r, m] float32 or bfloat16, the reduced rows: the layout in which products are fastest. None
      where they are made of the rows as they are needed.
    squares: [m] float32, the columns' squared norms.
    slack: [] float32, how far a column is at most from the ideal reduction of its row.
    center: [d] float32, which is subtracted before vectors are reduced.
    basis: [d, r - 1] float32, orthonormal, or None where nothing is reduced.
    count: [] int32, how many of the rows count; those behind are padding.
  """

  rows: Any
  columns: Any
  squares: Any
  slack: Any
  center: Any
  basis: Any
  count: Any


def in_one_pass(bank) -> SearchBank:
  """Marks a bank [m, d] to be searched without loops, and without a second look at queries in doubt.

  It is for programs that go to runtimes which have no loops, or converters that do not know them. The
  distance matrix is whole then. The rows found for a query in doubt are farther than the nearest by no
  more than `distances.product_error`.
  """
  return SearchBank(np.asarray(bank, np.float32), *[None] * 6)


def prepare(bank, shortlist: str = 'auto', *, num_shards: int | None = None) -> SearchBank:
  """Makes a bank [m, d] ready for many searches.

  Args:
    bank: float32, on the host or a device.
    shortlist: see `SearchSpec`.
    num_shards: None for a bank that is whole on every device. Otherwise all arrays get a leading axis of
      this size, for one shard on each device; rows are dealt out in turn, so that a prefix of the bank
      is a prefix of every shard.

  Returns:
    A `SearchBank` of NumPy arrays; put it on the device, or the devices, once.

  Raises:
    ValueError: another shortlist, or a bank of another shape.
  """
  shortlist = SearchSpec(shortlist).shortlist
  if bank.ndim != 2:
    raise ValueError(f'Expected a bank [m, d], got {bank.shape}.')
  if shortlist == 'auto':
    shortlist = slots.fastest_dtype() if jax.default_backend() == 'cpu' else 'bfloat16'
  bank = np.asarray(bank, np.float32)
  center, basis = _principal_axes(bank[::max(1, len(bank) // _SAMPLE)])
  width = bank.shape[1] if basis is None else basis.shape[1] + 1
  columns, squares = np.empty((width, len(bank)), shortlist), np.empty(len(bank), np.float32)
  slack = np.float32(0)
  for i in range(0, len(bank), _PREPARED_BLOCK):
    block = slice(i, i + _PREPARED_BLOCK)
    columns[:, block], squares[block], largest = jax.device_get(
        _reduce_columns(bank[block], center, basis, shortlist))
    slack = np.maximum(slack, largest)
  if num_shards is None:
    return SearchBank(bank, columns, squares, slack, center, basis, np.int32(len(bank)))
  missing = -len(bank) % num_shards
  bank = np.pad(bank, ((0, missing), (0, 0))).reshape(-1, num_shards, bank.shape[1])
  columns = np.pad(columns, ((0, 0), (0, missing))).reshape(width, -1, num_shards)
  squares = np.pad(squares, (0, missing)).reshape(-1, num_shards)
  same = jax.tree.map(lambda x: np.repeat(x[None], num_shards, axis=0), (slack, center, basis))
  counts = len(squares) - (np.arange(num_shards) >= num_shards - missing)
  return SearchBank(
      bank.swapaxes(0, 1), np.ascontiguousarray(columns.transpose(2, 0, 1)), squares.T, *same,
      counts.astype(np.int32))


def _principal_axes(sample):
  """Finds a reduction that keeps most distances nearly as they are: (center, basis); basis None for none."""
  dim = sample.shape[1]
  center = sample.mean(axis=0)
  # This is in float64: the bounds hold because the basis is orthonormal, whichever basis it is.
  covariance = jax.device_get(_covariance(sample - center)).astype(np.float64)
  # One thread: the threads of LAPACK wait for each other so often here that others on the machine, or JAX's
  # own, make them take ten times as long.
  with threadpool_limits(1):
    variance, axes = np.linalg.eigh(covariance)
  share = np.cumsum(variance[::-1]) / max(variance.sum(), 1e-300)
  needed = 2 + int(np.searchsorted(share, _VARIANCE))
  reduced = -(-needed // _DIM_STEP) * _DIM_STEP
  if reduced > _WORTHWHILE * dim:
    return center, None
  return center, np.ascontiguousarray(axes[:, ::-1][:, :reduced - 1], np.float32)


@jax.jit
def _covariance(rows):
  return jnp.dot(rows.T, rows, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=3)
def reduce(vectors, center, basis, dtype):
  """Reduces and rounds vectors [n, d]: (reduced [n, r], squared norms [n], slack [n]).

  With an orthonormal basis V, the ideal x -> (V'x, |x - VV'x|) never enlarges a distance: what is along
  V keeps its own, and |a| and |b| differ by at most |a - b|. The slack [n] bounds how far the result
  is from the ideal. A sum of d products errs by at most d u |x| |v|, u = 2^-24, in whatever order
  (Higham 2002, section 3.1); over r columns these errors make sqrt(r) d u |x|. The basis, which is rounded
  itself, and the product back, a sum of r products, add errors of their own. How far rounding to `dtype`
  moves a vector is measured.
  """
  vectors = vectors - center
  norms = jnp.sqrt(jnp.square(vectors).sum(axis=1))
  if basis is None:
    slack = 2 * UNIT * norms  # the error of the subtraction
  else:
    dim, axes = basis.shape
    along = jnp.dot(vectors, basis, precision=lax.Precision.HIGHEST)
    back = jnp.dot(along, basis.T, precision=lax.Precision.HIGHEST)
    rest = jnp.sqrt(jnp.square(vectors - back).sum(axis=1, keepdims=True))
    slack = UNIT * (math.sqrt(axes) * (2 * dim + axes + 4) + dim + 4) * norms
    vectors = jnp.concatenate([along, rest], axis=1)
  kind = jnp.finfo(dtype)
  # Not a cast and one back, which XLA leaves out on GPUs: nothing would seem to have moved.
  rounded = lax.reduce_precision(vectors, kind.nexp, kind.nmant)
  slack += jnp.sqrt(jnp.square(vectors - rounded).sum(axis=1))
  # The factor covers the rounding of the norms and roots.
  return rounded.astype(dtype), jnp.square(rounded).sum(axis=1), 1.001 * slack


@functools.partial(jax.jit, static_argnums=3)
def _reduce_columns(rows, center, basis, dtype):
  """Reduces some rows of a bank: (columns [r, n], squares [n], the largest slack [])."""
  reduced, squares, slack = reduce(rows, center, basis, dtype)
  return reduced.T, squares, slack.max()


def unreduced(rows):
  """Makes a `SearchBank` that is neither reduced nor rounded."""
  center = rows.mean(axis=0)
  columns, squares, slack = reduce(rows, center, None, 'float32')
  return SearchBank(rows, columns.T, squares, slack.max(), center, None, jnp.int32(len(rows)))
