"""Computes AUROC, AUPRO, F1 and working points from scores and maps.

They are exact, ties included, and computed by NumPy on the host.

`evaluate` computes every metric of the table `METRICS`; each function can be called alone.
"""

from patchcore_jax.metrics.evaluation import evaluate
from patchcore_jax.metrics.ranking import auroc, average_precision
from patchcore_jax.metrics.regions import aupro
from patchcore_jax.metrics.table import METRICS, Metric
from patchcore_jax.metrics.working_points import (
    F1Optimum,
    error_at_full_recall,
    f1_optimal,
    precision_recall_curve,
    roc_curve,
)

__all__ = [
    'METRICS', 'F1Optimum', 'Metric', 'aupro', 'auroc', 'average_precision', 'error_at_full_recall',
    'evaluate', 'f1_optimal', 'precision_recall_curve', 'roc_curve']
