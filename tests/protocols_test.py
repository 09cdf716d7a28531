"""Protocols: the size of maps, labels and scores of images; the same numbers from a run and from its maps."""

import csv
import json
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from patchcore_jax import metrics
from patchcore_jax.cli import main
from patchcore_jax.data import layouts, map_files
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.folder import Example
from patchcore_jax.detectors import PaDiM, Scores, streaming
from patchcore_jax.evaluation import Settings, experiment, of_maps
from patchcore_jax.evaluation.protocols import PROTOCOLS, Scored, rate
from patchcore_jax.metrics import saturation, thresholds
from patchcore_jax.report import per_image, results
from patchcore_jax.settings import METRICS_PROTOCOLS, DataSpec, MetricsSpec, Preprocessing, ReportSpec
from tests import small

SIZE = 40, 48  # height and width of originals


def image(path, seed, box=None):
  pixels = np.random.default_rng(seed).integers(90, 110, (*SIZE, 3))
  if box:
    pixels[box] += 60
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels.astype(np.uint8)).save(path)


def mask(path, *boxes, value=255):
  values = np.zeros(SIZE, np.uint8)
  for box in boxes:
    values[box] = value
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(values).save(path)


HOLE, DENT = np.s_[10:20, 12:25], np.s_[22:30, 5:9]


@pytest.fixture(scope='module')
def mvtec_ad(tmp_path_factory):
  root = tmp_path_factory.mktemp('ad')
  for i in range(4):
    image(root / f'nut/train/good/{i}.png', i)
    image(root / f'nut/test/good/{i}.png', 10 + i)
    image(root / f'nut/test/hole/{i}.png', 20 + i, HOLE)
    mask(root / f'nut/ground_truth/hole/{i}_mask.png', *([HOLE] if i else []))  # one is empty
  return root


@pytest.fixture(scope='module')
def mvtec_loco(tmp_path_factory):
  root = tmp_path_factory.mktemp('loco')
  for i in range(3):
    image(root / f'box/train/good/{i}.png', i)
    image(root / f'box/validation/good/{i}.png', 10 + i)
    image(root / f'box/test/good/{i}.png', 20 + i)
    image(root / f'box/test/logical_anomalies/{i}.png', 30 + i, HOLE)
    image(root / f'box/test/structural_anomalies/{i}.png', 40 + i, DENT)
    mask(root / f'box/ground_truth/logical_anomalies/{i}/000.png', HOLE, value=10)
    mask(root / f'box/ground_truth/logical_anomalies/{i}/001.png', DENT, value=20)
    mask(root / f'box/ground_truth/structural_anomalies/{i}/000.png', DENT, value=20)
  (root / 'box/defects_config.json').write_text(json.dumps([
      {'defect_name': name, 'pixel_value': value, 'saturation_threshold': threshold,
       'relative_saturation': relative}
      for name, value, threshold, relative in (('hole', 10, 0.5, True), ('dent', 20, 12, False))]))
  return root


@pytest.fixture(scope='module')
def mvtec_ad_2(tmp_path_factory):
  root = tmp_path_factory.mktemp('ad2')
  for i in range(3):
    image(root / f'can/train/good/00{i}.png', i)
    image(root / f'can/validation/good/00{i}.png', 10 + i)
    image(root / f'can/test_public/good/00{i}.png', 20 + i)
    image(root / f'can/test_public/bad/00{i}.png', 30 + i, HOLE)
    mask(root / f'can/test_public/ground_truth/bad/00{i}_mask.png', HOLE)
  return root


def evaluate(root, layout, protocol, workdir, resamples=0, **report):
  told = []
  rows = experiment.run(
      Settings(DataSpec(layout, str(root), batch_size=4), PaDiM(5),
               preprocessing=Preprocessing((24,), crop=(20,)),
               metrics=MetricsSpec(protocol, resamples=resamples), report=ReportSpec(gallery=0, **report)),
      workdir, networks=(small.backbone(),), listener=experiment.Listener(notice=told.append))
  return rows, told


def measured(row):
  return {name: row[name] for name in metrics.METRICS}


