"""Frozen networks: images -> {layer name: feature map}.

`create` finds one by name; `extract` runs it. A network of your own is any `Backbone` record, for
example from a function `factory()` in `module.py`, named as 'module:factory'.
"""

import dataclasses
import functools
import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from patchcore_jax.backbones import checkpoints, local_colour, port, resnet, simulation

RANDOM = 'random'
AUTO = 'auto'


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A frozen feature extractor.

  Attributes:
    apply: pure function (variables, images [b, h, w, 3] float32) -> {layer: [b, h', w', c] float32}.
    variables: pytree of arrays.
    layers: names of the layers used when none are asked for, shallow to deep.
    mean, std: three floats each; images reach `apply` as (rgb / 255 - mean) / std.
    name: what made it, for logs and for the description of a memory bank.
    precision: of its products, also for the description.
    source: the arguments name, weights and seed of `create` that make it again; None for a network that
      `create` did not make.
    elsewhere: `apply` as devices of another kind than this one compute it, or None where that is no other:
      see `computed_elsewhere`.
  """

  apply: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
  variables: Any
  layers: tuple[str, ...]
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  name: str = ''
  precision: str = 'float32'
  source: tuple[str, str, int] | None = None
  elsewhere: Callable[[Any, jax.Array], Mapping[str, jax.Array]] | None = None


def create(
    name: str, *, weights: str = '', layers: Sequence[str] = (), seed: int = 0,
    precision: str = AUTO,
) -> Backbone:
  """The backbone called `name`.

  Args:
    name: an architecture with a checkpoint tag ('wide_resnet50_2.tv_in1k'), an architecture
      alone (with `weights` then given), 'module:factory', a function without arguments that
      returns a `Backbone`, or 'auto' for what `best_available` names.
    weights: '' for the checkpoint named by the tag (downloaded once, then cached), the path of a
      local .safetensors or .pth file, or 'random' (for tests; said loudly).
    layers: layers to return; () for the backbone's own choice.
    seed: of random weights.
    precision: of the products and convolutions, 'float32', 'tensorfloat32' or 'bfloat16', as in
      `resnet.apply_fn`; or 'auto', see `resolve_precision`.

  Returns:
    A `Backbone` whose `layers` are those asked for.

  Raises:
    ValueError: unknown name, tag or precision, a layer that the backbone lacks, weights that do not
      fit; weights or a precision for a factory; weights for 'auto'.
    checkpoints.DownloadError: the checkpoint is neither cached nor can be fetched.
  """
  if name == AUTO:
    if weights:
      raise ValueError(
          f"backbone.weights={weights!r} has no effect on 'auto', which chooses them. Name the "
          'architecture of the file as backbone.name.')
    name = best_available()
  if ':' in name:
    if weights:
      raise ValueError(
          f'backbone.weights={weights!r} has no effect on {name!r}: a factory brings its own '
          'weights. Leave backbone.weights empty.')
    if precision not in (AUTO, 'float32'):
      raise ValueError(
          f'backbone.precision={precision!r} has no effect on {name!r}: a factory brings its own '
          "arithmetic. Leave backbone.precision at 'auto'.")
    backbone = _from_factory(name)
  else:
    backbone = _from_family(name, weights, layers, seed, resolve_precision(precision, name))
  return dataclasses.replace(_with_layers(backbone, tuple(layers)), source=(name, weights, seed))


def best_available() -> str:
  """The name of the better of two checkpoints that this machine can have; the weaker is said loudly.

  `checkpoints.PREFERRED`, with ImageNet weights, where they are cached or can be downloaded; else
  `checkpoints.BUILT_IN`, which comes with the package. Looking for the first may download it.
  """
  try:
    checkpoints.fetch(checkpoints.find(checkpoints.PREFERRED))
  except checkpoints.DownloadError as e:
    logging.warning(
        'USING THE BUILT-IN BACKBONE %s, trained on drawn images only. The better choice, %s, could not '
        'be had: %s', checkpoints.BUILT_IN, checkpoints.PREFERRED, e)
    return checkpoints.BUILT_IN
  return checkpoints.PREFERRED


def resolve_precision(precision: str, name: str, platform: str = '') -> str:
  """The precision that 'auto' stands for; any other is returned as it is.

  On an accelerator that is the fastest of those that change no result by more than docs/precision.md says;
  on a CPU, and for a 'module:factory', which brings its own arithmetic, float32.

  Args:
    precision: `backbone.precision`.
    name: of the backbone.
    platform: 'cpu', 'gpu' or 'tpu'; '' for that of this process.

  Raises:
    ValueError: another precision.

  >>> [resolve_precision('auto', 'resnet50.tv_in1k', p) for p in ('cpu', 'gpu')]
  ['float32', 'tensorfloat32']
  """
  if precision != AUTO:
    if precision not in resnet.PRECISIONS:
      raise ValueError(
          f"backbone.precision={precision!r}: expected 'auto', {', '.join(map(repr, resnet.PRECISIONS))}.")
    return precision
  if ':' in name:
    return 'float32'
  return resnet.AUTO_PRECISIONS.get(platform or jax.default_backend(), 'float32')


def computed_elsewhere(backbone: Backbone) -> Backbone:
  """The network as other kinds of devices compute it: for what a bank that is made here must allow for there.

  A GPU's or TPU's own arithmetic is compared with float32, and on a CPU tensorfloat32, which it computes as
  float32, with what a GPU makes of it. In float32 all devices compute the same, and on a CPU nothing is said
  of a network from a factory: then this is the backbone itself.
  """
  return dataclasses.replace(backbone, apply=backbone.elsewhere or backbone.apply)


@functools.partial(jax.tree_util.register_dataclass, data_fields=['maps'], meta_fields=['image_size'])
@dataclasses.dataclass(frozen=True)
class FeatureMaps:
  """What a network made of a batch of images, in their place: see `without_network`.

  Attributes:
    maps: {layer: [b, h', w', c] float32}.
    image_size: (height, width) of the images.
  """

  maps: dict[str, Any]
  image_size: tuple[int, int]

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """That of the images."""
    return len(self), *self.image_size, 3

  def __len__(self) -> int:
    return len(next(iter(self.maps.values())))


def without_network(backbone: Backbone) -> Backbone:
  """The backbone for batches whose images are already `FeatureMaps`; for experiments that share them."""
  return dataclasses.replace(backbone, apply=_maps_as_they_are)


def _maps_as_they_are(variables, features):
  return features.maps


def normalize(
    images: jax.Array | FeatureMaps, mean: Sequence[float], std: Sequence[float]
) -> jax.Array | FeatureMaps:
  """uint8 [..., 3] -> float32 (rgb / 255 - mean) / std, as PyTorch's ToTensor and Normalize do.

  `FeatureMaps` stay as they are.

  >>> normalize(jnp.full((1, 1, 3), 255, jnp.uint8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.25))
  Array([[[1., 1., 2.]]], dtype=float32)
  """
  if isinstance(images, FeatureMaps):
    return images
  scaled = images.astype(jnp.float32) / 255
  return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def fingerprint(variables: Any) -> str:
  """16 hexadecimal digits that change with any weight, to tell checkpoints of one name apart."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    leaf = np.asarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}'.encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return digest.hexdigest()[:16]


