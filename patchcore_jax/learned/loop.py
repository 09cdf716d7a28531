"""The training loop of everything here that is trained, and what it keeps so that a killed run goes on.

What is trained says how it starts and what one step does, in pure functions; the images of a step are
those of its number. So a run is repeated by its seed, and goes on from a checkpoint as if it had not stopped.
Several steps are one compiled program, which takes their number as an argument: how they are grouped, which
follows the clock, has no influence on the result.

Convolutions and products have the precision that is the default on a device, which is faster: they decide
about weights, not about anybody's scores.
"""

import dataclasses
import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patchcore_jax.banks import model, store

State = Any  # a pytree of arrays: parameters, statistics of batch norms, the state of optimisers
Report = Mapping[str, Any]  # scalars by name; 'loss' is one of them

_AXIS = 'device'
_MOST_STEPS, _MOST_BYTES = 16, 2**26  # in one program, and of their examples
_SECONDS = 1.0  # that a program may take before the loop tells of it, and listens to Ctrl-C


class Task(NamedTuple):
  """What is trained.

  Attributes:
    init: key -> the state before the first step, made of `starts`; it is not compiled as a whole.
    step: (state, examples, key) -> (state, report). It is the same object for the same settings, so that it
      is compiled once.
  """

  init: Callable[[jax.Array], State]
  step: Callable[[State, jax.Array, jax.Array], tuple[State, Report]]


class Source(Protocol):
  """Provides the examples of each step."""

  def batch(self, step: int, count: int) -> Any:
    """Chooses the examples of a step by its number alone: images [count, h, w, 3] uint8, or a pytree."""


@dataclasses.dataclass(frozen=True)
class Shuffled:
  """Examples in memory, all of them in a new order again and again.

  Attributes:
    examples: images [n, h, w, 3] uint8, or a pytree of arrays [n, ...].
    seed: of the orders.

  >>> source = Shuffled(np.arange(3), seed=0)
  >>> seen = np.concatenate([source.batch(step, 2) for step in range(3)])
  >>> sorted(seen[:3].tolist()), sorted(seen[3:].tolist())
  ([0, 1, 2], [0, 1, 2])
  """

  examples: Any
  seed: int

  def batch(self, step: int, count: int) -> Any:
    """Takes the examples from step * count on, of the endless row of orders."""
    n = len(jax.tree.leaves(self.examples)[0])
    epochs, places = np.divmod(np.arange(step * count, (step + 1) * count), n)
    orders = {e: np.random.default_rng((self.seed, e)).permutation(n) for e in set(epochs.tolist())}
    chosen = np.array([orders[e][i] for e, i in zip(epochs.tolist(), places.tolist())])
    return jax.tree.map(lambda array: array[chosen], self.examples)


class Done(NamedTuple):
  """Tells where the loop is.

  Attributes:
    step: how many steps of the schedule are done.
    state: after them; it is overwritten by the next ones.
    reports: those of the steps since the last time.
  """

  step: int
  state: State
  reports: list[dict[str, float]]


def init(task: Task, seed: int) -> State:
  """Makes the state before the first step."""
  return task.init(jax.random.key(seed))


def run(
    task: Task, source: Source, state: State, *, batch_size: int, seed: int, first: int = 0, last: int,
    every: int = 0) -> Iterator[Done]:
  """Makes the steps `first`, ..., `last` - 1, and tells after every few.

  Examples are split over the local devices, everything else is on each; what a step takes over the batch,
  such as batch norm, is of the whole batch, whatever the number of devices.

  Args:
    task: what is trained.
    source: the examples; it is asked for every step once, in their order.
    state: what `init` made, or what the loop had told after `first` steps. It is not used again here.
    batch_size: examples of a step, over all devices.
    seed: that of everything random within the steps.
    every: also tell at each multiple of this number of steps; 0 for no such.

  Raises:
    ValueError: the batch cannot be split, or the loss is not finite; the message names the step.
  """
  program, most = _Program(task, batch_size, seed), 1

  def sent(step):  # the examples of the steps that come next, and how many steps that are
    count = min(most, last - step, every - step % every if every else last)
    return (program.examples(source, step, count), count) if count else (None, 0)

  state, (examples, count) = program.placed(state), sent(first)
  while count:
    began = time.monotonic()
    state, told = program(state, first, examples, count)
    following = sent(first + count)  # meanwhile
    reports = program.reports(told, first, count)
    most = max(1, min(int(_SECONDS * count / (time.monotonic() - began + 1e-6)), 2 * most, program.most))
    first += count
    yield Done(first, state, reports)
    examples, count = following


def seconds_per_step(task: Task, source: Source, state: State, *, batch_size: int, seed: int) -> float:
  """Measures a step, and compiles what `run` will use; the state stays as it is."""
  program = _Program(task, batch_size, seed)
  examples, times = program.examples(source, 0, 1), []
  for _ in range(3):  # the first compiles
    copy = jax.tree.map(jnp.copy, program.placed(state))
    began = time.monotonic()
    jax.block_until_ready(program(copy, 0, examples, 1))
    times.append(time.monotonic() - began)
  return min(times[1:])