def test_names_are_those_of_the_settings():
  assert tuple(PROTOCOLS) == METRICS_PROTOCOLS
  with pytest.raises(ValueError, match="protocol='mvtec': expected one of paper, original"):
    MetricsSpec('mvtec')
  with pytest.raises(ValueError, match='mvtec_official has max_fpr=0.3 and connectivity=8, got 0.1 and 8'):
    MetricsSpec('mvtec_official', max_fpr=0.1)


@pytest.mark.parametrize('protocol, data', [
    ('original', 'mvtec_ad'), ('mvtec_official', 'mvtec_ad'), ('mvtec_loco', 'mvtec_loco'),
    ('mvtec_ad_2', 'mvtec_ad_2')])
def test_maps_of_a_run_give_the_numbers_of_the_run(protocol, data, request, tmp_path):
  root, layout = request.getfixturevalue(data), 'folder' if data == 'mvtec_ad' else data
  (row,), told = evaluate(root, layout, protocol, tmp_path / 'run', maps=True)
  assert any('the network did not see' in line for line in told)
  (again,) = of_maps.run(
      tmp_path / 'run/maps', DataSpec(layout, str(root)), MetricsSpec(protocol), tmp_path / 'again',
      say=lambda line: None, notice=lambda line: None)
  if protocol == 'original':  # whose score of an image is the method's
    pixels = ('pixel_auroc', 'aupro', 'aupro_05', 'pixel_ap', 'pixel_f1')
    assert {n: again[n] for n in pixels} == {n: row[n] for n in pixels}
  elif protocol == 'mvtec_ad_2':  # a run leaves pixels that a crop hid out of the threshold
    assert again['seg_threshold'] != row['seg_threshold'] and again['aupro_05'] == row['aupro_05']
  else:
    assert measured(again) == measured(row)
  if protocol != 'original':
    scores = [[s.image_score for s in per_image.read_scores(tmp_path / run / f'scores/{row["category"]}.csv')]
              for run in ('run', 'again')]
    assert scores[0] == scores[1]
  assert results.read_csv(tmp_path / 'again/results.csv')[0]['bank_size'] is None


def test_official_labels_are_those_of_masks(mvtec_ad, tmp_path):
  (row,), told = evaluate(mvtec_ad, 'folder', 'mvtec_official', tmp_path / 'official', maps=True)
  assert any('count as good, as their masks mark nothing: 1' in line for line in told)
  examples = layouts.LAYOUTS['folder'].load_category(mvtec_ad, 'nut').test
  maps = [tifffile.imread(tmp_path / 'official/maps' / f'{name}.tiff')
          for name in map_files.map_names(examples, mvtec_ad)]
  masks = [np.zeros(SIZE, bool) for _ in maps]
  for i, example in enumerate(examples):
    if example.label:
      masks[i] = np.asarray(Image.open(example.mask_paths[0])) > 0
  labels = [bool(m.any()) for m in masks]
  assert sum(labels) == 3
  assert row['image_auroc'] == metrics.auroc(labels, [m.max() for m in maps])
  assert row['aupro'] == metrics.aupro(maps, masks)
  assert row['aupro_05'] == metrics.aupro(maps, masks, max_fpr=0.05)
  (row,), _ = evaluate(mvtec_ad, 'folder', 'original', tmp_path / 'original')
  scores = per_image.read_scores(tmp_path / 'original/scores/nut.csv')
  assert sum(score.label for score in scores) == 4  # by folders


def test_loco_has_both_kinds_apart(mvtec_loco, tmp_path):
  (row,), _ = evaluate(mvtec_loco, 'mvtec_loco', 'mvtec_loco', tmp_path, maps=True)
  examples = layouts.LAYOUTS['mvtec_loco'].load_category(mvtec_loco, 'box').test
  maps = [tifffile.imread(tmp_path / 'maps' / f'{name}.tiff')
          for name in map_files.map_names(examples, mvtec_loco)]
  channels = [[np.asarray(Image.open(path)) for path in e.mask_paths] for e in examples]
  assert [len(c) for c in channels] == [0] * 3 + [2] * 3 + [1] * 3
  expected = saturation.spro(
      maps, channels, [e.defect for e in examples],
      saturation.read_config(mvtec_loco / 'box/defects_config.json'), limits=(0.05,))
  assert row['spro_05'] == expected.mean[0] and row['spro_05_logical'] == expected.logical.areas[0]
  assert row['image_auroc_mean'] == (row['image_auroc_logical'] + row['image_auroc_structural']) / 2
  (row,), told = evaluate(mvtec_loco, 'mvtec_loco', 'paper', tmp_path / 'paper')
  assert row['spro_05'] is None
  assert sum('good validation images, which are not read' in line for line in told) == 1
  told = []
  of_maps.run(tmp_path / 'maps', DataSpec('mvtec_loco', str(mvtec_loco)), MetricsSpec('mvtec_loco'),
              tmp_path / 'again', say=lambda line: None, notice=told.append)
  assert sum('good validation images, which are not read' in line for line in told) == 1


