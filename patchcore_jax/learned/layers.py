"""Layers of the networks that are trained: convolutions that are quick on CPUs too, and what they make up.

Everything is [b, h, w, c]. Convolutions of 3x3 and 4x4, strided and transposed, are all written as one of 3x3
with stride 1, over squares of 2x2 pixels where there is a stride: on a CPU that one is computed by Winograd's
algorithm, and is up to 20 times as fast as XLA's own, above all in gradients and in loops.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from patchcore_jax.backbones import cpu_convolutions
from patchcore_jax.learned import starts

_FEWEST_CELLS = 64  # of a map for Winograd's algorithm
leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)


def convolve_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves with stride 1 and a padding of 1: x [b, h, w, c], kernel [3, 3, c, features]."""
  return lax.platform_dependent(x, kernel, cpu=_on_cpu, default=_library)


def _on_cpu(x, kernel):
  """Convolves by Winograd's algorithm; small maps, for which its tiles are too large, by one product."""
  h, w = x.shape[1:3]
  if h * w >= _FEWEST_CELLS:
    return cpu_convolutions.convolve_3x3(x, kernel)
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  near = jnp.concatenate([x[:, i:i + h, j:j + w] for i in range(3) for j in range(3)], axis=-1)
  return near @ kernel.reshape(-1, kernel.shape[-1])


