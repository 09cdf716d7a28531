"""`patchcore evaluate`, `patchcore demo` and `pc.evaluate` measure what experiments.mvtec measures."""

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

import patchcore_jax as pc
from experiments import mvtec
from patchcore_jax.banks import store
from patchcore_jax.builtin import synthetic
from patchcore_jax.cli import main
from patchcore_jax.detectors import PaDiM, PatchCore
from patchcore_jax.evaluation import Settings, evaluate, experiment
from patchcore_jax.evaluation.data import located
from patchcore_jax.report import results
from patchcore_jax.settings import BackboneSpec, CoresetSpec, DataSpec, EmbeddingSpec, Preprocessing
from tests import command, conftest, drawn_files, plates, small

# A network that compiles quickly.
FIELDS = {
    'data__categories': ('bolt',), 'backbone__name': 'tests.small:backbone', 'backbone__weights': '',
    'backbone__layers': ()}
FLAGS = (
    '--categories=bolt', '--backbone=tests.small:backbone', '--batch-size=4', '--resize=64', '--crop=56',
    '--ratios=0.2,0.05', '--coreset-projection-dim=16')


def run(*arguments):
  """Runs the command in this process; returns its exit code."""
  with pytest.raises(SystemExit) as e:
    main(list(map(str, arguments)))
  return e.value.code


def measured(rows):
  return [{k: v for k, v in row.items() if k not in plates.TIMINGS} for row in rows]


@pytest.fixture(scope='module')
def expected(pristine, tmp_path_factory):
  """The rows and the workdir of experiments.mvtec."""
  workdir = tmp_path_factory.mktemp('mvtec')
  return mvtec.run(plates.config(pristine, **FIELDS), workdir), workdir


class TestCommand:

  def test_is_what_the_binary_does(self, expected, pristine, tmp_path, capsys):
    rows, workdir = expected
    out = tmp_path / 'run'
    assert run('evaluate', pristine, '--out', out, *FLAGS, '--keep-errors') == 0
    assert measured(results.read_csv(out / 'results.csv')) == measured(rows)
    assert {p.name for p in out.iterdir()} == {p.name for p in workdir.iterdir()}
    kept, theirs = (json.loads((folder / 'config.json').read_text()) for folder in (out, workdir))
    assert kept == {k: v for k, v in theirs.items() if k not in ('published', 'sweep')}
    said = capsys.readouterr().out
    assert 'Coreset 0.2 of all' in said and 'paper' not in said and str(out / 'report.html') in said

  def test_a_category_of_its_own_and_another_method(self, pristine, tmp_path):
    out = tmp_path / 'run'
    assert run('evaluate', pristine / 'nut', '--out', out, '--detector=padim', '--padim-num-dims=5',
               *FLAGS[1:-2], '--gallery=0') == 0
    (row,) = results.read_csv(out / 'results.csv')
    assert row['category'] == 'nut' and row['bank_size'] is None
    assert json.loads((out / 'config.json').read_text())['padim']['num_dims'] == 5

  def test_the_same_command_goes_on_after_ctrl_c(self, pristine, tmp_path, monkeypatch, capsys):
    flags = ('evaluate', pristine, '--out', tmp_path / 'run', *FLAGS[1:])
    images = experiment.Images

    def interrupted(settings, category):
      if category.name == 'nut':
        raise KeyboardInterrupt
      return images(settings, category)

    monkeypatch.setattr(experiment, 'Images', interrupted)
    assert run(*flags) == 130
    assert capsys.readouterr().err == 'error: interrupted. Start the same command again to go on.\n'
    monkeypatch.undo()
    assert run(*flags) == 0
    assert 'bolt: finished before' in capsys.readouterr().out
    assert {r['category'] for r in results.read_csv(tmp_path / 'run/results.csv')} == {'bolt', 'nut'}

  @pytest.mark.parametrize('flags, words', [
      (['no/such'], 'The data folder no/such does not exist'),
      (['.', '--layout=vista'], "--layout.*got 'vista'. Did you mean 'visa'"),
      (['.', '--detector=padin'], "detector='padin'.*expected one of patchcore, spade, padim"),
      (['.', '--ratio=abc'], "--ratio.*expected a number, got 'abc'"),
      (['.', '--ratios=0.1,2'], 'coreset ratio 2.0: expected 0 < ratio <= 1'),
      (['.', '--categories=screw'], "No category 'screw' .*There are: bolt, nut"),
      (['.', '--detector=padim', '--ratios=0.1'], '--ratios is for --detector patchcore'),
      (['.', '--ration=1'], "--ration.*--ratio"),
      (['bolt/train'], 'No category found in .*train')])
  def test_slips_are_one_line(self, flags, words, pristine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pristine)
    assert run('evaluate', *flags, '--out', tmp_path / 'run') in (1, 2)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith('error: ')
    assert re.search(words, error), error
    assert not (tmp_path / 'run').exists()

  @pytest.mark.parametrize('flags', [['--help'], ['none', '--out=x'], ['.', '--out=x', '--detector=none']])
  def test_slips_wait_for_no_jax(self, flags):
    script = (
        'import sys; from patchcore_jax.cli import main\n'
        'try: main(sys.argv[1:])\n'
        'finally: print("jax" in sys.modules, "rich.table" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', script, 'evaluate', *flags], cwd=conftest.ROOT,
                          capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == 'False False'


