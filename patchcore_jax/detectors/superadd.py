"""SuperADD (Roming et al., arXiv 2605.14808): images of high resolution in windows, a bank for each layer,
thinned by density, and binary maps whose gaps are closed."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax import morphology, parallel, scoring, windows
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import streaming, tokens
from patchcore_jax.detectors.base import LIVE, LOOP_FREE, Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.settings import SuperADD
from patchcore_jax.search import neighbors, search_bank
from patchcore_jax.search.thinning import thinned
from patchcore_jax.settings import SearchSpec

_BLUR_EDGES = 'reflect'  # of a blur that only anomalib has


def fit(detector: SuperADD, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Thins the patches of good images to a bank for each layer, and sets a threshold by those held out.

  Memory on the host: n r c d floats, with r x c patches of d channels in all layers: 156 MB an image of
  1530 x 1280 px for ViT-H+/16 and four layers, on disk if `run.scratch` is given, but for one layer at a
  time.

  Returns:
    A `Model` of the arrays
      bank_0, bank_1, ... [m, c_l] float32, of each layer, in the order of the images;
      pixel_threshold [1] float64, of `binary_maps`, where images are held out.

  Raises:
    ValueError: layers of several grids, windows that do not fit, no images, or one where others are held out.
  """
  (backbone,), read = backbones, Recorder(data.batches(), run.keep_images)
  rng = np.random.RandomState(run.seed)  # the generator of the released code
  layers, image_size = streaming.collect(
      _tokens_fn(streaming.maps_of(backbone), detector.window, detector.overlap, True), backbone.variables,
      _brightened(read, detector, run.seed), len(data.examples), run)
  n, rows, columns, _ = layers[0].shape
  held = _held_out(np.arange(n), detector)
  if held.any():
    run.notify(
        f'{held.sum()} of {n} images are held out of the bank, for the threshold of binary maps; '
        'super_add.held_out=0 holds out none')
  if held.all():
    raise ValueError(
        f'super_add.held_out={detector.held_out} leaves no image of {n} for the bank: expected more, or 0 to '
        'hold none out.')
  arrays = {}
  for i, layer in enumerate(layers):
    vectors = np.concatenate([layer[at].reshape(rows * columns, -1) for at in np.flatnonzero(~held)])
    kept = thinned(
        vectors, detector.bank_rows, rounds=detector.rounds, num_neighbors=detector.thinning_neighbors,
        rng=rng, progress=lambda done, all_of, i=i: run.progress(
            'thin', i * all_of + done, len(layers) * all_of))
    arrays[f'bank_{i}'] = np.ascontiguousarray(vectors[kept])
  if held.any():
    seen = _seen(streaming.maps_of(backbone), backbone.variables, image_size, detector.window)
    banks = [jnp.asarray(bank) for bank in arrays.values()]  # on the device once for all images
    found = [
        maps(patch_scores([layer[at][None] for layer in layers], banks), detector, image_size, seen)
        for at in np.flatnonzero(held)]
    threshold = np.quantile(np.concatenate(found).astype(np.float64), detector.quantile) * detector.factor
    arrays['pixel_threshold'] = np.array([threshold])
  return streaming.made(
      detector, (backbone,), arrays, data, read, run, image_size=image_size, grid=(rows, columns))


