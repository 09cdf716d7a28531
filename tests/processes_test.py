"""Several processes, as on several machines: they give the results of one."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from experiments import mvtec
from patchcore_jax import inspection
from patchcore_jax.banks import provenance, store
from tests import command as patchcore
from tests import conftest, plates

COUNT = 3
NETWORK = {'backbone__name': 'tests.small:backbone', 'backbone__weights': '', 'backbone__layers': ()}


def _flags(data, overrides):
  return [
      f'--config.{k}={",".join(map(str, v)) if isinstance(v, tuple) else v}'
      for k, v in plates.fields(data, overrides).items() if v != ()]


def _run(*command, count=COUNT, devices=2, each=lambda i: (), path='', dash='_'):
  """(exit code, stdout, stderr) of processes that run side by side, of so many devices each."""
  env = os.environ | {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': os.pathsep.join(filter(None, [str(path), os.environ.get('PYTHONPATH')]))}
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  processes = [
      subprocess.Popen(
          [sys.executable, '-m', *command, f'--coordinator{dash}address={address}',
           f'--num{dash}processes={count}', f'--process{dash}id={i}', *each(i)],
          cwd=conftest.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for i in range(count)]
  try:
    outputs = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def _damage(data):
  """One image fewer: processes have different numbers."""
  path = data / 'bolt/train/good/000.png'
  path.write_bytes(path.read_bytes()[:50])


def test_rows_of_all_processes(tmp_path):
  script = '''
import sys, jax, numpy as np
from patchcore_jax import processes
address, count, i = [flag.partition('=')[2] for flag in sys.argv[1:]]
jax.distributed.initialize(address, int(count), int(i))
processes._BLOCK = 24  # three rows at a time
n = 5 * int(i)  # none, five and ten
rows = np.arange(2 * n, dtype=np.float32).reshape(n, 2) + 100 * int(i)
whole = np.concatenate([np.arange(4 * k * 2.5).reshape(-1, 2) + 100 * k for k in range(3)])
np.testing.assert_array_equal(processes.joined(rows), whole)
np.testing.assert_array_equal(processes.joined(rows[:0]), whole[:0])
indices = np.array([14, 0, 5, 4])
np.testing.assert_array_equal(processes.gather_rows(rows, processes.counts(n), indices), whole[indices])
assert processes.joined_files([b'a' * int(i)] * 2) == [b'', b'', b'a', b'a', b'aa', b'aa']
assert processes.agree('same') and not processes.agree(str(i))
print('all equal')
'''
  (tmp_path / 'script.py').write_text(script)
  results = _run('script', path=tmp_path)
  assert all('all equal' in out for _, out, _ in results), results


class TestMvtec:

  def test_as_one_process(self, data, tmp_path):
    _damage(data)
    overrides = NETWORK | {'data__on_error': 'skip'}
    mvtec.run(plates.config(data, **overrides), tmp_path / 'one')
    command = ('experiments.mvtec', '--config=configs/wrn50.py', f'--workdir={tmp_path / "several"}',
               *_flags(data, overrides))
    results = _run(*command)
    assert [code for code, *_ in results] == [0] * COUNT, results
    (_, first, _), *others = results
    assert 'Coreset 0.2 of all' in first and all('Coreset' not in out for _, out, _ in others)
    assert sum(out.count('skipped: ') for _, out, _ in results) == 1
    for name in ('bolt', 'nut'):
      one, several = (store.restore(tmp_path / run / 'banks' / name) for run in ('one', 'several'))
      np.testing.assert_array_equal(several.arrays['indices'], one.arrays['indices'])
      np.testing.assert_allclose(
          several.arrays['embeddings'], one.arrays['embeddings'], rtol=1e-5, atol=1e-6)
      several, one = (model.with_description(fit_seconds=None).description for model in (several, one))
      assert several == one and one.num_skipped == (name == 'bolt')
    _same_rows(plates.results(tmp_path / 'one'), plates.results(tmp_path / 'several'))
    names = [[p.relative_to(tmp_path / run) for p in sorted((tmp_path / run).rglob('*.*'))
              if 'banks' not in p.parts] for run in ('one', 'several')]
    assert names[0] == names[1]
    # And goes on where it was.
    shutil.rmtree(tmp_path / 'several/banks/nut')
    again = _run(*command)
    assert [code for code, *_ in again] == [0] * COUNT and 'finished before' in again[0][1]

  @pytest.mark.slow
  def test_another_detector_and_an_ensemble(self, data, tmp_path):
    for i, overrides in enumerate((
        {'detector': 'padim', 'padim__num_dims': 6},
        {'backbone__name': 'tests.small:backbone+tests.small:backbone'})):
      overrides = NETWORK | {'data__categories': ('nut',)} | overrides
      one, several = tmp_path / f'one{i}', tmp_path / f'several{i}'
      mvtec.run(plates.config(data, **overrides), one)
      results = _run('experiments.mvtec', '--config=configs/wrn50.py', f'--workdir={several}',
                     *_flags(data, overrides), count=2, devices=1)
      assert [code for code, *_ in results] == [0, 0], results
      _same_rows(plates.results(one), plates.results(several))

  def test_when_one_fails_all_end(self, data, tmp_path):
    _damage(data)
    results = _run(
        'experiments.mvtec', '--config=configs/wrn50.py', f'--workdir={tmp_path / "run"}',
        *_flags(data, NETWORK), count=2)
    (code, _, error), (other, *_) = results
    assert code == 1 and 'error: process 0: Cannot read' in error
    assert other  # JAX aborts it when the first one is gone, if it has not noticed itself
    assert not list((tmp_path / 'run').rglob('*bolt*'))

  def test_processes_that_differ_say_so(self, data, tmp_path):
    results = _run(
        'experiments.mvtec', '--config=configs/wrn50.py', f'--workdir={tmp_path / "run"}',
        *_flags(data, NETWORK), count=2, each=lambda i: (f'--config.seed={i}',))
    assert [code for code, *_ in results] == [1, 1]
    for i, (_, _, err) in enumerate(results):
      assert f'error: process {i}: The processes differ in their settings' in err


class TestFit:

  @pytest.fixture
  def good(self, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
      plates._draw(tmp_path / f'plates/{i:02}.png', rng)
    return tmp_path / 'plates'

  def test_as_one_process(self, good, tmp_path):
    flags = patchcore.flags(false_alarm_rate=0.2, folds=3)
    patchcore.done('fit', good, '--out', tmp_path / 'one', *flags)
    one = store.restore(tmp_path / 'one')
    results = _run('patchcore_jax', 'fit', str(good), f'--out={tmp_path / "several"}', *flags, dash='-')
    assert [code for code, *_ in results] == [0] * COUNT, results
    (_, first, _), *others = results
    assert 'threshold' in first and all('threshold' not in out for _, out, _ in others)
    several = inspection.load(tmp_path / 'several').model
    np.testing.assert_array_equal(several.arrays['indices'], one.arrays['indices'])
    assert several.description.images == one.description.images
    assert provenance.thumbnails(several) == provenance.thumbnails(one)
    found = dataclasses.asdict(several.description.calibration)
    for field, value in dataclasses.asdict(one.description.calibration).items():
      assert found[field] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5))

  def test_processes_that_differ_say_so(self, good, tmp_path):
    results = _run('patchcore_jax', 'fit', str(good), f'--out={tmp_path / "none"}', *patchcore.flags(),
                   dash='-', count=2, devices=1, each=lambda i: (f'--seed={i}',))
    assert [code for code, *_ in results] == [1, 1] and not (tmp_path / 'none').exists()
    assert all('The processes differ in their settings' in err for _, _, err in results)


@pytest.mark.parametrize('command, words', [
    (('sweep', '--distributed'), 'This binary runs on one machine'),
    (('mvtec', '--distributed'), 'Nothing tells which process this is'),
    (('mvtec', '--process_id=1'), 'Expected the coordinator')])
def test_mistakes_of_binaries(command, words, tmp_path):
  binary, flag = command
  result = subprocess.run(
      [sys.executable, '-m', f'experiments.{binary}', '--config=configs/low_shot.py', f'--workdir={tmp_path}',
       flag], cwd=conftest.ROOT, capture_output=True, text=True)
  assert result.returncode == 1 and f'error: {words}' in result.stderr


def test_mistakes_of_the_command(tmp_path):
  for i in range(2):
    plates._draw(tmp_path / f'good/{i}.png', np.random.default_rng(i))
  told = patchcore.refused('fit', tmp_path / 'good', '--out', tmp_path / 'bank', '--process-id=1')
  assert 'Expected the coordinator' in told


def _same_rows(one, several):
  assert len(one) == len(several)
  for a, b in zip(one, several, strict=True):
    assert a.keys() == b.keys()
    for field, value in a.items():
      try:
        assert float(b[field]) == pytest.approx(float(value), rel=1e-4), field
      except ValueError:
        assert b[field] == value
