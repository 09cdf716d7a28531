"""Tells an object from its background by the features of one image alone (after AnomalyDINO, section 3.2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The score from which a patch counts, the centre of the image, and what share of it must be foreground.
_THRESHOLD, _CENTRE, _SHARE = 10.0, (0.2, 0.8), 0.35
# The axis is sought among a few directions: each step brings the rest of the space down by the ratio of the
# ninth variance to the first, 0.04 to 0.15 with the features of two networks.
_DIRECTIONS, _STEPS = 8, 6
# Another axis of 99 % of the largest variance is at 1e-18 of it in the covariance to the power of 2^12.
_SQUARINGS = 12
_TINY = 1e-30


def principal_scores(tokens: jax.Array) -> jax.Array:
  """Computes the first principal component of each image's tokens, by products alone.

  Args:
    tokens: [b, n, c] float32.

  Returns:
    [b, n] float32: centred tokens along the axis of the largest variance, whose entry of the largest absolute
    value is positive.

  >>> principal_scores(jnp.array([[[0., 1.], [0., 5.]]]))
  Array([[-2.,  2.]], dtype=float32)
  """
  tokens = tokens - tokens.mean(1, keepdims=True)
  covariance = _product('bni,bnj->bij', tokens, tokens)
  dim = covariance.shape[1]
  start = np.random.default_rng(0).standard_normal((dim, min(_DIRECTIONS, dim)))
  basis = jnp.broadcast_to(jnp.asarray(start, jnp.float32), (len(tokens), *start.shape))
  for _ in range(_STEPS):
    basis = _orthonormal(_product('bij,bjk->bik', covariance, basis))
  power = _product('bik,bil->bkl', basis, _product('bij,bjl->bil', covariance, basis))
  for _ in range(_SQUARINGS):
    power = power / jnp.maximum(jnp.trace(power, axis1=1, axis2=2), _TINY)[:, None, None]
    power = _product('bij,bjk->bik', power, power)
  # The column of the largest diagonal entry is the axis times its largest entry, and no sum cancels in it.
  largest = jnp.argmax(jnp.diagonal(power, axis1=1, axis2=2), 1)
  axis = _product('bik,bk->bi', basis, jnp.take_along_axis(power, largest[:, None, None], 2)[..., 0])
  for _ in range(2):
    axis = _product('bij,bj->bi', covariance, _unit(axis))
  axis = _unit(axis)
  entry = jnp.take_along_axis(axis, jnp.argmax(jnp.abs(axis), 1)[:, None], 1)
  return _product('bni,bi->bn', tokens, axis * jnp.sign(entry))


def _orthonormal(vectors):
  """Makes [b, d, k] orthonormal, twice by Gram and Schmidt: plain products, which any runtime has."""
  found = []
  for column in jnp.moveaxis(vectors, 2, 0):
    for other in found + found:
      column = column - (column * other).sum(1, keepdims=True) * other
    found.append(_unit(column))
  return jnp.stack(found, 2)


def _unit(vectors):
  """Divides vectors [b, d] by their lengths."""
  return vectors / jnp.maximum(jnp.sqrt(jnp.square(vectors).sum(1, keepdims=True)), _TINY)


def objects(tokens: jax.Array) -> jax.Array:
  """Finds the patches of the object in each image, for parts on a plain background, with any network.

  The principal score parts the patches in two, where the two differ most by Otsu's criterion ("A Threshold
  Selection Method from Gray-Level Histograms", 1979); those that fill more of the border are the background.
  The object is dilated by one cell, and closed by one. Where a part fills the image, this means nothing,
  and where all patches are the same, all are the object.

  Args:
    tokens: [b, rows, columns, d] float32.

  Returns:
    [b, rows, columns] bool.
  """
  b, rows, columns, dim = tokens.shape
  scores = principal_scores(tokens.reshape(b, -1, dim))
  found = (scores >= _parting(scores)).reshape(b, rows, columns)
  border = np.ones((rows, columns), bool)
  border[1:-1, 1:-1] = False
  share = (found * border.astype(np.float32)).sum((1, 2), keepdims=True) / border.sum()
  found = _closed(_dilated(found ^ (share > 0.5)))  # not a selection, which ONNX Runtime has not for bool
  return found | ~found.any((1, 2), keepdims=True)


def _parting(scores):
  """Finds the smallest of the upper scores [b, n], whose mean is 0, where two parts differ most: [b, 1]."""
  ordered = lax.top_k(scores, scores.shape[1])[0]
  number = jnp.arange(1, scores.shape[1])
  # The squared distance of both means times both numbers, but for a factor; both sums are the same.
  apart = jnp.square(jnp.cumsum(ordered, axis=1)[:, :-1]) / (number * (scores.shape[1] - number))
  return jnp.take_along_axis(ordered, jnp.argmax(apart, 1)[:, None], 1)


def masks(tokens: jax.Array, along: str = 'grid') -> jax.Array:
  """Finds the patches of the object in each image.

  Patches whose principal score is above 10 are foreground; if they are at most 35 % of the centre, those
  below -10. The mask is dilated by one cell, and closed by one.

  Args:
    tokens: [b, rows, columns, c] float32.
    along: 'grid' grows masks in both directions (anomalib); 'raster' in the order of the patches, row after
      row, as the authors' released code does.

  Returns:
    [b, rows, columns] bool.
  """
  b, rows, columns, c = tokens.shape
  scores = principal_scores(tokens.reshape(b, -1, c)).reshape(b, rows, columns)
  found = scores > _THRESHOLD
  (top, bottom), (left, right) = ([int(share * n) for share in _CENTRE] for n in (rows, columns))
  share = found[:, top:bottom, left:right].mean((1, 2), keepdims=True)
  inverted = share <= _SHARE
  found = inverted & (-scores > _THRESHOLD) | ~inverted & found
  if along == 'raster':
    found = found.reshape(b, 1, -1)
  return _closed(_dilated(found)).reshape(b, rows, columns)


def _closed(cells):
  """Fills gaps of masks [b, rows, columns] that are up to two cells wide."""
  return ~_dilated(~_dilated(cells))


def announce(kind: str, notify: Callable[[str], None]) -> None:
  """Tells the user of a fit with such a foreground, unless it is 'none', what will not be looked at."""
  if kind != 'none':
    notify(f'foreground={kind}: what is taken for background scores 0, whatever is on it')


def _dilated(cells):
  """Grows masks [b, rows, columns] by one cell in all eight directions; nothing lies beyond the edge."""
  for axis in (1, 2):
    size = cells.shape[axis]
    padded = jnp.pad(cells, [(int(i == axis),) * 2 for i in range(3)])
    parts = [lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3)]
    cells = parts[0] | parts[1] | parts[2]
  return cells


def _product(equation, *operands):
  return jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST)
