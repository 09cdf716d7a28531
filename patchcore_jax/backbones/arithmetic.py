"""The precisions of networks, and the parts of a batch that a CPU computes at a time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from patchcore_jax.backbones.backbone import Apply

PRECISIONS = ('float32', 'tensorfloat32', 'bfloat16')
# What 'auto' stands for on each kind of device, by measurement: docs/precision.md.
AUTO_PRECISIONS = {'cpu': 'float32', 'gpu': 'tensorfloat32', 'tpu': 'tensorfloat32'}


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """How products and convolutions are computed.

  Attributes:
    precision: one of `PRECISIONS`. Sums are float32 always: 'float32'; 'tensorfloat32', operands of 11
      significant bits on GPUs that have it, three bfloat16 products on TPUs, float32 on CPUs; or
      'bfloat16', operands and results of 8 significant bits everywhere.
    for_cpu: whether the forms are those that are quicker on CPUs, and values of any precision are computed
      with as float32.
    products: whether 1x1 convolutions are matrix products: the same sums, much faster on CPUs, slower on
      GPUs.
  """

  precision: str = 'float32'
  for_cpu: bool = False
  products: bool = True

  def rounded(self, x: jax.Array) -> jax.Array:
    """Rounds to the precision what is kept between two convolutions, and what enters one."""
    if self.precision != 'bfloat16':
      return x
    if self.for_cpu:
      # The values of bfloat16 in float32, for which every CPU has fast products. A pair of casts would
      # say the same, but XLA takes those out.
      return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(jnp.bfloat16)

  @property
  def accuracy(self) -> dict[str, Any]:
    """The arguments of a product or convolution of `rounded` operands."""
    if self.precision == 'bfloat16' and not self.for_cpu:
      # The result is bfloat16 too: libraries have fast convolutions of bfloat16 to bfloat16 only, and sum in
      # float32 within them.
      return {'precision': lax.Precision.DEFAULT}
    return {
        'precision': lax.Precision.HIGH if self.precision == 'tensorfloat32' else lax.Precision.HIGHEST,
        'preferred_element_type': jnp.float32}

  def convolve(self, x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """Convolves `rounded` operands with PyTorch's padding of (size - 1) / 2 on every side.

    Args:
      x: [b, h, w, c].
      kernel: [size, size, c / groups, features].
      stride: along both axes.
      groups: of channels.
    """
    size = len(kernel)
    if size == 1 and self.products:
      return jnp.dot(x[:, ::stride, ::stride], kernel[0, 0], **self.accuracy)
    pad = (size - 1) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad), (pad, pad)], dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups, **self.accuracy)


def check_precision(precision: str) -> None:
  """Raises ValueError for another precision than those of `PRECISIONS`."""
  if precision not in PRECISIONS:
    raise ValueError(
        f'backbone.precision={precision!r}: expected one of {", ".join(map(repr, PRECISIONS))}.')


def per_platform(network: Callable[[Arithmetic], Apply], precision: str, cpu_pixels: int) -> Apply:
  """Makes the function that computes in the form which is quick on the device that it is compiled for.

  Args:
    network: makes the network's function for an arithmetic.
    precision: one of `PRECISIONS`.
    cpu_pixels: the most that a CPU takes at a time, see `in_parts`.

  Raises:
    ValueError: another precision.
  """
  check_precision(precision)
  branches = {
      'cpu': in_parts(network(Arithmetic(precision, for_cpu=True)), cpu_pixels),
      'default': network(Arithmetic(precision, products=precision != 'bfloat16'))}
  if precision == 'tensorfloat32':
    branches['cuda'] = network(Arithmetic(precision, products=False))
  return lambda variables, images: lax.platform_dependent(variables, images, **branches)


def in_parts(apply: Apply, pixels: int) -> Apply:
  """Wraps a network's function to take a few images at a time, which keeps what it computes in the cache.

  Args:
    apply: function of variables and images.
    pixels: the most that a part has, but for a single image. Parts are of one size.

  >>> double = in_parts(lambda scale, images: {'a': scale * images}, pixels=8)
  >>> double(2, jnp.ones((6, 2, 2, 3)))['a'].shape
  (6, 2, 2, 3)
  """

  def parts(variables: Any, images: jax.Array) -> Mapping[str, jax.Array]:
    b, height, width, _ = images.shape
    part = max(n for n in range(1, b + 1) if b % n == 0 and n * height * width <= max(
        pixels, height * width))
    if part == b:
      return apply(variables, images)
    maps = lax.map(functools.partial(apply, variables), images.reshape(-1, part, *images.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(b, *x.shape[2:]), maps)

  return parts
