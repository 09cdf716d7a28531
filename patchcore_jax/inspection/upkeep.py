"""Later good images: a bank takes up what it does not cover yet, or a model gets thresholds of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from patchcore_jax.banks import editing, provenance
from patchcore_jax.data.preprocess import ImageError
from patchcore_jax.detectors import Run, cross_fitting, patchcore
from patchcore_jax.inspection import differences, inputs
from patchcore_jax.inspection.inspector import Inspector

OnError = Callable[[ImageError], None] | None


def append(
    inspector: Inspector, images: Any, *, batch_size: int = 32, on_error: OnError = None,
    progress: Callable[[str, int, int], None] | None = None) -> Inspector:
  """Adds patches of further good images to a bank, as far as it does not cover them yet.

  The images count for the thresholds, by their scores before they were added.

  Args:
    images: as of `inputs.training_data`.
    batch_size: images that pass through the network at once.
    on_error: called with the error of each file that cannot be read, which is then left out; by default the
      error is raised.
    progress: called with ('embed', done, number of images).

  Raises:
    BankError: the model of a method without a bank.
    ValueError: images of another size, or no images.
  """
  model, detector = inspector.model, inspector.detector
  editing.check_is_bank(model)
  (backbone,) = inspector.backbones
  data = _data(inspector, images, batch_size, on_error)
  told = {'progress': progress} if progress else {}
  embeddings, read = patchcore.embed(
      backbone, data, embedding=detector.embedding,
      run=Run(keep_images=provenance.has_thumbnails(model), **told))
  scores = ((), ())
  if inspector.calibration:
    scores = patchcore.score_embeddings(
        embeddings, model.arrays['embeddings'], inspector.image_size, scoring_spec=detector.scoring,
        batch_size=data.batch_size)
  given = data.examples
  return inspector.with_model(editing.append(
      model, embeddings, [given[i].image_path for i in read.index], files=read.files,
      image_scores=scores[0], map_maxima=scores[1]))


def calibrate(
    inspector: Inspector, images: Any, *, false_alarm_rate: float = 0.01, batch_size: int = 32,
    on_error: OnError = None) -> Inspector:
  """Makes thresholds of good images that the model was not fitted on; their guarantee is exact.

  Args:
    images: as of `inputs.training_data`.
    false_alarm_rate: the share of good images that may alarm, in (0, 1).
    batch_size: images that pass through the network at once.
    on_error: as of `append`.

  Raises:
    ValueError: images of another size, no images, or a rate out of range.
  """
  detector, networks, search = inspector.detector, inspector.backbones, inspector.search
  data = _data(inspector, images, batch_size, on_error)
  scores = cross_fitting.score_maxima(detector, inspector.model, data, networks, search)
  sample = data.part(range(min(len(data), differences.SAMPLE)))
  off = differences.score_differences(detector, inspector.model, sample, networks, search)
  return inspector.with_model(editing.calibrate(
      inspector.model, *scores, false_alarm_rate=false_alarm_rate,
      allowances=tuple(0.0 if v is None else float(v.max(initial=0)) for v in off)))


def known_names(inspector: Inspector, images: Any) -> list[str]:
  """Lists the images that have the name of a training image: their scores may be too small to calibrate."""
  if isinstance(images, np.ndarray):
    return []
  known = {Path(name).name for name in inspector.model.description.images}
  return sorted(known & {Path(path).name for path in inputs.find_paths(images)})


def _data(inspector, images, batch_size, on_error):
  """Makes the data of further images, which are prepared as the model's."""
  return inputs.training_data(
      images, inspector.model.description.preprocessing, batch_size, on_error=on_error)
