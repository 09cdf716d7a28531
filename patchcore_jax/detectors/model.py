"""What the detectors beside PatchCore share: a model is named arrays and a description of their making."""

import functools
from collections.abc import Callable, Iterable, Iterator
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import patchcore_jax
from patchcore_jax import memory_bank, parallel
from patchcore_jax.backbones import Backbone, fingerprint, normalize
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import patchcore
from patchcore_jax.detectors.patchcore import Progress


class Model(NamedTuple):
  """What a detector learnt; `memory_bank.save_arrays(path, *model)` keeps it.

  Attributes:
    arrays: NumPy arrays by name; the detector's `fit` says which.
    description: JSON-able; how the model was made.
  """

  arrays: dict[str, np.ndarray]
  description: dict[str, Any]


def describe(detector: str, backbone: Backbone, **settings) -> dict[str, Any]:
  """What a model must agree on with the network that queries it; part of its description.

  Args:
    detector: its name.
    backbone: the network.
    **settings: those that `fit` used.
  """
  return {
      'detector': detector,
      'backbone': {
          'name': backbone.name, 'layers': list(backbone.layers),
          'mean': list(backbone.mean), 'std': list(backbone.std),
          'weights': fingerprint(backbone.variables)},
      'settings': settings,
  }


def make(arrays: dict[str, np.ndarray], description: dict[str, Any], **facts) -> Model:
  """A `Model` whose description also tells the versions, and further facts."""
  versions = {'patchcore_jax': patchcore_jax.__version__, 'jax': jax.__version__}
  return Model(arrays, description | facts | {'versions': versions})


@functools.lru_cache(maxsize=16)
def maps_fn(apply: Callable, layers: tuple[str, ...], mean, std) -> Callable:
  """The function (variables, images [b, h, w, 3] uint8) -> feature maps of `layers`, in a list.

  Cached, so that what is made of it can be cached too, and is compiled once.
  """

  def maps(variables, images):
    found = apply(variables, normalize(images, mean, std))
    return [found[layer] for layer in layers]

  return maps


def maps_of(backbone: Backbone) -> Callable:
  """`maps_fn` of a backbone and its layers."""
  return maps_fn(backbone.apply, backbone.layers, backbone.mean, backbone.std)


@functools.lru_cache(maxsize=16)
def pooled_fn(maps: Callable) -> Callable:
  """From `maps_fn`: (variables, images) -> the mean over positions of every map, a tuple of [b, c]."""

  def pooled(variables, images):
    return tuple(jnp.mean(m, axis=(1, 2)) for m in maps(variables, images))

  return pooled


def collect(
    fn: Callable,
    parameters: Any,
    batches: Iterable[Batch],
    num_images: int,
    *,
    progress: Progress | None = None,
    scratch: str | None = None,
) -> tuple[tuple[np.ndarray, ...], list[int]]:
  """Runs `fn(parameters, images)`, a tuple of arrays [b, ...], over all images.

  Args:
    fn: pure; the same object every time, because it is compiled once for each.
    parameters: pytree.
    batches: images of one size; the batch size is a multiple of the number of local devices.
    num_images: how many images the batches hold at most.
    progress: called with ('embed', done, num_images).
    scratch: a folder for a temporary file that holds the results instead of memory; it has no name,
      and is gone with the arrays.

  Returns:
    The results [n, ...] float32 in the order of the batches, padding dropped, and the size of the
    images, [height, width].

  Raises:
    ValueError: no images.
  """
  arrays, image_size, done = None, None, 0
  run = parallel.data_parallel(fn)
  for batch, values in patchcore._one_ahead(run, parallel.replicate(parameters), batches):
    if arrays is None:
      image_size = list(batch.image.shape[1:3])
      arrays = tuple(_empty((num_images, *v.shape[1:]), scratch) for v in values)
    valid = batch.valid
    count = int(valid.sum())
    for array, value in zip(arrays, values):
      array[done:done + count] = value[valid]
    done += count
    if progress:
      progress('embed', done, num_images)
  if not done:
    raise ValueError('No images: none were given, or none could be read.')
  return tuple(array[:done] for array in arrays), image_size


def stream(
    fn: Callable, parameters: Any, model: Model, batches: Iterable[Batch],
) -> Iterator[tuple[Batch, Any]]:
  """Yields every batch and `fn(parameters, images)` as NumPy arrays, padding included.

  Raises:
    BankError: images of another size than the model was made with.
  """

  def checked():
    for batch in batches:
      memory_bank.check(model.description, {'image_size': batch.image.shape[1:3]})
      yield batch

  yield from patchcore._one_ahead(parallel.data_parallel(fn), parallel.replicate(parameters), checked())


def _empty(shape, scratch):
  if scratch is None:
    return np.empty(shape, np.float32)
  with TemporaryFile(dir=scratch) as file:  # the mapping outlives the file object
    return np.memmap(file, np.float32, 'w+', shape=shape)
