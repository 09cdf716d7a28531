"""Answers about images, from a saved model: what prediction, the service and the export have in common.

    inspector = load('banks/bottle')
    for index, scores in predict(inspector, batches): ...   # many images
    score = scorer(inspector, 8)                            # images that come one by one

A model says how images are to be prepared and scored, so nothing else is needed.
"""

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from patchcore_jax import backbones, detectors, parallel
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.banks.model import BankError, Calibration, Model, Network
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import Detector, ScoreFn, Scores, streaming
from patchcore_jax.detectors.base import HostScoreFn
from patchcore_jax.inspection import inputs
from patchcore_jax.settings import Preprocessing, SearchSpec, max_pixels, weights_of_each

_AS_THEY_COME = Preprocessing(resize=(), crop=())


@dataclasses.dataclass(frozen=True, eq=False)
class Inspector:
  """A model with everything that is needed to use it.

  `fit` and `load` make one. It pickles, and a copy makes its networks again.

  Attributes:
    detector: the method, with its settings.
    model: what it learnt.
    backbones: the networks.
    search: how neighbours are found; no influence on the result.
  """

  detector: Detector
  model: Model
  backbones: tuple[Backbone, ...]
  search: SearchSpec = SearchSpec()

  @property
  def image_size(self) -> tuple[int, int]:
    """The (height, width) of the network's input."""
    return self.model.description.image_size

  @property
  def preprocessing(self) -> Preprocessing:
    """What is done to images: nothing, for a model of arrays."""
    return self.model.description.preprocessing or _AS_THEY_COME

  @property
  def calibration(self) -> Calibration | None:
    """The thresholds; None for a model without."""
    return self.model.description.calibration

  def score_fn(self, **arguments) -> ScoreFn:
    """Makes the score function of the model (`Detector.score_fn`)."""
    return self.detector.score_fn(self.model, self.backbones, search=self.search, **arguments)

  @functools.cached_property
  def placed(self) -> tuple[ScoreFn, tuple[Any, ...]]:
    """The score function, and its parameters on the devices, which are put there once."""
    score_fn = self.score_fn()
    return score_fn, streaming.place(score_fn)

  def with_model(self, model: Model) -> 'Inspector':
    """Makes the inspector of another state of the model."""
    return dataclasses.replace(self, model=model)

  def inspect(
      self, images: Any, *, batch_size: int = 8, min_area: float = 0, max_megapixels: float | None = None,
      on_error: Callable[[ImageError], Any] | None = None) -> Any:
    """Inspects one image, or many.

    Args:
      images: a file, or an array [h, w, 3] (RGB) or [h, w] (gray) uint8; or many: a folder, a pattern, an
        array [n, h, w, 3] or [n, h, w], or any iterable of paths and arrays.
      batch_size: how many of many pass through the network at once.
      min_area: regions of fewer pixels are ignored; an image in which all are smaller is good.
      max_megapixels: files of more pixels are refused before they are decoded; None for the default of
        `settings.DataSpec`.
      on_error: of many, called with the error of each that cannot be read, or has another size than the model
        takes, which then has no finding; by default the first such error ends it.

    Returns:
      A `Finding`; of many an iterator over theirs, in order, which keeps the devices busy.

    Raises:
      ImageError: a file cannot be read (see `on_error`), or an image of a size that the model does not take.
      ValueError: something else than images, or a `min_area` for a model without a pixel threshold.
    """
    inputs.check(images)
    inputs.warn_of_left_out(images)
    finding = importlib.import_module('patchcore_jax.inspection.finding')
    if min_area:
      finding.check_knows_regions(self)
    one = inputs.is_one(images)
    found = finding.findings(
        self, images, 1 if one else batch_size, min_area=min_area, max_pixels=max_pixels(max_megapixels),
        on_error=None if one else on_error)
    return next(found) if one else found

  def save(self, path: str | os.PathLike) -> None:
    """Writes the model as a new folder, which `load` and the command `patchcore` read.

    Raises:
      ValueError: `path` exists.
      OSError: it cannot be written.
    """
    store.save(path, self.model)

  def append(self, images: Any, **arguments) -> 'Inspector':
    """Adds what the bank does not cover of further good images (`upkeep.append`, with its arguments)."""
    inputs.warn_of_left_out(images)
    return importlib.import_module('patchcore_jax.inspection.upkeep').append(self, images, **arguments)

  def calibrate(self, images: Any = None, **arguments) -> 'Inspector':
    """Makes thresholds of good images not fitted on (`upkeep.calibrate`, with its arguments).

    Without images they are made of the scores that the model keeps, for another `false_alarm_rate`
    (`editing.at_rate`).
    """
    if images is None:
      at_rate = importlib.import_module('patchcore_jax.banks.editing').at_rate
      return self.with_model(at_rate(self.model, **arguments))
    inputs.warn_of_left_out(images)
    return importlib.import_module('patchcore_jax.inspection.upkeep').calibrate(self, images, **arguments)

  def export(self, path: str | os.PathLike, **arguments) -> dict[str, Any]:
    """Writes a program that scores images with JAX alone (`export.folder.write`, with its arguments)."""
    # Imported here, because the export stands on this module.
    return importlib.import_module('patchcore_jax.export.folder').write(path, self, **arguments)

  def __reduce__(self):
    made_again = all(network.source for network in self.model.description.backbones)
    return _unpickled, (self.model, self.search, None if made_again else self.backbones)

  def about(self) -> str:
    """Describes the model in a few words: the size of the bank, and the networks."""
    networks = ' + '.join(backbone.name for backbone in self.backbones)
    rows = self.model.arrays.get('embeddings')
    return f'{self.detector.title if rows is None else f"{len(rows)} patches"}, {networks or "no network"}'


