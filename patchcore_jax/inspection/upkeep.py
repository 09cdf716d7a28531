"""Later good images: a bank takes up what it does not cover yet, or a model gets thresholds of them.

What is given as good, and does not look good to the model, is asked about first (`acceptance`): one defective
file would move the thresholds so far that defects pass.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchcore_jax.banks import calibration, editing, provenance
from patchcore_jax.banks.model import Model
from patchcore_jax.data import value_range
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.detectors import CrossScores, Data, Run, cross_fitting, patchcore
from patchcore_jax.inspection import acceptance, differences, image_sizes, inputs
from patchcore_jax.inspection.acceptance import Questioned
from patchcore_jax.inspection.inspector import Inspector, predict
from patchcore_jax.settings import CalibrationSpec, max_pixels

OnError = Callable[[ImageError], None] | None
_SHOWN = 12  # images that show what a bank of other parts is
_FOLDS = 5  # parts of accepted images, each scored against a bank with the others


def append(
    inspector: Inspector, images: Any, *, accept: str | Sequence[str] = (), batch_size: int = 0,
    max_megapixels: float | None = None, on_error: OnError = None,
    progress: Callable[[str, int, int], None] | None = None) -> Inspector:
  """Adds patches of further good images to a bank, as far as it does not cover them yet.

  The images count for the thresholds by their scores before they were added. Of several that had to be
  accepted, a new lot for example, each is scored against a bank to which the others were added.

  Args:
    images: as of `inputs.training_data`.
    accept: names of images that are good although they score above the threshold, or have another size;
      'all' for every one. Images of an array are called 'images[0]' and so on.
    batch_size: images that pass through the network at once; 0 for 8 on CPUs and 32 on accelerators.
    max_megapixels: as of `Inspector.inspect`.
    on_error: called with the error of each file that cannot be read, which is then left out; by default the
      error is raised.
    progress: called with ('embed', done, number of images).

  Raises:
    NotAccepted: images that are anomalous, of another size, or of values beyond the range of the training
      images, and are not accepted. Of a bank without thresholds, those that score far above the others of
      these images.
    BankError: the model of a method without a bank.
    ValueError: images of another size, or no images.
  """
  model, detector = inspector.model, inspector.detector
  editing.check_is_bank(model)
  (backbone,) = inspector.backbones
  data = _data(inspector, images, batch_size, max_megapixels, on_error)
  told = {'progress': progress} if progress else {}
  embeddings, read = patchcore.embed(
      backbone, data, embedding=detector.embedding,
      run=Run(keep_images=provenance.has_thumbnails(model), **told))
  scores = _score(inspector, embeddings, model.arrays['embeddings'], data.batch_size)
  outside = _ask(inspector, images, data.part(read.index), read.index, scores.image, accept)
  if not inspector.calibration:
    scores = CrossScores((), ())
  else:
    scores = _scores_with_others(inspector, embeddings, scores, data.batch_size)
  given = data.examples
  extended = editing.append(
      model, embeddings, [given[i].image_path for i in read.index], files=read.files,
      image_scores=scores.image, map_maxima=scores.map_maxima,
      cells=patchcore.upright_cells(detector.embedding, inspector.image_size, model.description.grid))
  colours = provenance.colours_of_both(model.description.colours, provenance.colours(read.coloured))
  return inspector.with_model(extended.with_description(outside_range=outside, colours=colours))


def calibrate(
    inspector: Inspector, images: Any, *, false_alarm_rate: float = 0.01, accept: str | Sequence[str] = (),
    batch_size: int = 0, max_megapixels: float | None = None, on_error: OnError = None) -> Inspector:
  """Makes thresholds of good images that the model was not fitted on; their guarantee is exact.

  Args:
    images: as of `inputs.training_data`.
    false_alarm_rate: the share of good images that may be called anomalous, in (0, 1).
    accept: as of `append`.
    batch_size: images that pass through the network at once; 0 for 8 on CPUs and 32 on accelerators.
    max_megapixels, on_error: as of `append`.

  Raises:
    NotAccepted: as of `append`.
    ValueError: images of another size, no images, or a rate out of range.
  """
  CalibrationSpec(false_alarm_rate)  # refuses a rate out of range before the work
  detector, networks, search = inspector.detector, inspector.backbones, inspector.search
  data = _data(inspector, images, batch_size, max_megapixels, on_error)
  index, scores = cross_fitting.indexed_score_maxima(detector, inspector.model, data, networks, search)
  outside = _ask(inspector, images, data.part(index), index, scores.image, accept)
  sample = data.part(range(min(len(data), differences.SAMPLE)))
  off = differences.score_differences(detector, inspector.model, sample, networks, search)
  calibrated = editing.calibrate(
      inspector.model, *scores, false_alarm_rate=false_alarm_rate,
      allowances=tuple(0.0 if v is None else float(v.max(initial=0)) for v in off))
  return inspector.with_model(calibrated.with_description(outside_range=outside))


class Doubt(NamedTuple):
  """A training image of another bank that does not look good to a bank, or one of many.

  Attributes:
    question: what is asked.
    row: the row of the other bank that looks least so.
    nearest: the row of the bank that is nearest to it.
  """

  question: Questioned
  row: int
  nearest: int


def merge(
    bank: Model, other: Model, *, name: str = 'other', accept: str | Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None, show: Callable[[list[Doubt]], None] = lambda doubts: None,
    ) -> Model:
  """Unites two banks (`editing.merge`), if the other is of the same parts and of good ones.

  A bank whose patches lie farther away than those of the bank's own images from one another is asked about by
  its name. Of another, the images are asked about that would be anomalous, as far as their patches are known.

  Args:
    bank, other: made in the same way.
    name: what the other is called.
    accept: `name`, names of training images of the other that are good all the same, or 'all'.
    say: called with a line that tells how far apart the two are.
    show: called with what is not accepted, before the error is raised.

  Raises:
    NotAccepted: what was asked about and not accepted.
    BankError: they were made in different ways, or not both are banks.
  """
  found = editing.compare(bank, other)
  apart = (f'{found.distance:.2f} covering radii from the nearest of the bank, and those of its own images '
           f'{found.own:.2f} from one another')
  say(f'half of the patches of {name} lie beyond {apart}')
  # The first was at most 0.85 of the second for banks of the same transistors, screws or drawn parts, and at
  # least 1.3 of it for different ones.
  doubts, far = _doubts(bank, other, found), found.distance > found.own
  if far:
    questions = [Questioned(name, f'half of its patches lie beyond {apart}: perhaps it is of other parts')]
    doubts = doubts[:_SHOWN]
  else:
    known = bank.description.calibration
    doubts = [doubt for doubt in doubts if known and doubt.question.score >= known.image_threshold]
    questions = [doubt.question for doubt in doubts]
  try:
    acceptance.settle(questions, accept, other.description.images)
  except acceptance.NotAccepted as e:
    show([doubt for doubt in doubts if far or doubt.question in e.images])
    raise
  return editing.merge(bank, other)


def _doubts(bank: Model, other: Model, found: editing.Comparison) -> list[Doubt]:
  """Lists the images of another bank that have patches in it, by falling score."""
  known, doubts = bank.description.calibration, []
  limit = f', and the threshold is {known.image_threshold:.4g}' if known else ''
  for i in np.argsort(-found.scores, kind='stable'):
    score, row, near = float(found.scores[i]), int(found.rows[i]), int(found.nearest[i])
    origin, nearest = provenance.origin(other, row), provenance.origin(bank, near)
    doubts.append(Doubt(Questioned(
        origin.name or f'images[{origin.image}]', f'scores at least {score:.4g}{limit}', score,
        nearest.name or None), row, near))
  return doubts


def known_names(inspector: Inspector, images: Any) -> list[str]:
  """Lists the images that have the name of a training image: their scores may be too small to calibrate."""
  if isinstance(images, np.ndarray):
    return []
  known = {Path(name).name for name in inspector.model.description.images}
  return sorted(known & {Path(path).name for path in inputs.find_paths(images)})


def _data(inspector, images, batch_size, max_megapixels, on_error):
  """Makes the data of further images, which are prepared as the model's."""
  reading = {} if isinstance(images, np.ndarray) else {'max_pixels': max_pixels(max_megapixels)}
  return inputs.training_data(
      images, inspector.preprocessing, batch_size, on_error=on_error, **reading)


