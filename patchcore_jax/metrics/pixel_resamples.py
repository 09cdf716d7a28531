"""Bootstrap intervals of pixel metrics, whose maps are read twice for all resamples together.

What a resample needs of an image is counted once: pairs of its pixels with those of every other image, and
how many of its pixels reach each of some thresholds. A resample adds these up, as often as an image was
drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchcore_jax.metrics import checks, intervals, ranking, working_points
from patchcore_jax.metrics import curve as curves
from patchcore_jax.metrics.intervals import Interval

_POINTS = 2000  # distinct anomalous scores up to which every one is a threshold
_MOST = 2**23  # anomalous pixels whose pairs are counted in one reading of the maps


class Parts(NamedTuple):
  """What resamples need of n images, at t thresholds, which are anomalous scores.

  Columns of curves are in pairs: pixels above a threshold, and pixels at or above it, from the highest on.
  So a curve has its exact points at every threshold, ties included.

  Attributes:
    pairs: [n, n] twice the pairs of an anomalous pixel of the first image above a normal one of the second,
      and one for each tied pair.
    anomalous, good: [n] numbers of pixels.
    regions: [n] connected components of the mask.
    found: [n, 2 t] anomalous pixels.
    overlap: [n, 2 t] sums over regions of the share of their pixels.
    alarms: [n, 2 t] normal pixels.
    marked: [n, 2] anomalous and normal pixels at or above the threshold of a decision, or None.
  """

  pairs: np.ndarray
  anomalous: np.ndarray
  good: np.ndarray
  regions: np.ndarray
  found: np.ndarray
  overlap: np.ndarray
  alarms: np.ndarray
  marked: np.ndarray | None


def pixel_intervals(
    maps: Sequence, masks: Sequence, *, labels=None, strata: Sequence | None = None,
    limits: Sequence[float] = (0.3,), connectivity: int = 8, threshold: float | None = None,
    curve: curves.Curve | None = None, level: float = 0.95, method: str = 'percentile',
    resamples: int = 10_000, seed: int | np.random.Generator = 0,
) -> dict[str, Interval]:
  """Computes intervals of the pixel metrics of one category, all from the same resamples of images.

  Estimates are exact. Of a resample, AUROC and F1 at a threshold are exact, and so are all others where there
  are at most 2,000 distinct scores of anomalous pixels. Where there are more, curves run through a choice of
  them, close together in false alarms (limit / 1,000) and in what is found; all resamples are shifted by what
  that changes on the test set as it is.

  Args:
    maps: n maps [h, w] of scores, of any sizes, read one at a time: an array or a lazy sequence.
    masks: n masks of the same sizes, bool or 0/1.
    labels: [n] bool or 0/1; an image is anomalous where its mask has a pixel without it.
    strata: [n] such as kinds of defects, within which images are drawn, none of them of both labels; good and
      anomalous images without it.
    limits: false positive rates in (0, 1] up to which areas under the per-region overlap are taken.
    connectivity: see `regions.aupro`.
    threshold: of a decision "score >= threshold", for 'f1_at_threshold'.
    curve: `curve.of_regions` of the same maps, masks and connectivity, if there is one already: without it
      they are read twice more.
    level, method, resamples, seed: as `intervals.image_interval`.

  Returns:
    'pixel_auroc', 'pixel_ap' (average precision), 'pixel_f1' (the best F1, chosen on test labels),
    'aupro_0.3' for each limit, and 'f1_at_threshold'. Limits are None where no resample differs.

  Raises:
    NotDefined: no anomalous or no normal pixel; a ValueError too.
    ValueError: as `curve.of_regions` and `intervals.image_interval`; a limit out of range.

  >>> rng = np.random.default_rng(0)
  >>> masks = np.zeros((12, 8, 8), bool)
  >>> masks[6:, 2:4, 2:5] = True
  >>> maps = rng.random(masks.shape) + 0.7 * masks
  >>> pixel_intervals(maps, masks, resamples=1000)['pixel_auroc'].text(2)
  '0.96 [0.92, 0.99]'
  """
  for limit in limits:
    curves.check_limit(limit)
  intervals.check(level, method, ('percentile', 'basic'), resamples)
  if curve is None:
    curve = curves.of_regions(maps, masks, connectivity=connectivity)
  curve.check('pixels')
  parts = parts_of(maps, masks, thresholds_of(curve, limits), connectivity=connectivity, threshold=threshold)
  positive = parts.anomalous > 0
  if labels is not None:
    positive = checks.flat(labels, np.zeros(len(positive)))[0]
  groups = intervals.groups_of(positive if strata is None else strata, positive.size, positive)
  picks = [group[drawn] for group, drawn in zip(
      groups, intervals.resampled([g.size for g in groups], resamples, seed), strict=True)]
  weights = intervals.weights_of(np.concatenate(picks, axis=1), positive.size)
  exact = {
      'pixel_auroc': ranking.auroc_of(curve), 'pixel_ap': ranking.average_precision_of(curve),
      'pixel_f1': working_points.f1_optimal_of(curve).f1} | {
          f'aupro_{limit:g}': curve.area(limit) for limit in limits}
  whole = values_of(parts, np.ones((1, positive.size)), limits)
  drawn = values_of(parts, weights, limits)
  return {
      name: intervals.of_resamples(
          exact.get(name, float(whole[name][0])), values + exact.get(name, whole[name][0]) - whole[name][0],
          level=level, method=method, seed=seed, notes=intervals.few(positive))
      for name, values in drawn.items()}


def thresholds_of(curve: curves.Curve, limits: Sequence[float]) -> np.ndarray:
  """Chooses the thresholds of curves of resamples: [t] anomalous scores, descending.

  Between two of them a curve is a straight line. They lie so close that false alarms rise by a thousandth of
  a limit, or what is found by a seven-hundredth.
  """
  if sum(part.thresholds.size for part in curve.parts) <= _POINTS:
    return np.concatenate([part.thresholds for part in curve.parts])
  alarms = np.concatenate(
      [np.linspace(0, min(1, 1.2 * limit) * curve.good, 1000) for limit in limits]
      + [np.geomspace(1, curve.good, 300)])
  found, chosen = np.linspace(1, curve.anomalous, 700), []
  for part in curve.parts:
    inside = (found > part.found[0]) & (found <= part.found[-1])
    picks = np.concatenate([
        np.searchsorted(part.alarms, alarms[(alarms >= part.alarms[0]) & (alarms <= part.alarms[-1])]),
        np.searchsorted(part.found, found[inside]), [0, part.thresholds.size - 1]])
    chosen.append(np.asarray(part.thresholds)[np.unique(picks)])
  return np.concatenate(chosen)


def parts_of(
    maps: Sequence, masks: Sequence, thresholds: np.ndarray, *, connectivity: int = 8,
    threshold: float | None = None,
) -> Parts:
  """Counts what resamples need of each image, in two readings of maps and masks.

  Args:
    maps, masks, connectivity, threshold: as `pixel_intervals`.
    thresholds: [t] descending.
  """
  from scipy import ndimage  # 0.2 s to import, for where there are masks

  n, points = len(maps), 2 * thresholds.size
  decision = np.inf if threshold is None else threshold
  pairs, regions = np.zeros((n, n)), np.zeros(n, np.int64)
  found, alarms = np.zeros((n, points), np.int64), np.zeros((n, points), np.int64)
  anomalous, good = np.zeros(n, np.int64), np.zeros(n, np.int64)
  overlap, marked = np.zeros((n, points)), np.zeros((n, 2), np.int64)
  structure = np.ones((3, 3)) if connectivity == 8 else None
  images = checks.images(maps, masks, checked=True)
  rest = True
  while rest:  # once, unless anomalous pixels are too many to be kept
    kept, rest, first = [], False, not good.any()
    for i, values, mask in images:
      anomalous[i] = np.count_nonzero(mask)
      if not anomalous[i]:
        continue
      components, regions[i] = ndimage.label(mask, structure)
      components, scores = components[mask], values[mask]
      order = np.argsort(scores)
      scores, gains = scores[order], (1 / np.bincount(components)[components])[order]
      below = _below(scores, thresholds)
      found[i] = scores.size - below
      overlap[i] = np.append(np.cumsum(gains[::-1])[::-1], 0)[below]
      marked[i, 0] = scores.size - np.searchsorted(scores, decision)
      kept.append((i, scores))
      if sum(s.size for _, s in kept) > _MOST:
        rest = True
        break
    pooled = np.concatenate([s for _, s in kept]) if kept else np.zeros(0)
    owners = np.repeat(np.array([i for i, _ in kept], np.intp), [s.size for _, s in kept])
    order = np.argsort(pooled)
    pooled, owners = pooled[order], owners[order]
    for j, values, mask in checks.images(maps, masks, checked=True):
      normal = np.sort(values[~mask])
      if first:
        good[j] = normal.size
        alarms[j] = normal.size - _below(normal, thresholds)
        marked[j, 1] = normal.size - np.searchsorted(normal, decision)
      # Normal pixels are sought among the anomalous ones, which is as many searches as there are of them for
      # all images together; whoever stands further up in the order is above.
      places = sum(
          np.bincount(np.searchsorted(pooled, normal, side), minlength=pooled.size + 1)
          for side in ('left', 'right'))
      pairs[:, j] += np.bincount(owners, np.cumsum(places)[:-1], n)
  return Parts(
      pairs, anomalous, good, regions, found, overlap, alarms, None if threshold is None else marked)


def values_of(parts: Parts, weights: np.ndarray, limits: Sequence[float]) -> dict[str, np.ndarray]:
  """Computes pixel metrics of resamples.

  Args:
    parts: of n images.
    weights: [b, n] float64, how often each image was drawn.
    limits: of areas.

  Returns:
    {name: [b] values}, NaN where a resample has no anomalous or no normal pixel; see `pixel_intervals`.
  """
  blocks = [_values(parts, block, limits)
            for block in intervals.blocks_of(weights, parts.found.shape[1] + parts.pairs.shape[1])]
  return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _values(parts, weights, limits):
  """Computes them of as many resamples as fit into memory."""
  with np.errstate(invalid='ignore', divide='ignore'):
    anomalous, good = weights @ parts.anomalous, weights @ parts.good
    found, alarms = weights @ parts.found, weights @ parts.alarms
    values = {'pixel_auroc': np.einsum('bj,bj->b', weights @ parts.pairs, weights) / (2 * anomalous * good)}
    at = found[:, 1::2]
    marked = at + alarms[:, 1::2]
    values['pixel_ap'] = intervals.precision_of_steps(at, marked)
    values['pixel_f1'] = (2 * at / (marked + anomalous[:, None])).max(axis=1)
    overlap = weights @ parts.overlap
    overlap /= (weights @ parts.regions)[:, None]
    alarms /= good[:, None]
    for limit in limits:
      values[f'aupro_{limit:g}'] = _areas(alarms, overlap, limit)
    if parts.marked is not None:
      hits, false = (weights @ parts.marked).T
      values['f1_at_threshold'] = 2 * hits / (hits + false + anomalous)
  for own in values.values():
    own[(anomalous == 0) | (good == 0)] = np.nan
  return values


def _below(scores, thresholds):
  """Counts scores that are not above, and scores below, each threshold; sorted scores -> [2 t]."""
  return np.stack([np.searchsorted(scores, thresholds, side) for side in ('right', 'left')], 1).ravel()


def _areas(x, y, limit):
  """Adds up trapezoids from (0, 0) to the limit, as `Curve.area` does; x [b, k] ascends to at most 1."""
  ends = np.ones((len(x), 1))
  x, y = np.hstack([0 * ends, x, ends]), np.hstack([0 * ends, y, ends])
  area = (np.diff(np.minimum(x, limit), axis=1) * (y[:, 1:] + y[:, :-1])).sum(axis=1) / 2
  # The trapezoid that crosses the limit was cut in x; its right side is lower than at its end.
  rows, last = np.arange(len(x)), np.minimum((x <= limit).sum(axis=1) - 1, x.shape[1] - 2)
  x0, x1, y0, y1 = x[rows, last], x[rows, last + 1], y[rows, last], y[rows, last + 1]
  share = np.where(x1 > limit, (limit - x0) / np.maximum(x1 - x0, 1e-300), 1)
  area -= np.maximum(limit - x0, 0) * (1 - share) * (y1 - y0) / 2
  return area / limit
