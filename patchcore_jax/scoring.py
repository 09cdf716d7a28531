"""Neighbour distances -> image score and anomaly map (the paper's section 3.3)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax import neighbors

# scipy.ndimage.gaussian_filter cuts its kernel there; the paper's code uses it with that default.
_TRUNCATE = 4.0


@dataclasses.dataclass(frozen=True)
class ScoringSpec:
  """How distances become scores.

  Attributes:
    num_neighbors: k; a patch score is the mean distance to its k nearest neighbours.
    distance: 'squared' (the paper's released code) or 'root'.
    image_score: 'max' (the released code: the largest patch score) or 'reweighted' (the paper's
      equation 7).
    support_neighbors: neighbours of the nearest bank patch that equation 7 looks at, itself
      included; only for 'reweighted'.
    sigma: of the Gaussian blur of the anomaly map, in pixels; 0 for none.

  Raises:
    ValueError: values out of range.
  """

  num_neighbors: int = 1
  distance: str = 'squared'
  image_score: str = 'max'
  support_neighbors: int = 9
  sigma: float = 4.0

  def __post_init__(self):
    if self.distance not in ('squared', 'root'):
      raise ValueError(f"scoring.distance={self.distance!r}: expected 'squared' or 'root'.")
    if self.image_score not in ('max', 'reweighted'):
      raise ValueError(f"scoring.image_score={self.image_score!r}: expected 'max' or 'reweighted'.")
    if self.num_neighbors < 1 or self.support_neighbors < 2:
      raise ValueError(
          f'scoring.num_neighbors={self.num_neighbors}, support_neighbors={self.support_neighbors}: '
          'expected at least 1 and 2.')
    if self.sigma < 0:
      raise ValueError(f'scoring.sigma={self.sigma}: expected 0 or more pixels.')


def patch_scores(distances_sq: jax.Array, spec: ScoringSpec) -> jax.Array:
  """[..., k] squared distances -> [...] scores: their mean, or that of their roots.

  >>> patch_scores(jnp.array([[4., 16.]]), ScoringSpec(distance='root'))
  Array([3.], dtype=float32)
  """
  return _distance(distances_sq, spec).mean(axis=-1)


def image_scores(scores: jax.Array) -> jax.Array:
  """Patch scores [b, h, w] -> image scores [b]: the score of the most anomalous patch."""
  return scores.max(axis=(1, 2))


def reweighted_image_scores(
    embeddings: jax.Array,
    distances_sq: jax.Array,
    indices: jax.Array,
    bank: jax.Array,
    spec: ScoringSpec,
) -> jax.Array:
  """Image scores by the paper's equation 7: s = (1 - softmax(d)_1) s*.

  s* is the distance of the most anomalous patch to its nearest bank patch m*, and d are its distances
  to the `support_neighbors` bank patches nearest to m*, m* first. The weight is small where m* is
  itself far from the other nominal patches. It always uses root distances; s* follows
  `spec.distance`.

  Args:
    embeddings: [b, p, d] of the p patches of each image.
    distances_sq, indices: [b, p, k] from `nearest_neighbors`.
    bank: [m, d].
    spec: see `ScoringSpec`.

  Returns:
    [b] float32.
  """
  batch = jnp.arange(len(embeddings))
  patch = jnp.argmax(distances_sq[..., 0], axis=1)
  nearest = indices[batch, patch, 0]
  support = neighbors.nearest_neighbors(
      bank[nearest], bank, k=min(spec.support_neighbors, len(bank)))[1]
  # m* leads even if the bank holds an equal patch with a lower index.
  others = jnp.where(support == nearest[:, None], -1, support)
  position = jnp.argsort(others >= 0, axis=1, stable=True)
  support = jnp.take_along_axis(support, position, axis=1).at[:, 0].set(nearest)
  difference = embeddings[batch, patch][:, None, :] - bank[support]
  distances = jnp.sqrt(jnp.sum(jnp.square(difference), axis=-1))
  weights = 1 - jax.nn.softmax(distances, axis=-1)[:, 0]
  return weights * _distance(distances_sq[batch, patch, 0], spec)


def anomaly_maps(scores: jax.Array, size: tuple[int, int], spec: ScoringSpec) -> jax.Array:
  """Patch scores [b, h, w] -> anomaly maps [b, height, width], in the scores' units.

  Bilinear enlargement (corners not aligned, as PyTorch) and a Gaussian blur (as
  scipy.ndimage.gaussian_filter, edges mirrored) are both linear and separable: together they are one
  small matrix for each axis.

  >>> anomaly_maps(jnp.ones((1, 2, 2)), (4, 6), ScoringSpec()).shape
  (1, 4, 6)
  """
  rows = _enlarge_and_blur(scores.shape[1], size[0], spec.sigma)
  columns = _enlarge_and_blur(scores.shape[2], size[1], spec.sigma)
  return jnp.einsum(
      'yi,bij,xj->byx', rows, scores, columns, precision=lax.Precision.HIGHEST)


def _distance(distances_sq, spec):
  return distances_sq if spec.distance == 'squared' else jnp.sqrt(distances_sq)


@functools.lru_cache(maxsize=64)
def _enlarge_and_blur(cells: int, pixels: int, sigma: float) -> np.ndarray:
  """[pixels, cells] float32, made in float64; rows sum to one."""
  position = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
  low = np.floor(position).astype(int)
  enlarge = np.zeros((pixels, cells))
  enlarge[np.arange(pixels), low] += 1 - (position - low)
  enlarge[np.arange(pixels), np.minimum(low + 1, cells - 1)] += position - low
  if not sigma:
    return enlarge.astype(np.float32)
  radius = int(_TRUNCATE * sigma + 0.5)
  offsets = np.arange(-radius, radius + 1)
  kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
  kernel /= kernel.sum()
  # Mirrored edges (d c b a | a b c d | d c b a) have period 2 * pixels.
  source = (np.arange(pixels)[:, None] + offsets) % (2 * pixels)
  source = np.minimum(source, 2 * pixels - 1 - source)
  blur = np.zeros((pixels, pixels))
  np.add.at(blur, (np.arange(pixels)[:, None], source), kernel)
  return (blur @ enlarge).astype(np.float32)
