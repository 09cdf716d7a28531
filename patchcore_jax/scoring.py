"""Computes image scores and anomaly maps from the distances of neighbours (the paper's section 3.3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax import foreground
from patchcore_jax.search import neighbors, search_bank
from patchcore_jax.settings import ScoringSpec

# scipy.ndimage.gaussian_filter cuts its kernel there; the paper's code uses it with that default.
_TRUNCATE = 4.0


def patch_scores(distances_sq: jax.Array, spec: ScoringSpec) -> jax.Array:
  """Averages squared distances [..., k], or their roots, to patch scores [...].

  >>> patch_scores(jnp.array([[4., 16.]]), ScoringSpec(distance='root'))
  Array([3.], dtype=float32)
  """
  return _distance(distances_sq, spec).mean(axis=-1)


def background(embeddings: jax.Array, spec: ScoringSpec) -> jax.Array | None:
  """Finds the patches that are not scored, [b, h, w] bool, in embeddings [b, h, w, d]; None where all are."""
  return None if spec.foreground == 'none' else ~foreground.objects(embeddings)


def image_scores(scores: jax.Array) -> jax.Array:
  """Finds image scores [b] in patch scores [b, h, w]: the score of the most anomalous patch."""
  return scores.max(axis=(1, 2))


def top_share_scores(scores: jax.Array, share: float) -> jax.Array:
  """Averages the largest patch scores of each image: int(share * patches) of them, at least one.

  Args:
    scores: patch scores [b, h, w], or maps.
    share: in [0, 1].

  Returns:
    [b] float32.

  >>> top_share_scores(jnp.array([[[1., 5.], [3., 2.]]]), 0.5)
  Array([4.], dtype=float32)
  """
  flat = scores.reshape(len(scores), -1)
  return lax.top_k(flat, top_count(flat.shape[1], share))[0].mean(1)


def top_count(number: int, share: float) -> int:
  """Counts the scores that a share of them is, at least one.

  >>> top_count(1369, 0.01), top_count(50, 0.01)
  (13, 1)
  """
  return max(1, int(share * number))


def reweighted_image_scores(
    embeddings: jax.Array,
    distances_sq: jax.Array,
    indices: jax.Array,
    bank: jax.Array | search_bank.SearchBank,
    spec: ScoringSpec,
    *,
    size: int | None = None,
    axis_name: str | None = None,
    kernels: bool = True,
) -> jax.Array:
  """Computes image scores by the paper's equation 7: s = (1 - softmax(d)_1) s*.

  s* is the distance of the most anomalous patch to its nearest bank patch m*, and d are its distances
  to the `support_neighbors` bank patches nearest to m*, m* first. The weight is small where m* is
  itself far from the other nominal patches. It always uses root distances, or squared ones where
  `spec.image_score` is 'reweighted_squared'; s* follows `spec.distance`.

  Args:
    embeddings: [b, p, d], the p patches of each image.
    distances_sq, indices: [b, p, k], what `nearest_neighbors` found.
    bank: [m, d], or what `search_bank.prepare` made of it.
    spec: see `ScoringSpec`.
    size: only the first so many rows of the bank count; None for all.
    axis_name, kernels: see `neighbors.nested_nearest_neighbors`.

  Returns:
    [b] float32.
  """
  batch = jnp.arange(len(embeddings))
  patch = jnp.argmax(distances_sq[..., 0], axis=1)
  nearest = indices[batch, patch, 0]
  if size is None:
    size = len(bank.rows if isinstance(bank, search_bank.SearchBank) else bank)
  ((_, support),) = neighbors.nested_nearest_neighbors(
      neighbors.bank_rows(bank, nearest, axis_name), bank, (size,),
      k=min(spec.support_neighbors, size), axis_name=axis_name, kernels=kernels)
  # m* leads even if the bank holds an equal patch with a lower index.
  others = jnp.where(support == nearest[:, None], -1, support)
  position = jnp.argsort(others >= 0, axis=1, stable=True)
  support = jnp.take_along_axis(support, position, axis=1).at[:, 0].set(nearest)
  difference = embeddings[batch, patch][:, None, :] - neighbors.bank_rows(bank, support, axis_name)
  distances = jnp.sum(jnp.square(difference), axis=-1)
  if spec.image_score != 'reweighted_squared':
    distances = jnp.sqrt(distances)
  weights = 1 - jax.nn.softmax(distances, axis=-1)[:, 0]
  return weights * _distance(distances_sq[batch, patch, 0], spec)


def anomaly_maps(scores: jax.Array, size: tuple[int, int], spec: ScoringSpec) -> jax.Array:
  """Enlarges patch scores [b, h, w] to anomaly maps [b, height, width], in the scores' units.

  Enlargement (corners not aligned, as in PyTorch) and the Gaussian blur are both linear and separable:
  together they are one small matrix for each axis.

  >>> anomaly_maps(jnp.ones((1, 2, 2)), (4, 6), ScoringSpec()).shape
  (1, 4, 6)
  """
  return enlarged(scores, size, spec.upsampling, spec.sigma, edges=spec.blur_edges)


def enlarged(
    scores: jax.Array, size: tuple[int, int], upsampling: str = 'bilinear', sigma: float = 0.0, *,
    radius: int | None = None, edges: str = 'symmetric') -> jax.Array:
  """Enlarges and blurs patch scores as `anomaly_maps` does, in more ways.

  Args:
    scores: [b, h, w] float32.
    size: (height, width) of the result.
    upsampling: as of `ScoringSpec`, or 'aligned': bilinear, with the corners of both on each other.
    sigma: as of `ScoringSpec`.
    radius: taps of the Gaussian on either side of the middle one; None for as many as SciPy takes.
    edges: as `ScoringSpec.blur_edges`, or 'zeros' where nothing lies beyond the edge.

  >>> enlarged(jnp.array([[[0., 2.]]]), (1, 5), 'aligned')
  Array([[[0. , 0.5, 1. , 1.5, 2. ]]], dtype=float32)
  """
  rows, columns = (
      _enlarge_and_blur(cells, pixels, upsampling, sigma, edges, radius)
      for cells, pixels in zip(scores.shape[1:], size))
  return jnp.einsum(
      'yi,bij,xj->byx', rows, scores, columns, precision=lax.Precision.HIGHEST)


def _distance(distances_sq, spec):
  return distances_sq if spec.distance == 'squared' else jnp.sqrt(distances_sq)


@functools.lru_cache(maxsize=64)
def _enlarge_and_blur(
    cells: int, pixels: int, upsampling: str, sigma: float, edges: str, radius: int | None) -> np.ndarray:
  """Makes the matrix [pixels, cells] float32 of one axis, in float64.

  Its rows sum to one, but for those near an edge beyond which are zeros.
  """
  pixel = np.arange(pixels)
  enlarge = np.zeros((pixels, cells))
  if upsampling == 'nearest':
    enlarge[pixel, pixel * cells // pixels] = 1
  else:
    position = (
        pixel * ((cells - 1) / max(pixels - 1, 1)) if upsampling == 'aligned'
        else np.clip((pixel + 0.5) * cells / pixels - 0.5, 0, cells - 1))
    low = np.floor(position).astype(int)
    enlarge[pixel, low] += 1 - (position - low)
    enlarge[pixel, np.minimum(low + 1, cells - 1)] += position - low
  if not sigma:
    return enlarge.astype(np.float32)
  radius = int(_TRUNCATE * sigma + 0.5) if radius is None else radius
  offsets = np.arange(-radius, radius + 1)
  kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
  kernel /= kernel.sum()
  # Which pixel each tap sees. numpy.pad knows the edges, and goes on mirroring where the kernel is
  # wider than the map.
  blur = np.zeros((pixels, pixels + 1))
  if edges == 'zeros':  # the last column is left out
    source = np.pad(pixel, radius, 'constant', constant_values=pixels)
  else:
    source = np.pad(pixel, radius, edges)
  np.add.at(blur, (pixel[:, None], source[pixel[:, None] + offsets + radius]), kernel)
  return (blur[:, :pixels] @ enlarge).astype(np.float32)
