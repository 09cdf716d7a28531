"""Downloads, from a server on loopback that speaks as much of the hub's protocol as the client needs."""

import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from patchcore_jax import backbones
from patchcore_jax.backbones import checkpoints, resnet
from tests import conftest, state_dicts


@pytest.fixture
def server():
  """Serves `server.files`, {path: bytes}, and counts what was asked for."""

  class Handler(http.server.BaseHTTPRequestHandler):

    def _answer(self, body):
      content = self.server.files.get(self.path)
      self.server.requests.append((self.command, self.path))
      if content is None:
        self.send_response(404)
        self.send_header('X-Error-Code', 'EntryNotFound')
        self.send_header('Content-Length', '0')
        self.end_headers()
        return
      self.send_response(200)
      self.send_header('X-Repo-Commit', '0' * 40)
      self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      if body:
        self.wfile.write(content)

    def do_HEAD(self):
      self._answer(False)

    def do_GET(self):
      self._answer(True)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.files, server.requests = {}, []
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.shutdown()


def _endpoint(server):
  return f'http://127.0.0.1:{server.server_port}'


class TestFetch:

  def test_downloads_once(self, server, tmp_path):
    record = checkpoints.find('resnet18.tv_in1k')
    path = f'/{record.repo_id}/resolve/main/{record.filename}'
    server.files[path] = safetensors.numpy.save(state_dicts.make('resnet18', state_dicts.simple_rule))
    fetched = checkpoints.fetch(record, cache_dir=tmp_path, endpoint=_endpoint(server))
    with open(fetched, 'rb') as f:
      assert f.read() == server.files[path]
    gets = server.requests.count(('GET', path))
    assert checkpoints.fetch(record, cache_dir=tmp_path, endpoint=_endpoint(server)) == fetched
    assert server.requests.count(('GET', path)) == gets == 1
    backbone = backbones.create('resnet18.tv_in1k', weights=fetched)
    assert backbone.layers == resnet.DEFAULT_LAYERS and backbone.mean == checkpoints.IMAGENET_MEAN

  def test_no_network_says_which_file_to_fetch_and_where_to_put_it(self, tmp_path, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # the hub's client waits between tries
    record = checkpoints.find('wide_resnet50_2.tv_in1k')
    with pytest.raises(checkpoints.DownloadError) as error:
      checkpoints.fetch(record, cache_dir=tmp_path, endpoint='http://127.0.0.1:9')
    for words in (record.url, 'wide_resnet50_2-95faca4d.pth', '--config.backbone.weights=PATH'):
      assert words in str(error.value)

  def test_not_on_the_server(self, server, tmp_path):
    with pytest.raises(checkpoints.DownloadError, match='resnet34.tv_in1k'):
      checkpoints.fetch(
          checkpoints.find('resnet34.tv_in1k'), cache_dir=tmp_path, endpoint=_endpoint(server))

  def test_an_interrupted_download_leaves_nothing_that_is_taken_for_whole(self, server, tmp_path):
    record = checkpoints.find('resnet18.tv_in1k')
    path = f'/{record.repo_id}/resolve/main/{record.filename}'
    server.files[path] = Broken(b'x' * 4096)
    with pytest.raises(checkpoints.DownloadError):
      checkpoints.fetch(record, cache_dir=tmp_path, endpoint=_endpoint(server))
    server.files[path] = b'y' * 4096
    with open(checkpoints.fetch(record, cache_dir=tmp_path, endpoint=_endpoint(server)), 'rb') as f:
      assert f.read() == b'y' * 4096


class Broken(bytes):
  """Says it is longer than what it sends."""

  def __len__(self):
    return super().__len__() + 1000


class TestRecords:

  def test_every_architecture_has_torchvision_weights(self):
    for architecture in set(resnet.ARCHITECTURES) - {'resnet18_slim'}:  # whose weights are in the package
      record = checkpoints.find(f'{architecture}.tv_in1k')
      assert record.licence == 'BSD-3-Clause' and record.torch_file.startswith(architecture)

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


def test_local_weights_equal_the_state_dict(tmp_path):
  state = state_dicts.make('resnet18', state_dicts.simple_rule)
  safetensors.numpy.save_file(state, tmp_path / 'mine.safetensors')
  backbone = backbones.create('resnet18', weights=str(tmp_path / 'mine.safetensors'))
  bias = backbone.variables['params']['conv1']['bias']
  scale = state['bn1.weight'] / np.sqrt(state['bn1.running_var'] + 1e-5)
  np.testing.assert_allclose(bias, state['bn1.bias'] - state['bn1.running_mean'] * scale, rtol=1e-5)
