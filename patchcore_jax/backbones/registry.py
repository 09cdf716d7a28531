"""Backbones by name: the table of families, and factories of a user's own."""

import dataclasses
import functools
import importlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import logging

from patchcore_jax.backbones import (
    checkpoints,
    densenet,
    efficientnet_lite,
    local_colour,
    port,
    resnet,
    simulation,
    vit,
)
from patchcore_jax.backbones.backbone import Backbone
from patchcore_jax.backbones.family import Family

FAMILIES = (
    resnet.FAMILY,
    densenet.FAMILY,
    efficientnet_lite.FAMILY,
    vit.FAMILY,
)
RANDOM = 'random'
AUTO = 'auto'


def create(
    name: str, *, weights: str = '', layers: Sequence[str] = (), seed: int = 0,
    precision: str = AUTO,
) -> Backbone:
  """Creates the backbone called `name`.

  Args:
    name: an architecture with a checkpoint tag ('wide_resnet50_2.tv_in1k'), an architecture
      alone (with `weights` then given), 'module:factory', a function without arguments that
      returns a `Backbone`, or 'auto' for what `best_available` names, which is never downloaded.
    weights: '' for the checkpoint named by the tag (downloaded once, then cached), the path of a
      local .safetensors or .pth file, or 'random' (for tests; said loudly).
    layers: layers to return; () for the backbone's own choice.
    seed: seed of random weights.
    precision: precision of the products and convolutions, one of the `precisions` of the network's family,
      such as 'float32', 'tensorfloat32' or 'bfloat16' (docs/precision.md); or 'auto', see
      `resolve_precision`.

  Returns:
    A `Backbone` whose `layers` are those asked for.

  Raises:
    ValueError: unknown name, tag or precision, a layer that the backbone lacks, weights that do not
      fit; weights or a precision for a factory; weights for 'auto'.
    checkpoints.DownloadError: the checkpoint is not on this machine and cannot be fetched.
  """
  if name == AUTO:
    if weights:
      raise ValueError(
          f"backbone.weights={weights!r} has no effect on 'auto', which chooses them. Name the "
          'architecture of the file as backbone.name.')
    name = best_available()
  if ':' not in name:
    return _from_family(name, weights, tuple(layers), seed, resolve_precision(precision, name))
  if weights:
    raise ValueError(
        f'backbone.weights={weights!r} has no effect on {name!r}: a factory brings its own '
        'weights. Leave backbone.weights empty.')
  if precision not in (AUTO, 'float32'):
    raise ValueError(
        f'backbone.precision={precision!r} has no effect on {name!r}: a factory brings its own '
        "arithmetic. Leave backbone.precision at 'auto'.")
  return _from_factory(name, tuple(layers))


def best_available() -> str:
  """Names the best checkpoint that this machine has; the weakest is said loudly.

  It is what `checkpoints.best_installed` names without a word. No network is asked.
  """
  name = checkpoints.best_installed()
  if advice := checkpoints.better_than(name):
    logging.warning(advice)
  return name


def find_family(name: str) -> Family:
  """Finds the family of an architecture, with a checkpoint tag or without.

  Raises:
    ValueError: no family has it; the message lists all architectures.

  >>> find_family('wide_resnet50_2.tv_in1k') is resnet.FAMILY
  True
  """
  architecture = name.partition('.')[0]
  for family in FAMILIES:
    if architecture in family.architectures:
      return family
  known = [architecture for family in FAMILIES for architecture in family.architectures]
  raise ValueError(
      f'Unknown backbone {name!r}. There are {", ".join(known)}, each with a '
      "checkpoint tag such as '.tv_in1k'; a network of your own is 'module:factory'.")


def resolve_precision(precision: str, name: str, platform: str = '') -> str:
  """Resolves 'auto' to the precision that it stands for; any other is returned as it is.

  On an accelerator that is the fastest of those that change no result by more than docs/precision.md says;
  on a CPU, and for a 'module:factory', which brings its own arithmetic, float32.

  Args:
    precision: `backbone.precision`.
    name: name of the backbone.
    platform: 'cpu', 'gpu' or 'tpu'; '' for that of this process.

  Raises:
    ValueError: an unknown name, or a precision that the network's family lacks.

  >>> [resolve_precision('auto', 'resnet50.tv_in1k', p) for p in ('cpu', 'gpu')]
  ['float32', 'tensorfloat32']
  """
  if ':' in name:
    return 'float32' if precision == AUTO else precision
  family = find_family(name)
  if precision == AUTO:
    return family.auto_precisions.get(platform or jax.default_backend(), 'float32')
  if precision not in family.precisions:
    raise ValueError(
        f"backbone.precision={precision!r}: expected 'auto', {', '.join(map(repr, family.precisions))}.")
  return precision