def test_good_validation_images_set_the_threshold(mvtec_ad_2, tmp_path):
  (row,), told = evaluate(mvtec_ad_2, 'mvtec_ad_2', 'mvtec_ad_2', tmp_path, maps=True)
  assert not any('validation' in line for line in told)
  assert row['seg_f1'] is not None and row['class_f1'] is not None
  # What the network saw of validation images, and nothing that was filled in.
  category = layouts.LAYOUTS['mvtec_ad_2'].load_category(mvtec_ad_2, 'can')
  assert [e.image_path.split('/')[-3] for e in category.validation] == ['validation'] * 3
  found = []
  detector, preprocessing, networks = PaDiM(5), Preprocessing((24,), crop=(20,)), (small.backbone(),)
  model = detector.fit(FileData(category.train, preprocessing, 4), networks)
  score_fn = detector.score_fn_at(model, networks, (1.0,))
  for _, (scores,) in streaming.predict(
      score_fn, FileData(category.validation, preprocessing, 4).batches(), image_size=(20, 20)):
    found.extend(scores.map)
  seen = map_files.SeenMaps(np.stack(found), [SIZE] * 3, preprocessing)
  assert row['seg_threshold'] == pytest.approx(thresholds.k_sigma(seen), rel=1e-6)


def rows_of(path):
  with open(path, newline='') as f:
    return list(csv.DictReader(f))


def test_intervals_and_regions(mvtec_ad, tmp_path):
  (row,), _ = evaluate(
      mvtec_ad, 'folder', 'mvtec_official', tmp_path / 'run', resamples=1000, maps=True, regions=True)
  of_maps.run(
      tmp_path / 'run/maps', DataSpec('folder', str(mvtec_ad)), MetricsSpec('mvtec_official', resamples=1000),
      tmp_path / 'again', regions=True, say=lambda line: None, notice=lambda line: None)
  intervals, regions = (rows_of(tmp_path / f'run/{name}/nut.csv') for name in ('intervals', 'regions'))
  assert intervals == rows_of(tmp_path / 'again/intervals/nut.csv')
  assert regions == rows_of(tmp_path / 'again/regions/nut.csv')
  assert {i['metric'] for i in intervals} >= {'image_auroc', 'image_ap', 'pixel_auroc', 'aupro', 'aupro_05'}
  for interval in intervals:
    low, estimate, high = (float(interval[name] or np.nan) for name in ('low', 'estimate', 'high'))
    assert estimate == row[interval['metric']] and not low > estimate and not high < estimate
    assert interval['level'] == '0.95' and interval['method']
  assert [(r['path'][-10:], r['area'], r['left'], r['top']) for r in regions] == [
      (f'hole/{i}.png', '130', '12', '10') for i in (1, 2, 3)]
  kept = per_image.read_scores(tmp_path / 'run/scores/nut.csv')
  expected = metrics.auroc_interval([s.label for s in kept], [s.image_score for s in kept])
  (auroc,) = (i for i in intervals if i['metric'] == 'image_auroc')
  assert (float(auroc['low']), float(auroc['high'])) == pytest.approx((expected.low, expected.high))
  with pytest.raises(ValueError, match='resamples=10: expected at least 1,000'):
    MetricsSpec(resamples=10)


def test_a_finished_run_says_what_it_lacks(mvtec_ad, tmp_path):
  evaluate(mvtec_ad, 'folder', 'original', tmp_path)
  _, told = evaluate(mvtec_ad, 'folder', 'original', tmp_path, resamples=1000, regions=True)
  assert any('nut was finished without intervals, regions, and is not' in line for line in told)
  assert not (tmp_path / 'intervals').exists()


