"""The DenseNet family in Flax, for inference: Huang et al. 2017, as in torchvision.

A layer sees the channels of all layers of its block before it, and adds a few. Its first batch norm stands
before a ReLU, on channels that other layers see too: that one stays, as a scale and a bias for every channel.
The second is folded into the convolution between them. What a block gives is all of its channels, before the
norm and the ReLU of what follows.

XLA's own convolutions are the quicker ones here, also on CPUs: from 128 channels to 32, Winograd's transforms
take as long as the products that they save.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax.backbones import port
from patchcore_jax.backbones.arithmetic import AUTO_PRECISIONS, PRECISIONS, Arithmetic, per_platform
from patchcore_jax.backbones.family import Family

LAYERS = ('stem', 'denseblock1', 'denseblock2', 'denseblock3', 'denseblock4')
DEFAULT_LAYERS = ('denseblock2', 'denseblock3')
_BOTTLENECK = 4  # channels between the two convolutions of a layer, for each that it adds
# On a CPU so many pixels at a time, four images of 224 x 224: what lies between two layers stays in
# the cache.
_CPU_PIXELS = 4 * 224 * 224


class Architecture(NamedTuple):
  """Sizes of one member of the family.

  Attributes:
    depths: layers of each block.
    growth: channels that a layer adds.
    width: channels of the stem.
  """

  depths: tuple[int, int, int, int]
  growth: int = 32
  width: int = 64


ARCHITECTURES = {
    'densenet121': Architecture((6, 12, 24, 16)),
    'densenet161': Architecture((6, 12, 36, 24), growth=48, width=96),
    'densenet169': Architecture((6, 12, 32, 32)),
    'densenet201': Architecture((6, 12, 48, 32)),
}


class Conv(nn.Module):
  """A convolution with PyTorch's padding, and with a bias where a norm is folded into it."""

  features: int
  size: int = 1
  stride: int = 1
  use_bias: bool = False
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x):
    # Variables come from a checkpoint or from `_init`; Flax only needs to know their shapes.
    zeros, rounded = nn.initializers.zeros_init(), self.arithmetic.rounded
    kernel = self.param('kernel', zeros, (self.size, self.size, x.shape[-1], self.features), jnp.float32)
    y = self.arithmetic.convolve(x, rounded(kernel), self.stride)
    if self.use_bias:
      y = y + rounded(self.param('bias', zeros, (self.features,), jnp.float32))
    return rounded(y)


class NormThenReLU(nn.Module):
  """A batch norm that cannot be folded away, and ReLU; computed in float32."""

  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x):
    zeros, shape = nn.initializers.zeros_init(), x.shape[-1:]
    scale = self.param('scale', zeros, shape, jnp.float32)
    bias = self.param('bias', zeros, shape, jnp.float32)
    return self.arithmetic.rounded(nn.relu(x.astype(jnp.float32) * scale + bias))


class DenseLayer(nn.Module):
  """One layer, which adds `growth` channels to those it is given; names follow the PyTorch checkpoints."""

  growth: int
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(Conv, arithmetic=self.arithmetic)
    y = NormThenReLU(self.arithmetic, name='norm1')(x)
    y = nn.relu(conv(_BOTTLENECK * self.growth, use_bias=True, name='conv1')(y))
    return jnp.concatenate([x, conv(self.growth, 3, name='conv2')(y)], axis=-1)


