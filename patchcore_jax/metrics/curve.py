"""The curve that metrics of order are read off: what is found and what alarms at every threshold.

Between two anomalous scores only alarms change, and they change one by one. So a curve needs a point only
where an anomalous score lies: how many good ones lie above it, and how many at it. Anomalous pixels are few;
the others are sorted some images at a time and forgotten, which is quick and takes little memory.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from patchcore_jax.metrics import checks

# Good scores that are sorted together: 32 MB, and enough that looking ranks up in them is a small part. Where
# anomalous scores are more it is as many as those, up to _MOST.
_TOGETHER = 2**23
# Anomalous scores that are sorted in memory, in which they take up to 50 bytes each; more go by way of the
# disk.
_MOST = 2**24
_ENTRY = np.dtype([('score', np.float64), ('gain', np.float64)])  # on disk


class Part(NamedTuple):
  """Points of a curve at distinct anomalous scores, from the highest to the lowest; t of them.

  Attributes:
    thresholds: [t] the scores, descending.
    found: [t] int64, the anomalous ones at or above each.
    overlap: [t] float64, the sum of their gains.
    above: [t] int64, the good ones above each.
    alarms: [t] int64, the good ones at or above each.
  """

  thresholds: np.ndarray
  found: np.ndarray
  overlap: np.ndarray
  above: np.ndarray
  alarms: np.ndarray


class Curve(NamedTuple):
  """What thresholds find and what they let alarm, exact for every distinct score, ties included.

  Attributes:
    parts: the points, from the highest score to the lowest; one part where the points fit into memory.
    anomalous: how many anomalous ones there are.
    good: how many good ones.
  """

  parts: tuple[Part, ...]
  anomalous: int
  good: int

  def check(self, what: str = 'labels') -> 'Curve':
    """Returns itself.

    Raises:
      NotDefined: only anomalous ones, or only good ones.
    """
    if not self.anomalous or not self.good:
      raise checks.one_class(self.anomalous + self.good, what, int(self.anomalous > 0))
    return self

  def area(self, limit: float) -> float:
    """Computes the mean of the overlap over rates of false alarms from 0 to the limit.

    The curve begins at (0, 0). Equal scores cross together, in a straight line; the last piece is cut at
    the limit by interpolation.

    Args:
      limit: in (0, 1].

    Raises:
      ValueError: a limit out of range.
      NotDefined: see `check`.
    """
    check_limit(limit)
    self.check('pixels')
    # Counts, not rates, on the axis: whole numbers add up exactly, so an overlap of 1 everywhere
    # gives an area equal to the limit, a lower one cannot give more, and no clipping is needed.
    area, alarms, overlap, end = 0.0, 0, 0.0, limit * self.good
    for part in self.parts:
      x = np.concatenate([[alarms], np.column_stack([part.above, part.alarms]).ravel()])
      before = np.append(overlap, part.overlap[:-1])
      y = np.concatenate([[overlap], np.column_stack([before, part.overlap]).ravel()])
      area += _area(x, y, end)
      alarms, overlap = x[-1], y[-1]
      if alarms >= end:
        return float(area / end)
    return float((area + overlap * (end - alarms)) / end)  # everything is found: the curve goes on level


def check_limit(max_fpr: float) -> None:
  """Raises ValueError for a limit of the false positive rate outside of (0, 1]."""
  if not 0 < max_fpr <= 1:
    raise ValueError(f'Expected 0 < max_fpr <= 1, got {max_fpr}.')


def of_scores(labels, scores) -> Curve:
  """Computes the curve of labels and scores of any shape, such as those of images.

  Args:
    labels: bool or 0/1; 1 is anomalous.
    scores: the same shape; higher is more anomalous.

  Raises:
    ValueError: as `checks.flat`.

  >>> of_scores([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).parts[0].alarms
  array([0, 1])
  """
  positive, scores = checks.flat(labels, scores)
  gains = np.full(np.count_nonzero(positive), 1 / max(1, np.count_nonzero(positive)))
  # As an image of one row.
  return of_images([scores[None]], [positive[None]], lambda i, values, mask: (values[mask], gains))


def of_regions(maps, masks, *, connectivity: int = 8) -> Curve:
  """Computes the curve of a category's pixels, whose overlap is the mean over regions of what is found.

  Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section on PRO.

  Args:
    maps: n maps [h, w] of scores, read one at a time.
    masks: n masks [h, w] of the same sizes, bool or 0/1; their connected components are the regions.
    connectivity: 8 (pixels that touch at corners are one region) or 4.

  Raises:
    ValueError: as `of_images`; another connectivity.
  """
  from scipy import ndimage  # 0.2 s to import, for where there are masks

  if connectivity not in (4, 8):
    raise ValueError(f'Expected connectivity 4 or 8, got {connectivity}.')
  structure, regions = np.ones((3, 3)) if connectivity == 8 else None, 0

  def gains(i, values, mask):
    nonlocal regions
    labels, count = ndimage.label(mask, structure)
    regions += count
    labels = labels[mask]
    return values[mask], 1 / np.bincount(labels)[labels]

  return of_images(maps, masks, gains, total=lambda: regions)


def of_images(
    maps: Sequence, masks: Sequence, gains: Callable, *, total: Callable[[], float] = lambda: 1) -> Curve:
  """Computes the curve of a category's pixels, with gains of any kind. It reads every image twice.

  Args:
    maps: n maps of scores, of any sizes, read one at a time.
    masks: n masks of the same sizes, bool or 0/1. Where a mask is 0 pixels are good.
    gains: called with (i, map, mask) for every image that has an anomalous pixel; gives scores of anomalous
      pixels and what the overlap gains when each is found, both [m].
    total: called when all gains are known; they are divided by it, and are 1 in sum then.

  Raises:
    ValueError: no images or another number of maps than of masks; a map of another size than its mask, or
      with values that are not finite; a mask with other values than 0 and 1.
  """
  found, good = _Entries(), 0
  for i, values, mask in checks.images(maps, masks):
    anomalous = int(np.count_nonzero(mask))
    good += mask.size - anomalous
    if anomalous:
      found.add(*gains(i, values, mask))
  keep = _on_disk if found.on_disk else np.asarray
  parts = [_Counts(*map(keep, entries), keep) for entries in found.sorted()]
  together = min(max(_TOGETHER, found.size), _MOST)
  scores = (values[~mask] for _, values, mask in checks.images(maps, masks, checked=True))
  for values in _together(scores, together):
    values.sort()
    for part in parts:
      part.count(values)
  return Curve(tuple(_cumulated(parts, total(), keep)), found.size, good)


class _Entries:
  """Scores of anomalous pixels and their gains: in memory, or in a file where there are many."""

  def __init__(self):
    self.size, self._kept, self._in_memory, self._file = 0, [], 0, None

  @property
  def on_disk(self) -> bool:
    return self._file is not None

  def add(self, scores: np.ndarray, gains: np.ndarray) -> None:
    """Adds those of an image."""
    self.size += scores.size
    self._in_memory += scores.size
    self._kept.append((scores, gains))
    if self._in_memory > _MOST // 2:
      self._spill()

  def sorted(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields distinct scores, descending, with the number of pixels and the sum of gains of each."""
    if self._file is None:
      if self._kept:
        yield _distinct(self._kept)
      return
    self._spill()
    # A sample says where to cut; whole scores go to one side, so that ties stay together.
    sample = np.sort(np.concatenate([block['score'][::101].copy() for block in self._blocks()]))
    pieces = -(-self.size // (_MOST // 2))
    cuts = np.unique(sample[np.linspace(0, sample.size, pieces, endpoint=False, dtype=int)[1:]])[::-1]
    for low, high in zip([*cuts, -np.inf], [np.inf, *cuts], strict=True):
      inside = [block[(block['score'] >= low) & (block['score'] < high)] for block in self._blocks()]
      if any(block.size for block in inside):
        yield _distinct([(block['score'], block['gain']) for block in inside])

  def _spill(self):
    """Moves what is in memory to the file."""
    if not self._in_memory:
      return
    self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115, open as long as this lives
    for scores, gains in self._kept:
      block = np.empty(scores.size, _ENTRY)
      block['score'], block['gain'] = scores, gains
      self._file.write(block.tobytes())
    self._kept, self._in_memory = [], 0

  def _blocks(self):
    """Reads the file."""
    self._file.seek(0)
    while data := self._file.read(max(1, _MOST // 8) * _ENTRY.itemsize):
      yield np.frombuffer(data, _ENTRY)


def _distinct(entries):
  """Sorts scores, and joins equal ones."""
  scores, gains = (np.concatenate(arrays) for arrays in zip(*entries, strict=True))
  # Stable: the order of tied pixels, and so the last bit of the sum, is the same on every machine.
  order = np.argsort(scores, kind='stable')[::-1]
  scores = scores[order]
  first = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
  counts = np.diff(np.append(first, scores.size))
  return scores[first], counts, np.add.reduceat(gains[order], first)


class _Counts:
  """Distinct anomalous scores, descending, and how many good ones lie above and at each."""

  def __init__(self, thresholds, counts, gains, keep):
    self.thresholds, self.counts, self.gains = thresholds, counts, gains
    self._ascending = keep(thresholds[::-1])  # queries in order walk through memory in order
    self.above, self.alarms = (keep(np.zeros(thresholds.size, np.int64)) for _ in range(2))

  def count(self, good):
    """Counts those of a sorted array."""
    below = np.searchsorted(good, self._ascending, 'left')
    self.alarms += good.size - below[::-1]
    # A second search is for those that a good score equals; beyond the end the last is taken, a lower one.
    tied = good.take(below, mode='clip') == self._ascending
    below[tied] = np.searchsorted(good, self._ascending[tied], 'right')
    self.above += good.size - below[::-1]


def _cumulated(parts: Iterable[_Counts], total, keep) -> Iterator[Part]:
  """Adds up what is found, from the highest score on."""
  found, overlap, last = 0, 0.0, None
  for part in parts:
    counts = found + np.cumsum(part.counts)
    gains = np.minimum(overlap + np.cumsum(part.gains / total), 1.0)  # rounding may lift the sum above 1
    found, overlap = counts[-1], gains[-1]
    if last is not None:
      yield last
    last = Part(part.thresholds, keep(counts), keep(gains), part.above, part.alarms)
  if last is not None:
    last.overlap[-1] = 1.0  # everything is found, whatever rounding made of the sum
    yield last


def _on_disk(array):
  """Writes an array to a file without a name, from which the system reads it in pages when it is used."""
  with tempfile.TemporaryFile() as file:
    file.truncate(array.nbytes)
    mapped = np.memmap(file, array.dtype, 'r+', shape=array.shape)
    mapped[:] = array
    return mapped


def _together(arrays: Iterable[np.ndarray], most: int) -> Iterator[np.ndarray]:
  """Joins arrays, up to the number of values that are sorted together."""
  kept, size = [], 0
  for array in arrays:
    kept.append(array)
    size += array.size
    if size >= most:
      yield np.concatenate(kept)
      kept, size = [], 0
  if size:
    yield np.concatenate(kept)


def _area(x, y, limit):
  """Adds up trapezoids up to the limit, the last one cut by interpolation; x ascends."""
  inside = int(np.searchsorted(x, limit, 'right'))  # x[:inside] <= limit
  area = np.trapezoid(y[:inside], x[:inside])
  if inside < x.size and x[inside - 1] < limit:
    fraction = (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
    y_limit = y[inside - 1] + fraction * (y[inside] - y[inside - 1])
    area += (limit - x[inside - 1]) * (y[inside - 1] + y_limit) / 2
  return float(area)
