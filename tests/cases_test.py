"""The inputs of ../shared/cases: each with the outcome that is right, through every door that takes it."""

import csv
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

import patchcore_jax as pc
from patchcore_jax import inspection
from patchcore_jax.inspection.acceptance import NotAccepted
from tests import command, serve_test
from tests.conftest import SHARED

CASES = SHARED / 'cases'
_FIT = ('--backbone=resnet18_slim.procedural', '--ratio=0.02', '--folds=3', '--batch-size=4')
_EVALUATE = ('--backbone=resnet18_slim.procedural', '--ratio=0.02', '--batch-size=4')

pytestmark = [pytest.mark.as_shipped, pytest.mark.skipif(
    not CASES.is_dir(), reason=f'REFERENCE DATA ABSENT: {CASES}; these checks did not run')]


class Case(NamedTuple):
  """A folder to fit on, one with new images, and what is right of each of these.

  Attributes:
    script: what draws them.
    train, new: the folders.
    right: {file: 'anomalous', 'good' or 'refused'}; pages of a file are NAME#1, NAME#2.
    named: files that are no images, which are named.
  """

  script: str
  train: str
  new: str
  right: dict[str, str]
  named: tuple[str, ...] = ()


def _of(**decisions):
  """Turns {decision: names, separated by spaces} around."""
  return {name: decision for decision, names in decisions.items() for name in names.split()}


def _split(folder):
  """Lists what 19_deep_gray and 19b draw."""
  good, bad = (' '.join(f'{kind}/{i}.tif' for i in numbers)
               for kind, numbers in (('good', range(50, 54)), ('bad', range(60, 64))))
  return Case('19b_thermal_weak' if folder in ('raw16', 'stretched8') else '19_deep_gray',
              f'{folder}/train', f'{folder}/new', _of(good=good, anomalous=bad))


PREDICTED = {
    'alpha': Case('07_rgba', 'train', 'new', _of(
        good='good_black.png good_white.png good_noise.png', anomalous='bad_black.png')),
    'wide': Case('08_wide', 'train', 'new', _of(
        good='good.png', anomalous='bad0_left.png bad1_middle.png')),
    'pages': Case('10_pages_video', 'train', 'new', _of(
        good='stack.tif#1 stack.tif#3 clip.gif#1 clip.gif#3', anomalous='stack.tif#2 clip.gif#2'),
        ('clip.avi',)),
    **{folder: _split(folder) for folder in
       ('eight', 'full16', 'twelve', 'thermal', 'float', 'raw16', 'stretched8')},
    'several defects': Case('22_two_defects', 'train', 'new', _of(anomalous='2.png 3.png')),
    'same stem': Case('27_same_stem', 'train', 'new', _of(
        good='part1.png part1.bmp part1.png.png a.JPG b.TIFF d.JPEG e.Webp',
        anomalous='part1.jpg part1.PNG c.jfif')),
    'bands': Case('31_bands', '22_two_defects/train', 'new', _of(
        anomalous='rgb16.tif rgb16.png la.png cmyk.jpg onebit.png', refused='five_bands.tif'),
        ('array.npy',)),
}


# What else is read as full16 and float are.
_GRAYS = ('eight', 'twelve', 'thermal', 'raw16', 'stretched8')


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  """A function that draws a case, once, and returns its folder."""
  folders = {}

  def draw(script):
    if script not in folders:
      folders[script] = tmp_path_factory.mktemp(script.split('_')[0])
      subprocess.run(
          [sys.executable, f'{script}.py', folders[script]], cwd=CASES, check=True, capture_output=True)
    return folders[script]

  return draw


@pytest.fixture(scope='module')
def bank_of(drawn, tmp_path_factory):
  """A function that fits on a folder of a case, once, and returns the bank."""
  banks = {}

  def fit(script, train):
    if (script, train) not in banks:
      out = tmp_path_factory.mktemp('bank') / 'bank'
      command.done('fit', drawn(script) / train, '--out', out, *_FIT)
      banks[script, train] = out
    return banks[script, train]

  return fit


@pytest.fixture(scope='module', params=PREDICTED)
def case(request, drawn, bank_of):
  """A case, its bank, and the folder of its new images."""
  found = PREDICTED[request.param]
  where, slash, train = found.train.partition('/')
  elsewhere = slash and where[0].isdigit()  # what another script draws
  bank = bank_of(where, train) if elsewhere else bank_of(found.script, found.train)
  return found, bank, drawn(found.script) / found.new


