"""PatchCore (Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022)."""

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from sklearn.cluster import MiniBatchKMeans

import patchcore_jax
from patchcore_jax import coreset, k_center, memory_bank, neighbors, parallel, scoring, spool
from patchcore_jax.backbones import Backbone
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import base, fit_plan
from patchcore_jax.detectors.base import Prediction, Progress
from patchcore_jax.detectors.fit_plan import FitPlan
from patchcore_jax.embedding import EmbeddingSpec, patch_embeddings
from patchcore_jax.memory_bank import MemoryBank
from patchcore_jax.neighbors import SearchSpec
from patchcore_jax.scoring import ScoringSpec


@dataclasses.dataclass(frozen=True)
class CoresetSpec:
  """How patches are selected.

  Attributes:
    ratio: share of all patches to keep, in (0, 1].
    method: 'greedy', the paper's k-center selection; 'random', that many at random; 'identity', all of
      them, in order, with ratio 1; 'kmeans', the centres of as many clusters (scikit-learn's mini-batch
      k-means), which unlike the others are no patches, and whose prefixes are no banks. Only 'greedy'
      reads the fields below but the seed.
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
  method: str = 'greedy'
  projection: str = 'dense'
  projection_dim: int = 128
  start: str = 'mean'
  num_start_points: int = 10
  seed: int = 0

  def __post_init__(self):
    coreset.check_ratio(self.ratio)
    if self.method not in ('greedy', 'random', 'identity', 'kmeans'):
      raise ValueError(
          f"coreset.method={self.method!r}: expected 'greedy', 'random', 'identity' or 'kmeans'.")
    if self.method == 'identity' and self.ratio != 1:
      raise ValueError(f"coreset.method='identity' keeps all patches: expected ratio 1, got {self.ratio}.")
    if self.projection not in ('dense', 'sparse'):
      raise ValueError(f"coreset.projection={self.projection!r}: expected 'dense' or 'sparse'.")
    if self.start not in ('mean', 'point'):
      raise ValueError(f"coreset.start={self.start!r}: expected 'mean' or 'point'.")
    if self.projection_dim < 0 or self.num_start_points < 1:
      raise ValueError(
          f'coreset.projection_dim={self.projection_dim}, num_start_points={self.num_start_points}: '
          'expected at least 0 and 1.')


def describe(backbone: Backbone, embedding: EmbeddingSpec) -> dict[str, Any]:
  """What a bank must agree on with the network that queries it; part of its description."""
  return {
      'backbone': base.describe(backbone),
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
  first, batches = base.first_of(batches)
  shape = _shape(backbone, first, embedding)
  embeddings = np.empty((num_images, *shape), np.float32)
  return embeddings[:_embed_into(embeddings, backbone, batches, embedding, progress)]


def fit(
    backbone: Backbone,
    batches: Iterable[Batch],
    num_images: int,
    *,
    embedding: EmbeddingSpec,
    coreset_spec: CoresetSpec,
    memory_gb: float = math.inf,
    scratch: str | os.PathLike | None = None,
    notify: Callable[[FitPlan], None] | None = None,
    progress: Progress | None = None,
) -> MemoryBank:
  """Embeds good images and selects a memory bank.

  Args:
    backbone, batches, num_images, embedding: as in `embed`; good images only.
    coreset_spec: how many patches are kept and how they are chosen.
    memory_gb: the most that the process may take on the host, in 10^9 bytes. Arrays for which that
      is not enough lie in files without a name, which vanish with the process. No influence on the
      result.
    scratch: folder for them; None for the system's.
    notify: called with the plan, before the long work.
    progress: called with (stage, done, total); stages are 'embed', 'project' and 'coreset'.

  Returns:
    A `MemoryBank` of NumPy arrays, in order of selection.

  Raises:
    ValueError: no images, a ratio that keeps no patch, or too little memory for any way to fit.
    OSError: too little disk.
  """
  first, batches = base.first_of(batches)
  *grid, dim = _shape(backbone, first, embedding)
  patches = math.prod(grid)
  plan = _plan(backbone, first, num_images * patches, dim, embedding, coreset_spec, memory_gb)
  if notify:
    notify(plan)
  allocate = functools.partial(spool.allocate, folder=scratch or tempfile.gettempdir())
  embeddings = allocate((num_images, *grid, dim), on_disk=plan.embeddings_on_disk)
  num_images = _embed_into(embeddings, backbone, batches, embedding, progress)
  points = spool.view(embeddings, (num_images * patches, dim))
  rows, indices = _select(points, coreset_spec, plan, allocate, progress)
  description = describe(backbone, embedding) | {
      'coreset': dataclasses.asdict(coreset_spec),
      'num_images': num_images,
      'num_patches': len(points),
      'grid': list(grid),
      'image_size': list(first.image.shape[1:3]),
      'versions': {'patchcore_jax': patchcore_jax.__version__, 'jax': jax.__version__},
  }
  return MemoryBank(rows, indices, description)


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
  for batch, (scores, maps) in base.stream(fn, parameters, batches, expected=bank.description):
    valid = batch.valid
    yield Prediction(batch.index[valid], scores[valid].T, maps[valid].swapaxes(0, 1))


def _embed_fn_of(backbone, embedding):
  return _embed_fn(base.maps_of(backbone), embedding)


@functools.lru_cache(maxsize=16)
def _embed_fn(maps_fn, embedding):
  """(variables, images [b, h, w, 3] uint8) -> [b, rows, columns, d]. Cached, so jit's cache works."""

  def embed(variables, images):
    return patch_embeddings(maps_fn(variables, images), embedding)

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


