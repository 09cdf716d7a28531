"""Rows of results: file, published numbers, table."""

import io

import pytest
from rich.console import Console

from patchcore_jax import metrics
from patchcore_jax.report import results


def _row(category='nut', ratio=0.1, **kwargs):
  # What only data sets of their own have is absent, as mostly.
  own = {'seg_f1', 'spro_05', 'image_auroc_mean'}
  measured = {name: None if name in own else 2 if metric.kind == 'count' else 0.5
              for name, metric in metrics.METRICS.items()}
  return dict.fromkeys(results.COUNTS, 1) | measured | dict.fromkeys(results.TIMINGS, 0.5) | {
      'category': category, 'coreset_ratio': ratio} | kwargs


class TestCsv:

  def test_round_trip_keeps_every_digit_and_absence(self, tmp_path):
    rows = [_row(image_auroc=1 / 3), _row('bolt', 0.01, pixel_auroc=None, aupro=None)]
    results.write_csv(tmp_path / 'r.csv', rows)
    assert results.read_csv(tmp_path / 'r.csv') == rows
    assert [p.name for p in tmp_path.iterdir()] == ['r.csv']

  def test_no_file_is_no_rows(self, tmp_path):
    assert results.read_csv(tmp_path / 'r.csv') == []

  def test_columns_that_others_read(self, tmp_path):
    # These and their order stay; a new metric stands behind them.
    assert results.columns()[:15] == (
        'category', 'coreset_ratio', 'num_train', 'num_test', 'num_skipped', 'bank_size', 'image_auroc',
        'image_ap', 'image_f1', 'image_threshold', 'false_positives', 'false_negatives',
        'error_at_full_recall', 'pixel_auroc', 'aupro')
    assert results.columns()[-2:] == ('fit_seconds', 'ms_per_image')
    results.write_csv(tmp_path / 'r.csv', [_row(aupro=None)])
    header, line = (tmp_path / 'r.csv').read_text().splitlines()
    assert header == ','.join(results.columns())
    assert line.startswith('nut,0.1,1,1,1,1,0.5,0.5,0.5,0.5,2,2,0.5,0.5,,') and line.endswith(',0.5,0.5')

  def test_a_metric_that_a_file_of_before_lacks_is_none(self, tmp_path):
    (tmp_path / 'r.csv').write_text(
        'category,coreset_ratio,num_train,num_test,num_skipped,bank_size,image_auroc,false_positives,'
        'fit_seconds,ms_per_image\nnut,0.1,209,83,0,1000,0.75,3,1.5,2.5\n')
    (row,) = results.read_csv(tmp_path / 'r.csv')
    assert tuple(row) == results.columns()
    assert row['image_auroc'] == 0.75 and row['false_positives'] == 3 and row['ms_per_image'] == 2.5
    assert row['aupro'] is None and results.mean([row, _row()], 'aupro') is None
    # A run that goes on writes every column for all rows.
    results.write_csv(tmp_path / 'r.csv', [row, _row('bolt')])
    assert results.read_csv(tmp_path / 'r.csv') == [row, _row('bolt')]

  def test_a_metric_that_is_no_longer_there_is_kept(self, tmp_path):
    results.write_csv(tmp_path / 'r.csv', [_row(old_metric='0.250')])
    assert (tmp_path / 'r.csv').read_text().splitlines()[0] == ','.join((*results.columns(), 'old_metric'))
    (row,) = results.read_csv(tmp_path / 'r.csv')
    assert row == _row(old_metric='0.250')
    results.write_csv(tmp_path / 'r.csv', [row, _row('bolt')])  # which has no such value
    assert [r['old_metric'] for r in results.read_csv(tmp_path / 'r.csv')] == ['0.250', '']

  def test_other_files(self, tmp_path):
    (tmp_path / 'r.csv').write_text('category,score\nnut,1\n')
    with pytest.raises(ValueError, match='category, score, expected also coreset_ratio, .*new workdir'):
      results.read_csv(tmp_path / 'r.csv')


class TestPublished:

  def test_the_papers_tables(self):
    folder = 'third_party/paper_tables'
    image = results.read_published(f'{folder}/table_s1_image_auroc.csv', 'PatchCore-25')
    assert image['average'] == pytest.approx(0.991) and image['screw'] == pytest.approx(0.981)
    pixel = results.read_published(f'{folder}/table_s2_pixel_auroc.csv', 'PatchCore-1')
    assert pixel['transistor'] == pytest.approx(0.949)
    aupro = results.read_published(f'{folder}/table_s3_aupro.csv', 'PatchCore-10')
    assert aupro['zipper'] == pytest.approx(0.971) and len(aupro) == 16

  @pytest.mark.parametrize('table, method, digits', [
      ('table_s1_image_auroc', 'PatchCore-10', 0.001), ('table_s2_pixel_auroc', 'PaDiM', 0.001),
      ('table_s3_aupro', 'SPADE', 0.001)])
  def test_averages_follow_from_the_categories(self, table, method, digits):
    values = results.read_published(f'third_party/paper_tables/{table}.csv', method)
    average = values.pop('average')
    assert sum(values.values()) / 15 == pytest.approx(average, abs=digits)

  def test_errors(self):
    with pytest.raises(ValueError, match="no method 'X'. It has: GeoTrans"):
      results.read_published('third_party/paper_tables/table_s1_image_auroc.csv', 'X')
    with pytest.raises(ValueError, match='No table'):
      results.read_published('none.csv', 'X')


class TestPrintTable:

  def _print(self, rows, **kwargs):
    out = io.StringIO()
    results.print_table(rows, console=Console(file=out, width=120), **kwargs)
    return out.getvalue()

  def test_block_per_ratio_and_mean_row(self):
    text = self._print([_row('a', 0.1, image_auroc=0.9), _row('b', 0.1, image_auroc=0.8),
                        _row('a', 0.01), _row('b', 0.01)])
    assert text.index('Coreset 0.1 ') < text.index('Coreset 0.01 ')
    mean = next(line for line in text.splitlines() if 'mean' in line)
    assert '85.0' in mean

  def test_absent_metrics_are_dashes_and_have_no_mean(self):
    text = self._print([_row('a', aupro=None), _row('b')])
    lines = {line.split()[1]: line for line in text.splitlines() if len(line.split()) > 4}
    assert ' - ' in lines['a'] and ' - ' in lines['mean']

  def test_published_beside_ours(self):
    text = self._print([_row('screw', 0.1)], published={('image_auroc', 0.1): {'screw': 0.97}})
    assert 'paper' in text and '97.0' in text
    # Nothing was published about parts of one's own.
    own = self._print([_row('own', 0.1)], published={('image_auroc', 0.1): {'screw': 0.97}})
    assert 'paper' not in own
