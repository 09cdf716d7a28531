"""The programs of docs/examples.md, as they stand there, in a folder with images."""

import re
import subprocess
import sys

import numpy as np
import pytest

from tests import plates
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # whole networks are compiled
_PAGE = (ROOT / 'docs/examples.md').read_text()
_PROGRAMS = dict(re.findall(r'## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```', _PAGE, re.S))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  for i in range(8):
    plates._draw(tmp_path / f'GOOD/{i}.png', rng)
    plates._draw(tmp_path / f'MORE/late{i}.png', rng, 'hole' if i == 3 else None)
    plates._draw(tmp_path / f'NEW/{i}.png', rng, 'spot' if i % 2 else None)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _run(title, **names):
  # A network that needs no download.
  program = _PROGRAMS[title].replace('wide_resnet50_2.racm_in1k', 'resnet18_slim.procedural')
  exec(compile(program, title, 'exec'), names)
  return names


def test_all_are_run():
  assert len(_PROGRAMS) == 5


def test_own_images_and_a_line_with_the_service(folder, capsys):
  pytest.importorskip('starlette', reason='EXTRA ABSENT: serve; this check did not run')
  _run('Own images')
  own = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in own] == ['good', 'anomalous'] * 4
  service = subprocess.Popen(
      [sys.executable, '-m', 'patchcore_jax', 'serve', 'banks/part', '--port=0'], text=True,
      stdout=subprocess.PIPE)
  try:
    port = next(filter(None, (re.search(r'Ready at \S+:(\d+):', line) for line in service.stdout)))[1]
    program = _PROGRAMS['A line with the service'].replace(':8000/', f':{port}/')
    exec(compile(program, 'service', 'exec'), {})
  finally:
    service.kill()
    service.wait()
  assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ['good', 'anomalous'] * 4


def test_few_images_and_more(folder, capsys):
  found = _run('Few good images at first, more later')
  assert 'late3.png' in capsys.readouterr().out
  assert len(found['later'].calibration.image_scores) == 16 and (folder / 'banks/more').is_dir()


def test_a_backbone_of_one_s_own(folder, capsys):
  assert 'mine' in _run("A backbone of one's own")['inspector'].about()


def test_coming_from_anomalib(folder):
  assert _run('Coming from anomalib')['inspector'].inspect('NEW/1.png').anomalous
