"""Sweeps, and every detector in the binaries. Small images, random weights."""

import importlib
import inspect
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import mvtec, sweep, wiring
from patchcore_jax import detectors
from patchcore_jax.banks import store
from patchcore_jax.data.folder import Example
from patchcore_jax.evaluation import checks, images
from patchcore_jax.report import figures, per_image, runs
from tests import conftest, plates, small

CONFIGS = sorted(p.stem for p in (conftest.ROOT / 'configs').glob('*.py') if p.stem != '__init__')

# Random features, few images: small neighbourhoods of SPADE and few dimensions of PaDiM.
DETECTORS = {
    'padim': {'padim__num_dims': 20}, 'spade': {'spade__num_images': 3}, 'mahalanobis_ad': {}, 'ocsvm': {}}


class TestDetectors:

  @pytest.mark.parametrize('detector', DETECTORS)
  def test_a_row_for_each_category(self, detector, pristine, tmp_path):
    rows = mvtec.run(
        plates.config(pristine, detector=detector, **DETECTORS[detector]), tmp_path / 'run')
    assert [(r['category'], r['coreset_ratio'], r['bank_size']) for r in rows] == [
        ('bolt', 1.0, None), ('nut', 1.0, None)]
    assert all((r['aupro'] is None) == (detector in ('mahalanobis_ad', 'ocsvm')) for r in rows)
    assert np.mean([r['image_auroc'] for r in rows]) > 0.6
    (measured,) = runs.find(tmp_path)
    assert measured.detector == detector and measured.coreset_method == ''
    # Finished categories are not done again.
    assert mvtec.run(
        plates.config(pristine, detector=detector, **DETECTORS[detector]), tmp_path / 'run') == rows

  def test_every_field_of_the_detectors_is_read(self, pristine, tmp_path):
    for field, value in {
        'padim.num_dims': 10, 'padim.epsilon': 1.0, 'padim.sigma': 0.0, 'padim.image_score': 'map',
        'spade.num_images': 1, 'spade.num_neighbors': 3, 'spade.distance': 'root', 'spade.sigma': 0.0,
        'mahalanobis_ad.shrinkage': 0.9, 'ocsvm.nu': 0.9, 'ocsvm.gamma': 1.0}.items():
      detector = field.partition('.')[0]
      values = []
      for number, fields in enumerate(({}, {field: value})):
        config = plates.config(
            pristine, data__categories=('nut',), detector=detector, **DETECTORS[detector] | fields)
        folder = tmp_path / f'{field}{number}'
        rows = mvtec.run(config, folder)
        values.append((per_image.read_scores(folder / 'scores/nut.csv'), rows[0]['pixel_auroc']))
      assert values[0] != values[1], field

  @pytest.mark.slow
  def test_an_ensemble_has_both_members(self, pristine, tmp_path):
    rows = {}
    for name in ('resnet18', 'resnet34', 'resnet18+resnet34'):
      rows[name] = mvtec.run(
          plates.config(pristine, backbone__name=name, data__categories=('bolt',)), tmp_path / name)
    assert [r['bank_size'] for r in rows['resnet18+resnet34']] == [
        a['bank_size'] + b['bank_size'] for a, b in zip(rows['resnet18'], rows['resnet34'], strict=True)]
    assert all(r['image_auroc'] > 0.9 for r in rows['resnet18+resnet34'])
    scores = {n: per_image.read_scores(tmp_path / n / 'scores/bolt.csv') for n in rows}
    together = [s.image_score for s in scores['resnet18+resnet34']]
    # Normalised on training images: neither member's own scores.
    assert together != [s.image_score for s in scores['resnet18']]
    kept = store.restore(tmp_path / 'resnet18+resnet34/banks/bolt').description
    assert [m.backbones[0].name for m in kept.members] == ['resnet18.random', 'resnet34.random']
    assert [p.name for p in (tmp_path / 'resnet18+resnet34/banks').iterdir()] == ['bolt']

  @pytest.mark.parametrize('fields, words', [
      ({'detector': 'best'}, "detector='best': expected one of patchcore, spade"),
      ({'detector': 'spade', 'backbone__name': 'resnet18+resnet34'}, 'SPADE has no ensembles: it gathers'),
      ({'backbone__name': 'resnet18+resnet34', 'backbone__weights': 'a.safetensors'},
       '1 for 2 networks. Expected a file for each'),
      ({'data__shots': 7}, 'data.shots=7: bolt has 6 training images'),
      ({'data__shots': -1}, 'data.shots=-1.*at least 0'),
      ({'coreset__method': 'kmeans'}, 'another bank for every ratio: expected one'),
      ({'coreset__method': 'thinning'}, 'another bank for every ratio: expected one'),
      ({'detector': 'padim', 'padim__epsilon': 0.0}, 'padim.epsilon=0.0: expected more than 0'),
      ({'detector': 'padim'}, 'padim.num_dims=550: the layers layer1, layer2 of resnet18')])
  def test_errors(self, fields, words, pristine, tmp_path):
    with pytest.raises(ValueError, match=words):
      mvtec.run(plates.config(pristine, **fields), tmp_path / 'run')


