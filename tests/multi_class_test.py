"""One model for all categories, tested on each of them."""

import csv
import shutil

import pytest

from experiments import sweep
from patchcore_jax.banks import store
from patchcore_jax.cli import main
from patchcore_jax.detectors import MuSc, PaDiM, PatchCore
from patchcore_jax.evaluation import Settings, evaluate, experiment
from patchcore_jax.settings import CoresetSpec, DataSpec, EmbeddingSpec, Preprocessing, ReportSpec
from tests import plates, small

DETECTOR = PatchCore(0.2, EmbeddingSpec('mean'), CoresetSpec(projection_dim=16))
SMALL = Preprocessing(resize=(64,), crop=(56,))


def _run(root, out, **data):
  said = []
  rows = experiment.run(
      Settings(DataSpec(root=str(root), batch_size=4, multi_class=True, **data), DETECTOR,
               preprocessing=SMALL, report=ReportSpec(gallery=4)),
      out, networks=(small.backbone(),), listener=experiment.Listener(say=said.append, notice=said.append))
  return rows, said


@pytest.fixture(scope='module')
def ran(pristine, tmp_path_factory):
  out = tmp_path_factory.mktemp('multi') / 'run'
  rows, said = _run(pristine, out)
  return rows, said, out


def test_all_categories_are_tested_by_one_bank_of_all_training_images(ran, pristine):
  rows, said, out = ran
  assert [(row['category'], row['num_train'], row['num_test']) for row in rows] == [
      ('bolt', 12, 8), ('nut', 12, 8)]
  assert [p.name for p in (out / 'banks').iterdir()] == ['all_categories']
  description = store.restore(out / 'banks/all_categories').description
  assert description.category == 'bolt, nut' and description.num_images == 12
  assert len({row['fit_seconds'] for row in rows}) == 1
  assert 'one for all categories' in (out / 'report.html').read_text()


def test_scores_are_those_of_a_model_of_all(ran, pristine, tmp_path):
  """The same images in one category of their own."""
  _, _, out = ran
  for name in ('bolt', 'nut'):
    for split in ('train/good', 'test/good', 'test/spot', 'test/hole'):
      for path in sorted((pristine / name / split).iterdir()):
        target = tmp_path / 'both/one' / split / f'{name}_{path.name}'
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
  evaluate(tmp_path / 'both/one', detector=DETECTOR, backbone=small.backbone(), preprocessing=SMALL,
           batch_size=4, out=tmp_path / 'out')
  expected = _scores(tmp_path / 'out/scores/one.csv')
  for name in ('bolt', 'nut'):
    found = _scores(out / f'scores/{name}.csv')
    assert len(found) == 8
    for image, score in found.items():
      split, file = image.rsplit('/', 1)
      assert score == pytest.approx(expected[f'{split}/{name}_{file}'], rel=1e-5)


def _scores(path):
  """{its place below the category: score}."""
  with open(path, newline='') as file:
    rows = list(csv.DictReader(file))
  return {'/'.join(row['path'].split('/')[-2:]): float(row['image_score']) for row in rows}


def test_it_is_told_of_which_category_the_nearest_are(ran):
  _, said, _ = ran
  (line,) = [line for line in said if line.startswith('bolt: the patch that decides is nearest to')]
  assert 'one of bolt in' in line and line.endswith('of 8 images.')


def _measured(rows):
  return [{name: value for name, value in row.items() if name not in plates.TIMINGS} for row in rows]


def test_it_goes_on_with_the_bank_that_is_there(data, tmp_path):
  out = tmp_path / 'run'
  rows, _ = _run(data, out)

  def interrupt():
    lines = (out / 'results.csv').read_text().splitlines(keepends=True)
    (out / 'results.csv').write_text(''.join(line for line in lines if not line.startswith('nut')))

  interrupt()
  again, said = _run(data, out)
  assert 'bolt: finished before' in said and _measured(again) == _measured(rows)
  interrupt()
  shutil.copytree(data / 'nut', data / 'screw')
  with pytest.raises(ValueError, match=r'12 images \(bolt, nut\), and there are 18 training images'):
    _run(data, out)


def test_each_category_gives_its_own_shots(pristine, tmp_path):
  rows, _ = _run(pristine, tmp_path / 'run', shots=2)
  assert {row['num_train'] for row in rows} == {4}
  images = store.restore(tmp_path / 'run/banks/all_categories').description.images
  assert [image.split('/')[-4] for image in images] == ['bolt', 'bolt', 'nut', 'nut']


def test_a_method_whose_models_are_not_kept_is_fitted_once(pristine, monkeypatch):
  fits = []
  fit = PaDiM.fit
  monkeypatch.setattr(PaDiM, 'fit', lambda *arguments, **more: fits.append(1) or fit(*arguments, **more))
  rows = evaluate(pristine, detector=PaDiM(num_dims=6), backbone=small.backbone(), preprocessing=SMALL,
                  batch_size=4, multi_class=True)
  assert len(rows) == 2 and len(fits) == 1


def test_points_of_a_sweep_with_and_without(pristine, tmp_path):
  config = plates.config(pristine, backbone__name='tests.small:backbone', backbone__weights='',
                         backbone__layers=(), coreset__ratios=(0.2,))
  config.sweep = ('data.multi_class=True', 'data.multi_class=False')
  sweep.run(config, tmp_path)
  numbers = {
      which: [row['num_train'] for row in plates.results(tmp_path / f'data.multi_class={which}')]
      for which in ('True', 'False')}
  assert numbers == {'True': ['12', '12'], 'False': ['6', '6']}


def test_the_command_has_it(pristine, tmp_path, capsys):
  with pytest.raises(SystemExit) as e:
    main(['evaluate', str(pristine), '--out', str(tmp_path / 'run'), '--multi-class', '--batch-size=4',
          '--backbone=tests.small:backbone', '--resize=64', '--crop=56', '--ratios=0.2'])
  assert e.value.code == 0 and (tmp_path / 'run/banks/all_categories').is_dir()


@pytest.mark.parametrize('detector, data, words', [
    (DETECTOR, {'noise': 0.5}, 'would be in the model of all'),
    (MuSc(), {}, 'data.multi_class=True: MuSc takes no training images')])
def test_what_cannot_be(pristine, detector, data, words):
  with pytest.raises(ValueError, match=words):
    settings = Settings(DataSpec(root=str(pristine), multi_class=True, **data), detector)
    experiment.Experiment(settings, pristine / 'none').check(())
