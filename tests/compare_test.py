"""The comparison of runs: what is read, what is left out, the figures in its tables, and errors of a line."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from configs import demo
from experiments import compare
from patchcore_jax import metrics
from patchcore_jax.report import comparison, per_image, results
from tests.conftest import ROOT

MANY = 1000  # resamples


def scores_of(category, quality, good=12, anomalous=15, root='data', ratio=0.1, seed=0):
  """Scores of a category; methods of the same seed see the same difficulties."""
  rng = np.random.default_rng([seed, len(category)])
  labels = np.arange(good + anomalous) >= good
  hard, own = rng.standard_normal((2, labels.size))
  values = hard + quality * labels + 0.3 * quality * own
  return [
      per_image.Score(f'{root}/{category}/test/{"cut" if label else "good"}/{i:03}.png',
                      'cut' if label else 'good', int(label), ratio, float(value))
      for i, (label, value) in enumerate(zip(labels, values, strict=True))]


def run_of(folder, categories):
  """Writes a run: {category: scores}."""
  rows = []
  for category, scores in categories.items():
    per_image.write_scores(folder / 'scores' / f'{category}.csv', scores)
    for ratio in sorted({s.coreset_ratio for s in scores}):
      own = [s for s in scores if s.coreset_ratio == ratio]
      rows.append({'category': category, 'coreset_ratio': ratio} | dict.fromkeys(results.COUNTS, 1)
                  | metrics.evaluate([s.label for s in own], [s.image_score for s in own])
                  | dict.fromkeys(results.TIMINGS, 0.5))
  results.write_csv(folder / 'results.csv', rows)
  (folder / 'config.json').write_text(demo.get_config().to_json_best_effort())
  return folder


def cells(line):
  return [cell.strip() for cell in line.strip().strip('|').split('|')]


@pytest.fixture
def two(tmp_path):
  return [run_of(tmp_path / name, {c: scores_of(c, quality) for c in ('nut', 'screw')})
          for name, quality in (('strong', 3.0), ('weak', 0.5))]


class TestReading:

  def test_an_image_is_its_path_from_the_category_on(self, tmp_path):
    here, there = (
        comparison.read(run_of(tmp_path / name, {'nut': scores_of('nut', 1, root=root)}))
        for name, root in (('a', '/data/nut'), ('b', r'D:\mvtec')))
    found = comparison.shared([here, there])
    assert len(found.scores['nut'][0]) == 27 and not found.notes
    assert list(there.scores['nut'])[0] == 'nut/test/good/000.png'

  def test_measured_maps_are_a_run_without_settings(self, two):
    (two[1] / 'config.json').unlink()
    detector, maps = map(comparison.read, two)
    assert maps.title == 'anomaly maps, measured as unknown' and maps.scores.keys() == detector.scores.keys()
    (two[1] / per_image.MAPS).write_text('{"metrics": {"protocol": "mvtec_official"}}')
    detector, maps = map(comparison.read, two)
    assert (detector.protocol, maps.protocol) == ('paper', 'mvtec_official')
    (note,) = comparison.shared([detector, maps]).notes
    assert 'measured otherwise (paper, mvtec_official)' in note
    (two[1] / per_image.MAPS).write_text('{"metrics": {"protocol": "paper"}}')
    assert comparison.shared([detector, comparison.read(two[1])]).notes == ()

  def test_what_one_run_lacks_is_left_out_and_told(self, tmp_path):
    both = {'nut': scores_of('nut', 1), 'screw': scores_of('screw', 1)}
    a = run_of(tmp_path / 'a', both | {'bolt': scores_of('bolt', 1)})
    b = run_of(tmp_path / 'b', both | {'nut': both['nut'][::-1][:-2]})  # another order
    found = comparison.shared([comparison.read(a), comparison.read(b)])
    first, second = found.scores['nut']
    assert [s.path for s in first] == [s.path for s in second] and len(first) == 25
    assert set(found.scores) == {'nut', 'screw'}
    told = '\n'.join(found.notes)
    assert 'bolt is left out' in told
    assert f'2 of 27 images of {a}' in told and 'nut/test/good/000.png, nut/test/good/001.png' in told

  def test_ratios(self, tmp_path):
    both = [*scores_of('nut', 1), *scores_of('nut', 2, ratio=0.01)]
    folder = run_of(tmp_path / 'a', {'nut': both})
    for ratio, of in ((0.1, both[:27]), (0.01, both[27:])):
      assert [*comparison.read(folder, ratio).scores['nut'].values()] == of
    for ratio in (None, 0.25):
      with pytest.raises(ValueError, match='0.1, 0.01: expected one of them as --ratio'):
        comparison.read(folder, ratio)
    only = run_of(tmp_path / 'b', {'nut': both[27:]})
    assert len(comparison.read(only, 0.5).scores['nut']) == 27

  def test_errors(self, two, tmp_path):
    (tmp_path / 'empty').mkdir()
    other = run_of(tmp_path / 'other', {'pill': scores_of('pill', 1)})
    elsewhere = run_of(tmp_path / 'elsewhere', {
        'nut': [s._replace(path=s.path.replace('test', 'more')) for s in scores_of('nut', 1)]})
    turned = run_of(tmp_path / 'turned', {
        'nut': [s._replace(label=1 - s.label) for s in scores_of('nut', 1)]})
    twice = run_of(tmp_path / 'twice', {'nut': scores_of('nut', 1) * 2})
    for folders, words in (
        (two[:1], 'two runs or more'), ([two[0], tmp_path / 'empty'], 'empty is no finished run'),
        ([two[0], tmp_path], 'is no finished run'),  # runs lie below it
        ([two[0], other], 'No images in common .*: expected runs of the same .* saw nut, screw; pill'),
        ([two[0], elsewhere], 'No images in common'),
        ([two[0], twice], 'two scores of nut/test/good/000.png'),
        ([two[0], turned], 'nut/test/good/000.png is good in one run and anomalous in another')):
      with pytest.raises(ValueError, match=words):
        compare.run(folders)


class TestTwoRuns:

  def test_the_table_says_what_the_functions_say(self, two, capsys):
    compare.run(two, resamples=MANY, seed=3)
    printed = capsys.readouterr().out
    lines = {cells(line)[0]: cells(line) for line in printed.splitlines() if line.startswith('|')}
    found = comparison.shared([comparison.read(folder) for folder in two])
    rows, _ = comparison.differences(comparison.IMAGE_AUROC, found.scores, resamples=MANY, seed=3)
    assert [row.category for row in rows] == ['nut', 'screw']
    for row, (first, second), p in zip(
        rows, found.scores.values(), metrics.holm([row.p_value for row in rows]), strict=True):
      labels = [s.label for s in first]
      a, b = ([s.image_score for s in own] for own in (first, second))
      assert row.first == metrics.auroc_interval(labels, a)
      assert row.difference.estimate == metrics.auroc(labels, a) - metrics.auroc(labels, b)
      assert row.difference.low <= row.difference.estimate <= row.difference.high
      line = lines[row.category]
      assert line[1:4] == ['12 + 15', row.first.text(), row.second.text()]
      assert line[4].startswith(f'{row.difference.estimate:+.3f} [{row.difference.low:+.3f}')
      assert line[-1] == ('A' if row.difference.low > 0 and p < 0.05 else '')
    means = lines['mean of 2']
    assert means[2] == f'{np.mean([row.first.estimate for row in rows]):.3f}'
    assert 'seed 3' in printed and '1,000 permutations' in printed and 'n = 2 categories' in printed
    assert 'cannot be below 0.500' in printed
    assert 'AUPIMO is not compared' in printed

  def test_better_is_marked_where_the_data_tell(self, tmp_path):
    strong, weak, equal = (
        run_of(tmp_path / name, {'nut': scores_of('nut', quality, 40, 60)})
        for name, quality in (('strong', 3.0), ('weak', 0.5), ('equal', 3.01)))

    def mark(*folders):
      found = comparison.shared([comparison.read(folder) for folder in folders])
      rows, _ = comparison.differences(comparison.IMAGE_AUROC, found.scores, resamples=MANY)
      return comparison.difference_table(comparison.IMAGE_AUROC, rows, ('A', 'B')).rows[0][-1]

    assert (mark(strong, weak), mark(weak, strong), mark(strong, equal)) == ('A', 'B', '')

  def test_a_difference_is_marked_by_interval_and_p_together(self):
    def row(low, high, p):
      interval = metrics.Interval(0.1, low, high, 'percentile')
      return comparison.Difference('nut', (1, 1), interval, interval, interval, p, None, None, None, None)
    assert comparison.differs(row(0.05, 0.2, 0.01), 0.01) == 1
    assert comparison.differs(row(-0.01, 0.2, 0.01), 0.01) == 0
    assert comparison.differs(row(0.05, 0.2, 0.01), 0.05) == 0
    assert comparison.differs(row(None, None, 0.01), 0.01) == 0

  def test_same_seed_same_text(self, two, capsys):
    texts = []
    for seed in (0, 0, 1):
      compare.run(two, resamples=MANY, seed=seed)
      texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2].replace('seed 1', 'seed 0')

  def test_perfect_runs_are_not_told_apart(self, tmp_path, capsys):
    folders = [
        run_of(tmp_path / name, {'nut': [
            s._replace(image_score=s.label + i / 10) for s in scores_of('nut', 1)]})
        for i, name in enumerate('ab')]
    compare.run(folders, resamples=MANY)
    printed = capsys.readouterr().out
    line = next(cells(line) for line in printed.splitlines() if line.startswith('| nut'))
    assert 'takes the difference on nut for certain' in printed
    assert line[2] == line[3] != '1.000 [1.000, 1.000]' and line[2].startswith('1.000 [0.8')
    assert line[4:] == ['+0.000 [-, -]', '1.000', '1.000', '']

  def test_one_class_only_has_no_auroc(self, two, tmp_path, capsys):
    for folder in two:
      run_of(folder, {'nut': scores_of('nut', 1), 'pill': scores_of('pill', 1, anomalous=0)})
    compare.run(two, resamples=MANY)
    assert '- pill is left out: all 12 images are good.' in capsys.readouterr().out

  def test_aupimo(self):
    rng, both = np.random.default_rng(0), []
    first = rng.random(30)
    for values in (first, np.clip(first - 0.1 * rng.random(30), 0, 1)):
      both.append([
          s._replace(aupimo=None if i < 12 or i == 20 else float(values[i - 12]))
          for i, s in enumerate(scores_of('nut', 1, 12, 30))])
    assert comparison.has_aupimo({'nut': both})
    assert not comparison.has_aupimo({'nut': [both[0], scores_of('nut', 1, 12, 30)]})
    (row,), notes = comparison.differences(comparison.AUPIMO, {'nut': both}, resamples=MANY)
    a, b = (np.array([s.aupimo for s in own if s.aupimo is not None]) for own in both)
    test = metrics.wilcoxon(a, b)
    assert (row.p_value, row.remaining, row.effect_size) == (test.p_value, test.remaining, test.effect_size)
    assert row.difference.estimate == pytest.approx((a - b).mean(), abs=1e-12)
    assert row.difference.low > 0 and not notes
    assert '1 of 30 anomalous images are left out' in row.difference.notes[-1]
    assert np.std(row.drawn) == pytest.approx(np.std(a - b) / np.sqrt(29), rel=0.1)
    table = comparison.difference_table(comparison.AUPIMO, [row], ('A', 'B'))
    assert table.rows[0][5:7] == (f'{test.remaining}', f'{test.effect_size:+.2f}')
    assert all(len(cells) == len(table.head) for cells in table.rows)
    assert len({len(cells) for cells in table.rows}) == 1
    none = [[s._replace(aupimo=None) for s in own] for own in both]
    _, notes = comparison.differences(comparison.AUPIMO, {'nut': none}, resamples=MANY)
    assert 'no image has an AUPIMO in both runs' in notes[0]

  def test_categories_do_not_move_together(self, tmp_path):
    """Equal data twice are two categories; drawn alike, their mean would vary as much as one of them."""
    same = scores_of('nut', 0.7)
    a, b = (scores_of('nut', quality) for quality in (0.7, 0.2))
    rows, _ = comparison.differences(
        comparison.IMAGE_AUROC, {'nut': [a, b], 'same': [a, b]}, resamples=MANY)
    assert len(same) == 27 and abs(np.corrcoef(rows[0].drawn, rows[1].drawn)[0, 1]) < 0.15


class TestSeveralRuns:

  @pytest.fixture
  def three(self, tmp_path):
    return [run_of(tmp_path / name, {c: scores_of(c, quality) for c in ('nut', 'screw', 'bolts', 'a')})
            for name, quality in (('strong', 3.0), ('weak', 0.2), ('middle', 1.0))]

  def test_files(self, three, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    compare.run(three, out=tmp_path / 'out', resamples=MANY)
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        'comparison.md', 'image_auroc_A_B.csv', 'image_auroc_A_C.csv', 'image_auroc_B_C.csv',
        'critical_difference_image_auroc.png', 'critical_difference_image_auroc.svg'}
    assert (tmp_path / 'out' / 'comparison.md').read_text() in printed
    rows = (tmp_path / 'out' / 'image_auroc_A_B.csv').read_text().splitlines()
    assert rows[0].startswith('category,images,A,B,A - B,') and len(rows) == 6
    ranks = re.search(r'ranks by image AUROC over n = 4 categories .*: A (\S+), C (\S+), B (\S+)\.', printed)
    assert 1 <= float(ranks[1]) < float(ranks[2]) < float(ranks[3]) <= 3

  def test_figure(self):
    pytest.importorskip('matplotlib')
    values = {f'{i}': [0.9 + i / 1000, 0.8, 0.7, 0.71] for i in range(12)}
    figure = comparison.critical_difference_figure('image AUROC', values, list('ABCD'))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == f'critical difference {4.690 / np.sqrt(12):.2f}' and ' A (1.00) ' in texts[1:]
    # A and B, B and C's two neighbours: bars join ranks that are within the critical difference of 1.35.
    bars = [line.get_xdata() for line in figure.axes[0].lines if line.get_linewidth() == 3]
    np.testing.assert_allclose(bars, [[0.98, 2.02], [1.98, 3.02], [2.98, 4.02]], atol=1e-9)

  def test_aupimo_of_files(self, three, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    for folder, shift in zip(three, (0.2, 0.0, 0.1), strict=True):
      for path in sorted((folder / 'scores').iterdir()):
        values = np.random.default_rng(len(path.stem)).uniform(0, 0.8, 27) + shift
        per_image.write_scores(path, [
            s._replace(aupimo=float(v) if s.label else None)
            for s, v in zip(per_image.read_scores(path), values, strict=True)])
    compare.run(three, out=tmp_path / 'out', resamples=MANY)
    assert {path.name for path in (tmp_path / 'out').glob('*aupimo*')} == {
        'aupimo_A_B.csv', 'aupimo_A_C.csv', 'aupimo_B_C.csv', 'critical_difference_aupimo.png',
        'critical_difference_aupimo.svg', 'aupimo_of_images.png', 'aupimo_of_images.svg'}
    assert 'ranks by AUPIMO over n = 4 categories (1 is best): A 1.00, C 2.00, B 3.00.' in (
        capsys.readouterr().out)

  def test_figure_has_every_image_and_its_box(self):
    pytest.importorskip('matplotlib')
    scores = [per_image.Score(f'nut/test/cut/{i}.png', 'cut', 1, 0.1, 1.0, i / 8) for i in range(9)]
    good = per_image.Score('nut/test/good/0.png', 'good', 0, 0.1, 0.0)
    other = [s._replace(aupimo=1 - s.aupimo / 2) for s in scores]
    figure = comparison.per_image_figure({'nut': ([*scores, good], [*other, good])}, ['A', 'B'])
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ['nut, B', 'nut, A']
    drawn = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == '.']
    assert drawn == [[s.aupimo for s in other], [s.aupimo for s in scores]]
    with pytest.raises(ValueError, match='No image has an AUPIMO in all runs'):
      comparison.per_image_figure({'nut': ([good], [good])}, ['A', 'B'])

  def test_one_category_has_no_ranks(self, capsys, tmp_path):
    folders = [run_of(tmp_path / name, {'nut': scores_of('nut', quality)})
               for name, quality in (('a', 1), ('b', 2), ('c', 3))]
    compare.run(folders, resamples=MANY, out=tmp_path / 'out')
    assert 'No ranks by image AUROC: 1 categories' in capsys.readouterr().out
    assert not list((tmp_path / 'out').glob('critical*'))


class TestCommand:

  def test_a_mistake_is_one_line(self, two, tmp_path):
    found = subprocess.run(
        [sys.executable, '-m', 'experiments.compare', str(two[0]), str(tmp_path / 'none')],
        capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 1 and not found.stdout
    assert found.stderr.startswith('error: ') and found.stderr.count('\n') == 1
    assert 'none is no finished run' in found.stderr

  def test_options(self, two, tmp_path, capsys):
    compare.main([*map(str, two), '--seed=5', '--ratio=0.1', '--resamples=1000', f'--out={tmp_path / "out"}'])
    assert 'seed 5' in capsys.readouterr().out
    assert 'seed 5' in (tmp_path / 'out' / 'comparison.md').read_text()
    for option in ('--seed=-1', '--resamples=10'):
      with pytest.raises(SystemExit):
        compare.main([*map(str, two), option])
      assert 'error: Expected a seed' in capsys.readouterr().err


def test_config_is_read(two):
  config = json.loads((two[0] / 'config.json').read_text())
  assert config['backbone']['name'] in comparison.read(two[0]).title
