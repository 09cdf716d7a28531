"""`patchcore backbones`: list, licence, fetch."""

import os
import subprocess
import sys

import click.testing
import pytest

from patchcore_jax.backbones import checkpoints
from patchcore_jax.cli.backbones import command
from tests import conftest, hub


@pytest.fixture
def server(tmp_path, monkeypatch):
  with hub.serve() as server:
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', server.endpoint)
    monkeypatch.setattr('huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE',
                        server.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setitem(sys.modules, checkpoints.find(checkpoints.OFFLINE).module, None)
    yield server


def _run(*arguments):
  result = click.testing.CliRunner().invoke(command, arguments)
  return result.exit_code, result.stdout, result.stderr


def _alone(*arguments, **environment):
  """Runs the command in a process of its own."""
  return subprocess.run(
      [sys.executable, '-m', 'patchcore_jax', 'backbones', *arguments], capture_output=True, text=True,
      cwd=conftest.ROOT, env=os.environ | environment)


class TestList:

  def test_names_all_and_where_they_are(self, server):
    record = checkpoints.find('resnet18.tv_in1k')
    server.files[hub.path_of(record)] = b'weights'
    checkpoints.fetch(record)
    server.requests.clear()
    code, said, _ = _run('list')
    rows = {line.split()[0]: line for line in said.splitlines() if line}
    assert code == 0 and set(checkpoints.CHECKPOINTS) <= set(rows) and not server.requests
    assert rows['resnet18.tv_in1k'].endswith('cached')
    assert rows[checkpoints.PREFERRED].endswith('to be fetched') and '276 MB' in rows[checkpoints.PREFERRED]
    assert rows[checkpoints.BUILT_IN].endswith('in the package')
    assert all(record.licence in rows[name] for name, record in checkpoints.CHECKPOINTS.items())
    assert f"'auto' stands for {checkpoints.BUILT_IN} here." in said
    assert checkpoints.better_than(checkpoints.BUILT_IN) in said

  def test_auto_is_the_better_one_where_it_is_cached(self, server):
    record = checkpoints.find(checkpoints.PREFERRED)
    server.files[hub.path_of(record)] = b'weights'
    checkpoints.fetch(record)
    said = _run('list')[1]
    assert f"'auto' stands for {checkpoints.PREFERRED} here." in said and 'backbones fetch' not in said


class TestLicence:

  @pytest.mark.parametrize('record', checkpoints.CHECKPOINTS.values(), ids=lambda record: record.name)
  def test_names_licence_source_and_images(self, record):
    code, said, _ = _run('licence', record.name)
    assert code == 0 and record.licence in said and record.licence_url in said
    assert record.licence_url == record.terms or 'https://spdx.org/licenses/' in said
    assert ('--accept-licence' in said) == bool(record.terms)
    assert record.origin in said and record.trained_on in said
    assert (record.url in said) == (not record.packaged)
    assert ('non-commercial' in said) == (record.trained_on == checkpoints.IMAGENET)

  def test_an_unknown_name(self):
    code, said, error = _run('licence', 'wideresnet50.tv_in1k')
    assert code == 1 and not said and len(error.splitlines()) == 1
    assert "did you mean 'wide_resnet50_2.tv_in1k'?" in error


class TestFetch:

  def test_downloads_and_then_says_that_it_is_there(self, server):
    record = checkpoints.find('resnet18.tv_in1k')
    server.files[hub.path_of(record)] = b'weights'
    code, said, error = _run('fetch', record.name)
    assert code == 0 and not error
    path = checkpoints.installed(record)
    assert '47 MB' in said and said.rstrip().endswith(path)
    server.requests.clear()
    assert _run('fetch', record.name) == (0, f'{record.name} is on this machine: {path}\n', '')
    assert not server.requests

  def test_a_licence_that_must_be_accepted_is_shown_first(self, server):
    record = checkpoints.find('vit_small_patch16_dinov3.lvd1689m')
    server.files[hub.path_of(record)] = b'weights'
    code, said, error = _run('fetch', record.name)
    assert code == 1 and not said and len(error.splitlines()) == 1 and not server.requests
    assert record.terms in error and f'fetch {record.name} --accept-licence' in error
    code, said, error = _run('fetch', record.name, '--accept-licence')
    assert code == 0 and record.licence in said and checkpoints.installed(record) in said
    assert _run('fetch', record.name)[0] == 0  # what is there was accepted
    code, _, error = _run('fetch', 'resnet18.tv_in1k', '--accept-licence')
    assert code == 1 and 'leave out --accept-licence' in error

  def test_the_packaged_one_is_there(self):
    code, said, _ = _run('fetch', checkpoints.BUILT_IN)
    assert code == 0 and said.rstrip().endswith('.safetensors')

  @pytest.mark.parametrize('environment, reason', [
      ({'HF_ENDPOINT': 'http://127.0.0.1:9'}, 'Connection refused'),
      ({'HF_HUB_OFFLINE': '1'}, 'offline mode')])
  def test_without_a_network_it_is_one_line(self, environment, reason, tmp_path):
    result = _alone('fetch', 'resnet18.tv_in1k', HF_HOME=str(tmp_path), **environment)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert reason in result.stderr and '--backbone-weights FILE' in result.stderr


def test_an_unknown_subcommand():
  result = _alone('fetsh', 'resnet18.tv_in1k')
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
  assert "did you mean 'fetch'?" in result.stderr
