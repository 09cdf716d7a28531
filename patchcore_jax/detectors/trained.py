"""What the methods share whose network is trained on the good images: the fit, and how they score.

Each of them has a function `method(detector)` in a module of its own, which makes a `Method`; where it stands
on a pretrained network, `method(detector, maps, channels)`, with what `streaming.maps_of` makes of that, and
the number of channels of each map.
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

from patchcore_jax import extras, parallel, processes
from patchcore_jax.backbones import Backbone, fingerprint
from patchcore_jax.banks.model import BankError, Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import cross_fitting, streaming
from patchcore_jax.detectors.base import CrossScores, Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.trained_settings import Trained
from patchcore_jax.learned import loop, starts, transforms
from patchcore_jax.settings import SearchSpec

_LOOKS = 20  # at the loss on images that are held out
_SAVE_EVERY = 60.0  # seconds between two checkpoints
_LONG = 3600.0  # seconds
_VARIABLES = 'params', 'batch_stats', 'given', 'finished'


class Method(NamedTuple):
  """A method whose network is trained.

  Attributes:
    task: what is trained. The examples of a step are images [b, s, s, 3] uint8; or of a detector that uses
      defects {'image': such, 'label': [b] int32}, 0 for the good ones. Its state is a dict whose 'variables'
      are what scoring needs: a dict with 'params' and perhaps 'batch_stats', dicts as Flax has them.
    loss: (variables, images [b, s, s, 3] uint8, key) -> the loss of images that are not trained on.
    score: (variables, images [b, s, s, 3] uint8) -> `Scores`, the map of the images' size.
    finish: (variables, images [n, s, s, 3] uint8 on the host, those of them that are held out) -> arrays by
      name that are computed once the network is trained; they are under 'finished' among the variables that
      score.
    examples: (network, images on the host, run) -> what steps see in place of the good images, a pytree of
      arrays [n, ...]. The network is the variables of the pretrained one, or None.
    given: (network, examples that are trained on, run) -> a pytree of arrays that are known before the
      training; they are under 'given' among the variables, in steps too.
    network_scores: whether scoring needs the pretrained network, which is then under 'network' among the
      variables; of `finish` too.
  """

  task: loop.Task
  loss: Callable[[Any, Any, jax.Array], jax.Array]
  score: Callable[[Any, jax.Array], Scores]
  finish: Callable[[Any, np.ndarray, np.ndarray], dict[str, Any]] = lambda variables, images, held: {}
  examples: Callable[[Any, np.ndarray, Run], Any] = lambda network, images, run: images
  given: Callable[[Any, Any, Run], Any] = lambda network, examples, run: {}
  network_scores: bool = False


def adam(rate: float, *, decay: float = 0.0, **arguments) -> Any:
  """Makes optax's Adam; it needs the extra [train], which scoring does not.

  Args:
    decay: how much of the weights is added to their gradients before Adam sees these, as PyTorch's
      `weight_decay` has it.
  """
  with extras.needed_for('Training a network'):
    import optax
  moments = optax.adam(rate, **arguments)
  return optax.chain(optax.add_decayed_weights(decay), moments) if decay else moments


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
    return {'variables': variables, 'optimizer': starts.moments(optimizer(), variables['params'])}

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


def computed(fn: Callable, variables: Any, examples: Any, at_once: int = 32) -> Any:
  """Computes `fn` of many examples, some at a time, at the highest precision.

  Args:
    fn: (variables, examples [b, ...]) -> a pytree of arrays [b, ...]. It is compiled once where it is the
      same object again.
    examples: a pytree of arrays [n, ...] on the host.
    at_once: how many `fn` is called with.

  Returns:
    The results [n, ...] on the host.
  """
  number = len(jax.tree.leaves(examples)[0])
  groups = np.resize(np.arange(number), (-(-number // at_once), min(number, at_once)))
  run, variables, found = jax.jit(fn), jax.device_put(variables), []
  with jax.default_matmul_precision('highest'):
    for at in groups:
      found.append(run(variables, jax.tree.map(lambda a, at=at: a[at], examples)))
      parallel.fetch(found[-1])
      found[-2:-1] = jax.device_get(found[-2:-1])  # while the next are computed
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:number], *jax.device_get(found))


def fit(detector: Trained, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Trains the network of a method on the images (`Detector.fit`).

  With `run.checkpoints`, the state of the training is kept there about once a minute, and a fit that goes on
  ends with the same weights.

  Returns:
    A `Model` of the trained network's variables by name, 'steps' () int32, how many steps were made, and
    'losses' [steps] float32, the loss of each, unless there was none.

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
  method = _method(detector, *_maps(detector, backbones))
  network = backbones[0].variables if backbones else None
  examples = method.examples(network, images, run)
  examples, others = (jax.tree.map(lambda a, at=at: a[at], examples) for at in (taken, held))
  given = method.given(network, examples, run)
  if detector.uses_defects:
    examples = {'image': np.concatenate([examples, defects]),
                'label': np.repeat(np.array([0, 1], np.int32), [len(taken), len(defects)])}
  description = _description(detector, (images[taken], defects), backbones, run)
  variables, losses = _trained(detector, method, examples, others, given, description, run)
  finished = method.finish(_with_network(variables, method, backbones), images, images[held])
  arrays = loop.named({**variables, 'finished': finished}) | {'steps': np.array(len(losses), np.int32)}
  if len(losses):  # an array of nothing cannot be stored
    arrays['losses'] = np.array(losses, np.float32)
  return streaming.made(detector, tuple(backbones), arrays, data, data_read, run, image_size=image_size)


def score_fn(
    detector: Trained, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`)."""
  maps = _maps(detector, backbones)
  variables = _with_network(variables_of(model), _method(detector, *maps), backbones)
  return ScoreFn(_score_fn(detector, *maps), (variables,))