@pytest.mark.slow_for(*_GRAYS)
def test_command(case, tmp_path):
  found, bank, new = case
  result = command.run('predict', bank, new, '--out', tmp_path / 'out')
  assert result.code == (2 if 'refused' in found.right.values() else 0)
  rows = [json.loads(line) for line in (tmp_path / 'out/predictions.jsonl').read_text().splitlines()]
  decisions = {_name(row['path'], new): row['decision'] or 'refused' for row in rows}
  assert decisions == found.right
  assert all(name in result.out + result.err for name in found.named)
  pictures = [row['overlay'] for row in rows if row['decision']]
  assert len(set(pictures)) == len(pictures) and all((tmp_path / 'out' / p).is_file() for p in pictures)


# All gray values take one way to the network, whichever door they come by.
@pytest.mark.slow_for(*_GRAYS, 'alpha', 'same stem')
def test_python(case):
  found, bank, new = case
  inspector = inspection.load(bank)
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    if 'refused' not in found.right.values():
      decisions = {_name(f.path, new): f.decision for f in inspector.inspect(new)}
    else:
      decisions = {}
      for name in found.right:
        try:
          decisions[name] = inspector.inspect(new / name).decision
        except ValueError as e:
          assert name in str(e) and '\n' not in str(e)
          decisions[name] = 'refused'
      with pytest.raises(ValueError):
        list(inspector.inspect(new))
  assert decisions == found.right
  assert all(any(name in str(w.message) for w in said) for name in found.named)


@pytest.mark.slow_for(*PREDICTED.keys() - {'wide', 'bands'})
def test_http(case):
  found, bank, new = case
  options = dataclasses.replace(serve_test._OPTIONS, max_bytes=10**7)
  with serve_test.running(inspection.load(bank), options) as address:
    for name, right in found.right.items():
      if '#' not in name:
        status, _, answer = serve_test.ask(address, body=(new / name).read_bytes())
        assert (answer['decision'] if status == 200 else 'refused') == right, (name, answer)


def _name(path, new):
  return Path(path).relative_to(new).as_posix()


def _evaluated(root, out, *more):
  """Evaluates a data set by the command: {category: row of results.csv}, and all that was said."""
  result = command.run('evaluate', root, '--out', out, *_EVALUATE, *more)
  assert result.code == 0, result.err
  with open(Path(out) / 'results.csv', newline='') as file:
    return {row['category']: row for row in csv.DictReader(file)}, result.out + result.err


_FIGURES = ('num_train', 'num_test', 'image_auroc', 'pixel_auroc', 'aupro')


def _figures(row):
  return {name: row[name] for name in _FIGURES}


class TestEvaluate:

  @pytest.mark.parametrize('script', ['01_dotfiles', '01b_dotfiles_no_masks'])
  def test_hidden_files_are_no_data(self, script, drawn, tmp_path):
    with_them, _ = _evaluated(drawn(script), tmp_path / 'with')
    clean = tmp_path / 'clean'
    for path in sorted((drawn(script) / 'plate').rglob('*.png')):
      relative = path.relative_to(drawn(script))
      if not any(part.startswith('.') for part in relative.parts):
        (clean / relative).parent.mkdir(parents=True, exist_ok=True)
        (clean / relative).write_bytes(path.read_bytes())
    without, _ = _evaluated(clean, tmp_path / 'without')
    assert list(with_them) == list(without) == ['plate']
    assert _figures(with_them['plate']) == _figures(without['plate'])
    assert float(with_them['plate']['image_auroc']) == 1.0

  @pytest.mark.parametrize('name', ['upper', 'bmp', 'rgba_transparent'])
  def test_masks_that_are_understood(self, name, drawn, tmp_path):
    rows, _ = _evaluated(drawn('04_mask_names'), tmp_path / 'out', '--categories', name)
    plain, _ = _evaluated(drawn('29_leak'), tmp_path / 'plain')
    assert float(rows[name]['pixel_auroc']) > 0.97
    assert rows[name]['pixel_auroc'] == rows[name]['pixel_auroc'] and plain

  @pytest.mark.parametrize('name', ['gt_suffix', 'two_parts', 'mask3', 'half_size'])
  def test_other_masks_are_refused_by_folder_and_image(self, name, drawn, tmp_path):
    result = command.run(
        'evaluate', drawn('04_mask_names'), '--out', tmp_path / 'out', *_EVALUATE, '--categories', name)
    assert result.code and result.err.startswith('error: ') and result.err.count('\n') == 1
    assert f'{name}/ground_truth/blot' in result.err and f'{name}/test/blot' in result.err

  def test_a_leak_is_told(self, drawn, tmp_path):
    _, said = _evaluated(drawn('29_leak'), tmp_path / 'out')
    assert '4 of 8' in said and 'training images' in said

  def test_other_names_of_good(self, drawn, tmp_path):
    rows, said = _evaluated(drawn('30_ok_ng'), tmp_path / 'out')
    assert list(rows) == ['a', 'b', 'c'] and 'OK' in said and 'Good' in said
    for row in rows.values():
      assert (row['num_train'], row['num_test'], float(row['image_auroc'])) == ('6', '8', 1.0)


