"""Selection in one pass: blocks of points are reduced by greedy k-center, and merged, and reduced again.

What is left of some points, a `Part`, stands for all of them: each has one of the part's within its
`bound`. Parts are composable: parts of different points, put together and reduced, are a part of all of
these, and its bound is the largest of theirs plus the covering radius of the reduction (triangle
inequality). So no more than a block and some parts need be held at a time, whatever the number of points,
and the time grows with that number alone. Har-Peled and Mazumdar (2004) merge two at a time; here it is
four: merging costs half as much, and there are half as many levels, each of which adds a radius to the
bound.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from patchcore_jax.search import coreset, k_center, neighbors
from patchcore_jax.search.distances import distances_sq

MERGED = 4  # parts of a level that become one of the next
_start_distances_sq = jax.jit(k_center.start_distances_sq)


class Part(NamedTuple):
  """Points that stand for others.

  Attributes:
    points: [m, p] float32, in the space in which they are selected.
    rows: [m] int64, the number of each among all points.
    values: [m, d] float32, what goes with each; d may be 0.
    bound: each of the points that the part stands for has one of `points` within this distance; 0 for points
      that stand for themselves.
  """

  points: np.ndarray
  rows: np.ndarray
  values: np.ndarray
  bound: float = 0.0


@dataclasses.dataclass
class Reducer:
  """Reduces parts to a size.

  Attributes:
    key: PRNG key of the points from which selections start. The first selection uses the key itself.
    num_start, select_start: how many those are, and whether the single one is selected, see
      `coreset.greedy_k_center`.
    outermost: whether the first selected is instead the point farthest from the mean of those that it is
      selected from; nothing is random then.
    count: how many selections there were.
  """

  key: jax.Array
  num_start: int = 10
  select_start: bool = False
  outermost: bool = False
  count: int = 0

  def reduce(
      self, parts: Sequence[Part], size: int, progress: Callable[[int, int], None] | None = None) -> Part:
    """Selects at most `size` of the points of some parts; the result is in the order of selection.

    The points are brought in the order of their rows first: the order of the parts has no influence.
    """
    points, rows = (np.concatenate([getattr(part, name) for part in parts]) for name in ('points', 'rows'))
    owner = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    place = np.concatenate([np.arange(len(part.rows)) for part in parts])
    order = np.argsort(rows)
    points, rows, owner, place = points[order], rows[order], owner[order], place[order]
    size, start = min(size, len(rows)), self._start(points)
    select_start = self.select_start or self.outermost
    picks = coreset.greedy_k_center(points, size, start=start, select_start=select_start, progress=progress)
    self.count += 1
    values = np.empty((size, parts[0].values.shape[1]), np.float32)
    for i, part in enumerate(parts):  # not joined first: they are the most of the memory
      mine = owner[picks] == i
      values[mine] = part.values[place[picks[mine]]]
    radius = 0.0 if size == len(rows) else radius_bound(
        points, picks, start=() if select_start else start)
    return Part(points[picks], rows[picks], values, max(part.bound for part in parts) + radius)

  def _start(self, points):
    """Chooses the indices of the points from which the next selection starts."""
    if self.outermost:
      return np.square(points - points.mean(axis=0, dtype=np.float64)).sum(axis=1).argmax(keepdims=True)
    key = jax.random.fold_in(self.key, self.count) if self.count else self.key
    num_start = 1 if self.select_start else min(self.num_start, len(points))
    return np.asarray(jax.random.choice(key, len(points), (num_start,), replace=False))


class Tree:
  """Takes blocks one after another, and holds the parts that are left of them, as the digits of a counter.

  Where a level has `merged` parts, they become one of the next: if that is 4, of b blocks at most 3 parts on
  each of 1 + log4(b) levels are held. What has no more points than `size` is kept as it is: points that few
  are not selected from before it is known what they are to be selected with.

  Args:
    size: points that are left of a part.
    reducer: how parts are reduced.
    merged: how many parts of a level become one of the next.

  >>> tree = Tree(1, Reducer(jax.random.key(0)))
  >>> for row, x in enumerate([[1.0, 2.0, 9.0], [4.0]]):
  ...   points = np.float32(x)[:, None]
  ...   tree.add(Part(points, 10 * row + np.arange(len(points)), points))
  >>> root = tree.root()
  >>> root.rows, root.bound
  (array([2]), 13.0)
  """

  def __init__(self, size: int, reducer: Reducer, merged: int = MERGED):
    self.size, self._reducer, self._merged = size, reducer, merged
    self._levels: list[list[Part]] = []

  @property
  def parts(self) -> list[Part]:
    """The parts that are held."""
    return [part for level in self._levels for part in level]

  def add(self, block: Part) -> None:
    """Adds points, and reduces what there is enough of."""
    part, level = self._reduced([block], self.size), 0
    while True:
      if level == len(self._levels):
        self._levels.append([])
      self._levels[level].append(part)
      if len(self._levels[level]) < self._merged:
        return
      part, self._levels[level] = self._reduced(self._levels[level], self.size), []
      level += 1

  def root(self, size: int | None = None) -> Part | None:
    """Makes one part of all blocks, of at most `size` points, by default the tree's; None for no blocks."""
    if len(parts := self.parts) > 1:
      self._levels = [[self._reduced(parts, size or self.size)]]
    return next(iter(self.parts), None)

  def _reduced(self, parts, size):
    """Reduces parts that have more points than `size` together, and else only joins them."""
    if sum(len(part.rows) for part in parts) > size:
      return self._reducer.reduce(parts, size)
    return parts[0] if len(parts) == 1 else joined(parts)


