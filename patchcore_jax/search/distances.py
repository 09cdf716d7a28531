"""Squared Euclidean distances: the one number that all agree on, and how far fast ones are from it.

`distances_sq` is the definition: differences, squared and summed in a fixed order, so that the same
float32 comes out on any device, in any block, in any program. A matrix product gives distances many
times faster, but to within an error only. Searches here take products to find the few pairs that can
matter, by the bounds of this module, and decide between those by the definition.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST = np.float32(np.finfo(np.float32).max)
UNIT = 2.0**-24  # half of the distance from 1 to the next float32
_GROUP = 16
# Float32 products on the tensor cores of an NVIDIA GPU, in three tensorfloat32 parts: as exact as float32 to
# within a few units in the last place.
TENSOR_CORE_PRODUCT = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
# Where float32 units round a sum, tensor cores may cut digits off: they get so many times `product_error`.
TENSOR_CORE_ERROR = 4


def distances_sq(a: jax.Array, b: jax.Array, axis: int = 0, *, pause: int = 0) -> jax.Array:
  """Sums (a - b)^2 over `axis`, by halves. Nothing cancels, and a point is at distance 0 from itself.

  Args:
    a, b: arrays of shapes that go together.
    axis: the coordinates.
    pause: where so many terms or fewer are left of each sum, they are written to memory before the sums go
      on. On GPUs that keeps threads side by side reading values side by side, where rows are gathered; 0
      for no pause. The result does not depend on it.

  >>> distances_sq(jnp.array([1., 2., 3.]), jnp.array([0., 2., 5.]))
  Array(5., dtype=float32)
  """
  # Without the minimum, compilers may join the square and the sum in one instruction, which rounds
  # once instead of twice, here but not there.
  terms = jnp.minimum(jnp.square(a - b), LARGEST)
  axis %= terms.ndim
  while (length := terms.shape[axis]) > 1:
    if length <= pause:
      terms, pause = lax.optimization_barrier(terms), 0
    half = (length + 1) // 2
    second = lax.slice_in_dim(terms, half, length, axis=axis)
    if length % 2:  # adding zero is exact
      second = jnp.pad(second, [(0, i == axis) for i in range(terms.ndim)])
    terms = lax.slice_in_dim(terms, 0, half, axis=axis) + second
  return terms.squeeze(axis)


def product_error(dim: int, a: jax.Array, b: jax.Array) -> jax.Array:
  """Bounds |x - y|, where x is |a|^2 + |b|^2 - 2ab in float32, in any order, and y is `distances_sq`.

  A product sums d terms, in any order with an error of at most d u |a| |b|, u = 2^-24 (Higham 2002,
  section 3.1), and so do the squared norms; sums by halves err by a few u. All of it is doubled, which
  covers the terms of second order.

  Args:
    dim: d.
    a, b: the norms |a| and |b|.
  """
  return 2 * UNIT * (2 * dim * a * b + (dim + 32) * (jnp.square(a) + jnp.square(b)))


def may_be_nearer(nearest_sq: jax.Array, outside_sq: jax.Array, slack: jax.Array) -> jax.Array:
  """Tells whether something that was not compared may be as near as what was found.

  Args:
    nearest_sq: exact squared distances of what was found.
    outside_sq: the least squared distance, of vectors that are not exact, that anything else can have.
    slack: how far those vectors are from the exact ones, both of a pair together.
  """
  return least_sq(outside_sq, slack) <= nearest_sq


def least_sq(distances_sq: jax.Array, slack: jax.Array) -> jax.Array:
  """Bounds exact squared distances from below by those of vectors that are off by `slack`, both together.

  >>> float(least_sq(jnp.array(4.0), jnp.array(1.0)))
  0.9999961853027344
  """
  return jnp.square(jnp.maximum(jnp.sqrt(jnp.maximum(distances_sq, 0)) - slack, 0)) * (1 - 2.0**-18)


def settle(search: Callable, size: int, found: Any, doubtful: jax.Array) -> tuple[Any, jax.Array]:
  """Searches again for the rows in doubt, some at a time.

  Args:
    search: (indices [size] of rows, what is found for them) -> (what is better, whether each still is in
      doubt).
    size: how many at a time.
    found: a pytree of arrays [r, ...].
    doubtful: [r] bool.

  Returns:
    What is found now, and [r] bool, which rows still are in doubt.

  >>> doubtful = jnp.array([True, False, True, True])
  >>> values, still = settle(lambda at, x: (x + 1, at > 2), 2, jnp.zeros(4), doubtful)
  >>> values.tolist(), still.tolist()
  ([1.0, 0.0, 1.0, 1.0], [False, False, False, True])
  """
  n = len(doubtful)

  def step(carry):
    found, doubtful, still = carry
    at = jnp.nonzero(doubtful, size=size, fill_value=n)[0]
    own = jnp.minimum(at, n - 1)
    better, unsure = search(own, jax.tree.map(lambda x: x[own], found))
    found = jax.tree.map(lambda old, new: old.at[at].set(new, mode='drop'), found, better)
    return found, doubtful.at[at].set(False, mode='drop'), still.at[at].set(unsure, mode='drop')

  found, _, still = lax.while_loop(
      lambda carry: carry[1].any(), step, (found, doubtful, jnp.zeros_like(doubtful)))
  return found, still


def in_blocks(function: Callable, size: int, *arrays: jax.Array) -> Any:
  """Applies a function to blocks of at most `size` rows of arrays [n, ...], and joins what it returns.

  What it needs besides is held for a block at a time. Blocks have one size, so that there is one program: a
  rest would have a second.

  >>> in_blocks(lambda x: x + 1, 2, jnp.arange(3)).tolist()
  [1, 2, 3]
  """
  n = len(arrays[0])
  num_blocks = -(-n // size)
  if num_blocks <= 1:
    return function(*arrays)
  size = -(-n // num_blocks)
  padded = [jnp.pad(x, ((0, num_blocks * size - n), *[(0, 0)] * (x.ndim - 1))) for x in arrays]
  found = lax.map(lambda x: function(*x), [x.reshape(num_blocks, size, *x.shape[1:]) for x in padded])
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], found)


def grouped(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Reshapes scores [r, c] to groups [r, 16, c / 16] and finds their minima over the 16, [r, c / 16].

  Column j is in group j % (c / 16). Compilers vectorise these minima, unlike an arg-min, which has
  only a sixteenth of the scores left to read.
  """
  groups = scores.reshape(len(scores), _GROUP, -1)
  return groups, groups.min(axis=1)


def smallest(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Finds the `count` smallest scores of each row, ascending, and their columns.

  Args:
    scores: [r, c].
    count: at most c.

  Returns:
    values [r, count] and columns [r, count] int32.

  >>> smallest(jnp.array([[3., 1., 2.]]), 2)
  (Array([[1., 2.]], dtype=float32), Array([[1, 2]], dtype=int32))
  """
  columns = scores.shape[1]
  if columns < 2 * _GROUP * count:
    values, at = lax.top_k(-scores, count)
    return -values, at.astype(jnp.int32)
  if missing := -columns % _GROUP:
    scores = jnp.pad(scores, ((0, 0), (0, missing)), constant_values=jnp.inf)
  # They are among the members of the `count` groups whose minima are smallest.
  groups, minima = grouped(scores)
  at = smallest(minima, count)[1]
  members = jnp.take_along_axis(groups, at[:, None, :], axis=2).reshape(len(scores), -1)
  values, position = lax.top_k(-members, count)
  row, group = jnp.divmod(position, count)
  column = row * minima.shape[1] + jnp.take_along_axis(at, group, axis=1)
  return -values, column.astype(jnp.int32)
