"""Vision Transformers in Flax, for inference: DINOv2, DINOv2 with registers, and DINOv3.

They are those of Oquab et al. 2023 (arXiv 2304.07193), Darcet et al. 2023 (arXiv 2309.16588) and Simeoni et
al. 2025 (arXiv 2508.10104), with the names and shapes of timm's checkpoints. Tokens of patches are given as
maps; registers take part in attention and are dropped.

The layer 'blocks.11' is the residual stream after block 11 through the network's one final layer norm, as
every published method on DINOv2 reads it; 'blocks.11.raw' is without that norm; 'blocks.11.cls' is the class
token through it, as a map of one cell.
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
from jax import lax

from patchcore_jax.backbones.arithmetic import (
    AUTO_PRECISIONS,
    PRECISIONS,
    Arithmetic,
    check_precision,
    in_parts,
)
from patchcore_jax.backbones.family import Family

_RAW, _CLASS = '.raw', '.cls'


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Sizes and switches of one member of the family.

  Attributes:
    width: channels of a token, C.
    blocks: number of blocks.
    heads: heads of each attention.
    hidden: channels between the two products of an MLP.
    mlp: 'gelu' (exact); 'packed', SwiGLU whose two halves are one product; or 'split', SwiGLU of two.
    patch: side of a patch, in pixels; their grid has that stride.
    registers: number of learnt tokens beside the class token.
    grid: side of the learnt grid of positions, in patches; 0 for rotary positions (RoPE).
    interpolation: how that grid is brought to the images' own: see `resample_matrix`.
    bias: which of 'q', 'k' and 'v' have biases.
    epsilon: that of all layer norms.
  """

  width: int
  blocks: int
  heads: int
  hidden: int
  mlp: str = 'gelu'
  patch: int = 14
  registers: int = 0
  grid: int = 37
  interpolation: str = 'timm'
  bias: str = 'qkv'
  epsilon: float = 1e-6

  @property
  def prefix(self) -> int:
    """The number of tokens before those of the patches."""
    return 1 + self.registers


_DINOV2 = {
    'small': Architecture(384, 12, 6, 1536),
    'base': Architecture(768, 12, 12, 3072),
    'large': Architecture(1024, 24, 16, 4096),
    'giant': Architecture(1536, 40, 24, 4096, mlp='packed'),
}
_dinov3 = functools.partial(Architecture, patch=16, registers=4, grid=0, bias='', epsilon=1e-5)
_DINOV3 = {
    'small': _dinov3(384, 12, 6, 1536),
    'small_plus': _dinov3(384, 12, 6, 1536, mlp='split'),
    'base': _dinov3(768, 12, 12, 3072),
    'large': _dinov3(1024, 24, 16, 4096),
    'huge_plus': _dinov3(1280, 32, 20, 5120, mlp='split'),
    '7b': _dinov3(4096, 40, 32, 8192, mlp='split'),
}
_replace = dataclasses.replace
ARCHITECTURES = {
    **{f'vit_{size}_patch14_dinov2': arch for size, arch in _DINOV2.items()},
    # The same weights with positions as Meta's own code has them; with registers it has timm's.
    **{f'vit_{size}_patch14_dinov2_meta': _replace(arch, interpolation='meta')
       for size, arch in _DINOV2.items()},
    **{f'vit_{size}_patch14_reg4_dinov2': _replace(arch, registers=4) for size, arch in _DINOV2.items()},
    **{f'vit_{size}_patch16_dinov3': arch for size, arch in _DINOV3.items()},
    **{f'vit_{size}_patch16_dinov3_qkvb': _replace(arch, bias='qv')
       for size, arch in _DINOV3.items() if size != '7b'},
}


