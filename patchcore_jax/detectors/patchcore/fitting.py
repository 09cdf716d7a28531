"""Makes a bank of good images, within the memory that there is."""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from patchcore_jax import disk_arrays, foreground, parallel, processes
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import editing
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Data, Run
from patchcore_jax.detectors.patchcore import fit_plan, fit_time, one_pass
from patchcore_jax.detectors.patchcore.fit_plan import FitPlan
from patchcore_jax.detectors.patchcore.fit_time import Work
from patchcore_jax.detectors.patchcore.scores import references
from patchcore_jax.detectors.settings import PatchCore
from patchcore_jax.search import coreset, k_center, neighbors, thinning
from patchcore_jax.settings import EmbeddingSpec


def embed(
    backbone: Backbone, data: Data, *, embedding: EmbeddingSpec, run: Run | None = None,
) -> tuple[np.ndarray, Recorder]:
  """Embeds the patches of all images, in host memory.

  Args:
    backbone: frozen network.
    data: images of one size.
    embedding: how patches are embedded.
    run: its progress is called with ('embed', done, number of images), and it says whether pictures are kept.

  Returns:
    [n, rows, columns, d] float32 in the order of the images, turned ones below the upright ones, and which of
    them could be read.

  Raises:
    ValueError: no images.
  """
  run = run or Run()
  read = Recorder(data.batches(), run.keep_images)
  first, batches = streaming.first_of(read)
  how = references(backbone, embedding, first.image)
  embeddings = np.empty((len(data.examples), *how.shape), np.float32)
  return embeddings[:_embed_into(embeddings, how, batches, run.progress)], read


