"""Tells an object from its background by the features of one image alone (AnomalyDINO, section 3.2)."""

import jax
import jax.numpy as jnp
from jax import lax

# The score from which a patch counts, the centre of the image, and what share of it must be foreground.
_THRESHOLD, _CENTRE, _SHARE = 10.0, (0.2, 0.8), 0.35
# Another axis of 99 % of the largest variance is at 1e-18 of it in the covariance to the power of 2^12.
_SQUARINGS, _STEPS = 12, 2


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
  power = covariance
  for _ in range(_SQUARINGS):
    power = power / jnp.maximum(jnp.trace(power, axis1=1, axis2=2), 1e-30)[:, None, None]
    power = _product('bij,bjk->bik', power, power)
  # The column of the largest diagonal entry is the axis times its largest entry, and no sum cancels in it.
  largest = jnp.argmax(jnp.diagonal(power, axis1=1, axis2=2), 1)
  axis = jnp.take_along_axis(power, largest[:, None, None], 2)[..., 0]
  for _ in range(_STEPS):
    axis = axis / jnp.maximum(jnp.sqrt(jnp.square(axis).sum(1, keepdims=True)), 1e-30)
    axis = _product('bij,bj->bi', covariance, axis)
  axis = axis / jnp.maximum(jnp.sqrt(jnp.square(axis).sum(1, keepdims=True)), 1e-30)
  entry = jnp.take_along_axis(axis, jnp.argmax(jnp.abs(axis), 1)[:, None], 1)
  return _product('bni,bi->bn', tokens, axis * jnp.sign(entry))


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
  found = jnp.where(share <= _SHARE, -scores > _THRESHOLD, found)
  if along == 'raster':
    found = found.reshape(b, 1, -1)
  found = _dilated(_dilated(found))
  return ~_dilated(~found).reshape(b, rows, columns)


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