def resample_matrix(old: int, new: int, interpolation: str) -> np.ndarray:
  """Makes the matrix [new, old] float32 that resamples one axis of a grid of positions by cubic weights.

  Args:
    old, new: numbers of patches.
    interpolation: 'timm' (a = -0.5, antialiased), which Meta's code has too for models with registers;
      'meta' (a = -0.75, not antialiased, the scale is old / (new + 0.1)), which it has for those without;
      'anomalib' (as 'meta', but the scale is old / new).

  >>> resample_matrix(4, 2, 'anomalib')[0].tolist()
  [0.5, 0.59375, -0.09375, 0.0]
  """
  antialiased = interpolation == 'timm'
  scale = old / (new + {'timm': 0.0, 'meta': 0.1, 'anomalib': 0.0}[interpolation])
  matrix = np.zeros((new, old))
  for i in range(new):
    if antialiased:
      factor = max(scale, 1.0)
      centre = scale * (i + 0.5)
      taps = np.arange(max(math.trunc(centre - 2 * factor + 0.5), 0),
                       min(math.trunc(centre + 2 * factor + 0.5), old))
      weights = _cubic((taps - centre + 0.5) / factor, -0.5)
      weights = weights / weights.sum()
    else:
      centre = scale * (i + 0.5) - 0.5
      taps = math.floor(centre) + np.arange(-1, 3)
      weights = _cubic(taps - centre, -0.75)
    np.add.at(matrix[i], np.clip(taps, 0, old - 1), weights)
  return matrix.astype(np.float32)


def _cubic(t, a):
  """Computes the cubic kernel of Keys 1981."""
  t = np.abs(t)
  near = (a + 2) * t**3 - (a + 3) * t**2 + 1
  far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
  return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def rotary_periods(channels: int) -> np.ndarray:
  """Computes the periods of rotary positions, float64: from 1 to nearly 100, d / 4 of them.

  >>> rotary_periods(16).round(2).tolist()
  [1.0, 3.16, 10.0, 31.62]
  """
  return 100.0 ** (4 / channels * np.arange(channels // 4))


def rotary_tables(height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
  """Makes the sines and cosines of rotary positions for a grid of patches.

  A patch's coordinates run from -1 to 1 over the image, whatever its size, each axis by its own length.

  Args:
    height, width: of the grid, in patches.
    channels: channels of a head, d; a multiple of 4.

  Returns:
    Sines and cosines, [height * width, d] float32: d / 4 angles by row, d / 4 by column, and both again.

  >>> sines, cosines = rotary_tables(1, 2, 4)
  >>> sines.round(6).tolist()  # the row is in the middle, and the columns are at -1/2 and 1/2
  [[0.0, -0.0, 0.0, -0.0], [0.0, 0.0, 0.0, 0.0]]
  """
  rows, columns = (2 * (np.arange(n) + 0.5) / n - 1 for n in (height, width))
  coordinates = np.stack(np.meshgrid(rows, columns, indexing='ij'), -1).reshape(-1, 2)
  angles = (2 * np.pi * coordinates[:, :, None] / rotary_periods(channels)).reshape(height * width, -1)
  angles = np.concatenate([angles, angles], 1)
  return np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)


class Dense(nn.Module):
  """A product over channels, with or without a bias."""

  features: int
  use_bias: bool = True
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x):
    rounded = self.arithmetic.rounded
    zeros = nn.initializers.zeros_init()  # variables come from a checkpoint or from `init`
    kernel = self.param('kernel', zeros, (x.shape[-1], self.features), jnp.float32)
    y = jnp.dot(rounded(x), rounded(kernel), **self.arithmetic.accuracy)
    if self.use_bias:
      y = y + rounded(self.param('bias', zeros, (self.features,), jnp.float32))
    return rounded(y)


class PatchEmbedding(nn.Module):
  """The product of every patch with the convolution's kernel: its stride is its size."""

  architecture: Architecture
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, images):
    p, c = self.architecture.patch, self.architecture.width
    b, height, width, _ = images.shape
    rounded = self.arithmetic.rounded
    zeros = nn.initializers.zeros_init()
    kernel = rounded(self.param('kernel', zeros, (p, p, 3, c), jnp.float32)).reshape(-1, c)
    bias = self.param('bias', zeros, (c,), jnp.float32)
    patches = rounded(images).reshape(b, height // p, p, width // p, p, 3).swapaxes(2, 3)
    return jnp.dot(patches.reshape(b, -1, p * p * 3), kernel, **self.arithmetic.accuracy) + bias


class Attention(nn.Module):
  """Attention of all tokens to all, in heads."""

  architecture: Architecture
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x, rotary=None):
    arch, rounded = self.architecture, self.arithmetic.rounded
    dense = functools.partial(Dense, arithmetic=self.arithmetic)
    b, tokens, c = x.shape
    y = dense(3 * c, use_bias=arch.bias == 'qkv', name='qkv')(x).astype(jnp.float32)
    if arch.bias == 'qv':
      q_bias, v_bias = (
          self.param(f'{name}_bias', nn.initializers.zeros_init(), (c,), jnp.float32) for name in 'qv')
      y = y + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
    q, k, v = y.reshape(b, tokens, 3, arch.heads, -1).transpose(2, 0, 3, 1, 4)  # each [b, head, token, d]
    if rotary is not None:
      sines, cosines = rotary
      q, k = (z * cosines + _half_turned(z) * sines for z in (q, k))
    q, k, v = map(rounded, (q * q.shape[-1] ** -0.5, k, v))
    if self.arithmetic.for_cpu:
      # One head at a time, which XLA for CPUs computes three times as fast as all at once.
      heads = [z.reshape(-1, *z.shape[2:]) for z in (q, k, v)]
      y = lax.map(lambda head: self._attend(*head), tuple(heads)).reshape(q.shape)
    else:
      y = self._attend(q, k, v)
    return dense(c, name='proj')(y.swapaxes(1, 2).reshape(b, tokens, c))

  def _attend(self, q, k, v):
    accuracy = self.arithmetic.accuracy | {'preferred_element_type': jnp.float32}
    logits = jnp.einsum('...id,...jd->...ij', q, k, **accuracy)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum('...ij,...jd->...id', self.arithmetic.rounded(weights), v, **accuracy) / total