class TestFunction:

  def test_rows_of_a_network_from_python(self, expected, pristine, tmp_path):
    rows, _ = expected
    stages = []
    found = pc.evaluate(
        pristine / 'bolt', detector=PatchCore(coreset=CoresetSpec(projection_dim=16)),
        backbone=small.backbone(), ratios=(0.2, 0.05), preprocessing=Preprocessing((64,), crop=(56,)),
        batch_size=4, out=tmp_path / 'run', progress=lambda stage, done, total: stages.append(stage))
    assert measured(found) == measured(rows)
    assert stages[-1] == 'bolt: predict' and (tmp_path / 'run/report.html').exists()

  def test_nothing_is_written_without_out(self, pristine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        evaluate(pristine, detector=PaDiM(5), backbone='tests.small:backbone', categories=['nut'],
                 preprocessing=Preprocessing((64,), crop=(56,)), protocol=protocol)[0]
        for protocol in ('paper', 'original')]
    assert [row['category'] for row in rows] == ['nut', 'nut']
    assert rows[0]['image_auroc'] == rows[1]['image_auroc'] and rows[0]['aupro'] != rows[1]['aupro']
    assert not list(tmp_path.iterdir())

  def test_errors(self, pristine, tmp_path):
    with pytest.raises(ValueError, match="data.source='cloud': expected one of"):
      evaluate(pristine, layout='cloud')
    with pytest.raises(ValueError, match="metrics.protocol='official': expected one of paper, original"):
      evaluate(pristine, protocol='official')
    with pytest.raises(ValueError, match=r'ratios=\(0.1,\): PaDiM has no coreset'):
      evaluate(pristine, detector=PaDiM(), ratios=(0.1,))


