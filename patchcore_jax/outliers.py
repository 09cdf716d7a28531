"""Tells how far each of some points stands out of its group: for many groups at once, in bounded memory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from patchcore_jax.search.distances import in_blocks, smallest

_VALUES = 2**23  # of the arrays of a block of groups: 32 MiB in each
_TOGETHER = 8  # coordinates that are summed in one pass over the distances
_COVARIANCE = 0.01  # what is added to the diagonal of a covariance


def local_outlier_factors(points: jax.Array, num_neighbors: int) -> jax.Array:
  """Computes local outlier factors (Breunig et al., "LOF: Identifying Density-Based Local Outliers", 2000).

  With k neighbours, the k-distance of a point is its distance to the k-th nearest other. Its density is 1
  over the mean, over its k nearest others, of max(distance, k-distance of the other), and 1e-10 more for
  points that coincide. Its factor is the mean density of these others over its own: about 1 within a crowd.

  Memory: some arrays of n^2 values, and of several groups together where n is small.

  Args:
    points: [p, n, d] float32: p groups of n points; a point is compared with those of its group.
    num_neighbors: k, at least 1 and less than n.

  Returns:
    [p, n] float32.

  Raises:
    ValueError: no more points than neighbours.

  >>> local_outlier_factors(jnp.array([[[0.], [1.], [2.], [9.]]]), 2)  # doctest: +ELLIPSIS
  Array([[0.875..., 1.333..., 0.875..., 4.375...]], dtype=float32)
  """
  n = points.shape[1]
  if not 1 <= num_neighbors < n:
    raise ValueError(f'num_neighbors={num_neighbors}: expected 1 to {n - 1} for {n} points in a group.')
  return _by_blocks(_factors, points, n * n, num_neighbors)


def nearest_distances(points: jax.Array) -> jax.Array:
  """Computes the distance of each point [p, n, d] to the nearest other of its group: [p, n] float32.

  >>> nearest_distances(jnp.array([[[0.], [1.], [9.]]])).tolist()
  [[1.0, 1.0, 8.0]]
  """
  return _by_blocks(_nearest, points, points.shape[1] ** 2)


def mahalanobis_distances(points: jax.Array) -> jax.Array:
  """Computes the distance of each point [p, n, d] to the mean of its group, in units of its spread: [p, n].

  The covariance of a group is the unbiased one, and 0.01 on its diagonal more.

  >>> mahalanobis_distances(jnp.array([[[0.], [2.]]]))  # doctest: +ELLIPSIS
  Array([[0.705..., 0.705...]], dtype=float32)
  """
  return _by_blocks(_mahalanobis, points, points.shape[2] * max(points.shape[1:]))


def _by_blocks(function: Callable, points: jax.Array, values: int, *arguments: int) -> jax.Array:
  """Applies a function to blocks of groups, each of which takes so many values."""
  return _compiled(function, max(1, _VALUES // values), arguments)(jnp.asarray(points))


@functools.lru_cache(maxsize=16)
def _compiled(function, size, arguments):
  """Compiles what `_by_blocks` does, once for the same arguments."""
  return jax.jit(functools.partial(in_blocks, lambda points: function(points, *arguments), size))


def _distances(points):
  """Computes the distances [p, n, n] within groups [p, n, d]; infinity to itself."""
  p, n, dim = points.shape
  coordinates = jnp.pad(points, ((0, 0), (0, 0), (0, -dim % _TOGETHER)))
  coordinates = jnp.moveaxis(coordinates, 2, 0).reshape(-1, _TOGETHER, p, n)

  def add(total, some):
    return total + sum(jnp.square(x[:, :, None] - x[:, None]) for x in some), None

  squares, _ = lax.scan(add, jnp.zeros((p, n, n)), coordinates)
  return jnp.where(jnp.eye(n, dtype=bool), jnp.inf, jnp.sqrt(squares))


def _factors(points, num_neighbors):
  """Computes the factors [p, n] of `local_outlier_factors`."""
  p, n, _ = points.shape
  distances, neighbors = smallest(_distances(points).reshape(p * n, n), num_neighbors)
  distances, neighbors = distances.reshape(p, n, -1), neighbors.reshape(p, -1)

  def of_neighbors(values):
    return jnp.take_along_axis(values, neighbors, axis=1).reshape(p, n, -1)

  reached = jnp.maximum(distances, of_neighbors(distances[..., -1]))
  density = 1 / (reached.mean(axis=2) + 1e-10)
  return of_neighbors(density).mean(axis=2) / density


def _nearest(points):
  return _distances(points).min(axis=2)


def _mahalanobis(points):
  centred = points - points.mean(axis=1, keepdims=True)
  products = jnp.einsum('pni,pnj->pij', centred, centred, precision=lax.Precision.HIGHEST)
  covariance = products / (points.shape[1] - 1) + _COVARIANCE * jnp.eye(points.shape[2])
  found = lax.linalg.triangular_solve(
      lax.linalg.cholesky(covariance), jnp.swapaxes(centred, 1, 2), left_side=True, lower=True)
  return jnp.sqrt(jnp.square(found).sum(axis=1))
