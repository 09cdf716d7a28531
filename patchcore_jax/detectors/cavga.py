"""CAVGA (Venkataramanan, Peng, Singh and Mahalanobis, "Attention Guided Anomaly Localization in Images", ECCV
2020; arXiv 1911.08616).

A variational auto-encoder whose code is a map is trained against a discriminator, and so that its attention
covers all of a good image: what it does not cover is anomalous. There is no public code of the authors, and
their pretrained networks are not at hand: every network starts at random here, and what is told of the paper
in different ways is a setting.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam
from patchcore_jax.detectors.trained_settings import CAVGA
from patchcore_jax.learned import attention, latent, loop, starts, transforms
from patchcore_jax.learned.layers import Conv, Decoder, Dense, Discriminator, Encoder

_NORMAL, _ANOMALOUS = 0, 1  # the classifier's two numbers
_LEAST = 1e-6  # of what a logarithm is taken of


class Network(nn.Module):
  """The encoder, the map of codes and the decoder, and the classifier of codes, which the weak form trains.

  Attributes:
    widths: channels of the encoder's stages; the decoder's are the same in reverse.
    latent: channels of the codes.
  """

  widths: Sequence[int]
  latent: int

  def setup(self):
    self.encoder, self.decoder = Encoder(self.widths), Decoder(self.widths[::-1])
    self.mean, self.log_variance = Conv(self.latent, 1), Conv(self.latent, 1)
    self.widened, self.classifier = Conv(self.widths[-1], 1), Dense(2)

  def features(self, x: jax.Array, train: bool) -> jax.Array:
    """Computes the maps of the last stage, of which the attention is."""
    return self.encoder(x, train)[-1]

  def codes(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the codes: their mean and the logarithm of their variance, [b, h, w, latent]."""
    return self.mean(features), self.log_variance(features)

  def restored(self, z: jax.Array, train: bool) -> jax.Array:
    """Restores images in (0, 1) from codes."""
    return nn.sigmoid(self.decoder(self.widened(z), train))

  def logits(self, z: jax.Array) -> jax.Array:
    """Tells good from anomalous codes: [b, 2], before a softmax."""
    return self.classifier(z.reshape(len(z), -1))

  def __call__(self, x: jax.Array, key: jax.Array, train: bool) -> tuple[jax.Array, ...]:
    """Computes features, mean and log-variance of the codes, restored images and logits of drawn codes."""
    features = self.features(x, train)
    mean, log_variance = self.codes(features)
    z = latent.sample(mean, log_variance, key)
    return features, mean, log_variance, self.restored(z, train), self.logits(z)


class Critic(nn.Module):
  """The discriminator: images in [0, 1] -> [b], large where it takes them for real."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    widths = [factor * self.width for factor in (1, 2, 4, 8, 8)]
    x = Discriminator(widths)(2 * x - 1, train).mean(axis=(1, 2))
    return Dense(1, kernel_init=starts.DCGAN)(x)[:, 0]


def attention_maps(network: Network, params: Any, features: jax.Array, detector: CAVGA) -> list[jax.Array]:
  """Computes where a network looks, [b, h, w] in [0, 1]: at all, or for each class in the weak form.

  The numbers that are looked into are those of the mean codes, so that no chance comes in.
  """

  def whole(features):
    return network.apply({'params': params}, features, method='codes')[0].sum(axis=(1, 2, 3))

  def of_class(which, features):
    z, _ = network.apply({'params': params}, features, method='codes')
    return network.apply({'params': params}, z, method='logits')[:, which]

  scalars = [whole]
  if detector.weak:
    scalars = [functools.partial(of_class, which) for which in (_NORMAL, _ANOMALOUS)]
  found = (attention.combined(attention.weights(scalar, features), features) for scalar in scalars)
  return [attention.normalised(nn.relu(maps), detector.attention) for maps in found]


def uncovered(maps: jax.Array) -> jax.Array:
  """Computes the share of each image that the attention does not cover, [b]: 0 only where it is 1 everywhere.

  >>> uncovered(jnp.ones((1, 2, 2))).tolist()
  [0.0]
  """
  return (1 - maps).mean(axis=(1, 2))


def guidance(maps: Sequence[jax.Array], logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Computes the attention's loss of the weak form, [b]: 0 unless a good image is classified as good."""
  counts = (labels == _NORMAL) & (logits.argmax(axis=1) == _NORMAL)
  return jnp.where(counts, uncovered(maps[_NORMAL]) + maps[_ANOMALOUS].mean(axis=(1, 2)), 0)


def critic_loss(real: jax.Array, restored: jax.Array) -> jax.Array:
  """Computes what the discriminator minimises, -log D(x) - log(1 - D(x')), of answers before a sigmoid."""
  return (nn.softplus(-real) + nn.softplus(restored)).mean()