def variables_of(model: Model) -> dict[str, Any]:
  """Collects the variables of a trained network from the arrays of a model."""
  variables: dict[str, Any] = {}
  for name, array in model.arrays.items():
    first, *folders, last = name.split('.') if '.' in name else ('',) * 2
    if first in _VARIABLES:
      within = variables.setdefault(first, {})
      for folder in folders:
        within = within.setdefault(folder, {})
      within[last] = array
  return variables


def fit_and_cross_score(
    detector: Trained, data: Data, backbones: Sequence[Backbone], run: Run, *, folds: int, search: SearchSpec,
) -> tuple[Model, CrossScores]:
  """Fits, and trains once more for each fold (`Detector.fit_and_cross_score`)."""
  run.notify(f'thresholds take {min(folds, len(data.examples))} more trainings, each about as long')
  return cross_fitting.fit_and_cross_score(detector, data, backbones, run, folds=folds, search=search)


def _maps(detector, backbones):
  """Makes the function of `streaming.maps_of`, and counts the channels of each map; () without a network."""
  if not backbones:
    return ()
  (backbone,) = backbones
  maps = streaming.maps_of(backbone)
  images = jax.ShapeDtypeStruct((1, detector.size, detector.size, 3), np.uint8)
  return maps, tuple(found.shape[-1] for found in jax.eval_shape(maps, backbone.variables, images))


def _with_network(variables, method, backbones):
  """Adds the variables of the pretrained network, where scoring needs them."""
  return variables | {'network': backbones[0].variables} if method.network_scores else variables


def _method(detector: Trained, *maps: Any) -> Method:
  """Imports the module of a method, and makes it: the same where only the course of a fit differs."""
  usual = {name: getattr(type(detector), name) for name in ('batch_size', 'minutes', 'held_out')}
  return importlib.import_module(detector.method).method(dataclasses.replace(detector, **usual), *maps)


@functools.lru_cache(maxsize=16)
def _score_fn(detector, *maps):
  """Makes the function ((variables,), images) -> `Scores`."""
  return of_any_size(_method(detector, *maps).score, detector.size)


def of_any_size(score: Callable, size: int) -> Callable:
  """Makes, from `Method.score`, the function of a `ScoreFn`, of images [b, h, w, 3] of any size.

  Args:
    size: of the images that the network sees.
  """

  def scores(parameters, images):
    with jax.default_matmul_precision('highest'):
      found = score(parameters[0], transforms.squared(images, size))
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


def _trained(detector, method, examples, held, given, description, run):
  """Trains: returns the variables that are kept, and the loss of every step."""
  start = loop.init(method.task, run.seed)
  if given:
    start['variables'] = {**start['variables'], 'given': given}
  if not detector.steps:
    run.notify('no steps: the network stays as it starts')
    return jax.device_get(start['variables']), []
  source = loop.Shuffled(examples, run.seed)
  arguments = {'batch_size': detector.batch_size, 'seed': run.seed}
  steps, count = detector.steps, len(jax.tree.leaves(held)[0])
  state = {'training': start, 'losses': np.zeros(steps, np.float32),
           'total': np.array(steps, np.int32), 'best': np.array(np.inf, np.float32)}
  state['kept'] = jax.device_get(state['training']['variables']) if count else {}
  checkpoints = run.checkpoints and loop.Checkpoints(run.checkpoints, description)
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
  every = -(-total // _LOOKS) if count else 0
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
      f', {float(state["best"]):.4g} at best on {count} images held out' if count else ''))
  return state['kept'] if count else jax.device_get(state['training']['variables']), losses


def _restored(checkpoints, state):
  """Restores the last checkpoint, or says what to do with one of another training."""
  try:
    return checkpoints.restore(state)
  except BankError as e:
    raise ValueError(
        f'{checkpoints.folder} holds a training that cannot be gone on with: remove it, or use the settings '
        f'and images of that training. ({e})') from e


def _description(detector, images, backbones, run):
  """Describes what decides about the weights, so that no other training goes on from them."""
  digest = hashlib.sha256()
  for array in images:
    digest.update(np.ascontiguousarray(array))
  return {'detector': detector.name, 'settings': detector.fit_settings(), 'seed': run.seed,
          'images': digest.hexdigest(), 'backbones': [fingerprint(b.variables) for b in backbones]}


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
