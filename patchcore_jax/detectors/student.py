"""Uninformed students (Bergmann, Fauser, Sattlegger and Steger, "Uninformed Students: Student-Teacher Anomaly
Detection with Discriminative Latent Embeddings", CVPR 2020; arXiv 1911.02357), with a teacher that is
distilled from any network on drawn images.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax.backbones import fingerprint
from patchcore_jax.builtin import procedural
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, computed, descent
from patchcore_jax.detectors.trained_settings import Student
from patchcore_jax.learned import loop, starts, transforms
from patchcore_jax.learned.layers import Dense
from patchcore_jax.learned.patch_cnn import PatchNet, surrounded

_IMAGES, _PATCHES, _GRAY = 256, 32, 0.1  # drawn images, patches of each, and the share of them without colour
_BATCH = 64  # patches of a step of the teacher
_SIDE = 64  # of a patch as the pretrained network sees it, in pixels
_DECAY = 1e-5
_MOST_TEACHERS = 4
_teachers: dict[tuple, dict] = {}  # those of this process, so that categories and folds share one


class Distilled(nn.Module):
  """The teacher, with the dense layer that makes the pretrained network's features of its descriptors.

  Attributes:
    net: the teacher.
    features: numbers of the pretrained network.
  """

  net: PatchNet
  features: int

  @nn.compact
  def __call__(self, patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns descriptors [b, d] and features [b, features] of patches [b, field, field, 3]."""
    descriptors = self.net(patches)[:, 0, 0]
    return descriptors, Dense(self.features)(descriptors)


class Students(nn.Module):
  """Several networks like the teacher, which differ in how they start: images -> [members, b, h, w, d]."""

  net: PatchNet
  members: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.stack([self.net.clone(name=f'student{i}', parent=self)(x) for i in range(self.members)])


def prepared(images: jax.Array, standardise: bool = False) -> jax.Array:
  """Prepares images or patches [..., 3] uint8 for teacher and students."""
  return (transforms.scaled(images, standardise) - 0.5) / 0.25


def compactness(descriptors: jax.Array, of: str) -> jax.Array:
  """Sums the squared correlations of different dimensions over a batch [b, d], or of different samples.

  >>> float(compactness(jnp.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]), 'dimensions'))
  0.0
  """
  x = descriptors if of == 'dimensions' else descriptors.T
  x = x - x.mean(axis=0)
  x /= jnp.sqrt(jnp.square(x).mean(axis=0) + 1e-6)
  return jnp.square(x.T @ x / len(x)).sum() - jnp.square(jnp.square(x).mean(axis=0)).sum()


def drawn_patches(field: int, seed: int, images: int = _IMAGES) -> np.ndarray:
  """Cuts patches [n, field, field, 3] uint8 out of drawn images, whose sides are 4 times the patch's."""
  rng, side = np.random.default_rng((seed, field)), 4 * field
  found = []
  for i in range(images):
    image = procedural.draw(seed, i, side)
    for y, x in rng.integers(0, side - field + 1, (_PATCHES, 2)):
      patch = image[y:y + field, x:x + field]
      gray = np.repeat(np.round(patch.mean(axis=2, keepdims=True)).astype(np.uint8), 3, axis=2)
      found.append(gray if rng.random() < _GRAY else patch)
  return np.stack(found)


