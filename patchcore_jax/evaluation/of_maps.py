"""Measures anomaly maps that lie in a folder, whoever made them, against labelled data."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from patchcore_jax import atomic_files
from patchcore_jax.banks.model import to_json
from patchcore_jax.data import map_files
from patchcore_jax.evaluation import checks
from patchcore_jax.evaluation.data import load_categories
from patchcore_jax.evaluation.protocols import PROTOCOLS, Scored, check, rate
from patchcore_jax.report import per_image, results
from patchcore_jax.settings import DataSpec, MetricsSpec, Preprocessing


def run(
    maps: str | os.PathLike, data: DataSpec, spec: MetricsSpec, workdir: str | os.PathLike, *,
    regions: bool = False, seed: int = 0,
    say: Callable[[str], None] = print, notice: Callable[[str], None] = print) -> list[results.Row]:
  """Measures the maps of every category: what `experiment.run` measures of a detector.

  Args:
    maps: folder with a TIFF for each test image, in the official layout (docs/anomaly_maps.md), at the size
      of the original image. The score of an image is the maximum of its map.
    data: which images.
    spec: the protocol, one at the size of the original images.
    workdir: for results.csv, maps.json (what was measured, by which protocol), scores/, intervals/ and
      regions/, which are written anew.
    regions: whether the table of regions is written.
    seed: of resamples.
    say, notice: called with lines, those of `notice` with what the user must know.

  Returns:
    A row for each category, without what a fit has.

  Raises:
    ImageError, ValueError: as `map_files.MapFiles`, `map_files.OriginalMasks` and the metrics.
  """
  protocol = PROTOCOLS[spec.protocol]
  if not protocol.original_size:
    sizes = [name for name, other in PROTOCOLS.items() if other.original_size]
    raise ValueError(
        f'metrics.protocol={spec.protocol} is of maps at the size of the network, and those of a folder have '
        f'the size of the images: expected one of {", ".join(sizes)}.')
  rows, workdir = [], Path(workdir)
  with atomic_files.written(workdir / per_image.MAPS) as aside:
    measured = to_json({'maps': str(maps), 'data': data, 'metrics': spec})
    aside.write_text(json.dumps(measured, indent=2) + '\n')
  for category in load_categories(data):
    say(f'{category.name}: {len(category.test)} test images')
    check(spec, category, data.root)
    notes = checks.of_folders(category, Preprocessing(resize=(), crop=()), spec.protocol)
    rated = rate(
        _tested(maps, category, data.root, protocol.validation), spec, data.root, regions=regions, seed=seed)
    if not category.has_masks:
      notes.append('there are no masks, and metrics of pixels are not defined')
    for line in (*notes, *rated.notes):
      notice(f'{category.name}: {line}.')
    for line in rated.summary():
      say(f'{category.name}: {line}.')
    per_image.write_scores(
        workdir / 'scores' / f'{category.name}.csv',
        per_image.scores(1.0, rated.examples, rated.scores.image, rated.per_image))
    if rated.intervals:
      per_image.write_intervals(
          workdir / 'intervals' / f'{category.name}.csv', [(1.0, *item) for item in rated.intervals.items()])
    if rated.regions:
      per_image.write_regions(
          workdir / 'regions' / f'{category.name}.csv', rated.regions, [e.image_path for e in category.test])
    rows.append(
        dict.fromkeys(results.columns()) | {'category': category.name, 'coreset_ratio': 1.0}
        | {'num_test': len(category.test)} | rated.values)
    results.write_csv(workdir / 'results.csv', rows)
  return rows


def _tested(maps, category, root, needs_validation):
  """Opens the maps and masks of a category, and maps of validation images where they set a threshold."""
  validation = category.validation if needs_validation else ()
  examples, test = [*category.test, *validation], len(category.test)
  sizes = map_files.original_sizes(examples)
  found = map_files.MapFiles(maps, map_files.map_names(examples, root), sizes)
  masks = map_files.OriginalMasks(category.test, sizes[:test]) if category.has_masks else None
  return Scored(category.test, None, found[:test], masks, found[test:] if validation else None, found.notes)
