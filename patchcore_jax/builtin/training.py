"""Training the backbone: what it starts from, what one step does, and what is kept in the end."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from patchcore_jax import atomic_files, extras
from patchcore_jax.backbones import checkpoints, resnet
from patchcore_jax.builtin import network, objectives
from patchcore_jax.builtin import views as views_lib
from patchcore_jax.learned import loop


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


def _init(recipe, key):
  """Makes the state before the first step: parameters, statistics, the optimiser's state."""
  model, keys = _Model(recipe), jax.random.split(key, 1 + len(recipe.layers))
  maps, variables = model.trunk.init_with_output(keys[0], jnp.zeros((1, 64, 64, 3)), train=False)
  variables = {'trunk': variables}
  for key, layer in zip(keys[1:], recipe.layers):
    variables[layer] = model.head.init(key, maps[layer], train=False)
  params, stats = (
      {k: v[kind] for k, v in variables.items()} for kind in ('params', 'batch_stats'))
  return {'params': params, 'stats': stats, 'optimizer': recipe.optimizer.init(params)}


@functools.cache
def task(recipe: Recipe) -> loop.Task:
  """Makes what the training loop takes; its steps report 'loss' and 'loss_<layer>'."""
  # Compiled, as its draws are those that the weights in the package began with.
  return loop.Task(jax.jit(functools.partial(_init, recipe)), functools.partial(_step, recipe))


def _step(recipe, state, images, key):
  """Computes the gradients of one batch, and follows them."""
  taken = views_lib.draw(key, images, recipe.views)
  (loss, (stats, report)), gradients = jax.value_and_grad(
      functools.partial(_loss, recipe), has_aux=True)(
          state['params'], state['stats'], taken)
  import optax

  updates, optimizer = recipe.optimizer.update(gradients, state['optimizer'], state['params'])
  return {'params': optax.apply_updates(state['params'], updates), 'stats': stats,
          'optimizer': optimizer}, {'loss': loss, **report}


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