class TestWhatNumbersHide:
  """Each is told by the command, by Python and on the page."""

  FLAGS = (*FLAGS[1:-2], '--detector=padim', '--padim-num-dims=5', '--gallery=0')

  @pytest.fixture
  def data(self, pristine, tmp_path):
    shutil.copytree(pristine / 'bolt', tmp_path / 'bolt')
    return tmp_path / 'bolt'

  def _told(self, data, tmp_path, **settings):
    """What the command says of the category; Python and the page must say the same."""
    done = command.done('evaluate', data, '--out', tmp_path / 'run', *self.FLAGS)
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      (row,) = evaluate(data, detector=PaDiM(5), backbone='tests.small:backbone', batch_size=4,
                        preprocessing=Preprocessing((64,), crop=(56,)))
    lines = [str(w.message) for w in caught if str(w.message).startswith('bolt: ')]
    assert lines == [line for line in done.splitlines() if line in lines]
    page = html.unescape((tmp_path / 'run/report.html').read_text())
    assert all(line in page for line in lines)
    assert row == results.read_csv(tmp_path / 'run/results.csv')[0] | {k: row[k] for k in plates.TIMINGS}
    return lines, row

  def test_what_is_not_inspected_alone(self, data, tmp_path):
    lines, row = self._told(data, tmp_path)
    assert lines == ['bolt: 36 % of each image is not inspected, because of preprocess.crop=56.']
    assert row['num_leaked'] == 0

  def test_leaks_whatever_the_file(self, data, tmp_path):
    shutil.copy(data / 'train/good/000.png', data / 'test/good/copied.png')
    with Image.open(data / 'train/good/001.png') as image:
      image.save(data / 'test/good/saved.bmp')
      image.save(data / 'test/spot/saved.tif', compression='tiff_lzw')
    shutil.copy(data / 'ground_truth/spot/000_mask.png', data / 'ground_truth/spot/saved_mask.png')
    lines, row = self._told(data, tmp_path)
    assert row['num_leaked'] == 3 and row['num_test'] == 11
    leaked, contradiction = lines[1:]
    assert leaked.startswith(
        'bolt: 3 of 11 test images are training images: 2 in test/good, 1 in test/spot; test/good/copied.png '
        'is train/good/000.png.')
    assert contradiction.startswith(
        'bolt: 1 test image is both good and anomalous: test/good/saved.bmp is test/spot/saved.tif.')

  def test_leaks_into_a_bank_of_before(self, data, tmp_path):
    shutil.copy(data / 'train/good/000.png', data / 'test/good/copied.png')
    flags = ('evaluate', data, '--out', tmp_path / 'run', *FLAGS[1:], '--gallery=0')
    before = command.done(*flags)
    (tmp_path / 'run/results.csv').unlink()
    assert '1 of 9 test images are training images' in before and 'coreset' in before
    after = command.done(*flags)
    assert '1 of 9 test images are training images' in after and 'coreset' not in after

  def test_odd_masks(self, data, tmp_path):
    for i in (0, 2):
      Image.new('L', (72, 60), 255 * (i == 2)).save(data / f'ground_truth/spot/{i:03}_mask.png')
    lines, _ = self._told(data, tmp_path)
    assert lines[0] == (
        'bolt: odd masks: 1 empty: spot/000_mask.png; 1 marking more than half of the image (inverted?): '
        'spot/002_mask.png.')

  def test_a_mask_of_another_size_is_refused_before_the_work(self, data, tmp_path):
    Image.new('L', (36, 30), 255).save(data / 'ground_truth/spot/000_mask.png')
    error = command.refused('evaluate', data, '--out', tmp_path / 'run', *self.FLAGS)
    assert '000_mask.png is 36 x 30 pixels' in error and not (tmp_path / 'run').exists()
    done = command.done('evaluate', data, '--out', tmp_path / 'run', *self.FLAGS, '--on-error=skip')
    assert 'skipped: The mask ' in done

  def test_no_good_image_or_none_else(self, data, tmp_path):
    shutil.rmtree(data / 'test/good')
    lines, row = self._told(data, tmp_path)
    assert any('no good image in' in line for line in lines) and row['image_auroc'] is None
    shutil.move(data / 'test/spot', data / 'test/good')
    shutil.rmtree(data / 'test/hole')
    shutil.rmtree(tmp_path / 'run')
    lines, row = self._told(data, tmp_path)
    assert any('all test images count as good' in line for line in lines) and row['image_auroc'] is None

  def test_folders_of_good_parts_by_other_names(self, data, tmp_path):
    expected, _ = self._told(data, tmp_path)
    rows = results.read_csv(tmp_path / 'run/results.csv')
    (data / 'train/good').rename(data / 'train/OK')
    (data / 'test/good').rename(data / 'test/Gut')
    shutil.rmtree(tmp_path / 'run')
    lines, row = self._told(data, tmp_path)
    assert measured([row]) == measured(rows) and lines != expected
    assert any(str(data / 'train/OK') in line and str(data / 'test/Gut') in line for line in lines)

  def test_folders_that_are_no_category(self, data, tmp_path):
    shutil.copytree(data / 'test/spot', tmp_path / 'nut/test/spot')
    (tmp_path / 'texts').mkdir()
    done = command.done('evaluate', tmp_path, '--out', tmp_path / 'run', *self.FLAGS)
    assert 'no category, for lack of a folder train with good parts: nut (2 images).' in done.splitlines()

  def test_hidden_files_are_no_data(self, data, tmp_path):
    expected, row = self._told(data, tmp_path)
    for folder in ('train/good', 'test/good', 'test/spot', 'test', 'ground_truth/spot'):
      (data / folder / '.ipynb_checkpoints').mkdir()
      shutil.copy(data / 'test/good/000.png', data / folder / '.ipynb_checkpoints/000-checkpoint.png')
      (data / folder / '._000.png').write_bytes(bytes(50))
    shutil.rmtree(tmp_path / 'run')
    lines, again = self._told(data, tmp_path)
    assert measured([again]) == measured([row]) and set(expected) <= set(lines)

  def test_transparency(self, data, tmp_path):
    path = data / 'test/good/000.png'
    with Image.open(path) as image:
      image.putalpha(100)
      image.save(path)
    lines, _ = self._told(data, tmp_path)
    assert lines[0] == (
        'bolt: 1 image has transparency: what is transparent is laid on the colour 255,255,255 '
        '(--background).')

  def test_bands_that_nobody_chose_are_refused_before_the_work(self, data, tmp_path):
    for path in data.glob('t*/*/*.png'):
      path.unlink()
      path.with_suffix('.tif').write_bytes(drawn_files.tiff([np.ones((60, 72, 5), np.uint8)]))
    error = command.refused('evaluate', data, '--out', tmp_path / 'run', *self.FLAGS)
    assert '5 bands' in error and '--bands' in error and not (tmp_path / 'run').exists()
    command.done('evaluate', data, '--out', tmp_path / 'run', *self.FLAGS, '--bands=3,4,5')

  def test_the_range_of_deep_files(self, data, tmp_path):
    for path in data.glob('t*/*/*.png'):  # 8 bits, as a camera of 12 bits gives them
      with Image.open(path) as image:
        Image.fromarray(1000 + np.asarray(image.convert('L')).astype(np.uint16)).save(path)
    Image.fromarray(np.full((60, 72), 5000, np.uint16)).save(data / 'test/hole/001.png')
    said = command.done(
        'evaluate', data, '--out', tmp_path / 'run', *FLAGS[1:], '--gallery=4', '--keep-errors')
    assert '6 images have more than 8 bits: values from' in said
    assert 'bolt: up to 100 % of the pixels of a test image lie outside' in said
    low, high = store.restore(tmp_path / 'run/banks/bolt').description.preprocessing.value_range
    assert 900 < low < 1100 and 1150 < high < 1300
    (row, _) = results.read_csv(tmp_path / 'run/results.csv')
    assert row['image_auroc'] > 0.9  # of 257 values each, full range to full range, 1 would be left


