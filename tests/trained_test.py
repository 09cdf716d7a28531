"""What all methods share whose network is trained: what a fit does besides training, and what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import patchcore_jax as pc
from patchcore_jax.banks import store
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import DETECTORS, Run, trained
from patchcore_jax.learned import loop
from tests import small
from tests.trained import MeanImage, parts

pytestmark = pytest.mark.accelerator

DETECTOR = MeanImage(size=32, batch_size=4, steps=8)
DATA = ArrayData(parts(10, 32), names=[f'/line/{i}.png' for i in range(10)])


class Killed(Exception):
  """What ends a fit here."""


def _killed_at(step):
  """Makes a progress that ends the fit after a step."""
  def progress(stage, done, total):
    if stage == 'train' and done >= step:
      raise Killed
  return progress


def test_killed_and_gone_on_with_is_as_if_it_had_not_been(tmp_path, monkeypatch):
  monkeypatch.setattr(trained, '_SAVE_EVERY', 0.0)
  monkeypatch.setattr(loop, '_MOST_STEPS', 1)  # in one program, on accelerators too
  for detector in (DETECTOR, dataclasses.replace(DETECTOR, held_out=0.3)):
    folder = tmp_path / str(detector.held_out)
    whole = detector.fit(DATA, ())
    with pytest.raises(Killed):
      detector.fit(DATA, (), Run(progress=_killed_at(6), checkpoints=folder))
    assert loop.Checkpoints(folder, {}).steps()[-1] == 5
    lines = []
    resumed = detector.fit(DATA, (), Run(notify=lines.append, checkpoints=folder))
    assert lines[0] == 'training goes on after step 5 of 8'
    for name, array in whole.arrays.items():
      np.testing.assert_array_equal(resumed.arrays[name], array, err_msg=name)
    with pytest.raises(ValueError, match=r'remove it, or use the settings.*settings\.start'):
      dataclasses.replace(detector, start=0.4).fit(DATA, (), Run(checkpoints=folder))
    with pytest.raises(ValueError, match='remove it.*images: the model has'):
      detector.fit(DATA.part(range(9)), (), Run(checkpoints=folder))


def test_says_at_which_size_the_network_sees_images():
  lines = []
  MeanImage(size=32, batch_size=4, steps=1).fit(ArrayData(parts(4, 48)), (), Run(notify=lines.append))
  assert lines[0] == 'the network sees images of 48 x 48 pixels at 32 x 32; mean_image.size chooses another'


def test_few_steps_where_time_is_short(monkeypatch):
  monkeypatch.setattr(loop, 'seconds_per_step', lambda *_, **__: 12.0)
  lines = []
  model = dataclasses.replace(DETECTOR, minutes=1).fit(DATA, (), Run(notify=lines.append))
  assert int(model.arrays['steps']) == len(model.arrays['losses']) == 5
  assert lines[0] == '5 steps of 4 images, 12 s each: about 60 s (all 8 would take 96 s)'
  # A step count from the clock is repeated by giving it.
  again = dataclasses.replace(DETECTOR, steps=5).fit(DATA, ())
  np.testing.assert_array_equal(again.arrays['losses'], model.arrays['losses'])


def test_an_untrained_network_for_comparison(tmp_path):
  model = dataclasses.replace(DETECTOR, steps=0).fit(DATA, ())
  assert model.arrays['steps'] == 0 and (model.arrays['params.mean'] == 0.5).all()
  store.save(tmp_path / 'model', model)  # of which no array is empty


def test_a_long_training_says_so(monkeypatch):
  monkeypatch.setattr(loop, 'seconds_per_step', lambda *_, **__: 3000.0)
  lines = []
  DETECTOR.fit(DATA, (), Run(notify=lines.append))
  assert lines[0] == ('8 steps of 4 images, 3e+03 s each: about 6.7 hours on this machine. Give '
                      'mean_image.minutes for fewer steps, or use a GPU')


def test_the_weights_with_the_lowest_loss_on_images_held_out():
  method = trained._method(DETECTOR)
  calls = []

  def loss(variables, images, key):
    jax.debug.callback(lambda n: calls.append(int(n)), len(images))
    return jnp.square(variables['count'] - 3.0)

  def step(state, images, key):
    count = state['variables']['count'] + 1
    return {'variables': {'count': count}}, {'loss': 1.0 / count}

  task = loop.Task(lambda key: {'variables': {'count': jnp.zeros(())}}, step)
  variables, losses = trained._trained(
      dataclasses.replace(DETECTOR, held_out=0.3), method._replace(task=task, loss=loss), DATA.images[:7],
      DATA.images[7:], {}, {}, Run())
  assert float(variables['count']) == 3 and len(losses) == 8 and set(calls) == {3}


def test_too_few_images():
  with pytest.raises(ValueError, match='^3 images: expected at least the 4 .*mean_image.batch_size.$'):
    DETECTOR.fit(DATA.part(range(3)), ())
  with pytest.raises(ValueError, match='^3 images beside the 2 that are held out: expected at least the 4'):
    dataclasses.replace(DETECTOR, held_out=0.4).fit(DATA.part(range(5)), ())


def test_a_loss_that_is_no_number(tmp_path, monkeypatch):
  monkeypatch.setattr(trained, '_SAVE_EVERY', 0.0)
  monkeypatch.setattr(loop, '_MOST_STEPS', 1)  # in one program, on accelerators too
  method = trained._method(DETECTOR)

  def init(key):
    return {**method.task.init(key), 'count': jnp.zeros((), jnp.int32)}

  def step(state, images, key):
    count = state.pop('count')
    state, report = method.task.step(state, images, key)
    return {**state, 'count': count + 1}, {'loss': jnp.where(count < 5, report['loss'], jnp.nan)}

  monkeypatch.setattr(trained, '_method', lambda *_: method._replace(task=loop.Task(init, step)))
  with pytest.raises(ValueError, match=r'^The loss is not finite at step 5 .*[^\n]$'):
    DETECTOR.fit(DATA, (), Run(checkpoints=tmp_path))
  assert loop.Checkpoints(tmp_path, {}).steps() == [4, 5]  # the last good ones


def test_the_face_takes_no_network(monkeypatch):
  monkeypatch.setitem(DETECTORS, 'mean_image', 'tests.trained:MeanImage')
  inspector = pc.fit(parts(6, 32), detector=DETECTOR, false_alarm_rate=None)
  assert inspector.backbones == () and 'Mean image, no network' in inspector.about()
  assert inspector.inspect(parts(1, 32)[0]).score >= 0
  with pytest.raises(ValueError, match='Mean image takes no network: expected no backbone'):
    pc.fit(parts(6, 32), detector=DETECTOR, backbone=small.backbone())
  with pytest.raises(ValueError, match='Mean image has no ensembles'):
    pc.Ensemble(DETECTOR)
