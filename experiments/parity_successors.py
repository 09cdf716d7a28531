"""Compares the networks that came after the ResNets with timm's: Vision Transformers and EfficientNet-Lite0.

Part of `experiments.parity`. Weights of the transformers and all images are drawn anew from their recipes
(`reference`); those of EfficientNet-Lite0 come with the extra [imagenet], and are not compared without it.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import reference
from experiments.comparisons import Row, compare, load
from patchcore_jax import backbones
from patchcore_jax.backbones import arithmetic, checkpoints, port, vit

_tiny = functools.partial(vit.Architecture, width=96, blocks=3, heads=3)
_tiny_dinov3 = functools.partial(_tiny, patch=16, registers=4, grid=0, epsilon=1e-5)
# Members that no one has published, for the switches that are found in large ones only.
TINY = {
    'vit_tiny_swiglu_dinov2': _tiny(hidden=256, mlp='packed', registers=4, grid=5),
    'vit_tiny_swiglu_dinov3': _tiny_dinov3(hidden=384, mlp='split', bias=''),
    'vit_tiny_qkvb_dinov3': _tiny_dinov3(hidden=384, bias='qv'),
}


class _Reference(NamedTuple):
  """A file of arrays: its architecture, and the seed and size of the image of each case."""

  architecture: str
  images: tuple[tuple[int, int, int], ...]


_REFERENCES = {
    'vit_small_reg4_dinov2': _Reference('vit_small_patch14_reg4_dinov2', ((1, 224, 224), (2, 154, 266))),
    'vit_small_dinov2': _Reference('vit_small_patch14_dinov2', ((3, 224, 224), (4, 196, 140))),
    'vit_small_dinov3': _Reference('vit_small_patch16_dinov3', ((5, 224, 224), (6, 160, 288))),
    'vit_tiny_swiglu_dinov2': _Reference('vit_tiny_swiglu_dinov2', ((7, 70, 70), (8, 56, 98))),
    'vit_tiny_swiglu_dinov3': _Reference('vit_tiny_swiglu_dinov3', ((9, 64, 112),)),
    'vit_tiny_qkvb_dinov3': _Reference('vit_tiny_qkvb_dinov3', ((9, 64, 112),)),
}
_LITE_LAYERS = ('stem', 'b2', 'b4', 'e5', 'b7', 'd10', 'b10', 'b15')
_POSITIONS = {'timm': 'timm', 'meta_reg': 'timm', 'meta_offset': 'meta', 'no_antialias': 'anomalib'}


def positions(folder: Path) -> Iterator[Row]:
  """Compares learnt positions resampled as timm, Meta and anomalib have them."""
  arrays = load(folder, 'vit_pos_embed.npz')
  if not arrays:
    return
  learnt = reference.successor_weight(int(arrays['seed']), 'pos_embed', (1, 1369, 384))
  learnt = jnp.asarray(learnt[..., :int(arrays['channels'])])
  for kind, interpolation in _POSITIONS.items():
    names = [name for name in arrays if name.startswith(f'{kind}_')]
    for name in names:
      yield compare(f'positions {name}', 'Meta' if kind.startswith('meta') else 'timm',
                    vit.resampled(learnt, _grid(name), interpolation)[0], arrays[name], 1e-5,
                    'theirs have coordinates of float32')


def transformers(folder: Path) -> Iterator[Row]:
  """Compares the tokens of small Vision Transformers, block by block, and the parts of their first block."""
  for name in (name for name in _REFERENCES if name not in TINY):
    yield from _transformer(folder, name)


def tiny_transformers(folder: Path) -> Iterator[Row]:
  """Compares those that are tiny, for switches of large networks."""
  for name in TINY:
    yield from _transformer(folder, name)


def efficientnet_lite(folder: Path) -> Iterator[Row]:
  """Compares the maps of EfficientNet-Lite0; its head and classifier are not built here."""
  arrays, record = load(folder, 'efficientnet_lite0.npz'), checkpoints.find(checkpoints.OFFLINE)
  if not arrays or not checkpoints.installed(record):
    return
  blocks = tuple(f'b{i}' for i in range(16))
  layers = tuple(dict.fromkeys((*_LITE_LAYERS, *blocks)))
  yield _checksums(
      'efficientnet_lite0 weights', port.read_state_dict(checkpoints.fetch(record)),
      {'weight_names': arrays['weights_names'], 'weight_crc32': arrays['weights_crc32']})
  network = backbones.create(checkpoints.OFFLINE, layers=layers, precision='float32')
  for case, image in (('a', (21, 224, 224)), ('b', (22, 232, 305))):
    of_case = _of_case(arrays, case)
    images = backbones.normalize(_image(image, of_case), arrays['mean'], arrays['std'])
    maps = jax.jit(network.apply)(network.variables, images)
    for layer in _LITE_LAYERS:
      step, truth = int(of_case[f'{layer}_step']), of_case[f'{layer}_f64']
      found = np.asarray(maps[layer][0, ::step, ::step])
      found = found[..., ::found.shape[-1] // truth.shape[-1]][..., :truth.shape[-1]]
      yield _row(f'efficientnet_lite0 {case} {layer}', [found], [truth], 3e-6)
    means = [np.abs(np.asarray(maps[block], np.float64)).mean() for block in blocks]
    yield _row(f'efficientnet_lite0 {case} mean of all blocks', [means], [of_case['mean_abs_f64']], 3e-6)


CHECKS: tuple[Callable[[Path], Iterator[Row]], ...] = (
    positions, transformers, tiny_transformers, efficientnet_lite)
FILES = ('vit_pos_embed.npz', *(f'{name}.npz' for name in _REFERENCES), 'efficientnet_lite0.npz')


def _transformer(folder, name):
  """Compares one file of arrays."""
  arrays = load(folder, f'{name}.npz')
  if not arrays:
    return
  family, seed = vit.family_of(vit.ARCHITECTURES | TINY), int(arrays['seed'])
  architecture, images = _REFERENCES[name]
  shapes = family.state_dict_shapes(architecture)
  state = {key: reference.successor_weight(seed, key, shape) for key, shape in shapes.items()}
  yield _checksums(f'{name} weights', state, arrays)
  if 'periods_f32' in arrays:
    yield from _rotary(name, arrays)
  variables = port.port(state, family, architecture, source='reference')
  for case, image in zip('ab', images):
    yield from _tokens(f'{name} {case}', family.architectures[architecture], variables,
                       _of_case(arrays, case), image)


def _tokens(label, arch, variables, arrays, image):
  """Compares tokens behind the blocks, all and those of the maps, and the parts of the first block."""
  blocks = [f'blocks.{i}' for i in arrays['blocks']]
  layers = [name + kind for kind in ('.raw', '', '.cls') for name in blocks]
  model = vit.VisionTransformer(
      arch, tuple(layers), arithmetic.Arithmetic(for_cpu=jax.default_backend() == 'cpu'))
  maps, state = jax.jit(functools.partial(
      model.apply, capture_intermediates=True, mutable=['intermediates']))(variables, backbones.normalize(
          _image(image, arrays), checkpoints.IMAGENET_MEAN, checkpoints.IMAGENET_STD))
  found = state['intermediates']
  streams = [found[name.replace('.', '_')]['__call__'][0][0] for name in blocks]
  index = arrays['token_index']
  yield _row(f'{label} embedded', [found['embedded'][0][0][index]], [arrays['embedded_f64']])
  yield _row(f'{label} blocks', [x[index] for x in streams], arrays['raw_f64'])
  means = [np.abs(np.asarray(x, np.float64)).sum() / arrays['tokens'] / arch.width for x in streams]
  yield _row(f'{label} blocks, mean of all tokens', [means], [arrays['raw_mean_abs_f64']])
  patches = index >= arch.prefix
  for kind, suffix in (('raw', '.raw'), ('normed', '')):
    tokens = [maps[name + suffix].reshape(-1, arch.width) for name in blocks]
    yield _row(f'{label} maps, {kind}', [x[index[patches] - arch.prefix] for x in tokens],
               arrays[f'{kind}_f64'][:, patches])
  yield _row(f'{label} class tokens', [maps[f'{name}.cls'].reshape(1, -1) for name in blocks],
             arrays['normed_f64'][:, :1])
  if 'block0_tokens' in arrays:
    block, index = found['blocks_0'], arrays['block0_tokens']
    parts = {
        'norm1': block['norm1']['__call__'], 'qkv': block['attn']['qkv']['__call__'],
        'attn': block['attn']['__call__'], 'norm2': block['norm2']['__call__'],
        'mlp_hidden_act': block['mlp']['hidden'], 'mlp': block['mlp']['__call__'], 'block': block['__call__']}
    for part, (value,) in parts.items():
      yield _row(f'{label} block 0 {part}', [value[0][index]], [arrays[f'block0_{part}_f64']])


def _rotary(name, arrays):
  """Compares the periods and tables of rotary positions."""
  channels = 4 * len(arrays['periods_f32'])
  yield _row(f'{name} periods', [vit.rotary_periods(channels)], [arrays['periods_f32']])
  for key in (key for key in arrays if key.startswith('rope_sin_')):
    size = key.removeprefix('rope_sin_').removesuffix('_f32')
    tables = vit.rotary_tables(*map(int, size.split('x')), channels)
    yield _row(f'{name} rotary tables {size}', tables,
               [arrays[f'rope_{kind}_{size}_f32'] for kind in ('sin', 'cos')])


def _checksums(quantity, state, arrays):
  """Counts the arrays that differ from the stored checksums, or that the names lack."""
  names, stored = arrays['weight_names'].tolist(), arrays['weight_crc32'].tolist()
  different = len(state.keys() ^ set(names)) + sum(
      zlib.crc32(np.ascontiguousarray(state[name]).tobytes()) != crc
      for name, crc in zip(names, stored) if name in state)
  return Row(quantity, 'recipe', different, different / len(names), 0, 'names and bits')


def _row(quantity, found, truth, tolerance=2e-6):
  """Compares several arrays, each by the norm of the difference over the norm; the worst counts."""
  why = 'float32 sums, L2 of difference / L2'
  found, truth = ([np.asarray(x, np.float64) for x in arrays] for arrays in (found, truth))
  if [x.shape for x in found] != [x.shape for x in truth]:
    return Row(f'{quantity}: shapes', 'timm', np.inf, np.inf, tolerance, why)
  absolute = max(np.abs(x - y).max() for x, y in zip(found, truth))
  relative = max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, truth))
  return Row(quantity, 'timm', float(absolute), float(relative), tolerance, why)


def _image(image, arrays):
  """Draws the image of a case as a batch of one, and makes sure that it is the stored one."""
  pixels = reference.successor_image(*image)
  if zlib.crc32(pixels.tobytes()) != arrays['image_crc32']:
    raise ValueError(f'The image {image} differs from that of the reference: expected the same pixels.')
  return pixels[None]


def _grid(name):
  """Reads the grid at the end of a name: 'timm_16x18' -> (16, 18)."""
  return tuple(map(int, name.rpartition('_')[2].split('x')))


def _of_case(arrays, case):
  return {key.removeprefix(f'{case}_'): value for key, value in arrays.items() if key.startswith(f'{case}_')}