def _half_turned(z):
  """Computes (-second half, first half) of the channels."""
  first, second = jnp.split(z, 2, -1)
  return jnp.concatenate([-second, first], -1)


class Mlp(nn.Module):
  """The two products of each token, with GELU or SwiGLU between them."""

  architecture: Architecture
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x):
    kind, hidden = self.architecture.mlp, self.architecture.hidden
    dense = functools.partial(Dense, arithmetic=self.arithmetic)
    if kind == 'gelu':
      y = jax.nn.gelu(dense(hidden, name='fc1')(x).astype(jnp.float32), approximate=False)
    else:
      gate, y = (
          jnp.split(dense(2 * hidden, name='fc1')(x), 2, -1) if kind == 'packed'
          else (dense(hidden, name=name)(x) for name in ('fc1_g', 'fc1_x')))
      y = jax.nn.silu(gate.astype(jnp.float32)) * y.astype(jnp.float32)
    self.sow('intermediates', 'hidden', y)
    return dense(self.architecture.width, name='fc2')(y)


class Block(nn.Module):
  """Attention and MLP, each of normalised tokens, scaled by channel and added to the residual stream."""

  architecture: Architecture
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, x, rotary=None):
    arch, arithmetic = self.architecture, self.arithmetic

    def scaled(name, y):
      return self.param(name, nn.initializers.zeros_init(), (arch.width,), jnp.float32) * y

    y = Attention(arch, arithmetic, name='attn')(_norm(arch, 'norm1')(x), rotary)
    x = x + scaled('gamma_1', y.astype(jnp.float32))
    y = Mlp(arch, arithmetic, name='mlp')(_norm(arch, 'norm2')(x))
    return x + scaled('gamma_2', y.astype(jnp.float32))


def _norm(arch, name):
  # Some channels of trained networks are very large, where the fast variance E x^2 - (E x)^2 cancels.
  return nn.LayerNorm(arch.epsilon, use_fast_variance=False, name=name)


