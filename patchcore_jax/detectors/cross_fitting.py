"""Scores of training images by models of the others, with a fit for each part of them.

This serves methods that know no shorter way.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import CrossScores, Data, Detector, Run, Statistics
from patchcore_jax.settings import SearchSpec, check_number


def fit_and_cross_score(
    detector: Detector, data: Data, backbones: Sequence[Backbone], run: Run, *, folds: int,
    search: SearchSpec) -> tuple[Model, CrossScores]:
  """Fits, and scores each part of the images by a model of the others (`Detector.fit_and_cross_score`).

  Labelled defects are learned from in every fit, and none is scored.
  """
  noting = _Noting(data)
  model = detector.fit(noting, backbones, _within(run, 'all'))
  read, defects = _by_label(data, sorted(noting.read))
  given = sum(not example.label for example in data.examples)
  check_number(len(read), folds, given)  # some may have been no images
  folds = min(folds, len(read))
  fold_of = np.random.default_rng(run.seed).permutation(np.arange(len(read)) % folds)
  image, maxima = np.zeros(len(read), np.float32), None
  for fold in range(folds):
    scored = np.flatnonzero(fold_of == fold)
    others = [read[i] for i in np.flatnonzero(fold_of != fold)]
    part = detector.fit(data.part(others + defects), backbones, _quiet(_within(run, f'fold{fold}')))
    found = score_maxima(detector, part, data.part([read[i] for i in scored]), backbones, search)
    image[scored] = found.image
    if found.map_maxima is not None:
      maxima = np.zeros(len(read), np.float32) if maxima is None else maxima
      maxima[scored] = found.map_maxima
    run.progress('calibrate', int((fold_of <= fold).sum()), len(read))
  return model, CrossScores(image, maxima)


def score_maxima(
    detector: Detector, model: Model, data: Data, backbones: Sequence[Backbone], search: SearchSpec | None,
) -> CrossScores:
  """Scores images that the model has not seen, and keeps the largest value of each map."""
  return indexed_score_maxima(detector, model, data, backbones, search)[1]


def indexed_score_maxima(
    detector: Detector, model: Model, data: Data, backbones: Sequence[Backbone], search: SearchSpec | None,
) -> tuple[np.ndarray, CrossScores]:
  """Does what `score_maxima` does, and tells first which of the images could be read, by their positions."""
  score_fn = streaming.with_maxima(detector.score_fn(model, backbones, search=search))
  found = list(streaming.predict(score_fn, data.batches(), image_size=model.description.image_size))
  if not found:
    return np.zeros(0, int), CrossScores(np.zeros(0, np.float32), None)
  index, scores = zip(*found, strict=True)
  image, maxima = zip(*scores, strict=True)
  return np.concatenate(index), CrossScores(
      np.concatenate(image), None if maxima[0] is None else np.concatenate(maxima))


def statistics(
    detector: Detector, model: Model, data: Data, backbones: Sequence[Backbone], run: Run, *,
    search: SearchSpec) -> Statistics:
  """Measures the scores of each half of the images by a model of the other (`Detector.statistics`).

  Mean and deviation are those of the maps' values, or of the image scores where there are no maps.
  """
  read = list(range(len(data.examples)))
  if model.description.num_skipped:  # only images in files can be skipped
    files = set(model.description.images)
    read = [i for i in read if data.examples[i].image_path in files]
  read, defects = _by_label(data, read)
  values = []
  for half in range(2):
    learned = data.part(read[1 - half::2] + defects)
    part = detector.fit(learned, backbones, _quiet(_within(run, f'half{half}')))
    score_fn = detector.score_fn(part, backbones, search=search)
    for _, scores in streaming.predict(score_fn, data.part(read[half::2]).batches()):
      values.append(np.ravel(scores.image if scores.map is None else scores.map))
  joined = np.concatenate(values).astype(np.float64)
  return Statistics(float(joined.mean()), float(joined.std()))


def _by_label(data: Data, positions: Sequence[int]) -> tuple[list[int], list[int]]:
  """Parts positions into those of good images and those of labelled defects."""
  examples = data.examples
  return tuple([i for i in positions if bool(examples[i].label) == label] for label in (False, True))


def _quiet(run: Run) -> Run:
  """Makes the `Run` of a fit on the way, which tells nobody."""
  return Run(seed=run.seed, memory_gb=run.memory_gb, scratch=run.scratch, checkpoints=run.checkpoints)


def _within(run: Run, name: str) -> Run:
  """Makes the `Run` of one of several fits, which keeps its checkpoints in a folder of its own."""
  return dataclasses.replace(run, checkpoints=run.checkpoints and Path(run.checkpoints) / name)


class _Noting:
  """Data that notes which of its images could be read."""

  def __init__(self, data: Data):
    self._data, self.read = data, set()
    self.examples, self.preprocessing = data.examples, data.preprocessing
    self.outside_range = getattr(data, 'outside_range', None)

  def batches(self, **arguments):
    for batch in self._data.batches(**arguments):
      self.read |= set(batch.index[batch.valid].tolist())
      yield batch

  def part(self, positions):
    return self._data.part(positions)
