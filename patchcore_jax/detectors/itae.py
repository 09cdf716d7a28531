"""ITAE (Ye et al., "Attribute Restoration Framework for Anomaly Detection", arXiv 1911.10676; in earlier
versions "Inverse-Transform AutoEncoder for Anomaly Detection"), after a public implementation.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax import extras
from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, computed, descent
from patchcore_jax.detectors.trained_settings import ITAE
from patchcore_jax.learned import starts, transforms
from patchcore_jax.learned.layers import Conv, Norm, max_pool

TURNS = 4  # quarter turns


class UNet(nn.Module):
  """Restores images: [b, s, s, 1] -> [b, s, s, 3] in [-1, 1].

  Attributes:
    width: channels of the first of five levels.
  """

  width: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x, skips = _Twice(self.width)(x, train), []
    for times in (2, 4, 8, 8):
      skips.append(x)
      x = _Twice(times * self.width)(max_pool(x), train)
    for times, skip in zip((4, 2, 1, 1), reversed(skips), strict=True):
      x = _Twice(times * self.width)(jnp.concatenate([skip, doubled(x)], axis=-1), train)
    return jnp.tanh(Conv(3, use_bias=False)(x))


class _Twice(nn.Module):
  """Two 3x3 convolutions, each with a batch norm and ReLU."""

  features: int

  @nn.compact
  def __call__(self, x, train):
    for _ in range(2):
      x = nn.relu(Norm()(Conv(self.features)(x), train))
    return x


def doubled(x: jax.Array) -> jax.Array:
  """Doubles the size of maps [b, h, w, c] bilinearly, the middles of corner pixels staying in the corners.

  >>> doubled(jnp.arange(2.0).reshape(1, 1, 2, 1)).shape, [
  ...     round(float(v), 3) for v in doubled(jnp.arange(2.0).reshape(1, 1, 2, 1))[0, 0, :, 0]]
  ((1, 2, 4, 1), [0.0, 0.333, 0.667, 1.0])
  """
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  down, across = (jnp.asarray(_to_double(side)) for side in x.shape[1:3])
  return product('xw,bywc->byxc', across, product('yh,bhwc->bywc', down, x))


def _to_double(length):
  """Computes the matrix [2 length, length] that doubles an axis."""
  places = np.arange(2 * length) * (length - 1) / (2 * length - 1)
  return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(length))).astype(np.float32)


def erased(images: jax.Array, turns: jax.Array) -> jax.Array:
  """Takes colour and orientation from images: [b, s, s, 3], quarter turns [b] -> [b, s, s, 1]."""
  gray = images.mean(axis=-1, keepdims=True)
  return jax.vmap(lambda image, k: jnp.stack([jnp.rot90(image, i) for i in range(TURNS)])[k])(gray, turns)


@functools.lru_cache(maxsize=16)
def method(detector: ITAE) -> Method:
  """Makes the method: what is trained, and how it scores."""
  network = UNet(detector.width)

  def prepared(images):
    return 2 * transforms.scaled(images, detector.standardise) - 1

  def loss(variables, images, key, train):
    mirroring, turning = jax.random.split(key)
    x = prepared(images)
    if train:
      x = transforms.augmented(x, mirroring, flip=detector.flip)
    turns = jax.random.randint(turning, (len(x),), 0, TURNS)
    restored, changes = network.apply(variables, erased(x, turns), train, mutable=['batch_stats'])
    return jnp.square(restored - x).mean(), changes if train else {}

  def errors(variables, images):
    """Computes the mean error over channels at every pixel, for each turn: [b, 4, s, s]."""
    x = prepared(images)
    turned = jnp.concatenate([erased(x, jnp.full(len(x), k)) for k in range(TURNS)])
    variables = {name: variables[name] for name in ('params', 'batch_stats')}
    restored = network.apply(variables, turned, False).reshape(TURNS, *x.shape)
    return jnp.abs(restored - x).mean(axis=-1).swapaxes(0, 1)

  def mean_errors(variables, images):
    return errors(variables, images).mean(axis=(2, 3))

  def finish(variables, images, held):
    found = computed(mean_errors, variables, held if len(held) else images)
    return {'errors': found.mean(axis=0)}

  def score(variables, images):
    maps = (errors(variables, images) / variables['finished']['errors'][:, None, None]).mean(axis=1)
    return Scores(maps.mean(axis=(1, 2)), maps)

  def init(key):
    return starts.variables(network, key, jnp.zeros((1, detector.size, detector.size, 1)), False)

  def optimizer():
    if detector.optimizer == 'adam':
      return adam(detector.learning_rate)
    with extras.needed_for('Training a network'):
      import optax
    tenth = max(1, detector.steps // 10)
    return optax.sgd(optax.exponential_decay(detector.learning_rate, tenth, 0.5, staircase=True))

  return Method(*descent(init, loss, optimizer), score, finish)
