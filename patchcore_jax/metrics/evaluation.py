"""The evaluation of one category by all metrics of the table."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from patchcore_jax.metrics import checks, per_image_overlap
from patchcore_jax.metrics import curve as curves
from patchcore_jax.metrics.table import METRICS


class Measured(NamedTuple):
  """The metrics of a category.

  Attributes:
    values: {name: value}, in the order of the table; None where the metric is not defined.
    per_image: {name: [n] values, None where there is none} of metrics that have a value for each image.
    notes: what a reader must know, in lines without a full stop.
    curve: that of all pixels; None without masks.
  """

  values: dict[str, float | int | None]
  per_image: dict[str, Sequence[float | None]]
  notes: tuple[str, ...]
  curve: curves.Curve | None = None


def evaluate(labels, scores, masks=None, maps=None, **inputs: Any) -> dict[str, float | int | None]:
  """Computes every metric of the table for one category: the values of `measure`.

  >>> evaluate([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])['error_at_full_recall']
  0.25
  >>> print(evaluate([0, 0], [0.1, 0.4])['image_auroc'])
  None
  """
  return measure(labels, scores, masks, maps, **inputs).values


def measure(
    labels, scores, masks=None, maps=None, *, validation: Sequence | None = None,
    kinds: Sequence[str] | None = None, channels: Sequence | None = None,
    config: Mapping[int, Any] | None = None, max_fpr: float = 0.3, connectivity: int = 8,
    bounds: tuple[float, float] = per_image_overlap.BOUNDS) -> Measured:
  """Computes every metric of the table for one category.

  Args:
    labels: [n] image labels, bool or 0/1; 1 is anomalous.
    scores: [n] image scores; higher is more anomalous.
    masks: [n, h, w] bool or 0/1, or n masks [h, w]; None for a category without masks.
    maps: [n, h, w] float, or n maps of the sizes of the masks; not looked at without masks. Both are read one
      image at a time, and may be sequences that read it from a file.
    validation: maps of good images that the model has not seen, for SegF1.
    kinds, channels, config: what is known of defects in MVTec LOCO; see `saturation.spro`.
    max_fpr, connectivity: see `aupro`.
    bounds: see `aupimo`.

  Returns:
    The values: image metrics are None with one class only, pixel metrics without masks, without an anomalous
    pixel or without a normal one, and those that need what is not given.

  Raises:
    ValueError: what the functions of the metrics raise, except where a metric is not defined; masks or maps
      of other than n images.
  """
  # Checked whether or not a metric is defined: bad input must not pass for an absent metric.
  labels, scores = checks.flat(labels, scores)
  found = {'labels': labels, 'scores': scores}
  if masks is not None:
    if maps is None:
      raise ValueError('Expected maps beside masks, got None: pass maps, or masks=None.')
    if len(masks) != labels.size:
      raise ValueError(
          f'Expected a mask per image, got {len(masks)} masks and {labels.size} labels: '
          'drop the same images from both.')
    pixels = curves.of_regions(maps, masks, connectivity=connectivity)
    found |= {'maps': maps, 'masks': masks, 'pixels': pixels}
  further = {'validation': validation, 'kinds': kinds, 'channels': channels, 'config': config}
  found |= {name: value for name, value in further.items() if value is not None}
  settings = {'max_fpr': max_fpr, 'bounds': tuple(bounds)}

  @functools.cache
  def computed(function, needs, parameters):
    try:
      return function(*(found[n] for n in needs), **{n: settings[n] for n in parameters})
    except checks.NotDefined:
      return None

  values, per_image, notes = {}, {}, {}
  for metric in METRICS.values():
    values[metric.name] = None
    if found.keys() >= set(metric.needs):
      result = computed(metric.function, metric.needs, metric.parameters)
      if result is not None:
        values[metric.name] = getattr(result, metric.field) if metric.field else result
        if metric.per_image:
          per_image[metric.name] = getattr(result, metric.per_image)
        if metric.in_report:
          notes |= {f'{metric.title}: {note}': None for note in getattr(result, 'notes', ())}
  return Measured(values, per_image, tuple(notes), found.get('pixels'))