def _from_family(name, weights, layers, seed, precision) -> Backbone:
  architecture, _, tag = name.partition('.')
  if architecture not in resnet.ARCHITECTURES:
    raise ValueError(
        f'Unknown backbone {name!r}. There are {", ".join(resnet.ARCHITECTURES)}, each with a '
        "checkpoint tag such as '.tv_in1k'; a network of your own is 'module:factory'.")
  there = (*resnet.layers_of(architecture), local_colour.NAME)
  for layer in layers:
    if layer not in there:
      raise ValueError(f'{name} has no layer {layer!r}. It has: {", ".join(there)}.')
  layers = tuple(layers) or resnet.ARCHITECTURES[architecture].layers
  learnt = tuple(layer for layer in layers if layer != local_colour.NAME)
  if not learnt:
    raise ValueError(f'backbone.layers={layers}: expected a layer of the network too.')
  apply = resnet.apply_fn(architecture, learnt, precision)
  elsewhere = None
  if precision == 'tensorfloat32' and jax.default_backend() == 'cpu':
    elsewhere = simulation.on_gpu(apply)
  elif precision != 'float32':
    elsewhere = resnet.apply_fn(architecture, learnt, 'float32')
  mean, std = checkpoints.IMAGENET_MEAN, checkpoints.IMAGENET_STD
  if weights == RANDOM:
    logging.warning(
        'RANDOM WEIGHTS: %s has not been trained. Its results say nothing about PatchCore.', name)
    variables, label = resnet.init(architecture, seed), f'{architecture}.{RANDOM}'
  else:
    if tag or not weights:
      record = checkpoints.find(name)
      mean, std = record.mean, record.std
    path = weights or checkpoints.fetch(record)
    variables = port.port(port.read_state_dict(path), resnet.init_shapes(architecture), source=path)
    label = name
  if learnt != layers:
    apply = _with_colour(apply, mean, std)
    elsewhere = elsewhere and _with_colour(elsewhere, mean, std)
  return Backbone(
      apply, resnet.truncate(variables, learnt), layers, mean, std, label, precision, elsewhere=elsewhere)


