"""The ResNet family in Flax, for inference: ResNet, Wide ResNet, ResNeXt.

They are those of He et al. 2016, Zagoruyko and Komodakis 2016, and Xie et al. 2017; the stride sits on the
3x3 convolution of a bottleneck, as in torchvision. Batch norm is folded into the convolutions, so a layer
is a convolution and a bias. Padding is explicit: XLA's 'SAME' pads differently at stride 2.

On a CPU some convolutions run as `cpu_convolutions` has them, and a few images at a time, which is
faster; GPUs and TPUs have their library's convolutions. `docs/precision.md` says what the precisions are.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax.backbones import cpu_convolutions, port
from patchcore_jax.backbones.arithmetic import AUTO_PRECISIONS, PRECISIONS, Arithmetic, per_platform
from patchcore_jax.backbones.family import Family

LAYERS = ('stem', 'layer1', 'layer2', 'layer3', 'layer4')
DEFAULT_LAYERS = ('layer2', 'layer3')
# On a CPU so many pixels at a time, four images of 224 x 224: what lies between two layers stays in
# the cache, and the products are still large.
_CPU_PIXELS = 4 * 224 * 224


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Sizes of one member of the family.

  Attributes:
    depths: residual blocks in layer1, layer2 and so on.
    bottleneck: whether blocks have 1x1, 3x3 and 1x1 convolutions, or else two 3x3.
    groups: groups of the 3x3 convolution.
    group_width: channels of each group in layer1, for a width of 64; doubles with every layer.
    width: base channels of the stem and layer1; doubles with every further layer.
    layers: the layers used when none are asked for; 'colour' is that of `local_colour`.
  """

  depths: tuple[int, ...]
  bottleneck: bool = True
  groups: int = 1
  group_width: int = 64
  width: int = 64
  layers: tuple[str, ...] = DEFAULT_LAYERS


ARCHITECTURES = {
    'resnet18': Architecture((2, 2, 2, 2), bottleneck=False),
    'resnet34': Architecture((3, 4, 6, 3), bottleneck=False),
    'resnet50': Architecture((3, 4, 6, 3)),
    'resnet101': Architecture((3, 4, 23, 3)),
    'resnet152': Architecture((3, 8, 36, 3)),
    'wide_resnet50_2': Architecture((3, 4, 6, 3), group_width=128),
    'wide_resnet101_2': Architecture((3, 4, 23, 3), group_width=128),
    'resnext50_32x4d': Architecture((3, 4, 6, 3), groups=32, group_width=4),
    'resnext101_32x8d': Architecture((3, 4, 23, 3), groups=32, group_width=8),
    # Its layers were chosen by measurement: docs/pretrained.md.
    'resnet18_slim': Architecture((2, 2, 2), bottleneck=False, width=32,
                                  layers=('layer1', 'layer2', 'colour')),
}


class Conv(nn.Module):
  """A convolution with bias and PyTorch's padding of (size - 1) / 2 on every side."""

  features: int
  size: int
  stride: int = 1
  groups: int = 1
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x):
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
    # Variables come from a checkpoint or from `init`; Flax only needs to know their shapes.
    zeros = nn.initializers.zeros_init()
    kernel = self.param('kernel', zeros, shape, jnp.float32)
    bias = self.param('bias', zeros, (self.features,), jnp.float32)
    rounded = self.arithmetic.rounded
    return rounded(self._convolve(x, rounded(kernel)) + rounded(bias))

  def _convolve(self, x, kernel):
    if self.arithmetic.for_cpu and self.groups == 1:
      _, *extent, _ = x.shape
      if (self.size, self.stride) == (3, 1) and cpu_convolutions.pays_3x3(*extent):
        return cpu_convolutions.convolve_3x3(x, kernel)
      if (self.size, self.stride) == (7, 2) and cpu_convolutions.pays_7x7(*extent, self.features):
        return cpu_convolutions.convolve_7x7(x, kernel)
    return self.arithmetic.convolve(x, kernel, self.stride, self.groups)


class Block(nn.Module):
  """One residual block of `planes` base channels; names follow the PyTorch checkpoints."""

  architecture: Architecture
  planes: int
  stride: int
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x):
    arch = self.architecture
    conv = functools.partial(Conv, arithmetic=self.arithmetic)
    if arch.bottleneck:
      features = 4 * self.planes
      width = self.planes * arch.group_width // 64 * arch.groups
      y = nn.relu(conv(width, 1, name='conv1')(x))
      y = nn.relu(conv(width, 3, self.stride, arch.groups, name='conv2')(y))
      y = conv(features, 1, name='conv3')(y)
    else:
      features = self.planes
      y = nn.relu(conv(features, 3, self.stride, name='conv1')(x))
      y = conv(features, 3, name='conv2')(y)
    if self.stride != 1 or x.shape[-1] != features:
      x = conv(features, 1, self.stride, name='downsample')(x)
    return nn.relu(self.arithmetic.rounded(x + y))


