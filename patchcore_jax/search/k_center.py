"""Greedy k-center selection: the dense loop that defines it, and a lazy one that equals it.

Both decide by `distances.distances_sq`, which gives the same float32 number in either.

The dense loop compares all n points with each selected one. The lazy one rests on a fact: distances
to the selected set only shrink, so one that is out of date is an upper bound. It works in rounds:

  1. Refresh. Points whose bound is at least the `floor` are compared with what was selected since they
     were last. A matrix product gives all distances in a tile of points and selected ones, to within
     an error bound. Only the nearest is then computed by `distances_sq`, and where others lie within
     the error of it, theirs too: those on a list of a few (`slots`), or all where that does not do.
  2. Window. The largest distances are taken out: a threshold separates them from all others.
  3. Select. The dense loop, in the window alone, as long as its farthest point is not below the
     threshold: until then no point outside can be the farthest. One product bounds the distances in the
     window from below, so each step looks closely at one or two points only.

When no bound reaches the floor any more, the floor is lowered. Points below it are not touched: most
points are left alone most of the time, and what is done for the others is matrix products.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patchcore_jax.parallel import has_kernels
from patchcore_jax.search import k_center_gpu, slots
from patchcore_jax.search.distances import (
    TENSOR_CORE_ERROR,
    UNIT,
    distances_sq,
    least_sq,
    may_be_nearer,
    product_error,
    settle,
)
from patchcore_jax.search.search_bank import reduce

AXIS = 'points'
# Points in the windows of all devices together. Many serve more selections by one refresh, few make each
# faster, and a round compares all with all.
_WINDOW = 1024
# The same where `k_center_gpu` selects: one kernel holds them.
_KERNEL_WINDOW = 2048
# Rows in doubt that are compared at once with what is on their lists, and in float32; and the lists' length.
_BY_LIST, _BY_FLOAT32, _LISTED = 128, 32, 7
# What the floor is lowered to, as a share of the largest (squared) distance left.
_FALL = 0.85
# Rows behind the last of the selected points, so that a tile never ends outside.
PADDING = slots.WIDTH
_NONE, _LOWEST = np.int32(np.iinfo(np.int32).max), np.int32(np.iinfo(np.int32).min)
# Groups of a window's points, of each of which one is compared with a pick at once.
_TOGETHER = 8
# Points of which those that are stale, if they are few, are gathered before they are sorted.
_MANY = 2**20
# Values of which one look at the largest tells whether any is in the window.
_GROUP = 64


class State(NamedTuple):
  """The state of a selection: all that is needed to go on with it.

  Attributes:
    distances_sq: [n] float32, of every point to the selected ones (and the start), or an upper bound
      of that; -1 for a selected point, -2 for padding.
    ages: [n] int32, how many of the selected points `distances_sq` takes into account.
    indices: [num_selected] int32, in order of selection; `count` of them so far.
    count: [] int32.
    floor: [] float32; bounds below it are left as they are.
    num_covered: [] int32, selected points that coincide with others.
  """

  distances_sq: jax.Array
  ages: jax.Array
  indices: jax.Array
  count: jax.Array
  floor: jax.Array
  num_covered: jax.Array


def start_distances_sq(rows, starts):
  """Computes the square of the mean distance of each row [n, d] to the starts [s, d].

  Squares are in the same order as the means, and spare roots later.
  """
  columns = rows.T

  def add(i, total):
    return total + jnp.sqrt(distances_sq(columns, starts[i][:, None]))

  total = lax.fori_loop(0, len(starts), add, jnp.zeros(len(rows)))
  return jnp.square(total / len(starts))


def initial_state(distances_sq, num_selected: int) -> State:
  """Makes the state of a selection that has selected nothing yet."""
  return State(
      distances_sq, jnp.zeros(len(distances_sq), jnp.int32), jnp.zeros(num_selected, jnp.int32),
      jnp.int32(0), jnp.float32(jnp.inf), jnp.int32(0))


@functools.partial(jax.jit, donate_argnums=1)
def dense_steps(columns, state, end):
  """Selects until there are `end` points, each the farthest from those before it: the definition.

  Args:
    columns: [d, n] float32, the points.
    state: `State`; ages and floor have no meaning here.
  """

  def step(i, state):
    pick = jnp.argmax(state.distances_sq).astype(jnp.int32)
    nearer = jnp.minimum(state.distances_sq, distances_sq(columns, columns[:, pick][:, None]))
    return state._replace(
        distances_sq=nearer.at[pick].set(-1.0), indices=state.indices.at[i].set(pick), count=i + 1,
        num_covered=state.num_covered + (state.distances_sq[pick] <= 0))

  return lax.fori_loop(state.count, end, step, state)


def state_sharding(mesh: Mesh) -> State:
  """Lays out the arrays of a `State` on a mesh: those of length n are split over it."""
  split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((AXIS,), ()))
  return State(split, split, whole, whole, whole, whole)


class Steps(NamedTuple):
  """How a round is computed: by `PLAIN`, or by `k_center_gpu`. The result does not depend on it.

  Attributes:
    refresh: a function with the arguments and results of `refresh_stale`.
    select: a function with the arguments and results of `select`.
    window: how many points the windows of all devices hold together; None for `_WINDOW`.
    dtype: of the vectors in products, where points stay on the host.
  """

  refresh: Callable
  select: Callable
  window: int | None = None
  dtype: str = 'float32'


def steps_for(device: jax.Device, num_points: int, dim: int) -> Steps:
  """Chooses the fastest steps for a device that holds points [num_points, dim]."""
  if device.platform == 'cpu':
    return BFLOAT16 if slots.fastest_dtype() == 'bfloat16' else PLAIN
  if not has_kernels(device):
    return PLAIN
  refresh = k_center_gpu.refresh if k_center_gpu.refresh_suits(num_points, dim) else refresh_stale
  return Steps(refresh, k_center_gpu.select, _KERNEL_WINDOW)


@functools.cache
def lazy_round(mesh: Mesh, steps: Steps):
  """Compiles a round: (points [n, d], centers, mean [d], state) -> (centers, state).

  points are split over the mesh as the state is; centers [num_selected + PADDING, d] holds the points
  selected so far.
  """
  split, whole = PartitionSpec(AXIS), PartitionSpec()
  states = jax.tree.map(lambda s: s.spec, state_sharding(mesh))
  return jax.jit(
      jax.shard_map(
          functools.partial(_round, steps), mesh=mesh, in_specs=(split, whole, whole, states),
          out_specs=(whole, states), check_vma=False),
      donate_argnums=(1, 3))


def _round(steps, points, centers, mean, state):
  """Computes one round: each device refreshes its own points, and all select in their joined windows."""
  n = len(points)
  top = lax.pmax(state.distances_sq.max(), AXIS)
  floor, order, num_stale = _stale(state, top)
  values = steps.refresh(points, order, num_stale, centers, mean, state)
  window = max(1, (steps.window or _WINDOW) // lax.axis_size(AXIS))
  threshold, cutoff, at = _window(values, floor, window)
  offset = lax.axis_index(AXIS) * n
  threshold, cutoff = _strictest(threshold, jnp.where(cutoff == _NONE, _NONE, cutoff + offset))
  gather = functools.partial(lax.all_gather, axis_name=AXIS, tiled=True)
  kept = jnp.minimum(at, n - 1)
  window = gather(points[kept]), gather(_valued(values, at)), gather(at + offset)
  window, centers, indices, end, num_covered = steps.select(*window, threshold, cutoff, centers, state)
  mine = lax.dynamic_slice_in_dim(window, lax.axis_index(AXIS) * len(at), len(at))
  return centers, _after(state, values, floor, at, mine, indices, end, num_covered)


def refresh_stale(points, order, num_stale, centers, mean, state, *, dtype: str = 'float32'):
  """Brings the distances of the first `num_stale` points in `order` up to date; returns those of all.

  Args:
    dtype: of the vectors in products. It has no influence on the result.
  """
  columns = columns_of(centers, mean, state.count, dtype)

  def chunk(i, values):
    at = lax.dynamic_slice_in_dim(order, i * slots.ROWS, slots.ROWS)
    return _refresh_at(points[at], at, i * slots.ROWS, num_stale, values, centers, columns, mean, state)

  return lax.fori_loop(0, -(-num_stale // slots.ROWS), chunk, state.distances_sq)


def streamed_round(points: np.ndarray, centers, mean, state, *, steps: Steps):
  """Computes a round like that of `lazy_round` for points that stay on the host.

  They are an array or a memory map; only those that are compared are sent to the device.
  """
  floor, order, num_stale, columns = _plan_streamed(state, centers, mean, steps.dtype)
  values, order, num_stale = jnp.copy(state.distances_sq), np.asarray(order), int(num_stale)
  for begin in range(0, num_stale, slots.ROWS):
    at = order[begin:begin + slots.ROWS]
    values = _refresh_streamed(points[at], at, begin, num_stale, values, centers, columns, mean, state)
  threshold, cutoff, at = _window_streamed(values, floor)
  rows = points[np.minimum(at, len(points) - 1)]
  return _select_streamed(steps, rows, threshold, cutoff, at, values, floor, centers, state)


@functools.partial(jax.jit, static_argnums=3)
def _plan_streamed(state, centers, mean, dtype):
  columns = columns_of(centers, mean, state.count, dtype)
  return *_stale(state, state.distances_sq.max()), columns


@functools.partial(jax.jit, donate_argnums=4)
def _refresh_streamed(rows, at, begin, num_stale, values, centers, columns, mean, state):
  return _refresh_at(rows, at, begin, num_stale, values, centers, columns, mean, state)


@jax.jit
def _window_streamed(values, floor):
  return _window(values, floor, _WINDOW)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 7))
def _select_streamed(steps, rows, threshold, cutoff, at, values, floor, centers, state):
  window, centers, indices, end, num_covered = steps.select(
      rows, _valued(values, at), at, threshold, cutoff, centers, state)
  return centers, _after(state, values, floor, at, window, indices, end, num_covered)


def _stale(state, top):
  """Finds the points to refresh in this round: (floor, order, num_stale).

  `order` [n + slots.ROWS] begins with the indices of the `num_stale` points, most outdated first, so that
  those of a chunk have missed about the same selected points.
  """
  floor = jnp.where(top < state.floor, jnp.maximum(_FALL * top, 0), state.floor)
  stale = (state.distances_sq >= floor) & (state.ages < state.count)
  return floor, jnp.pad(_by_age(stale, state.ages, state.count), (0, slots.ROWS)), stale.sum()


def _by_age(stale, ages, count):
  """Orders the indices of points [n] int32: those that are stale first, by classes of their ages."""
  n, few = len(ages), len(ages) // 8
  if n < _MANY:
    return _sorted(stale, ages, count)

  def gathered(stale, ages, count):
    at = jnp.nonzero(stale, size=few, fill_value=n)[0].astype(jnp.int32)
    kept = jnp.minimum(at, n - 1)
    return jnp.pad(kept[_sorted(at < n, ages[kept], count)], (0, n - few))

  return lax.cond(stale.sum() <= few, gathered, _sorted, stale, ages, count)


def _sorted(stale, ages, count):
  """Sorts for `_by_age`; on a CPU one number for both class and index is ten times faster than a pair."""
  index_bits = max(1, (len(ages) - 1).bit_length())
  last = 2 ** min(32 - index_bits, 20) - 1  # the class of those that are not stale
  share = ages.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
  key = jnp.where(stale, jnp.clip(jnp.floor(share * last), 0, last - 1), last).astype(jnp.uint32)
  key = key << index_bits | jnp.arange(len(ages), dtype=jnp.uint32)
  return (lax.sort(key) & (2**index_bits - 1)).astype(jnp.int32)


def _refresh_at(rows, at, begin, num_stale, values, centers, columns, mean, state):
  """Refreshes the `values` of the points `at`, as far as they are among the first `num_stale` in order."""
  inside = begin + jnp.arange(len(at)) < num_stale
  first = jnp.where(inside, state.ages[at], _NONE).min()
  fresh = refresh(
      rows, jnp.where(inside, values[at], -jnp.inf), first, centers, columns, state.count, mean)
  return values.at[jnp.where(inside, at, len(values))].set(fresh, mode='drop')


def _valued(values, at):
  """Gathers `values` at indices; -inf where an index is behind their end."""
  return jnp.where(at < len(values), values[jnp.minimum(at, len(values) - 1)], -jnp.inf)


def _after(state, values, floor, at, window, indices, end, num_covered):
  """Returns the state after a round.

  Refreshed points take `state.count` selected ones into account, and those of the window all `end`.
  """
  refreshed = (state.distances_sq >= floor) & (state.ages < state.count)
  ages = jnp.where(refreshed, state.count, state.ages).at[at].set(end, mode='drop')
  return State(values.at[at].set(window, mode='drop'), ages, indices, end, floor, num_covered)


class Columns(NamedTuple):
  """The selected points as `slots` takes them.

  Attributes:
    vectors: [d, m + PADDING].
    squares: [m + PADDING] float32, their squared norms; infinite for those that are not selected yet.
    slack: [m + PADDING] float32, how far each is at most from the point that it stands for.
    largest: [] float32, the largest norm.
  """

  vectors: jax.Array
  squares: jax.Array
  slack: jax.Array
  largest: jax.Array


def columns_of(centers, mean, count, dtype):
  """Makes the columns of the first `count` of the selected points [m + PADDING, d], less the mean [d]."""
  inside = jnp.arange(len(centers)) < count
  vectors, squares, slack = reduce(centers, mean, None, dtype)
  return Columns(
      vectors.T, jnp.where(inside, squares, jnp.inf), jnp.where(inside, slack, 0),
      jnp.sqrt(jnp.where(inside, squares, 0).max()))


def refresh(rows, values, first, centers, columns, count, mean):
  """Lowers `values` to the distances to centers[first:count], as `distances_sq` gives them.

  Args:
    rows: [r, d] float32 points.
    values: [r] float32, squared distances so far.
    first, count: [] int32, which of the selected points they are compared with.
    centers: [m + PADDING, d] float32, the selected points.
    columns: what `columns_of` made of them.
    mean: [d]; it is subtracted before products, whose errors are smaller for vectors nearer to zero.

  Returns:
    [r] float32, squared distances.
  """
  num_tiles = jnp.maximum(0, -(-(count - first) // slots.WIDTH))
  vectors, squares, own_slack = reduce(rows, mean, None, columns.vectors.dtype.name)
  # The distance to a column of slack s is at least x - s, where x is the computed one, and the square of that
  # at least x^2 - 2sx. No x beyond `far` can matter: 2s times that is taken off of all.
  far = jnp.minimum(jnp.sqrt(jnp.maximum(values, 0).max()), jnp.sqrt(squares.max()) + columns.largest)
  far = 1.001 * (far + own_slack.max() + columns.slack.max())

  def ready(k):
    begin = first + k * slots.WIDTH
    vectors = lax.dynamic_slice_in_dim(columns.vectors, begin, slots.WIDTH, 1)
    squares, slack = (
        lax.dynamic_slice_in_dim(x, begin, slots.WIDTH) for x in (columns.squares, columns.slack))
    return vectors, squares - 2 * far * slack

  def unrounded(k):
    begin = first + k * slots.WIDTH
    vectors, squares, _ = reduce(lax.dynamic_slice_in_dim(centers, begin, slots.WIDTH), mean, None, 'float32')
    return vectors.T, jnp.where(begin + jnp.arange(slots.WIDTH) < count, squares, jnp.inf)

  def compare(rows, values, reduced, tile, listed=1):
    """Compares rows with the few that products show to be nearest: (values, whether each is in doubt).

    With the nearest alone at first, since that is most often all there is to compare.
    """
    mask = slots.mask_for(len(centers))
    vectors, squares, slack = reduced
    keys = slots.see(vectors, squares, tile, num_tiles, mask)
    error = product_error(rows.shape[1], jnp.sqrt(squares), columns.largest)
    error *= 1 if vectors.dtype == jnp.float32 else TENSOR_CORE_ERROR

    def in_doubt(fresh, outside, at=slice(None)):
      return (fresh > 0) & may_be_nearer(fresh, outside - error[at], slack[at])

    def exact(rows, column):
      at = jnp.minimum(first + column, len(centers) - 1)
      return jnp.where(at < count, distances_sq(rows[:, None], centers[at], axis=-1), jnp.inf).min(axis=1)

    def by_lists(at, fresh):
      _, column, outside = slots.best(jax.tree.map(lambda x: x[at], keys), _LISTED, mask)
      fresh = jnp.minimum(fresh, exact(rows[at], column))
      return fresh, in_doubt(fresh, outside, at)

    _, column, outside = slots.best(keys, listed, mask)
    fresh = jnp.minimum(values, exact(rows, column))
    if listed > 1:
      return fresh, in_doubt(fresh, outside)
    return settle(by_lists, min(_BY_LIST, len(rows)), fresh, in_doubt(fresh, outside))

  def by_all(at, fresh):
    """Computes all distances of one row."""

    def tile(k, smallest):
      begin = first + k * slots.WIDTH
      columns = lax.dynamic_slice_in_dim(centers, begin, slots.WIDTH).T
      inside = begin + jnp.arange(slots.WIDTH) < count
      exact = distances_sq(columns, rows[at[0]][:, None])
      return jnp.minimum(smallest, jnp.where(inside, exact, jnp.inf).min())

    return lax.fori_loop(0, num_tiles, tile, fresh[0])[None], jnp.zeros(1, bool)

  def by_float32(at, fresh):
    """Compares some of the rows with all, in float32."""
    vectors, squares, slack = reduce(rows[at], mean, None, 'float32')
    slack += 1.01 * 2 * UNIT * (columns.largest + columns.slack.max())  # as `reduce` has it
    return compare(rows[at], fresh, (vectors, squares, slack), unrounded, _LISTED)

  fresh, doubtful = compare(rows, values, (vectors, squares, own_slack), ready)
  if vectors.dtype != jnp.float32:
    fresh, doubtful = settle(by_float32, _BY_FLOAT32, fresh, doubtful)
  return settle(by_all, 1, fresh, doubtful)[0]


def _window(values, floor, size):
  """Finds the largest values, at most `size` of them: (threshold, cutoff, indices [size]).

  All other values are below the threshold, or equal to it with an index of at least `cutoff`. Indices
  ascend; where there are fewer, len(values) fills up.
  """
  # Floats of one sign are ordered as their bits are.
  bits = lax.bitcast_convert_type(values, jnp.int32)
  groups = jnp.pad(bits, (0, -len(bits) % _GROUP), constant_values=_LOWEST).reshape(-1, _GROUP)
  top, low = bits.max(), lax.bitcast_convert_type(floor, jnp.int32)
  # No fewer values than groups reach a threshold, so it is not below that of the groups, and what the window
  # holds is in the groups that reach this; so is the first that it does not hold of more ties than fit.
  maxima = groups.max(axis=1)
  least = jnp.minimum(_least(maxima, low, size), jnp.maximum(low, top))
  kept = jnp.nonzero(maxima >= least, size=size + 1, fill_value=len(groups))[0]
  index = kept[:, None] * _GROUP + jnp.arange(_GROUP)
  found = jnp.where(kept[:, None] < len(groups), groups[jnp.minimum(kept, len(groups) - 1)], _LOWEST)
  index, found = index.ravel().astype(jnp.int32), found.ravel()
  threshold = _least(found, least, size)
  threshold = jnp.where(threshold > top, jnp.maximum(low, top), threshold)  # more ties than fit
  chosen = found >= threshold
  place = jnp.cumsum(chosen) - 1
  at = jnp.full(size, len(values), jnp.int32).at[jnp.where(chosen, place, size)].set(index, mode='drop')
  omitted = index[jnp.argmax(chosen & (place == size))]
  cutoff = jnp.where(chosen.sum() > size, omitted, _NONE)
  return lax.bitcast_convert_type(threshold, jnp.float32), cutoff, at


def _least(bits, low, size):
  """Finds the least threshold, from `low` on, that at most `size` reach."""
  return low if len(bits) <= size else jnp.maximum(low, jnp.sort(bits)[-size - 1] + 1)


def _strictest(threshold, cutoff):
  """Joins the limits of all devices: the largest threshold, and the smallest cutoff that goes with it."""
  largest = lax.pmax(threshold, AXIS)
  return largest, lax.pmin(jnp.where(threshold == largest, cutoff, _NONE), AXIS)


def select(rows, values, ids, threshold, cutoff, centers, state):
  """Runs the dense loop in a window, as long as no point outside can be the farthest.

  Args:
    rows: [w, d] points of the window, by ascending index.
    values: [w] their distances.
    ids: [w] their indices.
    threshold, cutoff: see `_window`.
    centers, state: what was selected before.

  Returns:
    (values, centers, indices, count, num_covered), as they are after the selection.
  """
  w, missing = len(rows), -len(rows) % _TOGETHER  # so that they part in equal groups
  rows = jnp.pad(rows, ((0, missing), (0, 0)))
  values = jnp.pad(values, (0, missing), constant_values=-jnp.inf)
  least = _least_distances_sq(rows)

  def farthest(values):
    pick = jnp.argmax(values)
    return pick, values[pick]

  def certain(carry):
    (pick, value), _, _, indices, count, _ = carry
    inside = (value > threshold) | ((value == threshold) & (ids[pick] < cutoff))
    return inside & (value >= 0) & (count < len(indices))

  def lower(center, carry):
    """Compares the center with one point of each group, of those that are left to compare."""
    values, left = carry
    at = jnp.argmax(left.reshape(-1, _TOGETHER), axis=0) * _TOGETHER + jnp.arange(_TOGETHER)
    exact = jnp.where(left[at], distances_sq(rows[at], center[None], axis=1), jnp.inf)
    return values.at[at].min(exact), left.at[at].set(False)

  def step(carry):
    (pick, value), values, centers, indices, count, num_covered = carry
    center = rows[pick]
    values = values.at[pick].set(-1.0)
    lowered = functools.partial(lower, center)
    values, _ = lax.while_loop(
        lambda carry: carry[1].any(), lowered, lowered((values, least[pick] <= values)))
    return (farthest(values), values, lax.dynamic_update_slice(centers, center[None], (count, 0)),
            indices.at[count].set(ids[pick]), count + 1, num_covered + (value <= 0))

  carry = (farthest(values), values, centers, state.indices, state.count, state.num_covered)
  _, values, *rest = lax.while_loop(certain, step, carry)
  return values[:w], *rest


def _least_distances_sq(rows):
  """Bounds the squared distances of rows [w, d] from below: [w, w]. Few pairs need a closer look."""
  vectors, squares, slack = reduce(rows, rows.mean(axis=0), None, 'float32')
  products = jnp.dot(vectors, vectors.T, precision=lax.Precision.HIGHEST)
  norms = jnp.sqrt(squares)
  error = product_error(rows.shape[1], norms[:, None], norms) * TENSOR_CORE_ERROR
  return least_sq(squares[:, None] + squares - 2 * products - error, slack[:, None] + slack)


PLAIN = Steps(refresh_stale, select)
# The same where a CPU multiplies bfloat16 faster.
BFLOAT16 = Steps(functools.partial(refresh_stale, dtype='bfloat16'), select, dtype='bfloat16')


def put(points, mesh: Mesh) -> jax.Array:
  """Splits points [n, d] over the mesh, padded with zeros.

  They lie on a device, or on the host of every process. On one CPU those of `disk_arrays.allocate` are used
  where they lie.
  """
  n, padded = len(points), -(-len(points) // mesh.size) * mesh.size
  sharding = NamedSharding(mesh, PartitionSpec(AXIS))
  if mesh.size == 1:
    return jax.device_put(points if isinstance(points, jax.Array) else points[:], sharding)
  if isinstance(points, jax.Array):
    return jax.device_put(jnp.pad(points, ((0, padded - n), (0, 0))), sharding)

  def piece(index):
    rows = np.asarray(points[index[0]])
    return np.pad(rows, ((0, len(range(padded)[index[0]]) - len(rows)), (0, 0)))

  return jax.make_array_from_callback((padded, *points.shape[1:]), sharding, piece)
