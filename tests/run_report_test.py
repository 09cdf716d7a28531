"""report.html of whole runs, on small images."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments import mvtec
from patchcore_jax.banks import calibration
from patchcore_jax.banks.model import Description
from patchcore_jax.evaluation import page as run_page
from patchcore_jax.report import page, results
from tests import plates


def shown(workdir):
  """What the page holds for its script."""
  text = (workdir / 'report.html').read_text()
  return json.loads(text.partition('id="data">')[2].partition('</script>')[0])


@pytest.fixture(scope='module')
def finished(pristine, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return workdir, mvtec.run(plates.config(pristine), workdir)


@pytest.fixture
def run(pristine, finished):
  """(config, workdir, rows)"""
  return plates.config(pristine), *finished


class TestRuns:

  def test_page_of_all_categories(self, run):
    _, workdir, rows = run
    text, data = (workdir / 'report.html').read_text(), shown(workdir)
    for row in rows:
      assert f'data-key="{row["image_auroc"]!r}"' in text
    assert [c['name'] for c in data['categories']] == ['bolt', 'nut'] and len(data['pictures']) == 16
    for category, name in enumerate(('bolt', 'nut')):
      (threshold,) = data['categories'][category]['thresholds']
      assert threshold['needs_labels'] and threshold['value'] == next(
          r['image_threshold'] for r in rows if r['category'] == name and r['coreset_ratio'] == 0.2)
    assert 'random weights' in text and 'coreset.projection_dim' in text
    assert str(workdir.parent) not in text  # the page is passed on

  def test_pictures(self, run):
    _, workdir, _ = run
    pictures = {p['name']: p for p in shown(workdir)['pictures'] if p['category'] == 1}
    assert set(pictures) == {
        *(f'test/good/{i:03}.png' for i in range(4)),
        *(f'test/{("spot", "hole")[i % 2]}/{i:03}.png' for i in range(4))}
    for name, p in pictures.items():
      good = '/good/' in name
      assert (p['label'], p['defect']) == ((0, '') if good else (1, name.split('/')[1]))
      assert bool(p['outline']) != good and p['heat'] is not None and p['size'] == [56, 56]
      # The patch that decides lies on the defect, give or take what a patch sees; the nearest is a good one.
      assert p['nearest']['name'].startswith('train/good/')
      if not good:
        points = [tuple(map(float, xy.split())) for xy in p['outline'].strip('MZ').split('L')]
        xs, ys = zip(*points)
        left, top, right, bottom = (1000 * v for v in p['patch'])
        assert min(xs) - 250 < (left + right) / 2 < max(xs) + 250
        assert min(ys) - 250 < (top + bottom) / 2 < max(ys) + 250

  def test_a_run_that_goes_on_has_all_categories_again(self, run, tmp_path):
    config, workdir, rows = run
    stopped = shutil.copytree(workdir, tmp_path / 'run')
    results.write_csv(stopped / 'results.csv', [r for r in rows if r['category'] == 'bolt'])
    (stopped / 'report/nut.json').unlink()
    (stopped / 'report.html').unlink()
    mvtec.run(config, stopped)
    assert shown(stopped) == shown(workdir)

  def test_a_run_of_before_a_metric_was_added(self, run, tmp_path):
    config, workdir, rows = run
    before = shutil.copytree(workdir, tmp_path / 'run')
    (before / 'report.html').unlink()
    columns = zip(*(line.split(',') for line in (before / 'results.csv').read_text().splitlines()))
    kept = [c for c in columns if c[0] != 'image_ap']
    (before / 'results.csv').write_text(''.join(','.join(line) + '\n' for line in zip(*kept)))
    assert mvtec.run(config, before) == [row | {'image_ap': None} for row in rows]
    assert shown(before) == shown(workdir)

  def test_without_pictures_the_results_are_the_same(self, run, tmp_path):
    config, _, rows = run
    config.report.gallery, config.data.categories = 0, ('nut',)
    without = mvtec.run(config, tmp_path)
    names = set(rows[0]) - set(plates.TIMINGS)
    assert [{k: r[k] for k in names} for r in without] == [
        {k: r[k] for k in names} for r in rows if r['category'] == 'nut']
    assert shown(tmp_path)['pictures'] == []
    assert page.from_json((tmp_path / 'report/nut.json').read_text()).scores

  def test_a_negative_number_of_pictures(self, run, tmp_path):
    config, _, _ = run
    config.report.gallery = -1
    with pytest.raises(ValueError, match='report.gallery=-1: expected at least 0'):
      mvtec.run(config, tmp_path)


class TestThresholds:

  def test_the_one_from_good_images_decides(self):
    row = {'image_threshold': 0.25}
    best = page.Threshold('best F1', 0.25, needs_labels=True)
    found = calibration.calibrate([0.25, 0.5], None, false_alarm_rate=0.05)
    bare = Description('patchcore', {}, (), (8, 8), 2)
    assert run_page.thresholds(dataclasses.replace(bare, calibration=found), row) == [
        page.Threshold('5 % false alarms', found.image_threshold), best]
    assert run_page.thresholds(bare, row) == [best]
    assert run_page.thresholds(bare, {'image_threshold': None}) == []


class TestHeatScale:

  def test_from_what_good_images_hardly_reach(self):
    maps = np.random.default_rng(0).random((6, 40, 40)).astype(np.float32)
    maps[3:, 10:20, 10:20] += 5
    heat, low, high = run_page.heat_scale(np.array([0, 0, 0, 1, 1, 1]), maps)
    assert 0.95 < np.exp(low) < 1 and 5.9 < np.exp(high) <= 6
    # On a scale of ratios, twice as much is as far everywhere.
    np.testing.assert_allclose(np.diff(heat(np.array([1.0, 2.0, 4.0]))), np.log(2))
    assert (heat(maps) >= low).all()

  @pytest.mark.parametrize('maps', [
      None, np.zeros((2, 8, 8), np.float32), np.full((2, 8, 8), 3.0), np.full((2, 8, 8), -3.0),
      np.full((2, 8, 8), 1e-30)])
  def test_is_never_empty(self, maps):
    heat, low, high = run_page.heat_scale(np.array([1, 1]), maps)
    assert low < high
    if maps is not None:
      page.picture('a', 0.5, np.zeros((8, 8, 3), np.uint8), anomaly_map=heat(maps[0]), low=low, high=high)
