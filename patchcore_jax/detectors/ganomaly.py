"""GANomaly (Akcay, Atapour-Abarghouei and Breckon, "GANomaly: Semi-Supervised Anomaly Detection via
Adversarial Training", ACCV 2018; arXiv 1805.06725).
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, moved
from patchcore_jax.detectors.trained_settings import GANomaly
from patchcore_jax.learned import loop, starts, transforms
from patchcore_jax.learned.layers import ConvToDouble, Dense, Discriminator, Norm

Pair = tuple[jax.Array, jax.Array]

_WON = 1e-5  # a discriminator whose loss is below has nothing left to teach, and starts anew
_dense = functools.partial(Dense, use_bias=False, kernel_init=starts.DCGAN)


class Encoder(nn.Module):
  """Encodes images, halved to 4 x 4 cells, which one convolution over all of them then sums up: [b, latent].

  Attributes:
    widths: channels of the layers of stride 2.
    latent: numbers that come out.
  """

  widths: Sequence[int]
  latent: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the code [b, latent], and the features [b, 4, 4, widths[-1]] that it was made of."""
    features = Discriminator(self.widths)(x, train)
    return _dense(self.latent)(features.reshape(len(x), -1)), features


class Decoder(nn.Module):
  """The mirror image of `Encoder`: [b, latent] -> images [b, s, s, 3] in [-1, 1]."""

  widths: Sequence[int]

  @nn.compact
  def __call__(self, z: jax.Array, train: bool) -> jax.Array:
    *shallow, deepest = self.widths
    x = _dense(16 * deepest)(z).reshape(len(z), 4, 4, deepest)
    for width in reversed(shallow):
      x = nn.relu(Norm(scale_init=starts.NEAR_ONE)(x, train))
      x = ConvToDouble(width, use_bias=False, kernel_init=starts.DCGAN)(x)
    x = nn.relu(Norm(scale_init=starts.NEAR_ONE)(x, train))
    return jnp.tanh(ConvToDouble(3, use_bias=False, kernel_init=starts.DCGAN)(x))


class Generator(nn.Module):
  """An encoder, a decoder, and a second encoder of what was decoded."""

  widths: Sequence[int]
  latent: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the reconstructions [b, s, s, 3], and the codes [b, latent] of the images and of these."""
    code, _ = Encoder(self.widths, self.latent, name='encoder')(x, train)
    restored = Decoder(self.widths, name='decoder')(code, train)
    again, _ = Encoder(self.widths, self.latent, name='second')(restored, train)
    return restored, code, again


def networks(detector: GANomaly) -> tuple[Generator, Encoder]:
  """Makes the generator and the discriminator, whose code is one number, the logit that images are real."""
  widths = tuple(detector.filters << i for i in range((detector.size // 8).bit_length()))
  return Generator(widths, detector.latent), Encoder(widths, 1)


def combined(detector: GANomaly, features: Pair, images: Pair, codes: Pair) -> jax.Array:
  """Computes the generator's loss of pairs, of what is of the images and what is of their reconstructions.

  >>> one = jnp.ones(2)
  >>> float(combined(GANomaly(), (one, one), (one, 1.5 * one), (one, 3 * one)))  # 0 + 50 * 0.5 + 2 ** 2
  29.0
  """
  return (detector.adversarial_weight * jnp.square(features[0] - features[1]).mean()
          + detector.contextual_weight * jnp.abs(images[0] - images[1]).mean()
          + detector.latent_weight * jnp.square(codes[0] - codes[1]).mean())


@functools.lru_cache(maxsize=16)
def method(detector: GANomaly) -> Method:
  """Makes the method: what is trained, and how it scores."""
  generator, discriminator = networks(detector)

  def prepared(images):
    return 2 * transforms.scaled(images, detector.standardise) - 1

  def optimizer():
    return adam(detector.learning_rate, b1=0.5)

  def judged(params, x):
    # Every judgement takes the statistics of its own batch, so that no running ones are kept.
    (logits, features), _ = discriminator.apply({'params': params}, x, True, mutable=['batch_stats'])
    return logits, features

  def start(key, network):
    shape = (1, detector.size, detector.size, 3)
    return starts.variables(network, key, jnp.zeros(shape), False)

  def init(key):
    one, *others = jax.random.split(key, 3)
    variables, (judge, anew) = start(one, generator), (start(k, discriminator)['params'] for k in others)
    return {'variables': variables, 'optimizer': starts.moments(optimizer(), variables['params']),
            'discriminator': {'params': judge, 'optimizer': starts.moments(optimizer(), judge), 'anew': anew}}

  def generator_loss(params, statistics, judge, x):
    (restored, code, again), changes = generator.apply(
        {'params': params, 'batch_stats': statistics}, x, True, mutable=['batch_stats'])
    features = judged(judge, x)[1], judged(judge, restored)[1]
    value = combined(detector, features, (x, restored), (code, again))
    return value, (changes['batch_stats'], restored, jnp.abs(code).mean())

  def discriminator_loss(judge, x, restored):
    real, made = judged(judge, x)[0], judged(judge, restored)[0]
    return 0.5 * (nn.softplus(-real).mean() + nn.softplus(made).mean())  # cross entropies

  def step(state, images, key):
    variables, judge, x = state['variables'], state['discriminator'], prepared(images)
    (value, (statistics, restored, size)), gradients = jax.value_and_grad(generator_loss, has_aux=True)(
        variables['params'], variables['batch_stats'], judge['params'], x)
    judge_value, judge_gradients = jax.value_and_grad(discriminator_loss)(
        judge['params'], x, lax.stop_gradient(restored))
    params, moments = moved(optimizer(), variables['params'], gradients, state['optimizer'])
    judge_params, judge_moments = moved(optimizer(), judge['params'], judge_gradients, judge['optimizer'])
    judge_params = lax.cond(
        judge_value < _WON, lambda: judge['anew'], lambda: judge_params)
    state = {'variables': {'params': params, 'batch_stats': statistics}, 'optimizer': moments,
             'discriminator': {**judge, 'params': judge_params, 'optimizer': judge_moments}}
    return state, {'loss': value, 'discriminator': judge_value, 'code': size}

  def of_others(variables, images, key):
    x = prepared(images)
    return jnp.abs(x - generator.apply(variables, x, False)[0]).mean()

  def score(variables, images):
    x = prepared(images)
    if detector.bn == 'batch1':
      restored, code, again = jax.vmap(
          lambda image: generator.apply(variables, image[None], True, mutable=['batch_stats'])[0])(x)
      restored, code, again = restored[:, 0], code[:, 0], again[:, 0]
    else:
      restored, code, again = generator.apply(variables, x, False)
    distance = jnp.square if detector.distance == 'squared' else jnp.abs
    return Scores(
        distance(code - again).mean(axis=1), jnp.abs(x - restored).mean(axis=-1) if detector.maps else None)

  return Method(loop.Task(init, step), of_others, score)
