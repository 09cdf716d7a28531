"""PatchCore (Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022)."""

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from sklearn.cluster import MiniBatchKMeans

import patchcore_jax
from patchcore_jax import disk_arrays, parallel, processes, scoring
from patchcore_jax.backbones import Backbone, FeatureMaps
from patchcore_jax.banks import store
from patchcore_jax.banks.store import MemoryBank
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import base, fit_plan
from patchcore_jax.detectors.base import Prediction, Progress
from patchcore_jax.detectors.fit_plan import FitPlan
from patchcore_jax.embedding import EmbeddingSpec, patch_embeddings
from patchcore_jax.scoring import ScoringSpec
from patchcore_jax.search import coreset, k_center, neighbors
from patchcore_jax.search.neighbors import SearchSpec


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
    joint: bool = False,
    memory_gb: float = math.inf,
    scratch: str | os.PathLike | None = None,
    notify: Callable[[FitPlan], None] | None = None,
    progress: Progress | None = None,
) -> MemoryBank:
  """Embeds good images and selects a memory bank.

  Args:
    backbone, batches, num_images, embedding: as in `embed`; good images only.
    coreset_spec: how many patches are kept and how they are chosen.
    joint: the images are this process's part of all (`processes.part`). All processes of
      `jax.distributed` call this, and each gets the bank of all images; embeddings stay where they are
      made, and the selection runs over all devices.
    memory_gb: the most that the process may take on the host, in 10^9 bytes. Arrays for which that
      is not enough lie in files without a name, which vanish with the process. No influence on the
      result.
    scratch: folder for them; None for the system's.
    notify: called with the plan, before the long work.
    progress: called with (stage, done, total); stages are 'embed', 'project' and 'coreset'.

  Returns:
    A `MemoryBank` of NumPy arrays, in order of selection.

  Raises:
    ValueError: no images, a ratio that keeps no patch, too little memory for any way to fit, or a joint fit
      with method 'kmeans'.
    OSError: too little disk.
  """
  bank, _ = _fit(
      backbone, batches, num_images, embedding=embedding, coreset_spec=coreset_spec, joint=joint,
      memory_gb=memory_gb, scratch=scratch, notify=notify, progress=progress)
  return bank


class CrossScores(NamedTuple):
  """How each training image scores against patches of the others; n images.

  Attributes:
    image_scores: [n] float32.
    map_maxima: [n] float32, the largest value of each anomaly map.
  """

  image_scores: np.ndarray
  map_maxima: np.ndarray


def fit_and_cross_score(
    backbone: Backbone,
    batches: Iterable[Batch],
    num_images: int,
    *,
    embedding: EmbeddingSpec,
    coreset_spec: CoresetSpec,
    scoring_spec: ScoringSpec,
    folds: int,
    search: SearchSpec | None = None,
    joint: bool = False,
    memory_gb: float = math.inf,
    scratch: str | os.PathLike | None = None,
    notify: Callable[[FitPlan], None] | None = None,
    progress: Progress | None = None,
) -> tuple[MemoryBank, CrossScores]:
  """`fit`, and scores of the training images as if they were new, for thresholds.

  The images are parted at random into `folds` parts of like size; each part is scored against a bank of
  the others, selected at the same ratio. No image meets a patch of its own. The images pass through the
  network once.

  Args:
    scoring_spec, search: as in `predict`.
    folds: at least 2; of fewer images, each is a part of its own.
    progress: also called with ('calibrate', done, num_images).

  Returns:
    The bank of all images, and the scores in the order of the images.

  Raises:
    ValueError: besides what `fit` raises: fewer than 2 images or folds, or method 'kmeans', whose centres
      belong to no image.
  """
  if folds < 2 or coreset_spec.method == 'kmeans':
    raise ValueError(
        f"folds={folds}, coreset.method={coreset_spec.method!r}: expected at least 2, and a method that "
        "selects patches of images ('greedy', 'random' or 'identity').")
  return _fit(
      backbone, batches, num_images, embedding=embedding, coreset_spec=coreset_spec, joint=joint,
      memory_gb=memory_gb, scratch=scratch, notify=notify, progress=progress,
      cross=functools.partial(
          _cross_score, scoring_spec=scoring_spec, folds=folds, search=search or SearchSpec()))