class _Program:
  """Up to `most` steps as one compiled program on all local devices.

  On CPUs it is one: XLA's convolutions inside a loop do without its fast routines there, and take 20 to 60
  times as long (measured with JAX 0.10).
  """

  def __init__(self, task: Task, batch_size: int, seed: int):
    devices = jax.local_devices()
    if batch_size % len(devices):
      raise ValueError(f'batch_size={batch_size}: expected a multiple of the {len(devices)} devices.')
    mesh = Mesh(np.array(devices), (_AXIS,))
    self._everywhere = NamedSharding(mesh, PartitionSpec())
    self._split = NamedSharding(mesh, PartitionSpec(None, _AXIS))
    self._batch_size, self.most = batch_size, 1 if devices[0].platform == 'cpu' else _MOST_STEPS
    self._run = _compiled(task.step, seed, self._everywhere, self._split)

  def placed(self, state):
    """Puts a state on every device."""
    return jax.device_put(state, self._everywhere)

  def examples(self, source, first, count):
    """Sends the examples of some steps, in arrays that have room for as many as the program can take."""
    taken = [source.batch(first + i, self._batch_size) for i in range(count)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(taken[0]))
    self.most = max(1, min(self.most, _MOST_BYTES // size))

    def filled(*leaves):
      room = np.zeros((self.most, *leaves[0].shape), leaves[0].dtype)
      room[:count] = leaves
      return room

    return jax.device_put(jax.tree.map(filled, *taken), self._split)

  def __call__(self, state, first, examples, count):
    return self._run(state, examples, jnp.int32(first), jnp.int32(count))

  @staticmethod
  def reports(told, first, count):
    """Fetches what the steps reported, and checks it."""
    values = {name: np.asarray(v[:count], np.float64).tolist() for name, v in jax.device_get(told).items()}
    reports = [dict(zip(values, row)) for row in zip(*values.values())]
    for step, report in enumerate(reports, first):
      if not np.isfinite(list(report.values())).all():
        wrong = ', '.join(f'{name} {value:.4g}' for name, value in report.items())
        raise ValueError(
            f'The loss is not finite at step {step} ({wrong}): expected numbers. Lower the learning rate.')
    return reports


@functools.lru_cache(maxsize=8)
def _compiled(step, seed, everywhere, split):
  """Compiles the program of `_Program`: (state, examples, first, count) -> (state, reports [most])."""
  batch = NamedSharding(split.mesh, PartitionSpec(_AXIS))

  def run(state, examples, first, count):
    key, most = jax.random.key(seed), len(jax.tree.leaves(examples)[0])

    def one(i, state):
      taken = jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf[i], batch), examples)
      return step(state, taken, jax.random.fold_in(key, first + i))

    if most == 1:
      state, report = one(0, state)
      return state, jax.tree.map(lambda value: value[None], dict(report))

    def and_told(i, carry):
      state, report = one(i, carry[0])
      return state, {name: values.at[i].set(report[name]) for name, values in carry[1].items()}

    told = {name: jnp.zeros(most, value.dtype) for name, value in jax.eval_shape(one, 0, state)[1].items()}
    return lax.fori_loop(0, count, and_told, (state, told))

  return jax.jit(
      run, in_shardings=(everywhere, split, everywhere, everywhere), out_shardings=everywhere,
      donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
  """States of a run on the disk, each in a folder with the number of its step.

  Attributes:
    folder: made if absent.
    description: settings of the run, as JSON has them; a state with others is refused.
    keep: how many stay.
  """

  folder: str | os.PathLike
  description: Mapping[str, Any]
  keep: int = 2

  def steps(self) -> list[int]:
    """Lists the steps after which the state was saved, in their order."""
    folder = Path(self.folder)
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r'\d+', name))

  def save(self, step: int, state: State) -> None:
    """Writes the state after `step` steps, whole or not at all, and removes older ones."""
    path = Path(self.folder) / str(step)
    if path.exists():
      return
    store.save_arrays(path, named(jax.device_get(state)), self.description)
    for old in self.steps()[:-self.keep]:
      shutil.rmtree(Path(self.folder) / str(old))

  def restore(self, like: State) -> tuple[int, State]:
    """Restores the last state: how many steps were done, and it; 0 and `like` where there is none.

    Raises:
      BankError: the state was saved with another description, or is damaged.
    """
    steps = self.steps()
    if not steps:
      return 0, like
    path = Path(self.folder) / str(steps[-1])
    arrays, _ = store.restore_arrays(path, lambda found: model.check(found, self.description, path))
    return steps[-1], unnamed(arrays, like)


def named(tree: Any) -> dict[str, np.ndarray]:
  """Names the arrays of a pytree by their path in it, joined by '.'.

  >>> named({'params': {'kernel': np.ones(2)}})
  {'params.kernel': array([1., 1.])}
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf) for path, leaf in leaves}


def unnamed(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
  """Makes the pytree of the form of `like` from arrays by name."""
  leaves: Sequence[str] = list(named(jax.tree.map(lambda leaf: np.zeros(0), like)))
  return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in leaves])
