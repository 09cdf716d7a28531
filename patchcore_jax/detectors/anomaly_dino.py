"""AnomalyDINO (Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2", WACV
2025): every patch of a few turned images, and the cosine distance to the nearest of them."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax import foreground, parallel, rotation, scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import LIVE, LOOP_FREE, Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.settings import AnomalyDINO
from patchcore_jax.embedding import patch_embeddings, unit_length
from patchcore_jax.search import neighbors, search_bank
from patchcore_jax.settings import EmbeddingSpec, ScoringSpec, SearchSpec

_TOKENS = EmbeddingSpec('mean', patch_size=1)  # as they are; those of several layers are concatenated


def fit(detector: AnomalyDINO, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Keeps every patch of every good image, turned by each angle (section 3.1).

  Memory on the host: n r p d floats, with r rotations of p patches of d channels: 13 MB an image for ViT-S/14
  at 448 px and 8 rotations, on disk while they are made if `run.scratch` is given.

  Returns:
    A `Model` of the arrays
      embeddings [m, d] float32, of unit length where the distance is 'cosine';
      indices [m] int32, the patch of the upright image in which the middle of each lies, as `provenance` has
        them: image * p + patch.

  Raises:
    ValueError: no images.
  """
  foreground.announce(detector.foreground, run.notify)
  (backbone,), read = backbones, Recorder(data.batches(), run.keep_images)
  first, batches = streaming.first_of(read)
  size = first.image.shape[1:3]
  tables = rotation.tables_of_angles(size, detector.rotations)
  embed = rotation.embed_turned(_directed_fn(streaming.maps_of(backbone), detector.distance))
  (embeddings,), image_size = streaming.collect(
      streaming.result_in_tuple(embed), (backbone.variables, *tables), batches, len(data.examples), run)
  n, _, rows, columns, dim = embeddings.shape
  patches = rotation.upright_patches(*tables, size, (rows, columns))
  indices = np.arange(n, dtype=np.int32)[:, None] * (rows * columns) + patches.reshape(1, -1)
  return streaming.made(
      detector, (backbone,), {
          'embeddings': np.ascontiguousarray(embeddings.reshape(-1, dim)),
          'indices': indices.reshape(-1).astype(np.int32)},
      data, read, run, image_size=image_size, grid=(rows, columns))


def score_fn(
    detector: AnomalyDINO, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`, section 3.2).

  Its parameters are the network's variables and the bank, made ready for the search, which is exact.

  Raises:
    ValueError: more neighbours than patches.
  """
  (backbone,), bank = backbones, model.arrays['embeddings']
  devices = jax.local_device_count()
  sharded = search.bank == 'sharded' and devices > 1 and program == LIVE
  prepared = search_bank.in_one_pass(bank) if program == LOOP_FREE else search_bank.prepare(
      bank, search.shortlist, num_shards=devices if sharded else None)
  fn = scores_fn(
      _tokens_fn(streaming.maps_of(backbone)), detector, len(bank), parallel.AXIS if sharded else None,
      program == LIVE)
  return ScoreFn(fn, (backbone.variables, prepared), (False, sharded))


@functools.lru_cache(maxsize=16)
def scores_fn(
    tokens_fn: Callable, detector: AnomalyDINO, size: int, axis_name: str | None = None, kernels: bool = True,
) -> Callable:
  """Makes the function ((variables, bank), images) -> `Scores`.

  Args:
    tokens_fn: (variables, images) -> [b, rows, columns, d].
    detector: the settings.
    size: rows of the bank.
    axis_name, kernels: see `neighbors.nested_nearest_neighbors`.
  """

  def score(parameters, images):
    variables, bank = parameters
    tokens = tokens_fn(variables, images)
    ignored = background(tokens, detector)
    patches, indices = patch_scores(
        tokens, bank, detector, ignored, size=size, axis_name=axis_name, kernels=kernels)
    b = len(tokens)
    worst = jnp.argmax(patches.reshape(b, -1), axis=1).astype(jnp.int32)
    nearest = jnp.take_along_axis(indices.reshape(b, -1), worst[:, None], axis=1)[:, 0]
    return Scores(
        scoring.top_share_scores(patches, detector.top_share),
        scoring.anomaly_maps(patches, images.shape[1:3], ScoringSpec(sigma=detector.sigma)),
        {'patch': worst, 'nearest': nearest.astype(jnp.int32)} | (
            {} if ignored is None else {'background_share': ignored.mean((1, 2))}))

  return score


def background(tokens: jax.Array, detector: AnomalyDINO) -> jax.Array | None:
  """Finds the patches that are not scored, [b, rows, columns] bool; None where all are."""
  if detector.foreground == 'none':
    return None
  return ~foreground.masks(tokens, 'raster' if detector.foreground == 'pca_raster' else 'grid')


def patch_scores(
    tokens: jax.Array, bank: jax.Array | search_bank.SearchBank, detector: AnomalyDINO,
    ignored: jax.Array | None = None, *, size: int | None = None, axis_name: str | None = None,
    kernels: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Scores patches by their distance to the nearest of the bank.

  Args:
    tokens: [b, rows, columns, d] float32.
    bank: [m, d] float32, or what `search_bank.prepare` made of it.
    detector: the settings.
    ignored: patches that get 0, [b, rows, columns] bool; None for no such.
    size: rows of the bank; None for those of the array.
    axis_name, kernels: see `neighbors.nested_nearest_neighbors`.

  Returns:
    The scores [b, rows, columns] float32, and the nearest rows of the bank, int32.
  """
  b, rows, columns, dim = tokens.shape
  queries = directed(tokens, detector.distance).reshape(-1, dim)
  ((distances_sq, indices),) = neighbors.nested_nearest_neighbors(
      queries, bank, (len(bank) if size is None else size,), k=detector.num_neighbors, axis_name=axis_name,
      kernels=kernels)
  # Half the squared distance of unit vectors is the cosine distance.
  scores = distances_sq.mean(1)
  scores = scores / 2 if detector.distance == 'cosine' else jnp.sqrt(scores)
  scores = scores.reshape(b, rows, columns)
  if ignored is not None:
    scores = jnp.where(ignored, 0, scores)
  return scores, indices[:, 0].reshape(b, rows, columns)


@functools.lru_cache(maxsize=16)
def _tokens_fn(maps_fn):
  """Makes the function (variables, images) -> tokens [b, rows, columns, d]."""
  return lambda variables, images: patch_embeddings(maps_fn(variables, images), _TOKENS)


@functools.lru_cache(maxsize=16)
def _directed_fn(maps_fn, distance):
  """Makes the function (variables, images) -> [b, rows, columns, d], as the bank keeps patches."""
  tokens_fn = _tokens_fn(maps_fn)
  return lambda variables, images: directed(tokens_fn(variables, images), distance)


def directed(tokens: jax.Array, distance: str) -> jax.Array:
  """Brings tokens [..., d] to unit length where the distance is 'cosine'."""
  if distance != 'cosine':
    return tokens
  return unit_length(tokens)
