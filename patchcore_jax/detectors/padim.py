"""PaDiM (Defard et al., "PaDiM: a Patch Distribution Modeling Framework", ICPR workshops 2020).

It estimates a Gaussian for every position of the grid. With n images and d dimensions, the covariance is
X'X + epsilon I, X being the [n, d] centred embeddings over sqrt(n - 1); from one
image it is epsilon I. Its inverse is not stored but a factor F, [d, d] or, where there are fewer images
than dimensions, [n, d]:

  n >= d:  LL' = X'X + epsilon I,  F = L^-1,    Mahalanobis(z)^2 = |Fz|^2
  n < d:   LL' = XX' + epsilon I,  F = L^-1 X,  Mahalanobis(z)^2 = (|z|^2 - |Fz|^2) / epsilon

The second is the first by Woodbury's identity. It takes n / d of the memory and of the time.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from threadpoolctl import threadpool_limits

from patchcore_jax import scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.settings import PaDiM
from patchcore_jax.settings import ScoringSpec, SearchSpec

_BLOCK = 2**23  # values of a block of positions: 32 MiB in each of its few temporary arrays


def fit(detector: PaDiM, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Estimates the Gaussian of every position (sections III-A and III-B).

  The embedding of a position is that of its cell in every layer, concatenated; the grid is that of
  the first layer. The paper's layers are layer1, layer2 and layer3 of a ResNet.

  Memory on the host, with p positions: n p d floats for the embeddings (2 GB for 300 images at 224 and
  550 dimensions, on disk if `run.scratch` is given) and p min(n, d) d floats for the model (2 GB then,
  3.8 GB at most).

  The stages of the progress are 'embed' and 'covariance'.

  Returns:
    A `Model` of the arrays
      dims [d] int32, channels chosen;
      mean [p, d] float32;
      factor [p, d, d] or [p, n, d] float32, as the module says.

  Raises:
    ValueError: more dimensions than channels, or a covariance that is singular in float32.
  """
  (backbone,), read = backbones, Recorder(data.batches(), run.keep_images)
  first, batches = streaming.first_of(read)
  dims = _dims(backbone, first, detector, run.seed)
  (embeddings,), image_size = streaming.collect(
      _collect_fn(streaming.maps_of(backbone)), (backbone.variables, dims), batches, len(data.examples), run)
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
      mean[at], factor[at] = jax.device_get(_gaussians(embeddings[:, at], detector.epsilon))
      if not np.isfinite(factor[at]).all():
        raise ValueError(
            f'The covariance of a position is singular in float32. Raise padim.epsilon={detector.epsilon}.')
      run.progress('covariance', at.stop, positions)
  return streaming.made(
      detector, (backbone,), {'dims': dims, 'mean': mean, 'factor': factor}, data, read, run,
      image_size=image_size, grid=(rows, columns))


def score_fn(
    detector: PaDiM, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`, the paper's section III-C).

  Its parameters are the network's variables and the model's arrays.

  The map holds the Mahalanobis distances of the positions, enlarged bilinearly and blurred.
  """
  (backbone,) = backbones
  low_rank = model.description.num_images < len(model.arrays['dims'])
  return ScoreFn(
      _score_fn(streaming.maps_of(backbone), low_rank, detector),
      (backbone.variables, *(model.arrays[name] for name in ('dims', 'mean', 'factor'))))


def _dims(backbone, batch, detector, seed):
  """Chooses channels at random: [d] int32, ascending."""
  maps = jax.eval_shape(streaming.maps_of(backbone), backbone.variables, batch.image)
  channels = sum(m.shape[-1] for m in maps)
  if detector.num_dims > channels:
    raise ValueError(
        f'padim.num_dims={detector.num_dims}: the layers {", ".join(backbone.layers)} of {backbone.name} '
        f'have {channels} channels. Choose fewer (100 is the paper\'s for ResNet-18), or 0 for all: '
        '--padim-num-dims 0.')
  chosen = np.random.default_rng(seed).permutation(channels)[:detector.num_dims or channels]
  return np.sort(chosen).astype(np.int32)


@functools.lru_cache(maxsize=16)
def _collect_fn(maps_fn):
  """Makes the function ((variables, dims), images) -> ([b, rows, columns, d],)."""

  def embed(parameters, images):
    variables, dims = parameters
    return (_concatenate(maps_fn(variables, images))[..., dims],)

  return embed


def _concatenate(maps):
  """Joins every cell of the first map with the cell of each other map that it lies in (section III-A)."""
  grid = maps[0].shape[1:3]

  def enlarge(m):
    y, x = (np.arange(cells) * size // cells for cells, size in zip(grid, m.shape[1:3]))
    return m[:, y][:, :, x]

  return jnp.concatenate([enlarge(m) for m in maps], axis=-1)


@jax.jit
def _gaussians(embeddings, epsilon):
  """Computes the mean [p, d] and the factor [p, min(n, d), d] of embeddings [n, p, d]."""
  n, _, dim = embeddings.shape
  mean = embeddings.mean(axis=0)
  x = jnp.swapaxes(embeddings - mean, 0, 1) / math.sqrt(max(1, n - 1))
  size = min(n, dim)
  gram = jnp.einsum('pni,pnj->pij' if n >= dim else 'pid,pjd->pij', x, x, precision=lax.Precision.HIGHEST)
  lower = lax.linalg.cholesky(gram + epsilon * jnp.eye(size))
  right = jnp.broadcast_to(jnp.eye(size), gram.shape) if n >= dim else x
  return mean, lax.linalg.triangular_solve(lower, right, left_side=True, lower=True)


@functools.lru_cache(maxsize=16)
def _score_fn(maps_fn, low_rank, detector):
  """Makes the function ((variables, dims, mean, factor), images) -> `Scores`."""

  def score(parameters, images):
    variables, dims, mean, factor = parameters
    (embeddings,) = _collect_fn(maps_fn)((variables, dims), images)
    b, rows, columns, dim = embeddings.shape
    z = embeddings.reshape(b, -1, dim) - mean
    projected = jnp.einsum('prd,bpd->bpr', factor, z, precision=lax.Precision.HIGHEST)
    squares = jnp.square(projected).sum(-1)
    if low_rank:
      squares = jnp.maximum(jnp.square(z).sum(-1) - squares, 0) / detector.epsilon
    patches = jnp.sqrt(squares).reshape(b, rows, columns)
    anomaly_maps = scoring.anomaly_maps(patches, images.shape[1:3], ScoringSpec(sigma=detector.sigma))
    return Scores(
        scoring.image_scores(patches if detector.image_score == 'position' else anomaly_maps), anomaly_maps,
        {'patch': jnp.argmax(patches.reshape(b, -1), axis=1).astype(jnp.int32)})

  return score
