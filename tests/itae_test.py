"""ITAE: what is erased, the network, and scores by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import ITAE, itae
from patchcore_jax.learned import transforms
from tests import small, trained

SMALL = ITAE(size=16, batch_size=4, steps=2, width=2)
IMAGES = trained.parts(6, 16)


@pytest.fixture
def restoring(monkeypatch):
  """Has the network restore images as a function of what it sees; returns the method."""
  def use(fn):
    monkeypatch.setattr(itae.UNet, '__call__', lambda self, x, train: fn(x))
    return itae.method.__wrapped__(SMALL)
  return use


NOTHING = {'params': {}, 'batch_stats': {}}


def test_size_is_the_public_implementation_s():
  shapes = jax.eval_shape(
      lambda key: itae.UNet(64).init(key, jnp.zeros((1, 32, 32, 1)), False)['params'], jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 13_395_840


@pytest.mark.parametrize('length', [2, 5, 16])
def test_doubling_keeps_the_corners(length):
  ramp = jnp.linspace(-1, 2, length)
  x = jnp.broadcast_to(ramp[None, :, None, None], (1, length, 3, 2))
  expected = np.linspace(-1, 2, 2 * length)
  np.testing.assert_allclose(itae.doubled(x)[0, :, 2, 1], expected, atol=1e-6)
  half_pixel = jax.image.resize(ramp, (2 * length,), 'linear')
  assert np.abs(half_pixel - expected).max() > 0.01


def test_erased():
  images = np.random.default_rng(0).integers(0, 8, (4, 6, 6, 1)) / 8
  images = jnp.asarray(np.repeat(images, 3, axis=-1), jnp.float32)
  found = itae.erased(images, jnp.arange(4))
  assert found.shape == (4, 6, 6, 1)
  for k in range(4):  # of equal channels each is the gray, and turned back it is the image
    np.testing.assert_array_equal(np.rot90(found[k, ..., 0], -k), images[k, ..., 0])


def test_what_is_restored_as_it_is_scores_nothing(restoring):
  gray = np.repeat(IMAGES[..., :1], 3, axis=-1)
  gray[:, :, :] = gray[:, :1, :1]  # the same however it is turned
  method = restoring(lambda x: jnp.repeat(x, 3, axis=-1))
  scores = method.score({**NOTHING, 'finished': {'errors': np.ones(4, np.float32)}}, gray)
  np.testing.assert_allclose(scores.image, 0, atol=1e-6)


def test_score_is_the_error_in_units_of_the_training_s(restoring):
  method = restoring(lambda x: jnp.repeat(x, 3, axis=-1))
  variables = {**NOTHING, 'finished': method.finish(NOTHING, IMAGES, IMAGES[:0])}
  x = 2 * (IMAGES / 255) - 1
  errors = np.stack([
      np.abs(np.rot90(x, k, (1, 2)).mean(axis=-1, keepdims=True) - x).mean(axis=-1) for k in range(4)])
  means = errors.mean(axis=(1, 2, 3))
  np.testing.assert_allclose(variables['finished']['errors'], means, rtol=1e-4)
  scores = method.score(variables, IMAGES)
  np.testing.assert_allclose(scores.map, (errors / means[:, None, None, None]).mean(axis=0), rtol=1e-3)
  np.testing.assert_allclose(scores.image, scores.map.mean(axis=(1, 2)), rtol=1e-5)
  assert float(scores.image.mean()) == pytest.approx(1, rel=1e-4)
  held = method.finish(NOTHING, IMAGES[:4], IMAGES[4:])
  np.testing.assert_allclose(held['errors'], errors[:, 4:].mean(axis=(1, 2, 3)), rtol=1e-4)


def test_loss_by_hand(restoring):
  method = restoring(lambda x: jnp.zeros((*x.shape[:3], 3)))
  x = 2 * transforms.scaled(jnp.asarray(IMAGES)) - 1
  found = method.loss({**NOTHING}, IMAGES, jax.random.key(0))
  assert float(found) == pytest.approx(float(jnp.square(x).mean()), rel=1e-5)


@pytest.mark.slow
def test_published_rate_is_halved_at_every_tenth():
  """SGD without momentum: the second step goes half as far, where a tenth of the steps is one."""
  task = itae.method(dataclasses.replace(SMALL, optimizer='sgd', steps=10, learning_rate=0.1)).task
  start = trained.started(task, 0)
  step = jax.jit(task.step)
  moved = []
  for state in (start, {**start, 'optimizer': step(start, IMAGES[:4], jax.random.key(0))[0]['optimizer']}):
    after, _ = step(state, IMAGES[:4], jax.random.key(0))
    moved.append(np.concatenate([
        np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (
            after['variables']['params'], state['variables']['params'])))]))
  np.testing.assert_allclose(moved[1], moved[0] / 2, atol=1e-6)
  assert np.abs(moved[0]).max() > 1e-4


@pytest.mark.slow
def test_learns_parts():
  trained.assert_learns(ITAE(size=32, batch_size=16, steps=200, width=8), factor=4)


@pytest.mark.parametrize('changes, words', [
    ({'size': 40}, 'itae.size=40: expected a multiple of 16'),
    ({'optimizer': 'lion'}, "itae.optimizer='lion': expected one of adam, sgd"),
    ({'optimizer': 'sgd', 'minutes': 1.0}, "with optimizer='sgd' the rate follows the number of steps"),
    ({'width': 0}, 'itae.width=0: expected at least 1')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    ITAE(**changes)


@pytest.mark.slow
def test_learned_model_scores_its_own_images_1_on_the_mean():
  model = SMALL.fit(ArrayData(IMAGES), ())
  assert small.predict(SMALL, model, IMAGES).image.mean() == pytest.approx(1, rel=1e-4)
