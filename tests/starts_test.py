"""Weights are drawn on the host, from the distributions that their names promise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.learned import starts
from patchcore_jax.learned.layers import Conv, Dense, Norm

KEY = jax.random.key(0)


class Network(nn.Module):
  """Two equal layers, and one that Flax starts."""

  @nn.compact
  def __call__(self, x, train):
    x = Norm(scale_init=starts.NEAR_ONE)(Conv(3)(Conv(3)(x)), train)
    return Dense(2)(x.reshape(len(x), -1))


def _drawn(key=KEY, side=4):
  return starts.variables(Network(), key, jnp.zeros((1, side, side, 3)), False)


def test_a_key_decides():
  one, again, other = _drawn(), _drawn(), _drawn(jax.random.key(1))
  assert jax.tree.all(jax.tree.map(np.array_equal, one, again))
  assert not np.array_equal(one['params']['Conv_0']['kernel'], other['params']['Conv_0']['kernel'])


def test_layers_of_one_shape_differ():
  params = _drawn()['params']
  assert not np.array_equal(params['Conv_0']['kernel'], params['Conv_1']['kernel'])
  assert not np.array_equal(params['Conv_0']['bias'], params['Conv_1']['bias'])


def test_what_flax_starts_stays():
  variables = _drawn()
  norm = variables['params']['Norm_0']['BatchNorm_0']
  assert not norm['bias'].any() and 0 < abs(norm['scale'] - 1).max() < 0.1
  (statistics,) = variables['batch_stats']['Norm_0'].values()
  assert not statistics['mean'].any() and (statistics['var'] == 1).all()


def test_types_and_shapes_are_those_of_the_network():
  variables = _drawn()
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
  assert variables['params']['Dense_0']['kernel'].shape == (48, 2)
  Network().apply(variables, jnp.ones((2, 4, 4, 3)), False)


@pytest.mark.parametrize('init, of_flax', [
    (starts.TORCH, nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')),
    (starts.GLOROT, nn.initializers.xavier_uniform()),
    (starts.HE_UNIFORM, nn.initializers.variance_scaling(2.0, 'fan_in', 'uniform')),
    (starts.HE_NORMAL, nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')),
    (starts.DCGAN, nn.initializers.normal(0.02)),
])
@pytest.mark.parametrize('shape', [(3, 3, 40, 60), (300, 100)])
def test_distributions_are_those_of_flax(init, of_flax, shape):
  found = init(KEY, shape).draw(np.random.default_rng(0), shape)
  expected = of_flax(KEY, shape)
  assert found.mean() == pytest.approx(0, abs=0.02 * found.std())
  assert found.std() == pytest.approx(float(expected.std()), rel=0.02)
  assert abs(found).max() == pytest.approx(float(abs(expected).max()), rel=0.2)


def test_optimizers_start_as_they_do():
  import optax
  params = _drawn()['params']
  found, expected = starts.moments(optax.adam(1.0), params), optax.adam(1.0).init(params)
  assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
