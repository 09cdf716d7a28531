"""Visually explained VAE (Liu, Li, Zheng, Karanam, Wu, Bhanu, Radke and Camps, "Towards Visually Explaining
Variational Autoencoders", CVPR 2020; arXiv 1911.07389).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, descent
from patchcore_jax.detectors.trained_settings import ExplainedVAE
from patchcore_jax.learned import attention, latent, layers, starts, transforms


class Network(nn.Module):
  """The variational auto-encoder, of images [b, size, size, 3] in [-1, 1], with a residual trunk.

  Attributes:
    size: of the images.
    latent: numbers of a code.
    width: channels of the encoder's first stage and of the decoder's last.
  """

  size: int
  latent: int
  width: int

  def setup(self):
    widths = [self.width * 2 ** i for i in range(4)]
    self.encoder, self.decoder = layers.Encoder(widths), layers.Decoder(widths[::-1])
    self.mean, self.log_variance = (layers.Dense(self.latent) for _ in range(2))
    self.grown = layers.Dense((self.size // 32) ** 2 * widths[-1])

  def __call__(self, x: jax.Array, key: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    """Restores images from codes that are drawn; returns them, and the codes' divergence [b]."""
    encoded = self.encoder(x, train)[-1].mean(axis=(1, 2))
    mean, log_variance = self.mean(encoded), self.log_variance(encoded)
    return self.decoded(latent.sample(mean, log_variance, key), train), latent.kl(mean, log_variance)

  def decoded(self, codes: jax.Array, train: bool) -> jax.Array:
    """Makes images of codes [b, latent]."""
    side = self.size // 32
    x = self.grown(codes).reshape(len(codes), side, side, -1)
    return self.decoder(layers.nearest_double(x), train)

  def features(self, x: jax.Array, layer: int) -> jax.Array:
    """Computes the map at the end of a stage, 1 to 4."""
    return self.encoder(x, False)[layer - 1]

  def codes(self, x: jax.Array, layer: int, features: jax.Array) -> jax.Array:
    """Computes the means of codes from the map of a stage, whatever the images are."""
    return self.mean(self.encoder(x, False, (layer - 1, features))[-1].mean(axis=(1, 2)))


def attention_map(codes_fn, features: jax.Array, inference: str) -> jax.Array:
  """Computes where a layer counts for the code that is made of it: [b, h, w], nowhere less than 0.

  Args:
    codes_fn: features [b, h, w, c] -> codes [b, latent], each image by itself.
    features: of the layer.
    inference: see `ExplainedVAE`.
  """
  if inference == 'mean_sum':
    weights = attention.weights(lambda x: codes_fn(x).sum(axis=-1), features)
    return jnp.abs(attention.combined(weights, features))

  def of_one(i):
    return nn.relu(attention.combined(attention.weights(lambda x: codes_fn(x)[:, i], features), features))

  count = jax.eval_shape(codes_fn, features).shape[-1]
  return jax.vmap(of_one)(jnp.arange(count)).mean(axis=0)


@functools.lru_cache(maxsize=16)
def method(detector: ExplainedVAE) -> Method:
  """Makes the method: what is trained, and how it scores."""
  network = Network(detector.size, detector.latent, detector.width)

  def loss(variables, images, key, train):
    turning, drawing = jax.random.split(key)
    x = transforms.scaled(images, detector.standardise)
    if train:
      x = transforms.augmented(x, turning, flip=detector.flip, turn=detector.turn)
    x = 2 * x - 1
    (restored, divergence), changes = network.apply(variables, x, drawing, train, mutable=['batch_stats'])
    errors = jnp.square(x - restored).sum(axis=(1, 2, 3))
    return (errors / (2 * detector.deviation ** 2) + divergence).mean(), changes

  def score(variables, images):
    x = 2 * transforms.scaled(images, detector.standardise) - 1
    features = network.apply(variables, x, detector.layer, method='features')
    codes_fn = functools.partial(network.apply, variables, x, detector.layer, method='codes')
    maps = attention_map(codes_fn, features, detector.inference)
    maps = jax.image.resize(maps, x.shape[:3], 'linear')
    return Scores(maps.max(axis=(1, 2)), maps)

  def init(key):
    return starts.variables(network, key, jnp.zeros((1, detector.size, detector.size, 3)), key, False)

  return Method(*descent(init, loss, lambda: adam(detector.learning_rate)), score)