def _unpickled(model: Model, search: SearchSpec, networks: tuple[Backbone, ...] | None) -> Inspector:
  """Makes an inspector of what its pickle holds: networks that have a name are made again."""
  return dataclasses.replace(of_model(model, backbone=networks), search=search)


def load(
    path: str | os.PathLike, *, name: str = '', weights: str = '',
    backbone: Backbone | Sequence[Backbone] | None = None) -> Inspector:
  """Restores a model, and makes the networks that it was made with.

  Args:
    path: folder of the model.
    name, weights: those of the backbone, where it is called otherwise or lies elsewhere on this machine; ''
      for what the model says. Of several networks, a name for one only, and a file for each, joined by '+'.
    backbone: the network itself, or several, where the model was fitted with networks from Python.

  Raises:
    BankError: no model, a damaged one, one that does not say how its network is made, or other weights than
      it was made with.
    ValueError: what `backbones.create` raises.
  """
  return of_model(store.restore(path), name=name, weights=weights, backbone=backbone, path=path)


def of_model(
    model: Model, *, name: str = '', weights: str = '',
    backbone: Backbone | Sequence[Backbone] | None = None, path: Any = '') -> Inspector:
  """Makes the inspector of a model at hand, as `load` does of one on disk."""
  networks = model.description.backbones
  if backbone is not None:
    given = (backbone,) if isinstance(backbone, Backbone) else tuple(backbone)
    detector = detectors.of_model(model)
    streaming.check(detector, model, given)
    return Inspector(detector, model, given)
  if name and len(networks) != 1 or weights and not networks:
    raise ValueError(
        f'The model {path} has {len(networks)} networks: a name can be given for one only, and a file of '
        'weights where there is one.')
  made = tuple(
      _made_again(network, name, file, path)
      for network, file in zip(networks, weights_of_each(weights, len(networks)), strict=True))
  return Inspector(detectors.of_model(model), model, made)


