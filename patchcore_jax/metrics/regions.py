"""Metrics of regions: how much of each connected defect is found."""

from patchcore_jax.metrics import curve as curves


def aupro(maps, masks, *, max_fpr: float = 0.3, connectivity: int = 8) -> float:
  """Computes the area under the per-region-overlap curve up to a false positive rate.

  Sources: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section on PRO; the PatchCore
  paper's table S3. At a threshold, a region (connected component of a mask) has an overlap, the
  share of its pixels at or above the threshold; PRO is the mean over all regions, and the false
  positive rate is the share of normal pixels of all images at or above it. The curve runs through
  every distinct score, equal scores cross together, the last trapezoid is cut at `max_fpr` by
  interpolation, and the area is divided by `max_fpr`.

  Args:
    maps: [n, h, w] float, or n maps [h, w] of any sizes, read one at a time.
    masks: [n, h, w] bool or 0/1, or n masks of the same sizes.
    max_fpr: limit in (0, 1].
    connectivity: 8 (pixels that touch at corners are one region) or 4.

  Returns:
    A value in [0, 1], never above; exactly 1 if every anomalous pixel is above every normal one.

  Raises:
    ValueError: what `auroc` raises; a limit or connectivity out of range.
    NotDefined: no anomalous or no normal pixel; a ValueError too.

  >>> aupro([[[0.1, 0.9], [0.2, 0.8]]], [[[0, 1], [0, 1]]])
  1.0
  """
  curves.check_limit(max_fpr)  # before anything long
  return aupro_of(curves.of_regions(maps, masks, connectivity=connectivity), max_fpr=max_fpr)


def aupro_of(curve: curves.Curve, *, max_fpr: float = 0.3) -> float:
  """Computes the same of a curve of regions (`curve.of_regions`)."""
  return curve.area(max_fpr)


def aupro_05_of(curve: curves.Curve) -> float:
  """Computes the same up to a false positive rate of 0.05, whatever the settings say."""
  return curve.area(0.05)
