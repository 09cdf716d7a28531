"""Rows of results: file, published numbers, table."""

import io

import pytest
from rich.console import Console

from patchcore_jax.report import results


def _row(category='nut', ratio=0.1, **kwargs):
  return dict.fromkeys(results.COUNTS, 1) | dict.fromkeys((*results.METRICS, *results.TIMINGS), 0.5) | {
      'category': category, 'coreset_ratio': ratio, 'false_positives': 2,
      'false_negatives': 0} | kwargs


class TestCsv:

  def test_round_trip_keeps_every_digit_and_absence(self, tmp_path):
    rows = [_row(image_auroc=1 / 3), _row('bolt', 0.01, pixel_auroc=None, aupro=None)]
    results.write_csv(tmp_path / 'r.csv', rows)
    assert results.read_csv(tmp_path / 'r.csv') == rows
    assert [p.name for p in tmp_path.iterdir()] == ['r.csv']

  def test_no_file_is_no_rows(self, tmp_path):
    assert results.read_csv(tmp_path / 'r.csv') == []

  def test_other_columns(self, tmp_path):
    (tmp_path / 'r.csv').write_text('category,score\nnut,1\n')
    with pytest.raises(ValueError, match='another version'):
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
