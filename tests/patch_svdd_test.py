"""PatchSVDD: its sizes, codes of whole images and of patches, pairs, and scores against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import PatchSVDD, patch_svdd
from tests import small, trained

SMALL = PatchSVDD(size=96, batch_size=4, width=3, code=5, bank_ratio=1.0)
UNTRAINED = dataclasses.replace(SMALL, steps=0, batch_size=2)
NETWORK = patch_svdd.Network(3, 5)
IMAGES = trained.parts(4, 96)


@pytest.fixture(scope='module')
def model():
  """Fitted on three of the images, without training."""
  return UNTRAINED.fit(ArrayData(IMAGES[:3]), ())


def _params(model):
  params = {}
  for name, array in model.arrays.items():
    if name.startswith('params.'):
      _, *folders, last = name.split('.')
      within = params
      for folder in folders:
        within = within.setdefault(folder, {})
      within[last] = array
  return params


def _convolved(x, layer, stride=1):
  """Computes a convolution without padding in float64, with its bias."""
  kernel = layer['kernel'].astype(np.float64)
  windows = sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
  return np.einsum('bijcyx,yxcf->bijf', windows, kernel) + layer['bias']


def _leaky(x):
  return np.where(x > 0, x, 0.1 * x)


def _codes(params, patches):
  """Encodes patches of either size in float64: [n, code]."""
  if patches.shape[1] == 64:
    quarters = [[_codes(params, patches[:, i:i + 32, j:j + 32]) for j in (0, 32)] for i in (0, 32)]
    x = np.moveaxis(np.array(quarters), 2, 0)
    x = _leaky(_convolved(x, params['head_0']))
    return np.tanh(_convolved(x, params['head_1']))[:, 0, 0]
  for i in range(8):
    patches = _convolved(patches, params['encoder'][f'ConvWithin_{i}'], stride=1 if i else 2)
    patches = _leaky(patches) if i < 7 else np.tanh(patches)
  return patches[:, 0, 0]


def _patches(images, side):
  """Cuts all patches that are scored: [b, m, m, side, side, 3]."""
  step = patch_svdd.STRIDES[side]
  return np.moveaxis(sliding_window_view(images, (side, side), axis=(1, 2))[:, ::step, ::step], 3, 5)


def test_sizes_are_the_authors():
  shapes = patch_svdd.method(PatchSVDD(width=32)).task.init(jax.random.key(0))
  count = {name: sum(leaf.size for leaf in jax.tree.leaves(tree))
           for name, tree in shapes['variables']['params'].items()}
  head = sum(v for name, v in count.items() if name.startswith('head'))
  assert count['encoder'] == 360_832 and count['encoder'] + head == 401_984
  assert sum(v for name, v in count.items() if name.startswith('places')) == 2 * 25_864


class TestCodes:

  def test_of_whole_images_are_those_of_patches(self, model):
    params = _params(model)
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 96, 96, 3)).astype(np.float32)
    with jax.default_matmul_precision('highest'):
      found = jax.jit(NETWORK.apply, static_argnames='method')({'params': params}, images, method='of_images')
    for side, codes in zip((64, 32), found):
      patches = _patches(images, side)
      assert codes.shape[:3] == patches.shape[:3]
      expected = _codes(params, patches.reshape(-1, side, side, 3)[::7])
      np.testing.assert_allclose(np.reshape(codes, (-1, 5))[::7], expected, atol=1e-5)

  def test_of_patches_as_a_step_has_them(self, model):
    params = _params(model)
    rng = np.random.default_rng(0)
    large, little = (rng.uniform(-0.5, 0.5, (3, side, side, 3)).astype(np.float32) for side in (64, 32))
    with jax.default_matmul_precision('highest'):
      found = jax.jit(NETWORK.apply)({'params': params}, large, little)
    np.testing.assert_allclose(found[0], _codes(params, large), atol=1e-5)
    np.testing.assert_allclose(found[1], _codes(params, little), atol=1e-5)


class TestPairs:

  @pytest.mark.parametrize('side', [64, 32])
  def test_neighbours(self, side):
    """In an image so large that few pairs are clipped."""
    keys = jax.random.split(jax.random.key(0), 10_000)
    first, second, direction = jax.jit(jax.vmap(lambda k: patch_svdd.neighbours(k, side, 2000)))(keys)
    inside = ((first > side) & (first < 2000 - 2 * side)).all(axis=1)
    apart = np.array(second - first)[inside]
    signs = np.array(patch_svdd._SIGNS)[np.array(direction)[inside]]
    assert (np.sign(apart) == signs).all() and np.bincount(direction).min() > 1000
    far = np.abs(apart[signs != 0])
    assert far.min() == 3 * side // 4 and far.max() == side - 1

  @pytest.mark.parametrize('side, most', [(64, 2), (32, 1)])
  def test_jittered(self, side, most):
    keys = jax.random.split(jax.random.key(0), 5000)
    first, second = jax.jit(jax.vmap(lambda k: patch_svdd.jittered(k, side, 2000)))(keys)
    moves = np.array(second - first)[np.array((first > 2) & (first < 1900)).all(axis=1)]
    assert np.abs(moves).max() == most and np.abs(moves).max(axis=1).min() == 1
    assert len(np.unique(moves, axis=0)) == (2 * most + 1) ** 2 - 1

  def test_stay_within_the_image(self):
    keys = jax.random.split(jax.random.key(1), 1000)
    corners = jax.jit(jax.vmap(lambda k: patch_svdd.neighbours(k, 64, 96)[:2]))(keys)
    assert min(c.min() for c in corners) == 0 and max(c.max() for c in corners) == 32


class TestScores:

  def test_spread_by_hand(self):
    scores = np.random.default_rng(0).random((2, 13, 13)).astype(np.float32)
    total, covers = np.zeros((2, 256, 256)), np.zeros((256, 256))
    for i in range(13):
      for j in range(13):
        total[:, 16 * i:16 * i + 64, 16 * j:16 * j + 64] += scores[:, i, j, None, None]
        covers[16 * i:16 * i + 64, 16 * j:16 * j + 64] += 1
    assert covers[0, 0] == 1 and covers[128, 128] == 16
    np.testing.assert_allclose(patch_svdd.spread(scores, 64, 256), total / covers, rtol=1e-5)
    np.testing.assert_allclose(patch_svdd.spread(jnp.full((1, 57, 57), 3.0), 32, 256), 3.0, rtol=1e-6)

  def test_equal_float64(self, model):
    params = _params(model)
    mean = IMAGES[:3].mean(axis=0) / 255
    np.testing.assert_allclose(model.arrays['given.mean'], mean, atol=1e-6)
    expected = 1.0
    for side in (64, 32):
      patches = _patches(IMAGES / 255 - mean, side)
      codes = _codes(params, patches.reshape(-1, side, side, 3)).reshape(*patches.shape[:3], 5)
      bank = codes[:3].reshape(-1, 5)
      np.testing.assert_allclose(model.arrays[f'finished.bank{side}'], bank, atol=1e-5)
      distances = np.linalg.norm(codes[3].reshape(-1, 1, 5) - bank, axis=2).min(axis=1)
      expected *= patch_svdd.spread(distances.reshape(1, *codes.shape[1:3]), side, 96)
    found = small.predict(UNTRAINED, model, IMAGES, batch_size=4)
    np.testing.assert_allclose(found.map[3:], expected, rtol=1e-3)
    np.testing.assert_array_equal(found.image, found.map.max(axis=(1, 2)))
    assert found.map[:3].max() < 1e-3 * found.map[3].max()  # of the training images

  def test_bank_is_thinned(self):
    model = dataclasses.replace(UNTRAINED, bank_ratio=0.1).fit(ArrayData(IMAGES), ())
    assert len(model.arrays['finished.bank32']) == round(0.1 * 4 * 17 * 17)


class TestStep:

  def test_classifiers_last_weights_stay(self):
    task = patch_svdd.method(SMALL).task
    start = trained.started(task, 0)
    start['variables']['given'] = {'mean': jnp.zeros((96, 96, 3))}
    before = jax.device_get(start)['variables']['params']
    after, report = jax.jit(task.step)(start, IMAGES, jax.random.key(1))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after['variables']['params'], before)
    for name, tree in moved.items():
      if name.startswith('places'):
        assert not tree.pop('last')
      assert all(jax.tree.leaves(tree)), name
    # Codes of random weights are near each other: no direction is told from another yet.
    assert abs(float(report['loss']) - 2 * np.log(8)) < 0.5 and report['apart_32'] > 0

  def test_equal_patches_have_a_finite_gradient(self):
    task = patch_svdd.method(SMALL).task
    start = trained.started(task, 0)
    start['variables']['given'] = {'mean': jnp.zeros((96, 96, 3))}
    after, _ = jax.jit(task.step)(start, 0 * IMAGES, jax.random.key(1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after['variables']))


@pytest.mark.slow
def test_learns_parts():
  detector = PatchSVDD(size=64, batch_size=16, steps=300, width=8, code=16, learning_rate=1e-3)
  trained.assert_learns(detector, factor=1.1)


@pytest.mark.parametrize('changes, words', [
    ({'size': 48}, 'patch_svdd.size=48: expected at least 64'),
    ({'size': 100}, 'patch_svdd.size=100: expected a multiple of 16'),
    ({'bank_ratio': 0.0}, 'bank_ratio=0.0: expected 0 or more, and more than 0, at most 1'),
    ({'code': 0}, 'patch_svdd.code=0: expected at least 1')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    PatchSVDD(**changes)
