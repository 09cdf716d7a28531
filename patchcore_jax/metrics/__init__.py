"""Computes AUROC, AUPRO, F1 and working points from scores and maps.

They are exact, ties included, and computed by NumPy on the host.

`evaluate` computes every metric of the table `METRICS`; each function can be called alone.
"""

from patchcore_jax.metrics import saturation, thresholds
from patchcore_jax.metrics.evaluation import Measured, evaluate, measure
from patchcore_jax.metrics.intervals import Interval, auroc_interval, image_interval, mean_interval
from patchcore_jax.metrics.paired import auroc_permutation, compare_ranks, holm, wilcoxon
from patchcore_jax.metrics.per_image_overlap import Aupimo, aupimo, aupimo_interpolated
from patchcore_jax.metrics.pixel_resamples import pixel_intervals
from patchcore_jax.metrics.ranking import auroc, average_precision
from patchcore_jax.metrics.region_table import area_quartiles, by_area, tabulate_regions
from patchcore_jax.metrics.regions import aupro
from patchcore_jax.metrics.saturation import spro
from patchcore_jax.metrics.segmentation import count_marked
from patchcore_jax.metrics.table import METRICS, Metric
from patchcore_jax.metrics.working_points import (
    F1Optimum,
    error_at_full_recall,
    f1_optimal,
    precision_recall_curve,
    roc_curve,
)

__all__ = [
    'METRICS', 'Aupimo', 'F1Optimum', 'Interval', 'Measured', 'Metric', 'area_quartiles', 'aupimo',
    'aupimo_interpolated', 'aupro', 'auroc', 'auroc_interval', 'auroc_permutation', 'average_precision',
    'by_area', 'compare_ranks', 'count_marked', 'error_at_full_recall', 'evaluate', 'f1_optimal', 'holm',
    'image_interval', 'mean_interval', 'measure', 'pixel_intervals', 'precision_recall_curve',
    'roc_curve', 'saturation', 'spro', 'tabulate_regions', 'thresholds', 'wilcoxon']
