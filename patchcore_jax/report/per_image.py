"""What a run keeps of single images: every score, the regions of defects, and images classified wrongly."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchcore_jax import atomic_files
from patchcore_jax.data.folder import Example
from patchcore_jax.metrics.intervals import Interval
from patchcore_jax.metrics.region_table import Region, RegionTable

MAPS = 'maps.json'  # in a folder with scores of anomaly maps, what was measured
COLUMNS = ('path', 'defect', 'label', 'coreset_ratio', 'image_score', 'aupimo')
_FIRST = COLUMNS[:5]  # what older versions wrote


class Score(NamedTuple):
  """One image of a run: its file, kind of defect ('good' for label 0), and values under one coreset ratio.

  AUPIMO is None for good images, where there are no masks, and where it is not defined.
  """

  path: str
  defect: str
  label: int
  coreset_ratio: float
  image_score: float
  aupimo: float | None = None


class Errors(NamedTuple):
  """Wrongly classified images of a category, n of them.

  Attributes:
    image: [n, h, w, 3] uint8.
    anomaly_map: [n, h, w] float32.
    mask: [n, h, w] bool.
    label: [n], 1 for anomalous ones, which were missed.
    defect: [n] kind of defect.
    path: [n] image file.
    threshold: scores from here on count as anomalous.
    coreset_ratio: the detector's coreset ratio.
  """

  image: np.ndarray
  anomaly_map: np.ndarray
  mask: np.ndarray
  label: np.ndarray
  defect: np.ndarray
  path: np.ndarray
  threshold: float
  coreset_ratio: float


def scores(
    ratio: float, examples: Sequence[Example], image_scores: Sequence[float],
    values: Mapping[str, Sequence[float | None]]) -> list[Score]:
  """Makes the records of n images.

  Args:
    ratio: the coreset ratio.
    examples: the images.
    image_scores: [n].
    values: metrics that have a value for each image, as `metrics.measure` gives them.
  """
  overlaps = values.get('aupimo', [None] * len(examples))
  return [Score(e.image_path, e.defect, e.label, ratio, float(score), overlap)
          for e, score, overlap in zip(examples, image_scores, overlaps, strict=True)]


def write_scores(path: str | os.PathLike, scores: Sequence[Score]) -> None:
  """Writes a CSV file with the columns above; replaces an older one in one step."""
  _write_csv(path, COLUMNS, scores)


def write_intervals(
    path: str | os.PathLike, intervals: Sequence[tuple[float, str, Interval]]) -> None:
  """Writes intervals of metrics as a CSV file, a row for each (coreset ratio, metric, interval)."""
  _write_csv(path, ('coreset_ratio', 'metric', *Interval._fields), [
      (ratio, metric, *interval._replace(notes=' '.join(interval.notes)))
      for ratio, metric, interval in intervals])


def write_regions(path: str | os.PathLike, table: RegionTable, paths: Sequence[str]) -> None:
  """Writes a table of regions as a CSV file.

  Args:
    path: the file.
    table: the regions.
    paths: image files, by their positions.
  """
  _write_csv(path, ('path', *Region._fields[1:], 'threshold'), [
      (paths[region.image], *region[1:], table.threshold) for region in table.regions])


def read_scores(path: str | os.PathLike) -> list[Score]:
  """Reads what `write_scores` wrote.

  Raises:
    ValueError: no such file, or one with other columns.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f'No scores of single images at {path}: run the experiment again.')
  with path.open(newline='') as f:
    reader = csv.reader(f)
    columns = tuple(next(reader, ()))
    if columns not in (COLUMNS, _FIRST):
      raise ValueError(f'{path} does not have the columns {", ".join(COLUMNS)}.')
    return [Score(p, d, int(label), float(r), float(s), *(float(value) if value else None for value in more))
            for p, d, label, r, s, *more in reader]


def write_errors(path: str | os.PathLike, errors: Errors) -> None:
  """Writes a compressed .npz file; replaces an older one in one step."""
  with atomic_files.written(path) as aside, aside.open('wb') as f:
    np.savez_compressed(f, **errors._asdict())


def read_errors(path: str | os.PathLike) -> Errors:
  """Reads what `write_errors` wrote."""
  with np.load(path, allow_pickle=False) as arrays:
    values = {name: arrays[name] for name in Errors._fields}
  return Errors(**values | {k: float(values[k]) for k in ('threshold', 'coreset_ratio')})


def _write_csv(path, columns, rows):
  """Writes a CSV file in one step; None becomes an empty cell."""
  with atomic_files.written(path) as aside, aside.open('w', newline='') as f:
    writer = csv.writer(f, lineterminator='\n')
    writer.writerow(columns)
    writer.writerows(rows)
