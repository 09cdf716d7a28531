"""The ResNet family. `parity_test` compares its feature maps with torchvision's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.backbones import resnet
from tests import precision


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

  @pytest.mark.parametrize('net', ['resnet18', 'resnext50_32x4d'])
  def test_products_ask_for_the_highest_precision(self, net):
    precision.assert_highest(
        resnet.apply_fn(net, ('layer2',)), resnet.truncate(resnet.init_shapes(net), ('layer2',)),
        jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
