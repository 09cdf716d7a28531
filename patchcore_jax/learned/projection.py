"""Moves images down the energy that an auto-encoder gives them, until it restores them as they are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Restore = Callable[[jax.Array], jax.Array]


class Projected(NamedTuple):
  """Images that were moved.

  Attributes:
    images: [b, h, w, c] in [0, 1].
    moves: [b] int32, how many steps were tried.
    halvings: [b] int32, how many of them would have raised the energy, so that the rate was halved instead.
  """

  images: jax.Array
  moves: jax.Array
  halvings: jax.Array


def error(restore: Restore, images: jax.Array) -> jax.Array:
  """Computes the squared error with which images are restored, summed over the values of each: [b]."""
  return jnp.square(images - restore(images)).sum(axis=(1, 2, 3))


def energy_and_gradient(
    restore: Restore, images: jax.Array, start: jax.Array, closeness: float, through_network: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes the energy of images, |x - restore(x)|^2 + closeness |x - start|, with the L1 norm last.

  Args:
    restore: [b, h, w, c] -> the same; each image by itself.
    images, start: x, and where they were at first.
    through_network: whether the gradient takes account of how what is restored changes with the image.

  Returns:
    The energy [b], its gradient [b, h, w, c], and x - restore(x) [b, h, w, c].
  """

  def total(x):
    restored = restore(x) if through_network else lax.stop_gradient(restore(x))
    residual = x - restored
    errors = jnp.square(residual).sum(axis=(1, 2, 3))
    return errors.sum(), (errors, residual)  # an image's error has a gradient in that image only

  gradient, (errors, residual) = jax.grad(total, has_aux=True)(images)
  moved = images - start
  # JAX's own gradient of |x| is 1 at 0, where every image begins.
  gradient += closeness * jnp.sign(moved)
  return errors + closeness * jnp.abs(moved).sum(axis=(1, 2, 3)), gradient, residual


def project(
    restore: Restore, start: jax.Array, *, moves: int, rate: float, closeness: float, stop: Any,
    through_network: bool = True) -> Projected:
  """Moves images by x - rate * gradient of the energy * (x - restore(x))^2, within [0, 1].

  The squared residual keeps what is restored well where it is. A step that would raise an image's energy is
  not made: the rate is halved for that image.

  Args:
    restore: see `energy_and_gradient`, as for `closeness` and `through_network`.
    start: [b, h, w, c] in [0, 1].
    moves: the most steps that are tried.
    rate: of the first step.
    stop: images whose `error` is less are moved no more.
  """

  def seen(x):
    energy, gradient, residual = energy_and_gradient(restore, x, start, closeness, through_network)
    squared = jnp.square(residual)
    return _Place(x, energy, gradient * squared, squared.sum(axis=(1, 2, 3)))

  def goes_on(state):
    return (state[0] <= moves) & jnp.any(state[1].error >= stop)

  def move(state):
    tried, here, rates, counts = state
    open_ = here.error >= stop
    there = seen((here.images - _each(rates) * here.direction).clip(0, 1))
    lower = open_ & (there.energy <= here.energy)
    raised = open_ & ~lower
    here = jax.tree.map(lambda new, old: jnp.where(_each(lower, new.ndim), new, old), there, here)
    counts = Projected(here.images, counts.moves + open_, counts.halvings + raised)
    return tried + 1, here, jnp.where(raised, rates / 2, rates), counts

  # The first turn only looks: it goes nowhere, from where nothing is known, so that it is compiled once.
  none, unknown = jnp.zeros(len(start), jnp.int32), jnp.full(len(start), jnp.inf, start.dtype)
  here = _Place(start, unknown, jnp.zeros_like(start), unknown)
  state = (0, here, jnp.full(len(start), rate, start.dtype), Projected(start, none - 1, none))
  return lax.while_loop(goes_on, move, state)[-1]


class _Place(NamedTuple):
  """Holds where images are, with their energy, the direction of the next step, and their error."""

  images: jax.Array
  energy: jax.Array
  direction: jax.Array
  error: jax.Array


def _each(values, ndim=4):
  """Gives values of images, [b], as many axes as arrays of images have."""
  return values.reshape(-1, *(1,) * (ndim - 1))
