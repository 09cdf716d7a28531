"""Good images -> an inspector: a model with thresholds."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from patchcore_jax import backbones, detectors, processes, settings
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import calibration
from patchcore_jax.data.dataset import FileData
from patchcore_jax.detectors import Data, Detector, PatchCore, Run
from patchcore_jax.inspection import acceptance, differences, image_sizes, inputs
from patchcore_jax.inspection.inspector import Inspector
from patchcore_jax.settings import CalibrationSpec, Preprocessing, ScoringSpec, SearchSpec


def fit(
    images: Any, *, defects: Any = None, detector: Detector | str | None = None,
    backbone: str | Backbone | Sequence[Backbone] = 'auto', false_alarm_rate: float | None = 0.01,
    preprocessing: Preprocessing | None = None, batch_size: int = 0, seed: int = 0,
    accept: str | Sequence[str] = (), max_megapixels: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    notify: Callable[[str], None] | None = None) -> Inspector:
  """Learns what good parts look like, and where the threshold to the others lies.

  Args:
    images: good ones: a folder, below which all images count, or which has a folder train/good or good; a
      pattern such as 'parts/*/good', a list of paths, or an array [n, h, w, 3] (RGB) or [n, h, w] (gray)
      uint8.
    defects: for a method that learns from some, such as `CAVGA(weak=True)`: a folder, a pattern or paths
      beside files, an array beside an array. They make no thresholds.
    detector: the method, such as `PatchCore(ratio=0.05)`, or the name of one with its usual settings, such as
      'padim'; None for `PatchCore(ratio=0)`, whose bank is as large as is enough.
    backbone: a name as `backbones.create` takes it, or a network of your own, or several for an ensemble;
      left out for a method that takes none.
    false_alarm_rate: the share of good images that may be called anomalous; None for no thresholds.
    preprocessing: what is done to images; by default all of every file is seen, at about its aspect, the
      short side 224 pixels (`data.preprocess.whole_image`), and arrays are taken as they are. What a crop
      leaves out is warned of, and stands in every finding.
    batch_size: images that pass through the network at once; 0 for 8 on CPUs and 32 on accelerators.
    seed: the seed of everything that is random.
    accept: files whose size is far from that of the rest, and which are good all the same: their names, or
      'all'.
    max_megapixels: files of more pixels are refused before they are decoded; None for the default of
      `settings.DataSpec`.
    progress: called with (stage, done, total).
    notify: called with lines such as the plan of the memory, and how long the fit will take.

  Raises:
    NotAccepted: files whose size is far from that of the rest.
    ImageError: a file that cannot be read.
    ValueError: no images, one where thresholds take two, or a mistake that the message explains.

  >>> import numpy as np
  >>> rng = np.random.default_rng(0)
  >>> inspector = fit(rng.integers(100, 110, (4, 32, 32), np.uint8), backbone='resnet18_slim.procedural')
  >>> inspector.inspect(np.full((32, 32), 250, np.uint8)).anomalous
  True
  """
  rate = CalibrationSpec(folds=0) if false_alarm_rate is None else CalibrationSpec(false_alarm_rate)
  source, images = images, inputs.training_images(images)
  of_files = not isinstance(images, np.ndarray)
  given = inputs.find_paths(images) if of_files else images
  settings.check_number(len(given), rate.folds)
  if isinstance(detector, str):
    detector = detectors.find(detector)()
  defects = inputs.find_defects(defects, given)
  (detector or PatchCore()).check_defects(len(defects))
  networks = networks_for(detector or PatchCore(ratio=0), backbone)
  inputs.warn_of_left_out(source, images)
  sizes = image_sizes.of_files([*given, *defects]) if of_files else inputs.sizes_of(images)
  acceptance.settle(image_sizes.odd(sizes), accept, sizes)
  if preprocessing is None and of_files:
    preprocessing = image_sizes.on_one_grid(sizes.values(), None, input_multiple(networks))
  if preprocessing:
    for line in (*image_sizes.left_out(sizes.values(), preprocessing),
                 *image_sizes.squeezed(sizes, preprocessing)):
      warnings.warn(line, stacklevel=2)
  data = inputs.training_data(
      images, preprocessing, batch_size, defects=defects, **({} if not of_files else {
          'paths': given, 'original_size': image_sizes.usual(sizes.values()),
          'max_pixels': settings.max_pixels(max_megapixels)}))
  told = {'progress': progress, 'notify': notify}
  run = Run(seed=seed, keep_images=True, **{name: call for name, call in told.items() if call})
  where = f' of {images}' if isinstance(images, (str, Path)) else ''
  return fit_data(detector or PatchCore(ratio=0), data, networks, run, calibrate=rate, source=where)


def fit_data(
    detector: Detector, data: Data, networks: Sequence[Backbone], run: Run, *,
    calibrate: CalibrationSpec | None = None, search: SearchSpec | None = None,
    source: str = '') -> Inspector:
  """Fits a detector on data, and makes thresholds of cross-fitted scores.

  Args:
    detector: the method.
    data: good images, and labelled defects for a method that learns from such.
    networks: as many as the method needs.
    run: what the fit may use.
    calibrate: how thresholds are made; None for the defaults.
    search: how neighbours are found; no influence on the result.
    source: where the images come from, for the history, such as ' of FOLDER'.

  Raises:
    ValueError: no images, or a mistake that the message explains.
  """
  calibrate, began = calibrate or CalibrationSpec(), time.monotonic()
  settings.check_number(sum(not example.label for example in data.examples), calibrate.folds)
  if isinstance(data, FileData):
    data = data.measured()
  if calibrate.folds:
    model, scores = detector.fit_and_cross_score(data, networks, run, folds=calibrate.folds, search=search)
  else:
    model, scores = detector.fit(data, networks, run), None
  model = model.with_description(
      fit_seconds=time.monotonic() - began, original_size=getattr(data, 'original_size', None))
  inspector = Inspector(detectors.of_model(model), model, tuple(networks), search or SearchSpec())
  if scores:
    model = model.with_description(calibration=calibration.calibrate(
        scores.image, scores.map_maxima, false_alarm_rate=calibrate.false_alarm_rate, method='cross',
        allowances=_allowances(inspector, data, run.seed)))
  defects = f' and {n} defects' if (n := model.description.num_defects) else ''
  return inspector.with_model(
      model.recorded(f'fitted on {model.description.num_images} images{defects}{source}'))


def networks_for(
    detector: Detector, backbone: str | Backbone | Sequence[Backbone] = 'auto') -> tuple[Backbone, ...]:
  """Makes the networks of a fit; none for a method that needs none.

  Raises:
    ValueError: a network for such a method, besides what `backbones.create` raises.
  """
  if not detector.needs_network:
    if backbone not in ('auto', ()):
      raise ValueError(f'{detector.title} takes no network: expected no backbone, got {backbone!r:.80}.')
    return ()
  if isinstance(backbone, str):
    backbone = backbones.create(backbone)
  return (backbone,) if isinstance(backbone, Backbone) else tuple(backbone)


def input_multiple(networks: Sequence[Backbone]) -> int:
  """Computes what the sides of images must be multiples of for all of some networks."""
  return math.lcm(*map(backbones.input_multiple, networks))


def _allowances(inspector: Inspector, data: Data, seed: int) -> tuple[float, float]:
  """Measures how much further thresholds are for devices that compute the network otherwise.

  Returns:
    That of image scores and that of the largest values of maps.
  """
  if all(network.elsewhere is None for network in inspector.backbones):
    return 0.0, 0.0
  scoring = getattr(inspector.detector, 'scoring', ScoringSpec())
  sample, others = differences.sample_of(
      inspector.model, max(scoring.num_neighbors, scoring.support_neighbors), seed)
  own = sample[processes.part(len(sample))] if jax.process_count() > 1 else sample
  read = _positions(inspector, data)
  found = differences.score_differences(
      inspector.detector, others, data.part([read[i] for i in own]), inspector.backbones, inspector.search)
  return tuple(0.0 if values is None else float(processes.joined(values).max(initial=0)) for values in found)


def _positions(inspector, data) -> list[int]:
  """Finds where in the data the images lie that the model was fitted on."""
  names = inspector.model.description.images
  if not names:  # arrays are all read
    return list(range(len(data.examples)))
  positions = {example.image_path: i for i, example in enumerate(data.examples)}
  return [positions[name] for name in names]
