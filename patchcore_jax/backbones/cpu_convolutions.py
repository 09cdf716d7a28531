"""Convolutions that CPUs do faster than by XLA's: 3x3 with a third of the multiplications, and a stem's 7x7.

The 3x3 is from Winograd 1980, and Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks":
input and kernel are evaluated at n + 2 points along each axis, multiplied point by point, which is one matrix
product over the channels for each of the (n + 2)^2 points, and interpolated to n x n outputs.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 4  # outputs along each axis; 6 x 6 products for 16 outputs instead of 9 x 16
_FEWEST_TILES = 32  # by measurement: 16 (14 x 14 cells) are too few, 49 enough
# Pairs of opposite points keep the sums short. The usual 0, +-1, +-2 doubles the rounding error:
# the powers of these two are reciprocal, so that no entry of a transform is large.
_POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))


def _transforms(points: tuple[float, ...], tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Computes the matrices of the Toom-Cook scheme: y = output @ ((kernel @ g) * (input @ d)), float64.

  The point at infinity comes last.
  """
  n = len(points) + 1

  def evaluate(length):
    return np.vstack([np.vander(points, length, increasing=True), np.eye(length)[-1]])

  others = [[b for b in points if b != a] for a in points]
  norm = np.array([np.prod([a - b for b in rest]) for a, rest in zip(points, others)] + [1.0])
  polynomials = [np.poly(rest)[::-1] for rest in (*others, points)]
  inputs = np.array([np.pad(p, (0, n - len(p))) for p in polynomials])
  return evaluate(tile).T, evaluate(3) / norm[:, None], inputs


_OUTPUT, _KERNEL, _INPUT = _transforms(_POINTS, TILE)


def pays_3x3(height: int, width: int) -> bool:
  """Tells whether `convolve_3x3` is faster than XLA's convolution, for images of this size.

  The kernel is evaluated anew in every call, which takes as long however small the images are. The size of
  the batch does not decide: if it did, the last digits of features would depend on it.

  >>> pays_3x3(28, 28), pays_3x3(14, 14)
  (True, False)
  """
  return -(-height // TILE) * -(-width // TILE) >= _FEWEST_TILES


def pays_7x7(height: int, width: int, features: int) -> bool:
  """Tells whether `convolve_7x7` can be used and is faster: XLA is quick from 64 features on."""
  return height % 2 == width % 2 == 0 and features < 64


def convolve_7x7(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves with stride 2 and a padding of 3, as a convolution of 4x4 over squares of 2x2 pixels.

  Args:
    x: [b, h, w, c], h and w even.
    kernel: [7, 7, c, features].

  Returns:
    [b, h / 2, w / 2, features].
  """
  b, height, width, channels = x.shape
  x = x.reshape(b, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(b, height // 2, width // 2, 4 * channels)
  kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))  # 8x8, so that squares stay whole
  kernel = kernel.reshape(4, 2, 4, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
  return lax.conv_general_dilated(
      x, kernel.reshape(4, 4, 4 * channels, -1), (1, 1), [(2, 1), (2, 1)],
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=lax.Precision.HIGHEST)


def convolve_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves with stride 1 and a padding of 1, as `lax.conv_general_dilated` does up to rounding.

  Args:
    x: [b, h, w, c] float32.
    kernel: [3, 3, c, features] float32.

  Returns:
    [b, h, w, features] float32, with a relative error (L2) of 2e-6 where direct sums have 3e-7.
  """
  b, height, width, channels = x.shape
  features = kernel.shape[-1]
  rows, columns, points = -(-height // TILE), -(-width // TILE), TILE + 2
  x = jnp.pad(x, (
      (0, 0), (1, rows * TILE + 1 - height), (1, columns * TILE + 1 - width), (0, 0)))

  # The axes are evaluated one after the other; the points of each become a leading axis.
  v = _evaluate([x[:, i:i + (rows - 1) * TILE + 1:TILE] for i in range(points)], axis=0)
  v = _evaluate(
      [v[:, :, :, i:i + (columns - 1) * TILE + 1:TILE] for i in range(points)], axis=1)
  # The kernel is evaluated once per call, outside any loop over images. Behind the barrier, XLA does not
  # fold weights that a caller's program holds as constants, which takes it longer than the product.
  u = _both_axes(_KERNEL, lax.optimization_barrier(kernel).reshape(9, -1))
  products = jnp.einsum(
      'pnc,pcf->pnf', v.reshape(points**2, -1, channels), u.reshape(points**2, channels, features),
      precision=lax.Precision.HIGHEST)
  y = _both_axes(_OUTPUT, products.reshape(points**2, -1))
  y = y.reshape(TILE, TILE, b, rows, columns, features).transpose(2, 3, 0, 4, 1, 5)
  return y.reshape(b, rows * TILE, columns * TILE, features)[:, :height, :width]


def _evaluate(terms: list[jax.Array], axis: int) -> jax.Array:
  """Computes _INPUT @ terms, written out: a product is slower, as it needs the terms copied together."""
  return jnp.stack([
      functools.reduce(operator.add, [w * term for w, term in zip(row, terms) if w])
      for row in _INPUT.tolist()], axis)


def _both_axes(matrix: np.ndarray, x: jax.Array) -> jax.Array:
  """Multiplies by `matrix` along two axes at once, which are flattened in the leading axis of `x`."""
  return jnp.dot(np.kron(matrix, matrix).astype(np.float32), x, precision=lax.Precision.HIGHEST)
