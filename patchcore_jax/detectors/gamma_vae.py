"""gamma-VAE + grad (Dehaene, Frigo, Combrexelle and Eline, "Iterative energy-based projection on a normal
data manifold for anomaly localization", ICLR 2020; arXiv 2002.03734), with one learned variance for all
values as in Dai and Wipf, "Diagnosing and Enhancing VAE Models", ICLR 2019.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from patchcore_jax.detectors.ae_ssim import Decoder, Encoder, pieces
from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, computed, descent
from patchcore_jax.detectors.trained_settings import GammaVAE
from patchcore_jax.learned import latent, projection, starts, tiles, transforms
from patchcore_jax.learned.layers import Dense


class Network(nn.Module):
  """The variational auto-encoder, of images [b, size, size, 3] in [0, 1], on the trunk of AE-SSIM's network.

  Attributes:
    size: of the images.
    latent: numbers of a code.
  """

  size: int
  latent: int

  def setup(self):
    self.encoder, self.decoder = Encoder(self.size, self.latent), Decoder(self.size)
    self.mean, self.log_variance = (Dense(self.latent, kernel_init=starts.GLOROT) for _ in range(2))
    self.log_gamma = self.param('log_gamma', nn.initializers.zeros, ())

  def __call__(self, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Restores images from codes that are drawn; returns them, the codes' divergence [b], and log gamma."""
    encoded = self.encoder(x)
    mean, log_variance = self.mean(encoded), self.log_variance(encoded)
    restored = self.decoder(latent.sample(mean, log_variance, key))
    return restored, latent.kl(mean, log_variance), self.log_gamma

  def restored(self, x: jax.Array) -> jax.Array:
    """Restores images from the means of their codes."""
    return self.decoder(self.mean(self.encoder(x)))


@functools.lru_cache(maxsize=16)
def method(detector: GammaVAE) -> Method:
  """Makes the method: what is trained, and how it scores."""
  side = detector.crop or detector.size
  network = Network(side, detector.latent)

  def loss(variables, images, key, train):
    preparing, drawing = jax.random.split(key)
    x = pieces(detector, images, preparing, train)
    restored, divergence, log_gamma = network.apply(variables, x, drawing)
    errors = jnp.square(x - restored).sum(axis=(1, 2, 3))
    if detector.variance_rate:
      log_gamma *= detector.variance_rate  # Adam's steps are as long for every number that is learned
    else:
      log_gamma = jnp.log(errors.mean() / x[0].size)
    return (latent.gaussian_loss(errors, x[0].size, log_gamma) + divergence).mean(), {}

  def restore(variables, x):
    restored = functools.partial(network.apply, variables, method='restored')
    return tiles.blended(x, side, detector.stride, restored)

  def score(variables, images):
    start, restored = transforms.scaled(images, detector.standardise), functools.partial(restore, variables)
    if detector.map == 'residual':
      end, evidence = restored(start), {}
    else:
      end, *counts = projection.project(
          restored, start, moves=detector.moves, rate=detector.rate, closeness=detector.closeness,
          stop=variables['finished']['stop'], through_network=detector.through_network)
      evidence = dict(zip(('moves', 'halvings'), counts, strict=True))
    maps = jnp.abs(start - end).mean(axis=-1)
    return Scores(maps.max(axis=(1, 2)), maps, evidence)

  def errors(variables, images):
    x = transforms.scaled(images, detector.standardise)
    return projection.error(functools.partial(restore, variables), x)

  def finish(variables, images, held):
    return {'stop': computed(errors, variables, images).min()}

  def init(key):
    return starts.variables(network, key, jnp.zeros((1, side, side, 3)), key)

  return Method(*descent(init, loss, lambda: adam(detector.learning_rate)), score, finish)
