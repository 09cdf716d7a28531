"""The answer for one image: the same in Python, in files and over HTTP."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from patchcore_jax import inspection
from patchcore_jax.banks import calibration, store
from patchcore_jax.banks.provenance import Origin
from patchcore_jax.data import preprocess
from patchcore_jax.detectors import OCSVM, SPADE, MahalanobisAD, PaDiM, PatchCore, Scores
from patchcore_jax.inspection import Finding
from patchcore_jax.report import prediction_run
from patchcore_jax.serving.app import Options
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing
from tests import small
from tests.serve_test import ask, parts, running

PATCHCORE = PatchCore(0.5, EmbeddingSpec('mean'), CoresetSpec(projection_dim=4))


def _same_everywhere(inspector, folder):
  """Answers about one image of 40 x 50 pixels: from Python, predictions.jsonl, .csv, and HTTP."""
  image, bank, out = folder / 'part.png', folder / 'bank', folder / 'out'
  Image.fromarray(parts(3)[2]).save(image)
  store.save(bank, inspector.model)
  prediction_run.run(prediction_run.Options(
      str(bank), str(image), str(out), batch_size=1, maps='none', overlays=False))
  with (out / 'predictions.csv').open(newline='') as f:
    (cells,) = csv.DictReader(f)
  row = json.loads((out / 'predictions.jsonl').read_text())
  with running(inspector, Options(batch_size=1)) as address:
    status, _, answer = ask(address, body=image.read_bytes())
  assert status == 200
  pixels = np.asarray(preprocess.transform(Image.open(image), inspector.preprocessing))
  scores = inspection.scorer(inspector, 1)(pixels[None])
  return inspection.find(inspector, scores, 0, (50, 40)), row, cells, answer


@pytest.mark.parametrize(
    'detector', [PATCHCORE, PaDiM(num_dims=4), MahalanobisAD(), OCSVM()], ids=lambda d: d.name)
def test_python_files_and_http_say_the_same(detector, tmp_path):
  finding, row, cells, answer = _same_everywhere(small.inspector(detector), tmp_path)
  assert isinstance(finding, Finding)
  expected = json.loads(json.dumps(finding.to_json()))
  # Files: the finding, between the path and the pictures, and when it was written.
  assert row.pop('time') == cells.pop('time')
  assert row == {'path': str(tmp_path / 'part.png')} | expected | dict.fromkeys(
      ('overlay', 'map', 'mask', 'why', 'error'))
  # HTTP: the finding, but for where training images lay.
  if finding.nearest:
    assert expected['nearest']['image'].startswith('/line/good/')
    assert answer['nearest']['image'] == expected['nearest']['image'].split('/')[-1]
    answer['nearest']['image'] = expected['nearest']['image']
  assert answer == expected
  # CSV: the same values, each in a column.
  in_columns = {
      'path': row['path'], **dict(zip(('width', 'height'), expected['image_size'])),
      **{k: expected[k] for k in ('score', 'calibrated_score', 'p_value', 'decision')},
      **_columns('', expected['box']), **_columns('patch_', expected['patch_box']),
      **dict(zip(('x', 'y'), expected['centroid'] or (None, None))),
      'nearest_image': expected['nearest'] and expected['nearest']['image'],
      **_columns('nearest_', expected['nearest_box']),
      **dict.fromkeys(('overlay', 'map', 'why', 'error', 'mask')),
      'regions': None if (found := expected['regions']) is None else len(found),
      'area': None if found is None else sum(region['area'] for region in found),
      **{k: expected[k] for k in ('not_inspected', 'outside_range', 'reason', 'note')}}
  assert cells == {k: '' if v is None else str(v) for k, v in in_columns.items()}


def _columns(prefix, box):
  return dict(zip([prefix + side for side in ('left', 'top', 'right', 'bottom')], box or (None,) * 4))


class TestScorer:

  @pytest.mark.parametrize(
      'detector', [PATCHCORE, MahalanobisAD(), SPADE(num_images=2)], ids=lambda d: d.name)
  def test_compiled_ahead(self, detector):
    """It tells what there will be, and spares the first call the compiling."""
    score, compiled = inspection.scorer(small.inspector(detector), 2), []
    found = score.compile(2)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if 'backend_compile' in event else None)
    try:
      scores = score(small.images(2))
    finally:
      jax.monitoring.clear_event_listeners()
    assert (found.map is None, sorted(found.evidence)) == (scores.map is None, sorted(scores.evidence))
    assert not compiled and len(scores.image) == 2


class TestFind:
  """By hand: 8 x 6 patches of 4 x 4 pixels, from the middle of an image of 40 x 50 that kept its size."""

  @pytest.fixture
  def inspector(self):
    found = calibration.calibrate([1.0, 2.0, 3.0, 4.0], [1.0, 1.5, 1.8, 2.0], false_alarm_rate=0.2)
    return small.inspector(PATCHCORE, calibration=found)

  @pytest.fixture
  def scores(self):
    values = np.zeros((2, 32, 24), np.float32)
    values[1, 10:14, 4:10] = 3
    # The second image's most anomalous patch is in row 2, column 1; the nearest is row 5 of the bank.
    return Scores(np.float32([3.5, 5.0]), values, {'patch': np.int32([0, 13]), 'nearest': np.int32([1, 5])})

  def test_everything_is_in_pixels_of_the_original(self, inspector, scores):
    found = inspection.find(inspector, scores, 1, (50, 40))
    assert (found.score, found.decision, found.image_size) == (5.0, 'anomalous', (40, 50))
    # 8 columns and 9 rows were cut off beside and above.
    assert found.box == (12, 19, 18, 23) and found.centroid == (14.5, 20.5)
    assert found.patch == (2, 1) and found.patch_box == (12, 17, 16, 21)
    assert found.p_value == pytest.approx(1 / 5) and found.calibrated_score > 0.5
    number, patch = divmod(int(inspector.model.arrays['indices'][5]), 48)
    row, column = divmod(patch, 6)
    assert found.nearest == Origin(number, f'/line/good/{number}.png', row, column)
    # Of the training image, as the network saw it.
    assert found.nearest_box == (4 * column, 4 * row, 4 * column + 4, 4 * row + 4)
    np.testing.assert_array_equal(found.map, scores.map[1])

  def test_the_threshold_decides_and_may_be_ones_own(self, inspector, scores):
    limit = inspector.calibration.image_threshold
    found = inspection.find(inspector, scores, 0, (50, 40))
    assert (found.decision, found.threshold) == ('good', limit) and found.p_value == pytest.approx(2 / 5)
    own = inspection.find(inspector, scores, 0, (50, 40), threshold=3.5)
    assert (own.decision, own.threshold, own.calibrated_score) == ('anomalous', 3.5, 0.5)
    assert own.p_value == found.p_value

  def test_all_regions_are_listed_and_small_ones_may_be_ignored(self, inspector, scores):
    scores.map[1, 20:30, 10:20] = 2.5
    found = inspection.find(inspector, scores, 1, (50, 40))
    assert [(r.box, r.area, r.maximum) for r in found.regions] == [
        ((18, 29, 28, 39), 100, 2.5), ((12, 19, 18, 23), 24, 3.0)]
    assert found.box == (12, 19, 18, 23)  # of the most anomalous one
    assert (found.anomalous, found.reason) == (True, '')
    large = inspection.find(inspector, scores, 1, (50, 40), min_area=25)
    assert (large.regions, large.box) == (found.regions[:1], found.regions[0].box)
    assert (large.anomalous, large.reason) == (True, '')  # nothing rests on it
    none = inspection.find(inspector, scores, 1, (50, 40), min_area=101)
    assert (none.regions, none.decision) == ((), 'good')
    assert none.reason == 'no region has 101 pixels, the largest of 2 has 100'

  def test_an_image_without_a_region_is_never_good_for_its_size(self, inspector, scores):
    """The score reaches its threshold, and no pixel reaches that of pixels: nothing is known to be small."""
    scores.map[1] = 0
    found = inspection.find(inspector, scores, 1, (50, 40), min_area=101)
    assert (found.regions, found.decision, found.reason) == ((), 'anomalous', '')

  def test_more_pixels_outside_of_the_range_than_in_training_are_anomalous(self, inspector, scores):
    usual = dataclasses.replace(inspector, model=inspector.model.with_description(outside_range=0.02))
    for outside, expected in ((0.0, 'good'), (0.02, 'good'), (0.03, 'anomalous')):
      found = inspection.find(usual, scores, 0, (50, 40), outside=outside)
      assert (found.decision, found.outside_range) == (expected, outside)
      assert ('3 % of the pixels lie outside' in found.reason) == (expected == 'anomalous')
    found = inspection.find(usual, scores, 1, (50, 40), outside=0.03, min_area=1e6)
    assert found.decision == 'anomalous'  # a small region does not excuse it
    # Without a threshold there are no decisions.
    bare = dataclasses.replace(usual, model=usual.model.with_description(calibration=None))
    assert inspection.find(bare, scores, 0, (50, 40), outside=0.03).anomalous is None

  def test_python_ignores_regions_too(self):
    image = parts(24)[-1]
    inspector = small.inspector()
    assert inspector.inspect(image).anomalous
    assert inspector.inspect(image, min_area=1e6).decision == 'good'
    bare = dataclasses.replace(inspector, model=inspector.model.with_description(calibration=None))
    with pytest.raises(ValueError, match='no pixel threshold'):
      bare.inspect(image, min_area=1)

  def test_what_is_not_known_is_none(self, inspector):
    bare = dataclasses.replace(inspector, model=inspector.model.with_description(calibration=None))
    found = inspection.find(bare, Scores(np.float32([2.0])), 0, (50, 40))
    # 24 x 32 of 40 x 50 pixels are seen, which the geometry tells.
    assert found == Finding((40, 50), 2.0, not_inspected=pytest.approx(1 - 24 * 32 / 2000))
    assert found.decision is None
    known = {'score': 2.0, 'image_size': [40, 50], 'not_inspected': found.not_inspected,
             'outside_range': 0.0, 'reason': '', 'note': ''}
    values = found.to_json()
    assert {k: v for k, v in values.items() if v is not None} == known and 'map' not in values

  def test_a_model_of_arrays_takes_images_as_they_come(self, inspector, scores):
    arrays = dataclasses.replace(inspector, model=inspector.model.with_description(preprocessing=None))
    assert arrays.preprocessing == Preprocessing(resize=(), crop=())
    assert inspection.find(arrays, scores, 1, (32, 24)).box == (4, 10, 10, 14)
