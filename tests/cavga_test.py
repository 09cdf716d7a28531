"""CAVGA: its attention and losses by hand, its two players, and that both forms learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.detectors import CAVGA, cavga
from patchcore_jax.learned import latent, loop
from tests import trained

TINY = CAVGA(size=32, batch_size=4, steps=2, widths=(4, 6), latent=3)
WEAK = CAVGA(size=32, batch_size=4, steps=2, widths=(4, 6), latent=3, weak=True)
NETWORK = cavga.Network(TINY.widths, TINY.latent)
IMAGES = trained.parts(4, 32)
MADE = {'size': 64, 'batch_size': 16, 'steps': 150, 'widths': (8, 16, 32), 'latent': 8}


@functools.lru_cache
def start(detector=TINY, seed=0):
  """The state before the first step."""
  return loop.init(cavga.method(detector).task, seed)


def test_attention_by_hand():
  params = start()['variables']['params']
  features = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
  # The mean codes are linear in the features: their sum has one gradient everywhere.
  weights = params['mean']['kernel'][0, 0].sum(axis=1)
  expected = jax.nn.sigmoid(jax.nn.relu((features * weights).sum(axis=-1)))
  np.testing.assert_allclose(
      cavga.attention_maps(NETWORK, params, features, TINY)[0], expected, rtol=1e-5)
  # A class's number is linear in the codes, with weights for each place.
  kernel = params['classifier']['kernel'].reshape(8, 8, 3, 2)
  by_class = jnp.einsum('kl,yxlc->ck', params['mean']['kernel'][0, 0], kernel) / 64
  for which, found in enumerate(cavga.attention_maps(NETWORK, params, features, WEAK)):
    expected = jax.nn.sigmoid(jax.nn.relu((features * by_class[which]).sum(axis=-1)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nothing_is_uncovered_only_where_attention_is_one_everywhere():
  maps = jnp.ones((2, 3, 3)).at[1, 0, 0].set(0.1)
  np.testing.assert_allclose(cavga.uncovered(maps), [0, 0.1], atol=1e-7)


def test_guidance_is_of_good_images_that_are_classified_as_such():
  maps = jnp.full((4, 2, 2), 0.7), jnp.full((4, 2, 2), 0.2)
  logits, labels = jnp.array([[2.0, 1], [1, 2], [2, 1], [1, 2]]), jnp.array([0, 0, 1, 1])
  np.testing.assert_allclose(cavga.guidance(maps, logits, labels), [0.3 + 0.2, 0, 0, 0], rtol=1e-6)
  gradients = jax.grad(lambda maps: cavga.guidance(maps, logits, jnp.ones(4, int)).sum())(maps)
  assert not any(np.any(gradient) for gradient in gradients)  # of a batch of anomalous images


def test_the_gradient_of_the_attention_s_loss_agrees_with_differences():
  single = jax.device_get(start(seed=1)['variables'])  # by that of 0 there is no attention
  with jax.enable_x64(True):
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), single)
    x = jnp.asarray(IMAGES / 255)

    @jax.jit
    def loss(kernel, mean):
      encoder = {**variables['params']['encoder'], 'Conv_0': {'kernel': kernel}}
      heads = {**variables['params']['mean'], 'kernel': mean}
      params = {**variables['params'], 'encoder': encoder, 'mean': heads}
      features = NETWORK.apply({**variables, 'params': params}, x, False, method='features')
      return cavga.uncovered(cavga.attention_maps(NETWORK, params, features, TINY)[0]).sum()

    kernels = variables['params']['encoder']['Conv_0']['kernel'], variables['params']['mean']['kernel']
    # The second kernel makes the weights of the channels, so that its gradient is of a gradient.
    for which, gradient in enumerate(jax.jit(jax.grad(loss, (0, 1)))(*kernels)):
      direction = np.random.default_rng(0).standard_normal(gradient.shape)
      up, down = (loss(*(k + sign * 1e-6 * direction if i == which else k for i, k in enumerate(kernels)))
                  for sign in (1, -1))
      assert np.abs(gradient).max() > 1e-5
      np.testing.assert_allclose((up - down) / 2e-6, jnp.vdot(gradient, direction), rtol=1e-4)


def test_an_image_alone_and_in_a_batch_in_the_weak_form():
  detector = dataclasses.replace(WEAK, image_score='classifier')
  score, variables = jax.jit(cavga.method(detector).score), start(WEAK)['variables']
  together, alone = (score(variables, images) for images in (IMAGES, IMAGES[2:3]))
  np.testing.assert_allclose(alone.map[0], together.map[2], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(alone.image[0], together.image[2], rtol=1e-4)
  assert (together.image > 0).all() and (together.image < 1).all()


@pytest.mark.slow
def test_two_players_who_do_not_help_each_other():
  # With so large a weight the auto-encoder plays against the discriminator alone; and the steps are small.
  detector = dataclasses.replace(WEAK, adversarial_weight=1e4, learning_rate=1e-5)
  state, step, key = start(WEAK), jax.jit(cavga.method(detector).task.step), jax.random.key(1)
  after, told = step(state, {'image': IMAGES, 'label': np.array([0, 0, 0, 1])}, key)
  assert set(told) == {'loss', 'adversarial', 'discriminator'}

  @jax.jit
  def verdict(players, judges):
    """The discriminator's loss, with the auto-encoder of one state and the discriminator of another."""

    def applied(x, method):
      return NETWORK.apply(players['variables'], x, True, method=method, mutable=['batch_stats'])[0]

    x = jnp.asarray(IMAGES / 255, jnp.float32)
    codes = NETWORK.apply(players['variables'], applied(x, 'features'), method='codes')
    answers = (cavga.Critic(4).apply(judges['discriminator'], images, True, mutable=['batch_stats'])[0]
               for images in (x, applied(latent.sample(*codes, key), 'restored')))
    return cavga.critic_loss(*answers)

  before = verdict(state, state)
  assert verdict(state, after) < before  # only the discriminator stepped
  assert verdict(after, state) > before  # only the auto-encoder did


def test_losses_of_the_two_players_by_hand():
  zero = jnp.zeros(1)
  np.testing.assert_allclose(cavga.critic_loss(zero, zero), 2 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(cavga.generator_loss(zero), np.log(2), rtol=1e-6)
  assert cavga.critic_loss(zero + 9, zero - 9) < 1e-3 < cavga.generator_loss(zero - 9)


@pytest.mark.parametrize('changes, words', [
    ({'size': 48}, 'cavga.size=48: expected a multiple of 32'),
    ({'widths': ()}, r'cavga.widths=\(\), latent=32: expected at least 1'),
    ({'latent': 0}, 'latent=0: expected at least 1'),
    ({'attention': 'max'}, "cavga.attention='max': expected one of sigmoid, minmax"),
    ({'reconstruction': 'ssim'}, "cavga.reconstruction='ssim': expected one of bce, l2"),
    ({'image_score': 'classifier'}, "cavga.image_score='classifier': expected weak=True"),
    ({'image_score': 'map', 'attention': 'minmax'}, "cavga.image_score='map': every map has the maximum 1"),
    ({'kl_weight': -1}, 'cavga.kl_weight=-1: expected 0 or more'),
    ({'beta': 1.0}, 'cavga.beta=1.0: expected 0 or more, and less than 1')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    CAVGA(**changes)


@pytest.mark.slow
def test_learns_parts():
  # How well the attention covers good parts differs much by seed; an untrained network's has 0.45.
  detector = CAVGA(size=64, batch_size=16, steps=150, widths=(8, 16, 32), latent=8)
  trained.assert_learns(detector, factor=1.15, level=0.75)