def _ask(inspector, images, data: Data, index, scores, accept) -> float:
  """Asks about what does not look good, unless it was accepted.

  Args:
    images: what was given.
    data: the images that could be read.
    index: [n] their positions in what was given.
    scores: [n] their scores.
    accept: as of `append`.

  Returns:
    The largest share of an image, of these or of the training images, that lies outside of the value range.
  """
  names = [example.image_path or f'images[{i}]' for i, example in zip(index, data.examples, strict=True)]
  unlike = {q.name: q for q in _unlike(inspector, data, names, scores)}
  usual = inspector.model.description.original_size
  beyond, most = _beyond_range(inspector, data, names)
  odd = [] if usual is None or isinstance(images, np.ndarray) else image_sizes.odd(
      {name: size for name, size in inputs.sizes_of(images).items() if name in set(names)}, usual)
  for question in (*beyond, *odd):
    known = unlike.get(question.name)
    # One line an image.
    unlike[question.name] = question if known is None else dataclasses.replace(
        known, why=f'{known.why}; {question.why}')
  acceptance.settle(list(unlike.values()), accept, names)
  return most


def _beyond_range(inspector, data: Data, names) -> tuple[list[Questioned], float]:
  """Lists the images of which more lies outside of the value range than of any training image.

  Returns:
    Them, and the largest share of an image, of all, that lies outside.
  """
  known = inspector.model.description.outside_range
  if not isinstance(data, FileData):
    return [], known
  shares = value_range.outside(
      [example.image_path for example in data.examples], data.preprocessing, max_pixels=data.max_pixels)
  return [
      Questioned(name, f'has {100 * share:.3g} % of its pixels outside of the value range, and training '
                 f'images have at most {100 * known:.3g} %')
      for name, share in zip(names, shares, strict=True) if share > known + 1e-9], max(known, *shares, 0.0)