def _shape(backbone, batch, embedding):
  """[rows, columns, d] of an image's embeddings."""
  return jax.eval_shape(_embed_fn_of(backbone, embedding), backbone.variables, batch.image).shape[1:]


def _embed_into(embeddings, backbone, batches, embedding, progress):
  """Fills `embeddings` [n, rows, columns, d]; how many images there were."""
  done = 0
  for batch, values in base.stream(
      _embed_fn_of(backbone, embedding), parallel.replicate(backbone.variables), batches):
    valid = values[batch.valid]
    embeddings[done:done + len(valid)] = valid
    done += len(valid)
    if progress:
      progress('embed', done, len(embeddings))
  if not done:
    raise ValueError('No images: none were given, or none could be read.')
  return done


def _plan(backbone, batch, num_patches, dim, embedding, spec, memory_gb):
  device = jax.local_devices()[0]
  memory = device.memory_stats() if device.platform != 'cpu' else None
  batch_bytes = parallel.working_bytes(
      _embed_fn_of(backbone, embedding), parallel.replicate(backbone.variables), batch.image)
  return fit_plan.plan(
      num_patches, coreset.coreset_size(num_patches, spec.ratio), dim, _projection_dim(spec, num_patches),
      memory_gb=memory_gb, base_bytes=spool.resident_bytes(),
      batch_bytes=batch_bytes if device.platform == 'cpu' else 0,
      device_bytes=memory.get('bytes_limit') if memory else None,
      num_devices=jax.local_device_count())


def _projection_dim(spec, num_points):
  return spec.projection_dim or coreset.johnson_lindenstrauss_dim(num_points)


def _select(points, spec, plan, allocate, progress):
  """(embeddings [m, d], indices [m]) of the bank."""
  n = len(points)
  size = coreset.coreset_size(n, spec.ratio)
  if spec.method == 'kmeans':
    return _cluster_centers(points, size, spec.seed)
  if spec.method == 'greedy':
    indices = _greedy(points, size, spec, plan, allocate, progress)
  elif spec.method == 'random':
    indices = np.asarray(jax.random.permutation(jax.random.key(spec.seed), n)[:size])
  else:
    indices = np.arange(n)
  indices = indices.astype(np.int32)
  return spool.take(points, indices), indices


def _cluster_centers(points, size, seed):
  """Centres of clusters, and for each the nearest of the points that were seen last."""
  clusters = MiniBatchKMeans(
      size, init='random', n_init=1, batch_size=max(4096, 2 * size), random_state=seed,
      compute_labels=False)
  order = np.random.default_rng(seed).permutation(len(points))
  parts = np.array_split(order, max(1, len(order) // max(4096, 2 * size)))
  for part in parts:
    clusters.partial_fit(spool.take(points, part))
  centers = clusters.cluster_centers_.astype(np.float32)
  nearest = neighbors.nearest_neighbors(centers, spool.take(points, parts[-1]))[1][:, 0]
  return centers, parts[-1][np.asarray(nearest)].astype(np.int32)


def _greedy(points, size, spec, plan, allocate, progress):
  n, stages = len(points), (lambda stage: functools.partial(progress, stage) if progress else None)
  projection_key, start_key = jax.random.split(jax.random.key(spec.seed))
  dim = _projection_dim(spec, n)
  projected = coreset.random_projection(
      points, dim, key=projection_key, kind=spec.projection, progress=stages('project'),
      out=allocate((n, dim), on_disk=plan.points_on_disk) if plan.stream else None)
  num_start = 1 if spec.start == 'point' else min(spec.num_start_points, n)
  start = jax.random.choice(start_key, n, (num_start,), replace=False)
  devices = jax.local_devices()
  split = len(devices) > 1 and not plan.stream
  return coreset.greedy_k_center(
      projected, size, start=start,
      select_start=spec.start == 'point', stream=plan.stream,
      mesh=Mesh(np.array(devices), (k_center.AXIS,)) if split else None, progress=stages('coreset'))