class VisionTransformer(nn.Module):
  """The network that gives the maps of `layers`; nothing behind the deepest of them is built.

  The residual stream, norms and softmax are float32 in every precision.
  """

  architecture: Architecture
  layers: tuple[str, ...]
  arithmetic: Arithmetic = Arithmetic()

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
    arch = self.architecture
    b, height, width, _ = images.shape
    grid = height // arch.patch, width // arch.patch
    x = self._embed(images, grid)
    self.sow('intermediates', 'embedded', x)
    rotary = None
    if not arch.grid:  # tokens without a place are turned by no angle
      pads = (arch.prefix, 0), (0, 0)
      sines, cosines = rotary_tables(*grid, arch.width // arch.heads)
      rotary = np.pad(sines, pads), np.pad(cosines, pads, constant_values=1)
    norm = _norm(arch, 'norm')
    maps = {}
    for i in range(1 + max(map(_block_of, self.layers))):
      x = Block(arch, self.arithmetic, name=f'blocks_{i}')(x, rotary)
      patches = x[:, arch.prefix:].reshape(b, *grid, -1)
      if f'blocks.{i}' in self.layers:
        maps[f'blocks.{i}'] = norm(patches)
      if f'blocks.{i}{_CLASS}' in self.layers:
        maps[f'blocks.{i}{_CLASS}'] = norm(x[:, None, :1])
      maps[f'blocks.{i}{_RAW}'] = patches
    return {layer: maps[layer] for layer in self.layers}

  def _embed(self, images, grid):
    """Computes the tokens [b, prefix + patches, c] that enter the first block."""
    arch = self.architecture

    def learnt(name, number):
      return self.param(name, nn.initializers.zeros_init(), (1, number, arch.width), jnp.float32)

    x = PatchEmbedding(arch, self.arithmetic, name='patch_embed')(images)
    tokens = [learnt('cls_token', 1)] + ([learnt('reg_token', arch.registers)] if arch.registers else [])
    if arch.grid:
      # With registers, the class token's position is a part of that token.
      others = 0 if arch.registers else 1
      positions = learnt('pos_embed', others + arch.grid**2)
      tokens[0] = tokens[0] + positions[:, :others].sum(1, keepdims=True)
      x = x + resampled(positions[:, others:], grid, arch.interpolation)
    return jnp.concatenate([*(jnp.broadcast_to(t, (len(x), *t.shape[1:])) for t in tokens), x], 1)


def resampled(positions: jax.Array, grid: tuple[int, int], interpolation: str = 'timm') -> jax.Array:
  """Resamples learnt positions of a square grid to another grid, by `resample_matrix` along both axes.

  Args:
    positions: [1, n * n, c] float32.
    grid: rows and columns of patches; for n and n, nothing is done.
    interpolation: see `resample_matrix`.

  Returns:
    [1, rows * columns, c] float32.
  """
  side = math.isqrt(positions.shape[1])
  if grid == (side, side):
    return positions
  rows, columns = (resample_matrix(side, n, interpolation) for n in grid)
  x = positions.reshape(side, side, -1)
  x = jnp.einsum('ij,jkc->ikc', rows, x, precision=lax.Precision.HIGHEST)
  x = jnp.einsum('lk,ikc->ilc', columns, x, precision=lax.Precision.HIGHEST)
  return x.reshape(1, grid[0] * grid[1], -1)


def _block_of(layer: str) -> int:
  """Returns the number of a layer's block.

  >>> _block_of('blocks.11'), _block_of('blocks.2.raw')
  (11, 2)
  """
  return int(layer.split('.')[1])


# On a CPU so many pixels at a time: what lies between two products stays in the cache.
_CPU_PIXELS = 224 * 224


@functools.cache
def _apply_fn(arch: Architecture, layers: tuple[str, ...], precision: str):
  """Builds the pure function of `Family.build`; jit recompiles for every new function object."""
  check_precision(precision)

  def network(**kwargs):
    return VisionTransformer(arch, layers, Arithmetic(precision, **kwargs)).apply

  cpu, default = in_parts(network(for_cpu=True), _CPU_PIXELS), network()
  return lambda variables, images: lax.platform_dependent(variables, images, cpu=cpu, default=default)


def layers_of(arch: Architecture) -> tuple[str, ...]:
  """Returns the layers that a member of the family has, shallow to deep.

  >>> layers_of(ARCHITECTURES['vit_small_patch14_dinov2'])[-3:]
  ('blocks.11.raw', 'blocks.11.cls', 'blocks.11')
  """
  return tuple(f'blocks.{i}{kind}' for i in range(arch.blocks) for kind in (_RAW, _CLASS, ''))


@functools.cache
def _shapes(arch: Architecture) -> dict[str, Any]:
  """Returns the shapes of all variables, as `jax.ShapeDtypeStruct`; nothing is computed."""
  model = VisionTransformer(_replace(arch, blocks=1), ('blocks.0',))
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, arch.patch, arch.patch, 3)))['params']
  block = params.pop('blocks_0')  # all are alike
  return {'params': params | {f'blocks_{i}': block for i in range(arch.blocks)}}


