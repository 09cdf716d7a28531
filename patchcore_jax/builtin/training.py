"""One step of training, what it changes, and how that is kept between runs.

A step is a pure function of (state, images, seed); the images of a step are one of (seed, step), see
`pool.Pool`. So a run is repeated by its seed, and goes on from a checkpoint as if it had not stopped.
Convolutions and products have the precision that is the default on a device, which is faster: they decide
about weights, not about anybody's scores.
"""

import dataclasses
import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patchcore_jax import atomic_files, extras
from patchcore_jax.backbones import checkpoints, resnet
from patchcore_jax.banks import model, store
from patchcore_jax.builtin import network, objectives
from patchcore_jax.builtin import views as views_lib

_AXIS = 'device'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a network is trained.

  Attributes:
    architecture: one of `resnet.ARCHITECTURES`, with blocks of two convolutions.
    objective: one of `objectives.OBJECTIVES`, with its own arguments in `objective_args`.
    layers: the layers that have a head and a loss; the losses are averaged.
    gray_free: the first convolution cannot see how bright an image is.
    head_width, head_features: sizes of the heads' hidden layer and of their output.
    views: how the views of an image are taken.
    batch_size: images of a step, over all devices.
    steps: number of steps of the whole schedule.
    warmup: steps until the learning rate is reached, linearly; then it falls to 0 by a cosine.
    learning_rate, weight_decay: AdamW's.
  """

  architecture: str
  objective: str = 'info_nce'
  objective_args: tuple[tuple[str, float], ...] = ()
  layers: tuple[str, ...] = ('layer2', 'layer3')
  gray_free: bool = False
  head_width: int = 256
  head_features: int = 64
  views: views_lib.ViewSpec = views_lib.ViewSpec()
  batch_size: int = 32
  steps: int = 1000
  warmup: int = 100
  learning_rate: float = 2e-3
  weight_decay: float = 1e-4

  def __post_init__(self):
    if self.architecture not in resnet.ARCHITECTURES or resnet.ARCHITECTURES[self.architecture].bottleneck:
      known = [n for n, a in resnet.ARCHITECTURES.items() if not a.bottleneck]
      raise ValueError(f'architecture={self.architecture!r}: expected one of {", ".join(known)}.')
    if self.objective not in objectives.OBJECTIVES:
      raise ValueError(
          f'objective={self.objective!r}: expected one of {", ".join(objectives.OBJECTIVES)}.')
    there = resnet.layers_of(self.architecture)[1:]
    if not self.layers or not set(self.layers) <= set(there):
      raise ValueError(f'layers={self.layers}: expected some of {", ".join(there)}.')
    if self.batch_size < 2 or not 0 <= self.warmup < self.steps:
      raise ValueError(
          f'batch_size={self.batch_size}, warmup={self.warmup}, steps={self.steps}: expected at least 2 '
          'images and 0 <= warmup < steps.')

  @property
  def optimizer(self) -> Any:
    """optax's transformation of gradients; needs the extra [train]."""
    with extras.needed_for('Training a network'):
      import optax
    schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup, self.steps)

    def kernels(params):  # neither biases nor batch norms decay
      return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.adamw(schedule, weight_decay=self.weight_decay, mask=kernels)


class _Model:
  """Network and heads of a recipe, as pure functions."""

  def __init__(self, recipe: Recipe):
    self.trunk = network.ResNet(
        resnet.ARCHITECTURES[recipe.architecture], recipe.layers, recipe.gray_free)
    self.head = network.Head(recipe.head_width, recipe.head_features)
    self.mean, self.std = (
        jnp.asarray(x, jnp.float32) for x in (checkpoints.IMAGENET_MEAN, checkpoints.IMAGENET_STD))


def init(recipe: Recipe, seed: int) -> dict[str, Any]:
  """Initialises the state before the first step: parameters, statistics, the optimiser's state, the step."""
  return jax.jit(functools.partial(_init, recipe))(jax.random.key(seed))


def _init(recipe, key):
  model, keys = _Model(recipe), jax.random.split(key, 1 + len(recipe.layers))
  maps, variables = model.trunk.init_with_output(keys[0], jnp.zeros((1, 64, 64, 3)), train=False)
  variables = {'trunk': variables}
  for key, layer in zip(keys[1:], recipe.layers):
    variables[layer] = model.head.init(key, maps[layer], train=False)
  params, stats = (
      {k: v[kind] for k, v in variables.items()} for kind in ('params', 'batch_stats'))
  return {'params': params, 'stats': stats, 'optimizer': recipe.optimizer.init(params),
          'step': jnp.zeros((), jnp.int32)}


