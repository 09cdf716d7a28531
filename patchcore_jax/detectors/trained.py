"""What the methods share whose network is trained on the good images: the fit, and how they score.

Each of them has a function `method(detector)` in a module of its own, which makes a `Method`.
"""

import dataclasses
import functools
import hashlib
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax import extras, processes
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import BankError, Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import cross_fitting, streaming
from patchcore_jax.detectors.base import CrossScores, Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.trained_settings import Trained
from patchcore_jax.learned import loop, transforms
from patchcore_jax.settings import SearchSpec

_LOOKS = 20  # at the loss on images that are held out
_SAVE_EVERY = 60.0  # seconds between two checkpoints
_LONG = 3600.0  # seconds
_VARIABLES = 'params', 'batch_stats', 'finished'


class Method(NamedTuple):
  """A method whose network is trained.

  Attributes:
    task: what is trained. The examples of a step are images [b, s, s, 3] uint8; or of a detector that uses
      defects {'image': such, 'label': [b] int32}, 0 for the good ones. Its state is a dict whose 'variables'
      are what scoring needs: a dict with 'params' and perhaps 'batch_stats', dicts as Flax has them.
    loss: (variables, images [b, s, s, 3] uint8, key) -> the loss of images that are not trained on.
    score: (variables, images [b, s, s, 3] uint8) -> `Scores`, the map of the images' size.
    finish: (variables, images [n, s, s, 3] uint8 on the host) -> arrays by name that are computed once the
      network is trained; they are under 'finished' among the variables that score.
  """

  task: loop.Task
  loss: Callable[[Any, Any, jax.Array], jax.Array]
  score: Callable[[Any, jax.Array], Scores]
  finish: Callable[[Any, np.ndarray], dict[str, Any]] = lambda variables, images: {}


def adam(rate: float, **arguments) -> Any:
  """Makes optax's Adam; it needs the extra [train], which scoring does not."""
  with extras.needed_for('Training a network'):
    import optax
  return optax.adam(rate, **arguments)


def moved(optimizer: Any, params: Any, gradients: Any, moments: Any) -> tuple[Any, Any]:
  """Takes a step of an optimiser: returns the new parameters, and its new state."""
  updates, moments = optimizer.update(gradients, moments, params)
  return jax.tree.map(jnp.add, params, updates), moments


def descent(
    init: Callable, loss: Callable, optimizer: Callable[[], Any]) -> tuple[loop.Task, Callable]:
  """Makes the task that minimises one loss, and its loss on images that are held out.

  Args:
    init: key -> variables, a dict with 'params' and perhaps 'batch_stats'.
    loss: (variables, images, key, train) -> (loss, changes), where `changes` are new 'batch_stats', and
      what to report under 'report'; either may be absent.
    optimizer: () -> optax's transformation of gradients.
  """

  def start(key):
    variables = init(key)
    return {'variables': variables, 'optimizer': optimizer().init(variables['params'])}

  def step(state, images, key):
    variables = state['variables']

    def of_params(params):
      return loss({**variables, 'params': params}, images, key, True)

    (value, changes), gradients = jax.value_and_grad(of_params, has_aux=True)(variables['params'])
    params, moments = moved(optimizer(), variables['params'], gradients, state['optimizer'])
    report = changes.pop('report', {})
    variables = {**variables, **changes, 'params': params}
    return {'variables': variables, 'optimizer': moments}, {'loss': value, **report}

  return loop.Task(start, step), lambda variables, images, key: loss(variables, images, key, False)[0]


