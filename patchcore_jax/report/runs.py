"""Reads what was measured, and with which settings, from the folders that runs have left behind."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from patchcore_jax import detectors, metrics
from patchcore_jax.report import results


class Measured(NamedTuple):
  """One detector with one setting, on the categories where it was run.

  Attributes:
    folder: folder of the run.
    detector: as in the config.
    coreset_ratio, coreset_method: PatchCore's; 1.0 and '' for other detectors.
    backbone, layers: as in the config; () for the backbone's own.
    image_size: pixels that the network sees, the shorter side; None where images keep their size.
    patch_size: side of a patch of PatchCore's embeddings.
    shots, draw: number of training images, 0 for all, and number of the draw that chose them.
    row, in_short: what the detector calls itself, and its settings in short.
    values: {metric: {category: value, or None}}, for every metric in `metrics.METRICS`.
  """

  folder: Path
  detector: str
  coreset_ratio: float
  coreset_method: str
  backbone: str
  layers: tuple[str, ...]
  image_size: int | None
  patch_size: int
  shots: int
  draw: int
  row: str
  in_short: str
  values: Mapping[str, Mapping[str, float | None]]

  @property
  def method(self) -> str:
    """The name in the paper's tables: PatchCore-10 has a coreset of 10 %."""
    share = f'-{100 * self.coreset_ratio:g}' if detectors.find(self.detector).has_coreset else ''
    return f'{self.row}{share}'

  @property
  def setting(self) -> str:
    """Tells what it was run with: its network and the size of images, or a method's own settings."""
    size = 'own sizes' if self.image_size is None else f'{self.image_size} px'
    return self.in_short or f'{self.backbone}, {size}'

  @property
  def categories(self) -> tuple[str, ...]:
    return tuple(self.values['image_auroc'])


def find(workdir: str | os.PathLike) -> list[Measured]:
  """Finds what runs in `workdir` and the folders below it measured, sorted by folder and ratio.

  Raises:
    ValueError: there is no run.
  """
  found = list(itertools.chain.from_iterable(map(_read, _run_folders(Path(workdir)))))
  if not found:
    raise ValueError(
        f'No results in {workdir}: expected folders with config.json and results.csv, as '
        'experiments.mvtec and experiments.sweep write them.')
  return found


def common_categories(measured: Sequence[Measured]) -> tuple[str, ...]:
  """Lists the categories that all have measured, in the order of the first.

  Means over different categories are not comparable.
  """
  shared = set.intersection(*(set(m.categories) for m in measured))
  return tuple(c for c in measured[0].categories if c in shared)


def mean_over(
    measured: Measured, metric: str, categories: Sequence[str]
) -> float | None:
  """Computes the mean of a metric; None without categories, or where one has no value."""
  return results.mean([{metric: measured.values[metric].get(c)} for c in categories], metric)


def _run_folders(workdir) -> Iterator[Path]:
  """Finds the folders of runs, in `workdir` and below it."""
  for folder, below, files in os.walk(workdir):
    below[:] = sorted(d for d in below if d not in ('banks', 'scores', 'errors'))
    if {'config.json', 'results.csv'} <= set(files):
      yield Path(folder)


def _read(folder) -> Iterator[Measured]:
  config, rows = json.loads((folder / 'config.json').read_text()), results.read_csv(folder / 'results.csv')
  is_patchcore = config['detector'] == 'patchcore'
  detector = detectors.find(config['detector'])()
  if not is_patchcore:
    detector = detectors.of_settings(config['detector'], config.get(config['detector'], {}))
  preprocess = config['preprocess']
  size = preprocess['crop'] or preprocess['pad'] or preprocess['resize'] or [None]
  for ratio in sorted({row['coreset_ratio'] for row in rows}, reverse=True):
    block = [row for row in rows if row['coreset_ratio'] == ratio]
    yield Measured(
        folder, config['detector'], ratio, config['coreset']['method'] if is_patchcore else '',
        config['backbone']['name'], _names(config['backbone']['layers']), min(size),
        config['embedding']['patch_size'], config['data']['shots'], config['data']['draw'],
        detector.row, detector.in_short,
        {metric: {row['category']: row[metric] for row in block} for metric in metrics.METRICS})


def _names(layers):
  """Splits names of layers at commas: on the command line 'a,b' arrives as one string."""
  return tuple(name for item in layers for name in item.split(','))
