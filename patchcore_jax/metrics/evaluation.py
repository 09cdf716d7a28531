"""The evaluation of one category by all metrics of the table."""

import functools

from patchcore_jax.metrics import checks, curve
from patchcore_jax.metrics.table import METRICS


def evaluate(
    labels, scores, masks=None, maps=None, *, max_fpr: float = 0.3, connectivity: int = 8
) -> dict[str, float | int | None]:
  """Computes every metric of the table for one category.

  Args:
    labels: [n] image labels, bool or 0/1; 1 is anomalous.
    scores: [n] image scores; higher is more anomalous.
    masks: [n, h, w] bool or 0/1, or n masks [h, w]; None for a category without masks.
    maps: [n, h, w] float, or n maps of the sizes of the masks; not looked at without masks. Both are read one
      image at a time, and may be sequences that read it from a file.
    max_fpr, connectivity: see `aupro`.

  Returns:
    {name: value}, in the order of the table; None where the metric is not defined: image metrics with one
    class only, pixel metrics without masks, without an anomalous pixel or without a normal one.

  Raises:
    ValueError: what the functions of the metrics raise, except where there is one class only; masks or maps
      of other than n images.

  >>> evaluate([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])['error_at_full_recall']
  0.25
  >>> print(evaluate([0, 0], [0.1, 0.4])['image_auroc'])
  None
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
    pixels = curve.of_regions(maps, masks, connectivity=connectivity)
    found |= {'maps': maps, 'masks': masks, 'pixels': pixels}
  settings = {'max_fpr': max_fpr}

  @functools.cache
  def computed(function, needs, parameters):
    try:
      return function(*(found[n] for n in needs), **{n: settings[n] for n in parameters})
    except checks.NotDefined:
      return None

  values = {}
  for metric in METRICS.values():
    value = None
    if found.keys() >= set(metric.needs):
      value = computed(metric.function, metric.needs, metric.parameters)
    values[metric.name] = getattr(value, metric.field) if metric.field and value is not None else value
  return values