@functools.cache
def _with_colour(apply, mean, std):
  """Cached, because jit recompiles for every new function object."""

  def both(variables, images):
    pixels = images * jnp.asarray(std, jnp.float32) + jnp.asarray(mean, jnp.float32)
    return {**apply(variables, images), local_colour.NAME: local_colour.local_colour(pixels)}

  return both


def _from_factory(name) -> Backbone:
  module_name, _, attribute = name.partition(':')
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as e:
    # A module missing inside the user's own module is another mistake, with another remedy.
    if e.name != module_name.split('.')[0] and e.name != module_name:
      raise
    raise ValueError(
        f'Backbone {name!r}: no module {module_name!r}. Put its folder on PYTHONPATH.') from e
  factory = getattr(module, attribute, None)
  if not callable(factory):
    functions = sorted(
        k for k, v in vars(module).items() if callable(v) and not k.startswith('_'))
    raise ValueError(
        f'Backbone {name!r}: {module_name} has no function {attribute!r}. It has: '
        f'{", ".join(functions)}.')
  backbone = factory()
  if not isinstance(backbone, Backbone):
    raise ValueError(
        f'Backbone {name!r}: the factory returned {type(backbone).__name__}, expected a '
        'patchcore_jax.backbones.Backbone.')
  if jax.default_backend() != 'cpu' and backbone.elsewhere is None:
    backbone = dataclasses.replace(backbone, elsewhere=_in_highest_precision(backbone.apply))
  return dataclasses.replace(backbone, name=name)


@functools.cache
def _in_highest_precision(apply):
  """For a network that leaves the precision to JAX, which takes another for each kind of device."""

  def highest(variables, images):
    with jax.default_matmul_precision('highest'):
      return apply(variables, images)

  return highest


def _with_layers(backbone: Backbone, layers: tuple[str, ...]) -> Backbone:
  layers = layers or tuple(backbone.layers)
  # Shapes only: nothing is computed. 224 px is a size that every known network takes.
  maps = jax.eval_shape(
      backbone.apply, backbone.variables, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  missing = [layer for layer in layers if layer not in maps]
  if missing:
    raise ValueError(
        f'{backbone.name} has no layer {missing[0]!r}. It has: {", ".join(sorted(maps))}.')
  return dataclasses.replace(backbone, layers=layers)
