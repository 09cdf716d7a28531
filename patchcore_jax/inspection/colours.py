"""The limits of the colours of heatmaps: the same for all images of a model, so that they compare."""

import numpy as np

from patchcore_jax import scoring
from patchcore_jax.inspection.inspector import Inspector
from patchcore_jax.search import neighbors

_SAMPLE = 256  # rows of a bank that tell how far apart they lie


def limits(inspector: Inspector, threshold: float | None = None) -> tuple[float, float] | None:
  """Finds the values of a map where colour begins, and where it is strongest.

  They follow from the model's pixel threshold: below half of it, where good parts lie, nothing shows; at the
  threshold the colour has two thirds of its strength, so that what is marked is plain; from twice the
  threshold on it is red. For a model without one they follow from `threshold` if it is given, or from a
  bank's own spread, the median distance of its patches to the nearest others, which good patches seldom
  exceed.

  Args:
    threshold: threshold of scores, for a model without thresholds.

  Returns:
    None where nothing is known of the model's maps: then each map has its own, see `limits_of_map`.
  """
  found = inspector.calibration
  if found:
    level = found.pixel_threshold
  else:
    level = threshold or _spread(inspector)
  if level is None:
    return None
  level = max(level, 1e-6)  # it is 0 where all images are the same
  return 0.5 * level, 2 * level


def limits_of_map(values: np.ndarray) -> tuple[float, float]:
  """Computes the limits of one map [h, w]: from its median to its largest value; NaN counts for nothing."""
  low = float(np.nanmedian(values))
  return low, max(float(np.nanmax(values)), float(np.nextafter(low, np.inf)))


def _spread(inspector):
  """Computes the median score of some of a bank's patches against the others; None for other methods."""
  rows, spec = inspector.model.arrays.get('embeddings'), getattr(inspector.detector, 'scoring', None)
  if rows is None or spec is None:
    return None
  if len(rows) < 2:
    return 0.0
  sample = rows[np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int)]
  k = min(spec.num_neighbors, len(rows) - 1)
  distances_sq, _ = neighbors.nearest_neighbors(sample, rows, k=k + 1)
  return float(np.median(scoring.patch_scores(distances_sq[:, 1:], spec)))
