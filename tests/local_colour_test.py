"""The layer without weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import backbones
from patchcore_jax.backbones import local_colour
from patchcore_jax.backbones.local_colour import _COLOUR, _LIGHTNESS, WINDOWS


def _images(h=30, w=44):
  return np.random.default_rng(0).uniform(0.1, 0.9, (2, h, w, 3)).astype(np.float32)


class TestLocalColour:

  @pytest.mark.parametrize('size', [(30, 44), (32, 32), (5, 9)])
  def test_equals_loops_in_float64(self, size):
    images = _images(*size)
    logs = np.log(images.astype(np.float64) + 0.1)
    logs -= logs.mean((1, 2), keepdims=True)
    light = logs.mean(-1, keepdims=True)
    values = np.concatenate([_LIGHTNESS * light, _COLOUR * (logs - light)], -1)
    expected = []
    for window in WINDOWS:
      half = window // 2
      padded = np.pad(values, [(0, 0), (half, half), (half, half), (0, 0)], mode='edge')
      weights = np.ones(window + 1)
      weights[[0, -1]] = 0.5
      weights = np.outer(weights, weights)[..., None] / window**2
      expected.append(np.array([
          [[(padded[i, y:y + window + 1, x:x + window + 1] * weights).sum((0, 1))
            for x in range(0, size[1], 4)] for y in range(0, size[0], 4)] for i in range(2)]))
    found = local_colour.local_colour(jnp.asarray(images))
    np.testing.assert_allclose(found, np.concatenate(expected, -1), atol=2e-6)

  def test_a_lamp_does_not_matter_and_a_stain_does(self):
    images = _images()
    lamp = np.float32([0.8, 0.9, 1.0])
    other = lamp * (images + 0.1) - 0.1
    np.testing.assert_allclose(
        local_colour.local_colour(other), local_colour.local_colour(images), atol=1e-6)
    stained = images.copy()
    stained[:, 10:22, 16:30] *= np.float32([1.0, 0.9, 0.8])
    difference = np.abs(local_colour.local_colour(stained) - local_colour.local_colour(images)).max(-1)
    assert difference[0, 4, 5] > 5 * np.median(difference[0])

  def test_black_and_white(self):
    images = np.zeros((1, 16, 16, 3), np.float32)
    images[:, :, 8:] = 1
    assert np.isfinite(local_colour.local_colour(images)).all()


class TestInABackbone:

  def test_the_network_is_untouched(self):
    with_colour = backbones.create('resnet18', weights='random', layers=('layer1', 'colour'))
    without = backbones.create('resnet18', weights='random', layers=('layer1',))
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 40, 3), np.uint8)
    x = backbones.normalize(images, without.mean, without.std)
    maps = with_colour.apply(with_colour.variables, x)
    np.testing.assert_array_equal(maps['layer1'], without.apply(without.variables, x)['layer1'])
    assert maps['colour'].shape == (1, 8, 10, 8) and maps['layer1'].shape[1:3] == (8, 10)
    np.testing.assert_allclose(
        maps['colour'], local_colour.local_colour(jnp.asarray(images / np.float32(255))), atol=1e-5)
    assert backbones.fingerprint(with_colour.variables) == backbones.fingerprint(without.variables)

  def test_not_alone(self):
    with pytest.raises(ValueError, match='expected a layer of the network too'):
      backbones.create('resnet18', weights='random', layers=('colour',))