def fit(detector: PatchCore, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Embeds good images and selects a memory bank (`Detector.fit`).

  Where several processes fit together, each embeds its part of the images, and gets the bank of all;
  embeddings stay where they are made, and the selection runs over all devices. Arrays for which
  `run.memory_gb` is not enough lie in files without a name in `run.scratch`, which vanish with the process.
  The stages of the progress are 'embed', 'project' and 'coreset'; `run.notify` is told the plan of the memory
  before the long work, and after a few batches how long all of it takes.

  Returns:
    A model of the arrays
      embeddings [m, d] float32, in order of selection, so every prefix is the bank of a smaller ratio;
      indices [m] int32, where each patch comes from: (image * rows + row) * columns + column over the
        training images in their order.
    The methods 'kmeans' and 'thinning' have no such order.

  Raises:
    ValueError: no images, a ratio that keeps no patch, too little memory for any way to fit, or method
      'kmeans' or 'thinning' for several processes.
    OSError: too little disk.
  """
  if detector.coreset.method == 'merge_reduce':
    return one_pass.fit(detector, data, backbones, run)
  return fit_and_use(detector, data, backbones, run)[0]


@dataclasses.dataclass(frozen=True)
class Fit:
  """The patches of a fit, while it lasts.

  Attributes:
    detector: the method, its ratio settled.
    embeddings: [n, rows, columns, d] of this process's images, turned ones below the upright ones.
    points: the same as [n * rows * columns, d].
    grid: (rows, columns) of the patches of an upright image.
    counts: [p] numbers of points of each process, which are together one fit; p is 1 for one alone.
    images: [p] numbers of images of each process.
    project: makes the points in which 'greedy' selects.
    plan: where the arrays lie.
    image_size: (height, width).
    batch_size: images that pass through the network at once.
  """

  detector: PatchCore
  embeddings: Any
  points: Any
  grid: tuple[int, int]
  counts: np.ndarray
  images: np.ndarray
  project: Callable[[], Any]
  plan: FitPlan
  image_size: tuple[int, int]
  batch_size: int


def fit_and_use(
    detector: PatchCore, data: Data, backbones: Sequence[Backbone], run: Run, *, folds: int = 0,
    use: Callable[[Fit], Any] | None = None) -> tuple[Model, Any]:
  """Fits a model, and returns it with what `use` makes of the patches while they are there, or None.

  Args:
    folds: parts of the images from which `use` selects, one after another; the plan allows for them.
  """
  (backbone,), embedding, joint = backbones, detector.embedding, run.several_processes
  part = processes.part(len(data.examples)) if joint else slice(0, len(data.examples))
  own = data.part(range(part.start, part.stop)) if joint else data
  read = Recorder(own.batches(), run.keep_images)
  first, batches = streaming.first_of(read)
  how = references(backbone, embedding, first.image)
  *grid, dim = how.shape
  patches, num_images = math.prod(grid), len(own.examples)
  detector = detector.of_size(patches * len(data.examples))
  plan = _plan(
      how, first, patches * counts(num_images, joint), dim, detector, run.memory_gb, folds=folds)
  run.notify(str(plan))
  foreground.announce(detector.scoring.foreground, run.notify)
  tell = fit_time.Teller(
      run, _work(detector, plan, counts(num_images, joint), patches, dim, folds, len(first.image)))
  allocate = functools.partial(disk_arrays.allocate, folder=run.scratch or tempfile.gettempdir())
  if plan.embeddings_on_device:
    embeddings, num_images = _embed_on_device(num_images, how, batches, tell)
    points = embeddings.points
  else:
    embeddings = allocate((num_images, *grid, dim), on_disk=plan.embeddings_on_disk)
    num_images = _embed_into(embeddings, how, batches, tell)
    points = disk_arrays.view(embeddings, (num_images * patches, dim))
  images = counts(num_images, joint)
  points_dim = _projection_dim(detector.coreset, patches * images)
  project = functools.partial(
      _project, points, points_dim, detector.coreset, plan, allocate, run.seed, run.progress)
  if use and detector.coreset.method == 'greedy':
    project = functools.partial(given, project())  # the folds select in the same points
  fitted = Fit(
      detector, embeddings, points, how.grid, patches * images, images, project, plan, first.image.shape[1:3],
      len(first.image))
  rows, indices = select(fitted, run.seed, run.progress)
  model = streaming.made(
      detector, backbones, {
          'embeddings': rows, 'indices': editing.upright(how.grid, indices, how.cells).astype(np.int32)},
      data, read, run, image_size=fitted.image_size, grid=how.grid, first=part.start if joint else None)
  return model, use(fitted) if use else None


@dataclasses.dataclass(frozen=True)
class Rows:
  """Some rows of an array, which `disk_arrays.read_rows` reads when they are asked for."""

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
    return disk_arrays.read_rows(self.array, self.rows[key])


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
  """Picks the embeddings [b, rows, columns, d] of some images out of the points of all."""
  return points.reshape(-1, *grid, points.shape[1])[images]


@functools.partial(jax.jit, donate_argnums=0)
def _put_images(points, values, images):
  """Puts embeddings [b, rows, columns, d] in the places of their images in `points`.

  Those whose place is beyond the end are padding, and are dropped.
  """
  b, *_, dim = values.shape
  values = values.reshape(b, -1, dim)
  return points.reshape(-1, *values.shape[1:]).at[images].set(values, mode='drop').reshape(points.shape)


def _embed_into(embeddings, how, batches, progress):
  """Fills `embeddings` [n, rows, columns, d], and counts the images that there were."""
  done = 0
  for batch, values in streaming.stream(how.fn, parallel.replicate(how.parameters), batches):
    valid = values[batch.valid]
    embeddings[done:done + len(valid)] = valid
    done += len(valid)
    progress('embed', done, len(embeddings))
  if not done:
    raise ValueError(streaming.NO_IMAGES)
  return done


def _embed_on_device(n, how, batches, progress):
  """Embeds up to n images on the device, and counts them."""
  *grid, dim = how.shape
  points, done = jnp.zeros((n * math.prod(grid), dim), jnp.float32), 0
  for batch, values in streaming.stream(
      how.fn, parallel.replicate(how.parameters), batches, to_host=False):
    place = np.where(batch.valid, done + np.cumsum(batch.valid) - 1, n).astype(np.int32)
    points = _put_images(points, values, place)
    done += int(batch.valid.sum())
    progress('embed', done, n)
  if not done:
    raise ValueError(streaming.NO_IMAGES)
  if done < n:
    points = points[:done * math.prod(grid)]
  return _OnDevice(points, tuple(grid)), done


def counts(n: int, joint: bool) -> np.ndarray:
  """Gathers the number of things of each process of a joint fit: [p]; p is 1 if the fit is not joint."""
  return processes.counts(n) if joint else np.array([n])


def _plan(how, batch, num_patches, dim, detector, memory_gb, *, folds):
  """Plans the memory of a fit for this process: at most `num_patches.max()` patches, and the whole bank."""
  device = jax.local_devices()[0]
  memory = device.memory_stats() if device.platform != 'cpu' else None
  batch_bytes = parallel.working_bytes(how.fn, parallel.replicate(how.parameters), batch.image)
  return fit_plan.plan(
      int(num_patches.max()), coreset.coreset_size(int(num_patches.sum()), detector.ratio), dim,
      _projection_dim(detector.coreset, num_patches), memory_gb=memory_gb,
      base_bytes=disk_arrays.resident_bytes(), batch_bytes=batch_bytes,
      device_bytes=memory.get('bytes_limit') if memory else None, num_devices=jax.local_device_count(),
      folds=folds, alone=len(num_patches) == 1)


def _work(detector, plan, images, patches, dim, folds, batch_size):
  """Says what a fit of `images` [p] of each process has to do, for an estimate of its time."""
  return Work(
      int(images.sum()), patches, dim, _projection_dim(detector.coreset, patches * images), plan.num_selected,
      folds=folds, batch_size=batch_size, method=detector.coreset.method,
      rounds=detector.coreset.rounds, stream=plan.stream,
      folds_at_once=plan.folds_at_once, angles=detector.embedding.rotations,
      num_devices=len(images) * jax.local_device_count())


def _projection_dim(spec, counts):
  """Computes the dimensions in which the selection of all points runs."""
  return spec.projection_dim or coreset.johnson_lindenstrauss_dim(int(counts.sum()))


def given(value: Any) -> Any:
  """Returns its argument; for `functools.partial` in the place of a function that makes it."""
  return value


def select(
    fit: Fit, seed: int, progress: Callable[[str, int, int], None] | None, *, size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Selects the bank from the points of all processes.

  `fit.project` is called for 'greedy' only: unless its caller keeps the points that it makes, they are gone
  before the embeddings are read.

  Args:
    size: how many; None for what the detector's ratio gives.

  Returns:
    (embeddings [m, d], indices [m] int32) of the bank.
  """
  n, spec = int(fit.counts.sum()), fit.detector.coreset
  size, method = size or coreset.coreset_size(n, fit.detector.ratio), spec.method
  if method in ('kmeans', 'thinning') and len(fit.counts) > 1:
    raise ValueError(f"coreset.method='{method}' is not for several processes: use 'greedy'.")
  if method == 'kmeans':
    return _cluster_centers(fit.points, size, seed)
  if method == 'thinning':
    indices = thinning.thinned(
        fit.points, size, rounds=min(spec.rounds, size), num_neighbors=spec.thinning_neighbors,
        rng=np.random.RandomState(seed), progress=progress and functools.partial(progress, 'coreset'))
  elif method == 'greedy':
    indices = greedy(fit, seed, size=size, progress=progress)
  elif method == 'random':
    indices = np.asarray(jax.random.permutation(jax.random.key(seed), n)[:size])
  else:
    indices = np.arange(n)
  indices = indices.astype(np.int32)
  return rows_at(fit, indices), indices


def rows_at(fit: Fit, indices: np.ndarray) -> np.ndarray:
  """Gathers the embeddings [m, d] of patches of all processes by their indices."""
  return processes.gather_rows(fit.points, fit.counts, indices)


def _cluster_centers(points, size, seed):
  """Computes centres of clusters, and finds for each the nearest of the points that were seen last."""
  from sklearn.cluster import MiniBatchKMeans  # a second to import, for one method

  clusters = MiniBatchKMeans(
      size, init='random', n_init=1, batch_size=max(4096, 2 * size), random_state=seed,
      compute_labels=False)
  order = np.random.default_rng(seed).permutation(len(points))
  parts = np.array_split(order, max(1, len(order) // max(4096, 2 * size)))
  for part in parts:
    clusters.partial_fit(disk_arrays.read_rows(points, part))
  centers = clusters.cluster_centers_.astype(np.float32)
  nearest = neighbors.nearest_neighbors(centers, disk_arrays.read_rows(points, parts[-1]))[1][:, 0]
  return centers, parts[-1][np.asarray(nearest)].astype(np.int32)


def _project(points, dim, spec, plan, allocate, seed, progress):
  """Makes the points in which the selection runs, on the host if the plan says so."""
  key, _ = jax.random.split(jax.random.key(seed))
  return coreset.random_projection(
      points, dim, key=key, kind=spec.projection,
      progress=functools.partial(progress, 'project'),
      out=allocate((len(points), dim), on_disk=plan.points_on_disk) if plan.points_on_host else None)


def greedy(
    fit: Fit, seed: int, *, size: int, valid: np.ndarray | None = None,
    progress: Callable[[str, int, int], None] | None = None) -> np.ndarray:
  """Selects greedily from the projected points of all processes, on all devices unless it streams.

  Args:
    size: how many.
    valid: [n] bool, those that may be selected; None for all. Only where one process fits alone.
  """
  projected, counts, spec = fit.project(), fit.counts, fit.detector.coreset
  n = int(counts.sum() if valid is None else valid.sum())
  _, key = jax.random.split(jax.random.key(seed))
  num_start = 1 if spec.start == 'point' else min(spec.num_start_points, n)
  start = np.asarray(jax.random.choice(key, n, (num_start,), replace=False))
  select = functools.partial(
      coreset.greedy_k_center, select_start=spec.start == 'point', stream=fit.plan.stream,
      progress=functools.partial(progress, 'coreset') if progress else None)
  if len(counts) > 1:
    mesh = processes.mesh(k_center.AXIS)
    pieces, valid = processes.spread(np.asarray(projected), mesh)
    picks = select(pieces, size, start=np.flatnonzero(valid)[start], mesh=mesh, valid=valid)
    return np.cumsum(valid)[picks] - 1  # as if there were no padding
  devices = jax.local_devices()
  split = len(devices) > 1 and not fit.plan.stream
  return select(
      projected, size, start=start if valid is None else np.flatnonzero(valid)[start], valid=valid,
      capacity=coreset.coreset_size(len(projected), fit.detector.ratio),
      mesh=Mesh(np.array(devices), (k_center.AXIS,)) if split else None)
