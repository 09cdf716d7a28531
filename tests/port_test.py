"""PyTorch checkpoints -> Flax variables."""

import hashlib

import numpy as np
import pytest
import safetensors.numpy

from patchcore_jax.backbones import port, resnet
from tests import state_dicts, torch_file_test


@pytest.fixture(scope='module')
def state():
  return state_dicts.make('resnet18', state_dicts.simple_rule)


class TestPort:

  def test_folded_convolution_equals_convolution_then_batch_norm(self, state):
    params = port.port(state, resnet.FAMILY, 'resnet18')['params']['layer2_0']['downsample']
    pixel = np.random.default_rng(0).standard_normal(64)  # a 1x1 convolution sees one pixel
    key = 'layer2.0.downsample'
    y = state[f'{key}.0.weight'][:, :, 0, 0] @ pixel
    y = (y - state[f'{key}.1.running_mean']) / np.sqrt(state[f'{key}.1.running_var'] + 1e-5)
    y = y * state[f'{key}.1.weight'] + state[f'{key}.1.bias']
    np.testing.assert_allclose(pixel @ params['kernel'][0, 0] + params['bias'], y, rtol=1e-5)

  def test_kernel_layout(self, state):
    kernel = port.port(state, resnet.FAMILY, 'resnet18')['params']['conv1']['kernel']
    scale = state['bn1.weight'] / np.sqrt(state['bn1.running_var'] + 1e-5)
    np.testing.assert_allclose(
        kernel[2, 5, 1, 7], state['conv1.weight'][7, 1, 2, 5] * scale[7], rtol=1e-6)

  def test_another_architecture(self, state):
    with pytest.raises(port.PortError, match=r'missing in the file: .*in all.*wrong shape'):
      port.port(state, resnet.FAMILY, 'resnet50')


class TestReadStateDict:

  def test_safetensors(self, state, tmp_path):
    safetensors.numpy.save_file(state, tmp_path / 'w.safetensors')
    read = port.read_state_dict(tmp_path / 'w.safetensors')
    assert read.keys() == state.keys()
    np.testing.assert_array_equal(read['layer1.0.conv1.weight'], state['layer1.0.conv1.weight'])

  def test_truncated_safetensors(self, state, tmp_path):
    path = tmp_path / 'w.safetensors'
    safetensors.numpy.save_file(state, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match='w.safetensors is not a whole safetensors file'):
      port.read_state_dict(path)

  def test_missing_file_and_unknown_suffix(self, tmp_path):
    with pytest.raises(ValueError, match='No weights file'):
      port.read_state_dict(tmp_path / 'none.pth')
    (tmp_path / 'w.h5').touch()
    with pytest.raises(ValueError, match='ends in .safetensors or .pth'):
      port.read_state_dict(tmp_path / 'w.h5')

  def test_hash_in_the_name_is_checked(self, tmp_path):
    path = tmp_path / 'resnet18-5c106cde.pth'
    path.write_bytes(b'half a download')
    digest = hashlib.sha256(b'half a download').hexdigest()[:8]
    with pytest.raises(ValueError, match=f'starts with {digest}, its name says 5c106cde'):
      port.read_state_dict(path)

  def test_pth(self, state, tmp_path):
    torch_file_test.write_pickles(tmp_path / 'w.pth', torch_file_test.state_of(state))
    read = port.read_state_dict(tmp_path / 'w.pth')
    np.testing.assert_array_equal(read['conv1.weight'], state['conv1.weight'])
    (tmp_path / 'bad.pth').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='not a whole PyTorch state dict'):
      port.read_state_dict(tmp_path / 'bad.pth')
