"""Principal components and whitening of vectors that come block by block, in float64 on the host.

Incremental PCA (Ross et al., "Incremental Learning for Robust Visual Tracking", IJCV 2008) keeps the mean,
singular values and axes of the blocks so far. As long as it cuts none of them off, that is the scatter matrix
in another form, and the result is the PCA of all vectors. Here the scatter matrix itself is kept: one product
a block in the place of a decomposition, and nothing to cut off, however few vectors the first block has.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

_FLOOR, _TINY = 1e-8, 1e-12  # of eigenvalues, beside their mean; and of that mean


class Moments(NamedTuple):
  """What is to be known of n vectors of d values.

  Attributes:
    count: n.
    mean: [d] float64.
    scatter: [d, d] float64, the sum of the outer products of what deviates from the mean.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @property
  def covariance(self) -> np.ndarray:
    """The unbiased covariance [d, d]; that of one vector is 0."""
    return self.scatter / max(self.count - 1, 1)


class Components(NamedTuple):
  """The principal components of d values, by descending variance.

  Attributes:
    variance: [d] float64, of the vectors along each axis.
    ratio: [d] float64, its share of the variance of all.
    axes: [d, d] float64, a row for each, of unit length; the value largest in amount of each is positive.
  """

  variance: np.ndarray
  ratio: np.ndarray
  axes: np.ndarray

  def needed(self, share: float) -> int:
    """Counts the leading components that have this share of the variance together; all where none has."""
    return min(int(np.searchsorted(np.cumsum(self.ratio), share)) + 1, len(self.ratio))


def moments(rows: np.ndarray) -> Moments:
  """Computes the moments of vectors [n, d], n at least 1.

  >>> moments(np.array([[1.0, 0.0], [3.0, 0.0]])).covariance.tolist()
  [[2.0, 0.0], [0.0, 0.0]]
  """
  rows = np.asarray(rows, np.float64)
  mean = rows.mean(axis=0)
  centred = rows - mean
  return Moments(len(rows), mean, centred.T @ centred)


def merged(one: Moments, other: Moments) -> Moments:
  """Makes the moments of two sets of vectors together (Chan, Golub and LeVeque 1983), exactly.

  >>> merged(moments(np.array([[1.0]])), moments(np.array([[3.0]])))
  Moments(count=2, mean=array([2.]), scatter=array([[2.]]))
  """
  count, delta = one.count + other.count, other.mean - one.mean
  return Moments(
      count, one.mean + delta * (other.count / count),
      one.scatter + other.scatter + np.outer(delta, delta) * (one.count * other.count / count))


def principal_components(found: Moments) -> Components:
  """Finds the principal components.

  Raises:
    ValueError: all vectors are equal.
  """
  total = np.trace(found.covariance)
  if not total > 0:
    raise ValueError(f'All {found.count} vectors are equal: there are no principal components.')
  with threadpool_limits(1):  # as `search_bank` has it
    variance, axes = np.linalg.eigh(found.covariance)
  variance, axes = np.maximum(variance[::-1], 0), axes[:, ::-1].T  # below 0 by rounding
  largest = axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)]
  return Components(variance, variance / total, axes * np.sign(largest)[:, None])


def shrunk(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
  """Shrinks a covariance [k, k] towards the multiple of the identity that has its trace.

  Eigenvalues are then raised to 1e-8 of their mean where they are less.

  Args:
    covariance: [k, k] float64, symmetric.
    shrinkage: the share of the identity, in [0, 1].

  >>> shrunk(np.diag([3.0, 1.0]), 0.5).tolist()
  [[2.5, 0.0], [0.0, 1.5]]
  """
  mean = np.trace(covariance) / len(covariance)
  mixed = (1 - shrinkage) * covariance + shrinkage * mean * np.eye(len(covariance))
  with threadpool_limits(1):
    values, vectors = np.linalg.eigh(mixed)
  regular = (vectors * np.maximum(values, _FLOOR * max(abs(mean), _TINY))) @ vectors.T
  return (regular + regular.T) / 2


def whitening_matrix(covariance: np.ndarray) -> np.ndarray:
  """Computes L^-1 of a covariance LL' [k, k]: what it makes of vectors have the identity as theirs.

  Where rounding left it without a factor L, the least power of ten from 1e-12 to 1 that gives it one is added
  to its diagonal.

  Raises:
    ValueError: not even 1 does.

  >>> whitening_matrix(np.diag([4.0, 1.0])).tolist()
  [[0.5, 0.0], [0.0, 1.0]]
  """
  identity = np.eye(len(covariance))
  for added in (0.0, *(10.0**power for power in range(-12, 1))):
    try:
      lower = np.linalg.cholesky(covariance + added * identity)
    except np.linalg.LinAlgError:
      continue
    return scipy.linalg.solve_triangular(lower, identity, lower=True)
  raise ValueError('The covariance is no such: it is not positive, nor is it with 1 on its diagonal more.')