class Transition(nn.Module):
  """What lies between two blocks: half the channels, and half the height and width.

  The mean over squares is taken before the 1x1 convolution and not after it, which is the same, on a quarter
  of the places.
  """

  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x):
    b, height, width, channels = x.shape
    y = NormThenReLU(self.arithmetic, name='norm')(x)
    y = y[:, :height // 2 * 2, :width // 2 * 2].reshape(b, height // 2, 2, width // 2, 2, channels)
    y = self.arithmetic.rounded(y.mean((2, 4), dtype=jnp.float32))
    return Conv(channels // 2, arithmetic=self.arithmetic, name='conv')(y)


class DenseNet(nn.Module):
  """The network that gives the feature maps of `layers`; nothing behind the deepest of them is built."""

  architecture: Architecture
  layers: tuple[str, ...]
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    arch = self.architecture
    x = self.arithmetic.rounded(images)
    x = nn.relu(Conv(arch.width, 7, 2, use_bias=True, arithmetic=self.arithmetic, name='conv0')(x))
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    maps = {'stem': x}
    for block in range(1, 1 + _deepest(self.layers)):
      if block > 1:
        x = Transition(self.arithmetic, name=f'transition{block - 1}')(x)
      for layer in range(1, 1 + arch.depths[block - 1]):
        x = DenseLayer(arch.growth, self.arithmetic, name=f'denseblock{block}_denselayer{layer}')(x)
      maps[f'denseblock{block}'] = x
    return {name: maps[name].astype(jnp.float32) for name in self.layers}


@functools.cache
def _apply_fn(arch: Architecture, layers: tuple[str, ...], precision: str):
  """Builds the pure function of `Family.build`; jit recompiles for every new function object."""
  return per_platform(
      lambda arithmetic: DenseNet(arch, layers, arithmetic).apply, precision, _CPU_PIXELS)


def _deepest(layers: Sequence[str]) -> int:
  """Finds the number of the deepest block that these layers need; 0 for the stem alone.

  >>> _deepest(('stem', 'denseblock3'))
  3
  """
  return max(map(LAYERS.index, layers))


@functools.cache  # seconds of tracing, and weights are checked and converted by it; nobody changes it
def _shapes(arch: Architecture) -> dict[str, Any]:
  """Returns the shapes of all variables, as `jax.ShapeDtypeStruct`; nothing is computed."""
  return jax.eval_shape(DenseNet(arch, LAYERS).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def _init(arch: Architecture, seed: int) -> dict[str, Any]:
  """Draws variables of the whole network: He initialisation, norms that change nothing, NumPy float32."""
  rng = np.random.Generator(np.random.PCG64(seed))

  def draw(path, leaf):
    if path[-1].key != 'kernel':
      return np.full(leaf.shape, path[-1].key == 'scale', np.float32)
    return rng.standard_normal(leaf.shape, np.float32) * np.float32((2 / math.prod(leaf.shape[:3])) ** 0.5)

  return jax.tree_util.tree_map_with_path(draw, _shapes(arch))


def _state_dict_shapes(arch: Architecture) -> dict[str, tuple[int, ...] | None]:
  """Returns {key: shape} of torchvision's and timm's checkpoints; None for what has no use here."""
  result: dict[str, tuple[int, ...] | None] = {}
  for path, target in jax.tree_util.tree_leaves_with_path(_shapes(arch), is_leaf=_is_module):
    conv, norm = _torch_names(path)
    if conv:
      height, width, inputs, outputs = target['kernel'].shape
      result[f'{conv}.weight'] = (outputs, inputs, height, width)
    if norm:
      result |= {f'{norm}.{name}': target['bias'].shape for name in port.BATCH_NORM}
      result[f'{norm}.num_batches_tracked'] = None
  last = (f'features.norm5.{name}' for name in (*port.BATCH_NORM, 'num_batches_tracked'))
  return result | dict.fromkeys((*last, 'classifier.weight', 'classifier.bias'))


def _convert(state_dict: Mapping[str, np.ndarray], arch: Architecture) -> dict[str, Any]:
  """Converts a checkpoint of these keys and shapes to variables of the whole network, NumPy float32."""

  def take(path, _):
    conv, norm = _torch_names(path)
    if conv and norm:
      return port.fold_batch_norm(state_dict, conv, norm)
    if norm:
      return port.batch_norm(state_dict, norm)
    return {'kernel': port.kernel(state_dict[f'{conv}.weight'])}

  return jax.tree_util.tree_map_with_path(take, _shapes(arch), is_leaf=_is_module)


def _is_module(node) -> bool:
  return 'kernel' in node or 'scale' in node


def _torch_names(path) -> tuple[str, str]:
  """Names the convolution of a module and its batch norm, '' for none.

  For params/denseblock1_denselayer2/conv1 they are 'features.denseblock1.denselayer2.conv1' and '...norm2'.
  """
  *parents, own = (entry.key.replace('_', '.') for entry in path[1:])
  prefix = '.'.join(('features', *parents, ''))
  if own.startswith('norm'):
    return '', prefix + own
  norm = {'conv0': 'norm0', 'conv1': 'norm2'}.get(own)
  return prefix + own, prefix + norm if norm else ''


def _current_key(key: str) -> str:
  """Spells a key as models have it: in torchvision's published files some have another dot.

  >>> _current_key('features.denseblock1.denselayer2.norm.1.weight')
  'features.denseblock1.denselayer2.norm1.weight'
  """
  return re.sub(r'(\.denselayer\d+\.(?:norm|conv))\.([12]\.)', r'\1\2', key)


def _truncate(variables: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
  """Drops the variables behind the deepest of `layers`."""
  deepest = _deepest(layers)
  keep = {'conv0', *(f'denseblock{i}' for i in range(1, 1 + deepest)),
          *(f'transition{i}' for i in range(1, deepest))}
  return {'params': {k: v for k, v in variables['params'].items() if k.split('_')[0] in keep}}


def family_of(architectures: Mapping[str, Architecture]) -> Family:
  """Makes the family of some architectures by name."""
  of = architectures.__getitem__
  return Family(
      architectures=architectures,
      layers=lambda name: LAYERS,
      default_layers=lambda name: DEFAULT_LAYERS,
      build=lambda name, layers, precision: _apply_fn(of(name), tuple(layers), precision),
      init=lambda name, seed: _init(of(name), seed),
      state_dict_shapes=lambda name: _state_dict_shapes(of(name)),
      convert=lambda state_dict, name: _convert(state_dict, of(name)),
      truncate=_truncate,
      precisions=PRECISIONS,
      auto_precisions=AUTO_PRECISIONS,
      current_key=_current_key,
  )


FAMILY = family_of(ARCHITECTURES)
