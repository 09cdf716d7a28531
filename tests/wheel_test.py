"""The wheel, as a user gets it: in an empty folder, offline, without the clone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from patchcore_jax import cli
from tests import plates
from tests.conftest import ROOT

# Read by setuptools; all else of the clone stays where it is.
_SOURCES = ('patchcore_jax', 'pyproject.toml', 'setup.py', 'README.md', 'LICENSE')
_SMALL = ('--backbone=resnet18_slim.procedural', '--resize=64', '--crop=56', '--batch-size=4', '--folds=2')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built of a copy, so that nothing of a build before gets into it, nor anything into the clone."""
  source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
  for name in _SOURCES:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    else:
      shutil.copy(ROOT / name, source)
  # The setuptools of the extra `test`; an older one cannot read pyproject.toml, and pip fetches its own.
  alone = () if int(metadata.version('setuptools').split('.')[0]) < 77 else ('--no-build-isolation',)
  _pip('wheel', '--no-deps', *alone, '--wheel-dir', out, source)
  (built,) = out.glob('patchcore_jax-*.whl')
  return built


@pytest.fixture(scope='module')
def shell(wheel, tmp_path_factory):
  """An empty folder with images, in which `patchcore` is the wheel's."""
  site, folder = tmp_path_factory.mktemp('site'), tmp_path_factory.mktemp('user')
  _pip('install', '--no-deps', '--no-index', '--quiet', '--target', site, wheel)
  rng = np.random.default_rng(0)
  for i in range(6):
    plates._draw(folder / f'good/{i}.png', rng)
    plates._draw(folder / f'more/{i}.png', rng)
  for i in range(2):
    plates._draw(folder / f'new/hole{i}.png', rng, 'hole')
  return _Shell(site, folder)


class _Shell:
  """Runs commands in the folder."""

  def __init__(self, site: Path, folder: Path):
    self.folder, self.patchcore = folder, str(site / 'bin/patchcore')
    self.environment = os.environ | {
        'PYTHONPATH': str(site), 'HF_HUB_OFFLINE': '1', 'PYTHONSAFEPATH': '1', 'PYTHONDONTWRITEBYTECODE': '1'}

  def run(self, *command) -> str:
    """Returns what a command says that succeeds."""
    result = subprocess.run(
        [str(part) for part in command], cwd=self.folder, env=self.environment, capture_output=True,
        text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _pip(*arguments):
  subprocess.run([sys.executable, '-m', 'pip', '--disable-pip-version-check', *map(str, arguments)],
                 check=True, capture_output=True)


def _decisions(folder):
  rows = map(json.loads, (folder / 'predictions.jsonl').read_text().splitlines())
  return {Path(row['path']).name: row['decision'] for row in rows}


def test_it_holds_all_files_of_the_package_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = {name for name in archive.namelist() if '.dist-info/' not in name}
    (entry_points,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith('entry_points.txt'))
  expected = {
      str(path.relative_to(ROOT)) for path in (ROOT / 'patchcore_jax').rglob('*')
      if path.is_file() and '__pycache__' not in path.parts}
  assert names == expected
  assert {Path(name).suffix for name in names} >= {'.py', '.safetensors', '.html', '.css', '.js'}
  assert 'patchcore = patchcore_jax.cli:main' in entry_points


def test_the_clone_is_out_of_reach(shell):
  script = (
      'from importlib.util import find_spec; import patchcore_jax; print(patchcore_jax.__file__); '
      "print([name for name in ('experiments', 'configs') if find_spec(name)])")
  file, found = shell.run(sys.executable, '-c', script).splitlines()
  assert Path(file).is_relative_to(shell.environment['PYTHONPATH']) and found == '[]'


def test_from_good_images_to_decisions_a_service_and_a_program(shell):
  patchcore = shell.patchcore
  assert all(name in shell.run(patchcore, '--help') for name in cli.COMMANDS)
  told = shell.run(patchcore, 'fit', 'good', '--out', 'bank', *_SMALL, '--false-alarm-rate=0.2')
  assert 'Next: patchcore predict bank' in told
  shell.run(patchcore, 'predict', 'bank', 'new', '--out', 'out', '--why')
  out = shell.folder / 'out'
  assert _decisions(out) == {'hole0.png': 'anomalous', 'hole1.png': 'anomalous'}
  assert (out / 'report.html').exists() and len(list((out / 'why').iterdir())) == 2
  assert 'appended 6 images' in shell.run(
      patchcore, 'bank', 'append', 'bank', 'more', '--accept', 'all')
  assert 'more/5.png' in shell.run(patchcore, 'bank', 'info', 'bank')
  shell.run(patchcore, 'export', 'bank', '--out', 'program', '--platforms=cpu')
  shell.run(sys.executable, 'program/run.py', 'new/hole0.png')
  answer, ended = _served(shell)
  assert answer['decision'] == 'anomalous' and ended == 0


def test_another_method(shell):
  padim = ('--detector=padim', '--padim-num-dims=16')
  shell.run(shell.patchcore, 'fit', 'good', '--out', 'padim', *_SMALL, '--false-alarm-rate=0.2', *padim)
  shell.run(shell.patchcore, 'predict', 'padim', 'new', '--out', 'padim_out', '--why')
  assert set(_decisions(shell.folder / 'padim_out').values()) == {'anomalous'}


@pytest.mark.parametrize('method', [('--ratio=0.01',), ('--detector=padim', '--padim-num-dims=50')])
@pytest.mark.slow
def test_real_parts(shell, realdata, method):
  """Few images of a transistor, at the usual size; how well they are told apart is not for so few."""
  transistor, name = realdata / 'mvtec_ad/transistor', method[-1].strip('-')
  for source, folder in (('train/good', f'{name}/good'), ('test/bent_lead', f'{name}/new')):
    (shell.folder / folder).mkdir(parents=True)
    for path in sorted((transistor / source).iterdir())[:6]:
      shutil.copy(path, shell.folder / folder)
  shell.run(shell.patchcore, 'fit', f'{name}/good', '--out', f'{name}/bank', '--folds=2', *method,
            '--backbone=resnet18_slim.procedural')
  shell.run(shell.patchcore, 'predict', f'{name}/bank', f'{name}/new', '--out', f'{name}/out', '--why')
  assert len(_decisions(shell.folder / name / 'out')) == 6
  assert len(list((shell.folder / name / 'out/overlays').iterdir())) == 6


def test_demo(shell):
  """Its images are drawn; one kind of part is enough here."""
  told = shell.run(shell.patchcore, 'demo', '--categories=gear')
  assert (shell.folder / 'patchcore_demo/results/report.html').exists() and 'patchcore fit' in told


def _served(shell):
  """Asks the service about one image; returns the answer, and the exit code after Ctrl-C."""
  process = subprocess.Popen(
      [shell.patchcore, 'serve', 'bank', '--port=0'], cwd=shell.folder, env=shell.environment, text=True,
      stdout=subprocess.PIPE)
  try:
    address = next(filter(None, (re.search(r'Ready at (\S+):', line) for line in process.stdout)))[1]
    image = (shell.folder / 'new/hole0.png').read_bytes()
    with urllib.request.urlopen(f'{address}/inspect', image, timeout=60) as response:
      answer = json.load(response)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    return answer, process.wait(timeout=60)
  finally:
    process.kill()
    process.wait()
