"""The comparison with anomalib, with a peer that only says how long it took; and our side of it."""

import ast
import json
import stat
import sys

import pytest

from experiments import beside_anomalib, fit_and_test
from tests import conftest, plates

_FOUND = {'fit': 0.001, 'test': 0.001, 'bank_size': 3, 'num_train': 6, 'num_test': 4, 'versions': 'a peer'}


def _interpreter(path, says):
  """Makes a command that takes any arguments, and prints something."""
  path.write_text(f'#!{sys.executable}\nprint("a warning")\n{says}\n')
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return str(path)


class TestRun:

  @pytest.fixture
  def peers(self, tmp_path, monkeypatch):
    """Puts a command in the place of each side that counts its runs; returns the files of counts."""
    counts = {side: tmp_path / f'{i}.txt' for i, side in enumerate(
        (beside_anomalib.THEIRS, beside_anomalib.FIRST, beside_anomalib.OURS))}
    made = {side: [_interpreter(
        path.with_suffix('.py'), f'open({str(path)!r}, "a").write("x"); print({json.dumps(_FOUND)!r})')]
        for side, path in counts.items()}
    monkeypatch.setattr(beside_anomalib, 'commands', lambda *_: made)
    for name, value in {'_RATIOS': ['0.01', '0.1'], '_RUNS': 2, '_NUM_TRAIN': 5, '_NUM_TEST': 4}.items():
      monkeypatch.setattr(beside_anomalib, name, type('Flag', (), {'value': value}))
    monkeypatch.setattr(beside_anomalib.timing, 'machine', lambda: 'the machine')
    return counts

  def test_every_side_runs_as_often_and_goes_on(self, peers, pristine, tmp_path, capsys):
    workdir = tmp_path / 'run'
    for _ in range(2):  # the second has nothing to do
      beside_anomalib.run(sys.executable, pristine / 'bolt', workdir)
    assert [len(path.read_text()) for path in peers.values()] == [4, 4, 4]
    assert len(beside_anomalib.read(workdir)) == 12
    assert 'the machine' in capsys.readouterr().out
    assert len(list(workdir.glob('images/part/train/good/*'))) == 5
    kinds = [path.parent.name for path in sorted(workdir.glob('images/part/test/*/*'))]
    assert len(kinds) == 4 and set(kinds) == {'good', 'hole', 'spot'}

  def test_what_went_wrong_is_said(self, peers, pristine, tmp_path):
    with pytest.raises(ValueError, match='No interpreter'):
      beside_anomalib.run(str(tmp_path / 'none'), pristine / 'bolt', tmp_path / 'run')
    with pytest.raises(ValueError, match=r'0 training.*MVTec'):
      beside_anomalib.run(sys.executable, tmp_path, tmp_path / 'run')

  @pytest.mark.parametrize('says, why', [
      ('import sys; sys.exit("No module named anomalib")', 'code 1: No module named anomalib'),
      ('print("no JSON")', 'code 0: no JSON'),
      ('print(3)', 'code 0: 3')])
  def test_a_side_that_fails(self, says, why, tmp_path):
    with pytest.raises(ValueError, match=why):
      beside_anomalib.measured([_interpreter(tmp_path / 'peer', says), '--ratio=0.01'])


class TestTable:

  def test_medians_and_how_many_times(self):
    runs = [
        {**_FOUND, 'side': side, 'ratio': ratio, 'repeat': i, 'start': 1.0, 'whole': whole + i}
        for ratio in (0.1, 0.01) for i in range(3)
        for side, whole in ((beside_anomalib.THEIRS, 59.0), (beside_anomalib.OURS, 11.0))]
    rows = [line for line in beside_anomalib.table(runs) if 'whole command' in line]
    assert rows[0] == '| 1 % | whole command | 60 s (59 to 61) | 12 s (11 to 13) | 5.0 | - | - |'
    assert rows[1].startswith('| 10 % |') and len(rows) == 2


def test_the_two_sides_print_the_same_fields(pristine):
  config = plates.config(pristine / 'bolt', coreset__ratios=(0.2,))
  found = fit_and_test.measure(config)
  assert found['num_train'] == 6 and found['num_test'] == 8 and found['bank_size'] == 6 * 14 * 14 // 5
  assert found['fit'] > 0 and found['test'] > 0 and 0 <= found['image_auroc'] <= 1
  tree = ast.parse((conftest.ROOT / 'experiments/anomalib_peer.py').read_text())
  returned = next(node.value for node in ast.walk(tree) if isinstance(node, ast.Return))
  assert {key.value for key in returned.keys} == set(found)


def test_several_categories_are_refused(pristine):
  with pytest.raises(ValueError, match='2 categories: expected one'):
    fit_and_test.measure(plates.config(pristine))


def test_the_peer_needs_nothing_of_this_package():
  tree = ast.parse((conftest.ROOT / 'experiments/anomalib_peer.py').read_text())
  names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
  names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
  outside = {name.partition('.')[0] for name in names} - sys.stdlib_module_names
  assert outside == {'anomalib', 'torch'}
