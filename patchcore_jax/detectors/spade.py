"""SPADE (Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", 2020)."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from patchcore_jax import parallel, scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import base
from patchcore_jax.detectors import model as models
from patchcore_jax.detectors.base import Prediction, Progress
from patchcore_jax.detectors.model import Model
from patchcore_jax.embedding import EmbeddingSpec, patch_embeddings
from patchcore_jax.scoring import ScoringSpec
from patchcore_jax.search import neighbors
from patchcore_jax.search.neighbors import SearchBank, SearchSpec

_PYRAMID = EmbeddingSpec('mean', patch_size=1)  # maps enlarged bilinearly to the first, concatenated


@dataclasses.dataclass(frozen=True)
class Spec:
  """Settings of the prediction; the defaults are the paper's for MVTec AD (section 3.5). None is of the
  fit, which keeps everything.

  Attributes:
    num_images: K, the training images nearest to an image, with which it is compared.
    num_neighbors: kappa, the pixels of those images nearest to a pixel.
    distance: 'squared', as the paper's equations 2 and 3 have it, or 'root'.
    sigma: of the Gaussian blur of the anomaly map, in pixels; 0 for none.

  Raises:
    ValueError: values out of range.
  """

  num_images: int = 50
  num_neighbors: int = 1
  distance: str = 'squared'
  sigma: float = 4.0

  def __post_init__(self):
    if self.num_images < 1 or self.num_neighbors < 1:
      raise ValueError(
          f'spade.num_images={self.num_images}, num_neighbors={self.num_neighbors}: expected at least 1.')
    if self.distance not in ('squared', 'root'):
      raise ValueError(f"spade.distance={self.distance!r}: expected 'squared' or 'root'.")
    if not 0 <= self.sigma < math.inf:
      raise ValueError(f'spade.sigma={self.sigma}: expected 0 or more pixels.')


def describe(backbone: Backbone) -> dict:
  """What a model must agree on with the network it is used with."""
  return models.describe('spade', backbone)


def fit(
    backbone: Backbone,
    batches: Iterable[Batch],
    num_images: int,
    *,
    spec: Spec,
    progress: Progress | None = None,
    scratch: str | None = None,
) -> Model:
  """Keeps the features of good images (sections 3.1 and 3.4).

  The last of the backbone's layers, averaged over its positions, tells which images are alike; the
  others are the pyramid, enlarged to the grid of the first (bilinearly: the paper does not say how) and
  concatenated. The paper's layers are layer1, layer2, layer3 and layer4 of a WideResNet-50.

  Memory on the host: n p d floats, with p positions of d channels. That is 22 MB an image for the paper's
  network at 224, 7 GB for 300 images.

  Args:
    backbone: frozen network with two layers or more.
    batches: good images of one size; the batch size is a multiple of the number of local devices.
    num_images: how many images the batches hold at most.
    spec: settings, of which there must be images enough.
    progress: called with ('embed', done, num_images).
    scratch: a folder for a temporary file that holds the features, or None for memory.

  Returns:
    A `Model` of the arrays pyramids [n, p, d] and pooled [n, c], float32.

  Raises:
    ValueError: one layer only, or fewer images than are to be compared with.
  """
  if len(backbone.layers) < 2:
    raise ValueError(
        f'SPADE needs layers for the pyramid and, last, one for the image, got '
        f'{", ".join(backbone.layers)}. Set the layers, for a ResNet layer1, layer2, layer3, layer4.')
  _check_enough(num_images, spec)
  (pyramids, pooled), image_size = models.collect(
      _features_fn(base.maps_of(backbone)), backbone.variables, batches, num_images,
      progress=progress, scratch=scratch)
  _check_enough(len(pyramids), spec)
  n, rows, columns, dim = pyramids.shape
  return models.make(
      {'pyramids': pyramids.reshape(n, rows * columns, dim), 'pooled': pooled}, describe(backbone),
      num_images=n, grid=[rows, columns], image_size=image_size)


def predict(
    backbone: Backbone,
    model: Model,
    batches: Iterable[Batch],
    *,
    spec: Spec,
    search: SearchSpec | None = None,
) -> Iterator[Prediction]:
  """Scores images: the nearest training images (section 3.2), then every pixel among theirs (3.3).

  The search is exact, and long: (K p) p d products for an image, 1.8e12 with the paper's network and
  settings at 224; fewer where `neighbors.prepare` can reduce d. One image is searched on each device at
  a time. Memory beside the model:
    - its vectors as `neighbors.prepare` reduces them, twice while they are made: as much as the model
      where they cannot be reduced;
    - on each device the K images with which one is compared, as they are and reduced: 1.1 GB twice in
      the paper's setting;
    - the pyramids of two batches.

  Args:
    backbone: as in `fit`.
    model: from `fit`.
    batches: images of one size; the batch size is a multiple of the number of local devices.
    spec: settings.
    search: how neighbours are found; no influence on the result. Banks are not sharded here.

  Yields:
    A `Prediction` for every batch, with s = 1. An image's score is the mean distance of its pooled
    features to those of the K images, and has another unit than the map.

  Raises:
    BankError: the model was made with another detector, network or image size.
    ValueError: more images or neighbours than there are, or a sharded bank.
  """
  store.check(model.description, describe(backbone))
  _check_enough(model.description['num_images'], spec)
  search = search or SearchSpec()
  if search.bank != 'replicated':
    raise ValueError(f"search.bank={search.bank!r}: SPADE's search has no bank to shard.")
  pyramids = model.arrays['pyramids']
  prepared = neighbors.prepare(pyramids.reshape(-1, pyramids.shape[-1]), search.shortlist)
  images_fn = _images_fn(
      _features_fn(base.maps_of(backbone)), spec.num_images, spec.distance)
  parameters = backbone.variables, neighbors.prepare(model.arrays['pooled'], 'float32')
  pixels_fn = parallel.data_parallel(_pixels_fn(
      tuple(model.description['grid']), tuple(model.description['image_size']), spec))
  for batch, (scores, nearest, queries) in base.stream(
      images_fn, parallel.replicate(parameters), batches, expected=model.description):
    valid = batch.valid
    maps = [
        _search(pixels_fn, prepared, len(pyramids), images, part)
        for images, part in _for_devices(nearest[valid], queries[valid])]
    maps = np.concatenate(maps)[:valid.sum()] if maps else np.empty((0, *batch.image.shape[1:3]), np.float32)
    yield Prediction(batch.index[valid], scores[valid][None], maps[None])


def _check_enough(num_images, spec):
  if num_images < spec.num_images:
    raise ValueError(
        f'spade.num_images={spec.num_images}: an image cannot be compared with so many, there are '
        f'{num_images} training images. Lower it.')


def _for_devices(*arrays):
  """The arrays in pieces of as many rows as there are devices; the last row fills the last piece."""
  devices = jax.local_device_count()
  arrays = [x[np.minimum(np.arange(-(-len(x) // devices) * devices), len(x) - 1)] for x in arrays]
  for i in range(0, len(arrays[0]), devices):
    yield [x[i:i + devices] for x in arrays]


def _search(pixels_fn, prepared, num_images, images, queries):
  """Maps of one image for each device: `images` [devices, K] are those it is compared with."""
  parameters = _on_devices([_part(prepared, num_images, chosen) for chosen in images])
  return parallel.gather(pixels_fn(parameters, queries))


def _on_devices(banks):
  """One bank for each device. A function of its own, so that the copies on the host end with it."""
  if len(banks) == 1:
    return parallel.replicate(banks[0])
  return parallel.split(jax.tree.map(lambda *x: np.stack(x), *banks))


def _part(prepared, num_images, images):
  """The `SearchBank` of all pixels of some training images."""
  def of_rows(x):
    return x.reshape(num_images, -1, *x.shape[1:])[images].reshape(-1, *x.shape[1:])

  columns = prepared.columns
  columns = columns.reshape(len(columns), num_images, -1)[:, images].reshape(len(columns), -1)
  rows = of_rows(prepared.rows)
  return prepared._replace(
      rows=rows, columns=columns, squares=of_rows(prepared.squares), count=np.int32(len(rows)))


@functools.lru_cache(maxsize=16)
def _features_fn(maps_fn):
  """(variables, images) -> (pyramids [b, rows, columns, d], pooled [b, c])."""

  def features(variables, images):
    *pyramid, last = maps_fn(variables, images)
    return patch_embeddings(pyramid, _PYRAMID), last.mean(axis=(1, 2))

  return features


@functools.lru_cache(maxsize=16)
def _images_fn(features_fn, num_images, distance):
  """((variables, bank of pooled features), images) -> image scores [b], the nearest training images
  [b, K], pyramids [b, p, d]."""

  def images_fn(parameters, images):
    variables, bank = parameters
    pyramids, pooled = features_fn(variables, images)
    distances_sq, nearest = neighbors.nearest_neighbors(pooled, bank, k=num_images)
    scores = scoring.patch_scores(distances_sq, ScoringSpec(distance=distance))
    return scores, nearest, pyramids.reshape(len(pyramids), -1, pyramids.shape[-1])

  return images_fn


@functools.lru_cache(maxsize=16)
def _pixels_fn(grid, image_size, spec):
  """(bank, pyramids [1, p, d]) -> anomaly maps [1, h, w]."""
  scoring_spec = ScoringSpec(
      num_neighbors=spec.num_neighbors, distance=spec.distance, sigma=spec.sigma)

  def pixels(bank: SearchBank, queries):
    distances_sq, _ = neighbors.nearest_neighbors(queries[0], bank, k=spec.num_neighbors)
    scores = scoring.patch_scores(distances_sq, scoring_spec).reshape(1, *grid)
    return scoring.anomaly_maps(scores, image_size, scoring_spec)

  return pixels
