"""Sends batches through a jitted function on all local devices: what the methods share."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from tempfile import TemporaryFile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import patchcore_jax
from patchcore_jax import parallel, processes
from patchcore_jax.backbones import Backbone, fingerprint, normalize
from patchcore_jax.banks import provenance
from patchcore_jax.banks.model import BankError, Description, Model, Network, Source, to_json
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors.base import CrossScores, Data, Detector, HostScoreFn, Run, ScoreFn

NO_IMAGES = 'No images: none were given, or none could be read.'


def identity(backbone: Backbone) -> Network:
  """Makes the record of a network for a model's description."""
  return Network(
      backbone.name, tuple(backbone.layers), tuple(backbone.mean), tuple(backbone.std), backbone.precision,
      fingerprint(backbone.variables), backbone.source and Source(*backbone.source))


def check(detector: Detector, model: Model, backbones: Sequence[Backbone]) -> None:
  """Compares a model with what it is about to be used with.

  Raises:
    BankError: another method, setting or network; the message names every difference.
  """
  if len(backbones) != len(model.description.backbones):
    raise BankError(
        f'networks: the model has {len(model.description.backbones)}, given are {len(backbones)}. Give those '
        'that it was made with, in their order.')
  model.description.check({
      'detector': detector.name, 'settings': detector.resolved(backbones).fit_settings(),
      'backbones': [network_fields(backbone) for backbone in backbones]})


def network_fields(backbone: Backbone) -> dict[str, Any]:
  """Picks the fields of `identity` that must agree, whatever the network was made from."""
  return {k: v for k, v in to_json(identity(backbone)).items() if k != 'source'}


def maps_of(backbone: Backbone) -> Callable:
  """Makes the function (variables, images [b, h, w, 3] uint8) -> feature maps of the layers, in a list.

  It is the same object for the same network, so that what is made of it can be cached, and is compiled once.
  """
  return _maps_fn(backbone.apply, backbone.layers, backbone.mean, backbone.std)


@functools.lru_cache(maxsize=16)
def _maps_fn(apply, layers, mean, std):
  """Makes the function of `maps_of`, once for the same arguments."""

  def maps(variables, images):
    found = apply(variables, normalize(images, mean, std))
    return [found[layer] for layer in layers]

  return maps


@functools.lru_cache(maxsize=16)
def pooled_fn(maps: Callable) -> Callable:
  """Makes, from `maps_of`, (variables, images) -> the mean over positions of every map, a tuple of [b, c]."""

  def pooled(variables, images):
    return tuple(jnp.mean(m, axis=(1, 2)) for m in maps(variables, images))

  return pooled


@functools.lru_cache(maxsize=16)
def maxima_fn(fn: Callable) -> Callable:
  """Makes, from `ScoreFn.fn`, the function (parameters, images) -> `CrossScores` of the batch.

  What is left of a map is one number, so that maps need not leave the device.
  """
  return lambda parameters, images: _maxima(fn(parameters, images))


def with_maxima(score_fn: ScoreFn) -> ScoreFn:
  """Makes a score function return `CrossScores`."""
  if isinstance(score_fn, HostScoreFn):
    return dataclasses.replace(score_fn, finish=lambda results: _maxima(score_fn.finish(results)))
  return dataclasses.replace(score_fn, fn=maxima_fn(score_fn.fn))


def in_tuple(score_fn: ScoreFn) -> ScoreFn:
  """Makes a score function return its result in a tuple, as those of several ratios do."""
  if isinstance(score_fn, HostScoreFn):
    return dataclasses.replace(score_fn, finish=lambda results: (score_fn.finish(results),))
  return dataclasses.replace(score_fn, fn=result_in_tuple(score_fn.fn))


@functools.lru_cache(maxsize=16)
def result_in_tuple(fn: Callable) -> Callable:
  """Makes a function of parameters and images return its result in a tuple."""
  return lambda parameters, images: (fn(parameters, images),)


def _maxima(scores):
  """Converts `Scores` to `CrossScores`, which keep the largest value of each map."""
  return CrossScores(scores.image, None if scores.map is None else scores.map.max(axis=(1, 2)))


def first_of(batches: Iterable[Batch]) -> tuple[Batch, Iterator[Batch]]:
  """Looks at the first batch: returns it, and an iterator over all of them.

  Raises:
    ValueError: there is none.
  """
  batches = iter(batches)
  first = next(batches, None)
  if first is None:
    raise ValueError(NO_IMAGES)
  return first, itertools.chain([first], batches)


def stream(
    fn: Callable, parameters: Any, batches: Iterable[Batch], *, image_size: tuple[int, int] | None = None,
    to_host: bool = True,
) -> Iterator[tuple[Batch, Any]]:
  """Yields every batch and `fn(parameters, images)`, as NumPy arrays by default, padding included.

  The next batches are sent off before one is waited for.

  Args:
    fn: a pure function; the same object every time, because it is compiled once for each.
    parameters: its parameters, put on the devices by `parallel.replicate` or `parallel.split`.
    batches: batches whose size is a multiple of the number of local devices.
    image_size: (height, width) that images must have; None where any will do.
    to_host: whether results leave the device; else they are as `parallel.data_parallel` leaves them.

  Raises:
    BankError: images of another size.
  """
  run, pending = parallel.data_parallel(fn), None

  def finished(batch, results):
    return batch, parallel.gather(results) if to_host else results

  for batch, images in _sent_ahead(batches, image_size):
    results = run(parameters, images)
    if to_host:
      parallel.fetch(results)
    if pending:
      yield finished(*pending)
    pending = batch, results
  if pending:
    yield finished(*pending)


