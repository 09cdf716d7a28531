"""What the detectors beside PatchCore share: a model is named arrays and a description of their making."""

import functools
from collections.abc import Callable, Iterable
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import patchcore_jax
from patchcore_jax import parallel
from patchcore_jax.backbones import Backbone
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import base
from patchcore_jax.detectors.base import Progress


class Model(NamedTuple):
  """What a detector learnt; `store.save_arrays(path, *model)` keeps it.

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
      'backbone': base.describe(backbone),
      'settings': settings,
  }


def make(arrays: dict[str, np.ndarray], description: dict[str, Any], **facts) -> Model:
  """A `Model` whose description also tells the versions, and further facts."""
  versions = {'patchcore_jax': patchcore_jax.__version__, 'jax': jax.__version__}
  return Model(arrays, description | facts | {'versions': versions})


@functools.lru_cache(maxsize=16)
def pooled_fn(maps: Callable) -> Callable:
  """From `base.maps_of`: (variables, images) -> the mean over positions of every map, a tuple of [b, c]."""

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
  for batch, values in base.stream(fn, parallel.replicate(parameters), batches):
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


def _empty(shape, scratch):
  if scratch is None:
    return np.empty(shape, np.float32)
  with TemporaryFile(dir=scratch) as file:  # the mapping outlives the file object
    return np.memmap(file, np.float32, 'w+', shape=shape)