def _library(x, kernel, stride=1, padding=(1, 1)):
  """Convolves as XLA's own operation does."""
  return lax.conv_general_dilated(
      x, kernel, (stride, stride), (padding, padding), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def squares(x: jax.Array) -> jax.Array:
  """Makes each square of 2x2 pixels one pixel of four times the channels: [b, h/2, w/2, 4c]."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


def pixels(x: jax.Array) -> jax.Array:
  """Undoes `squares`.

  >>> x = jnp.arange(48.0).reshape(1, 4, 4, 3)
  >>> bool((pixels(squares(x)) == x).all())
  True
  """
  b, h, w, c = x.shape
  return x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


def convolve_1x1(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Convolves x [b, h, w, c] with a kernel [1, 1, c, features]; with stride 2, of every second pixel."""
  # XLA's compiler for GPUs ends the process over such a product of every second pixel (JAX 0.10, 0.11).
  return lax.platform_dependent(
      x, kernel, cpu=lambda x, kernel: x[:, ::stride, ::stride] @ kernel[0, 0],
      default=functools.partial(_library, stride=stride, padding=(0, 0)))


def convolve_by_two(x: jax.Array, kernel: jax.Array, before: int) -> jax.Array:
  """Convolves with stride 2.

  Args:
    x: [b, h, w, c], h and w even.
    kernel: [k, k, c, features], k at most 4.
    before: the padding before the first row and column; behind the last, what k needs for h / 2 rows.

  Returns:
    [b, h / 2, w / 2, features].
  """
  size, _, channels, features = kernel.shape

  def over_squares(x, kernel):  # which cover the pixels 2p - 2 to 2p + 3
    margin = (2 - before, 4 + before - size)
    kernel = jnp.pad(kernel, (margin, margin, (0, 0), (0, 0)))
    kernel = kernel.reshape(3, 2, 3, 2, channels, features).transpose(0, 2, 1, 3, 4, 5)
    return _on_cpu(squares(x), kernel.reshape(3, 3, 4 * channels, features))

  return lax.platform_dependent(
      x, kernel, cpu=over_squares,
      default=functools.partial(_library, stride=2, padding=(before, size - 2 - before)))


def convolve_within(x: jax.Array, kernel: jax.Array, dilation: int = 1) -> jax.Array:
  """Convolves with stride 1, wherever the kernel lies wholly within the map.

  Args:
    x: [b, h, w, c].
    kernel: [k, k, c, features].
    dilation: distance of the pixels that the kernel takes.

  Returns:
    [b, h - (k - 1) * dilation, w - (k - 1) * dilation, features].
  """
  size = len(kernel)
  h, w = (side - (size - 1) * dilation for side in x.shape[1:3])

  def on_cpu(x, kernel):
    if size == 3 and dilation == 1 and h * w >= _FEWEST_CELLS:
      return cpu_convolutions.convolve_3x3(x, kernel)[:, 1:-1, 1:-1]
    places = [i * dilation for i in range(size)]
    near = jnp.concatenate([x[:, i:i + h, j:j + w] for i in places for j in places], axis=-1)
    return near @ kernel.reshape(-1, kernel.shape[-1])

  def elsewhere(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), 'VALID', rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

  return lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def convolve_to_double(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves transposed, kernel 4 and stride 2, to twice the size, as `lax.conv_transpose` with 'SAME' does.

  Args:
    x: [b, h, w, c].
    kernel: [4, 4, c, features].

  Returns:
    [b, 2h, 2w, features].
  """
  channels, features = kernel.shape[2:]
  # Row 2p + r takes x[p + d] by the row 2d + 2 - r of the kernel, where there is one.
  kernel = jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))
  kernel = kernel.reshape(3, 2, 3, 2, channels, features)[:, ::-1, :, ::-1]
  return pixels(convolve_3x3(x, kernel.transpose(0, 2, 4, 1, 3, 5).reshape(3, 3, channels, 4 * features)))


class Conv(nn.Module):
  """A convolution: 1x1, or 3x3 padded by 1, with stride 1; or any up to 4x4 with stride 2.

  Attributes:
    features: channels that come out.
    size: of the kernel.
    stride: 1 or 2.
    before: padding before the first row and column, with stride 2.
    use_bias: whether a bias is added; it starts at 0, or as PyTorch's where `kernel_init` is `starts.TORCH`.
    kernel_init: how the kernel starts.
  """

  features: int
  size: int = 3
  stride: int = 1
  before: int = 1
  use_bias: bool = True
  kernel_init: starts.Init = starts.TORCH

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
    if self.size == 1:
      y = convolve_1x1(x, kernel, self.stride)
    elif self.stride == 2:
      y = convolve_by_two(x, kernel, self.before)
    else:
      y = convolve_3x3(x, kernel)
    return y + _bias(self, shape) if self.use_bias else y


class ConvWithin(nn.Module):
  """A convolution without padding.

  Attributes:
    features: channels that come out.
    size: of the kernel; 3 with stride 2.
    stride: 1, or 2 for maps of even sides.
    dilation: distance of the pixels that the kernel takes, with stride 1.
    kernel_init: how the kernel starts.
  """

  features: int
  size: int = 3
  stride: int = 1
  dilation: int = 1
  kernel_init: starts.Init = starts.TORCH

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
    if self.stride == 2:
      y = convolve_by_two(x, kernel, before=0)[:, :-1, :-1]  # the last reach one pixel too far
    else:
      y = convolve_within(x, kernel, self.dilation)
    return y + _bias(self, shape)


class ConvToDouble(nn.Module):
  """A transposed convolution, 4x4 with stride 2: twice the size. Attributes are those of `Conv`."""

  features: int
  use_bias: bool = True
  kernel_init: starts.Init = starts.TORCH

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (4, 4, x.shape[-1], self.features)
    y = convolve_to_double(x, self.param('kernel', self.kernel_init, shape, jnp.float32))
    return y + _bias(self, shape) if self.use_bias else y


class Dense(nn.Module):
  """A dense layer over the last axis. Attributes are those of `Conv`."""

  features: int
  use_bias: bool = True
  kernel_init: starts.Init = starts.TORCH

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.features)
    y = x @ self.param('kernel', self.kernel_init, shape, jnp.float32)
    return y + _bias(self, shape) if self.use_bias else y


def _bias(layer, shape):
  """Makes the bias of a layer whose kernel has this shape."""
  as_torch = starts.uniform(lambda _: starts.fan_in(shape) ** -0.5)
  start = as_torch if layer.kernel_init is starts.TORCH else nn.initializers.zeros
  return layer.param('bias', start, (layer.features,), jnp.float32)


class Norm(nn.Module):
  """Batch norm, over the whole batch in training, and by running statistics otherwise.

  Attributes:
    momentum: share of the old statistics that stays in a step: 0.9 as PyTorch's default, 0.99 as Keras's.
    epsilon: added to variances.
    scale_init: how the scale starts.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  scale_init: starts.Init = nn.initializers.ones

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    return nn.BatchNorm(
        use_running_average=not train, momentum=self.momentum, epsilon=self.epsilon,
        scale_init=self.scale_init)(x)


def larger(a: jax.Array, b: jax.Array) -> jax.Array:
  """Takes the larger of two, the first of equals.

  JAX's own maxima compare with their result in the gradient. XLA may compute that anew, with other rounding,
  and find nothing equal, which divides 0 by 0.
  """
  return jnp.where(a >= b, a, b)


def max_pool(x: jax.Array) -> jax.Array:
  """Takes the largest of each 2x2 pixels; of an odd number of rows or columns the last is left out.

  >>> max_pool(jnp.arange(15.0).reshape(1, 3, 5, 1))[0, :, :, 0].tolist()
  [[6.0, 8.0]]
  """
  h, w = (n // 2 * 2 for n in x.shape[1:3])
  x = larger(x[:, :h:2], x[:, 1:h:2])
  return larger(x[:, :, :w:2], x[:, :, 1:w:2])


def nearest_double(x: jax.Array) -> jax.Array:
  """Repeats every pixel twice along both axes."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Block(nn.Module):
  """A residual block of two 3x3 convolutions, without biases, with batch norms.

  Attributes:
    features: channels that come out.
    stride: 2 to halve the size.
    double: whether the size is doubled instead, before the second convolution.
  """

  features: int
  stride: int = 1
  double: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv = functools.partial(Conv, use_bias=False)
    resized = nearest_double if self.double else lambda y: y
    y = nn.relu(Norm()(conv(self.features, stride=self.stride)(x), train))
    y = Norm()(conv(self.features)(resized(y)), train)
    if self.double or self.stride == 2 or x.shape[-1] != self.features:
      # Repeated pixels have the same mean and variance, and fewer are quicker.
      x = resized(Norm()(conv(self.features, 1, self.stride)(x), train))
    return nn.relu(x + y)


class Encoder(nn.Module):
  """A residual encoder as ResNet-18's, narrower: a stem of stride 2, and two blocks for each width.

  Attributes:
    widths: channels of the stages; each but the first halves the size.
  """

  widths: Sequence[int] = (16, 32, 64, 128)

  @nn.compact
  def __call__(
      self, x: jax.Array, train: bool, given: tuple[int, jax.Array] | None = None) -> list[jax.Array]:
    """Returns the map of every stage, shallow to deep: [b, h / 2 ** (1 + i), ..., widths[i]].

    Args:
      given: a stage i, and a map that later stages get in place of its own: for gradients in that map.
    """
    x = nn.relu(Norm()(Conv(self.widths[0], stride=2, use_bias=False)(x), train))
    maps = []
    for i, width in enumerate(self.widths):
      x = Block(width, stride=2 if i else 1)(x, train)
      x = Block(width)(x, train)
      if given and given[0] == i:
        x = given[1]
      maps.append(x)
    return maps


class Decoder(nn.Module):
  """A residual decoder: for each width a block that doubles the size and one that does not; then 3 channels.

  Attributes:
    widths: channels of the stages.
  """

  widths: Sequence[int] = (128, 64, 32, 16)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns [b, h * 2 ** len(widths), ..., 3], without an activation."""
    for width in self.widths:
      x = Block(width, double=True)(x, train)
      x = Block(width)(x, train)
    return Conv(3)(x)


class Discriminator(nn.Module):
  """DC-GAN's discriminator: 4x4 convolutions of stride 2 without biases, batch norm in all but the first.

  Attributes:
    widths: channels of the layers, each of which halves the size.
  """

  widths: Sequence[int]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns the features of the last layer."""
    for i, width in enumerate(self.widths):
      x = Conv(width, 4, 2, use_bias=False, kernel_init=starts.DCGAN)(x)
      if i:
        x = Norm(scale_init=starts.NEAR_ONE)(x, train)
      x = leaky_relu(x)
    return x