def _sent_ahead(batches, image_size):
  """Yields every batch and its images, on their way to the device, once the next ones are on theirs.

  A program that asks the host something keeps its caller until then: what is sent only afterwards finds
  the device idle.
  """
  ahead = None
  for batch in batches:
    if image_size is not None and tuple(batch.image.shape[1:3]) != tuple(image_size):
      raise BankError(
          f'image_size: the model has {list(image_size)}, these images {list(batch.image.shape[1:3])} '
          '(height, width). Use the same preprocessing, or fit again.')
    sent = batch, parallel.send(batch.image)
    if ahead:
      yield ahead
    ahead = sent
  if ahead:
    yield ahead


def place(score_fn: ScoreFn) -> tuple[Any, ...]:
  """Puts the parameters of a score function on the local devices, whole or in pieces as it says."""
  sharded = score_fn.sharded or (False,) * len(score_fn.parameters)
  return tuple(
      parallel.split(p) if split else parallel.replicate(p)
      for p, split in zip(score_fn.parameters, sharded, strict=True))


def predict(
    score_fn: ScoreFn, batches: Iterable[Batch], *, image_size: tuple[int, int] | None = None,
    parameters: tuple[Any, ...] | None = None) -> Iterator[tuple[np.ndarray, Any]]:
  """Yields for every batch the `index` of its images, and their scores; padding is dropped.

  Args:
    score_fn: what `Detector.score_fn` made.
    batches: batches whose size is a multiple of the number of local devices.
    image_size: (height, width) of the model's images.
    parameters: what `place` made of the function's; None to have them placed now.

  Raises:
    BankError: images of another size.
  """
  parameters = place(score_fn) if parameters is None else parameters
  for batch, results in stream(score_fn.fn, parameters, batches, image_size=image_size):
    if not batch.valid.all():  # a copy of the maps, which most batches are spared
      results = jax.tree.map(lambda x, valid=batch.valid: x[valid], results)
    yield batch.index[batch.valid], finished(score_fn, results)


def finished(score_fn: ScoreFn, results: Any) -> Any:
  """Finishes scores by the step on the host, if there is one."""
  return score_fn.finish(results) if isinstance(score_fn, HostScoreFn) else results


def collect(
    fn: Callable, parameters: Any, batches: Iterable[Batch], num_images: int, run: Run,
) -> tuple[tuple[np.ndarray, ...], tuple[int, int]]:
  """Runs `fn(parameters, images)`, a tuple of arrays [b, ...], over all images.

  Args:
    fn: a pure function; the same object every time, because it is compiled once for each.
    parameters: its parameters, a pytree.
    batches: images of one size; the batch size is a multiple of the number of local devices.
    num_images: how many images the batches hold at most.
    run: its scratch folder, if there is one, takes a temporary file that holds the results instead of
      memory; it has no name, and is gone with the arrays. The stage of the progress is 'embed'.

  Returns:
    The results [n, ...] in the order of the batches, padding dropped, and the (height, width) of the
    images.

  Raises:
    ValueError: no images.
  """
  arrays, image_size, done = None, None, 0
  for batch, values in stream(fn, parallel.replicate(parameters), batches):
    if arrays is None:
      image_size = tuple(batch.image.shape[1:3])
      arrays = tuple(_empty((num_images, *v.shape[1:]), v.dtype, run.scratch) for v in values)
    count = int(batch.valid.sum())
    for array, value in zip(arrays, values, strict=True):
      array[done:done + count] = value[batch.valid]
    done += count
    run.progress('embed', done, num_images)
  if not done:
    raise ValueError(NO_IMAGES)
  return tuple(array[:done] for array in arrays), image_size


def made(
    detector: Detector, backbones: tuple[Backbone, ...], arrays: dict[str, np.ndarray], data: Data,
    read: provenance.Recorder, run: Run, *, image_size: tuple[int, int],
    grid: tuple[int, int] | None = None, first: int | None = None) -> Model:
  """Makes a model, and tells in its description what is to be told of any fit.

  Args:
    read: which of the data's images there were, and their pictures.
    image_size: (height, width) of the images.
    grid: (rows, columns) of the patches of an image, where there are patches.
    first: the position in the data of the first image that this process could have read, where each of
      several processes read a part; None where each read all.
  """
  index, files, coloured = np.array(read.index, np.int32), read.files, np.array(read.coloured, np.int32)
  if first is not None:
    index, files = processes.joined(index + np.int32(first)), processes.joined_files(files)
    coloured = processes.joined(coloured) if len(coloured) else coloured
  given = data.examples
  good = [i for i, position in enumerate(index) if not given[position].label]
  names = tuple(given[position].image_path for position in index[good])
  files = [files[i] for i in good] if files else files
  return Model(arrays | provenance.pack(files), Description(
      detector=detector.name, settings=detector.settings(),
      backbones=tuple(identity(backbone) for backbone in backbones),
      image_size=tuple(image_size), grid=grid, num_images=len(good), num_defects=len(index) - len(good),
      images=names if all(names) else (), num_skipped=len(given) - len(index),
      colours=provenance.colours(coloured),
      category=', '.join(dict.fromkeys(given[position].category for position in index)), seed=run.seed,
      preprocessing=data.preprocessing,
      outside_range=getattr(data, 'outside_range', None) or 0.0, device=jax.default_backend(),
      versions={'patchcore_jax': patchcore_jax.__version__, 'jax': jax.__version__}))


def _empty(shape, dtype, scratch):
  """Makes an array in memory or, with a scratch folder, in a file without a name there."""
  if scratch is None:
    return np.empty(shape, dtype)
  with TemporaryFile(dir=scratch) as file:  # the mapping outlives the file object
    return np.memmap(file, dtype, 'w+', shape=shape)