def disagreement(students: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the squared error of the students' mean, and the variance among them: [b, h, w] each.

  Args:
    students: [members, b, h, w, d].
    target: [b, h, w, d].

  >>> one = jnp.ones((1, 1, 1, 2))
  >>> [float(x.item()) for x in disagreement(jnp.stack([one, 3 * one]), one)]
  [2.0, 2.0]
  """
  mean = students.mean(axis=0)
  return jnp.square(mean - target).sum(axis=-1), jnp.square(students - mean).sum(axis=-1).mean(axis=0)


def pooled_moments(means: np.ndarray, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Computes mean and deviation of all values from those of parts of equal size, along the first axis."""
  means, variances = means.astype(np.float64), variances.astype(np.float64)
  deviation = np.sqrt(variances.mean(axis=0) + means.var(axis=0))
  return means.mean(axis=0).astype(np.float32), deviation.astype(np.float32)


@functools.lru_cache(maxsize=16)
def distillation(detector: Student, features: int) -> loop.Task:
  """Makes the task that trains the teacher.

  Its examples are {'patch': [b, field, field, 3] uint8, 'target': [b, features]}.
  """
  network = Distilled(_net(detector), features)

  def loss(variables, examples, key, train):
    descriptors, found = network.apply(variables, prepared(examples['patch']))
    error = jnp.square(found - examples['target']).sum(axis=1).mean()
    return error + compactness(descriptors, detector.compactness), {'report': {'error': error}}

  def init(key):
    return starts.variables(network, key, jnp.zeros((1, detector.field, detector.field, 3)))

  return descent(init, loss, lambda: adam(2e-4, decay=_DECAY))[0]


@functools.lru_cache(maxsize=4)
def _targets(maps):
  """Makes the function (network, patches) -> its pooled features, [b, features]."""
  pooled = streaming.pooled_fn(maps)
  return lambda network, patches: jnp.concatenate(pooled(network, transforms.squared(patches, _SIDE)), axis=1)


def _net(detector, dense=False):
  """Makes the network of teacher and students."""
  return PatchNet(detector.field, detector.width, detector.descriptor, dense)


def teacher(detector: Student, maps: Callable, channels: tuple[int, ...], network, run) -> dict:
  """Distils the teacher from a pretrained network on drawn patches; its parameters.

  One that this process has distilled before is given again.
  """
  key = (detector.field, detector.width, detector.descriptor, detector.compactness, detector.teacher_steps,
         fingerprint(network), run.seed)
  if key not in _teachers:
    task, steps = distillation(detector, sum(channels)), detector.teacher_steps
    state = loop.init(task, run.seed)
    if steps:
      patches = drawn_patches(detector.field, run.seed)
      targets = computed(_targets(maps), network, patches)
      targets = (targets - targets.mean(axis=0)) / (targets.std(axis=0) + 1e-6)
      source = loop.Shuffled({'patch': patches, 'target': targets}, run.seed)
      run.notify(f'a teacher is distilled from the network, by {steps} steps of {_BATCH} drawn patches')
      for done in loop.run(task, source, state, batch_size=_BATCH, seed=run.seed, last=steps):
        state = done.state
        run.progress('distil', done.step, steps)
      run.notify(f'teacher: {done.reports[-1]["error"] / sum(channels):.2f} of the features is not explained')
    if len(_teachers) == _MOST_TEACHERS:
      del _teachers[next(iter(_teachers))]
    _teachers[key] = jax.device_get(state['variables']['params']['net'])
  return _teachers[key]


@functools.lru_cache(maxsize=16)
def method(detector: Student, maps: Callable, channels: tuple[int, ...]) -> Method:
  """Makes the method: what is trained, and how it scores."""
  net = _net(detector, detector.dense)
  students = Students(net, detector.students)

  def around(images):
    return surrounded(prepared(images, detector.standardise), detector.field, detector.dense)

  def described(params, images):
    """Computes mean and variance of each image's descriptors: [b, d] each."""
    found = net.apply({'params': params}, around(images))
    return found.mean(axis=(1, 2)), found.var(axis=(1, 2))

  def given(network, images, run):
    params = teacher(detector, maps, channels, network, run)
    mean, deviation = pooled_moments(*computed(described, params, images))
    return {'teacher': params, 'mean': mean, 'deviation': np.where(deviation > 0, deviation, 1)}

  def both(variables, images):
    x, of_teacher = around(images), variables['given']
    target = net.apply({'params': of_teacher['teacher']}, x)
    target = (target - of_teacher['mean']) / of_teacher['deviation']
    return students.apply({'params': variables['params']}, x), target

  def loss(variables, images, key, train):
    found, target = both(variables, images)
    return jnp.square(found - target).sum(axis=(0, -1)).mean() / detector.students, {}

  def spread(variables, images):
    parts = jnp.stack(disagreement(*both(variables, images)), axis=1)
    return parts.mean(axis=(2, 3)), parts.var(axis=(2, 3))

  def finish(variables, images, held):
    mean, deviation = pooled_moments(*computed(spread, variables, held if len(held) else images))
    return {'mean': mean, 'deviation': deviation}

  def score(variables, images):
    maps, (means, deviations) = 0.0, (variables['finished'][name] for name in ('mean', 'deviation'))
    for part, mean, deviation in zip(disagreement(*both(variables, images)), means, deviations, strict=True):
      # One student does not disagree with itself.
      maps += jnp.where(deviation > 0, (part - mean) / jnp.where(deviation > 0, deviation, 1), 0)
    maps = jax.image.resize(maps, images.shape[:3], 'linear')
    return Scores(maps.max(axis=(1, 2)), maps)

  def init(key):
    seen = jax.eval_shape(around, jax.ShapeDtypeStruct((1, detector.size, detector.size, 3), jnp.uint8))
    return starts.variables(students, key, jnp.zeros(seen.shape))

  optimizer = functools.partial(adam, detector.learning_rate, decay=_DECAY)
  return Method(*descent(init, loss, optimizer), score, finish, given=given)