def _fit(backbone, batches, num_images, *, embedding, coreset_spec, joint, memory_gb, scratch, notify,
         progress, cross=None):
  """(bank, what `cross` makes of the embeddings, or None)."""
  first, batches = base.first_of(batches)
  *grid, dim = _shape(backbone, first, embedding)
  patches = math.prod(grid)
  plan = _plan(
      backbone, first, patches * _counts(num_images, joint), dim, embedding, coreset_spec, memory_gb,
      folds=bool(cross))
  if notify:
    notify(plan)
  allocate = functools.partial(disk_arrays.allocate, folder=scratch or tempfile.gettempdir())
  if plan.embeddings_on_device:
    embeddings, num_images = _embed_on_device(
        (num_images, *grid, dim), backbone, batches, embedding, progress)
    points = embeddings.points
  else:
    embeddings = allocate((num_images, *grid, dim), on_disk=plan.embeddings_on_disk)
    num_images = _embed_into(embeddings, backbone, batches, embedding, progress)
    points = disk_arrays.view(embeddings, (num_images * patches, dim))
  images = _counts(num_images, joint)
  points_dim = _projection_dim(coreset_spec, patches * images)
  project = functools.partial(_project, points, points_dim, coreset_spec, plan, allocate, progress)
  if cross and coreset_spec.method == 'greedy':
    project = functools.partial(_given, project())  # the folds select in the same points
  rows, indices = _select(points, patches * images, project, coreset_spec, plan, progress)
  description = describe(backbone, embedding) | {
      'coreset': dataclasses.asdict(coreset_spec),
      'num_images': int(images.sum()),
      'num_patches': patches * int(images.sum()),
      'grid': list(grid),
      'image_size': list(first.image.shape[1:3]),
      'versions': {'patchcore_jax': patchcore_jax.__version__, 'jax': jax.__version__},
  }
  scores = None
  if cross:
    scores = cross(
        embeddings, points, project, coreset_spec, plan, images=images,
        image_size=first.image.shape[1:3], batch_size=len(first.image), progress=progress)
  return MemoryBank(rows, indices, description), scores


def _cross_score(
    embeddings, points, project, spec, plan, *, images, image_size, batch_size, progress, scoring_spec,
    folds, search):
  num_images, joint = int(images.sum()), len(images) > 1
  if num_images < 2:
    raise ValueError('One image cannot be scored against others: give at least 2, or do not calibrate.')
  folds = min(folds, num_images)
  own = processes.own(images)
  patches = len(points) // (own.stop - own.start)
  if spec.method == 'greedy':
    projected = project()
    if not (plan.stream or plan.embeddings_on_device):
      projected = np.asarray(projected)
  fold_of_all = np.random.default_rng(spec.seed).permutation(np.arange(num_images) % folds)
  fold_of = fold_of_all[own]
  found = CrossScores(*np.zeros((2, len(fold_of)), np.float32))
  for fold in range(folds):
    # Rows of the other images; `_select` sees them as if there were no more.
    others = np.flatnonzero(np.repeat(fold_of != fold, patches))
    if spec.method == 'greedy':  # what is streamed may be larger than the memory
      if plan.stream:
        part = _Rows(projected, others)
      else:
        part = projected[others] if plan.embeddings_on_device else disk_arrays.take(projected, others)
      project = functools.partial(_given, part)
    rows, _ = _select(_Rows(points, others), _counts(len(others), joint), project, spec, plan, None)
    scored = np.flatnonzero(fold_of == fold)
    if len(scored):  # of several processes, one may have none
      scores = score_embeddings(
          embeddings, rows, image_size, images=scored, batch_size=batch_size, scoring_spec=scoring_spec,
          search=search)
      for kept, new in zip(found, scores):
        kept[scored] = new
    if progress:
      progress('calibrate', int((fold_of_all <= fold).sum()), num_images)
  return CrossScores(*map(processes.joined, found)) if joint else found


