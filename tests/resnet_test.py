"""The ResNet family. `parity_test` compares its feature maps with torchvision's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.backbones import cpu_convolutions, resnet
from tests import precision

pytestmark = pytest.mark.accelerator


class TestResNet:

  @pytest.mark.parametrize('net', resnet.ARCHITECTURES)
  def test_shapes_and_truncation(self, net):
    whole = resnet.init_shapes(net)
    short = resnet.truncate(whole, ('layer2',))
    assert {k.split('_')[0] for k in short['params']} == {'conv1', 'layer1', 'layer2'}
    images = jax.ShapeDtypeStruct((2, 224, 200, 3), jnp.float32)
    maps = jax.eval_shape(resnet.apply_fn(net, ('layer2',)), short, images)
    assert list(maps) == ['layer2']
    architecture = resnet.ARCHITECTURES[net]
    channels = 2 * architecture.width * (4 if architecture.bottleneck else 1)
    assert maps['layer2'].shape == (2, 28, 25, channels)

  @pytest.mark.parametrize('net, batch', [('resnet18', 5), ('resnet18', 6), ('resnext50_32x4d', 2)])
  def test_the_way_on_cpus_equals_the_library(self, net, batch, monkeypatch):
    variables = resnet.truncate(resnet.init(net), ('layer2', 'layer3'))
    images = np.random.default_rng(0).standard_normal((batch, 40, 52, 3)).astype(np.float32)
    library = resnet.ResNet(resnet.ARCHITECTURES[net], ('layer2', 'layer3'))
    expected = jax.jit(library.apply)(variables, images)
    monkeypatch.setattr(resnet, '_CPU_PIXELS', 3 * 40 * 52)  # 6 in parts of 3, 5 one by one, 2 whole
    found = jax.jit(lambda *args: resnet.apply_fn(net, ('layer2', 'layer3'))(*args))(variables, images)
    for layer in expected:
      assert found[layer].shape == expected[layer].shape
      assert _relative(found[layer], expected[layer]) < 5e-6

  def test_bfloat16_stays_close_and_differs(self):
    variables = resnet.truncate(resnet.init('resnet50'), ('layer1',))
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    exact, rounded, tensorfloat = (
        jax.jit(resnet.apply_fn('resnet50', ('layer1',), p))(variables, images)['layer1']
        for p in ('float32', 'bfloat16', 'tensorfloat32'))
    assert rounded.dtype == jnp.float32
    assert 1e-4 < _relative(rounded, exact) < 2e-2
    if jax.default_backend() == 'cpu':
      np.testing.assert_array_equal(tensorfloat, exact)

  @pytest.mark.parametrize('net', ['resnet50', 'resnext50_32x4d', 'resnet18_slim'])
  @pytest.mark.parametrize('platform', ['cuda', 'tpu', 'cpu'])
  @pytest.mark.parametrize('precision_name', resnet.PRECISIONS)
  def test_what_devices_are_asked_for(self, net, platform, precision_name):
    found = precision.lowered(
        resnet.apply_fn(net, ('layer2',), precision_name), _short(net, ('layer2',)),
        jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), platform=platform)
    # The stem, 3 + 4 blocks of 3 and two downsamplings; or 2 + 2 of 2 and one.
    assert len(found) == (10 if net == 'resnet18_slim' else 24)
    products = sum(o.name == 'dot_general' for o in found)
    ones = 1 if net == 'resnet18_slim' else 16
    if precision_name == 'bfloat16' and platform != 'cpu':
      # That, and no wider result: libraries have no other fast convolution of bfloat16.
      assert {o[1:] for o in found} == {(('bf16', 'bf16'), 'bf16', 'DEFAULT')} and not products
    else:
      assert {o[1:3] for o in found} == {(('f32', 'f32'), 'f32')}
      if platform != 'cpu':  # where it makes no difference
        assert {o.precision for o in found} == {'HIGH' if precision_name == 'tensorfloat32' else 'HIGHEST'}
      assert products == (0 if (precision_name, platform) == ('tensorfloat32', 'cuda') else ones)

  @pytest.mark.parametrize('net', ['resnet50', 'resnext50_32x4d', 'resnet18_slim'])
  def test_bfloat16_on_a_cpu_is_that_of_accelerators(self, net):
    """The library's network in bfloat16 arrays: the same roundings, but for that before the bias."""
    layers, rng = ('layer1', 'layer2'), np.random.default_rng(0)
    images = rng.standard_normal((2, 64, 64, 3)).astype(np.float32)
    variables = jax.tree.map(  # biases too, which are rounded as well
        lambda x: x if x.any() else rng.standard_normal(x.shape).astype(np.float32) / 10,
        resnet.truncate(resnet.init(net), layers))
    exact, on_cpu = (
        jax.jit(resnet.apply_fn(net, layers, p))(variables, images) for p in ('float32', 'bfloat16'))
    network = resnet.ResNet(
        resnet.ARCHITECTURES[net], layers, resnet.Arithmetic('bfloat16', products=False))
    elsewhere = jax.jit(network.apply)(variables, images)
    for layer in layers:
      assert elsewhere[layer].dtype == on_cpu[layer].dtype == jnp.float32
      for found in (elsewhere[layer], on_cpu[layer]):  # every value is one of bfloat16
        np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(jnp.float32))
      errors = [_relative(found[layer], exact[layer]) for found in (elsewhere, on_cpu)]
      assert min(errors) > 1e-3 and max(errors) < 1.5e-2 and max(errors) < 1.6 * min(errors)


class TestWinograd:

  @pytest.mark.parametrize('shape, features', [
      ((2, 8, 8, 16), 8), ((1, 7, 13, 5), 3), ((3, 14, 14, 64), 32), ((1, 1, 2, 3), 4), ((2, 4, 5, 1), 1)])
  def test_equals_float64(self, shape, features):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    kernel = rng.standard_normal((3, 3, shape[-1], features)).astype(np.float32)
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    expected = np.einsum('bhwcij,ijcf->bhwf', windows, kernel)
    found = jax.jit(cpu_convolutions.convolve_3x3)(x, kernel)
    assert found.dtype == jnp.float32 and found.shape == expected.shape
    assert _relative(found, expected) < 5e-6

  def test_one_impulse_is_the_flipped_kernel(self):
    kernel = np.arange(1, 10, dtype=np.float32).reshape(3, 3, 1, 1)
    x = np.zeros((1, 9, 9, 1), np.float32)
    x[0, 4, 3] = 1
    found = np.asarray(cpu_convolutions.convolve_3x3(x, kernel))[0, :, :, 0]
    expected = np.zeros((9, 9))
    expected[3:6, 2:5] = [[9, 8, 7], [6, 5, 4], [3, 2, 1]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _short(net, layers):
  return resnet.truncate(resnet.init_shapes(net), layers)


def _relative(found, expected):
  return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
