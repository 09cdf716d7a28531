"""SPADE (Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", 2020)."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from patchcore_jax import parallel, scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Data, HostScoreFn, Run, Scores
from patchcore_jax.detectors.settings import SPADE
from patchcore_jax.embedding import patch_embeddings
from patchcore_jax.search import neighbors, search_bank
from patchcore_jax.search.search_bank import SearchBank
from patchcore_jax.settings import EmbeddingSpec, ScoringSpec, SearchSpec

_PYRAMID = EmbeddingSpec('mean', patch_size=1)  # maps enlarged bilinearly to the first, concatenated


def fit(detector: SPADE, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Keeps the features of good images (sections 3.1 and 3.4).

  The last of the backbone's layers, averaged over its positions, tells which images are alike; the
  others are the pyramid, enlarged to the grid of the first (bilinearly: the paper does not say how) and
  concatenated. The paper's layers are layer1, layer2, layer3 and layer4 of a WideResNet-50.

  Memory on the host: n p d floats, with p positions of d channels. That is 22 MB an image for the paper's
  network at 224, 7 GB for 300 images.

  `run.scratch`, if it is given, takes a temporary file with the features instead of memory.

  Returns:
    A `Model` of the arrays pyramids [n, p, d] and pooled [n, c], float32.

  Raises:
    ValueError: one layer only, or fewer images than are to be compared with.
  """
  (backbone,) = backbones
  if len(backbone.layers) < 2:
    raise ValueError(
        f'SPADE needs layers for the pyramid and, last, one for the image, got '
        f'{", ".join(backbone.layers)}. Set the layers, for a ResNet layer1, layer2, layer3, layer4.')
  _check_enough(len(data.examples), detector)
  read = Recorder(data.batches(), run.keep_images)
  (pyramids, pooled), image_size = streaming.collect(
      _features_fn(streaming.maps_of(backbone)), backbone.variables, read, len(data.examples), run)
  _check_enough(len(pyramids), detector)
  n, rows, columns, dim = pyramids.shape
  return streaming.made(
      detector, (backbone,), {'pyramids': pyramids.reshape(n, rows * columns, dim), 'pooled': pooled}, data,
      read, run, image_size=image_size, grid=(rows, columns))


def score_fn(
    detector: SPADE, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> HostScoreFn:
  """Makes the score function (`Detector.score_fn`).

  It finds the nearest training images (section 3.2), then the nearest of their pixels to every pixel (3.3).

  The search is exact, and long: (K p) p d products for an image, 1.8e12 with the paper's network and
  settings at 224; fewer where `search_bank.prepare` can reduce d. One image is searched on each device at
  a time. Memory beside the model:
    - its vectors as `search_bank.prepare` reduces them, twice while they are made: as much as the model
      where they cannot be reduced;
    - on each device the K images with which one is compared, as they are and reduced: 1.1 GB twice in
      the paper's setting;
    - the pyramids of two batches.

  An image's score is the mean distance of its pooled features to those of the K images, and has another unit
  than the map.

  Raises:
    ValueError: more images or neighbours than there are, or a sharded bank.
  """
  (backbone,), image_size = backbones, model.description.image_size
  _check_enough(model.description.num_images, detector)
  if search.bank != 'replicated':
    raise ValueError(f"search.bank={search.bank!r}: SPADE's search has no bank to shard.")
  pyramids = model.arrays['pyramids']
  prepared = search_bank.prepare(pyramids.reshape(-1, pyramids.shape[-1]), search.shortlist)
  pixels_fn = parallel.data_parallel(_pixels_fn(model.description.grid, image_size, detector))

  def finish(results):
    scores, nearest, queries = results
    maps = [
        _search(pixels_fn, prepared, len(pyramids), images, part)
        for images, part in _for_devices(nearest, queries)]
    maps = np.concatenate(maps)[:len(scores)] if maps else np.empty((0, *image_size), np.float32)
    return Scores(scores, maps)

  return HostScoreFn(
      _images_fn(_features_fn(streaming.maps_of(backbone)), detector.num_images, detector.distance),
      (backbone.variables, search_bank.prepare(model.arrays['pooled'], 'float32')), finish=finish)


def _check_enough(num_images, detector):
  """Raises ValueError where there are fewer training images than an image is compared with."""
  if num_images < detector.num_images:
    raise ValueError(
        f'spade.num_images={detector.num_images}: an image cannot be compared with so many, there are '
        f'{num_images} training images. Lower it.')


def _for_devices(*arrays):
  """Yields the arrays in pieces of as many rows as devices; the last row fills the last piece."""
  devices = jax.local_device_count()
  arrays = [x[np.minimum(np.arange(-(-len(x) // devices) * devices), len(x) - 1)] for x in arrays]
  for i in range(0, len(arrays[0]), devices):
    yield [x[i:i + devices] for x in arrays]


def _search(pixels_fn, prepared, num_images, images, queries):
  """Computes the maps of one image for each device; `images` [devices, K] are those it is compared with."""
  parameters = _on_devices([_part(prepared, num_images, chosen) for chosen in images])
  return parallel.gather(pixels_fn(parameters, queries))


def _on_devices(banks):
  """Puts one bank on each device; as a function of its own, so that the copies on the host end with it."""
  if len(banks) == 1:
    return parallel.replicate(banks[0])
  return parallel.split(jax.tree.map(lambda *x: np.stack(x), *banks))


def _part(prepared, num_images, images):
  """Takes the pixels of some training images out of the `SearchBank` of all."""
  def of_rows(x):
    return x.reshape(num_images, -1, *x.shape[1:])[images].reshape(-1, *x.shape[1:])

  columns = prepared.columns
  columns = columns.reshape(len(columns), num_images, -1)[:, images].reshape(len(columns), -1)
  rows = of_rows(prepared.rows)
  return prepared._replace(
      rows=rows, columns=columns, squares=of_rows(prepared.squares), count=np.int32(len(rows)))


@functools.lru_cache(maxsize=16)
def _features_fn(maps_fn):
  """Makes the function (variables, images) -> (pyramids [b, rows, columns, d], pooled [b, c])."""

  def features(variables, images):
    *pyramid, last = maps_fn(variables, images)
    return patch_embeddings(pyramid, _PYRAMID), last.mean(axis=(1, 2))

  return features


@functools.lru_cache(maxsize=16)
def _images_fn(features_fn, num_images, distance):
  """Makes the function that finds the nearest training images.

  It maps ((variables, bank of pooled features), images) to image scores [b], the nearest training images
  [b, K] and pyramids [b, p, d].
  """

  def images_fn(parameters, images):
    variables, bank = parameters
    pyramids, pooled = features_fn(variables, images)
    distances_sq, nearest = neighbors.nearest_neighbors(pooled, bank, k=num_images)
    scores = scoring.patch_scores(distances_sq, ScoringSpec(distance=distance))
    return scores, nearest, pyramids.reshape(len(pyramids), -1, pyramids.shape[-1])

  return images_fn


@functools.lru_cache(maxsize=16)
def _pixels_fn(grid, image_size, detector):
  """Makes the function (bank, pyramids [1, p, d]) -> anomaly maps [1, h, w]."""
  scoring_spec = ScoringSpec(
      num_neighbors=detector.num_neighbors, distance=detector.distance, sigma=detector.sigma)

  def pixels(bank: SearchBank, queries):
    distances_sq, _ = neighbors.nearest_neighbors(queries[0], bank, k=detector.num_neighbors)
    scores = scoring.patch_scores(distances_sq, scoring_spec).reshape(1, *grid)
    return scoring.anomaly_maps(scores, image_size, scoring_spec)

  return pixels