def test_what_is_missing_is_refused(mvtec_ad, tmp_path, monkeypatch):
  examples = [Example('data/nut/test/good/0.png', (), 0, 'nut', 'good')]
  tested = Scored(examples, Scores(np.ones(1), None), None, None)
  with pytest.raises(ValueError, match='mvtec_official is of anomaly maps, and this method makes none'):
    rate(tested, MetricsSpec('mvtec_official'), 'data')
  # Before anything is fitted.
  for protocol, words in (
      ('mvtec_ad_2', 'needs good images in validation/good: nut has none'),
      ('mvtec_loco', 'nut/defects_config.json: expected a JSON file')):
    with pytest.raises(ValueError, match=words):
      evaluate(mvtec_ad, 'folder', protocol, tmp_path / protocol)
    assert not (tmp_path / protocol / 'banks').exists()
  monkeypatch.setitem(sys.modules, 'tifffile', None)
  with pytest.raises(ValueError, match='needs the package tifffile'):
    evaluate(mvtec_ad, 'folder', 'original', tmp_path / 'maps', maps=True)
  assert not (tmp_path / 'maps/banks').exists()


class TestCommand:

  def _run(self, capsys, *arguments):
    with pytest.raises(SystemExit) as e:
      main(list(map(str, arguments)))
    return e.value.code, capsys.readouterr()

  @pytest.fixture
  def maps(self, mvtec_ad, tmp_path):
    examples = layouts.LAYOUTS['folder'].load_category(mvtec_ad, 'nut').test
    names = map_files.map_names(examples, mvtec_ad)
    values = np.random.default_rng(0).random((len(names), *SIZE), np.float32)
    map_files.write_maps(tmp_path / 'maps', names, values)
    return tmp_path / 'maps'

  def test_measures_maps(self, mvtec_ad, maps, tmp_path, capsys):
    code, said = self._run(
        capsys, 'evaluate', mvtec_ad, '--maps', maps, '--out', tmp_path / 'out', '--protocol=mvtec_official')
    assert code == 0 and 'count as good' in said.err + said.out
    assert json.loads((tmp_path / 'out/maps.json').read_text())['metrics']['protocol'] == 'mvtec_official'
    with open(tmp_path / 'out/results.csv') as f:
      (row,) = csv.DictReader(f)
    assert row['category'] == 'nut' and row['num_test'] == '8' and row['num_train'] == ''

  @pytest.mark.parametrize('flags, words', [
      (('--ratio=0.1',), r'--ratio: --maps measures maps that are there'),
      (('--batch-size=4', '--keep-errors'), r'--batch-size, --keep-errors: --maps'),
      (('--protocol=paper',), 'protocol=paper is of maps at the size of the network'),
      (('--max-fpr=0.1', '--protocol=mvtec_official'), 'mvtec_official has max_fpr=0.3')])
  def test_refuses_what_it_would_ignore(self, flags, words, mvtec_ad, maps, tmp_path, capsys):
    code, said = self._run(capsys, 'evaluate', mvtec_ad, '--maps', maps, '--out', tmp_path / 'out', *flags)
    assert code and words.replace('\\', '') in said.err and said.err.count('\n') == 1
    assert not (tmp_path / 'out').exists()

  @pytest.mark.parametrize('damage, words', [
      (lambda f: f.unlink(), '1 of 8 images have no map'),
      (lambda f: f.with_suffix('.tif').write_bytes(f.read_bytes()), 'Two maps for one image'),
      (lambda f: map_files.write_map(f, np.ones((9, 9), np.float32)), 'is 9 x 9 pixels'),
      (lambda f: tifffile.imwrite(f, np.full(SIZE, np.nan, np.float32)), 'NaN or infinite')])
  def test_bad_maps(self, damage, words, mvtec_ad, maps, tmp_path, capsys):
    file = maps / 'nut/test/hole/2.tiff'
    damage(file)
    code, said = self._run(capsys, 'evaluate', mvtec_ad, '--maps', maps, '--out', tmp_path / 'out')
    assert code and words in said.err and 'hole/2' in said.err
