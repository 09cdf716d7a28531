"""Backbones of the ResNet family against the reference arrays of torchvision (../shared/golden)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import backbones
from patchcore_jax.backbones import port, resnet

_SIZES = {'wide_resnet50_2': ('224x224', 'synthetic', '200x264', '225x225')}
_NETS = ('resnet18', 'resnet50', 'resnet101', 'resnext101_32x8d', 'wide_resnet50_2',
         'wide_resnet101_2')


def _torch_shapes(architecture):
  """Shapes of the PyTorch state dict of an architecture, classifier and batch norm included."""
  shapes = {}
  for block, convs in resnet.init_shapes(architecture)['params'].items():
    for conv, target in {'': convs}.items() if block == 'conv1' else convs.items():
      key, norm = ('conv1', 'bn1') if block == 'conv1' else port._torch_names(block, conv)
      height, width, inputs, outputs = target['kernel'].shape
      shapes[f'{key}.weight'] = (outputs, inputs, height, width)
      for name in ('weight', 'bias', 'running_mean', 'running_var'):
        shapes[f'{norm}.{name}'] = (outputs,)
      shapes[f'{norm}.num_batches_tracked'] = ()
  return shapes


def _state_dict(architecture, recipe):
  state = {key: recipe.make(key, shape) for key, shape in _torch_shapes(architecture).items()}
  return {key: np.int64(0) if value is None else value for key, value in state.items()}


class TestGolden:

  @pytest.mark.parametrize('net', _NETS)
  def test_layers_equal_torchvision(self, net, golden, golden_module):
    arrays = np.load(golden / 'backbones.npz')
    images = np.load(golden / 'images_backbones.npz')
    variables = port.port(_state_dict(net, golden_module('recipe')), resnet.init_shapes(net))
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