def score_fn(
    detector: SuperADD, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`).

  Its parameters are the network's variables and the banks, made ready for the search, which is exact.
  """
  (backbone,), devices = backbones, jax.local_device_count()
  sharded = search.bank == 'sharded' and devices > 1 and program == LIVE
  banks = [model.arrays[f'bank_{i}'] for i in range(len(backbone.layers))]
  prepared = tuple(
      search_bank.in_one_pass(bank) if program == LOOP_FREE else search_bank.prepare(
          bank, search.shortlist, num_shards=devices if sharded else None) for bank in banks)
  fn = _scores_fn(
      streaming.maps_of(backbone), detector, tuple(map(len, banks)), parallel.AXIS if sharded else None,
      program)
  return ScoreFn(fn, (backbone.variables, prepared), (False, sharded))


def patch_scores(
    layers: Sequence[jax.Array], banks: Iterable[Any], *, sizes: Sequence[int] | None = None, **search,
) -> jax.Array:
  """Scores patches by their distance to the nearest of the bank, over the number of channels.

  Args:
    layers: [b, rows, columns, c_l] float32 each.
    banks: [m_l, c_l] each, or what `search_bank.prepare` made of it.
    sizes: rows of each bank; None for those of the arrays.
    search: see `neighbors.nested_nearest_neighbors`.

  Returns:
    The mean over layers, [b, rows, columns] float32.
  """
  found = []
  for i, (layer, bank) in enumerate(zip(layers, banks, strict=True)):
    dim = layer.shape[-1]
    ((distances_sq, _),) = neighbors.nested_nearest_neighbors(
        layer.reshape(-1, dim), bank, (len(bank) if sizes is None else sizes[i],), **search)
    found.append(jnp.sqrt(distances_sq[:, 0]).reshape(layer.shape[:3]) / dim)
  return sum(found) / len(found)


def maps(
    patches: jax.Array, detector: SuperADD, image_size: tuple[int, int], seen: tuple[int, int]) -> jax.Array:
  """Enlarges patch scores to the maps of thresholds and binary maps: [b, *map_size] float32.

  Args:
    patches: [b, rows, columns] float32.
    detector: its `map_scale`.
    image_size: (height, width) of the images.
    seen: that of the images with their edges repeated, which the patches cover.
  """
  height, width = map_size(detector, image_size)
  return scoring.enlarged(patches, map_size(detector, seen))[:, :height, :width]


def map_size(detector: SuperADD, image_size: tuple[int, int]) -> tuple[int, int]:
  """Computes the size of the maps of thresholds and binary maps, (height, width) in pixels.

  >>> map_size(SuperADD(), (640, 1280))
  (256, 512)
  """
  return tuple(max(1, int(side * detector.map_scale)) for side in image_size)


def binary_maps(model: Model, anomaly_maps: np.ndarray) -> np.ndarray:
  """Marks the defects of images, with gaps between what is above the threshold closed along lines.

  Args:
    model: of a fit with images held out.
    anomaly_maps: [b, h, w], `Scores.map`.

  Returns:
    [b, *map_size] bool. Where the images were scaled by 0.625, that is a quarter of their original size.

  Raises:
    ValueError: a model without the threshold.
  """
  from patchcore_jax.detectors.settings import of_model

  detector = of_model(model)
  if 'pixel_threshold' not in model.arrays:
    raise ValueError('The model has no threshold of its own: expected one of a fit with super_add.held_out.')
  threshold, size = model.arrays['pixel_threshold'][0], map_size(detector, model.description.image_size)
  return np.stack([
      marked(found, threshold, detector.radius, detector.lower)
      for found in np.asarray(scoring.enlarged(jnp.asarray(anomaly_maps), size))])


def marked(anomaly_map: np.ndarray, threshold: float, radius: int, lower: float) -> np.ndarray:
  """Marks what is above the threshold, closes gaps that are above a lower one, and fills holes.

  Args:
    anomaly_map: [h, w].
    threshold: above it, a pixel is marked.
    radius: half the length of the lines along which gaps are closed, in pixels.
    lower: the share of the threshold at or below which none is marked.

  Returns:
    [h, w] bool.
  """
  closed = morphology.closed_along_lines(anomaly_map > threshold, radius)
  return morphology.eroded(morphology.without_holes(closed & (anomaly_map > lower * threshold)))


def _held_out(count: np.ndarray, detector: SuperADD) -> np.ndarray:
  """Tells which of the images, by their number, are kept for the threshold."""
  return count % detector.held_out == 0 if detector.held_out else np.zeros(len(count), bool)


def _brightened(batches: Iterable[Batch], detector: SuperADD, seed: int) -> Iterator[Batch]:
  """Multiplies each image for the bank by a factor of its own; those held out stay as they are."""
  done = 0
  for batch in batches:
    count = done + np.arange(batch.valid.sum())
    done += len(count)
    factors = np.ones(len(batch.image))
    factors[batch.valid] = np.where(_held_out(count, detector), 1, [
        np.random.default_rng([seed, i]).uniform(1 - detector.brightness, 1 + detector.brightness)
        for i in count])
    changed = np.rint(batch.image * factors[:, None, None, None]).clip(0, 255).astype(np.uint8)
    yield batch._replace(image=changed)


@functools.lru_cache(maxsize=16)
def _tokens_fn(maps_fn: Callable, window: int, overlap: int, loops: bool) -> Callable:
  """Makes the function (variables, images) -> maps [b, rows, columns, c] of each layer, window by window."""

  def found(variables, images):
    if not window:
      return tuple(tokens.on_one_grid(maps_fn(variables, images), SuperADD.title))
    size = images.shape[1:3]
    if window > min(size):
      raise ValueError(
          f'super_add.window={window}: expected at most the sides of the images, which are {size[0]} x '
          f'{size[1]} pixels. Set a smaller window, or 0 for images as they are.')
    pixels = _cell(maps_fn, variables, window)
    if window % pixels or overlap % pixels:
      raise ValueError(
          f'super_add.window={window}, overlap={overlap}: expected multiples of the {pixels} pixels of a '
          'patch.')
    rows, columns = (
        windows.plan(-(-length // pixels), window // pixels, overlap // pixels) for length in size)
    return tuple(windows.joined_maps(
        functools.partial(maps_fn, variables), images, rows, columns, window, pixels, loops=loops))

  return found


def _cell(maps_fn, variables, window):
  """Computes the side of a patch, in pixels, by the grid that the network makes of a window."""
  of_window = jax.eval_shape(maps_fn, variables, jax.ShapeDtypeStruct((1, window, window, 3), jnp.uint8))
  return window // tokens.on_one_grid(of_window, SuperADD.title)[0].shape[1]


def _seen(maps_fn, variables, size, window):
  """Computes the size of what patches cover: in windows, whole patches, to which edges are repeated."""
  if not window:
    return size
  pixels = _cell(maps_fn, variables, window)
  return tuple(-(-length // pixels) * pixels for length in size)


@functools.lru_cache(maxsize=16)
def _scores_fn(
    maps_fn: Callable, detector: SuperADD, sizes: tuple[int, ...], axis_name: str | None, program: str,
) -> Callable:
  """Makes the function ((variables, banks), images) -> `Scores`."""
  tokens_fn = _tokens_fn(maps_fn, detector.window, detector.overlap, program != LOOP_FREE)

  def score(parameters, images):
    variables, banks = parameters
    patches = patch_scores(
        tokens_fn(variables, images), banks, sizes=sizes, axis_name=axis_name, kernels=program == LIVE)
    height, width = size = images.shape[1:3]
    found = scoring.enlarged(
        patches, _seen(maps_fn, variables, size, detector.window), sigma=detector.sigma, edges=_BLUR_EDGES)
    found = found[:, :height, :width]
    worst = jnp.argmax(patches.reshape(len(patches), -1), axis=1).astype(jnp.int32)
    return Scores(scoring.top_share_scores(found, detector.top_share), found, {'patch': worst})

  return score