class TestErrorsKept:

  def test_those_on_the_wrong_side_of_the_threshold(self, data, tmp_path):
    # The same image as a good one and as a defect: one of the two is on the wrong side.
    for category in ('bolt', 'nut'):
      shutil.copy(data / category / 'test/spot/002.png', data / category / 'test/good/004.png')
    rows = [r for r in mvtec.run(plates.config(data), tmp_path / 'run') if r['coreset_ratio'] == 0.2]
    assert all(r['false_positives'] + r['false_negatives'] for r in rows)
    for row in rows:
      errors = per_image.read_errors(tmp_path / f'run/errors/{row["category"]}.npz')
      assert errors.coreset_ratio == 0.2 and errors.threshold == row['image_threshold']
      assert (errors.label == 0).sum() == row['false_positives']
      assert (errors.label == 1).sum() == row['false_negatives']
      assert errors.image.shape[1:] == (56, 56, 3) and errors.mask.shape[1:] == (56, 56)
      scores = {s.path: s.image_score for s in per_image.read_scores(
          tmp_path / f'run/scores/{row["category"]}.csv') if s.coreset_ratio == 0.2}
      for path, label in zip(errors.path, errors.label, strict=True):
        assert (scores[path] >= errors.threshold) != label


class TestDrawn:
  EXAMPLES = [Example(f'{i}.png', (), 0, 'nut', 'good') for i in range(20)]

  def test_draws_are_nested_seeded_and_differ(self):
    few, more = (images.drawn(self.EXAMPLES, n, 0, 3) for n in (5, 10))
    assert set(few) < set(more) and few == [e for e in self.EXAMPLES if e in few]
    assert few == images.drawn(self.EXAMPLES, 5, 0, 3)
    assert few != images.drawn(self.EXAMPLES, 5, 0, 4) and few != images.drawn(self.EXAMPLES, 5, 1, 3)
    other = [e._replace(category='bolt') for e in self.EXAMPLES]
    assert [e.image_path for e in few] != [e.image_path for e in images.drawn(other, 5, 0, 3)]
    assert images.drawn(self.EXAMPLES, 0, 0, 0) == self.EXAMPLES


