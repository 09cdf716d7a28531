"""Makes the library's own objects of config fields. Every field is read here or in the binary."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from patchcore_jax import backbones, detectors, parallel, processes
from patchcore_jax.backbones import checkpoints
from patchcore_jax.banks.model import flat
from patchcore_jax.builtin import synthetic
from patchcore_jax.data import folder, layouts
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.preprocess import ImageError
from patchcore_jax.detectors import Detector
from patchcore_jax.settings import (
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
    check_ratio,
)

SOURCES = ('synthetic', 'tfds', *layouts.LAYOUTS)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a config says, checked.

  Attributes:
    detector: the method; an ensemble of it where `backbone.name` names several networks.
    ratios: coreset ratios to score at, all from one fit; (1.0,) for methods without a coreset.
  """

  data: DataSpec
  preprocessing: Preprocessing
  detector: Detector
  ratios: tuple[float, ...]
  search: SearchSpec
  fit: FitSpec
  calibration: CalibrationSpec
  metrics: MetricsSpec
  report: ReportSpec


def settings(config: ConfigDict) -> Settings:
  """Reads and checks everything that needs no data.

  Raises:
    ValueError: a value out of range; the message names the field.
  """
  if len(config.published.ratios) != len(config.published.methods):
    raise ValueError('published.ratios and published.methods differ in length.')
  ratios = _ratios(config) if config.detector == 'patchcore' else (1.0,)
  return Settings(
      _record(DataSpec, config.data), _record(Preprocessing, config.preprocess), _detector(config, ratios),
      ratios, _record(SearchSpec, config.search), _record(FitSpec, config.fit),
      _record(CalibrationSpec, config.calibration), _record(MetricsSpec, config.metrics),
      _record(ReportSpec, config.report))


def _record(record: type, section: ConfigDict, **more) -> Any:
  """Makes the settings record of a section."""
  known = {field.name for field in dataclasses.fields(record)}
  return record(**more, **{
      k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in section.items() if k in known})


def _ratios(config) -> tuple[float, ...]:
  """Reads and checks the coreset ratios."""
  ratios = tuple(float(r) for r in config.coreset.ratios)
  if not ratios:
    raise ValueError('coreset.ratios is empty: expected for example 0.1 or 0.25,0.1,0.01.')
  for ratio in ratios:
    check_ratio(ratio)
  if config.coreset.method == 'kmeans' and len(ratios) > 1:
    raise ValueError(
        f"coreset.method='kmeans' makes another bank for every ratio: expected one, got {ratios}.")
  return ratios


def _detector(config, ratios) -> Detector:
  """Makes the detector that the config names, or an ensemble of it."""
  if config.detector == 'patchcore':
    detector = detectors.PatchCore(
        max(ratios), _record(EmbeddingSpec, config.embedding), _record(CoresetSpec, config.coreset),
        _record(ScoringSpec, config.scoring))
  else:
    detector = _record(detectors.find(config.detector), config.get(config.detector, ConfigDict()))
  if len(_names(config)) == 1:
    return detector
  further = tuple(ratio for ratio in ratios if ratio != max(ratios))
  return detectors.Ensemble(detector, further)


def load_data(config: ConfigDict, progress) -> list[folder.Category]:
  """Lists the images of the chosen categories; draws the built-in data set if it is chosen.

  Raises:
    ValueError: an unknown source, no root, or a folder that is not what the source says.
  """
  root, source = config.data.root, config.data.source
  if source not in SOURCES:
    raise ValueError(f'data.source={source!r}: expected one of {", ".join(SOURCES)}.')
  if not root:
    raise ValueError('data.root is not set: pass --config.data.root=FOLDER, where the data set lies.')
  names = names_of(config.data.categories)
  if source == 'synthetic':
    for name in names:
      if name not in synthetic.CATEGORIES:
        raise ValueError(
            f'No category {name!r} in the built-in data set. There are: '
            f'{", ".join(synthetic.CATEGORIES)}.')
    names = names or synthetic.CATEGORIES
    synthetic.prepare(root, categories=names, num_workers=os.cpu_count() or 1, progress=progress)
  if source == 'tfds':
    from patchcore_jax.data import mvtec_ad as layout  # half a second that other sources need not wait
  else:
    layout = layouts.LAYOUTS['folder' if source == 'synthetic' else source]
  return [layout.load_category(root, name) for name in names or layout.list_categories(root)]


