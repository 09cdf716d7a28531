"""Normalising flows of affine couplings (Dinh et al., "Density estimation using Real NVP", ICLR 2017), with
the soft bound on scales that DifferNet has.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax.learned import starts

_BOUND, _SLOPE, _LARGEST = 3.0, 0.636, 1e6
# Layers [..., inputs + 1, outputs] with their biases, as PyTorch has them.
_start = starts.uniform(lambda shape: (shape[-2] - 1) ** -0.5)


def bounded(scales: jax.Array) -> jax.Array:
  """Bounds logarithms of scales smoothly, to less than 3 on either side.

  >>> [round(float(s), 3) for s in bounded(jnp.array([0.0, -1.0, 1e9]))]
  [0.0, -0.614, 2.997]
  """
  return _BOUND * _SLOPE * jnp.arctan(scales / _BOUND)


def permutation(seed: int, dim: int) -> np.ndarray:
  """Chooses the fixed order of a block's inputs: [dim], the same wherever it is asked for."""
  return np.random.RandomState(seed).permutation(dim)


class Flow(nn.Module):
  """A bijection of vectors [b, dim]: blocks of a permutation and a coupling of either half by the other.

  Attributes:
    dim: of the vectors, at least 2.
    blocks: how many.
    hidden: width of the three hidden layers of each of the networks that say scales and shifts.
  """

  dim: int
  blocks: int = 8
  hidden: int = 256

  def setup(self):
    first = self.dim // 2
    # By the second half for the first, and by the first for the second.
    self.for_first = _Nets(self.blocks, self.dim - first, self.hidden, 2 * first)
    self.for_second = _Nets(self.blocks, first, self.hidden, 2 * (self.dim - first))

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps vectors: returns them [b, dim], and the logarithm of the determinant of the Jacobian [b]."""
    total = jnp.zeros(len(x), x.dtype)
    for i in range(self.blocks):
      first, second = self._halves(x[:, permutation(i, self.dim)])
      scale, shift = self.for_first(i, second)
      first = jnp.exp(scale) * first + shift
      total += scale.sum(axis=1)
      scale, shift = self.for_second(i, first)
      second = jnp.exp(scale) * second + shift
      total += scale.sum(axis=1)
      x = jnp.concatenate([first, second], axis=1).clip(-_LARGEST, _LARGEST)
    return x, total

  def inverse(self, z: jax.Array) -> jax.Array:
    """Maps vectors back."""
    for i in reversed(range(self.blocks)):
      first, second = self._halves(z)
      scale, shift = self.for_second(i, first)
      second = (second - shift) * jnp.exp(-scale)
      scale, shift = self.for_first(i, second)
      first = (first - shift) * jnp.exp(-scale)
      z = jnp.concatenate([first, second], axis=1)[:, np.argsort(permutation(i, self.dim))]
    return z

  def _halves(self, x):
    return x[:, :self.dim // 2], x[:, self.dim // 2:]


class _Nets(nn.Module):
  """A network for each block, of three hidden layers and one that is linear.

  A layer of all blocks is one array, whose last rows are the biases: few arrays start quickly.
  """

  blocks: int
  inputs: int
  hidden: int
  outputs: int

  def setup(self):
    self.first = self.param('first', _start, (self.blocks, 1, self.inputs + 1, self.hidden))
    self.middle = self.param('middle', _start, (self.blocks, 2, self.hidden + 1, self.hidden))
    self.last = self.param('last', _start, (self.blocks, 1, self.hidden + 1, self.outputs))

  def __call__(self, block, x):
    """Computes the bounded logarithms of scales, and the shifts, by the network of a block."""
    for layer in (*self.first[block], *self.middle[block]):
      x = nn.relu(x @ layer[:-1] + layer[-1])
    (layer,) = self.last[block]
    scale, shift = jnp.split(x @ layer[:-1] + layer[-1], 2, axis=1)
    return bounded(scale), shift


def negative_log_likelihood(z: jax.Array, log_determinant: jax.Array) -> jax.Array:
  """Computes minus the logarithm of the likelihood under N(0, I) per dimension, but for (log 2 pi) / 2: [b].

  >>> negative_log_likelihood(jnp.array([[2.0, 0.0]]), jnp.array([1.0])).tolist()
  [0.5]
  """
  return (0.5 * jnp.square(z).sum(axis=1) - log_determinant) / z.shape[1]
