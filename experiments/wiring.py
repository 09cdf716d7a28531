"""Config fields -> the library's own objects. Every field is read here or in the binary."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from patchcore_jax import backbones, parallel, processes
from patchcore_jax.backbones import checkpoints
from patchcore_jax.banks import store
from patchcore_jax.builtin import synthetic
from patchcore_jax.data import folder, layouts, pipeline
from patchcore_jax.data.preprocess import ImageError, Preprocessing
from patchcore_jax.detectors.patchcore import CoresetSpec
from patchcore_jax.embedding import EmbeddingSpec
from patchcore_jax.scoring import ScoringSpec
from patchcore_jax.search import coreset
from patchcore_jax.search.neighbors import SearchSpec

SOURCES = ('synthetic', 'tfds', *layouts.LAYOUTS)
DETECTORS = ('patchcore', 'spade', 'padim', 'mahalanobis_ad', 'ocsvm')


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a config says, checked."""

  preprocessing: Preprocessing
  embedding: EmbeddingSpec
  coreset: CoresetSpec
  scoring: ScoringSpec
  search: SearchSpec
  ratios: tuple[float, ...]


def settings(config: ConfigDict) -> Settings:
  """Reads and checks everything that needs no data.

  Raises:
    ValueError: a value out of range; the message names the field.
  """
  if config.detector not in DETECTORS:
    raise ValueError(f'detector={config.detector!r}: expected one of {", ".join(DETECTORS)}.')
  if config.data.shots < 0 or config.data.draw < 0:
    raise ValueError(
        f'data.shots={config.data.shots}, data.draw={config.data.draw}: expected at least 0.')
  if config.data.on_error not in ('raise', 'skip'):
    raise ValueError(f"data.on_error={config.data.on_error!r}: expected 'raise' or 'skip'.")
  if config.data.batch_size < 1 or config.data.num_workers < 0:
    raise ValueError(
        f'data.batch_size={config.data.batch_size}, data.num_workers={config.data.num_workers}: '
        'expected at least 1 and 0.')
  if not 0 < config.metrics.max_fpr <= 1:
    raise ValueError(f'metrics.max_fpr={config.metrics.max_fpr}: expected 0 < max_fpr <= 1.')
  if config.metrics.connectivity not in (4, 8):
    raise ValueError(f'metrics.connectivity={config.metrics.connectivity}: expected 4 or 8.')
  if not 0 < config.calibration.false_alarm_rate < 1:
    raise ValueError(
        f'calibration.false_alarm_rate={config.calibration.false_alarm_rate}: expected a share between 0 '
        'and 1, such as 0.01.')
  if config.calibration.folds < 0 or config.calibration.folds == 1:
    raise ValueError(f'calibration.folds={config.calibration.folds}: expected at least 2, or 0 for none.')
  if config.report.gallery < 0:
    raise ValueError(f'report.gallery={config.report.gallery}: expected at least 0.')
  if config.fit.memory_gb <= 0:
    raise ValueError(f'fit.memory_gb={config.fit.memory_gb}: expected more than 0.')
  selection = dict(config.coreset)
  ratios = tuple(float(r) for r in selection.pop('ratios'))
  if not ratios:
    raise ValueError('coreset.ratios is empty: expected for example 0.1 or 0.25,0.1,0.01.')
  for ratio in ratios:
    coreset.check_ratio(ratio)
  if config.coreset.method == 'kmeans' and len(ratios) > 1:
    raise ValueError(
        f"coreset.method='kmeans' makes another bank for every ratio: expected one, got {ratios}.")
  if len(config.published.ratios) != len(config.published.methods):
    raise ValueError('published.ratios and published.methods differ in length.')
  return Settings(
      Preprocessing(**{k: tuple(v) if k in ('resize', 'pad', 'crop') else v
                       for k, v in config.preprocess.items()}),
      EmbeddingSpec(**config.embedding),
      CoresetSpec(ratio=max(ratios), seed=config.seed, **selection),
      ScoringSpec(**config.scoring),
      SearchSpec(**config.search),
      ratios)


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
  """The config with what 'auto' stands for on this machine, now: a run that goes on later must not go on
  with another network, or another precision. The paper's embedding is for ResNets of the usual width, and
  'mean' for others.
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
  """The backbone that the config names, or several, joined by '+'.

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
  return [name.strip() for name in config.backbone.name.split('+')]


@functools.lru_cache(maxsize=4)
def _create_backbone(name, weights, layers, seed, precision):
  """Kept, for sweeps that come back to one."""
  return backbones.create(name, weights=weights, layers=layers, seed=seed, precision=precision)


def batches(
    config: ConfigDict, examples: Sequence[folder.Example], preprocessing: Preprocessing,
    skipped: list[ImageError], *, with_masks: bool = False,
) -> Iterator[pipeline.Batch]:
  """Batches of the examples; with data.on_error=skip, unreadable files are added to `skipped`."""
  return pipeline.batches(
      examples, preprocessing,
      batch_size=parallel.divisible_batch_size(config.data.batch_size),
      num_workers=config.data.num_workers, with_masks=with_masks,
      on_error=skipped.append if config.data.on_error == 'skip' else None)


def check_same_everywhere(config: ConfigDict, work: Any) -> None:
  """Of several processes: those that differ in what there is to do would wait for each other forever.

  Args:
    config: may differ in `data.root`.
    work: JSON-able; what is about to be done.

  Raises:
    ValueError: the processes differ.
  """
  settings = store.flat(to_json(config)) | {'data.root': ''}
  if not processes.agree(json.dumps([settings, work])):
    raise ValueError(
        'The processes differ in their settings, in the images they see, or in what is done already: '
        'expected the same command, data, and folder to write to on all machines.')


def names_of(value: Sequence[str]) -> tuple[str, ...]:
  """Names from a list field: on the command line 'a,b' arrives as one string.

  >>> names_of(('screw,transistor',))
  ('screw', 'transistor')
  """
  return tuple(name.strip() for item in value for name in item.split(',') if name.strip())


def to_json(config: ConfigDict) -> dict[str, Any]:
  """The config as it looks after a round trip through JSON (tuples become lists)."""

  def plain(value):
    if isinstance(value, dict):
      return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

  return plain(config.to_dict())
