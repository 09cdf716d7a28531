"""What a run keeps of single images: every score, and the images that are classified wrongly."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchcore_jax import atomic_files

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


def write_scores(path: str | os.PathLike, scores: Sequence[Score]) -> None:
  """Writes a CSV file with the columns above; replaces an older one in one step."""
  with atomic_files.written(path) as aside, aside.open('w', newline='') as f:
    writer = csv.writer(f, lineterminator='\n')
    writer.writerow(COLUMNS)
    writer.writerows(scores)


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
