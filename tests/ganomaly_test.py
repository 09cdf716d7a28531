"""GANomaly: its networks, what a step does to which of them, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from patchcore_jax.detectors import GANomaly, ganomaly
from patchcore_jax.learned import transforms
from tests import trained

SMALL = GANomaly(size=16, batch_size=4, filters=4, latent=5)
IMAGES = trained.parts(4, 16)
X = 2 * transforms.scaled(jnp.asarray(IMAGES)) - 1
GENERATOR, DISCRIMINATOR = ganomaly.networks(SMALL)


@pytest.fixture(scope='module')
def start():
  return jax.device_get(ganomaly.method(SMALL).task.init(jax.random.key(0)))


def _count(tree):
  return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _step(state):
  return jax.jit(ganomaly.method(SMALL).task.step)(state, IMAGES, jax.random.key(1))


@functools.partial(jax.jit, static_argnums=2)
def _generated(variables, x, train):
  return GENERATOR.apply(variables, x, train, mutable=['batch_stats'])[0]


@jax.jit
def _judged(params, x):
  return DISCRIMINATOR.apply({'params': params}, x, True, mutable=['batch_stats'])[0]


class TestNetworks:

  def test_parameters_are_the_authors(self):
    state = ganomaly.method(GANomaly(size=32, filters=64)).task.init(jax.random.key(0))
    assert _count(state['variables']['params']) == 3_206_528
    assert _count(state['discriminator']['params']) == 663_296

  @pytest.mark.parametrize('size', [16, 128])
  def test_other_sizes(self, size):
    generator, discriminator = ganomaly.networks(GANomaly(size=size, filters=2, latent=5))
    x = jnp.zeros((3, size, size, 3))
    (restored, code, again), _ = jax.eval_shape(
        lambda key: generator.init_with_output(key, x, False), jax.random.key(0))
    assert (restored.shape, code.shape, again.shape) == (x.shape, (3, 5), (3, 5))
    (logits, features), _ = jax.eval_shape(
        lambda key: discriminator.init_with_output(key, x, False), jax.random.key(0))
    assert logits.shape == (3, 1) and features.shape == (3, 4, 4, 2 * size // 8)

  def test_restored_values_are_in_the_range_of_images(self, start):
    variables = jax.tree.map(lambda leaf: 30 * leaf, start['variables'])
    assert 0.9 < float(jnp.abs(_generated(variables, X, False)[0]).max()) <= 1

  def test_starts_as_the_authors_do(self, start):
    leaves = jax.tree_util.tree_leaves_with_path(
        (start['variables']['params'], start['discriminator']['params']))
    names = [path[-1].key for path, _ in leaves]
    kernels, scales, shifts = (
        np.concatenate([leaf.ravel() for name, (_, leaf) in zip(names, leaves) if name == kind])
        for kind in ('kernel', 'scale', 'bias'))
    assert len(kernels) + 2 * len(scales) == sum(leaf.size for _, leaf in leaves)  # and no biases
    assert kernels.std() == pytest.approx(0.02, rel=0.05) and abs(kernels.mean()) < 1e-3
    assert scales.std() == pytest.approx(0.02, rel=0.5) and scales.mean() == pytest.approx(1, abs=0.01)
    assert not shifts.any()


class TestStep:

  def test_loss_of_constant_codes_and_features(self, start):
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if 'Dense_0' in str(path) and 'decoder' not in str(path) else leaf,
        start['variables']['params'])
    state = {
        **start, 'variables': {**start['variables'], 'params': params},
        'discriminator': jax.tree.map(lambda leaf: 0 * leaf, start['discriminator'])}
    restored, *codes = _generated(state['variables'], X, True)
    assert not any(code.any() for code in codes)
    _, report = _step(state)
    assert float(report['loss']) == pytest.approx(50 * float(jnp.abs(X - restored).mean()), rel=1e-5)
    assert float(report['discriminator']) == pytest.approx(np.log(2), rel=1e-5)  # of logits that are 0
    assert report['code'] == 0

  def test_discriminator_is_moved_by_its_own_loss_alone(self, start):
    """It takes Adam's step from its old weights; nothing of the generator's loss reaches it."""
    judge = start['discriminator']['params']
    restored = _generated(start['variables'], X, True)[0]

    def loss(judge):
      real, made = (jax.nn.sigmoid(_judged(judge, x)[0]) for x in (X, restored))
      return -0.5 * (jnp.log(real).mean() + jnp.log(1 - made).mean())

    value, gradients = jax.jit(jax.value_and_grad(loss))(judge)
    optimizer = optax.adam(SMALL.learning_rate, b1=0.5, b2=0.999)
    updates, _ = optimizer.update(gradients, optimizer.init(judge))
    after, report = _step(start)
    assert float(report['discriminator']) == pytest.approx(float(value), rel=1e-4)
    for found, before, update in zip(*map(jax.tree.leaves, (
        after['discriminator']['params'], judge, updates))):
      np.testing.assert_allclose(found - before, update, atol=2e-5)  # a tenth of the largest
      assert np.abs(update).max() > 1e-4

  def test_generator_is_moved_by_the_sum_of_its_losses(self, start):
    restored, code, again = _generated(start['variables'], X, True)
    judge = start['discriminator']['params']
    features = [_judged(judge, x)[1] for x in (X, restored)]
    expected = (jnp.square(features[0] - features[1]).mean() + 50 * jnp.abs(X - restored).mean()
                + jnp.square(code - again).mean())
    state = start
    for i in range(30):
      state, report = _step(state)
      if not i:
        assert float(report['loss']) == pytest.approx(float(expected), rel=1e-5)
        assert float(report['code']) == pytest.approx(float(jnp.abs(code).mean()), rel=1e-4)
    assert report['loss'] < expected - 0.5

  def test_weights_of_the_losses(self):
    pairs = [(jnp.zeros(3), jnp.array([0.0, 1, d])) for d in (2, 3, -4)]
    losses = [
        ganomaly.combined(GANomaly(**dict(zip(
            ('adversarial_weight', 'contextual_weight', 'latent_weight'), weights))), *pairs)
        for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    np.testing.assert_allclose(losses, [5 / 3, 4 / 3, 17 / 3], rtol=1e-6)

  def test_a_discriminator_that_has_won_starts_anew(self, start):
    """Its last layer is solved for, so that it tells the two apart without a doubt."""
    restored = _generated(start['variables'], X, True)[0]
    judge = start['discriminator']['params']
    features = np.concatenate([_judged(judge, x)[1].reshape(4, -1) for x in (X, restored)])
    kernel = np.linalg.lstsq(features, np.repeat([30.0, -30.0], 4)[:, None])[0].astype(np.float32)
    winner = {**judge, 'Dense_0': {'kernel': kernel}}
    after, report = _step({**start, 'discriminator': {**start['discriminator'], 'params': winner}})
    assert report['discriminator'] < 1e-5
    kernels = after['discriminator']['params']['Dense_0']['kernel']
    assert np.abs(kernel).max() > 0.1 > np.abs(kernels).max() and kernels.std() > 0.01
    assert not np.array_equal(kernels, judge['Dense_0']['kernel'])
    assert after['discriminator']['optimizer'][0].count == 1  # its moments stay

  def test_the_discriminator_is_not_kept(self, start):
    assert start['variables']['params'].keys() == {'encoder', 'decoder', 'second'}


class TestScore:

  def test_is_zero_where_images_are_restored(self, start, monkeypatch):
    params, statistics = (start['variables'][name] for name in ('params', 'batch_stats'))
    same = {'params': {**params, 'second': params['encoder']},
            'batch_stats': {**statistics, 'second': statistics['encoder']}}
    monkeypatch.setattr(ganomaly.Decoder, '__call__', lambda decoder, z, train: X)
    detector = dataclasses.replace(SMALL, maps=True)
    ganomaly.method.cache_clear()
    score = jax.jit(ganomaly.method(detector).score)
    alike, others = score(same, IMAGES), score(start['variables'], IMAGES)
    ganomaly.method.cache_clear()
    np.testing.assert_allclose(alike.image, 0, atol=1e-14)
    np.testing.assert_allclose(alike.map, 0, atol=1e-6)
    assert (others.image > 1e-10).all()

  def test_distances_by_hand(self, start):
    restored, code, again = _generated(start['variables'], X, False)
    squared, absolute = (
        ganomaly.method(dataclasses.replace(SMALL, distance=distance, maps=distance == 'absolute')).score(
            start['variables'], IMAGES) for distance in ('squared', 'absolute'))
    np.testing.assert_allclose(squared.image, np.square(code - again).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(absolute.image, np.abs(code - again).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(absolute.map, np.abs(X - restored).mean(axis=-1), rtol=1e-4, atol=1e-6)
    assert squared.map is None
    held_out = ganomaly.method(SMALL).loss(start['variables'], IMAGES, jax.random.key(0))
    assert float(held_out) == pytest.approx(float(jnp.abs(X - restored).mean()), rel=1e-5)

  @pytest.mark.parametrize('bn', ['running', 'batch1'])
  def test_does_not_depend_on_the_batch(self, start, bn):
    score = jax.jit(ganomaly.method(dataclasses.replace(SMALL, bn=bn)).score)
    scores, again = (score(start['variables'], IMAGES[order]).image for order in ([0, 1, 2, 3], [2, 2, 0, 2]))
    np.testing.assert_allclose(again, scores[jnp.array([2, 2, 0, 2])], rtol=1e-4)
    if bn == 'batch1':
      _, code, of_restored = _generated(start['variables'], X[:1], True)
      np.testing.assert_allclose(scores[0], np.square(code - of_restored).mean(), rtol=1e-4)


@pytest.mark.slow
def test_learns_parts():
  detector = GANomaly(size=32, batch_size=16, steps=150, filters=16, latent=32)
  trained.assert_learns(detector, factor=5)


@pytest.mark.parametrize('changes, words', [
    ({'size': 48}, 'ganomaly.size=48: expected a power of two'),
    ({'bn': 'batch'}, "ganomaly.bn='batch': expected one of running, batch1"),
    ({'distance': 'l1'}, "ganomaly.distance='l1': expected one of squared, absolute"),
    ({'latent': 0}, 'ganomaly.filters=32, latent=0: expected at least 1'),
    ({'latent_weight': -1.0}, 'ganomaly.latent_weight=-1.0: expected 0 or more')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    GANomaly(**changes)
