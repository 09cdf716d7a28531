"""Intervals of the metrics of a category: how far they may be off because there are so few test images."""

from collections.abc import Sequence

import numpy as np

from patchcore_jax import metrics
from patchcore_jax.metrics.intervals import Interval, auroc_interval, image_interval, mean_interval
from patchcore_jax.metrics.pixel_resamples import pixel_intervals
from patchcore_jax.metrics.saturation import GOOD, LOGICAL, STRUCTURAL


def intervals(
    labels: np.ndarray, scores: np.ndarray, measured: metrics.Measured, *, maps: Sequence | None = None,
    masks: Sequence | None = None, kinds: Sequence[str] | None = None, max_fpr: float = 0.3,
    connectivity: int = 8, resamples: int = 10_000, seed: int = 0) -> dict[str, Interval]:
  """Computes 95 % intervals of the metrics of one category, by the names of the table.

  There are none of counts, of thresholds, of sPRO and of means of kinds of anomalies, nor of what is not
  defined. The error at full recall has none either: it hangs on one image, which resamples have or lack.

  Args:
    labels, scores: [n], of the images.
    measured: the metrics (`metrics.measure`).
    maps, masks: as for `metrics.measure`; they are read once more.
    kinds: see `saturation.spro`.
    max_fpr, connectivity: as for `metrics.measure`.
    resamples, seed: of the bootstrap; the interval of AUROC needs none.

  Raises:
    ValueError: fewer than 1,000 resamples.

  >>> labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
  >>> found = intervals(labels, scores, metrics.measure(labels, scores), resamples=1000)
  >>> found['image_auroc'].text(2), list(found)
  ('0.75 [0.18, 0.97]', ['image_auroc', 'image_ap', 'image_f1'])
  """
  drawn = {'resamples': resamples, 'seed': seed}
  found, defined = {}, {name for name, value in measured.values.items() if value is not None}
  if 'image_auroc' in defined:
    found['image_auroc'] = auroc_interval(labels, scores)
    found['image_ap'] = image_interval(metrics.average_precision, labels, scores, **drawn)
    found['image_f1'] = image_interval(_best_f1, labels, scores, **drawn)
  if 'pixel_auroc' in defined:
    found |= _of_pixels(measured, maps, masks, max_fpr, connectivity, drawn)
  for name, values in measured.per_image.items():
    of_anomalous = [value for value in values if value is not None]
    found[name] = mean_interval(of_anomalous, bounds=(0, 1), **drawn)
  for name, kind in (('image_auroc_structural', STRUCTURAL), ('image_auroc_logical', LOGICAL)):
    if name in defined:
      inside = np.isin(np.asarray(kinds), (GOOD, kind))
      found[name] = auroc_interval(np.asarray(kinds)[inside] == kind, scores[inside])
  return found


def _best_f1(labels, scores):
  """Computes the best F1."""
  return metrics.f1_optimal(labels, scores).f1


def _of_pixels(measured, maps, masks, max_fpr, connectivity, drawn):
  """Computes the intervals of pixel metrics, by the names of the table."""
  found = pixel_intervals(
      maps, masks, limits=tuple({max_fpr, 0.05}), connectivity=connectivity,
      threshold=measured.values['seg_threshold'], curve=measured.curve, **drawn)
  names = {
      'pixel_auroc': 'pixel_auroc', 'pixel_ap': 'pixel_ap', 'pixel_f1': 'pixel_f1',
      'aupro': f'aupro_{max_fpr:g}', 'aupro_05': 'aupro_0.05', 'seg_f1': 'f1_at_threshold'}
  return {name: found[theirs] for name, theirs in names.items() if theirs in found}
