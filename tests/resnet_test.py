"""Backbones of the ResNet family against the reference arrays of torchvision (../shared/golden)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import backbones
from patchcore_jax.backbones import port, resnet
from tests import state_dicts

_SIZES = {'wide_resnet50_2': ('224x224', 'synthetic', '200x264', '225x225')}
_NETS = ('resnet18', 'resnet50', 'resnet101', 'resnext101_32x8d', 'wide_resnet50_2',
         'wide_resnet101_2')


class TestGolden:

  @pytest.mark.parametrize('net', _NETS)
  def test_layers_equal_torchvision(self, net, golden, golden_module):
    arrays = np.load(golden / 'backbones.npz')
    images = np.load(golden / 'images_backbones.npz')
    variables = port.port(
        state_dicts.make(net, golden_module('recipe').make), resnet.init_shapes(net))
    apply = jax.jit(resnet.apply_fn(net, resnet.LAYERS))
    for size in _SIZES.get(net, ('224x224', 'synthetic')):
      image = (golden_module('inputs').synthetic(224, 224) if size == 'synthetic' else images[size])
      maps = apply(variables, backbones.normalize(
          jnp.asarray(image)[None], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
      for layer in resnet.LAYERS:
        name = f'{net}/{size}/{layer}'
        value = np.asarray(maps[layer]).transpose(0, 3, 1, 2)
        assert value.shape == tuple(arrays[f'{name}/shape'])
        truth = arrays[f'{name}/f64']
        error = value.reshape(-1)[arrays[f'{name}/idx']] - truth
        # float32 sums of up to a hundred layers; the originals' own float32 is at about 6e-6.
        assert np.linalg.norm(error) / np.linalg.norm(truth) < 1e-5, name
        np.testing.assert_allclose(
            value.mean((0, 2, 3)), arrays[f'{name}/channel_mean_f64'], rtol=1e-4,
            atol=1e-5 * arrays[f'{name}/stats_f64'][1])


class TestResNet:

  @pytest.mark.parametrize('net', resnet.ARCHITECTURES)
  def test_shapes_and_truncation(self, net):
    whole = resnet.init_shapes(net)
    short = resnet.truncate(whole, ('layer2',))
    assert {k.split('_')[0] for k in short['params']} == {'conv1', 'layer1', 'layer2'}
    images = jax.ShapeDtypeStruct((2, 224, 200, 3), jnp.float32)
    maps = jax.eval_shape(resnet.apply_fn(net, ('layer2',)), short, images)
    assert list(maps) == ['layer2']
    channels = 512 if resnet.ARCHITECTURES[net].bottleneck else 128
    assert maps['layer2'].shape == (2, 28, 25, channels)

  def test_random_weights_follow_the_seed(self):
    first, again, other = (resnet.init('resnet18', seed)['params']['conv1']['kernel']
                           for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1

  def test_batch_size_has_no_influence(self):
    variables = resnet.truncate(resnet.init('resnet18'), ('layer2',))
    apply = jax.jit(resnet.apply_fn('resnet18', ('layer2',)))
    images = np.random.default_rng(0).standard_normal((5, 64, 64, 3)).astype(np.float32)
    together = np.asarray(apply(variables, images)['layer2'])
    for i in range(5):
      alone = np.asarray(apply(variables, images[i:i + 1])['layer2'])[0]
      np.testing.assert_allclose(alone, together[i], rtol=0, atol=2e-6 * together.std())

  def test_default_precision_has_no_influence(self):
    variables = resnet.truncate(resnet.init('resnet18'), ('layer2',))
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    apply = resnet.apply_fn('resnet18', ('layer2',))
    expected = np.asarray(jax.jit(apply)(variables, images)['layer2'])
    with jax.default_matmul_precision('bfloat16'):
      value = jax.jit(lambda v, x: apply(v, x))(variables, images)['layer2']
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6 * expected.std())