def _unlike(inspector, data: Data, names, scores) -> list[Questioned]:
  """Lists the images that would alarm, or without thresholds those that stand out, by falling score."""
  scores, found = np.asarray(scores), inspector.calibration
  if found:
    beyond = np.flatnonzero(scores >= found.image_threshold)
    compared = f'the threshold is {found.image_threshold:.4g}'
  else:
    beyond = np.array(calibration.suspicious(scores), int)
    compared = f'half of these images score below {np.median(scores):.4g}' if len(scores) else ''
  beyond = beyond[np.argsort(-scores[beyond], kind='stable')]
  nearest = _nearest(inspector, data.part(beyond)) if len(beyond) else []
  return [
      Questioned(names[i], f'scores {scores[i]:.4g}, and {compared}', float(scores[i]), nearest_name)
      for i, nearest_name in zip(beyond, nearest, strict=True)]


def _nearest(inspector, data: Data) -> list[str | None]:
  """Names the training image with the normal patch most similar to the most anomalous one, of each image."""
  names: list[str | None] = [None] * len(data.examples)
  for index, scores in predict(inspector, data.batches()):
    for i, row in zip(index, scores.evidence.get('nearest', ()), strict=False):
      names[i] = provenance.origin(inspector.model, int(row)).name or None
  return names


def _score(inspector, embeddings, rows, batch_size, positions=None) -> CrossScores:
  """Scores images whose embeddings are at hand against rows of a bank."""
  return patchcore.score_embeddings(
      embeddings, rows, inspector.image_size, scoring_spec=inspector.detector.scoring, images=positions,
      batch_size=batch_size, grid=inspector.model.description.grid)


def _scores_with_others(inspector, embeddings, alone: CrossScores, batch_size) -> CrossScores:
  """Scores accepted images as later ones of their lot will be: by a bank that knows others of it.

  A few cannot vouch for the next so: of lots of three drawn parts in another light, a sixth of the later ones
  was called anomalous. So the scores of a lot of m lie 2 / (m + 1) of the way, on a logarithmic scale, to
  those against the old bank: all of it where an image is alone.

  Args:
    embeddings: [n, rows, columns, d].
    alone: their scores against the bank as it is, which stay below the threshold.
  """
  lot = np.flatnonzero(alone.image >= inspector.calibration.image_threshold)
  if len(lot) < 2:
    return alone
  found = CrossScores(*map(np.copy, alone))
  share = 2 / (len(lot) + 1)
  for fold in range(min(_FOLDS, len(lot))):
    scored = lot[fold::_FOLDS]
    rows = editing.appended_rows(inspector.model, np.delete(embeddings, scored, axis=0))
    new = _score(inspector, embeddings, rows, batch_size, scored)
    for kept, values in zip(found, new, strict=True):
      kept[scored] = kept[scored] ** share * values ** (1 - share)
  return found