class TestFewImages:

  def test_one_is_told_at_once_with_what_it_allows(self, drawn, tmp_path):
    said = command.refused('fit', drawn('15_few_images') / 'n1', '--out', tmp_path / 'bank', *_FIT)
    assert '--folds' in said and not (tmp_path / 'bank').exists()
    with pytest.raises(ValueError, match='false_alarm_rate=None'):
      pc.fit(drawn('15_few_images') / 'n1', backbone='resnet18_slim.procedural')
    command.done('fit', drawn('15_few_images') / 'n1', '--out', tmp_path / 'bank', *_FIT, '--folds=0')

  @pytest.mark.parametrize('folder', ['n2', 'n3', 'black'])
  def test_few_do(self, folder, drawn, bank_of, tmp_path):
    bank = bank_of('15_few_images', folder)
    command.done('predict', bank, drawn('15_few_images') / 'new', '--out', tmp_path / 'out')


class TestFeedback:

  def test_what_looks_defective_is_not_taken_up_unless_it_is_accepted_by_name(self, drawn, bank_of, tmp_path):
    bank, images = bank_of('32_feedback', 'train'), drawn('32_feedback') / 'append_mixed'
    inspector = inspection.load(bank)
    asked = sorted(Path(f.path).name for f in inspector.inspect(images) if f.anomalous)
    assert 'oops.png' in asked
    result = command.run('bank', 'append', bank, images, '--out', tmp_path / 'more')
    assert result.code == 1 and not (tmp_path / 'more').exists()
    assert all(name in result.err for name in asked) and '--accept' in result.err
    with pytest.raises(NotAccepted) as refused:
      inspector.append(images)
    assert sorted(Path(image.name).name for image in refused.value.images) == asked

  @pytest.mark.slow
  def test_variants_pass_afterwards_and_defects_do_not(self, drawn, bank_of, tmp_path):
    bank, images = bank_of('32_feedback', 'train'), drawn('32_feedback') / 'append_ok'
    command.done('bank', 'append', bank, images, '--out', tmp_path / 'more', '--accept', 'all')
    inspector = inspection.load(tmp_path / 'more')
    decisions = {Path(f.path).name: f.decision for f in inspector.inspect(drawn('32_feedback') / 'new')}
    assert {name for name, decision in decisions.items() if decision == 'good'} == {
        'good0.png', 'good1.png', 'variant0.png', 'variant1.png', 'variant2.png'}


class TestSeveralDefects:

  @pytest.mark.parametrize('name, number', [('2.png', 2), ('3.png', 3)])
  def test_each_is_a_region(self, name, number, drawn, bank_of):
    inspector = inspection.load(bank_of('22_two_defects', 'train'))
    finding = inspector.inspect(drawn('22_two_defects') / 'new' / name)
    assert len(finding.regions) == number
    areas = [region.area for region in finding.regions]
    assert areas == sorted(areas, reverse=True) and min(areas) > 20
    spots = [(60, 60), (105, 105)] if number == 2 else [(50, 80), (105, 55), (105, 110)]
    for y, x in spots:
      assert any(left <= x < right and top <= y < bottom
                 for left, top, right, bottom in (region.box for region in finding.regions))