def score_embeddings(
    embeddings: np.ndarray,
    bank: np.ndarray,
    image_size: tuple[int, int],
    *,
    scoring_spec: ScoringSpec,
    images: np.ndarray | None = None,
    batch_size: int = 32,
    search: SearchSpec | None = None,
) -> CrossScores:
  """Scores of images whose embeddings are at hand, as `predict` gives them.

  Args:
    embeddings: [n, rows, columns, d], on the host.
    bank: [m, d] embeddings.
    image_size: (height, width) of the images.
    scoring_spec, search: as in `predict`.
    images: which of them; None for all.
    batch_size: a multiple of the number of local devices.
  """
  images = np.arange(len(embeddings)) if images is None else images
  fn = _predict_fn(_embeddings_as_they_are, scoring_spec, (len(bank),), maxima=True)
  prepared = neighbors.prepare(bank, (search or SearchSpec()).shortlist)
  image_scores, map_maxima = [], []
  batches = _batches_of(embeddings, images, batch_size, tuple(image_size))
  for batch, (scores, maxima, *_) in base.stream(fn, parallel.replicate((None, prepared)), batches):
    image_scores.append(scores[batch.valid, 0])
    map_maxima.append(maxima[batch.valid, 0])
  return CrossScores(np.concatenate(image_scores), np.concatenate(map_maxima))


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Some rows of an array, which `disk_arrays.take` reads when they are asked for."""

  array: Any
  rows: np.ndarray
  ndim = 2

  @property
  def shape(self):
    return len(self.rows), *self.array.shape[1:]

  @property
  def dtype(self):
    return self.array.dtype

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, key):
    return disk_arrays.take(self.array, self.rows[key])


@dataclasses.dataclass(frozen=True)
class _OnDevice:
  """Embeddings of images that stay on the device, in the order of `points` [n * rows * columns, d]."""

  points: jax.Array
  grid: tuple[int, int]

  def __len__(self):
    return len(self.points) // math.prod(self.grid)

  def __getitem__(self, images):
    return _images_of(self.points, images, self.grid)


@functools.partial(jax.jit, static_argnums=2)
def _images_of(points, images, grid):
  return points.reshape(-1, *grid, points.shape[1])[images]


@functools.partial(jax.jit, donate_argnums=0)
def _put_images(points, values, images):
  """`points` with the embeddings of some images [b, rows, columns, d] in their places; others are none."""
  b, *_, dim = values.shape
  values = values.reshape(b, -1, dim)
  return points.reshape(-1, *values.shape[1:]).at[images].set(values, mode='drop').reshape(points.shape)


def _batches_of(embeddings, images, batch_size, image_size):
  """Batches of embeddings [n, rows, columns, d] in the place of images."""
  for begin in range(0, len(images), batch_size):
    index = images[begin:begin + batch_size].astype(np.int32)
    missing = batch_size - len(index)
    values = embeddings[np.pad(index, (0, missing), mode='edge')]
    yield Batch(
        FeatureMaps({_EMBEDDINGS: values}, image_size), None,
        np.pad(index, (0, missing), constant_values=-1))


_EMBEDDINGS = 'embeddings'


def _embeddings_as_they_are(variables, features):
  return features.maps[_EMBEDDINGS]


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
  fn, parameters = prediction(
      backbone, bank, embedding=embedding, scoring_spec=scoring_spec, search=search, sizes=sizes)
  for batch, results in base.stream(fn, parameters, batches, expected=bank.description):
    if not batch.valid.all():  # a copy of the maps, which most batches are spared
      results = [r[batch.valid] for r in results]
    yield Prediction(batch.index[batch.valid], *(r.swapaxes(0, 1) for r in results))


def prediction(
    backbone: Backbone,
    bank: MemoryBank,
    *,
    embedding: EmbeddingSpec,
    scoring_spec: ScoringSpec,
    search: SearchSpec | None = None,
    sizes: tuple[int, ...] = (),
) -> tuple[Callable[[Any, jax.Array], tuple[jax.Array, ...]], Any]:
  """What `predict` runs: a pure function, for `parallel.data_parallel`, and its parameters on the devices.

  Args, errors: as of `predict`.

  Returns:
    fn(parameters, images [b, h, w, 3] uint8) -> the fields of `Prediction` after `index`, the batch first;
    the same object for the same settings, so that it is compiled once. And the parameters.
  """
  store.check(bank.description, describe(backbone, embedding))
  search = search or SearchSpec()
  devices = jax.local_device_count()
  sharded = search.bank == 'sharded' and devices > 1
  fn = _predict_fn(
      _embed_fn_of(backbone, embedding), scoring_spec, sizes or (len(bank.embeddings),),
      parallel.AXIS if sharded else None)
  prepared = neighbors.prepare(
      bank.embeddings, search.shortlist, num_shards=devices if sharded else None)
  # Both on the devices once, not with every batch.
  return fn, (
      parallel.replicate(backbone.variables),
      parallel.split(prepared) if sharded else parallel.replicate(prepared))


def predict_fn(
    backbone: Backbone, bank: MemoryBank, *, embedding: EmbeddingSpec, scoring_spec: ScoringSpec,
) -> Callable[[Any, jax.Array], tuple[jax.Array, ...]]:
  """The pure function of `prediction`, on one device and against the whole bank, for programs of one's own.

  Its parameters are the backbone's variables and what `neighbors.prepare` makes of the bank.

  Raises:
    BankError: as `predict`.
  """
  store.check(bank.description, describe(backbone, embedding))
  return _predict_fn(
      _embed_fn_of(backbone, embedding), scoring_spec, (len(bank.embeddings),), kernels=False)


def _embed_fn_of(backbone, embedding):
  return _embed_fn(base.maps_of(backbone), embedding)


@functools.lru_cache(maxsize=16)
def _embed_fn(maps_fn, embedding):
  """(variables, images [b, h, w, 3] uint8) -> [b, rows, columns, d]. Cached, so jit's cache works."""

  def embed(variables, images):
    return patch_embeddings(maps_fn(variables, images), embedding)

  return embed


