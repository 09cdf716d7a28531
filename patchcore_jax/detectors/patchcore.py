"""PatchCore (Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import patchcore_jax
from patchcore_jax import coreset, memory_bank, neighbors, parallel, scoring
from patchcore_jax.backbones import Backbone, fingerprint, normalize
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.embedding import EmbeddingSpec, patch_embeddings
from patchcore_jax.memory_bank import MemoryBank
from patchcore_jax.neighbors import SearchSpec
from patchcore_jax.scoring import ScoringSpec

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class CoresetSpec:
  """How patches are selected.

  Attributes:
    ratio: share of all patches to keep, in (0, 1].
    projection: the selection runs in a random projection, 'dense' (the paper's released code) or
      'sparse' (anomalib); the bank holds the full embeddings.
    projection_dim: its dimensions; 0 for as many as the Johnson-Lindenstrauss bound asks for.
    start: 'mean' starts from the mean distance to `num_start_points` random points (the released
      code), 'point' from one random point that is itself the first selected (anomalib).
    num_start_points: only for 'mean'.
    seed: of the projection and the start.

  Raises:
    ValueError: values out of range.
  """

  ratio: float = 0.1
  projection: str = 'dense'
  projection_dim: int = 128
  start: str = 'mean'
  num_start_points: int = 10
  seed: int = 0

  def __post_init__(self):
    coreset.check_ratio(self.ratio)
    if self.projection not in ('dense', 'sparse'):
      raise ValueError(f"coreset.projection={self.projection!r}: expected 'dense' or 'sparse'.")
    if self.start not in ('mean', 'point'):
      raise ValueError(f"coreset.start={self.start!r}: expected 'mean' or 'point'.")
    if self.projection_dim < 0 or self.num_start_points < 1:
      raise ValueError(
          f'coreset.projection_dim={self.projection_dim}, num_start_points={self.num_start_points}: '
          'expected at least 0 and 1.')


class Prediction(NamedTuple):
  """Results of a batch of b images for s bank sizes, NumPy float32; padding is dropped.

  Attributes:
    index: [b] int32, positions in the list of examples.
    image_scores: [s, b].
    anomaly_maps: [s, b, h, w], at the size of the network's input.
  """

  index: np.ndarray
  image_scores: np.ndarray
  anomaly_maps: np.ndarray


def describe(backbone: Backbone, embedding: EmbeddingSpec) -> dict[str, Any]:
  """What a bank must agree on with the network that queries it; part of its description."""
  return {
      'backbone': {
          'name': backbone.name, 'layers': list(backbone.layers),
          'mean': list(backbone.mean), 'std': list(backbone.std),
          'precision': backbone.precision, 'weights': fingerprint(backbone.variables)},
      'embedding': dataclasses.asdict(embedding),
  }


def embed(
    backbone: Backbone,
    batches: Iterable[Batch],
    num_images: int,
    *,
    embedding: EmbeddingSpec,
    progress: Progress | None = None,
) -> np.ndarray:
  """Patch embeddings of all images, in host memory.

  Args:
    backbone: frozen network.
    batches: images of one size; the batch size is a multiple of the number of local devices.
    num_images: how many images the batches hold at most.
    embedding: how patches are embedded.
    progress: called with ('embed', done, num_images).

  Returns:
    [n, rows, columns, d] float32 in the order of the batches, padding dropped.

  Raises:
    ValueError: no images.
  """
  run = parallel.data_parallel(_embed_fn_of(backbone, embedding))
  variables = parallel.replicate(backbone.variables)
  embeddings, done = None, 0
  for batch, values in _one_ahead(run, variables, batches):
    if embeddings is None:
      embeddings = np.empty((num_images, *values.shape[1:]), np.float32)
    valid = values[batch.valid]
    embeddings[done:done + len(valid)] = valid
    done += len(valid)
    if progress:
      progress('embed', done, num_images)
  if not done:
    raise ValueError('No images: none were given, or none could be read.')
  return embeddings[:done]


def fit(
    backbone: Backbone,
    batches: Iterable[Batch],
    num_images: int,
    *,
    embedding: EmbeddingSpec,
    coreset_spec: CoresetSpec,
    progress: Progress | None = None,
) -> MemoryBank:
  """Embeds good images and selects a memory bank.

  Args:
    backbone, batches, num_images, embedding: as in `embed`; good images only.
    coreset_spec: how many patches are kept and how they are chosen.
    progress: called with (stage, done, total); stages are 'embed' and 'coreset'.

  Returns:
    A `MemoryBank` of NumPy arrays, in order of selection.

  Raises:
    ValueError: no images, or a ratio that keeps no patch.
  """
  image_size = None

  def checked(batches):
    nonlocal image_size
    for batch in batches:
      if image_size is None:  # before the long work, not after it
        image_size = batch.image.shape[1:3]
        grid = jax.eval_shape(
            _embed_fn_of(backbone, embedding), backbone.variables, batch.image).shape[1:3]
        coreset.coreset_size(num_images * grid[0] * grid[1], coreset_spec.ratio)
      yield batch

  embeddings = embed(backbone, checked(batches), num_images, embedding=embedding, progress=progress)
  points = embeddings.reshape(-1, embeddings.shape[-1])
  indices = _select(
      points, coreset_spec, functools.partial(progress, 'coreset') if progress else None)
  description = describe(backbone, embedding) | {
      'coreset': dataclasses.asdict(coreset_spec),
      'num_images': len(embeddings),
      'num_patches': len(points),
      'grid': list(embeddings.shape[1:3]),
      'image_size': list(image_size),
      'versions': {'patchcore_jax': patchcore_jax.__version__, 'jax': jax.__version__},
  }
  return MemoryBank(points[indices], indices, description)


def predict(
    backbone: Backbone,
    bank: MemoryBank,
    batches: Iterable[Batch],
    *,
    embedding: EmbeddingSpec,
    scoring_spec: ScoringSpec,
    search: SearchSpec | None = None,
    sizes: tuple[int, ...] = (),
) -> Iterator[Prediction]:
  """Scores images; one jitted function from pixels to maps.

  Args:
    backbone, embedding: as in `fit`.
    bank: from `fit`.
    batches: images of one size; the batch size is a multiple of the number of local devices.
    scoring_spec: how distances become scores.
    search: how neighbours are found, by default `SearchSpec()`; no influence on the result.
    sizes: numbers of leading bank patches to score against, all in one pass; () for the whole bank.

  Yields:
    A `Prediction` for every batch.

  Raises:
    BankError: the bank was made with another network, embedding or image size.
    ValueError: more neighbours than patches.
  """
  memory_bank.check(bank.description, describe(backbone, embedding))
  search = search or SearchSpec()
  devices = jax.local_device_count()
  sharded = search.bank == 'sharded' and devices > 1
  fn = _predict_fn(
      _embed_fn_of(backbone, embedding), scoring_spec, sizes or (len(bank.embeddings),),
      parallel.AXIS if sharded else None)
  prepared = neighbors.prepare(
      bank.embeddings, search.shortlist, num_shards=devices if sharded else None)
  # Both on the devices once, not with every batch.
  parameters = (
      parallel.replicate(backbone.variables),
      parallel.split(prepared) if sharded else parallel.replicate(prepared))
  for batch, (scores, maps) in _one_ahead(parallel.data_parallel(fn), parameters, batches):
    memory_bank.check(bank.description, {'image_size': batch.image.shape[1:3]})
    valid = batch.valid
    yield Prediction(batch.index[valid], scores[valid].T, maps[valid].swapaxes(0, 1))


def _embed_fn_of(backbone, embedding):
  return _embed_fn(backbone.apply, backbone.layers, backbone.mean, backbone.std, embedding)


@functools.lru_cache(maxsize=16)
def _embed_fn(apply, layers, mean, std, embedding):
  """(variables, images [b, h, w, 3] uint8) -> [b, rows, columns, d]. Cached, so jit's cache works."""

  def embed(variables, images):
    maps = apply(variables, normalize(images, mean, std))
    return patch_embeddings([maps[layer] for layer in layers], embedding)

  return embed


@functools.lru_cache(maxsize=16)
def _predict_fn(embed, spec, sizes, axis_name=None):
  """((variables, bank), images) -> image scores [b, s], anomaly maps [b, s, h, w]."""

  def score(parameters, images):
    variables, bank = parameters
    embeddings = embed(variables, images)
    b, rows, columns, dim = embeddings.shape
    found = neighbors.nested_nearest_neighbors(
        embeddings.reshape(-1, dim), bank, sizes, k=spec.num_neighbors, axis_name=axis_name)
    scores, maps = [], []
    for size, (distances_sq, indices) in zip(sizes, found):
      patches = scoring.patch_scores(distances_sq, spec).reshape(b, rows, columns)
      if spec.image_score == 'max':
        scores.append(scoring.image_scores(patches))
      else:
        scores.append(scoring.reweighted_image_scores(
            embeddings.reshape(b, -1, dim), distances_sq.reshape(b, -1, spec.num_neighbors),
            indices.reshape(b, -1, spec.num_neighbors), bank, spec, size=size,
            axis_name=axis_name))
      maps.append(scoring.anomaly_maps(patches, images.shape[1:3], spec))
    return jnp.stack(scores, axis=1), jnp.stack(maps, axis=1)

  return score


def _select(points, spec, progress):
  projection_key, start_key = jax.random.split(jax.random.key(spec.seed))
  projected = coreset.random_projection(
      points, spec.projection_dim or coreset.johnson_lindenstrauss_dim(len(points)),
      key=projection_key, kind=spec.projection)
  num_start = 1 if spec.start == 'point' else min(spec.num_start_points, len(points))
  start = jax.random.choice(start_key, len(points), (num_start,), replace=False)
  size = coreset.coreset_size(len(points), spec.ratio)
  return np.asarray(coreset.greedy_k_center(
      projected, size, start=start, select_start=spec.start == 'point', progress=progress))


def _one_ahead(run, parameters, batches):
  """Yields (batch, results as NumPy), having sent the next batch off before waiting for one."""
  pending = None
  for batch in batches:
    results = run(parameters, batch.image)
    if pending:
      yield pending[0], parallel.gather(pending[1])
    pending = batch, results
  if pending:
    yield pending[0], parallel.gather(pending[1])
