"""Methods: a record of settings each, with `fit` and `score_fn`. `base` is their contract."""

from patchcore_jax.detectors.base import (
    CrossScores,
    Data,
    Detector,
    HostScoreFn,
    Run,
    ScoreFn,
    Scores,
    Statistics,
)
from patchcore_jax.detectors.settings import (
    DETECTORS,
    OCSVM,
    RAD,
    SPADE,
    AnomalyDINO,
    Ensemble,
    MahalanobisAD,
    MHPatchCore,
    MuSc,
    PaDiM,
    PatchCore,
    PixelStatistics,
    SoftPatch,
    SuperADD,
    find,
    of_model,
    of_settings,
)
from patchcore_jax.detectors.trained_settings import (
    AESSIM,
    CAVGA,
    DSEBM,
    ITAE,
    DifferNet,
    ExplainedVAE,
    GammaVAE,
    GANomaly,
    GeoTrans,
    PatchSVDD,
    Student,
)

__all__ = [
    'AESSIM', 'CAVGA', 'DETECTORS', 'DSEBM', 'ITAE', 'OCSVM', 'RAD', 'SPADE', 'AnomalyDINO', 'CrossScores',
    'Data', 'Detector', 'DifferNet', 'Ensemble', 'ExplainedVAE', 'GANomaly', 'GammaVAE', 'GeoTrans',
    'HostScoreFn', 'MHPatchCore', 'MahalanobisAD', 'MuSc', 'PaDiM', 'PatchCore', 'PatchSVDD',
    'PixelStatistics', 'Run', 'ScoreFn', 'Scores', 'SoftPatch', 'Statistics', 'Student', 'SuperADD',
    'find', 'of_model', 'of_settings']
