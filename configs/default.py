"""Every field there is, with the paper's values. The other configs start from here and change a few.

Each section has the fields of a settings record of the package, which explains and checks them, and where
their defaults stand: `patchcore_jax/settings.py`, and `patchcore_jax/detectors/settings.py` for the methods.
Sizes are in pixels; () means none. Lists on the command line are separated by commas:
`--config.data.categories=screw,transistor --config.coreset.ratios=0.1,0.01`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from patchcore_jax import detectors, settings


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.detector = 'patchcore'  # or another of the sections below: 'spade', 'padim', ...

  config.data = section(settings.DataSpec)
  config.preprocess = section(settings.Preprocessing)
  config.backbone = section(settings.BackboneSpec)

  config.embedding = section(settings.EmbeddingSpec)  # or kind 'auto': 'mean' where it is no usual ResNet
  config.coreset = section(settings.CoresetSpec)
  config.coreset.ratios = (0.25, 0.10, 0.01)  # one fit at the largest serves all
  config.scoring = section(settings.ScoringSpec)
  config.search = section(settings.SearchSpec)  # no influence on results

  # The other methods, each read with detector=its name.
  for name in detectors.DETECTORS:
    if name not in ('patchcore', 'ensemble'):
      config[name] = section(detectors.find(name))

  config.fit = section(settings.FitSpec)
  config.calibration = section(settings.CalibrationSpec)
  config.metrics = section(settings.MetricsSpec)
  config.report = section(settings.ReportSpec)

  # Published numbers to print beside ours: the method of each coreset ratio, and its tables.
  config.published = ConfigDict()
  config.published.ratios = ()
  config.published.methods = ()
  config.published.image_auroc = 'third_party/paper_tables/table_s1_image_auroc.csv'
  config.published.pixel_auroc = 'third_party/paper_tables/table_s2_pixel_auroc.csv'
  config.published.aupro = 'third_party/paper_tables/table_s3_aupro.csv'

  # For experiments.sweep: each point is written as on the command line, 'data.shots=5 data.draw=2'.
  config.sweep = ()
  return config


def trained(detector: str, settings: Mapping[str, Mapping[str, Any]], setting: str) -> ConfigDict:
  """Makes the config of a method whose network is trained, which sees all of every image, as a square.

  Images have at least 128 pixels, at which defects can be told, also where the network sees fewer.

  Args:
    detector: its name.
    settings: fields of its section that are not the record's defaults, by the name of a setting.
    setting: which of them, as given behind a colon on the command line.

  Raises:
    ValueError: no such setting.
  """
  if setting not in settings:
    raise ValueError(f'--config=...:{setting}: expected one of {", ".join(settings)}.')
  config = get_config()
  config.detector = detector
  config[detector].update(settings[setting])
  config.preprocess.resize = (max(config[detector].size, 128),) * 2
  config.preprocess.crop = ()
  return config


def section(record: type) -> ConfigDict:
  """The fields of a settings record, with their defaults. A default of None takes a number."""
  return ConfigDict({
      field.name: config_dict.placeholder(float) if field.default is None else field.default
      for field in dataclasses.fields(record)})
