"""The flow: it inverts, its determinant is that of its Jacobian, and it learns a density."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from patchcore_jax.learned import flow


def _started(dim, dtype=np.float32):
  network = flow.Flow(dim, blocks=2, hidden=8)
  shapes, rng = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, dim))), np.random.default_rng(0)
  return network, jax.tree.map(lambda leaf: rng.uniform(-0.7, 0.7, leaf.shape).astype(dtype), shapes)


def test_size_is_the_paper_s():
  variables = jax.eval_shape(flow.Flow(768, hidden=2048).init, jax.random.key(0), jnp.zeros((1, 768)))
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 172_077_056


@pytest.mark.parametrize('dtype, tolerance', [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_inverts(dtype, tolerance):
  with jax.enable_x64(dtype == np.float64), jax.default_matmul_precision('highest'):
    network, variables = _started(7, dtype)
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(dtype)
    z, _ = jax.jit(network.apply)(variables, x)
    assert z.dtype == dtype and np.abs(z - x).max() > 0.5
    back = jax.jit(network.apply, static_argnames='method')(variables, z, method='inverse')
    np.testing.assert_allclose(back, x, atol=tolerance)


def test_determinant_is_the_jacobian_s():
  with jax.enable_x64(True):
    network, variables = _started(8, np.float64)
    x = np.random.default_rng(1).standard_normal((3, 8))
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda v: network.apply(variables, v[None])[0][0])))(x)
    sign, expected = np.linalg.slogdet(jacobians)
    np.testing.assert_allclose(jax.jit(network.apply)(variables, x)[1], expected, rtol=1e-9)
    assert np.abs(expected).min() > 0.1


def test_scales_are_bounded():
  assert float(jnp.abs(flow.bounded(jnp.array([-1e6, 1e6]))).max()) < 3
  assert float(jax.grad(flow.bounded)(0.0)) == pytest.approx(0.636, rel=1e-6)


def test_permutations_are_fixed_bijections():
  assert flow.permutation(0, 5).tolist() == [2, 0, 1, 3, 4]  # of NumPy's legacy generator, for good
  for seed in range(8):
    assert sorted(flow.permutation(seed, 768)) == list(range(768))


def test_learns_a_gaussian():
  """The loss nears the entropy per dimension, but for (log 2 pi) / 2, that is left out of it."""
  dim, rng = 4, np.random.default_rng(0)
  mixing = np.array([[1.0, 0, 0, 0], [0.5, 1, 0, 0], [0, 0.8, 0.5, 0], [0, 0, -0.5, 2]])
  network, variables = _started(dim)
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(variables, moments, x):
    loss, gradients = jax.value_and_grad(
        lambda v: flow.negative_log_likelihood(*network.apply(v, x)).mean())(variables)
    updates, moments = optimizer.update(gradients, moments)
    return optax.apply_updates(variables, updates), moments, loss

  moments, losses = optimizer.init(variables), []
  for _ in range(600):
    x = (rng.standard_normal((256, dim)) @ mixing.T).astype(np.float32)
    variables, moments, loss = step(variables, moments, x)
    losses.append(float(loss))
  expected = 0.5 + np.log(np.linalg.det(mixing)) / dim
  assert abs(np.mean(losses[-50:]) - expected) < 0.05 < losses[0] - expected
