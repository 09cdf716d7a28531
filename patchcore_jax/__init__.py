"""Find defects in images of parts, after seeing good parts only: PatchCore in JAX, and methods beside it.

    import patchcore_jax as pc

    inspector = pc.fit('parts/good')              # a folder, paths, or an array [n, height, width, 3]
    finding = inspector.inspect('new.png')        # or an array, or many: an iterator
    print(finding.anomalous, finding.score, finding.box)
    inspector.save('banks/part')                  # pc.load('banks/part') has it again

`fit` learns a part, `load` restores what was saved, `evaluate` measures on labelled data. A detector is a
record of settings; `PatchCore` is the default. `backbones` has the networks. `coreset`, `neighbors` and
`metrics` are the engine's own modules. Everything is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which see nothing of what is imported when it is used
  from patchcore_jax import backbones, detectors, metrics
  from patchcore_jax.detectors import (
      AESSIM,
      CAVGA,
      DSEBM,
      ITAE,
      OCSVM,
      RAD,
      SPADE,
      AnomalyDINO,
      DifferNet,
      Ensemble,
      ExplainedVAE,
      GammaVAE,
      GANomaly,
      GeoTrans,
      MahalanobisAD,
      MHPatchCore,
      MuSc,
      PaDiM,
      PatchCore,
      PatchSVDD,
      PixelStatistics,
      SoftPatch,
      Student,
      SuperADD,
  )
  from patchcore_jax.evaluation import evaluate
  from patchcore_jax.inspection import Finding, Inspector, NotAccepted, fit, load
  from patchcore_jax.search import coreset, neighbors
  from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing, ScoringSpec

__version__ = '0.1.0'

_PLACES = {  # all other names are detectors
    'fit': 'inspection', 'load': 'inspection', 'evaluate': 'evaluation', 'Inspector': 'inspection',
    'Finding': 'inspection', 'NotAccepted': 'inspection',
    **dict.fromkeys(('Preprocessing', 'EmbeddingSpec', 'CoresetSpec', 'ScoringSpec'), 'settings')}
_MODULES = {
    'backbones': 'backbones', 'detectors': 'detectors', 'metrics': 'metrics', 'coreset': 'search.coreset',
    'neighbors': 'search.neighbors'}

__all__ = [
    'AESSIM', 'CAVGA', 'DSEBM', 'ITAE', 'OCSVM', 'RAD', 'SPADE', 'AnomalyDINO', 'CoresetSpec', 'DifferNet',
    'EmbeddingSpec', 'Ensemble', 'ExplainedVAE', 'Finding', 'GANomaly', 'GammaVAE', 'GeoTrans', 'Inspector',
    'MHPatchCore', 'MahalanobisAD', 'MuSc', 'NotAccepted', 'PaDiM', 'PatchCore', 'PatchSVDD',
    'PixelStatistics', 'Preprocessing', 'ScoringSpec', 'SoftPatch', 'Student', 'SuperADD', '__version__',
    'backbones', 'coreset', 'detectors', 'evaluate', 'fit', 'load', 'metrics', 'neighbors']


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{_MODULES[name]}')
  if name in __all__:
    return getattr(importlib.import_module(f'{__name__}.{_PLACES.get(name, "detectors")}'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted(__all__)
