"""What all detectors share: batches go through one jitted function, and predictions come out."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from patchcore_jax import parallel
from patchcore_jax.backbones import Backbone, fingerprint, normalize
from patchcore_jax.banks import store
from patchcore_jax.data.pipeline import Batch

Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Prediction(NamedTuple):
  """Results of a batch of b images, NumPy, float32 unless said; padding is dropped.

  Attributes:
    index: [b] int32, positions in the list of examples.
    image_scores: [s, b], for each of s bank sizes; 1 for detectors without a bank.
    anomaly_maps: [s, b, h, w], at the size of the network's input; None where a detector has none.
    patches: [s, b] int32, row * columns + column of the most anomalous patch on the grid; None where
      there is no bank.
    nearest: [s, b] int32, that row of the bank which is nearest to it.
  """

  index: np.ndarray
  image_scores: np.ndarray
  anomaly_maps: np.ndarray | None
  patches: np.ndarray | None = None
  nearest: np.ndarray | None = None


def describe(backbone: Backbone) -> dict[str, Any]:
  """The network, as the description of a bank or a model tells it."""
  return {
      'name': backbone.name, 'layers': list(backbone.layers), 'mean': list(backbone.mean),
      'std': list(backbone.std), 'precision': backbone.precision,
      'weights': fingerprint(backbone.variables)}


def maps_of(backbone: Backbone) -> Callable:
  """The function (variables, images [b, h, w, 3] uint8) -> feature maps of the layers, in a list.

  The same object for the same network, so that what is made of it can be cached, and is compiled once.
  """
  return _maps_fn(backbone.apply, backbone.layers, backbone.mean, backbone.std)


@functools.lru_cache(maxsize=16)
def _maps_fn(apply, layers, mean, std):

  def maps(variables, images):
    found = apply(variables, normalize(images, mean, std))
    return [found[layer] for layer in layers]

  return maps


def first_of(batches: Iterable[Batch]) -> tuple[Batch, Iterator[Batch]]:
  """The first batch, and all of them.

  Raises:
    ValueError: there is none.
  """
  batches = iter(batches)
  first = next(batches, None)
  if first is None:
    raise ValueError('No images: none were given, or none could be read.')
  return first, itertools.chain([first], batches)


def stream(
    fn: Callable, parameters: Any, batches: Iterable[Batch], expected: Mapping[str, Any] | None = None, *,
    to_host: bool = True,
) -> Iterator[tuple[Batch, Any]]:
  """Yields every batch and `fn(parameters, images)`, as NumPy arrays by default, padding included.

  The next batch is sent off before one is waited for.

  Args:
    fn: pure; the same object every time, because it is compiled once for each.
    parameters: on the devices, by `parallel.replicate` or `parallel.split`.
    batches: the batch size is a multiple of the number of local devices.
    expected: the description of a bank or model, made of images of the same size.
    to_host: whether results leave the device; else they are as `parallel.data_parallel` leaves them.

  Raises:
    BankError: images of another size.
  """
  run, pending = parallel.data_parallel(fn), None

  def finished(batch, results):
    return batch, parallel.gather(results) if to_host else results

  for batch in batches:
    if expected is not None:
      store.check(expected, {'image_size': batch.image.shape[1:3]})
    results = run(parameters, batch.image)
    if to_host:
      parallel.fetch(results)
    if pending:
      yield finished(*pending)
    pending = batch, results
  if pending:
    yield finished(*pending)