def input_multiple(backbone: Backbone) -> int:
  """Returns what the sides of a network's images must be multiples of; 1 where it is not known."""
  name = backbone.source[0] if backbone.source else ':'
  return 1 if ':' in name else find_family(name).multiple(name.partition('.')[0])


def _from_family(name, weights, layers, seed, precision) -> Backbone:
  """Creates a backbone of one of the families."""
  family = find_family(name)
  architecture, _, tag = name.partition('.')
  there = (*family.layers(architecture), local_colour.NAME)
  for layer in layers:
    if layer not in there:
      raise ValueError(f'{name} has no layer {layer!r}. It has: {", ".join(there)}.')
  layers = layers or family.default_layers(architecture)
  learnt = tuple(layer for layer in layers if layer != local_colour.NAME)
  if not learnt:
    raise ValueError(f'backbone.layers={layers}: expected a layer of the network too.')

  def network(precision):
    apply = family.build(architecture, learnt, precision)
    multiple = family.multiple(architecture)
    return apply if multiple == 1 else _with_size_check(apply, architecture, multiple)

  apply, elsewhere = network(precision), None
  if precision == 'tensorfloat32' and jax.default_backend() == 'cpu':
    elsewhere = simulation.on_gpu(apply)
  elif precision != 'float32':
    elsewhere = network('float32')
  mean, std = checkpoints.IMAGENET_MEAN, checkpoints.IMAGENET_STD
  if weights == RANDOM:
    logging.warning(
        'RANDOM WEIGHTS: %s has not been trained. Its results say nothing about PatchCore.', name)
    variables, label = family.init(architecture, seed), f'{architecture}.{RANDOM}'
  else:
    if tag or not weights:
      record = checkpoints.find(name)
      mean, std = record.mean, record.std
    path = weights or checkpoints.fetch(record)
    variables = port.port(port.read_state_dict(path), family, architecture, source=path)
    label = name
  if learnt != layers:
    apply = _with_colour(apply, mean, std)
    elsewhere = elsewhere and _with_colour(elsewhere, mean, std)
  return Backbone(
      apply, family.truncate(variables, learnt), layers, mean, std, label, precision, (name, weights, seed),
      elsewhere)


# Both are cached, because jit recompiles for every new function object.
@functools.cache
def _with_size_check(apply, architecture, multiple):
  """Wraps `apply` to refuse images whose sides are no multiples of `multiple`; shapes are seen in tracing."""

  def checked(variables, images):
    size = images.shape[1:3]
    if any(side % multiple for side in size):
      fitting = tuple(max(side // multiple, 1) * multiple for side in size)
      raise ValueError(
          f'{architecture} takes images whose height and width are multiples of {multiple} pixels; these are '
          f'{size[0]} x {size[1]}. Set preprocess.crop to such a size, as {fitting}.')
    return apply(variables, images)

  return checked


@functools.cache
def _with_colour(apply, mean, std):
  """Wraps `apply` to give the layer of local colour too."""

  def both(variables, images):
    pixels = images * jnp.asarray(std, jnp.float32) + jnp.asarray(mean, jnp.float32)
    return {**apply(variables, images), local_colour.NAME: local_colour.local_colour(pixels)}

  return both


def _from_factory(name, layers) -> Backbone:
  """Creates a backbone by a user's factory, and checks what that returns."""
  module_name, _, attribute = name.partition(':')
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as e:
    # A module missing inside the user's own module is another mistake, with another remedy.
    if not f'{module_name}.'.startswith(f'{e.name}.'):
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
  layers = layers or tuple(backbone.layers)
  # This computes shapes, and no values. 224 px is a size that every known network takes.
  maps = jax.eval_shape(
      backbone.apply, backbone.variables, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  missing = [layer for layer in layers if layer not in maps]
  if missing:
    raise ValueError(f'{name} has no layer {missing[0]!r}. It has: {", ".join(sorted(maps))}.')
  elsewhere = backbone.elsewhere
  if jax.default_backend() != 'cpu' and elsewhere is None:
    # It leaves the precision to JAX, which takes another for each kind of device.
    elsewhere = simulation.in_highest_precision(backbone.apply)
  return dataclasses.replace(
      backbone, name=name, layers=layers, source=(name, '', 0), elsewhere=elsewhere)
