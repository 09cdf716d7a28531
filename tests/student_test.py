"""Uninformed students: teacher, losses and scores by hand, and that they learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import metrics
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import Run, Student, streaming, student
from patchcore_jax.detectors import trained as trained_methods
from patchcore_jax.learned.patch_cnn import PatchNet
from tests import small, trained

SMALL = Student(size=32, field=17, width=3, descriptor=4, steps=0, teacher_steps=0, batch_size=2)
NETWORK = (small.backbone(),)
IMAGES = trained.parts(6, 32)


@pytest.fixture(scope='module')
def model():
  return dataclasses.replace(SMALL, held_out=0.0).fit(ArrayData(IMAGES), NETWORK)


def _described(model, name, images):
  """Runs one of the networks of a model on images: [b, h, w, d]."""
  variables = trained_methods.variables_of(model)
  params = variables['given']['teacher'] if name == 'teacher' else variables['params'][name]
  x = student.surrounded(student.prepared(jnp.asarray(images)), 17, False)
  with jax.default_matmul_precision('highest'):
    return np.array(jax.jit(PatchNet(17, 3, 4).apply)({'params': params}, x), np.float64)


def test_teacher_is_brought_to_mean_0_and_deviation_1(model):
  found = _described(model, 'teacher', IMAGES).reshape(-1, 4)
  np.testing.assert_allclose(model.arrays['given.mean'], found.mean(axis=0), atol=1e-5)
  np.testing.assert_allclose(model.arrays['given.deviation'], found.std(axis=0), rtol=1e-5)


def test_scores_by_hand(model):
  """Error and disagreement, each in deviations of the good images'."""
  new = np.concatenate([IMAGES, trained.defective(2, 32)[0]])
  target = (_described(model, 'teacher', new) - model.arrays['given.mean']) / model.arrays['given.deviation']
  students = np.stack([_described(model, f'student{i}', new) for i in range(2)])
  error = np.square(students.mean(axis=0) - target).sum(axis=-1)
  spread = np.square(students).sum(axis=-1).mean(axis=0) - np.square(students.mean(axis=0)).sum(axis=-1)
  assert spread.min() >= 0
  expected = sum((part - part[:6].mean()) / part[:6].std() for part in (error, spread))
  found = small.predict(dataclasses.replace(SMALL, held_out=0.0), model, new, network=NETWORK[0])
  np.testing.assert_allclose(found.map, expected, atol=1e-3 * np.abs(expected).max())
  np.testing.assert_array_equal(found.image, found.map.max(axis=(1, 2)))


def test_held_out_images_give_the_scale(model):
  held = IMAGES[4:]
  method = student.method(SMALL, streaming.maps_of(NETWORK[0]), (7, 6, 5))
  variables = trained_methods.variables_of(model)
  found, other = method.finish(variables, IMAGES, held), method.finish(variables, held, IMAGES[:0])
  np.testing.assert_allclose(found['mean'], other['mean'], rtol=1e-5)
  assert np.abs(found['mean'] - variables['finished']['mean']).max() > 1e-4


def test_one_student_does_not_disagree_with_itself():
  detector = dataclasses.replace(SMALL, students=1)
  model = detector.fit(ArrayData(IMAGES), NETWORK)
  assert model.arrays['finished.deviation'][1] == 0
  assert np.isfinite(small.predict(detector, model, IMAGES, network=NETWORK[0]).map).all()


def test_disagreement_of_equal_students():
  target = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 4)))
  error, spread = student.disagreement(jnp.stack([target, target]), target)
  assert not error.any() and not spread.any()


def test_moments_of_parts_are_those_of_all():
  parts = np.random.default_rng(0).normal(3, 2, (5, 40, 2)).astype(np.float32)
  mean, deviation = student.pooled_moments(parts.mean(axis=1), parts.var(axis=1))
  np.testing.assert_allclose(mean, parts.reshape(-1, 2).mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(deviation, parts.reshape(-1, 2).std(axis=0), rtol=1e-5)


def test_compactness():
  values = np.random.default_rng(0).standard_normal((2000, 3)).astype(np.float32)
  assert float(student.compactness(values, 'dimensions')) < 0.02
  double = np.repeat(values, 2, axis=1)  # each dimension beside its equal: 6 pairs
  assert float(student.compactness(double, 'dimensions')) == pytest.approx(6, abs=0.1)
  x = values[:4]
  expected = np.square(np.corrcoef(x)).sum() - 4
  assert float(student.compactness(x, 'samples')) == pytest.approx(expected, rel=1e-3)


class TestTeacher:

  def test_patches(self):
    patches = student.drawn_patches(17, 0, images=4)
    assert patches.shape == (128, 17, 17, 3) and patches.dtype == np.uint8
    gray = (patches == patches[..., :1]).all(axis=(1, 2, 3)).mean()
    assert 0.02 < gray < 0.5
    np.testing.assert_array_equal(student.drawn_patches(17, 0, images=2), patches[:64])

  def test_is_distilled_once_and_learns(self, monkeypatch):
    monkeypatch.setattr(student, '_teachers', {})
    monkeypatch.setattr(student, 'drawn_patches', functools.partial(student.drawn_patches, images=8))
    lines, detector = [], dataclasses.replace(SMALL, teacher_steps=5)
    maps = streaming.maps_of(NETWORK[0])
    arguments = (maps, (7, 6, 5), NETWORK[0].variables, Run(notify=lines.append))
    first = student.teacher(detector, *arguments)
    assert student.teacher(dataclasses.replace(detector, students=3), *arguments) is first
    student.teacher(dataclasses.replace(detector, teacher_steps=300), *arguments)
    assert len(lines) == 4  # two of each teacher
    assert float(lines[3].split()[1]) < float(lines[1].split()[1]) - 0.1, lines  # of the features' variance


@pytest.mark.slow
def test_learns_parts():
  detector = Student(size=64, width=8, descriptor=8, steps=300, learning_rate=2e-3, teacher_steps=300)
  scores = {}
  good, (bad, masks) = trained.parts(16, seed=2), trained.defective(16)
  for steps in (0, 300):
    learned = dataclasses.replace(detector, steps=steps)
    model = learned.fit(ArrayData(trained.parts(64)), NETWORK)
    maps = small.predict(learned, model, np.concatenate([good, bad]), network=NETWORK[0]).map
    scores[steps] = metrics.auroc(np.concatenate([0 * masks, masks]).ravel(), maps.ravel())
  assert scores[300] > 0.9 and scores[300] > scores[0], scores


@pytest.mark.parametrize('changes, words', [
    ({'field': 21}, 'student.field=21: expected 17, 33 or 65'),
    ({'size': 32, 'field': 65}, 'student.size=32: expected at least 40 for a field of 65 pixels'),
    ({'compactness': 'all'}, "student.compactness='all': expected one of dimensions, samples"),
    ({'batch_size': 0}, 'student.batch_size=0: expected at least 1'),
    ({'students': 0}, 'student.students=0: expected at least 1')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    Student(**changes)