class ResNet(nn.Module):
  """The network that gives the feature maps of `layers`; nothing behind the deepest of them is built."""

  architecture: Architecture
  layers: tuple[str, ...]
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    x = self.arithmetic.rounded(images)
    x = nn.relu(Conv(self.architecture.width, 7, 2, arithmetic=self.arithmetic, name='conv1')(x))
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    maps = {'stem': x}
    for stage in range(1, 1 + max(LAYERS.index(name) for name in self.layers)):
      for block in range(self.architecture.depths[stage - 1]):
        stride = 2 if stage > 1 and block == 0 else 1
        name = f'layer{stage}_{block}'
        planes = self.architecture.width * 2 ** (stage - 1)
        x = Block(self.architecture, planes, stride, self.arithmetic, name=name)(x)
      maps[f'layer{stage}'] = x
    return {name: maps[name].astype(jnp.float32) for name in self.layers}


@functools.cache
def apply_fn(architecture: str, layers: tuple[str, ...], precision: str = 'float32'):
  """Builds the pure function (variables, images [b, h, w, 3]) -> {layer: [b, h', w', c]}, all float32.

  The function is cached, because jit recompiles for every new function object.

  Args:
    architecture: one of `ARCHITECTURES`.
    layers: some of `layers_of(architecture)`.
    precision: precision of products and convolutions, see `Arithmetic`; in bfloat16 residuals are too.

  Raises:
    ValueError: another precision.
  """
  arch, layers = ARCHITECTURES[architecture], tuple(layers)
  return per_platform(lambda arithmetic: ResNet(arch, layers, arithmetic).apply, precision, _CPU_PIXELS)


def layers_of(architecture: str) -> tuple[str, ...]:
  """Returns the layers that a member of the family has, shallow to deep.

  >>> layers_of('resnet18_slim')
  ('stem', 'layer1', 'layer2', 'layer3')
  """
  return LAYERS[:1 + len(ARCHITECTURES[architecture].depths)]


def init(architecture: str, seed: int = 0) -> dict[str, Any]:
  """Draws variables of the whole network, its last layer included: He initialisation, NumPy float32.

  Without batch norm, the residual branches of an untrained network would add up from block to block,
  so their last convolutions start small.
  """
  rng = np.random.Generator(np.random.PCG64(seed))
  last = 'conv3' if ARCHITECTURES[architecture].bottleneck else 'conv2'

  def draw(path, leaf):
    if path[-1].key == 'bias':
      return np.zeros(leaf.shape, np.float32)
    gain = 0.3 if path[-2].key == last else 1.0
    scale = gain * (2 / math.prod(leaf.shape[:3])) ** 0.5
    return rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)

  return jax.tree_util.tree_map_with_path(draw, init_shapes(architecture))


@functools.cache  # a tenth of a second, and weights are checked and converted by it; nobody changes it
def init_shapes(architecture: str) -> dict[str, Any]:
  """Returns the shapes of all variables, as `jax.ShapeDtypeStruct`; nothing is computed."""
  model = ResNet(ARCHITECTURES[architecture], layers_of(architecture))
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def state_dict_shapes(architecture: str) -> dict[str, tuple[int, ...] | None]:
  """Returns {key: shape} of torchvision's and timm's checkpoints; None for what has no use here.

  >>> state_dict_shapes('resnet18')['layer2.0.downsample.0.weight']
  (128, 64, 1, 1)
  """
  result = {}
  for path, target in jax.tree_util.tree_leaves_with_path(init_shapes(architecture), is_leaf=_is_conv):
    conv, norm = _torch_names(path)
    height, width, inputs, outputs = target['kernel'].shape
    result[f'{conv}.weight'] = (outputs, inputs, height, width)
    result |= {f'{norm}.{name}': (outputs,) for name in port.BATCH_NORM}
    result[f'{norm}.num_batches_tracked'] = None
  return result | {'fc.weight': None, 'fc.bias': None}


def convert(state_dict: Mapping[str, np.ndarray], architecture: str) -> dict[str, Any]:
  """Converts a checkpoint of these keys and shapes to variables of the whole network, NumPy float32."""

  def fold(path, _):
    return port.fold_batch_norm(state_dict, *_torch_names(path))

  return jax.tree_util.tree_map_with_path(fold, init_shapes(architecture), is_leaf=_is_conv)


def _is_conv(node) -> bool:
  return 'kernel' in node


def _torch_names(path) -> tuple[str, str]:
  """Names a convolution and its batch norm: params/layer2_0/conv1 -> 'layer2.0.conv1', 'layer2.0.bn1'."""
  _, *block, conv = (entry.key.replace('_', '.') for entry in path)
  both = ('downsample.0', 'downsample.1') if conv == 'downsample' else (conv, conv.replace('conv', 'bn'))
  return tuple('.'.join((*block, name)) for name in both)


def truncate(variables: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
  """Drops the variables of blocks behind the deepest of `layers`."""
  deepest = max(LAYERS.index(name) for name in layers)
  keep = {'conv1'} | {f'layer{stage}' for stage in range(1, deepest + 1)}
  params = {k: v for k, v in variables['params'].items() if k.split('_')[0] in keep}
  return {'params': params}


FAMILY = Family(
    architectures=ARCHITECTURES,
    layers=layers_of,
    default_layers=lambda architecture: ARCHITECTURES[architecture].layers,
    build=apply_fn,
    init=init,
    state_dict_shapes=state_dict_shapes,
    convert=convert,
    truncate=truncate,
    precisions=PRECISIONS,
    auto_precisions=AUTO_PRECISIONS,
)