class TestSweep:

  def test_equals_single_runs(self, pristine, tmp_path):
    """Shared feature maps or not, the rows are those of experiments.mvtec."""
    points = (
        'detector=patchcore coreset.ratios=0.2', 'data.shots=3 data.draw=1 backbone.layers=layer1',
        'detector=padim padim.num_dims=20', 'detector=spade spade.num_images=2',
        'detector=ocsvm data.noise=0.4', 'preprocess.crop=48')
    config = plates.config(pristine, sweep=points, data__categories=('bolt',))
    sweep.run(config, tmp_path / 'sweep')
    for point in points:
      mvtec.run(sweep.at_point(config, point), tmp_path / 'single' / point)
      assert plates.results(tmp_path / 'sweep' / sweep.folder_name(point)) == plates.results(
          tmp_path / 'single' / point), point
    assert {p.name for p in (tmp_path / 'sweep').iterdir()} == set(map(sweep.folder_name, points))

  def test_goes_on_after_what_is_finished(self, pristine, tmp_path, capsys, monkeypatch):
    config = plates.config(pristine, sweep=('seed=0', 'embedding.patch_size=1'))
    read, calls, looked_at = images.Features.__init__, [], []
    monkeypatch.setattr(checks, 'notes', lambda category, settings: looked_at.append(category.name) or [])
    monkeypatch.setattr(images.Features, '__init__', lambda *a, **k: (calls.append(1), read(*a, **k))[1])
    sweep.run(config, tmp_path / 'run')
    before = plates.results(tmp_path / 'run/embedding.patch_size=1')
    assert len(calls) == 2  # once for each category
    capsys.readouterr()
    sweep.run(config, tmp_path / 'run')
    assert len(calls) == len(looked_at) == 2
    shutil.rmtree(tmp_path / 'run/embedding.patch_size=1')
    sweep.run(config, tmp_path / 'run')
    assert plates.results(tmp_path / 'run/embedding.patch_size=1') == before
    assert len(looked_at) == 4  # though one of the points had both categories

  def test_only(self, pristine, tmp_path):
    config = plates.config(
        pristine, sweep=('seed=0 data.shots=1', 'seed=0 data.shots=2'), data__categories=('nut',))
    sweep.run(config, tmp_path / 'run', only='shots=2')
    assert [p.name for p in (tmp_path / 'run').iterdir()] == ['seed=0,data.shots=2']

  def test_set_over_the_points(self, pristine, tmp_path):
    config = plates.config(
        pristine, sweep=('detector=ocsvm backbone.layers=layer4', 'seed=1'), data__categories=('nut',))
    sweep.run(config, tmp_path / 'run', over='backbone.layers=layer1 data.shots=4')
    assert {p.name for p in (tmp_path / 'run').iterdir()} == set(map(sweep.folder_name, config.sweep))
    assert {m.layers for m in runs.find(tmp_path / 'run')} == {('layer1',)}
    assert {m.shots for m in runs.find(tmp_path / 'run')} == {4}

  def test_one_bad_image_is_skipped_by_all_points(self, data, tmp_path):
    (data / 'nut/test/good/001.png').write_text('no image')
    config = plates.config(
        data, sweep=('seed=0', 'seed=0 embedding.patch_size=1'), data__categories=('nut',),
        data__on_error='skip')
    sweep.run(config, tmp_path / 'run')
    for measured in (tmp_path / 'run').iterdir():
      assert {(r['num_test'], r['num_skipped']) for r in plates.results(measured)} == {('7', '1')}

  @pytest.mark.parametrize('points, only, words', [
      ((), '', 'config.sweep has 0'), (('seed=1',), 'x', "none matches --only='x'"),
      (('data.shot=1',), '', r"cannot set 'data.shot=1' of the point.*KeyError"),
      (('data.shots=many',), '', "cannot set 'data.shots=many'"), (('seed',), '', 'expected field=value'),
      (('coreset.ratios=2.0',), '', 'ratio')])
  def test_errors_before_anything_is_written(self, points, only, words, pristine, tmp_path):
    with pytest.raises(ValueError, match=words):
      sweep.run(plates.config(pristine, sweep=points), tmp_path / 'run', only=only)
    assert not (tmp_path / 'run').exists()

  def test_types_of_values(self):
    config = ConfigDict({
        'sweep': (), 'a': True, 'b': 1.5, 'c': (), 'd': ('x',), 'e': 'text'})
    point = sweep.at_point(config, 'a=False b=2 c=3,0.5 d=y,z e=7')
    assert point.to_dict() == {
        'sweep': (), 'a': False, 'b': 2.0, 'c': (3, 0.5), 'd': ('y', 'z'), 'e': '7'}

  def test_a_figure_comes_out(self, pristine, tmp_path):
    config = plates.config(pristine, data__categories=('nut',), sweep=(
        'coreset.method=greedy', 'coreset.method=random', 'coreset.method=identity coreset.ratios=1.0',
        'coreset.method=kmeans coreset.ratios=0.05'))
    sweep.run(config, tmp_path / 'run')
    lines = figures.make('S6', runs.find(tmp_path / 'run')).axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [2, 1, 1, 2]


def test_methods_that_train_see_the_images_themselves(monkeypatch):
  """The others share the maps of one pass."""
  seen, passes = {}, []

  def experiment(name, detector):
    return types.SimpleNamespace(
        settings=types.SimpleNamespace(detector=detector, backbone=None, seed=0),
        evaluate=lambda networks, images: seen.update({name: (networks[0].apply is small.apply, images)}))

  monkeypatch.setattr(sweep, 'create', lambda *_: (small.backbone(),))
  monkeypatch.setattr(sweep, 'Images', lambda *_: types.SimpleNamespace(with_features=lambda found: 'maps'))
  monkeypatch.setattr(sweep, '_features', lambda points, *_: passes.append(len(points)) or 'features')
  category = types.SimpleNamespace(name='nut')
  sweep._run_group({name: experiment(name, detectors.find(name)()) for name in (
      'padim', 'differnet', 'ocsvm')}, category, Path())
  assert passes == [2] and seen['padim'] == seen['ocsvm'] == (False, 'maps')
  assert seen['differnet'][0] and seen['differnet'][1] != 'maps'
  sweep._run_group({name: experiment(name, detectors.find(name)()) for name in (
      'differnet', 'student')}, category, Path())
  assert passes == [2] and seen['student'][0]


class TestConfigs:

  @pytest.mark.parametrize('name', [c for c in CONFIGS if c not in ('own', 'pretrain')])  # no claims
  def test_every_point_is_valid_and_has_its_own_folder(self, name):
    make = importlib.import_module(f'configs.{name}').get_config
    if 'setting' in inspect.signature(make).parameters:
      wiring.settings(make('paper'))
      with pytest.raises(ValueError, match='expected one of '):
        make('full')
    config = make()
    points = [sweep.at_point(config, point) for point in config.sweep] or [config]
    for point in points:
      wiring.settings(point)
    assert len({sweep.folder_name(p) for p in config.sweep}) == len(config.sweep)

  def test_docstrings_name_their_command(self):
    for name in CONFIGS:
      text = (conftest.ROOT / f'configs/{name}.py').read_text()
      assert name == 'default' or f'--config=configs/{name}.py' in text, name
    assert Path(conftest.ROOT / 'configs/wrn50.py').exists()
