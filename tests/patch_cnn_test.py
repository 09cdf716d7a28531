"""Networks of patches: their sizes and receptive fields, and that all ways of running them agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.learned import loop, patch_cnn, starts
from patchcore_jax.learned.patch_cnn import EXTENTS, STRIDES, PatchNet
from tests import trained

FIELDS = (17, 33, 65)


def _started(field):
  """Starts a narrow network: returns the function (variables, images, dense) -> descriptors, and those."""
  net = PatchNet(field, 3, 4)

  def init(key):
    return starts.variables(net, key, jnp.zeros((1, field, field, 2)))

  def run(variables, x, dense=False):
    with jax.default_matmul_precision('highest'):
      return jax.jit(net.clone(dense=dense).apply)(variables, x)

  return run, trained.started(loop.Task(init, None), 0)


@pytest.mark.parametrize('field, count', [(17, 2_996_480), (33, 1_616_000), (65, 2_320_640)])
def test_sizes(field, count):
  shapes = jax.eval_shape(PatchNet(field).init, jax.random.key(0), jnp.zeros((1, field, field, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize('field', FIELDS)
def test_one_patch_has_one_descriptor_of_what_it_extends_to(field):
  run, variables = _started(field)
  x = np.random.default_rng(0).standard_normal((1, field, field, 2)).astype(np.float32)
  assert run(variables, x).shape == (1, 1, 1, 4)
  slope = np.abs(jax.grad(lambda x: jnp.square(run(variables, x)).sum())(x)).sum(axis=(0, 2, 3))
  assert (np.flatnonzero(slope)[[0, -1]] == [0, EXTENTS[field] - 1]).all()


@pytest.mark.parametrize('field', FIELDS)
def test_ways_agree(field):
  """The dense descriptors are those of patches, one by one, and the others every stride-th of them."""
  run, variables = _started(field)
  side = field + 15
  images = np.random.default_rng(1).standard_normal((1, side, side, 2)).astype(np.float32)
  dense = run(variables, images, True)
  assert dense.shape == (1, side - EXTENTS[field] + 1, side - EXTENTS[field] + 1, 4)
  places = np.random.default_rng(2).integers(0, 16, (16, 2))
  patches = np.stack([images[0, y:y + field, x:x + field] for y, x in places])
  expected = run(variables, patches)[:, 0, 0]
  np.testing.assert_allclose(dense[0][tuple(places.T)], expected, atol=1e-5)
  strided = run(variables, images)
  stride = STRIDES[field]
  every = dense[:, ::stride, ::stride][:, :strided.shape[1], :strided.shape[2]]
  np.testing.assert_allclose(strided, every, atol=1e-5)


@pytest.mark.parametrize('field', FIELDS)
@pytest.mark.parametrize('dense', [False, True])
def test_surroundings_give_a_descriptor_for_every_cell(field, dense):
  images, stride = jnp.zeros((1, 64, 64, 2)), 1 if dense else STRIDES[field]
  around = patch_cnn.surrounded(images, field, dense)
  shapes = jax.eval_shape(
      lambda key: PatchNet(field, 3, 4, dense).init_with_output(key, around), jax.random.key(0))[0]
  assert shapes.shape == (1, 64 // stride, 64 // stride, 4)
  # The middle of a patch is that of its cell.
  before = (around.shape[1] - 64) // 2
  assert abs((EXTENTS[field] - stride) / 2 - before) <= 0.5