def _made_again(network: Network, name: str, weights: str, path: Any) -> Backbone:
  """Makes a network of a model again, and checks that its weights are the same."""
  source = network.source
  if source is None:
    raise BankError(
        f'The model {path} does not say how its network {network.name!r} is made: it is from Python, or from '
        'an older version. Give it as `backbone` of load(), or fit with a network that has a name.')
  name, weights = name or source.name, weights or ('' if name else source.weights)
  backbone = backbones.create(
      name, weights=weights, layers=network.layers, seed=source.seed,
      # A factory decides its precision; `Detector.score_fn` checks that it is the model's.
      precision=backbones.AUTO if ':' in name else network.precision)
  found = streaming.identity(backbone)
  if found.weights != network.weights:
    raise BankError(
        f'The model {path} was made with the weights {network.weights} of {network.name}, and those of '
        f'{found.name} here are {found.weights}: expected the same. Pass the file that was used as '
        '--backbone-weights.')
  # The same values by another name are the same network.
  return dataclasses.replace(backbone, name=network.name)


def predict(inspector: Inspector, batches: Iterable[Batch]) -> Iterator[tuple[np.ndarray, Scores]]:
  """Scores batches: yields the `index` of the images of each, and their `Scores`; padding is dropped."""
  score_fn, parameters = inspector.placed
  return streaming.predict(score_fn, batches, image_size=inspector.image_size, parameters=parameters)


def scorer(inspector: Inspector, *batch_sizes: int) -> 'Scorer':
  """Makes a `Scorer`, for images that come one by one or a few at a time."""
  return Scorer(inspector, *batch_sizes)


class Scorer:
  """A function of images [n, h, w, 3] uint8 that returns their `Scores`, as NumPy arrays.

  It gives what `predict` gives. The network and the model are put on the devices when it is made.

  Args:
    inspector: what scores.
    batch_sizes: images are padded to the smallest of these that holds them, so that few of them do not wait
      for the time of many. Each is compiled when it is first needed, or by `compile`.
  """

  def __init__(self, inspector: Inspector, *batch_sizes: int):
    self._inspector = inspector
    self._score_fn, self._parameters = inspector.placed
    self._sizes = sorted(map(parallel.divisible_batch_size, batch_sizes))

  def __call__(self, images: np.ndarray) -> Scores:
    """Scores images.

    Raises:
      ImageError: images of another size than the model's.
      ValueError: more images than the largest batch.
    """
    check_size(self._inspector, images.shape[1:3])
    n = len(images)
    if n > self._sizes[-1]:
      raise ValueError(f'{n} images for a scorer of batches of at most {self._sizes[-1]}.')
    padded = np.zeros((next(size for size in self._sizes if size >= n), *images.shape[1:]), np.uint8)
    padded[:n] = images
    results = parallel.data_parallel(self._score_fn.fn)(self._parameters, padded)
    results = jax.tree.map(lambda x: x[:n], parallel.gather(results))
    return streaming.finished(self._score_fn, results)

  def compile(self, size: int) -> Scores:
    """Compiles for a batch size.

    Returns:
      `Scores` without meaning, whose fields are None where those of images are.
    """
    images = np.zeros((parallel.divisible_batch_size(size), *self._inspector.image_size, 3), np.uint8)
    if self._inspector.detector.of_a_set:  # black images are none of it
      return streaming.finished(self._score_fn, images[:0])
    if isinstance(self._score_fn, HostScoreFn) or jax.default_backend() != 'cpu':
      return self(images)  # an accelerator tells only then whether its memory is enough
    return parallel.compiled(self._score_fn.fn, self._parameters, images)


def check_size(inspector: Inspector, size: tuple[int, int]) -> None:
  """Raises ImageError for images whose (height, width), after preprocessing, the model was not made of."""
  if tuple(size) != tuple(inspector.image_size):
    height, width = inspector.image_size
    raise ImageError(
        f'The image is {size[1]} x {size[0]} pixels after resizing and cropping, and the bank was made of '
        f'images of {width} x {height} (width x height). Give images of the shape that it was made of, or '
        'fit a bank with preprocess.resize=(height, width), which makes all shapes alike.')
