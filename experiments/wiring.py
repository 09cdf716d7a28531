"""Makes the package's own records of config fields."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from patchcore_jax import detectors
from patchcore_jax.banks.model import to_json
from patchcore_jax.detectors import Detector
from patchcore_jax.evaluation import Settings
from patchcore_jax.evaluation.settings import names_in
from patchcore_jax.settings import (
    BackboneSpec,
    CalibrationSpec,
    CoresetSpec,
    DataSpec,
    EmbeddingSpec,
    FitSpec,
    MetricsSpec,
    Preprocessing,
    ReportSpec,
    ScoringSpec,
    SearchSpec,
)


def settings(config: ConfigDict) -> Settings:
  """Reads and checks everything that needs no data. What 'auto' leaves open stays open.

  Raises:
    ValueError: a value out of range; the message names the field.
  """
  if len(config.published.ratios) != len(config.published.methods):
    raise ValueError('published.ratios and published.methods differ in length.')
  is_patchcore = config.detector == 'patchcore'
  if is_patchcore and not config.coreset.ratios:
    raise ValueError('coreset.ratios is empty: expected for example 0.1 or 0.25,0.1,0.01.')
  return Settings(
      _record(DataSpec, config.data), _detector(config),
      tuple(config.coreset.ratios) if is_patchcore else (), _record(Preprocessing, config.preprocess),
      _record(BackboneSpec, config.backbone), _record(SearchSpec, config.search),
      _record(FitSpec, config.fit), _record(CalibrationSpec, config.calibration),
      _record(MetricsSpec, config.metrics), _record(ReportSpec, config.report), config.seed,
      more=to_json(config.to_dict()))


def _detector(config) -> Detector:
  """Makes the detector that the config names."""
  if config.detector == 'patchcore':
    return detectors.PatchCore(
        float(max(config.coreset.ratios)), _record(EmbeddingSpec, config.embedding),
        _record(CoresetSpec, config.coreset), _record(ScoringSpec, config.scoring))
  return _record(detectors.find(config.detector), config.get(config.detector, ConfigDict()))


def _record(record: type, section: ConfigDict) -> Any:
  """Makes the settings record of a section. On the command line 'a,b' arrives as one string."""
  known = {field.name for field in dataclasses.fields(record)}
  values = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in section.items() if k in known}
  return record(**{
      k: names_in(v) if isinstance(v, tuple) and all(isinstance(item, str) for item in v) else v
      for k, v in values.items()})