@functools.lru_cache(maxsize=16)
def _predict_fn(embed, spec, sizes, axis_name=None, kernels=True, maxima=False):
  """((variables, bank), images) -> what `Prediction` holds, the batch first.

  That is image scores [b, s], anomaly maps [b, s, h, w] or with `maxima` the largest value of each [b, s],
  patches [b, s] and their nearest rows [b, s].
  """

  def score(parameters, images):
    variables, bank = parameters
    embeddings = embed(variables, images)
    b, rows, columns, dim = embeddings.shape
    found = neighbors.nested_nearest_neighbors(
        embeddings.reshape(-1, dim), bank, sizes, k=spec.num_neighbors, axis_name=axis_name,
        kernels=kernels)
    scores, maps, worst, nearest = [], [], [], []
    for size, (distances_sq, indices) in zip(sizes, found):
      patches = scoring.patch_scores(distances_sq, spec).reshape(b, rows, columns)
      if spec.image_score == 'max':
        scores.append(scoring.image_scores(patches))
      else:
        scores.append(scoring.reweighted_image_scores(
            embeddings.reshape(b, -1, dim), distances_sq.reshape(b, -1, spec.num_neighbors),
            indices.reshape(b, -1, spec.num_neighbors), bank, spec, size=size,
            axis_name=axis_name, kernels=kernels))
      anomaly_maps = scoring.anomaly_maps(patches, images.shape[1:3], spec)
      maps.append(anomaly_maps.max(axis=(1, 2)) if maxima else anomaly_maps)
      worst.append(jnp.argmax(patches.reshape(b, -1), axis=1).astype(jnp.int32))
      nearest.append(jnp.take_along_axis(
          indices[:, 0].reshape(b, -1), worst[-1][:, None], axis=1)[:, 0].astype(jnp.int32))
    return tuple(jnp.stack(results, axis=1) for results in (scores, maps, worst, nearest))

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


def _embed_on_device(shape, backbone, batches, embedding, progress):
  """The embeddings [n, rows, columns, d] of `shape`, fewer where there are fewer images, and their number."""
  n, *grid, dim = shape
  points, done = jnp.zeros((n * math.prod(grid), dim), jnp.float32), 0
  for batch, values in base.stream(
      _embed_fn_of(backbone, embedding), parallel.replicate(backbone.variables), batches, to_host=False):
    place = np.where(batch.valid, done + np.cumsum(batch.valid) - 1, n).astype(np.int32)
    points = _put_images(points, values, place)
    done += int(batch.valid.sum())
    if progress:
      progress('embed', done, n)
  if not done:
    raise ValueError('No images: none were given, or none could be read.')
  if done < n:
    points = points[:done * math.prod(grid)]
  return _OnDevice(points, tuple(grid)), done


def _counts(n, joint):
  """[p] numbers of things of each process, which are together one fit; p is 1 if it is not joint."""
  return processes.counts(n) if joint else np.array([n])


