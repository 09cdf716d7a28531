"""Draws the weights that networks start with, on the host.

In a compiled program the random numbers of each weight are code of their own, for which XLA takes 10 to 30 s;
NumPy draws them in no time. Weights so drawn are also the same, bit for bit, whatever they are trained on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Draw = Callable[[np.random.Generator, Sequence[int]], np.ndarray]


@flax.struct.dataclass
class Start(nn.meta.AxisMetadata):
  """What an initializer of this module returns: Flax takes the value, and keeps how it is to be drawn.

  Attributes:
    value: zeros of the parameter's shape.
    draw: (generator, shape) -> the first value.
  """

  value: jax.Array
  draw: Draw = flax.struct.field(pytree_node=False)

  def unbox(self):
    return self.value

  def replace_boxed(self, val):
    return self.replace(value=val)

  def add_axis(self, index, params):
    return self

  def remove_axis(self, index, params):
    return self


Init = Callable[..., Start]


def variables(network: nn.Module, key: jax.Array, *arguments: Any, **options: Any) -> dict[str, Any]:
  """Makes the first variables of a network. Nothing else of it is computed.

  Args:
    network: its random parameters start by initializers of this module.
    key: decides about them.
    arguments: those of the network; only shape and dtype of arrays matter.
    options: see `flax.linen.Module.init`.

  >>> found = variables(nn.Dense(2, kernel_init=normal(1.0)), jax.random.key(0), jnp.zeros((1, 3)))
  >>> jax.tree.map(jnp.shape, found)
  {'params': {'bias': (2,), 'kernel': (3, 2)}}
  """
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

  def value(leaf):
    return leaf.draw(rng, leaf.value.shape).astype(leaf.value.dtype) if isinstance(leaf, Start) else leaf

  # What the network computes is of no use to this program, so that it is not compiled.
  found = jax.jit(lambda: network.init(key, *arguments, **options))()
  return jax.tree.map(value, found, is_leaf=lambda leaf: isinstance(leaf, Start))


def moments(optimizer: Any, params: Any) -> Any:
  """Makes what an optimiser of optax keeps, before the first step."""
  return jax.jit(optimizer.init)(params)


def drawn(draw: Draw) -> Init:
  """Makes the initializer that draws by a function of a generator and a shape."""

  def init(key, shape, dtype=jnp.float32):
    return Start(jnp.zeros(shape, dtype), draw)

  return init


def normal(deviation: float, mean: float = 0.0) -> Init:
  """Draws from a normal distribution."""
  return drawn(lambda rng, shape: mean + deviation * rng.standard_normal(shape))


def uniform(bound: Callable[[Sequence[int]], float]) -> Init:
  """Draws evenly from an interval around 0, whose bound depends on the shape."""
  return drawn(lambda rng, shape: rng.uniform(-1, 1, shape) * bound(shape))


def fan_in(shape: Sequence[int]) -> int:
  """Counts the inputs of an output, by the shape [..., inputs, outputs] of a kernel."""
  return math.prod(shape[:-1])


# PyTorch's default for the weights of convolutions and dense layers, and Keras's.
TORCH = uniform(lambda shape: fan_in(shape) ** -0.5)
GLOROT = uniform(lambda shape: (6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1]))) ** 0.5)
HE_UNIFORM = uniform(lambda shape: (6 / fan_in(shape)) ** 0.5)
HE_NORMAL = drawn(lambda rng, shape: rng.standard_normal(shape) * (2 / fan_in(shape)) ** 0.5)
# DC-GAN's: of weights, and of the scales of batch norms.
DCGAN, NEAR_ONE = normal(0.02), normal(0.02, mean=1.0)