class TestSettings:

  def test_the_bank_has_the_largest_ratio(self):
    settings = Settings(DataSpec(), PatchCore(0.5), (0.01, 0.25))
    assert settings.detector.ratio == 0.25 and settings.method is settings.detector
    assert Settings(DataSpec(), PatchCore(0.5)).ratios == (0.5,)
    assert Settings(DataSpec(), PaDiM()).ratios == (1.0,)

  def test_several_networks_are_an_ensemble(self):
    settings = Settings(DataSpec(), ratios=(0.25, 0.1), backbone=BackboneSpec('resnet18+resnet34'))
    assert settings.method.member == settings.detector and settings.method.ratios == (0.1,)

  def test_sections_of_the_config(self):
    more = {'published': {'ratios': [0.1]}, 'embedding': {'kind': 'mean'}, 'padim': {'epsilon': 9.0}}
    config = Settings(DataSpec(), PaDiM(7), more=more).to_json()
    assert config['padim'] == PaDiM(7).settings() and config['detector'] == 'padim'
    assert config['embedding'] == {'kind': 'mean'} and config['published'] == more['published']
    config = Settings(DataSpec(), PatchCore(embedding=EmbeddingSpec('adaptive')), more=more).to_json()
    assert config['padim'] == {'epsilon': 9.0} and config['embedding']['kind'] == 'adaptive'

  def test_a_folder_of_one_category(self, pristine, monkeypatch):
    found = DataSpec(root=str(pristine), categories=('nut',))
    monkeypatch.chdir(pristine / 'nut')
    assert located(DataSpec(root='.')) == located(DataSpec(root=str(pristine / 'nut'))) == found
    assert located(DataSpec(root=str(pristine))) == DataSpec(root=str(pristine))


def test_demo(tmp_path, monkeypatch, capsys):
  for name, few in {'NUM_TRAIN': 3, 'NUM_TEST': 26}.items():  # one good image to test with
    monkeypatch.setattr(synthetic, name, few)
  out = tmp_path / 'a demo'
  assert run('demo', '--out', out, '--categories=gear') == 0
  said = capsys.readouterr().out
  assert [r['coreset_ratio'] for r in results.read_csv(out / 'results/results.csv')] == [0.02]
  fit, predict = (shlex.split(line) for line in said.splitlines() if line.startswith('  patchcore'))
  assert fit[:2] == ['patchcore', 'fit'] and predict[1:3] == ['predict', fit[-1]]
  for folder in (fit[2], predict[3]):
    with Image.open(f'{folder}/000.png') as image:
      assert image.size == (300, 300)
