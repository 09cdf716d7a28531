"""Submissions to the server of MVTec AD 2, of a miniature of its data. The server itself is not at hand."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tifffile
from PIL import Image

from patchcore_jax import inspection, metrics
from patchcore_jax.banks.model import BankError
from patchcore_jax.data import placement
from patchcore_jax.evaluation import submission, submission_check
from patchcore_jax.evaluation.half_scores import HalfScores
from patchcore_jax.evaluation.submission import Options, Rule
from patchcore_jax.evaluation.submission_check import check
from patchcore_jax.metrics import thresholds
from tests import command, small
from tests.conftest import ROOT

COUNTS = {'can': 3, 'vial': 2}
HEIGHT, WIDTH = 50, 44  # of the images, of which the bank's crop leaves a part unseen


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A data set as published, of two objects; not to be changed."""
  root, rng = tmp_path_factory.mktemp('ad2'), np.random.default_rng(0)
  for name, count in COUNTS.items():
    paths = [root / name / 'validation' / 'good' / f'{i:03}_regular.png' for i in range(4)]
    paths += [root / name / split / f'{stem}.png' for split in submission_check.SPLITS
              for stem in submission_check.stems(split, count)]
    paths += [root / name / f'{place}_regular.png' for place in (
        'train/good/000', 'train/good/001', 'test_public/good/000', 'test_public/bad/000')]
    for path in paths:
      path.parent.mkdir(parents=True, exist_ok=True)
      pixels = rng.normal(128, 30, (HEIGHT, WIDTH, 3)).clip(0, 255).astype(np.uint8)
      if 'private' in path.parent.name:
        pixels[20:30, 15:25] = 255 * (path.stem[2] != '0')
      Image.fromarray(pixels).save(path)
    masks = root / name / 'test_public' / 'ground_truth' / 'bad'
    masks.mkdir(parents=True)
    Image.new('L', (WIDTH, HEIGHT), 255).save(masks / '000_regular_mask.png')
  return root


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The folder of a run, with a bank of each object."""
  folder = tmp_path_factory.mktemp('run')
  for name in COUNTS:
    small.inspector(calibration=None).save(folder / 'banks' / name)
  return folder


@pytest.fixture(scope='module')
def made(data, run, tmp_path_factory):
  """A submission, and what was said of it; not to be changed."""
  out = tmp_path_factory.mktemp('made') / 'patchcore'
  return out, submission.write(_options(data, run, out), counts=COUNTS)


@pytest.fixture
def copy(made, tmp_path):
  """One that a test may damage."""
  return shutil.copytree(made[0], tmp_path / 'patchcore')


@pytest.fixture
def few(monkeypatch):
  """Has commands believe that the data set is the miniature."""
  for module in (submission, submission_check):
    monkeypatch.setattr(module, 'COUNTS', COUNTS)


def _options(data, run, out, **fields):
  return Options(str(data), str(out), submission.banks_of(run, COUNTS), **{'batch_size': 2} | fields)


def _maps(run, data, name, folder):
  """The maps of a folder, laid over the originals; NaN where the network saw nothing."""
  inspector = inspection.load(run / 'banks' / name)
  paths = sorted((data / name / folder).glob('*.png'))
  placed = placement.placement(HEIGHT, WIDTH, inspector.preprocessing)
  return [placement.to_original(m, placed) for _, m in submission._scored(
      inspector, list(map(str, paths)), Options('', '', {}, batch_size=2), '', submission_check.silent)]


def _content(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


class TestWrite:

  def test_nothing_is_wrong_with_it(self, made, data):
    assert check(made[0], data=data, counts=COUNTS) == []
    assert {p.name for p in made[0].parent.iterdir()} == {'patchcore', 'patchcore.json'}

  def test_the_threshold_is_that_of_good_validation_images(self, made, run, data):
    seen = np.concatenate([m[~np.isnan(m)] for m in _maps(run, data, 'can', 'validation/good')])
    about = made[1]['objects']['can']
    assert about['threshold'] == pytest.approx(
        seen.mean(dtype=np.float64) + 3 * seen.std(dtype=np.float64), rel=1e-9)
    assert about['validation_images'] == 4
    scores = about['scores']  # of the maps before they were enlarged, in which peaks are sharper
    assert scores['low'] <= seen.min() and seen.max() <= scores['high'] < 1.05 * seen.max()

  def test_files(self, made, run, data):
    folder, about = made[0], made[1]['objects']['can']
    halfs = HalfScores(**about['scores'])
    unseen = marked = images = 0
    for i, laid in enumerate(_maps(run, data, 'can', 'test_private_mixed')):
      place = f'can/test_private_mixed/{i:03}_mixed'
      values = tifffile.imread(folder / f'anomaly_images/{place}.tiff')
      assert values.dtype == np.float16 and values.shape == (HEIGHT, WIDTH)
      np.testing.assert_array_equal(values, halfs(laid))
      with Image.open(folder / f'anomaly_images_thresholded/{place}.png') as image:
        assert image.mode == 'L'
        marks = np.asarray(image)
      np.testing.assert_array_equal(marks, 255 * (laid >= about['threshold']))
      assert (values[np.isnan(laid)] == 0).all() and (values[~np.isnan(laid)] > 0).all()
      unseen, marked, images = unseen + np.isnan(laid).sum(), marked + (marks > 0).sum(), images + marks.any()
    assert unseen and marked and about['test_private_mixed'] == {
        'images': 3, 'images_with_marks': images, 'marked_pixels': marked, 'unseen_pixels': unseen,
        'pixels': 3 * HEIGHT * WIDTH}

  def test_what_was_stopped_goes_on(self, made, run, data, tmp_path, monkeypatch):
    out, write_object = tmp_path / 'patchcore', submission._write_object

    def stopped_at_the_second(options, name, count, work, *rest):
      if name == 'vial':
        (work / 'anomaly_images').mkdir(parents=True)
        raise KeyboardInterrupt
      return write_object(options, name, count, work, *rest)

    with monkeypatch.context() as patch:
      patch.setattr(submission, '_write_object', stopped_at_the_second)
      with pytest.raises(KeyboardInterrupt):
        submission.write(_options(data, run, out), counts=COUNTS)
    assert list(json.loads((tmp_path / 'patchcore.json').read_text())['objects']) == ['can']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['patchcore', 'patchcore.json']
    # What a process that was killed between two renames leaves.
    (out / 'anomaly_images/vial/test_private').mkdir(parents=True)
    (tmp_path / 'patchcore.unfinished').mkdir()
    said = []
    submission.write(_options(data, run, out), counts=COUNTS, say=said.append)
    assert said[0] == 'can: finished before' and not (tmp_path / 'patchcore.unfinished').exists()
    assert _content(out) == _content(made[0])

  def test_other_settings_are_refused(self, made, run, data):
    before = _content(made[0])
    for fields in ({'rule': Rule.parse('k_sigma,k=2')}, {'scores': 'linear'}):
      with pytest.raises(ValueError, match='begun with other settings'):
        submission.write(_options(data, run, made[0], **fields), counts=COUNTS)
    assert _content(made[0]) == before

  def test_what_lies_there_is_kept(self, run, data, tmp_path):
    (tmp_path / 'own').mkdir()
    (tmp_path / 'results.json').write_text('{}')
    for name, words in (('own', 'own exists, and was not begun here'), ('results', 'json is not of a subm')):
      with pytest.raises(ValueError, match=words):
        submission.write(_options(data, run, tmp_path / name), counts=COUNTS)
    assert {p.name for p in tmp_path.iterdir()} == {'own', 'results.json'}

  def test_what_is_no_bank_is_told_before_anything_is_done(self, run, data, tmp_path):
    (tmp_path / 'vial').mkdir()
    options = _options(data, run, tmp_path / 'out')
    with pytest.raises(BankError, match='vial is a folder, and no model'):
      submission.write(Options(options.data, options.out, options.banks | {'vial': str(tmp_path / 'vial')}),
                       counts=COUNTS)
    assert [p.name for p in tmp_path.iterdir()] == ['vial']

  def test_all_that_is_missing_is_told_at_once(self, run, data, tmp_path):
    root = shutil.copytree(data, tmp_path / 'data')
    shutil.rmtree(root / 'can/validation')
    (root / 'can/test_private/001_regular.png').unlink()
    (root / 'vial/test_private_mixed/000_mixed.png').rename(root / 'vial/test_private_mixed/000_night.png')
    options = _options(root, run, tmp_path / 'out')
    with pytest.raises(ValueError) as e:
      submission.write(Options(options.data, options.out, {'vial': options.banks['vial']}), counts=COUNTS)
    for words in ('no bank of can;', 'no image in ', 'can/validation/good',
                  '1 of 3 images missing in ', 'can/test_private (001_regular.png)',
                  '1 of 2 images missing in ', '1 too many in ', '(000_night.png)'):
      assert words in str(e.value)
    assert '\n' not in str(e.value) and not (tmp_path / 'out').exists()

  def test_a_method_without_maps(self, run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, 'predict', lambda inspector, batches: (
        (b.index[b.valid], inspection.inspector.Scores(np.zeros(len(b.index)))) for b in batches))
    for rule in ('k_sigma', 'maximum'):  # nothing is finished that would keep one from another
      with pytest.raises(ValueError, match='makes no anomaly maps'):
        submission.write(_options(data, run, tmp_path / 'out', rule=Rule(rule)), counts=COUNTS)
    assert not (tmp_path / 'out').exists()


class TestRule:

  @pytest.mark.parametrize('text', [
      'k_sigma', 'k_sigma,k=1.5', 'maximum', 'quantile,share=0.9', 'scaled_quantile', 'largest_area, area=3',
      'at_false_positive_rate,rate=0.1'])
  def test_is_that_of_the_metrics(self, text):
    rule, maps = Rule.parse(text), np.random.default_rng(0).random((3, 8, 9)).astype(np.float32)
    assert rule.threshold(maps) == thresholds.RULES[rule.name](maps, **rule.arguments)

  def test_marks_at_the_threshold(self):
    scores = np.float32([[0.1, 0.2, 0.3]])
    threshold = float(np.float32(0.2))
    assert Rule('largest_area', {'area': 1}).marks(scores, threshold).tolist() == [[False, True, True]]
    assert Rule('maximum').marks(scores, threshold).tolist() == [[False, False, True]]
    # 0.2 in float64 is below float32's.
    assert Rule('maximum').marks(scores, 0.2).tolist() == [[False, True, True]]

  def test_a_maximum_marks_no_validation_pixel(self):
    maps = np.random.default_rng(0).random((3, 8, 9)).astype(np.float32)
    assert not Rule('maximum').marks(maps, Rule('maximum').threshold(maps)).any()

  @pytest.mark.parametrize('text, words', [
      ('median', "no rule 'median'.*k_sigma"), ('k_sigma,share=1', 'takes k.*got share'),
      ('largest_area', 'needs area'), ('k_sigma,k=three', "take k='three': expected a number"),
      ('quantile,method=2', 'take method=2: expected a word')])
  def test_errors(self, text, words):
    with pytest.raises(ValueError, match=words):
      Rule.parse(text)


class TestHalfScores:

  @pytest.mark.parametrize('kind', ['ranks', 'linear'])
  @pytest.mark.parametrize('low, high', [(30, 40), (-2, 1e-3), (0, 0), (5, 5), (1e-8, 2e-8), (-1e30, 1e30)])
  def test_order_is_kept_and_nothing_overflows(self, kind, low, high):
    rng, width = np.random.default_rng(0), (high - low) or 1
    scores = np.sort(np.concatenate([
        rng.uniform(low - width, high + 5 * width, 20_000), [low, high, -3e38, 3e38]]).astype(np.float32))
    found = HalfScores(low, high, kind)(scores)
    assert found.dtype == np.float16 and np.isfinite(found).all()
    assert (np.diff(found.astype(np.float32)) >= 0).all()

  def test_scores_keep_more_of_their_order_than_by_rounding(self):
    scores = np.random.default_rng(0).normal(30, 1, 50_000).astype(np.float32)
    kept = len(np.unique(HalfScores(26, 34)(scores)))
    assert kept > 8_000 and kept > 10 * len(np.unique(scores.astype(np.float16)))
    steps = HalfScores(26, 34)(np.linspace(26, 34, 14_848).astype(np.float64))
    assert len(np.unique(steps)) == 14_848  # evenly

  def test_what_nobody_saw_is_below_all(self):
    assert HalfScores(1, 2)(np.float32([np.nan, -3e38])).tolist() == [0, 2.0**-14]
    assert HalfScores(1, 2, 'linear')(np.float32([np.nan, 1, 2])).tolist() == [0, 0, 1]

  def test_errors(self):
    for arguments in ((2, 1), (np.nan, 1), (1, 2, 'other')):
      with pytest.raises(ValueError, match='Expected low <= high'):
        HalfScores(*arguments)

  @pytest.mark.parametrize('name', ['can', 'vial'])
  def test_metrics_of_the_reference_maps(self, golden, name):
    arrays = np.load(golden / 'evaluation' / 'ad2.npz')
    good, maps = arrays[f'{name}_validation'], arrays[f'{name}_test']
    masks = np.unpackbits(arrays[f'{name}_masks'])[:maps.size].reshape(maps.shape).astype(bool)
    rule = Rule()
    threshold = rule.threshold(good)
    assert threshold == pytest.approx(float(arrays[f'{name}_threshold']), rel=1e-12)
    marks = rule.marks(maps, threshold)
    counts = [(marks & masks).sum(), (marks & ~masks).sum(), (~marks & masks).sum()]
    assert counts == arrays[f'{name}_float32_greater_equal_counts'].tolist()  # as if nothing were rounded
    exact = float(arrays[f'{name}_float32_exact_au_pro_005'])
    for shift in np.float32([0, 30]):  # around 30 lie distances of patches
      error = {}
      for kind in ('ranks', 'linear', 'rounded'):
        halfs = HalfScores(float((good + shift).min()), float((good + shift).max()), kind) if (
            kind != 'rounded') else np.float16
        error[kind] = abs(metrics.aupro(halfs(maps + shift), masks, max_fpr=0.05) - exact)
      assert error['ranks'] < 1e-5 and error['linear'] < 2e-5
      assert not shift or error['rounded'] > 2 * max(error['ranks'], error['linear'])


_SPLIT = 'anomaly_images/can/test_private'
_MAP = f'{_SPLIT}/001_regular.tiff'
_MARKS = 'anomaly_images_thresholded/can/test_private/001_regular.png'


def _map(folder):
  return folder / _MAP


def _marks(folder):
  return folder / _MARKS


def _rewrite(folder, change):
  """Changes a map."""
  tifffile.imwrite(_map(folder), change(tifffile.imread(_map(folder))), photometric='minisblack')


def _redraw(folder, change):
  """Changes a thresholded image."""
  with Image.open(_marks(folder)) as image:
    changed = change(image)
  changed.save(_marks(folder))


class TestCheck:

  @pytest.mark.parametrize('damage, where, words, is_error', [
      (lambda f: (f / 'readme.txt').touch(), '', 'holds 1 .*readme.txt', True),
      (lambda f: (f / '.DS_Store').touch(), '', 'holds 1 .*.DS_Store', True),
      (lambda f: shutil.rmtree(f / 'anomaly_images'), '', 'lacks 1 of 2 folders: anomaly_images', True),
      (lambda f: shutil.rmtree(f / 'anomaly_images_thresholded'),
       'anomaly_images_thresholded', 'missing', False),
      (lambda f: shutil.rmtree(f / 'anomaly_images/can'), 'anomaly_images', 'lacks 1 of 2 .*: can', True),
      (lambda f: (f / 'anomaly_images/nut').mkdir(), 'anomaly_images', 'holds 1 .*nut', True),
      (lambda f: shutil.rmtree(f / 'anomaly_images/can/test_private'), 'anomaly_images/can',
       'lacks 1 of 2 folders: test_private$', True),
      (lambda f: (f / 'anomaly_images/can/good').mkdir(), 'anomaly_images/can', 'holds 1 .*good', True),
      (lambda f: _map(f).unlink(), _SPLIT, 'lacks 1 of 3 files: 001_regular.tiff', True),
      (lambda f: _map(f).rename(_map(f).with_suffix('.TIFF')), _SPLIT, 'holds 1 .*: 001_regular.TIFF', True),
      (lambda f: _map(f).rename(_map(f).with_name('003_regular.tiff')), _SPLIT, 'holds 1 .*003', True),
      (lambda f: (_map(f).parent / '.hidden').touch(), _SPLIT, 'holds 1 .*hidden', True),
      (lambda f: (_map(f).unlink(), _map(f).mkdir()), _SPLIT, 'holds 1 .*001_regular.tiff', True),
      (lambda f: _marks(f).unlink(),
       'anomaly_images_thresholded/can/test_private', 'lacks 1 of 3', True),
      (lambda f: _rewrite(f, lambda m: m.astype(np.float32)), _MAP, 'float32: expected float16', True),
      (lambda f: _rewrite(f, lambda m: np.stack([m] * 2)), _MAP, '2 pages', True),
      (lambda f: _rewrite(f, lambda m: np.where(m > 0, np.float16('nan'), m)), _MAP, 'NaN', True),
      (lambda f: _rewrite(f, lambda m: np.where(m > 0, np.float16('inf'), m)), _MAP, 'infinite', True),
      (lambda f: _map(f).write_bytes(b'II*\0'), _MAP, 'Cannot read', True),
      (lambda f: _rewrite(f, np.zeros_like), _MAP, '0 everywhere', False),
      (lambda f: _rewrite(f, lambda m: m[::2]), _MAP, 'is 44 x 25 pixels, its image 44 x 50', False),
      (lambda f: _rewrite(f, lambda m: m[::2]), _MARKS, 'is 44 x 50 pixels, its map 44 x 25', True),
      (lambda f: _rewrite(f, np.negative), _MARKS, 'marks pixels whose score is lower', False),
      (lambda f: _redraw(f, lambda m: m.convert('1')), _MARKS, 'mode 1 with 1 bits', True),
      (lambda f: _redraw(f, lambda m: m.convert('RGB')), _MARKS, 'mode RGB', True),
      (lambda f: _redraw(f, lambda m: m.convert('LA')), _MARKS, 'mode LA', True),
      (lambda f: _redraw(f, lambda m: Image.fromarray(np.uint16(m))), _MARKS, '16 bits', True),
      (lambda f: _redraw(f, lambda m: m.point(lambda v: v // 255)), _MARKS, 'other .* such as 1', True),
      (lambda f: Image.open(_marks(f)).save(_marks(f), 'BMP'), _MARKS, 'is a BMP', True),
      (lambda f: _marks(f).write_bytes(_marks(f).read_bytes()[:60]), _MARKS, 'cannot be read', True),
  ])
  def test_finds(self, copy, data, damage, where, words, is_error):
    damage(copy)
    found = check(copy, data=data, counts=COUNTS)
    here = [f for f in found if f.path == where and f.is_error == is_error]
    assert len([f for f in here if re.search(words, f.problem)]) == 1, found

  def test_without_the_data_sizes_are_not_compared(self, copy):
    _rewrite(copy, lambda m: m[::2])
    _redraw(copy, lambda m: m.resize((WIDTH, HEIGHT // 2)))
    assert not [f for f in check(copy, counts=COUNTS) if 'pixels, its' in f.problem]

  def test_counts_are_those_of_the_data_set(self, copy):
    assert (len(submission_check.COUNTS), sum(submission_check.COUNTS.values())) == (8, 2045)
    found = check(copy)
    assert submission_check.Finding(
        'anomaly_images', 'lacks 6 of 8 folders: fabric, fruit_jelly, rice, ...') in found
    assert any(f.path == _SPLIT and f.problem.startswith('lacks 318 of 321 files') for f in found)

  def test_no_folder(self, tmp_path):
    with pytest.raises(ValueError, match='no folder .*nowhere'):
      check(tmp_path / 'nowhere')


class TestPack:

  def test_holds_the_files_under_the_name(self, copy):
    archive = submission_check.pack(copy)
    assert archive == copy.parent / 'patchcore.tar.gz'
    with tarfile.open(archive) as tar:
      members = tar.getmembers()
      assert all(m.isfile() and (m.uid, m.uname, m.mtime) == (0, '', 0) for m in members)
      found = {m.name: tar.extractfile(m).read() for m in members}
    assert found == {f'patchcore/{path.as_posix()}': content for path, content in _content(copy).items()}
    first = archive.read_bytes()
    assert submission_check.pack(copy).read_bytes() == first

  def test_nothing_is_left_of_an_archive_that_cannot_be_written(self, copy, monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, 'addfile', lambda *_: (_ for _ in ()).throw(OSError('no room')))
    with pytest.raises(OSError, match='no room'):
      submission_check.pack(copy)
    assert [p.name for p in copy.parent.iterdir()] == ['patchcore']


@pytest.mark.usefixtures('few')
class TestCommand:

  def test_writes_what_the_function_writes(self, made, run, data, tmp_path):
    said = command.done('submission', 'write', run, data, '--out', tmp_path / 'patchcore', '--batch-size=2')
    assert 'vial: test_private_mixed' in said and 'nothing is wrong' in said
    assert _content(tmp_path / 'patchcore') == _content(made[0])
    assert {p.name for p in tmp_path.iterdir()} == {'patchcore', 'patchcore.json', 'patchcore.tar.gz'}

  def test_takes_the_banks_of_evaluate(self, data, tmp_path):
    command.done('evaluate', data, '--layout=mvtec_ad_2', '--out', tmp_path / 'run', *command.flags(
        ratio=None, ratios=0.5, resize=40, crop=32))
    command.done('submission', 'write', tmp_path / 'run', data, '--out', tmp_path / 'out')
    assert check(tmp_path / 'out', data=data, counts=COUNTS) == []

  def test_without_tifffile_nothing_is_begun(self, run, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    said = command.refused('submission', 'write', run, data, '--out', tmp_path / 'out')
    assert 'patchcore_jax[tiff]' in said and not list(tmp_path.iterdir())

  def test_options(self, run, data, tmp_path):
    can = shutil.copytree(run / 'banks/can', tmp_path / 'can')
    command.done('submission', 'write', run / 'banks', data, '--out', tmp_path / 'out', f'--bank=can={can}',
                 '--rule=quantile,share=0.5', '--scores=linear')
    record = json.loads((tmp_path / 'out.json').read_text())
    assert record['settings']['arguments'] == {'share': 0.5}
    about = record['objects']['can']
    assert about['bank'] == str(can) and about['scores']['kind'] == 'linear'
    assert about['test_private']['marked_pixels'] > 0.3 * about['test_private']['pixels']

  def test_what_is_missing_is_one_line(self, run, data, tmp_path):
    said = command.refused('submission', 'write', tmp_path, data, '--out', tmp_path / 'out')
    assert 'no bank of can, vial' in said
    said = command.refused('submission', 'write', run, data, '--out', tmp_path / 'out', '--rule=median')
    assert 'k_sigma' in said
    assert 'OBJECT=FOLDER' in command.refused(
        'submission', 'write', run, data, '--out', tmp_path / 'out', '--bank=can')
    assert 'banks of nut, which are no objects' in command.refused(
        'submission', 'write', run, data, '--out', tmp_path / 'out', f'--bank=nut={tmp_path}')
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.json').exists()

  def test_interrupted(self, tmp_path):
    script = f'''
import time
from patchcore_jax import cli
from patchcore_jax.evaluation import submission

def write(*_, **__):  # as readers of banks, which swallow exceptions
  print('here', flush=True)
  while True:
    try:
      time.sleep(60)
    except BaseException:
      pass

submission.check_complete, submission.write = lambda _: None, write
cli.main(['submission', 'write', {str(tmp_path)!r}, {str(tmp_path)!r}, '--out', 'name'])
'''
    with subprocess.Popen([sys.executable, '-c', script], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
      assert process.stdout.readline() == 'here\n'
      process.send_signal(signal.SIGINT)
      _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.count('\n') == 1 and 'same command again' in said

  def test_checks_what_was_made_elsewhere(self, copy, data):
    assert 'nothing is wrong' in command.done('submission', 'check', copy, '--data', data)
    assert command.done('submission', 'pack', copy) and copy.with_name('patchcore.tar.gz').exists()
    copy.with_name('patchcore.tar.gz').unlink()
    _rewrite(copy, np.zeros_like)
    said = command.done('submission', 'check', copy)
    assert f'doubtful: {_MAP}: is 0 everywhere' in said and '1 doubtful' in said
    _marks(copy).unlink()
    for action in ('check', 'pack'):
      result = command.run('submission', action, copy)
      assert result.code == 1 and 'wrong: anomaly_images_thresholded/can/test_private: lacks 1' in result.out
      assert result.err.count('\n') == 1 and '1 mistakes' in result.err
    assert not copy.with_name('patchcore.tar.gz').exists()