def fit(detector: Trained, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Trains the network of a method on the images (`Detector.fit`).

  With `run.checkpoints`, the state of the training is kept there about once a minute, and a fit that goes on
  ends with the same weights.

  Returns:
    A `Model` of the network's variables by name, 'steps' () int32, how many steps were made, and 'losses'
    [steps] float32, the loss of each, unless there was none.

  Raises:
    ValueError: fewer images than a step takes, or a loss that is not finite, where the last good state stays
      among the checkpoints.
  """
  images, labels, data_read, image_size = _images(detector, data, run)
  if image_size != images.shape[1:3]:
    sides = ' x '.join(map(str, images.shape[1:3]))
    run.notify(f'the network sees images of {" x ".join(map(str, image_size))} pixels at {sides}; '
               f'{detector.name}.size chooses another')
  images, defects = images[labels == 0], images[labels != 0]
  if not len(images):
    raise ValueError(streaming.NO_IMAGES)
  rng = np.random.default_rng((run.seed, len(images)))
  order = rng.permutation(len(images))
  held = order[:round(detector.held_out * len(images))]
  taken = np.setdiff1d(order, held)
  count = len(taken) + len(defects)
  if count < detector.batch_size:
    beside = f' beside the {len(held)} that are held out' if len(held) else ''
    raise ValueError(
        f'{count} images{beside}: expected at least the {detector.batch_size} that a step of '
        f'{detector.title} takes. Give more, or a smaller {detector.name}.batch_size.')
  examples = images[taken]
  if detector.uses_defects:
    examples = {'image': np.concatenate([examples, defects]),
                'label': np.repeat(np.array([0, 1], np.int32), [len(taken), len(defects)])}
  variables, losses = _trained(detector, examples, images[held], run)
  finished = _method(detector).finish(variables, images)
  arrays = loop.named({**variables, 'finished': finished}) | {'steps': np.array(len(losses), np.int32)}
  if len(losses):  # an array of nothing cannot be stored
    arrays['losses'] = np.array(losses, np.float32)
  return streaming.made(detector, (), arrays, data, data_read, run, image_size=image_size)


def score_fn(
    detector: Trained, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`)."""
  variables: dict[str, Any] = {}
  for name, array in model.arrays.items():
    first, *folders, last = name.split('.') if '.' in name else ('',) * 2
    if first in _VARIABLES:
      within = variables.setdefault(first, {})
      for folder in folders:
        within = within.setdefault(folder, {})
      within[last] = array
  return ScoreFn(_score_fn(detector), (variables,))


def fit_and_cross_score(
    detector: Trained, data: Data, backbones: Sequence[Backbone], run: Run, *, folds: int, search: SearchSpec,
) -> tuple[Model, CrossScores]:
  """Fits, and trains once more for each fold (`Detector.fit_and_cross_score`)."""
  run.notify(f'thresholds take {min(folds, len(data.examples))} more trainings, each about as long')
  return cross_fitting.fit_and_cross_score(detector, data, backbones, run, folds=folds, search=search)


def _method(detector: Trained) -> Method:
  """Imports the module of a method, and makes it: the same where only the course of a fit differs."""
  usual = {name: getattr(type(detector), name) for name in ('batch_size', 'minutes', 'held_out')}
  return importlib.import_module(detector.method).method(dataclasses.replace(detector, **usual))


@functools.lru_cache(maxsize=16)
def _score_fn(detector):
  """Makes the function ((variables,), images) -> `Scores`, whose map has the size of the images."""
  score = _method(detector).score

  def scores(parameters, images):
    with jax.default_matmul_precision('highest'):
      found = score(parameters[0], transforms.squared(images, detector.size))
    if found.map is None or found.map.shape == images.shape[:3]:
      return found
    return found._replace(map=jax.image.resize(found.map, images.shape[:3], 'linear', antialias=False))

  return scores


@functools.lru_cache
def _squared_fn(size):
  """Makes the function that brings images to the size of a network."""
  return lambda parameters, images: transforms.squared(images, size)


def _images(detector, data, run):
  """Reads all images in the network's size: [n, s, s, 3] uint8, labels, what was read, and the size."""
  read, found, done = Recorder(data.batches(), run.keep_images), [], 0
  image_size = None
  for batch, images in streaming.stream(_squared_fn(detector.size), (), read):
    image_size = tuple(batch.image.shape[1:3])
    found.append(images[batch.valid])
    done += len(found[-1])
    run.progress('read', done, len(data.examples))
  if not done:
    raise ValueError(streaming.NO_IMAGES)
  examples = data.examples
  return np.concatenate(found), np.array([examples[i].label for i in read.index]), read, image_size


def _trained(detector, examples, held, run):
  """Trains: returns the variables that are kept, and the loss of every step."""
  if not detector.steps:
    run.notify('no steps: the network stays as it starts')
    return jax.device_get(loop.init(_method(detector).task, run.seed)['variables']), []
  source = loop.Shuffled(examples, run.seed)
  arguments = {'batch_size': detector.batch_size, 'seed': run.seed}
  method, steps = _method(detector), detector.steps
  state = {'training': loop.init(method.task, run.seed), 'losses': np.zeros(steps, np.float32),
           'total': np.array(steps, np.int32), 'best': np.array(np.inf, np.float32)}
  state['kept'] = jax.device_get(state['training']['variables']) if len(held) else {}
  checkpoints = run.checkpoints and loop.Checkpoints(run.checkpoints, _description(detector, examples, run))
  first, state = _restored(checkpoints, state) if checkpoints else (0, state)
  if first:  # with as many steps as were settled then
    state['losses'] = np.array(state['losses'])
    run.notify(f'training goes on after step {first} of {int(state["total"])}')
  else:
    second = loop.seconds_per_step(method.task, source, state['training'], **arguments)
    if detector.minutes:
      steps = max(1, min(steps, int(60 * detector.minutes / second)))
    run.notify(_plan(detector, steps, second))
    state |= {'losses': state['losses'][:steps], 'total': np.array(steps, np.int32)}
  total, saved = int(state['total']), time.monotonic()
  every = -(-total // _LOOKS) if len(held) else 0
  held_out_loss = jax.jit(method.loss)
  for done in loop.run(method.task, source, state['training'], first=first, last=total, every=every,
                       **arguments):
    state['losses'][first:done.step] = [report['loss'] for report in done.reports]
    before, first, state['training'] = first, done.step, done.state
    run.progress('train', first, total)
    if first * 10 // total > before * 10 // total and first < total:
      run.notify(f'step {first} of {total}: loss {state["losses"][before:first].mean():.4g}')
    if every and (first % every == 0 or first == total):
      variables = done.state['variables']
      loss = np.float32(held_out_loss(variables, held, jax.random.key(run.seed)))
      if loss < state['best']:
        state |= {'best': loss, 'kept': jax.device_get(variables)}
    if checkpoints and processes.is_first() and (first == total or time.monotonic() - saved > _SAVE_EVERY):
      checkpoints.save(first, state)
      saved = time.monotonic()
  losses = state['losses']
  run.notify(f'trained {total} steps: loss {losses[0]:.4g} at first, {losses[-1]:.4g} at the end' + (
      f', {float(state["best"]):.4g} at best on {len(held)} images held out' if len(held) else ''))
  return state['kept'] if len(held) else jax.device_get(state['training']['variables']), losses


def _restored(checkpoints, state):
  """Restores the last checkpoint, or says what to do with one of another training."""
  try:
    return checkpoints.restore(state)
  except BankError as e:
    raise ValueError(
        f'{checkpoints.folder} holds a training that cannot be gone on with: remove it, or use the settings '
        f'and images of that training. ({e})') from e


def _description(detector, examples, run):
  """Describes what decides about the weights, so that no other training goes on from them."""
  digest = hashlib.sha256()
  for array in jax.tree.leaves(examples):
    digest.update(np.ascontiguousarray(array))
  return {'detector': detector.name, 'settings': detector.fit_settings(), 'seed': run.seed,
          'images': digest.hexdigest()}


def _plan(detector, steps, second):
  """Tells how long the training takes, and what to do where that is long."""
  seconds = steps * second
  words = f'{steps} steps of {detector.batch_size} images, {second:.2g} s each: about {_told(seconds)}'
  if steps < detector.steps:
    return f'{words} (all {detector.steps} would take {_told(detector.steps * second)})'
  if seconds > _LONG:
    return f'{words} on this machine. Give {detector.name}.minutes for fewer steps, or use a GPU'
  return words


def _told(seconds):
  """Tells a time in words."""
  if seconds < 120:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.0f} minutes' if seconds < 2 * _LONG else f'{seconds / 3600:.1f} hours'
