"""The training loop: what decides about its result, and what does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.banks.model import BankError
from patchcore_jax.learned import loop
from tests import small

pytestmark = pytest.mark.accelerator

IMAGES = np.random.default_rng(0).integers(0, 255, (7, 4, 4, 3), np.uint8)


def _init(key):
  return {'weights': jax.random.normal(key, (48,)), 'seen': jnp.zeros((), jnp.int32)}


def _step(state, images, key):
  """Fits weights to the brightness of the images, with noise, normalised by the statistics of the batch."""
  x = images.reshape(len(images), -1).astype(state['weights'].dtype) / 255
  x = (x - x.mean(axis=0)) / jnp.sqrt(x.var(axis=0) + 1e-3)

  def loss(weights):
    noisy = x + 0.01 * jax.random.normal(key, x.shape, x.dtype)
    return jnp.square(noisy @ weights - x.mean(axis=1)).mean()

  value, gradient = jax.value_and_grad(loss)(state['weights'])
  return {'weights': state['weights'] - 0.01 * gradient, 'seen': state['seen'] + 1}, {'loss': value}


TASK = loop.Task(_init, _step)


def _run(last=12, first=0, state=None, batch_size=4, task=TASK, **arguments):
  """Runs steps, and returns the state after them and all losses."""
  state, losses = loop.init(task, 0) if state is None else state, []
  for done in loop.run(task, loop.Shuffled(IMAGES, 0), state, batch_size=batch_size, seed=0, first=first,
                       last=last, **arguments):
    losses += [report['loss'] for report in done.reports]
  assert done.step == last
  return jax.device_get(done.state), losses


class TestRun:

  def test_equals_the_steps_by_hand(self):
    state, losses = _run(5)
    expected, step = loop.init(TASK, 0), jax.jit(_step)
    for i in range(5):
      expected, report = step(
          expected, loop.Shuffled(IMAGES, 0).batch(i, 4), jax.random.fold_in(jax.random.key(0), i))
      assert losses[i] == pytest.approx(float(report['loss']), rel=1e-5)
    np.testing.assert_allclose(state['weights'], expected['weights'], rtol=1e-5)
    assert int(state['seen']) == 5

  def test_steps_are_grouped_without_influence(self, monkeypatch):
    straight, losses = _run()
    monkeypatch.setattr(loop._Program, '__init__', functools.partialmethod(_several, 5))
    for seconds in (0.0, 100.0):  # one by one, and as many as fit
      monkeypatch.setattr(loop, '_SECONDS', seconds)
      grouped, told = _run()
      np.testing.assert_allclose(grouped['weights'], straight['weights'], rtol=1e-5)
      np.testing.assert_allclose(told, losses, rtol=1e-5)
    ungrouped, _ = _run(every=1)
    np.testing.assert_array_equal(ungrouped['weights'], grouped['weights'])  # the same program

  def test_tells_at_every_multiple(self):
    state = loop.init(TASK, 0)
    told = [done.step for done in loop.run(
        TASK, loop.Shuffled(IMAGES, 0), state, batch_size=2, seed=0, first=2, last=11, every=4)]
    assert {4, 8, 11} <= set(told)

  def test_a_loss_that_is_no_number_names_its_step(self):
    def step(state, images, key):
      state, report = _step(state, images, key)
      return state, {'loss': jnp.where(state['seen'] > 3, jnp.nan, report['loss'])}

    with pytest.raises(ValueError, match='not finite at step 3 .loss nan.: .* Lower the learning rate'):
      _run(task=loop.Task(_init, step))

  def test_measuring_leaves_the_state(self):
    state = loop.init(TASK, 0)
    assert 0 < loop.seconds_per_step(TASK, loop.Shuffled(IMAGES, 0), state, batch_size=4, seed=0) < 10
    np.testing.assert_array_equal(_run(3, state=state)[0]['weights'], _run(3)[0]['weights'])


def _several(program, most, *arguments):
  """Makes a program of several steps, as accelerators have it."""
  _INIT(program, *arguments)
  program.most = most


_INIT = loop._Program.__init__


def _start():
  return loop.init(TASK, 0)


def losses_in_float64():
  """Computes the losses of 100 steps, which a process with other devices must have too."""
  with jax.enable_x64(True):
    state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64 if x.ndim else x.dtype), _start())
    return np.array(_run(100, state=state)[1])


class TestDevices:

  @pytest.mark.slow
  @pytest.mark.parametrize('count', [2, 4])
  def test_their_number_has_no_influence(self, count):
    np.testing.assert_allclose(
        small.on_devices(count, 'loop_test', 'losses_in_float64()'),
        small.on_devices(1, 'loop_test', 'losses_in_float64()'), rtol=1e-10)

  def test_a_batch_that_cannot_be_split(self, monkeypatch):
    monkeypatch.setattr(jax, 'local_devices', lambda: [jax.devices()[0]] * 3)
    with pytest.raises(ValueError, match='batch_size=4: expected a multiple of the 3 devices'):
      _run()


class TestCheckpoints:

  def test_goes_on_as_if_it_had_not_stopped(self, tmp_path):
    whole, losses = _run()
    kept = loop.Checkpoints(tmp_path / 'states', {'learning_rate': 0.1})
    assert kept.restore(loop.init(TASK, 0))[0] == 0
    for step in (2, 5, 7):
      state, _ = _run(step)
      kept.save(step, state)
    kept.save(7, state)  # there already
    assert kept.steps() == [5, 7]
    step, state = kept.restore(loop.init(TASK, 0))
    resumed, rest = _run(first=step, state=state)
    np.testing.assert_array_equal(resumed['weights'], whole['weights'])
    assert rest == losses[7:]

  def test_of_other_settings(self, tmp_path):
    loop.Checkpoints(tmp_path, {'learning_rate': 0.1}).save(1, loop.init(TASK, 0))
    with pytest.raises(BankError, match='learning_rate'):
      loop.Checkpoints(tmp_path, {'learning_rate': 0.2}).restore(loop.init(TASK, 0))
