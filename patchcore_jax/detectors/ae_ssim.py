"""AE-SSIM (Bergmann, Löwe, Fauser, Sattlegger and Steger, "Improving Unsupervised Defect Segmentation by
Applying Structural Similarity to Autoencoders", VISAPP 2019; arXiv 1807.02011).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, descent
from patchcore_jax.detectors.trained_settings import AESSIM, Autoencoder
from patchcore_jax.learned import ssim, starts, tiles, transforms
from patchcore_jax.learned.layers import Conv, ConvToDouble, Dense, leaky_relu

_conv = functools.partial(Conv, kernel_init=starts.GLOROT)
_to_double = functools.partial(ConvToDouble, kernel_init=starts.GLOROT)
_TURNED = 0.3  # share of the images, as in a public implementation


class Encoder(nn.Module):
  """The encoder of the paper's table: [b, s, s, c] -> [b, latent].

  Attributes:
    size: s, of the images; beyond 128 pixels there are further layers of stride 2.
    latent: numbers that come out.
  """

  size: int
  latent: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    layers = [_conv(32, 4, 2), _conv(32, 4, 2), *(_conv(32, 4, 2) for _ in range(further(self.size))),
              _conv(32), _conv(64, 4, 2), _conv(64), _conv(128, 4, 2), _conv(64), _conv(32)]
    for layer in layers:
      x = leaky_relu(layer(x))
    return Dense(self.latent, kernel_init=starts.GLOROT)(x.reshape(len(x), -1))


class Decoder(nn.Module):
  """The mirror image of `Encoder`: [b, latent] -> [b, size, size, 3] in (0, 1)."""

  size: int

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    extra = further(self.size)
    side = self.size >> (4 + extra)
    x = Dense(side * side * 32, use_bias=False, kernel_init=starts.GLOROT)(z).reshape(len(z), side, side, 32)
    x = leaky_relu(x + self.param('bias', nn.initializers.zeros, (32,)))
    layers = [_conv(64), _conv(128), _to_double(64), _conv(64), _to_double(32), _conv(32),
              *(_to_double(32) for _ in range(extra)), _to_double(32)]
    for layer in layers:
      x = leaky_relu(layer(x))
    return nn.sigmoid(_to_double(3)(x))


def further(size: int) -> int:
  """Counts the layers of stride 2 beyond four, until the smallest maps have 8 x 8 cells as in the paper.

  >>> further(128), further(256)
  (0, 1)
  """
  count = 0
  while size >> (4 + count) > 8 and not (size >> (4 + count)) % 2:
    count += 1
  return count


class Network(nn.Module):
  """The auto-encoder: images [b, size, size, 3] in [0, 1] -> their reconstructions."""

  size: int
  latent: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Decoder(self.size)(Encoder(self.size, self.latent)(x))


def pieces(detector: Autoencoder, images: jax.Array, key: jax.Array, train: bool) -> jax.Array:
  """Prepares images [b, s, s, 3] uint8 for a step: in [0, 1], augmented, and cut where there is a crop.

  Images that are not trained on are not augmented, and are cut from their middle.
  """
  x, side = transforms.scaled(images, detector.standardise), detector.crop or detector.size
  if train:
    turning, cropping = jax.random.split(key)
    x = transforms.augmented(x, turning, flip=detector.flip, turn=detector.turn, share=_TURNED)
    return transforms.cropped(x, cropping, side)
  middle = (x.shape[1] - side) // 2
  return x[:, middle:middle + side, middle:middle + side]


@functools.lru_cache(maxsize=16)
def method(detector: AESSIM) -> Method:
  """Makes the method: what is trained, and how it scores."""
  side = detector.crop or detector.size
  network = Network(side, detector.latent)
  compared = {'size': detector.window, 'constants': detector.constants}

  def loss(variables, images, key, train):
    x = pieces(detector, images, key, train)
    return 1 - ssim.similarity(x, network.apply(variables, x), **compared).mean(), {}

  def score(variables, images):
    x = transforms.scaled(images, detector.standardise)
    restored = tiles.blended(x, side, detector.stride, functools.partial(network.apply, variables))
    maps = ssim.dissimilarity_map(x, restored, **compared)
    return Scores(maps.max(axis=(1, 2)), maps)

  def init(key):
    return starts.variables(network, key, jnp.zeros((1, side, side, 3)))

  return Method(*descent(init, loss, lambda: adam(detector.learning_rate)), score)
