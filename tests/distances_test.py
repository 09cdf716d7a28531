"""The definition of a distance rounds alike everywhere, and the bounds on faster ones hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.search import distances

pytestmark = [pytest.mark.accelerator, pytest.mark.as_shipped]


def _points(n, d, seed=0):
  return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


class TestDistancesSq:

  @pytest.mark.parametrize('d', [1, 2, 3, 7, 128, 187])
  def test_rounds_alike_in_any_program(self, d):
    a, b = _points(500, d), _points(500, d, seed=1)
    eager = distances.distances_sq(a.T, b.T)
    np.testing.assert_allclose(
        eager, ((a.astype(np.float64) - b) ** 2).sum(1), rtol=1e-6)
    jitted = jax.jit(distances.distances_sq)
    np.testing.assert_array_equal(jitted(a.T, b.T), eager)
    one_by_one = [jitted(a[i][:, None], b[i][:, None])[0] for i in range(0, 500, 50)]
    np.testing.assert_array_equal(one_by_one, eager[::50])
    fused = jax.jit(lambda a, b: jnp.minimum(distances.distances_sq(a.T, b.T[:, :1]), jnp.inf))
    np.testing.assert_array_equal(fused(a, b), distances.distances_sq(a.T, b.T[:, :1]))


class TestProductError:

  @pytest.mark.parametrize('d, offset', [(8, 0), (128, 0), (128, 30), (1024, 3)])
  def test_holds(self, d, offset):
    a, b = (_points(300, d, seed=s) + np.float32(offset) for s in (0, 1))
    a_sq, b_sq = jnp.square(a).sum(1), jnp.square(b).sum(1)
    by_products = a_sq[:, None] + b_sq - 2 * jnp.dot(a, b.T, precision='highest')
    exact = distances.distances_sq(a.T[:, :, None], b.T[:, None, :])
    bound = distances.product_error(d, jnp.sqrt(a_sq)[:, None], jnp.sqrt(b_sq))
    assert (jnp.abs(by_products - exact) <= bound).all()
    assert bound.max() < 1e-6 * (d + 50) * (a_sq.max() + b_sq.max())  # and is of use


class TestSmallest:

  @pytest.mark.parametrize('shape, count', [((200, 64), 2), ((50, 1024), 5), ((7, 33), 4), ((3, 5), 5)])
  def test_of_each_row(self, shape, count):
    scores = np.random.default_rng(0).integers(0, 900, shape).astype(np.float32)
    values, columns = distances.smallest(jnp.asarray(scores), count)
    np.testing.assert_array_equal(values, np.sort(scores, axis=1)[:, :count])
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(columns), 1), values)
    assert all(len(set(row)) == count for row in np.asarray(columns).tolist())
