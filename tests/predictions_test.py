"""Tables and pictures of a prediction run."""

import csv
import json
import os

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.banks.provenance import Origin
from patchcore_jax.inspection import Finding
from patchcore_jax.inspection.regions import Region
from patchcore_jax.report import predictions
from patchcore_jax.report.predictions import Answer

ANSWER = Answer('a, "b".png', Finding(
    (700, 500), 1.25, threshold=1.0, calibrated_score=0.75, p_value=0.02, anomalous=True, box=(1, 2, 30, 40),
    centroid=(15.5, 20.25), patch_box=(3, 4, 5, 6), patch=(7, 8), nearest=Origin(3, 'good.png', 9, 10),
    nearest_box=(0.5, 8.0, 8.0, 16.0), map=np.zeros((2, 2)), not_inspected=0.25, regions=(
        Region((1, 2, 30, 40), (((1.0, 2.0), (30.0, 2.0), (15.0, 40.0)),), 600, 2.5, (15.5, 20.25)),
        Region((50, 50, 52, 51), (((50.0, 50.0), (52.0, 50.5), (50.0, 51.0)),), 2, 1.5, (50.5, 50.0)))),
    overlay='overlays/a.png')


class TestTables:

  def test_both_files_say_the_same(self, tmp_path):
    tables = predictions.Tables(tmp_path)
    tables.add(ANSWER)
    tables.add(Answer('b.png', error='b.png is\nno image.'))
    first, second = map(json.loads, (tmp_path / 'predictions.jsonl').read_text().splitlines())
    assert first == {'path': 'a, "b".png'} | ANSWER.finding.to_json() | {
        'overlay': 'overlays/a.png', 'map': None, 'mask': None, 'why': None, 'error': None, 'time': None}
    assert first['regions'][1] == {
        'box': [50, 50, 52, 51], 'outline': [[[50, 50], [52, 50.5], [50, 51]]], 'area': 2, 'maximum': 1.5,
        'centroid': [50.5, 50]}
    assert second == dict.fromkeys(first) | {'path': 'b.png', 'error': 'b.png is\nno image.'}
    with (tmp_path / 'predictions.csv').open(newline='') as f:
      rows = list(csv.DictReader(f))
    assert rows[0]['path'] == 'a, "b".png' and rows[0]['score'] == '1.25' and rows[0]['x'] == '15.5'
    assert [rows[0][k] for k in ('left', 'top', 'right', 'bottom')] == ['1', '2', '30', '40']
    assert [rows[0][k] for k in ('nearest_image', 'nearest_left', 'map')] == ['good.png', '0.5', '']
    assert rows[1]['error'] == 'b.png is\nno image.' and rows[1]['left'] == rows[1]['score'] == ''
    assert tuple(rows[0]) == predictions.COLUMNS

  def test_the_columns_are_what_others_read(self, tmp_path):
    assert predictions.COLUMNS == (
        'path', 'width', 'height', 'score', 'calibrated_score', 'p_value', 'decision',
        'left', 'top', 'right', 'bottom', 'x', 'y', 'patch_left', 'patch_top', 'patch_right', 'patch_bottom',
        'nearest_image', 'nearest_left', 'nearest_top', 'nearest_right', 'nearest_bottom',
        'overlay', 'map', 'why', 'error',
        'regions', 'area', 'not_inspected', 'outside_range', 'reason', 'mask', 'note', 'time')
    predictions.Tables(tmp_path).add(ANSWER)
    assert (tmp_path / 'predictions.csv').read_text().splitlines()[1] == (
        '"a, ""b"".png",700,500,1.25,0.75,0.02,anomalous,1,2,30,40,15.5,20.25,3,4,5,6,'
        'good.png,0.5,8.0,8.0,16.0,overlays/a.png,,,,2,602,0.25,0.0,,,,')

  def test_what_a_method_does_not_know_is_an_empty_cell(self, tmp_path):
    predictions.Tables(tmp_path).add(Answer('a.png', Finding((64, 48), -0.5)))
    row = (tmp_path / 'predictions.csv').read_text().splitlines()[1]
    assert row == 'a.png,64,48,-0.5' + ',' * 25 + '0.0,0.0,,,,'

  def test_names_that_are_no_utf_8(self, tmp_path):
    name = os.fsdecode(b'a\xff.png')
    predictions.Tables(tmp_path).add(Answer(name, error='x'))
    assert b'a\xff.png' in (tmp_path / 'predictions.csv').read_bytes()
    assert json.loads((tmp_path / 'predictions.jsonl').read_text())['path'] == name

  def test_of_a_row_that_does_not_fit_nothing_is_left(self, tmp_path, monkeypatch):
    tables = predictions.Tables(tmp_path)
    tables.add(ANSWER)
    before = [(tmp_path / name).read_bytes() for name in ('predictions.csv', 'predictions.jsonl')]
    append = predictions._append

    def full(path, data):
      if path.suffix == '.jsonl':
        append(path, data[:7])
        raise OSError(28, 'No space left on device')
      append(path, data)

    monkeypatch.setattr(predictions, '_append', full)
    with pytest.raises(OSError, match='No space left'):
      tables.add(ANSWER)
    assert before == [(tmp_path / n).read_bytes() for n in ('predictions.csv', 'predictions.jsonl')]


