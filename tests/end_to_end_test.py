"""The binary as a user runs it: results, resumption, bad input. Small images, random weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from configs import default
from configs.parity import anomalib, paper
from experiments import mvtec
from patchcore_jax.backbones import checkpoints
from patchcore_jax.banks.model import flat
from patchcore_jax.report import per_image
from tests import conftest, plates, small


def _command(data, workdir, **overrides):
  flags = [
      f'--config.{k}={",".join(map(str, v)) if isinstance(v, tuple) else v}'
      for k, v in plates.fields(data, overrides).items()]
  return [sys.executable, '-m', 'experiments.mvtec', '--config=configs/wrn50.py',
          f'--workdir={workdir}', *flags]


def _run(command, **kwargs):
  return subprocess.run(command, cwd=conftest.ROOT, capture_output=True, text=True, **kwargs)


class TestResults:

  def test_a_run_from_files_to_table(self, data, tmp_path):
    result = _run(_command(data, tmp_path / 'run'))
    assert result.returncode == 0, result.stderr
    for words in ('RANDOM WEIGHTS', 'Coreset 0.2 of all', 'Coreset 0.05 of all', 'bolt', 'mean'):
      assert words in result.stdout
    rows = plates.results(tmp_path / 'run')
    assert [(r['category'], r['coreset_ratio']) for r in rows] == [
        ('bolt', '0.2'), ('bolt', '0.05'), ('nut', '0.2'), ('nut', '0.05')]
    for row in rows:
      assert row['num_train'] == '6' and row['num_test'] == '8'
      # A bright or dark square is found with any features.
      assert float(row['image_auroc']) > 0.9 and float(row['pixel_auroc']) > 0.9
      assert 0.3 < float(row['aupro']) <= 1
    assert {p.name for p in (tmp_path / 'run').iterdir()} == {
        'results.csv', 'config.json', 'banks', 'scores', 'errors', 'report', 'report.html'}
    assert {p.name for p in (tmp_path / 'run/banks').iterdir()} == {'bolt', 'nut'}

  def test_same_seed_same_results_and_another_seed_another_bank(self, data, tmp_path):
    for name in ('a', 'b'):
      mvtec.run(plates.config(data), tmp_path / name)
    assert plates.results(tmp_path / 'a') == plates.results(tmp_path / 'b')
    mvtec.run(plates.config(data, seed=1), tmp_path / 'c')
    assert plates.results(tmp_path / 'c') != plates.results(tmp_path / 'a')

  def test_batch_size_and_workers_do_not_change_the_metrics(self, data, tmp_path):
    mvtec.run(plates.config(data, data__categories=('bolt',)), tmp_path / 'a')
    other = plates.config(data, data__categories=('bolt',), data__batch_size=3, data__num_workers=1)
    mvtec.run(other, tmp_path / 'b')
    for one, other in zip(plates.results(tmp_path / 'a'), plates.results(tmp_path / 'b'), strict=True):
      for metric in ('image_auroc', 'pixel_auroc', 'aupro'):
        # float32 rounding may move a pixel past another.
        assert float(one[metric]) == pytest.approx(float(other[metric]), abs=1e-5)

  def test_without_masks_pixel_metrics_are_absent(self, data, tmp_path):
    shutil.rmtree(data / 'nut/ground_truth')
    rows = mvtec.run(plates.config(data), tmp_path / 'run')
    assert [row['aupro'] is None for row in rows] == [False, False, True, True]
    assert [row['pixel_auroc'] for row in plates.results(tmp_path / 'run')][2:] == ['', '']

  def test_every_scoring_field_is_read(self, data, tmp_path):
    # Of a network that is quickly compiled, which is most of the time here.
    quick = {'data__categories': ('bolt',), 'backbone__name': 'tests.small:backbone', 'backbone__weights': '',
             'backbone__layers': ('a', 'b'), 'coreset__ratios': (0.1,)}
    base = mvtec.run(plates.config(data, **quick), tmp_path / 'base')
    for i, (field, value) in enumerate({
        'scoring__num_neighbors': 3, 'scoring__distance': 'root', 'scoring__sigma': 1.0,
        'scoring__image_score': 'reweighted', 'metrics__max_fpr': 0.1, 'embedding__patch_size': 5,
        'preprocess__mask_threshold': 0.5, 'preprocess__crop': (48,), 'embedding__kind': 'adaptive',
        'coreset__projection_dim': 8, 'coreset__num_start_points': 3, 'coreset__start': 'point',
        'coreset__projection': 'sparse', 'preprocess__mask_resize': 'nearest',
        'scoring__upsampling': 'nearest', 'scoring__blur_edges': 'reflect', 'scoring__foreground': 'pca',
        'embedding__unit_length': True, 'embedding__rotations': 2}.items()):
      rows = mvtec.run(plates.config(data, **quick | {field: value}), tmp_path / str(i))
      changed = [{k: v for k, v in r.items() if k not in plates.TIMINGS} for r in rows]
      assert changed != [{k: v for k, v in r.items() if k not in plates.TIMINGS} for r in base], field


class TestPresets:
  """configs/parity: the two reference behaviours, set by fields alone."""

  def test_they_differ_in_every_point(self):
    ours, theirs = (flat(c.get_config().to_dict()) for c in (paper, anomalib))
    assert ours.keys() == theirs.keys()
    assert {k for k in ours if ours[k] != theirs[k]} == {
        'preprocess.resize', 'preprocess.mask_resize', 'backbone.name', 'embedding.kind',
        'coreset.projection', 'coreset.projection_dim', 'coreset.start', 'scoring.distance',
        'scoring.image_score', 'scoring.upsampling', 'scoring.blur_edges'}
    defaults = flat(default.get_config().to_dict())  # are the paper's code's
    assert {k for k in ours if ours[k] != defaults[k]} == {'coreset.ratios', 'backbone.precision'}
    assert ours['backbone.precision'] == theirs['backbone.precision'] == 'float32'

  @pytest.mark.slow
  @pytest.mark.parametrize('preset', [paper, anomalib])
  def test_they_run(self, preset, data, tmp_path):
    config = preset.get_config()
    config.update_from_flattened_dict({
        'data.root': str(data), 'data.categories': ('bolt',), 'data.num_workers': 0,
        'data.batch_size': 4, 'backbone.name': 'resnet18', 'backbone.weights': 'random'})
    (row,) = mvtec.run(config, tmp_path / 'run')
    assert row['image_auroc'] > 0.9


class TestBuiltInBackbone:

  def test_auto_names_its_choice_and_a_run_keeps_it(self, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setitem(sys.modules, checkpoints.find(checkpoints.OFFLINE).module, None)
    config = plates.config(data, backbone__name='auto', backbone__weights='')
    mvtec.run(config, tmp_path / 'run')
    said = capsys.readouterr().out
    assert 'backbone resnet18_slim.procedural' in said and 'wide_resnet50_2.tv_in1k' in said
    assert json.loads((tmp_path / 'run/config.json').read_text())['backbone']['name'] == (
        'resnet18_slim.procedural')
    # The better one turned up in the meantime.
    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda *args, **kwargs: 'model.safetensors')
    with pytest.raises(ValueError, match="was 'resnet18_slim.procedural', now 'wide_resnet50_2"):
      mvtec.run(config, tmp_path / 'run')


class TestResume:

  def test_killed_in_the_second_category_goes_on_after_the_first(self, data, tmp_path):
    mvtec.run(plates.config(data), tmp_path / 'whole')
    process = subprocess.Popen(
        _command(data, tmp_path / 'run'), cwd=conftest.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'run/results.csv').exists() and time.monotonic() < deadline:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert {r['category'] for r in plates.results(tmp_path / 'run')} == {'bolt'}
    result = _run(_command(data, tmp_path / 'run'))
    assert result.returncode == 0 and 'bolt: finished before' in result.stdout
    assert plates.results(tmp_path / 'run') == plates.results(tmp_path / 'whole')

  def test_a_saved_bank_is_used_again(self, data, tmp_path):
    mvtec.run(plates.config(data), tmp_path / 'run')
    before = plates.results(tmp_path / 'run')
    (tmp_path / 'run/results.csv').unlink()  # as if killed between the bank and the results
    for image in (data / 'bolt/train/good').iterdir():
      image.write_bytes(b'not read again')
    mvtec.run(plates.config(data), tmp_path / 'run')
    assert plates.results(tmp_path / 'run') == before

  def test_a_workdir_of_a_version_before_goes_on(self, tmp_path, capsys):
    """Its results are read, its config is today's, and its bank is used (testdata/README.md says of what)."""
    data, run = tmp_path / 'data', tmp_path / 'run'
    for folder, images in (('train/good', small.images(10)), ('test/good', small.images(4, seed=7)),
                           ('test/spot', small.images(3, seed=8))):
      (data / 'old' / folder).mkdir(parents=True)
      for i, image in enumerate(images):
        if folder == 'test/spot':
          image[8:16, 8:16] = 255
        Image.fromarray(image).save(data / 'old' / folder / f'{i}.png')
    shutil.copytree(conftest.ROOT / 'tests/testdata/workdir_of_format_2', run)
    before = json.loads((run / 'config.json').read_text())
    before['data']['root'] = str(data)
    (run / 'config.json').write_text(json.dumps(before))
    config = plates.config(
        data, preprocess__resize=(), preprocess__crop=(), backbone__name='tests.small:backbone',
        backbone__weights='', backbone__layers=(), coreset__ratios=(0.5, 0.1), coreset__projection_dim=4,
        report__gallery=0)
    rows, scores = plates.results(run), per_image.read_scores(run / 'scores/old.csv')
    mvtec.run(config, run)
    assert 'old: finished before' in capsys.readouterr().out
    now = json.loads((run / 'config.json').read_text())
    assert plates.results(run) == rows
    assert all(now[k] | v == now[k] if isinstance(v, dict) else now[k] == v for k, v in before.items())
    config.padim.num_dims = 7  # of a method that is not used
    mvtec.run(config, run)
    assert 'old: finished before' in capsys.readouterr().out
    (run / 'results.csv').unlink()
    for image in (data / 'old/train/good').iterdir():
      image.write_bytes(b'not read again')
    mvtec.run(config, run)
    again = per_image.read_scores(run / 'scores/old.csv')
    assert [s.image_score for s in again] == pytest.approx([s.image_score for s in scores], rel=1e-5)
    for row, old in zip(plates.results(run), rows, strict=True):
      row.pop('image_threshold'), old.pop('image_threshold')  # a score, compared above
      assert row.pop('num_leaked') in ('', '0')  # which was not there yet
      assert {name: row[name] for name in old} == old  # newer metrics are beside them

  def test_changed_settings_are_an_error(self, data, tmp_path):
    mvtec.run(plates.config(data, data__categories=('bolt',)), tmp_path / 'run')
    with pytest.raises(ValueError, match=r'seed was 0, now 7'):
      mvtec.run(plates.config(data, data__categories=('bolt',), seed=7), tmp_path / 'run')

  def test_a_finished_run_prints_its_table_again(self, data, tmp_path, capsys):
    mvtec.run(plates.config(data, data__categories=('bolt',)), tmp_path / 'run')
    capsys.readouterr()
    mvtec.run(plates.config(data, data__categories=('bolt',)), tmp_path / 'run')
    assert 'Coreset 0.2 of all' in capsys.readouterr().out


