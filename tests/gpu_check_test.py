"""`experiments.gpu_check` from end to end, tiny, and the table that it ends with."""

import os
import subprocess
import sys

import pytest

from experiments import gpu_report


def _run(folder, *arguments):
  subprocess.run(
      [sys.executable, '-m', 'experiments.gpu_check', f'--out={folder}', '--small', *arguments], check=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True)
  return (folder / gpu_report.REPORT).read_text(), gpu_report.measured(folder)


def test_parts_are_measured_and_told(tmp_path):
  report, figures = _run(tmp_path, '--parts=selection,search')
  assert 'FAILED' not in report and 'differ' in report
  assert figures['begun'] == ['selection', 'search']
  assert figures['selection/ours'] > 0 and figures['search/ours'] > 0
  assert figures['selection/but'] == ''
  assert 'What must show' in report and 'only tried out' in report


def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path):
  report, figures = _run(tmp_path, '--parts=selection,parity', '--points=absent.npy', '--golden=absent')
  assert 'selection FAILED: FileNotFoundError' in report
  assert 'no folder absent' in report
  assert figures['begun'] == ['selection', 'parity']


def test_nothing_is_begun_without_time(tmp_path):
  (tmp_path / gpu_report.MEASURED).write_text('{"machine": "of another run"}')
  report, _ = _run(tmp_path, '--parts=selection', '--seconds=0')
  assert 'No machine was reached' in report and 'not measured' in report


class TestTable:

  def _row(self, figures, work):
    (row,) = [line for line in gpu_report.table(figures) if line.startswith(f'| {work}')]
    return [cell.strip() for cell in row.strip('|').split('|')]

  @pytest.mark.parametrize('ours, torch, ratio, reached', [
      (0.1, 3.0, '30.00', 'yes'), (1.0, 3.0, '3.00', 'no'), (1.0, None, '-', 'no torch'),
      (None, 3.0, '-', 'not measured')])
  def test_less_time_than_torch(self, ours, torch, ratio, reached):
    row = self._row({'selection/ours': ours, 'selection/torch': torch}, 'coreset 250,880')
    assert row[-2:] == [ratio, reached]

  def test_more_images_than_torch(self):
    figures = {'network_224_tensorfloat32/ours': 12_031.0, 'network_224_tensorfloat32/torch': 6519.0}
    assert self._row(figures, 'WRN-50 to layer3, 224')[-4:] == ['12,031', '6,519', '1.85', 'yes']

  def test_a_limit_of_its_own(self):
    assert self._row({'launches/ours': 301}, 'launches')[-1] == 'no'
    assert self._row({'search/ours': 0.03}, 'search')[-1] == 'yes'
    assert self._row({'search/ours': 0.03, 'search/but': ', but wrong'}, 'search')[-1] == 'yes, but wrong'