class TestUnfinishedAndPublish:

  def _run(self, out, names):
    folder = predictions.unfinished(out)
    predictions.Tables(folder)
    for name in names:
      predictions.write_png(folder / name, np.zeros((2, 2, 3), np.uint8))
    return folder

  def test_replaces_an_earlier_run_whole_and_nothing_else(self, tmp_path):
    predictions.publish(self._run(tmp_path, ['overlays/old.png', 'why/old.png']))
    (tmp_path / 'own.txt').write_text('mine')
    folder = self._run(tmp_path, ['overlays/new.png'])
    assert (tmp_path / 'overlays/old.png').exists()  # until the new one is complete
    assert predictions.publish(folder) == tmp_path
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*') if p.is_file())
    assert found == ['overlays/new.png', 'own.txt', 'predictions.csv', 'predictions.jsonl']

  def test_what_a_stopped_run_left_is_removed_by_the_next(self, tmp_path):
    self._run(tmp_path / 'out', ['maps/a.png'])
    assert not list(predictions.unfinished(tmp_path / 'out').iterdir())

  def test_files_of_others_are_not_replaced(self, tmp_path):
    (tmp_path / 'maps').mkdir()
    with pytest.raises(ValueError, match='holds maps, and no prediction run wrote that'):
      predictions.unfinished(tmp_path)

  def test_a_file_in_the_way(self, tmp_path):
    (tmp_path / 'out').write_text('')
    with pytest.raises(ValueError, match='is a file'):
      predictions.unfinished(tmp_path / 'out')

  def test_discard_leaves_no_trace(self, tmp_path):
    predictions.discard(predictions.unfinished(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


class TestIsOfARun:

  def test_pictures_are_no_images_to_score(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert predictions.is_of_a_run('out/overlays/a.png', tmp_path / 'out')
    assert predictions.is_of_a_run(tmp_path / 'out/predictions.unfinished/why/a.png', 'out')
    assert not predictions.is_of_a_run('out/a.png', 'out')
    assert not predictions.is_of_a_run('out/overlays.png', 'out')


class TestWriteMap:

  @pytest.mark.parametrize('suffix', ['.npy', '.tif'])
  def test_floats_come_back(self, suffix, tmp_path):
    values = np.random.default_rng(0).random((7, 5), np.float32)
    values[0, 1] = np.nan
    path = tmp_path / 'maps' / f'a{suffix}'
    predictions.write_map(path, values)
    back = np.load(path) if suffix == '.npy' else np.asarray(Image.open(path))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, values)
