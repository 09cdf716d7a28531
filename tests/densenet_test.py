"""The DenseNet family against its definition in NumPy; `parity_test` compares DenseNet-201 with timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from patchcore_jax import backbones
from patchcore_jax.backbones import densenet, port, registry
from tests import precision

pytestmark = pytest.mark.accelerator

TINY = densenet.Architecture((2, 3, 2, 1), growth=8, width=16)
FAMILY = densenet.family_of(densenet.ARCHITECTURES | {'densenet_tiny': TINY})


@pytest.fixture(scope='module')
def state():
  """A checkpoint of the tiny one, spelt as models spell it; its norms change what they are given."""
  rng = np.random.default_rng(0)
  state = {}
  for key, shape in FAMILY.state_dict_shapes('densenet_tiny').items():
    if shape and len(shape) > 1:
      state[key] = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
    elif shape:
      positive = key.endswith(('weight', 'var'))
      state[key] = rng.uniform(0.5, 1.5, shape) if positive else rng.normal(0, 0.3, shape)
  return {key: value.astype(np.float32) for key, value in state.items()}


@pytest.fixture(scope='module')
def variables(state):
  return port.port(state, FAMILY, 'densenet_tiny')


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(1).standard_normal((2, 75, 92, 3)).astype(np.float32)  # halves of odd sizes


class TestNetwork:

  @pytest.mark.parametrize('name, channels', [
      ('densenet161', (96, 384, 768, 2112, 2208)), ('densenet201', (64, 256, 512, 1792, 1920))])
  def test_shapes(self, name, channels):
    network = densenet.DenseNet(densenet.ARCHITECTURES[name], densenet.LAYERS)
    maps, _ = jax.eval_shape(
        network.init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((2, 224, 200, 3), jnp.float32))
    sizes = (56, 50), (56, 50), (28, 25), (14, 12), (7, 6)
    assert [maps[layer].shape for layer in densenet.LAYERS] == [
        (2, *size, c) for size, c in zip(sizes, channels)]

  def test_equals_the_definition_in_float64(self, state, variables, images):
    apply = FAMILY.build('densenet_tiny', densenet.LAYERS, 'float32')
    found = jax.jit(apply)(variables, images)
    expected = _by_definition(state, images)
    assert found.keys() == expected.keys() == set(densenet.LAYERS)
    for layer, values in expected.items():
      assert found[layer].shape == values.shape and _relative(found[layer], values) < 2e-6
    # What a block gives is not yet normed, and no ReLU has cut it off.
    assert all(found[layer].min() < -0.1 for layer in densenet.LAYERS[1:])

  def test_a_layer_needs_what_lies_before_it(self, variables):
    kept = FAMILY.truncate(variables, ('stem', 'denseblock2'))['params']
    assert {name.split('_')[0] for name in kept} == {'conv0', 'denseblock1', 'transition1', 'denseblock2'}
    assert set(FAMILY.truncate(variables, ('stem',))['params']) == {'conv0'}
    assert FAMILY.default_layers('densenet_tiny') == ('denseblock2', 'denseblock3')

  def test_bfloat16_stays_close_and_is_that_of_accelerators(self, variables, images):
    layers, images = ('denseblock2',), images[:, :40, :40]
    exact, on_cpu = (jax.jit(FAMILY.build('densenet_tiny', layers, mode))(variables, images)
                     for mode in ('float32', 'bfloat16'))
    elsewhere = jax.jit(densenet.DenseNet(
        TINY, layers, densenet.Arithmetic('bfloat16', products=False)).apply)(variables, images)
    for found in (on_cpu['denseblock2'], elsewhere['denseblock2']):
      np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(jnp.float32))
      assert 1e-3 < _relative(found, exact['denseblock2']) < 2e-2

  @pytest.mark.parametrize('platform', ['cuda', 'tpu', 'cpu'])
  @pytest.mark.parametrize('mode', densenet.PRECISIONS)
  def test_what_devices_are_asked_for(self, mode, platform, variables):
    found = precision.lowered(
        FAMILY.build('densenet_tiny', ('denseblock2',), mode), FAMILY.truncate(variables, ('denseblock2',)),
        jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), platform=platform)
    assert len(found) == 1 + 2 * (2 + 3) + 1  # the stem, two a layer, the transition
    if mode == 'bfloat16' and platform != 'cpu':
      assert {o[1:] for o in found} == {(('bf16', 'bf16'), 'bf16', 'DEFAULT')}
    else:
      assert {o[1:3] for o in found} == {(('f32', 'f32'), 'f32')}
      if platform != 'cpu':
        assert {o.precision for o in found} == {'HIGH' if mode == 'tensorfloat32' else 'HIGHEST'}


class TestCheckpoint:

  def _as_published(self, state):
    """Spells keys as torchvision's files do, which have no count of batches."""
    for part in ('norm', 'conv'):
      for number in '12':
        state = {key.replace(f'.{part}{number}.', f'.{part}.{number}.'): v for key, v in state.items()}
    return state

  def test_both_spellings(self, state, variables, tmp_path, monkeypatch):
    published = self._as_published(state)
    assert 'features.denseblock1.denselayer2.norm.1.weight' in published
    assert 'features.denseblock2.denselayer3.conv.2.weight' in published
    assert len(published.keys() - state.keys()) == 8 * 10  # two norms and two convolutions a layer
    found = port.port(published, FAMILY, 'densenet_tiny')
    assert backbones.fingerprint(found) == backbones.fingerprint(variables)
    monkeypatch.setattr(registry, 'FAMILIES', (FAMILY,))
    safetensors.numpy.save_file(published, tmp_path / 'tiny.safetensors')
    backbone = backbones.create('densenet_tiny', weights=str(tmp_path / 'tiny.safetensors'))
    assert backbones.fingerprint(backbone.variables) == backbones.fingerprint(
        FAMILY.truncate(variables, densenet.DEFAULT_LAYERS))

  def test_both_at_once_are_refused(self, state):
    key = 'features.denseblock1.denselayer2.norm.1.weight'
    with pytest.raises(port.PortError, match=f'left over in the file: {key}'):
      port.port(state | {key: np.ones(24, np.float32)}, FAMILY, 'densenet_tiny')

  def test_another_member(self, state):
    with pytest.raises(port.PortError, match='missing in the file.*wrong shape: features.conv0.weight'):
      port.port(state, FAMILY, 'densenet121')