def _remove(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


_TRAIN, _TEST = 'bolt/train/good/003.png', 'bolt/test/spot/000.png'


class TestBadInput:
  """Each is one readable line that names what is wrong; nothing is written."""

  @pytest.mark.parametrize('overrides, words', [
      ({'data__root': 'no/such/folder'}, 'no/such/folder does not exist'),
      ({'data__root': ''}, 'data.root is not set'),
      ({'data__source': 'cloud'}, 'data.source'),
      ({'data__categories': ('bolt', 'screw')}, "No category 'screw' .*There are: bolt, nut"),
      ({'data__on_error': 'ignore'}, 'data.on_error'),
      ({'data__batch_size': -1}, 'data.batch_size'),
      ({'coreset__ratios': (0.1, 1.5)}, 'coreset ratio 1.5: expected 0 < ratio <= 1'),
      ({'coreset__ratios': (0,)}, 'coreset ratio 0'),
      ({'coreset__ratios': ()}, 'coreset.ratios is empty'),
      ({'backbone__layers': ('layer2', 'layer9')}, "no layer 'layer9'. It has: stem, layer1"),
      ({'backbone__name': 'resnet19'}, "Unknown backbone 'resnet19'"),
      ({'backbone__name': 'resnet18.tv', 'backbone__weights': ''}, "No checkpoint 'resnet18.tv'"),
      ({'backbone__weights': 'none.pth'}, 'No weights file none.pth'),
      ({'preprocess__crop': (65,)}, r'preprocess.crop=\(65,\) does not fit'),
      ({'embedding__patch_size': 4}, 'embedding.patch_size=4'),
      ({'scoring__distance': 'cosine'}, 'scoring.distance'),
      ({'coreset__start': 'last'}, 'coreset.start'),
      ({'coreset__projection': 'pca'}, 'coreset.projection'),
      ({'metrics__max_fpr': 0.0}, 'metrics.max_fpr'),
      ({'metrics__connectivity': 6}, 'metrics.connectivity')])
  def test_settings(self, overrides, words, pristine, tmp_path):
    with pytest.raises(ValueError, match=words):
      mvtec.run(plates.config(pristine, **overrides), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()

  @pytest.mark.parametrize('damage, words', [
      (lambda d: _remove(d / 'bolt/train/good'), 'No category .bolt|bolt has no train/good'),
      (lambda d: [p.unlink() for p in (d / 'bolt/train/good').iterdir()], 'No images in'),
      (lambda d: (d / 'bolt/ground_truth/spot/000_mask.png').unlink(), 'No mask for .*spot/000.png')])
  def test_folders(self, damage, words, data, tmp_path):
    damage(data)
    with pytest.raises(ValueError, match=words):
      mvtec.run(plates.config(data, data__categories=('bolt',)), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()

  def test_empty_root(self, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='No category found'):
      mvtec.run(plates.config(tmp_path / 'empty'), tmp_path / 'run')

  @pytest.mark.parametrize('damage, words', [
      (lambda d: (d / _TRAIN).write_bytes((d / _TRAIN).read_bytes()[:500]), 'train/good/003.png'),
      (lambda d: (d / _TEST).write_bytes(b'text'), 'spot/000.png.*not a known image format'),
      (lambda d: Image.new('RGB', (72, 60)).resize((30, 20)).save(d / _TRAIN),
       '003.png: .*smaller than the crop'),
      (lambda d: Image.new('L', (9, 9)).save(d / 'bolt/ground_truth/spot/000_mask.png'),
       '000_mask.png is 9 x 9 pixels')])
  def test_images(self, damage, words, data, tmp_path):
    damage(data)
    with pytest.raises(ValueError, match=words):
      mvtec.run(plates.config(data, preprocess__resize=(), data__categories=('bolt',)), tmp_path / 'run')
    assert not (tmp_path / 'run/results.csv').exists()

  def test_unreadable_images_can_be_skipped_and_are_counted(self, data, tmp_path, capsys):
    (data / _TRAIN).write_bytes(b'text')
    (data / _TEST).write_bytes(b'text')
    rows = mvtec.run(
        plates.config(data, data__on_error='skip', data__categories=('bolt',)), tmp_path / 'run')
    assert [(r['num_train'], r['num_test'], r['num_skipped']) for r in rows] == [(5, 7, 2)] * 2
    out = capsys.readouterr().out
    assert 'train/good/003.png' in out and 'spot/000.png' in out

  def test_a_ratio_that_keeps_no_patch(self, pristine, tmp_path):
    # 6 images of 14 x 14 patches
    with pytest.raises(ValueError, match='keeps none of 1176 patches'):
      mvtec.run(plates.config(pristine, coreset__ratios=(0.0001,)), tmp_path / 'run')
    # Nothing was made with that setting, so the workdir takes the corrected one.
    mvtec.run(plates.config(pristine, data__categories=('bolt',)), tmp_path / 'run')

  def test_more_neighbours_than_patches_in_the_smallest_bank(self, pristine, tmp_path):
    with pytest.raises(ValueError, match='99 neighbours are asked for in banks of'):
      mvtec.run(plates.config(pristine, scoring__num_neighbors=99), tmp_path / 'run')

  @pytest.mark.parametrize('flag, words', [
      ('--config.data.rot=x', 'Did you mean "root" instead of "rot"'),
      ('--config.dta.root=x', 'Did you mean "data" instead of "dta"'),
      ('--config.data.batch_size=many', 'many'),
      ('--confg=x', "Unknown command line flag 'confg'"),
      ('--config=configs/none.py', 'No config file configs/none.py'),
      ('extra', "Unexpected arguments ['extra']")])
  def test_command_line(self, flag, words, pristine, tmp_path):
    result = _run([*_command(pristine, tmp_path / 'run'), flag])
    assert result.returncode != 0 and words in result.stderr, result.stderr
    assert 'Traceback' not in result.stderr and not (tmp_path / 'run').exists()

  def test_errors_are_one_line_and_debug_shows_the_trace(self, tmp_path):
    command = _command(tmp_path / 'none', tmp_path / 'run')
    result = _run(command)
    assert result.returncode == 1 and result.stderr.startswith('error: The data folder')
    assert len(result.stderr.splitlines()) == 1
    assert 'Traceback' in _run([*command, '--debug']).stderr

  def test_no_network_and_no_file_names_the_file(self, pristine, tmp_path):
    result = _run(
        _command(pristine, tmp_path / 'run', backbone__name='wide_resnet50_2.tv_in1k',
                 backbone__weights=''),
        env=os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'hub')})
    assert result.returncode == 1 and 'wide_resnet50_2-95faca4d.pth' in result.stderr
    assert not (tmp_path / 'run').exists()

  def test_a_full_disk(self, pristine, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    config = plates.config(pristine, data__categories=('bolt',))
    with pytest.raises(OSError, match=r'bolt: it takes 0.2 MiB, and 1.0 MiB of the disk are free'):
      mvtec.run(config, tmp_path / 'run')
    assert not list((tmp_path / 'run/banks').iterdir())
    monkeypatch.undo()
    mvtec.run(config, tmp_path / 'run')

  def test_a_write_that_fails_half_way(self, pristine, tmp_path):
    # Files may not grow past 20 kB, so that the bank cannot be written to its end.
    limited = ['bash', '-c', 'ulimit -f 20; exec "$@"', 'bash']
    result = _run([*limited, *_command(pristine, tmp_path / 'run', data__categories=('bolt',))])
    assert result.returncode == 1 and 'error: Cannot write the model' in result.stderr
    assert not (tmp_path / 'run/results.csv').exists()
    assert not (tmp_path / 'run/banks/bolt').exists()
    again = _run(_command(pristine, tmp_path / 'run', data__categories=('bolt',)))
    assert again.returncode == 0
    assert [p.name for p in (tmp_path / 'run/banks').iterdir()] == ['bolt']
