"""Answers about images, from a saved model: what prediction, the service and the export have in common.

    inspector = load('banks/bottle')
    for index, scores in predict(inspector, batches): ...   # many images
    score = scorer(inspector, 8)                            # images that come one by one

A model says how images are to be prepared and scored, so nothing else is needed.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from patchcore_jax import backbones, detectors, parallel
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.banks.model import BankError, Calibration, Model, Network
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.data.preprocess import ImageError
from patchcore_jax.detectors import Detector, ScoreFn, Scores, streaming
from patchcore_jax.settings import Preprocessing, SearchSpec

_AS_THEY_COME = Preprocessing(resize=(), crop=())


class Inspector(NamedTuple):
  """A model with everything that is needed to use it.

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

  def about(self) -> str:
    """Describes the model in a few words: the size of the bank, and the networks."""
    networks = ' + '.join(backbone.name for backbone in self.backbones)
    rows = self.model.arrays.get('embeddings')
    return f'{self.detector.title if rows is None else f"{len(rows)} patches"}, {networks or "no network"}'


def load(path: str | os.PathLike, *, name: str = '', weights: str = '') -> Inspector:
  """Restores a model, and makes the networks that it was made with.

  Args:
    path: folder of the model.
    name, weights: those of the backbone, where it is called otherwise or lies elsewhere on this machine; ''
      for what the model says.

  Raises:
    BankError: no model, a damaged one, one that does not say how its network is made, or other weights than
      it was made with.
    ValueError: what `backbones.create` raises.
  """
  return of_model(store.restore(path), name=name, weights=weights, path=path)


def of_model(model: Model, *, name: str = '', weights: str = '', path: Any = '') -> Inspector:
  """Makes the inspector of a model at hand, as `load` does of one on disk."""
  networks = model.description.backbones
  if (name or weights) and len(networks) != 1:
    raise ValueError(
        f'The model {path} has {len(networks)} networks: a name or a file of weights can be given for one '
        'only.')
  made = tuple(_made_again(network, name, weights, path) for network in networks)
  return Inspector(detectors.of_model(model), model, made)


def _made_again(network: Network, name: str, weights: str, path: Any) -> Backbone:
  """Makes a network of a model again, and checks that its weights are the same."""
  source = network.source
  if source is None:
    raise BankError(
        f'The model {path} does not say how its network {network.name!r} is made: it is from Python, or from '
        'an older version. Give the network again, or fit with one that has a name.')
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
        '--backbone_weights.')
  # The same values by another name are the same network.
  return dataclasses.replace(backbone, name=network.name)


def predict(inspector: Inspector, batches: Iterable[Batch]) -> Iterator[tuple[np.ndarray, Scores]]:
  """Scores batches: yields the `index` of the images of each, and their `Scores`; padding is dropped."""
  return streaming.predict(inspector.score_fn(), batches, image_size=inspector.image_size)


def scorer(inspector: Inspector, *batch_sizes: int) -> Callable[[np.ndarray], Scores]:
  """Makes a function of images [n, h, w, 3] uint8 that returns their `Scores`, as NumPy arrays.

  It gives what `predict` gives. The network and the model are put on the devices now.

  Args:
    batch_sizes: images are padded to the smallest of these that holds them, so that few of them do not wait
      for the time of many. Each is compiled when it is first needed.

  Raises:
    ImageError: (the function) images of another size than the model's.
    ValueError: (the function) more images than the largest batch.
  """
  score_fn = inspector.score_fn()
  run, parameters = parallel.data_parallel(score_fn.fn), streaming.place(score_fn)
  sizes = sorted(map(parallel.divisible_batch_size, batch_sizes))

  def score(images: np.ndarray) -> Scores:
    check_size(inspector, images.shape[1:3])
    n = len(images)
    if n > sizes[-1]:
      raise ValueError(f'{n} images for a scorer of batches of at most {sizes[-1]}.')
    padded = np.zeros((next(size for size in sizes if size >= n), *images.shape[1:]), np.uint8)
    padded[:n] = images
    results = jax.tree.map(lambda x: x[:n], parallel.gather(run(parameters, padded)))
    return streaming.finished(score_fn, results)

  return score


def check_size(inspector: Inspector, size: tuple[int, int]) -> None:
  """Raises ImageError for images whose (height, width), after preprocessing, the model was not made of."""
  if tuple(size) != tuple(inspector.image_size):
    height, width = inspector.image_size
    raise ImageError(
        f'The image is {size[1]} x {size[0]} pixels after resizing and cropping, and the bank was made of '
        f'images of {width} x {height} (width x height). Give images of the shape that it was made of, or '
        'fit a bank with preprocess.crop or preprocess.pad, which make all shapes alike.')