def joined(parts: Sequence[Part]) -> Part:
  """Makes one part of several, with all of their points."""
  *arrays, bounds = zip(*parts, strict=True)
  return Part(*map(np.concatenate, arrays), max(bounds))


def merge_reduce(blocks: Iterable[Part], num_selected: int, reducer: Reducer) -> Part:
  """Selects points of all blocks, of which one is held at a time.

  Of one block the selection is that of `coreset.greedy_k_center`. The rows are in the order of the last
  selection: the first of them are what a selection of so many would have left of the same parts.

  Raises:
    ValueError: no blocks, or fewer points than are to be selected.

  >>> points = np.float32([[0], [1], [5], [9], [2], [4]])
  >>> blocks = (Part(points[i:i + 3], np.arange(i, i + 3), points[i:i + 3]) for i in (0, 3))
  >>> selected = merge_reduce(blocks, 2, Reducer(jax.random.key(0), 1, True))
  >>> len(selected.rows), bool(np.abs(points - selected.points.T).min(1).max() <= selected.bound)
  (2, True)
  """
  tree = Tree(num_selected, reducer)
  for block in blocks:
    tree.add(block)
  root = tree.root()
  if root is None or len(root.rows) < num_selected:
    raise ValueError(
        f'num_selected={num_selected}: there are {0 if root is None else len(root.rows)} points.')
  return root


def radius_bound(points: np.ndarray, picks: np.ndarray, *, start: Sequence[int] = ()) -> float:
  """Bounds the covering radius of a greedy selection: the largest distance of a point to the nearest pick.

  What was selected last was the farthest, so no other point is farther from the picks than that one was: its
  distance to those before it is a bound for all, found without a look at them. But a selection from a mean
  distance leaves points out that are nearer to the start than this, in the mean: where there are any, the
  radius itself is computed, which costs as much as a search of all points.

  Args:
    points: [n, p] float32.
    picks: [m] indices in the order of selection.
    start: indices of the points from whose mean distance it started; () where it started from its first pick.

  >>> points = np.float32([[0], [1], [5], [9]])
  >>> radius_bound(points, np.array([3, 0, 2]))
  4.0
  """
  if len(picks) > 1:
    last_sq = float(distances_sq(points[picks[:-1]], points[picks[-1:]], axis=1).min())
    nearest_sq = _start_distances_sq(points, points[np.asarray(start)]).min() if len(start) else np.inf
    if last_sq * (1 + 1e-5) < nearest_sq:  # the two are rounded
      return float(np.sqrt(last_sq))
  return covering_radius(points, points[picks])


def covering_radius(points: np.ndarray, selected: np.ndarray) -> float:
  """Computes the largest distance of a point [n, p] to the nearest of some others [m, p].

  >>> covering_radius(np.float32([[0], [1], [5]]), np.float32([[0], [4]]))
  1.0
  """
  nearest_sq = neighbors.nearest_neighbors(points, selected)[0]
  return float(np.sqrt(np.asarray(nearest_sq).max()))
