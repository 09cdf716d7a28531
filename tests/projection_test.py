"""Images that are moved down their energy, with auto-encoders whose gradients are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.detectors.gamma_vae import Network
from patchcore_jax.learned import projection, starts
from tests import trained


def mean_of_each(x):
  """Restores an image by the mean of its values: a linear, orthogonal projection."""
  return jnp.broadcast_to(x.mean(axis=(1, 2, 3), keepdims=True), x.shape)


def half(x):
  return x / 2


def images(n=3, seed=0):
  return jnp.asarray(np.random.default_rng(seed).uniform(0.2, 0.8, (n, 4, 4, 3)), jnp.float32)


project = functools.partial(projection.project, moves=20, rate=0.5, closeness=0.0, stop=0.0)


class TestGradient:

  @pytest.mark.parametrize('through_network', [True, False])
  def test_of_an_orthogonal_projection_is_twice_the_residual(self, through_network):
    x = images()
    energy, gradient, residual = projection.energy_and_gradient(mean_of_each, x, x, 0.0, through_network)
    np.testing.assert_allclose(residual, x - mean_of_each(x), atol=1e-7)
    np.testing.assert_allclose(gradient, 2 * residual, atol=1e-6)
    np.testing.assert_allclose(energy, (residual ** 2).sum(axis=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(energy, projection.error(mean_of_each, x), rtol=1e-6)

  def test_through_the_network_and_not_differ_elsewhere(self):
    y = images()
    for through_network, expected in ((True, y / 2), (False, y)):
      _, gradient, _ = projection.energy_and_gradient(half, y, y, 0.0, through_network)
      np.testing.assert_allclose(gradient, expected, rtol=1e-6)

  def test_closeness_pulls_towards_the_start_and_not_at_it(self):
    x, start = images(), images(seed=1)
    plain, close = (projection.energy_and_gradient(half, x, start, weight) for weight in (0.0, 0.3))
    np.testing.assert_allclose(close[1] - plain[1], 0.3 * np.sign(x - start), atol=1e-6)
    np.testing.assert_allclose(close[0] - plain[0], 0.3 * abs(x - start).sum(axis=(1, 2, 3)), rtol=1e-4)
    plain, close = (projection.energy_and_gradient(half, x, x, weight) for weight in (0.0, 0.3))
    np.testing.assert_array_equal(close[1], plain[1])  # nothing pulls at the start itself


class TestProjection:

  def test_one_step_by_hand(self):
    x = jnp.array([0.2, 0.4, 0.9]).reshape(1, 1, 1, 3)  # the mean is 0.5
    moved = project(mean_of_each, x, moves=1)
    expected = [0.2 + 0.3 ** 3, 0.4 + 0.1 ** 3, 0.9 - 0.4 ** 3]  # 0.5 * 2 * residual ** 3
    np.testing.assert_allclose(moved.images.ravel(), expected, rtol=1e-6)
    assert (moved.moves.tolist(), moved.halvings.tolist()) == ([1], [0])

  def test_what_is_restored_as_it_is_stays(self):
    x = jnp.full((2, 4, 4, 3), 0.25)
    np.testing.assert_array_equal(project(mean_of_each, x).images, x)
    assert (abs(project(mean_of_each, images()).images - images()) > 0).all()  # and nothing else does

  def test_the_first_step_does_not_depend_on_closeness(self):
    first, other = (project(half, images(), moves=1, closeness=weight).images for weight in (0.0, 0.05))
    np.testing.assert_array_equal(first, other)
    first, other = (project(half, images(), moves=9, closeness=weight).images for weight in (0.0, 0.05))
    assert (abs(other - images()) < abs(first - images())).all()

  @pytest.mark.slow
  def test_energy_never_rises(self):
    network = Network(16, 4)
    x = jnp.asarray(trained.parts(20, 16) / 255, jnp.float32)
    variables = starts.variables(network, jax.random.key(0), x, jax.random.key(1))
    restore = functools.partial(network.apply, variables, method='restored')

    @jax.jit
    def energy(moves, rate):
      moved = project(restore, x, moves=moves, rate=rate, closeness=0.05)
      errors = projection.error(restore, moved.images)
      return errors + 0.05 * abs(moved.images - x).sum(axis=(1, 2, 3)), moved.halvings

    small, halved = zip(*(energy(moves, 0.1) for moves in (0, 1, 2, 5)))
    assert (np.diff(small, axis=0) < 0).all() and not halved[-1].any()
    large, halved = zip(*(energy(moves, 300.0) for moves in (0, 1, 2, 5)))
    assert (np.diff(large, axis=0) <= 0).all() and halved[-1].all() and halved[-1].max() <= 5

  def test_finished_images_are_moved_no_more(self):
    x = jnp.stack([jnp.full((4, 4, 3), 0.5), images(1)[0]]).at[0, 0, 0, 0].set(0.6)
    stop = 2 * projection.error(mean_of_each, x)[0]
    moved = project(mean_of_each, x, stop=stop)
    np.testing.assert_array_equal(moved.images[0], x[0])
    assert moved.moves[0] == 0 and 0 < moved.moves[1] <= 20
    alone = project(mean_of_each, x[1:], stop=stop)
    np.testing.assert_allclose(moved.images[1:], alone.images, atol=1e-6)
    # One that gets there stays where it was first below.
    stop = 0.5 * projection.error(mean_of_each, x)[1]
    fewer, more = (project(mean_of_each, x, stop=stop, moves=moves, rate=2.0) for moves in (30, 60))
    assert fewer.moves[1] < 30 and projection.error(mean_of_each, fewer.images)[1] < stop
    np.testing.assert_array_equal(fewer.images, more.images)

  def test_stays_in_range(self):
    moved = project(lambda x: 5 * (x - 0.5), images(), rate=50.0, through_network=False)
    assert moved.images.min() >= 0 and moved.images.max() <= 1