@functools.cache
def make_step(
    recipe: Recipe, seed: int
) -> Callable[[dict[str, Any], np.ndarray], tuple[dict[str, Any], dict[str, jax.Array]]]:
  """Compiles a step: (state, images [batch_size, h, w, 3] uint8) -> (state, what to report).

  Images are split over the local devices, everything else is on each; batch norm and the objective are
  those of the whole batch, whatever the number of devices. Reported are 'loss' and 'loss_<layer>'.

  Raises:
    ValueError: the batch cannot be split.
  """
  devices = jax.local_devices()
  if recipe.batch_size % len(devices):
    raise ValueError(
        f'batch_size={recipe.batch_size}: expected a multiple of the {len(devices)} devices.')
  mesh = Mesh(np.array(devices), (_AXIS,))
  everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(_AXIS))
  compiled = jax.jit(
      functools.partial(_step, recipe, seed), in_shardings=(everywhere, split),
      out_shardings=everywhere, donate_argnums=0)
  return lambda state, images: compiled(
      jax.device_put(state, everywhere), jax.device_put(images, split))


def _step(recipe, seed, state, images):
  key = jax.random.fold_in(jax.random.key(seed), state['step'])
  taken = views_lib.draw(key, images, recipe.views)
  (loss, (stats, report)), gradients = jax.value_and_grad(
      functools.partial(_loss, recipe), has_aux=True)(
          state['params'], state['stats'], taken)
  import optax

  updates, optimizer = recipe.optimizer.update(gradients, state['optimizer'], state['params'])
  return {'params': optax.apply_updates(state['params'], updates), 'stats': stats,
          'optimizer': optimizer, 'step': state['step'] + 1}, {'loss': loss, **report}


def _loss(recipe, params, stats, taken):
  """Computes the loss of the views `taken`: (loss, (new statistics, what to report))."""
  model = _Model(recipe)
  objective = functools.partial(
      objectives.OBJECTIVES[recipe.objective], **dict(recipe.objective_args))

  def run(module, name, x):
    variables = {'params': params[name], 'batch_stats': stats[name]}
    return module.apply(variables, x, train=True, mutable=['batch_stats'])

  images = (taken.views.reshape(-1, *taken.views.shape[2:]) - model.mean) / model.std
  maps, changed = run(model.trunk, 'trunk', images)
  new_stats, losses = {'trunk': changed['batch_stats']}, {}
  points = taken.points.reshape(-1, *taken.points.shape[2:])
  weights = taken.visible.reshape(-1).astype(jnp.float32)
  for layer in recipe.layers:
    features = views_lib.at_points(maps[layer], points, network.STRIDES[layer])
    projected, changed = run(model.head, layer, features.reshape(-1, features.shape[-1]))
    new_stats[layer] = changed['batch_stats']
    first, second = projected.reshape(2, len(weights), -1)
    losses[f'loss_{layer}'] = objective(first, second, weights)
  return sum(losses.values()) / len(losses), (new_stats, losses)


def export(path: str | os.PathLike, recipe: Recipe, state: Mapping[str, Any], images: np.ndarray) -> None:
  """Writes the network, without its heads, as a checkpoint of the family in half precision.

  Features of each layer are brought to a mean squared length of 1 over `images` [n, h, w, 3] uint8, so
  that layers which are joined count alike, however many channels they have.
  """
  trunk = {'params': state['params']['trunk'], 'batch_stats': state['stats']['trunk']}
  trunk = jax.device_get(trunk)
  layers = resnet.layers_of(recipe.architecture)[1:]
  whole = network.ResNet(resnet.ARCHITECTURES[recipe.architecture], layers, recipe.gray_free)
  model = _Model(recipe)
  maps = _evaluated(whole)(
      trunk, (images.astype(np.float32) / 255 - model.mean) / model.std)
  scales = {
      layer: float(1 / jnp.sqrt(jnp.square(values).sum(-1).mean())) for layer, values in maps.items()}
  named = network.rescaled(network.state_dict(trunk, gray_free=recipe.gray_free), scales)
  with atomic_files.written(path) as aside:
    safetensors.numpy.save_file({k: v.astype(np.float16) for k, v in named.items()}, aside)


@functools.cache
def _evaluated(trunk):
  """Compiles a network as it is used after training."""
  return jax.jit(functools.partial(trunk.apply, train=False))


def save(
    folder: str | os.PathLike, state: Mapping[str, Any], description: Mapping[str, Any], keep: int = 2
) -> None:
  """Writes the state to `folder`/<step>, whole or not at all, and removes all but the last `keep`."""
  folder = Path(folder)
  path = folder / str(int(state['step']))
  if path.exists():
    return
  store.save_arrays(path, _named(jax.device_get(state)), description)
  for step in saved_steps(folder)[:-keep]:
    shutil.rmtree(folder / str(step))


def saved_steps(folder: str | os.PathLike) -> list[int]:
  """Lists the steps of which the state was saved, in their order."""
  folder = Path(folder)
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if re.fullmatch(r'\d+', name))


def restore(
    folder: str | os.PathLike, like: Mapping[str, Any], description: Mapping[str, Any]
) -> dict[str, Any]:
  """Restores the last state that `save` wrote; returns `like` (as from `init`) where there is none.

  Raises:
    BankError: the state was saved with other settings than `description` says, or is damaged.
  """
  steps = saved_steps(folder)
  if not steps:
    return dict(like)
  path = Path(folder) / str(steps[-1])
  arrays, _ = store.restore_arrays(path, lambda values: model.check(values, description, path))
  return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _named(like)])


def _named(state):
  """Names the arrays of a state by their path in it."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf) for path, leaf in leaves}