def with_named_backbone(config: ConfigDict) -> ConfigDict:
  """Replaces 'auto' in a copy of the config by what it stands for on this machine now.

  A run that goes on later must not go on with another network, or another precision. The paper's embedding
  is for ResNets of the usual width, and 'mean' for others.
  """
  config = config.copy_and_resolve_references()
  if config.backbone.name == backbones.AUTO:
    config.backbone.name = backbones.best_available()
  precisions = {backbones.resolve_precision(config.backbone.precision, name) for name in _names(config)}
  if len(precisions) == 1:  # not of an ensemble in which one brings its own
    (config.backbone.precision,) = precisions
  if config.embedding.kind == 'auto':
    other = ':' in config.backbone.name or config.backbone.name == checkpoints.BUILT_IN
    config.embedding.kind = 'mean' if other else 'adaptive'
  return config


def create_backbones(config: ConfigDict) -> tuple[backbones.Backbone, ...]:
  """Creates the backbone that the config names, or several, joined by '+'.

  Raises:
    ValueError: several with a file of weights, which can be of one only, besides what
      `backbones.create` raises.
  """
  names, weights = _names(config), config.backbone.weights
  if len(names) > 1 and weights not in ('', backbones.RANDOM):
    raise ValueError(f'backbone.weights={weights!r} is one file, for {len(names)} backbones.')
  return tuple(
      _create_backbone(
          name, weights, names_of(config.backbone.layers), config.seed,
          config.backbone.precision)
      for name in names)


def _names(config):
  """Lists the names of the backbones."""
  return [name.strip() for name in config.backbone.name.split('+')]


@functools.lru_cache(maxsize=4)
def _create_backbone(name, weights, layers, seed, precision):
  """Creates a backbone, and keeps it for sweeps that come back to it."""
  return backbones.create(name, weights=weights, layers=layers, seed=seed, precision=precision)


def data_of(
    settings: Settings, examples: Sequence[folder.Example], skipped: list[ImageError], *,
    with_masks: bool = False) -> FileData:
  """Makes the data of examples; with data.on_error=skip, unreadable files are added to `skipped`."""
  return FileData(
      examples, settings.preprocessing, parallel.divisible_batch_size(settings.data.batch_size),
      num_workers=settings.data.num_workers, with_masks=with_masks,
      on_error=skipped.append if settings.data.on_error == 'skip' else None)


def check_same_everywhere(config: ConfigDict, work: Any) -> None:
  """Raises ValueError where processes differ in what there is to do.

  They would wait for each other forever.

  Args:
    config: may differ in `data.root`.
    work: JSON-able; what is about to be done.

  Raises:
    ValueError: the processes differ.
  """
  settings = flat(to_json(config)) | {'data.root': ''}
  if not processes.agree(json.dumps([settings, work])):
    raise ValueError(
        'The processes differ in their settings, in the images they see, or in what is done already: '
        'expected the same command, data, and folder to write to on all machines.')


def names_of(value: Sequence[str]) -> tuple[str, ...]:
  """Splits a list field into names: on the command line 'a,b' arrives as one string.

  >>> names_of(('screw,transistor',))
  ('screw', 'transistor')
  """
  return tuple(name.strip() for item in value for name in item.split(',') if name.strip())


def to_json(config: ConfigDict) -> dict[str, Any]:
  """Converts the config to what a round trip through JSON makes of it (tuples become lists)."""

  def plain(value):
    if isinstance(value, dict):
      return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

  return plain(config.to_dict())