def _by_definition(state, images):
  """Computes all maps with norms as such, and the mean over squares after the convolution, in float64."""
  def conv(name, x, stride=1):
    weight = state[f'{name}.weight'].astype(np.float64)
    size = weight.shape[-1]
    x = np.pad(x, ((0, 0), *[(size // 2, size // 2)] * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
    return np.einsum('bhwcij,ocij->bhwo', windows, weight, optimize=True)

  def norm_relu(name, x):
    weight, bias, mean, variance = (state[f'{name}.{key}'].astype(np.float64) for key in port.BATCH_NORM)
    return np.maximum((x - mean) / np.sqrt(variance + 1e-5) * weight + bias, 0)

  x = norm_relu('features.norm0', conv('features.conv0', images.astype(np.float64), 2))
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-1, -2))
  maps = {'stem': x}
  for block, depth in enumerate(TINY.depths, 1):
    if block > 1:
      name = f'features.transition{block - 1}'
      x = conv(f'{name}.conv', norm_relu(f'{name}.norm', x))
      rows, columns = (n // 2 for n in x.shape[1:3])
      x = np.mean([x[:, i:2 * rows:2, j:2 * columns:2] for i in (0, 1) for j in (0, 1)], axis=0)
    for layer in range(1, 1 + depth):
      name = f'features.denseblock{block}.denselayer{layer}'
      y = conv(f'{name}.conv1', norm_relu(f'{name}.norm1', x))
      x = np.concatenate([x, conv(f'{name}.conv2', norm_relu(f'{name}.norm2', y))], axis=-1)
    maps[f'denseblock{block}'] = x
  return maps


def _relative(found, expected):
  return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
