"""The parts that trained networks are made of, against other implementations and by hand."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import ndimage

from patchcore_jax.learned import layers, ssim, starts, tiles, transforms

pytestmark = pytest.mark.as_shipped


def _random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.accelerator
class TestConvolutions:

  @pytest.fixture(autouse=True)
  def in_float32(self):
    with jax.default_matmul_precision('highest'):
      yield

  @pytest.mark.parametrize('size, before', [(4, 1), (3, 0), (3, 1), (2, 0)])
  def test_by_two(self, size, before):
    x, kernel = _random(2, 12, 8, 5), _random(size, size, 5, 6, seed=1)
    after = max(0, 2 * (6 - 1) + size - before - 12)  # a last column may go unused, as in PyTorch
    expected = lax.conv_general_dilated(
        x, kernel, (2, 2), ((before, after),) * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(layers.convolve_by_two(x, kernel, before), expected, atol=1e-4)
    library = layers._library(x, kernel, 2, (before, size - 2 - before))  # what accelerators do
    np.testing.assert_allclose(library, expected, atol=1e-4)

  def test_to_double(self):
    x, kernel = _random(2, 6, 4, 5), _random(4, 4, 5, 3, seed=1)
    expected = lax.conv_transpose(x, kernel, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(layers.convolve_to_double(x, kernel), expected, atol=1e-4)

  def test_gradients_are_the_library_s(self):
    x, kernel = _random(1, 8, 8, 2), _random(4, 4, 2, 3, seed=1)
    weights = _random(1, 4, 4, 3, seed=2)
    found = jax.grad(lambda *a: (layers.convolve_by_two(*a, 1) * weights).sum(), (0, 1))(x, kernel)
    expected = jax.grad(lambda *a: (layers._library(*a, 2) * weights).sum(), (0, 1))(x, kernel)
    for one, other in zip(found, expected):
      np.testing.assert_allclose(one, other, atol=1e-4)

  @pytest.mark.parametrize('size, stride', [(1, 1), (1, 2), (3, 1), (3, 2), (4, 2)])
  def test_layers_are_flax_s(self, size, stride):
    x = _random(2, 8, 8, 3)
    layer = layers.Conv(4, size, stride)
    variables = starts.variables(layer, jax.random.key(0), x)
    bound = (size * size * 3) ** -0.5  # PyTorch's default, of kernels and of biases
    assert 0.5 * bound < max(float(jnp.abs(v).max()) for v in variables['params'].values()) <= bound
    padding = 0 if size == 1 else ((1, 1), (1, 1))
    expected = nn.Conv(4, (size, size), stride, padding).apply(variables, x)
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)

  def test_residual_parts_have_their_sizes(self):
    def shapes(module, x):
      return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, True), x)

    x = jnp.zeros((2, 32, 32, 3))
    maps, _ = shapes(layers.Encoder((4, 8, 8)), x)
    assert [m.shape for m in maps] == [(2, 16, 16, 4), (2, 8, 8, 8), (2, 4, 4, 8)]
    images, _ = shapes(layers.Decoder((8, 4, 4)), maps[-1])
    assert images.shape == x.shape
    features, variables = shapes(layers.Discriminator((4, 8, 8)), x)
    assert features.shape == (2, 4, 4, 8) and len(variables['batch_stats']) == 2  # none in the first layer


class TestSimilarity:

  def test_of_equal_images_and_both_ways(self):
    x, y = (jax.random.uniform(jax.random.key(i), (2, 20, 24, 3)) for i in range(2))
    np.testing.assert_allclose(ssim.similarity(x, x), 1, atol=1e-5)
    np.testing.assert_allclose(ssim.similarity(x, y), ssim.similarity(y, x), atol=1e-6)

  @pytest.mark.parametrize('constants', ['squared', 'as_written'])
  def test_of_two_constants_by_hand(self, constants):
    a, b, c = 0.3, 0.8, ssim.CONSTANTS[constants][0]
    found = ssim.similarity(jnp.full((1, 11, 11, 1), a), jnp.full((1, 11, 11, 1), b), constants=constants)
    assert float(found[0, 0, 0, 0]) == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=2e-4)

  @pytest.mark.parametrize('sigma', [1.5, 0.0])
  def test_equals_float64_by_definition(self, sigma):
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (18, 20))
    y = (x + 0.2 * rng.standard_normal(x.shape)).clip(0, 1)
    if sigma:  # scikit-image's Gaussian of 11 pixels, which it cuts at 3.5 deviations
      averaged = functools.partial(ndimage.gaussian_filter, sigma=sigma, truncate=3.5)
    else:
      averaged = functools.partial(ndimage.uniform_filter, size=11)
    mx, my = averaged(x), averaged(y)
    vx, vy, vxy = averaged(x * x) - mx * mx, averaged(y * y) - my * my, averaged(x * y) - mx * my
    c1, c2 = 1e-4, 9e-4
    expected = ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))[5:-5, 5:-5]
    found = ssim.similarity(*(jnp.asarray(v, jnp.float32)[None, :, :, None] for v in (x, y)), sigma=sigma)
    np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-6)

  def test_gradient_against_differences(self):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      x, y = (jnp.asarray(rng.uniform(0, 1, (1, 12, 12, 1))) for _ in range(2))
      gradient = jax.grad(lambda y: ssim.similarity(x, y).mean())(y)
      for at in ((0, 3, 4, 0), (0, 11, 0, 0)):
        step = jnp.zeros_like(y).at[at].set(1e-4)
        slope = (ssim.similarity(x, y + step).mean() - ssim.similarity(x, y - step).mean()) / 2e-4
        assert float(gradient[at]) == pytest.approx(float(slope), rel=1e-4)

  def test_a_map_has_the_size_of_the_image(self):
    x, y = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3)).at[0, :, 8:].set(1)
    found = ssim.dissimilarity_map(x, y)
    assert found.shape == (1, 16, 16)
    np.testing.assert_array_equal(found[0, 0], found[0, 5])  # that of the nearest whole window
    assert float(found[0, 8, 15]) > 0.5 and bool((found >= 0).all())


class TestTiles:

  @pytest.mark.parametrize('size, stride', [(8, 3), (8, 8), (12, 1)])
  def test_covers_as_counted_by_force(self, size, stride):
    places = tiles.starts(20, size, stride)
    covers = np.zeros((20, 20))
    for y, x in itertools.product(places, places):
      covers[y:y + size, x:x + size] += 1
    assert covers.min() >= 1
    image = _random(2, 20, 20, 3)
    found = tiles.blended(image, size, stride, lambda tile: tile)
    np.testing.assert_allclose(found, image, atol=1e-5)
    ones = tiles.blended(image, size, stride, lambda tile: jnp.ones((*tile.shape[:3], 1)))
    np.testing.assert_allclose(ones, 1, atol=1e-6)

  def test_the_mean_of_what_covers_a_pixel(self):
    image = jnp.arange(12.0).reshape(1, 1, 12, 1).repeat(8, 1)
    image = jnp.pad(image, ((0, 0), (0, 4), (0, 0), (0, 0)))
    firsts = tiles.blended(image, 8, 4, lambda tile: jnp.broadcast_to(tile[:, :1, :1], tile.shape))
    np.testing.assert_allclose(firsts[0, 0, [0, 4, 8], 0], [0, 2, 4])  # tiles begin at 0 and 4


class TestTransforms:

  def test_sizes(self):
    image = np.random.default_rng(0).integers(0, 255, (2, 8, 6, 3), np.uint8)
    assert transforms.squared(image, 4).shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(transforms.squared(image[:, :6], 6), image[:, :6])
    assert (transforms.squared(np.full((1, 8, 6, 3), 7, np.uint8), 16) == 7).all()

  def test_standardised_images_tell_no_brightness(self):
    image = np.random.default_rng(0).integers(60, 120, (1, 8, 8, 3), np.uint8)
    plain, brighter = (transforms.scaled(x, True) for x in (image, image + 40))
    np.testing.assert_allclose(plain, brighter, atol=1e-4)
    assert float(plain.mean()) == pytest.approx(0.5, abs=0.01)
    assert (transforms.scaled(np.full((1, 4, 4, 3), 9, np.uint8), True) == 0.5).all()

  def test_rotation(self):
    image = _random(1, 7, 7, 2)
    for quarter in range(4):
      found = transforms.rotated(image, jnp.array([quarter * jnp.pi / 2]))
      np.testing.assert_allclose(found, jnp.rot90(image, quarter, axes=(1, 2)), atol=1e-4)

  def test_augmented(self):
    image = jnp.broadcast_to(_random(1, 6, 6, 1), (200, 6, 6, 1))
    np.testing.assert_array_equal(transforms.augmented(image, jax.random.key(0)), image)
    for flip, count in (('horizontal', 2), ('both', 4)):
      found = np.asarray(transforms.augmented(image, jax.random.key(0), flip=flip))
      kinds = {one.tobytes(): (found == one).all((1, 2, 3)).mean() for one in found}
      assert len(kinds) == count and min(kinds.values()) > 0.5 / count
    turned = transforms.augmented(image, jax.random.key(0), turn=45, share=0.3)
    same = float(jnp.isclose(turned, image, atol=1e-4).all((1, 2, 3)).mean())
    assert 0.6 < same < 0.8

  def test_crops_come_from_everywhere(self):
    image = jnp.broadcast_to(jnp.arange(36.0).reshape(1, 6, 6, 1), (300, 6, 6, 1))
    found = transforms.cropped(image, jax.random.key(0), 4)
    assert set(np.asarray(found[:, 0, 0, 0]).tolist()) == {0, 1, 2, 6, 7, 8, 12, 13, 14}
    np.testing.assert_array_equal(found[:, 1, 1] - found[:, 0, 0], 7)


def test_gradients_of_the_largest_are_of_one_of_them():
  x = jnp.array([[[[1.0], [2.0]], [[2.0], [0.0]]]])
  assert float(layers.max_pool(x).sum()) == 2
  assert jax.grad(lambda x: layers.max_pool(x).sum())(x).ravel().tolist() in ([0, 1, 0, 0], [0, 0, 1, 0])
