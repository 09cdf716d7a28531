"""The race of metrics on small maps, beside peers that stand for those that are not installed."""

import sys

import numpy as np
import pytest

from experiments import metrics_peer, metrics_speed
from patchcore_jax import metrics

# MVTec's functions, by their names: the areas are ours, so that what reaches them shows.
_SCRIPT = {
    'pro_curve_util.py': 'from patchcore_jax.metrics import aupro\n'
                         'compute_pro = lambda maps, masks: (aupro(maps, masks), None)',
    'roc_curve_util.py': 'from patchcore_jax.metrics import auroc\n'
                         'def compute_classification_roc(maps, score, labels):\n'
                         '  return auroc(labels, [score(m) for m in maps]), None',
    'generic_util.py': 'trapezoid = lambda x, y, x_max=1: x * x_max'}


@pytest.fixture
def official(tmp_path):
  folder = tmp_path / 'official'
  folder.mkdir()
  for name, text in _SCRIPT.items():
    (folder / name).write_text(text)
  return folder


class TestDraw:

  def test_is_the_same_every_time_within_0_and_1_and_differs_between_images(self):
    first, again, other = (metrics_speed.draw(i, 8, 56)[0] for i in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and first.min() >= 0 and first.max() <= 1

  def test_a_quarter_is_good(self):
    assert [bool(metrics_speed.draw(i, 8, 56)[1].any()) for i in range(8)] == [False] * 2 + [True] * 6


class TestPeer:

  @pytest.fixture
  def folder(self, tmp_path):
    metrics_speed.write(tmp_path, 8, 112)
    return tmp_path

  def test_all_metrics_are_computed_and_what_is_read_each_time_is_the_same(self, folder):
    found = metrics_speed.run(folder, 'ours', 'all', repeats=2)
    assert found['values'].keys() == metrics.METRICS.keys()
    # 24,000 good pixels are too few for AUPIMO's bounds.
    assert all(v is not None for name, v in found['values'].items() if not name.startswith('aupimo'))
    assert len(found['seconds']) == 2 and min(found['seconds']) > 0
    assert found['bytes_in_all'] > found['bytes'] >= 0
    assert metrics_speed.run(folder, 'ours', 'all', '--read_each_time')['values'] == found['values']

  @pytest.mark.parametrize('what', ['four', 'official', 'pixel_auroc', 'pixel_ap', 'pixel_f1', 'aupro'])
  def test_parts_are_those_of_the_whole(self, folder, what):
    maps, masks = (metrics_peer.Arrays(folder, name) for name in ('map', 'mask'))
    whole = metrics_peer.ours('ad')(maps, masks)
    assert metrics_peer.ours(what)(maps, masks).items() <= whole.items()

  def test_a_process_that_fails_is_named(self, folder):
    with pytest.raises(ValueError, match='--side=official.*No module named'):
      metrics_speed.run(folder, 'official', 'official')


class TestMeasure:

  def test_tables(self, official):
    lines = list(metrics_speed.measure(8, 56, 84, 1, official=str(official)))
    assert sum(line.startswith('| AU-PRO 0.3 and image AUROC |') for line in lines) == 2
    assert any('84 px read from files' in line for line in lines)
    assert any('| anomalib | not given |' in line for line in lines)
    compared = [line.split(' | ') for line in lines if line.startswith(('| aupro |', '| image_auroc |'))]
    assert [row[1] for row in compared] == ['official'] * 2
    assert all(abs(float(row[4].split()[0])) < 1e-12 for row in compared)

  def test_what_is_not_there_is_said_before_the_work(self, tmp_path):
    with pytest.raises(ValueError, match='No interpreter'):
      next(metrics_speed.measure(anomalib='no-such-python'))
    with pytest.raises(ValueError, match='has no pro_curve_util.py'):
      next(metrics_speed.measure(anomalib=sys.executable, official=str(tmp_path)))
