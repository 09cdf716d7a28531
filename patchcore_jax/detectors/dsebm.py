"""DSEBM (Zhai, Cheng, Lu and Zhang, "Deep Structured Energy Based Models for Anomaly Detection", ICML 2016;
arXiv 1605.07717), in the convolutional form that later comparisons use.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, descent
from patchcore_jax.detectors.trained_settings import DSEBM
from patchcore_jax.learned import starts, transforms
from patchcore_jax.learned.layers import Conv, Dense, Norm

_norm = functools.partial(Norm, momentum=0.99, epsilon=1e-3)
_ACTIVATIONS = {'relu': nn.relu, 'softplus': nn.softplus}


class Encoder(nn.Module):
  """The features of images that lower their energy: [b, s, s, 3] -> [b, hidden], 0 or more.

  Attributes:
    filters: channels of the first layer, which each layer doubles, until the maps have 4 x 4 cells.
    hidden: features that come out.
    activation: of the features, 'relu' or 'softplus'.
  """

  filters: int
  hidden: int
  activation: str

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    filters = self.filters
    while x.shape[1] > 4:
      x = nn.relu(_norm()(Conv(filters, stride=2, before=0, kernel_init=starts.GLOROT)(x), train))
      filters *= 2
    return _ACTIVATIONS[self.activation](Dense(self.hidden, kernel_init=starts.GLOROT)(x.reshape(len(x), -1)))


class Energy(nn.Module):
  """The energy: images [b, s, s, 3] in [-1, 1] -> [b]. Attributes are those of `Encoder`."""

  filters: int
  hidden: int
  activation: str

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    prior = self.param('prior', nn.initializers.zeros, x.shape[1:])
    features = Encoder(self.filters, self.hidden, self.activation, name='encoder')(x, train)
    return 0.5 * jnp.square(x - prior).sum(axis=(1, 2, 3)) - features.sum(axis=1)


def with_gradient(energy: Callable, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes energies [b], and their gradients with regard to the images, of the shape of x [b, h, w, c].

  A step along the gradient, x - gradient, is the reconstruction of x.

  Args:
    energy: x -> [b], each of its own image only.

  >>> values, gradients = with_gradient(lambda x: 0.5 * jnp.square(x - 3).sum(axis=(1, 2, 3)),
  ...                                   jnp.ones((1, 1, 2, 1)))
  >>> values.tolist(), gradients.ravel().tolist()
  ([4.0], [-2.0, -2.0])
  """
  values, pull = jax.vjp(energy, x)
  return values, pull(jnp.ones_like(values))[0]


@functools.lru_cache(maxsize=16)
def method(detector: DSEBM) -> Method:
  """Makes the method: what is trained, and how it scores."""
  network = Energy(detector.filters, detector.hidden, detector.activation)

  def prepared(images):
    return 2 * transforms.scaled(images, detector.standardise) - 1

  def loss(variables, images, key, train):
    x = prepared(images)
    noisy = x + detector.noise * jax.random.normal(key, x.shape, x.dtype)

    def energy(x):
      values, changes = network.apply(variables, x, train, mutable=['batch_stats'])
      return values.sum(), changes

    gradients, changes = jax.grad(energy, has_aux=True)(noisy)
    return jnp.square(x - (noisy - gradients)).mean(), changes if train else {}

  def score(variables, images):
    energies, gradients = with_gradient(
        lambda x: network.apply(variables, x, False), prepared(images))
    maps = jnp.square(gradients).sum(axis=-1)
    return Scores(energies if detector.score == 'energy' else maps.sum(axis=(1, 2)), maps)

  def init(key):
    return starts.variables(network, key, jnp.zeros((1, detector.size, detector.size, 3)), False)

  return Method(*descent(init, loss, lambda: adam(detector.learning_rate, eps=1e-7)), score)
