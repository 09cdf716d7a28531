"""PaDiM (Defard et al., "PaDiM: a Patch Distribution Modeling Framework", ICPR workshops 2020).

A Gaussian for every position of the grid. With n images and d dimensions, the covariance is
X'X + epsilon I, X being the [n, d] centred embeddings over sqrt(n - 1); from one
image it is epsilon I. Its inverse is not stored but a factor F, [d, d] or, where there are fewer images
than dimensions, [n, d]:

  n >= d:  LL' = X'X + epsilon I,  F = L^-1,    Mahalanobis(z)^2 = |Fz|^2
  n < d:   LL' = XX' + epsilon I,  F = L^-1 X,  Mahalanobis(z)^2 = (|z|^2 - |Fz|^2) / epsilon

The second is the first by Woodbury's identity. It takes n / d of the memory and of the time.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from threadpoolctl import threadpool_limits

from patchcore_jax import parallel, scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import base
from patchcore_jax.detectors import model as models
from patchcore_jax.detectors.base import Prediction, Progress
from patchcore_jax.detectors.model import Model
from patchcore_jax.scoring import ScoringSpec

_BLOCK = 2**23  # values of a block of positions: 32 MiB in each of its few temporary arrays


@dataclasses.dataclass(frozen=True)
class Spec:
  """Settings; the defaults are the paper's for WideResNet-50.

  Attributes:
    num_dims: channels chosen at random (section III-A); the paper's are 550 for WideResNet-50, 100 for
      ResNet-18. 0 for all.
    seed: of the choice.
    epsilon: added to the diagonal of every covariance (section III-B).
    sigma: of the Gaussian blur of the anomaly map, in pixels; 0 for none. Not of the fit.
    image_score: an image's score is the largest Mahalanobis distance of its positions ('position', as
      section III-C has it) or the largest value of the blurred map ('map', as public implementations
      have it, which is often better). Not of the fit.

  Raises:
    ValueError: values out of range.
  """

  num_dims: int = 550
  seed: int = 0
  epsilon: float = 0.01
  sigma: float = 4.0
  image_score: str = 'position'

  def __post_init__(self):
    if self.image_score not in ('position', 'map'):
      raise ValueError(f"padim.image_score={self.image_score!r}: expected 'position' or 'map'.")
    if self.num_dims < 0 or self.seed < 0:
      raise ValueError(f'padim.num_dims={self.num_dims}, seed={self.seed}: expected 0 or more.')
    if not 0 < self.epsilon < math.inf:
      raise ValueError(f'padim.epsilon={self.epsilon}: expected more than 0.')
    if not 0 <= self.sigma < math.inf:
      raise ValueError(f'padim.sigma={self.sigma}: expected 0 or more pixels.')


def describe(backbone: Backbone, spec: Spec) -> dict:
  """What a model must agree on with the network and the settings it is used with."""
  return models.describe(
      'padim', backbone, num_dims=spec.num_dims, seed=spec.seed, epsilon=spec.epsilon)


def fit(
    backbone: Backbone,
    batches: Iterable[Batch],
    num_images: int,
    *,
    spec: Spec,
    progress: Progress | None = None,
    scratch: str | None = None,
) -> Model:
  """Estimates the Gaussian of every position (sections III-A and III-B).

  The embedding of a position is that of its cell in every layer, concatenated; the grid is that of
  the first layer. The paper's layers are layer1, layer2 and layer3 of a ResNet.

  Memory on the host, with p positions: n p d floats for the embeddings (2 GB for 300 images at 224 and
  550 dimensions, on disk if `scratch` is given) and p min(n, d) d floats for the model (2 GB then,
  3.8 GB at most).

  Args:
    backbone: frozen network.
    batches: good images of one size; the batch size is a multiple of the number of local devices.
    num_images: how many images the batches hold at most.
    spec: settings.
    progress: called with (stage, done, total); stages are 'embed' and 'covariance'.
    scratch: a folder for a temporary file with the embeddings, or None for memory.

  Returns:
    A `Model` of the arrays
      dims [d] int32, channels chosen;
      mean [p, d] float32;
      factor [p, d, d] or [p, n, d] float32, as the module says.

  Raises:
    ValueError: more dimensions than channels, or a covariance that is singular
      in float32.
  """
  first, batches = base.first_of(batches)
  dims = _dims(backbone, first, spec)
  (embeddings,), image_size = models.collect(
      _collect_fn(base.maps_of(backbone)), (backbone.variables, dims), batches, num_images,
      progress=progress, scratch=scratch)
  n, rows, columns, dim = embeddings.shape
  positions = rows * columns
  embeddings = embeddings.reshape(n, positions, dim)
  mean = np.empty((positions, dim), np.float32)
  factor = np.empty((positions, min(n, dim), dim), np.float32)
  block = min(positions, max(1, _BLOCK // (dim * max(n, dim))))
  # On CPUs JAX factorises with SciPy's LAPACK, one position after the other. Threads within each do not
  # pay at these sizes, and where other programs run too they were seen to wait for seconds.
  with threadpool_limits(1, user_api='blas'):
    for start in range(0, positions, block):
      at = slice(min(start, positions - block), min(start + block, positions))  # all of one shape
      mean[at], factor[at] = jax.device_get(_gaussians(embeddings[:, at], spec.epsilon))
      if not np.isfinite(factor[at]).all():
        raise ValueError(
            f'The covariance of a position is singular in float32. Raise padim.epsilon={spec.epsilon}.')
      if progress:
        progress('covariance', at.stop, positions)
  return models.make(
      {'dims': dims, 'mean': mean, 'factor': factor}, describe(backbone, spec), num_images=n,
      grid=[rows, columns], image_size=image_size)


def predict(
    backbone: Backbone,
    model: Model,
    batches: Iterable[Batch],
    *,
    spec: Spec,
) -> Iterator[Prediction]:
  """Scores images (section III-C); one jitted function from pixels to maps.

  The map holds the Mahalanobis distances of the positions, enlarged bilinearly and blurred. The model
  is on every device.

  Args:
    backbone, spec: as in `fit`.
    model: from `fit`.
    batches: images of one size; the batch size is a multiple of the number of local devices.

  Yields:
    A `Prediction` for every batch, with s = 1.

  Raises:
    BankError: the model was made with another detector, network, setting or image size.
  """
  store.check(model.description, describe(backbone, spec))
  low_rank = model.description['num_images'] < len(model.arrays['dims'])
  fn = _predict_fn(base.maps_of(backbone), low_rank, spec)
  parameters = backbone.variables, *(model.arrays[name] for name in ('dims', 'mean', 'factor'))
  for batch, (scores, maps) in base.stream(
      fn, parallel.replicate(parameters), batches, expected=model.description):
    valid = batch.valid
    yield Prediction(batch.index[valid], scores[valid][None], maps[valid][None])


def _dims(backbone, batch, spec):
  maps = jax.eval_shape(base.maps_of(backbone), backbone.variables, batch.image)
  channels = sum(m.shape[-1] for m in maps)
  if spec.num_dims > channels:
    raise ValueError(
        f'padim.num_dims={spec.num_dims}: the layers {", ".join(backbone.layers)} of {backbone.name} '
        f'have {channels} channels. Choose fewer (100 is the paper\'s for ResNet-18), or 0 for all.')
  chosen = np.random.default_rng(spec.seed).permutation(channels)[:spec.num_dims or channels]
  return np.sort(chosen).astype(np.int32)


@functools.lru_cache(maxsize=16)
def _collect_fn(maps_fn):
  """((variables, dims), images) -> ([b, rows, columns, d],)."""

  def embed(parameters, images):
    variables, dims = parameters
    return (_concatenate(maps_fn(variables, images))[..., dims],)

  return embed


def _concatenate(maps):
  """Every cell of the first map with the cell of each other map that it lies in (section III-A)."""
  grid = maps[0].shape[1:3]

  def enlarge(m):
    y, x = (np.arange(cells) * size // cells for cells, size in zip(grid, m.shape[1:3]))
    return m[:, y][:, :, x]

  return jnp.concatenate([enlarge(m) for m in maps], axis=-1)


@jax.jit
def _gaussians(embeddings, epsilon):
  """Embeddings [n, p, d] -> (mean [p, d], factor [p, min(n, d), d])."""
  n, _, dim = embeddings.shape
  mean = embeddings.mean(axis=0)
  x = jnp.swapaxes(embeddings - mean, 0, 1) / math.sqrt(max(1, n - 1))
  size = min(n, dim)
  gram = jnp.einsum('pni,pnj->pij' if n >= dim else 'pid,pjd->pij', x, x, precision=lax.Precision.HIGHEST)
  lower = lax.linalg.cholesky(gram + epsilon * jnp.eye(size))
  right = jnp.broadcast_to(jnp.eye(size), gram.shape) if n >= dim else x
  return mean, lax.linalg.triangular_solve(lower, right, left_side=True, lower=True)


@functools.lru_cache(maxsize=16)
def _predict_fn(maps_fn, low_rank, spec):
  """((variables, dims, mean, factor), images) -> image scores [b], anomaly maps [b, h, w]."""

  def score(parameters, images):
    variables, dims, mean, factor = parameters
    (embeddings,) = _collect_fn(maps_fn)((variables, dims), images)
    b, rows, columns, dim = embeddings.shape
    z = embeddings.reshape(b, -1, dim) - mean
    projected = jnp.einsum('prd,bpd->bpr', factor, z, precision=lax.Precision.HIGHEST)
    squares = jnp.square(projected).sum(-1)
    if low_rank:
      squares = jnp.maximum(jnp.square(z).sum(-1) - squares, 0) / spec.epsilon
    patches = jnp.sqrt(squares).reshape(b, rows, columns)
    anomaly_maps = scoring.anomaly_maps(patches, images.shape[1:3], ScoringSpec(sigma=spec.sigma))
    return scoring.image_scores(patches if spec.image_score == 'position' else anomaly_maps), anomaly_maps

  return score