def _plan(backbone, batch, num_patches, dim, embedding, spec, memory_gb, *, folds):
  """Of this process, which has `num_patches.max()` at the most, and the whole bank."""
  device = jax.local_devices()[0]
  memory = device.memory_stats() if device.platform != 'cpu' else None
  batch_bytes = parallel.working_bytes(
      _embed_fn_of(backbone, embedding), parallel.replicate(backbone.variables), batch.image)
  return fit_plan.plan(
      int(num_patches.max()), coreset.coreset_size(int(num_patches.sum()), spec.ratio), dim,
      _projection_dim(spec, num_patches), memory_gb=memory_gb, base_bytes=disk_arrays.resident_bytes(),
      batch_bytes=batch_bytes, device_bytes=memory.get('bytes_limit') if memory else None,
      num_devices=jax.local_device_count(), folds=folds, may_stream=len(num_patches) == 1)


def _projection_dim(spec, counts):
  return spec.projection_dim or coreset.johnson_lindenstrauss_dim(int(counts.sum()))


def _given(value):
  return value


def _select(points, counts, project, spec, plan, progress):
  """(embeddings [m, d], indices [m]) of the bank, of the points of all processes, `counts` of each.

  `project` makes the points in which 'greedy' selects, and is called for that only: unless its caller keeps
  them, they are gone before the embeddings are read.
  """
  n = int(counts.sum())
  size = coreset.coreset_size(n, spec.ratio)
  if spec.method == 'kmeans':
    if len(counts) > 1:
      raise ValueError("coreset.method='kmeans' is not for several processes: use 'greedy'.")
    return _cluster_centers(points, size, spec.seed)
  if spec.method == 'greedy':
    indices = _greedy(project(), counts, size, spec, plan, progress)
  elif spec.method == 'random':
    indices = np.asarray(jax.random.permutation(jax.random.key(spec.seed), n)[:size])
  else:
    indices = np.arange(n)
  indices = indices.astype(np.int32)
  return processes.take(points, counts, indices), indices


def _cluster_centers(points, size, seed):
  """Centres of clusters, and for each the nearest of the points that were seen last."""
  clusters = MiniBatchKMeans(
      size, init='random', n_init=1, batch_size=max(4096, 2 * size), random_state=seed,
      compute_labels=False)
  order = np.random.default_rng(seed).permutation(len(points))
  parts = np.array_split(order, max(1, len(order) // max(4096, 2 * size)))
  for part in parts:
    clusters.partial_fit(disk_arrays.take(points, part))
  centers = clusters.cluster_centers_.astype(np.float32)
  nearest = neighbors.nearest_neighbors(centers, disk_arrays.take(points, parts[-1]))[1][:, 0]
  return centers, parts[-1][np.asarray(nearest)].astype(np.int32)


def _project(points, dim, spec, plan, allocate, progress):
  """The points in which the selection runs, on the host if the plan says so."""
  key, _ = jax.random.split(jax.random.key(spec.seed))
  return coreset.random_projection(
      points, dim, key=key, kind=spec.projection,
      progress=functools.partial(progress, 'project') if progress else None,
      out=allocate((len(points), dim), on_disk=plan.points_on_disk) if plan.stream else None)


def _greedy(projected, counts, size, spec, plan, progress):
  n = int(counts.sum())
  _, key = jax.random.split(jax.random.key(spec.seed))
  num_start = 1 if spec.start == 'point' else min(spec.num_start_points, n)
  start = np.asarray(jax.random.choice(key, n, (num_start,), replace=False))
  select = functools.partial(
      coreset.greedy_k_center, select_start=spec.start == 'point', stream=plan.stream,
      progress=functools.partial(progress, 'coreset') if progress else None)
  if len(counts) > 1:
    mesh = processes.mesh(k_center.AXIS)
    pieces, valid = processes.spread(np.asarray(projected), mesh)
    picks = select(pieces, size, start=np.flatnonzero(valid)[start], mesh=mesh, valid=valid)
    return np.cumsum(valid)[picks] - 1  # as if there were no padding
  devices = jax.local_devices()
  split = len(devices) > 1 and not plan.stream
  return select(
      projected, size, start=start, mesh=Mesh(np.array(devices), (k_center.AXIS,)) if split else None)
