"""The ResNet family while it is trained: with batch norm, and a head on each layer that is trained.

Names are those of the PyTorch checkpoints, so that `port` takes the result like any other checkpoint.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax.backbones import checkpoints, cpu_convolutions, port, resnet

STRIDES = {'layer1': 4, 'layer2': 8, 'layer3': 16, 'layer4': 32}  # pixels of an image for a cell of the map


class Conv(nn.Module):
  """A convolution without bias, padded as `resnet.Conv` is, and by Winograd's algorithm on CPUs, as there."""

  features: int
  size: int
  stride: int = 1
  gray_free: bool = False  # blind to a gray offset, see `without_gray`

  @nn.compact
  def __call__(self, x):
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape, jnp.float32)
    if self.gray_free:
      kernel = without_gray(kernel)
    if (self.size, self.stride) == (3, 1):
      return lax.platform_dependent(
          x, kernel, cpu=cpu_convolutions.convolve_3x3, default=functools.partial(_library, stride=1))
    if (self.size, self.stride) == (7, 2) and x.shape[1] % 2 == x.shape[2] % 2 == 0:
      return cpu_convolutions.convolve_7x7(x, kernel)
    return _library(x, kernel, self.stride)


def _library(x, kernel, stride):
  """Convolves as XLA's own operations do."""
  if kernel.shape[0] == 1:
    return x[:, ::stride, ::stride] @ kernel[0, 0]
  pad = (kernel.shape[0] - 1) // 2
  return lax.conv_general_dilated(
      x, kernel, (stride, stride), [(pad, pad), (pad, pad)], dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _max_pool(x):
  """Pools 3x3 with stride 2 and padding 1; written out, because XLA's gradient of it is slow on CPUs."""
  for axis in (1, 2):
    size = (x.shape[axis] + 1) // 2
    x = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])  # zeros: x is never negative
    x = functools.reduce(jnp.maximum, [
        lax.slice_in_dim(x, i, i + 2 * size - 1, 2, axis) for i in range(3)])
  return x


def without_gray(kernel: jax.Array) -> jax.Array:
  """Finds the nearest kernel [h, w, 3, c] whose sums an offset of all pixels does not change.

  Images reach the kernel divided by the standard deviation of each channel, which the sum allows for.
  """
  weight = jnp.asarray(1 / np.array(checkpoints.IMAGENET_STD), kernel.dtype)[:, None]
  area = kernel.shape[0] * kernel.shape[1]
  total = (kernel * weight).sum((0, 1, 2)) / (area * jnp.square(weight).sum())
  return kernel - weight * total


class Block(nn.Module):
  """A residual block of two 3x3 convolutions."""

  planes: int
  stride: int

  @nn.compact
  def __call__(self, x, norm):
    y = nn.relu(norm(name='bn1')(Conv(self.planes, 3, self.stride, name='conv1')(x)))
    y = norm(name='bn2')(Conv(self.planes, 3, name='conv2')(y))
    if self.stride != 1 or x.shape[-1] != self.planes:
      x = norm(name='downsample_1')(Conv(self.planes, 1, self.stride, name='downsample_0')(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  """The network that gives the feature maps of `layers`; its blocks have two convolutions."""

  architecture: resnet.Architecture
  layers: tuple[str, ...]
  gray_free: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    width = self.architecture.width
    norm = functools.partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.95, epsilon=port.BATCH_NORM_EPS)
    x = Conv(width, 7, 2, self.gray_free, name='conv1')(images)
    x = _max_pool(nn.relu(norm(name='bn1')(x)))
    maps = {}
    for stage, depth in enumerate(self.architecture.depths, 1):
      for block in range(depth):
        stride = 2 if stage > 1 and block == 0 else 1
        x = Block(width * 2 ** (stage - 1), stride, name=f'layer{stage}_{block}')(x, norm)
      maps[f'layer{stage}'] = x
    return {name: maps[name] for name in self.layers}


class Head(nn.Module):
  """A small network between a feature [..., c] and the objective; it is thrown away after training."""

  width: int
  features: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nn.Dense(self.width)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))
    return nn.Dense(self.features)(x)


def state_dict(variables: Mapping[str, Any], *, gray_free: bool = False) -> dict[str, np.ndarray]:
  """Converts the variables of `ResNet` to a PyTorch checkpoint: float32 arrays by name."""
  result = {}

  def visit(path, leaf):
    *modules, name = (p.key for p in path)
    key = '.'.join(m.replace('_', '.') for m in modules)
    leaf = np.asarray(leaf, np.float32)
    if name == 'kernel':
      leaf = np.asarray(without_gray(leaf)) if gray_free and key == 'conv1' else leaf
      result[f'{key}.weight'] = np.ascontiguousarray(leaf.transpose(3, 2, 0, 1))
    else:
      torch_name = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}[name]
      result[f'{key}.{torch_name}'] = leaf

  for collection in ('params', 'batch_stats'):
    jax.tree_util.tree_map_with_path(visit, dict(variables[collection]))
  return result


def rescaled(
    state: Mapping[str, np.ndarray], scales: Mapping[str, np.ndarray | float]
) -> dict[str, np.ndarray]:
  """Rescales a checkpoint, so that maps are multiplied by a factor of each layer or channel.

  This is exact but for rounding: a ReLU passes positive factors on, so those of a layer are put into the
  batch norms at the end of its blocks and taken out of the convolutions that read them. Maps of layers that
  are joined can thus be brought to one scale in the weights themselves.

  Args:
    state: the checkpoint of a ResNet with blocks of two convolutions, as `state_dict` gives it.
    scales: {layer: a positive factor, or one for each channel}, for 'layer1' and so on; layers that are
      missing stay.
  """
  result = {k: np.array(v, np.float64) for k, v in state.items()}
  blocks = sorted({k.rsplit('.conv', 1)[0] for k in state if k.startswith('layer') and '.conv' in k})
  # The stem and layer1 are joined by sums without a convolution between them.
  before = np.asarray(scales.get('layer1', 1.0))
  for name in ('weight', 'bias'):
    result[f'bn1.{name}'] *= before
  for block in blocks:
    after = np.asarray(scales.get(block.split('.')[0], 1.0))
    if f'{block}.downsample.0.weight' not in result:
      assert np.array_equal(before, after), block
    readers, writers = ('conv1', 'downsample.0'), ('bn2', 'downsample.1')
    for reader in readers:
      if f'{block}.{reader}.weight' in result:
        result[f'{block}.{reader}.weight'] /= before.reshape(-1, 1, 1) if before.ndim else before
    for writer in writers:
      if f'{block}.{writer}.weight' in result:
        for name in ('weight', 'bias'):
          result[f'{block}.{writer}.{name}'] *= after
    before = after
  return {k: v.astype(np.float32) for k, v in result.items()}
