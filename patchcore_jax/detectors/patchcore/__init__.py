"""PatchCore (Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022).

`fitting` makes a bank within the memory that there is, `scores` scores images against it, `cross_scores`
scores the training images as if they were new. The settings are `detectors.settings.PatchCore`.
"""

from patchcore_jax.detectors.patchcore.cross_scores import (
    fit_and_cross_score,
    score_embeddings,
    statistics,
    statistics_at,
)
from patchcore_jax.detectors.patchcore.fitting import embed, fit
from patchcore_jax.detectors.patchcore.scores import bank_size, score_fn, score_fn_at, upright_cells

__all__ = [
    'bank_size', 'embed', 'fit', 'fit_and_cross_score', 'score_embeddings', 'score_fn',
    'score_fn_at', 'statistics', 'statistics_at', 'upright_cells']