def generator_loss(restored: jax.Array) -> jax.Array:
  """Computes what the auto-encoder minimises against the discriminator: -log D(x')."""
  return nn.softplus(-restored).mean()


@functools.lru_cache(maxsize=16)
def method(detector: CAVGA) -> Method:
  """Makes the method: what is trained, and how it scores."""
  network, critic = Network(detector.widths, detector.latent), Critic(detector.widths[0])
  optimizer = functools.partial(adam, detector.learning_rate, b1=detector.beta)

  def own_loss(variables, x, labels, key, train):
    """Computes the loss without the adversary's part: (loss, (restored images, changes))."""
    (features, mean, log_variance, restored, logits), changes = network.apply(
        variables, x, key, train, mutable=['batch_stats'])
    if detector.reconstruction == 'bce':
      inner = restored.clip(_LEAST, 1 - _LEAST)
      error = -(x * jnp.log(inner) + (1 - x) * jnp.log1p(-inner))
    else:
      error = jnp.square(x - restored)
    maps = attention_maps(network, variables['params'], features, detector)
    each = error.mean(axis=(1, 2, 3)) + detector.kl_weight * latent.kl(mean, log_variance) / x[0].size
    if detector.weak:
      crossed = -jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
      each += detector.classifier_weight * crossed
      each += detector.attention_weight * guidance(maps, logits, labels)
    else:
      each += detector.attention_weight * uncovered(maps[_NORMAL])
    return each.mean(), (restored, changes)

  def judged(variables, images):
    """Lets the discriminator judge, as it is trained: (its answers, the variables with new statistics)."""
    found, changes = critic.apply(variables, images, True, mutable=['batch_stats'])
    return found, {**variables, **changes}

  def generator_step(state, x, labels, key):
    variables = state['variables']

    def loss(params):
      value, (restored, changes) = own_loss({**variables, 'params': params}, x, labels, key, True)
      against = generator_loss(judged(state['discriminator'], restored)[0])
      return value + detector.adversarial_weight * against, (value, against, restored, changes)

    gradients, (value, against, restored, changes) = jax.grad(loss, has_aux=True)(variables['params'])
    updates, moments = optimizer().update(gradients, state['optimizer']['generator'])
    params = jax.tree.map(jnp.add, variables['params'], updates)
    state = {**state, 'variables': {**changes, 'params': params},
             'optimizer': {**state['optimizer'], 'generator': moments}}
    return state, restored, {'loss': value, 'adversarial': against}

  def critic_step(state, x, restored):
    variables = state['discriminator']

    def loss(params):
      real, changed = judged({**variables, 'params': params}, x)
      false, changed = judged(changed, restored)
      return critic_loss(real, false), changed['batch_stats']

    (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(variables['params'])
    updates, moments = optimizer().update(gradients, state['optimizer']['discriminator'])
    params = jax.tree.map(jnp.add, variables['params'], updates)
    state = {**state, 'discriminator': {'params': params, 'batch_stats': statistics},
             'optimizer': {**state['optimizer'], 'discriminator': moments}}
    return state, {'discriminator': value}

  def step(state, examples, key):
    images, labels = (examples['image'], examples['label']) if detector.weak else (examples, None)
    x = transforms.scaled(images, detector.standardise)
    state, restored, report = generator_step(state, x, labels, key)
    state, told = critic_step(state, x, restored)  # which are no longer the generator's to change
    return state, {**report, **told}

  def init(key):
    one, other = jax.random.split(key)
    x = jnp.zeros((1, detector.size, detector.size, 3))
    variables = starts.variables(network, one, x, one, False)
    judge = starts.variables(critic, other, x, False)
    return {'variables': variables, 'discriminator': judge, 'optimizer': {
        'generator': starts.moments(optimizer(), variables['params']),
        'discriminator': starts.moments(optimizer(), judge['params'])}}

  def loss(variables, images, key):
    x = transforms.scaled(images, detector.standardise)
    return own_loss(variables, x, jnp.zeros(len(x), int), key, False)[0]

  def score(variables, images):
    x = transforms.scaled(images, detector.standardise)
    features = network.apply(variables, x, False, method='features')
    mean, _ = network.apply(variables, features, method='codes')
    maps = 1 - attention_maps(network, variables['params'], features, detector)[_NORMAL]
    maps = jax.image.resize(maps, x.shape[:3], 'linear')
    if detector.image_score == 'map':
      return Scores(maps.max(axis=(1, 2)), maps)
    if detector.image_score == 'classifier':
      logits = network.apply(variables, mean, method='logits')
      return Scores(nn.softmax(logits)[:, _ANOMALOUS], maps)
    restored = network.apply(variables, mean, False, method='restored')
    return Scores(jnp.abs(x - restored).mean(axis=(1, 2, 3)), maps)

  return Method(loop.Task(init, step), loss, score)