def _init(arch: Architecture, seed: int) -> dict[str, Any]:
  """Draws variables of the whole network, NumPy float32: products keep the size of what they are given."""
  rng = np.random.Generator(np.random.PCG64(seed))

  def draw(path, leaf):
    if path[-1].key == 'kernel':
      scale = math.prod(leaf.shape[:-1]) ** -0.5
    elif path[-1].key in ('cls_token', 'reg_token', 'pos_embed'):
      scale = 0.5
    else:
      return np.full(leaf.shape, 0 if path[-1].key.endswith('bias') else 1, np.float32)
    return rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)

  return jax.tree_util.tree_map_with_path(draw, _shapes(arch))


def _key(arch: Architecture, path) -> str:
  """Names a variable in timm's file: params/blocks_2/attn/qkv/kernel -> 'blocks.2.attn.qkv.weight'."""
  _, *names, leaf = (entry.key for entry in path)
  if names == ['patch_embed']:
    names.append('proj')
  if names:
    names[0] = names[0].replace('blocks_', 'blocks.')
  if leaf.startswith('gamma') and arch.grid:
    names, leaf = [*names, leaf.replace('gamma_', 'ls')], 'gamma'
  return '.'.join((*names, {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf)))


def _state_dict_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
  """Returns {key: shape} of timm's checkpoint, all of which has its use."""

  def published(shape):
    return {2: shape[::-1], 4: (shape[-1], 3, *shape[:2])}.get(len(shape), shape)

  return {_key(arch, path): published(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(_shapes(arch))}


def _convert(state_dict: Mapping[str, np.ndarray], arch: Architecture) -> dict[str, Any]:
  """Converts a checkpoint to variables of the whole network, NumPy float32."""

  def take(path, leaf):
    value = state_dict[_key(arch, path)]
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(value.ndim)
    return np.ascontiguousarray(value if axes is None else value.transpose(axes), np.float32)

  return jax.tree_util.tree_map_with_path(take, _shapes(arch))


def _truncate(variables: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
  """Drops the variables of blocks behind the deepest of `layers`."""
  deepest = max(map(_block_of, layers))
  return {'params': {k: v for k, v in variables['params'].items()
                     if not k.startswith('blocks_') or int(k.removeprefix('blocks_')) <= deepest}}


def family_of(architectures: Mapping[str, Architecture]) -> Family:
  """Makes the family of some architectures by name."""
  of = architectures.__getitem__
  return Family(
      architectures=architectures,
      layers=lambda name: layers_of(of(name)),
      default_layers=lambda name: layers_of(of(name))[-1:],
      build=lambda name, layers, precision: _apply_fn(of(name), tuple(layers), precision),
      init=lambda name, seed: _init(of(name), seed),
      state_dict_shapes=lambda name: _state_dict_shapes(of(name)),
      convert=lambda state_dict, name: _convert(state_dict, of(name)),
      truncate=_truncate,
      multiple=lambda name: of(name).patch,
      precisions=PRECISIONS,
      auto_precisions=AUTO_PRECISIONS,
  )


FAMILY = family_of(ARCHITECTURES)
