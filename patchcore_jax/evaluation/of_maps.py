"""Measures anomaly maps that lie in a folder, whoever made them, against labelled data."""

import os
from collections.abc import Callable
from pathlib import Path

from patchcore_jax.data import map_files
from patchcore_jax.evaluation import checks
from patchcore_jax.evaluation.data import load_categories
from patchcore_jax.evaluation.protocols import PROTOCOLS, Tested, rate
from patchcore_jax.report import per_image, results
from patchcore_jax.settings import DataSpec, MetricsSpec, Preprocessing


def run(
    maps: str | os.PathLike, data: DataSpec, spec: MetricsSpec, workdir: str | os.PathLike, *,
    say: Callable[[str], None] = print, notice: Callable[[str], None] = print) -> list[results.Row]:
  """Measures the maps of every category: what `experiment.run` measures of a detector.

  Args:
    maps: folder with a TIFF for each test image, in the official layout (docs/anomaly_maps.md), at the size
      of the original image. The score of an image is the maximum of its map.
    data: which images.
    spec: the protocol, one at the size of the original images.
    workdir: for results.csv and scores/, which are written anew.
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
  for category in load_categories(data):
    say(f'{category.name}: {len(category.test)} test images')
    notes = checks.of_folders(category, Preprocessing(resize=(), crop=()))
    rated = rate(_tested(maps, category, data.root, protocol.validation), spec, data.root)
    for line in (*notes, *rated.notes):
      notice(f'{category.name}: {line}.')
    overlaps = rated.per_image.get('aupimo', [None] * len(category.test))
    per_image.write_scores(workdir / 'scores' / f'{category.name}.csv', [
        per_image.Score(e.image_path, e.defect, int(label), 1.0, float(score), overlap)
        for e, label, score, overlap in zip(
            category.test, rated.labels, rated.scores, overlaps, strict=True)])
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
  return Tested(category.test, None, found[:test], masks, found[test:] if validation else None, found.notes)
