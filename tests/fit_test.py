"""From a folder of good images to a bank that answers, and what may go wrong on the way."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs import own
from experiments import bank as bank_binary
from experiments import fit, predict
from patchcore_jax import backbones, inspection
from patchcore_jax.backbones import simulation
from patchcore_jax.banks import calibration, editing, provenance, store
from patchcore_jax.banks.model import BankError
from patchcore_jax.data import folder, survey
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.preprocess import ImageError
from patchcore_jax.detectors import streaming
from patchcore_jax.inspection import differences
from patchcore_jax.serving.app import Options
from tests import plates, small
from tests.serve_test import ask, running


def _config(root, **overrides):
  config = own.get_config()
  config.update_from_flattened_dict(plates.fields(root, {}) | {
      'backbone.name': 'tests.small:backbone', 'backbone.weights': '', 'backbone.layers': (),
      'coreset.ratios': (0.2,)})
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return config


def other_network():
  backbone = small.backbone()
  return dataclasses.replace(backbone, variables={k: 2 * v for k, v in backbone.variables.items()})


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """12 good plates and nothing else."""
  root = tmp_path_factory.mktemp('good') / 'plates'
  rng = np.random.default_rng(0)
  for i in range(12):
    plates._draw(root / f'{i:02}.png', rng)
  return root


@pytest.fixture(scope='module')
def fitted(good, tmp_path_factory):
  out = tmp_path_factory.mktemp('banks') / 'plates'
  fit.run(_config(good, calibration__false_alarm_rate=0.1, calibration__folds=3), str(out))
  return out


@pytest.fixture(scope='module', params=['tensorfloat32', 'bfloat16'])
def made(request, good, tmp_path_factory):
  config = _config(good, backbone__name='resnet18_slim.procedural', backbone__precision=request.param,
                   calibration__folds=3, calibration__false_alarm_rate=0.1)
  out = tmp_path_factory.mktemp('rounded') / 'plates'
  fit.run(config, str(out))
  return inspection.load(out)


class TestFit:

  def test_the_bank_is_all_that_is_needed(self, fitted, pristine):
    inspector = inspection.load(fitted)
    assert inspector.image_size == (56, 56) and inspector.calibration.method == 'cross'
    test = folder.MVTEC.load_category(pristine, 'bolt').test
    batches = list(FileData(test, inspector.preprocessing, 4).batches())
    streamed = small.joined(inspection.predict(inspector, batches)).image
    labels = np.array([e.label for e in test])
    assert streamed[labels == 1].min() > streamed[labels == 0].max()
    score = inspection.scorer(inspector, 3)
    single = score(np.stack([batches[0].image[0]]))
    np.testing.assert_allclose(single.image, streamed[:1], rtol=1e-5)
    defect = int(np.argmax(labels))
    scores = score(batches[defect // 4].image[defect % 4][None])
    found = inspection.find(inspector, scores, 0, (60, 72))
    assert found.anomalous and found.calibrated_score > 0.5 and found.p_value == pytest.approx(1 / 13)
    mask = np.asarray(Image.open(test[defect].mask_paths[0])) > 0
    y, x = np.nonzero(mask)
    left, top, right, bottom = found.box
    assert left <= x.mean() < right and top <= y.mean() < bottom
    assert found.nearest.name == inspector.model.description.images[found.nearest.image]

  def test_provenance(self, fitted, good):
    bank = store.restore(fitted)
    assert bank.description.images == tuple(str(good / f'{i:02}.png') for i in range(12))
    origin = provenance.origin(bank, 0)
    assert origin.name == bank.description.images[origin.image]
    assert provenance.thumbnail(bank, origin.image).shape == (56, 56, 3)
    assert 'fitted on 12 images' in bank.description.history[0].what

  def test_thresholds_do_not_depend_on_the_batch_size(self, fitted, good, tmp_path):
    config = _config(good, calibration__folds=3, data__batch_size=5)
    again = fit.run(config, str(tmp_path / 'b'))
    before = store.restore(fitted).description.calibration
    np.testing.assert_allclose(
        again.description.calibration.image_scores, before.image_scores, rtol=1e-4)

  def test_no_image_meets_its_own_patches(self, good, tmp_path):
    """At ratio 1 every patch of a training image is in the bank, at distance 0."""
    config = _config(good, coreset__method='identity', calibration__folds=12)
    config.coreset.ratios = (1.0,)
    bank = fit.run(config, str(tmp_path / 'b'))
    assert min(bank.description.calibration.image_scores) > 1e-3

  def test_a_defect_among_the_good_is_named(self, good, pristine, tmp_path, capsys):
    root = tmp_path / 'mixed'
    shutil.copytree(good, root)
    shutil.copy(pristine / 'bolt/test/hole/001.png', root / 'zz.png')
    fit.run(_config(root, calibration__folds=13), str(tmp_path / 'b'))
    told = capsys.readouterr().out
    assert '1 training image looks unlike the others' in told and 'zz.png (score' in told
    assert 'were asked for, which takes 99 images; 13 can vouch for 7.1 %' in told

  def test_times_are_told_beforehand(self, good, tmp_path, capsys, monkeypatch):
    fit.run(_config(good, calibration__folds=2), str(tmp_path / 'short'))
    assert 'for the network' not in capsys.readouterr().out
    monkeypatch.setattr(fit, '_LONG', 0)
    fit.run(_config(good, calibration__folds=2), str(tmp_path / 'a'))
    told = capsys.readouterr().out
    assert told.index('about 0:00:0') < told.index('for the network') < told.index('for the thresholds')
    fit.run(_config(good, calibration__folds=0), str(tmp_path / 'b'))
    assert 'for the thresholds' not in capsys.readouterr().out

  def test_unreadable_and_odd_files_are_told(self, good, tmp_path, capsys):
    root = tmp_path / 'odd'
    shutil.copytree(good, root)
    (root / 'empty.png').write_bytes(b'')
    (root / 'text.png').write_text('not an image')
    Image.new('L', (300, 40), 128).save(root / 'flat.jpg')
    shutil.copy(root / '00.png', root / 'copy.png')
    bank = fit.run(_config(root, calibration__folds=0), str(tmp_path / 'b'))
    told = capsys.readouterr().out
    assert bank.description.num_images == 14 and bank.description.num_skipped == 2
    assert 'equal files' in told and 'copy.png' in told
    assert 'skipped: Cannot read' in told and 'empty.png' in told and 'text.png' in told
    assert bank.description.calibration is None

  @pytest.mark.parametrize('overrides, message', [
      ({'data__source': 'folder'}, 'experiments.mvtec'), ({'detector': 'nothing'}, "detector='nothing'"),
      ({'coreset__ratios': (0.2, 0.1)}, 'a bank has one ratio'),
      ({'calibration__folds': 1}, 'folds=1'), ({'calibration__false_alarm_rate': 2.0}, 'share between')])
  def test_bad_settings(self, good, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
      fit.run(_config(good, **overrides), str(tmp_path / 'b'))
    assert not (tmp_path / 'b').exists()

  def test_bad_places(self, good, fitted, tmp_path):
    with pytest.raises(ValueError, match='is not overwritten'):
      fit.run(_config(good), str(fitted))
    with pytest.raises(ValueError, match='does not exist'):
      fit.run(_config(tmp_path / 'nowhere'), str(tmp_path / 'b'))
    (tmp_path / 'none').mkdir()
    with pytest.raises(ValueError, match='No images in'):
      fit.run(_config(tmp_path / 'none'), str(tmp_path / 'b'))
    with pytest.raises(ValueError, match='matches no image'):
      fit.run(_config(tmp_path / '*.png'), str(tmp_path / 'b'))


class TestOtherDevices:
  """A bank that is used where the network is computed otherwise."""

  def test_the_thresholds_carry_the_difference(self, made):
    found = made.calibration
    plain = calibration.calibrate(found.image_scores, found.map_maxima, false_alarm_rate=0.1)
    assert found.image_allowance > 0 and found.pixel_allowance > 0
    assert found.image_threshold == plain.image_threshold + found.image_allowance
    assert found.pixel_threshold == plain.pixel_threshold + found.pixel_allowance
    # bfloat16's 8 bits; tensorfloat32 has 11.
    most = {'tensorfloat32': 0.01, 'bfloat16': 0.08}[made.backbones[0].precision]
    assert most / 1000 < found.image_allowance / plain.image_threshold < most

  def test_it_is_the_difference_of_a_sample(self, made):
    bank, (network,) = made.model, made.backbones
    sample, others = differences.sample_of(bank, needed=9)
    assert len(sample) == 6 and len(others.arrays['embeddings']) > 0
    origins = {provenance.origin(bank, i).image for i in range(len(bank.arrays['indices']))}
    assert {int(i) // 196 for i in others.arrays['indices']} == origins - set(sample.tolist())
    data = FileData([
        folder.Example(bank.description.images[i], (), 0, '', 'good') for i in sample], made.preprocessing, 4)

    def scores(network):
      score_fn = made.detector.score_fn(others, (network,))
      return small.joined(streaming.predict(score_fn, data.batches())).image

    there = backbones.create('resnet18_slim.procedural', precision='float32').apply
    if jax.default_backend() == 'cpu' and made.backbones[0].precision == 'tensorfloat32':
      there = simulation.on_gpu(network.apply)
    off = np.abs(scores(dataclasses.replace(network, apply=there)) - scores(network))
    images, maxima = differences.score_differences(made.detector, others, data, made.backbones)
    np.testing.assert_allclose(images, off, rtol=1e-3)
    assert images.max() == pytest.approx(made.calibration.image_allowance, rel=1e-3)
    assert maxima.max() == pytest.approx(made.calibration.pixel_allowance, rel=1e-3)

  def test_what_a_bank_says(self, made):
    description = made.model.description
    assert description.device == jax.default_backend()
    assert description.backbones[0].precision == made.backbones[0].precision != 'auto'

  def test_in_float32_nothing_is_computed(self, good, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(differences, 'sample_of', None)
    config = _config(good, backbone__name='resnet18_slim.procedural', calibration__folds=2)
    if jax.default_backend() != 'cpu':
      config.backbone.precision = 'float32'  # there it is not what 'auto' stands for
    bank = fit.run(config, str(tmp_path / 'b'))
    assert bank.description.backbones[0].precision == 'float32'
    assert bank.description.calibration.image_allowance == 0
    told = capsys.readouterr().out
    assert 'precision float32' in told and 'another kind of device' not in told

  def test_it_is_said_and_so_is_that_it_is_much(self):
    scores = [1.0, 1.1, 1.2, 2.0]
    few, many = (calibration.calibrate(scores, scores, false_alarm_rate=0.2, allowances=(a, a))
                 for a in (0.05, 0.1))
    assert not calibration.allows_much(few) and calibration.allows_much(many)
    told, more = (' '.join(fit.verdict(c, list('abcd'))) for c in (few, many))
    assert 'off by up to 0.05, which is 2.4 % of the threshold' in told and 'precision=float32' not in told
    assert 'off by up to 0.1' in more and '--config.backbone.precision=float32' in more

  def test_changes_of_the_bank_keep_it(self, made):
    bank = made.model
    found = editing.drop(bank, [bank.description.images[0]]).description.calibration
    assert found.image_allowance == made.calibration.image_allowance
    assert found.image_threshold - found.image_allowance < max(found.image_scores) * 1.001
    other = bank.with_description(calibration=dataclasses.replace(made.calibration, image_allowance=7.0))
    assert editing.merge(bank, other).description.calibration.image_allowance == 7


class TestInspection:

  def test_another_size(self, fitted):
    score = inspection.scorer(inspection.load(fitted), 1)
    with pytest.raises(ImageError, match='64 x 48 pixels after resizing and cropping.* 56 x 56'):
      score(np.zeros((1, 48, 64, 3), np.uint8))

  def test_other_weights(self, fitted):
    with pytest.raises(BankError, match='other_network here are .* expected the same'):
      inspection.load(fitted, name='tests.fit_test:other_network')

  def test_a_bank_that_does_not_say_how(self, fitted):
    model = store.restore(fitted)
    (network,) = model.description.backbones
    bare = model.with_description(backbones=(dataclasses.replace(network, source=None),))
    with pytest.raises(BankError, match='does not say how its network .* is made'):
      inspection.of_model(bare)


class TestDamage:

  @pytest.fixture
  def copy(self, fitted, tmp_path):
    return shutil.copytree(fitted, tmp_path / 'copy')

  def _edit(self, path, change):
    file = path / 'description/metadata'
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))

  def test_tampered_threshold(self, copy):
    self._edit(copy, lambda v: v['description']['calibration'].update(image_threshold=1e9))
    with pytest.raises(BankError, match='not what was saved'):
      store.restore(copy)

  def test_newer_format(self, copy):
    self._edit(copy, lambda v: v.update(format=store.FORMAT + 1))
    with pytest.raises(BankError, match='made by a newer one. Upgrade'):
      store.restore(copy)

  def test_older_format_has_no_digest(self, copy):
    self._edit(copy, lambda v: (v.pop('format'), v.pop('digest')))
    assert len(store.restore(copy).arrays['embeddings'])

  def test_truncated(self, copy):
    largest = max((p for p in copy.rglob('*') if p.is_file()), key=os.path.getsize)
    largest.write_bytes(largest.read_bytes()[:os.path.getsize(largest) // 2])
    with pytest.raises(BankError):
      store.restore(copy)

  def test_one_byte(self, copy):
    largest = max((p for p in copy.rglob('*') if p.is_file()), key=os.path.getsize)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(BankError):
      store.restore(copy)


class TestReplace:

  def test_old_or_new_but_whole(self, fitted, tmp_path, monkeypatch):
    path = tmp_path / 'bank'
    shutil.copytree(fitted, path)
    bank = store.restore(path).with_description(category='changed')

    def killed(*_):
      raise KeyboardInterrupt

    # After the old one has made way.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(store.shutil, 'rmtree', lambda *a, **k: None)
      rename = type(path).rename
      patch.setattr(
          type(path), 'rename', lambda s, t: killed() if s.name.endswith('.after') else rename(s, t))
      store.replace(path, bank)
    assert not path.exists()
    assert store.restore(path).description.category == 'plates'
    store.replace(path, bank)
    assert store.restore(path).description.category == 'changed'
    assert [p.name for p in tmp_path.iterdir()] == ['bank']


def _bank(action, **values):
  """What `python -m experiments.bank ACTION` does."""
  names = ('bank', 'out', 'other', 'images', 'share', 'false_alarm_rate', 'batch_size')
  flags.FLAGS.unparse_flags()
  flags.FLAGS(['bank', *(f'--{k}={v}' for k, v in values.items())])
  try:
    bank_binary.main(['bank', action])
  finally:
    for name in names:
      flags.FLAGS[name].unparse()


class TestBankBinary:

  def test_all_actions(self, fitted, good, tmp_path, capsys):
    path = tmp_path / 'bank'
    shutil.copytree(fitted, path)
    more = tmp_path / 'more'
    rng = np.random.default_rng(5)
    for i in range(3):
      plates._draw(more / f'new{i}.png', rng)
    _bank('append', bank=path, images=more, batch_size=2)
    _bank('drop', bank=path, images='new1.png,00.png')
    _bank('merge', bank=path, other=fitted, out=tmp_path / 'both')
    _bank('shrink', bank=path, share=0.05)
    assert store.restore(path).description.calibration is None
    _bank('calibrate', bank=path, images=good, false_alarm_rate=0.2)
    _bank('info', bank=path)
    told = capsys.readouterr().out
    for said in ('appended 3 images', 'dropped', 'merged with', 'shrunk from', 'Its thresholds are gone',
                 '11 images have the name of a training image', 'patches of ', 'new2.png', 'held out'):
      assert said in told, said
    assert store.restore(tmp_path / 'both').description.num_images == 25

  def test_errors(self, fitted):
    with pytest.raises(ValueError, match='--images is missing for append'):
      _bank('append', bank=fitted)
    with pytest.raises(ValueError, match='--share is not for info'):
      _bank('info', bank=fitted, share=0.1)
    with pytest.raises(ValueError, match='Expected one of info, append'):
      _bank('explode', bank=fitted)


@pytest.fixture(scope='module', params=['mahalanobis_ad', 'ocsvm', 'padim', 'spade'])
def other(request, good, tmp_path_factory):
  """A model of a method without a bank."""
  out = tmp_path_factory.mktemp('others') / request.param
  fit.run(_config(good, detector=request.param, padim__num_dims=8, spade__num_images=3, calibration__folds=3,
                  calibration__false_alarm_rate=0.1), str(out))
  return out


class TestOtherMethods:
  """They go through the same doors: images in, answers out; what they do not know is said."""

  def test_predict(self, other, good, pristine, tmp_path, capsys):
    images, out = tmp_path / 'images', tmp_path / 'out'
    has_maps, has_patch = other.name in ('padim', 'spade'), other.name == 'padim'
    images.mkdir()
    shutil.copy(good / '03.png', images / 'good.png')
    shutil.copy(pristine / 'bolt/test/hole/001.png', images / 'hole.png')
    summary = predict.run(predict.Options(str(other), str(images), str(out), why=True))
    assert (summary.images, summary.failed) == (2, 0)
    told, title = capsys.readouterr().out, inspection.load(other).detector.title
    assert (f'{title} scores whole images: there are no heatmaps' in told) == (not has_maps)
    assert (f'{title} does not tell why' in told) == (not has_patch)
    assert {p.name for p in out.iterdir()} == {'predictions.csv', 'predictions.jsonl', 'report.html'} | (
        {'overlays', 'maps'} if has_maps else set()) | ({'why'} if has_patch else set())
    rows = [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]
    assert rows[0]['score'] < rows[1]['score'] and rows[0]['decision'] == 'good'
    for row in rows:
      for field in ('box', 'centroid', 'overlay', 'map'):
        assert (row[field] is None) == (not has_maps), field
      for field in ('patch', 'patch_box', 'why'):
        assert (row[field] is None) == (not has_patch), field
      assert row['nearest'] is row['nearest_box'] is None
      alarms = row['score'] >= row['threshold']
      assert (row['calibrated_score'] >= 0.5) == alarms == (row['decision'] == 'anomalous')

  def test_serve(self, other, pristine):
    inspector, body = inspection.load(other), (pristine / 'bolt/test/hole/001.png').read_bytes()
    with running(inspector, Options(batch_size=1)) as address:
      status, _, answer = ask(address, '/inspect?map=png&why=png', body)
      about = ask(address, '/bank')[2]
    has_maps = other.name in ('padim', 'spade')
    assert status == 200 and answer['why']['nearest'] is None
    assert ('map' in answer) == has_maps and bool(answer['why']['patch']) == (other.name == 'padim')
    assert about['detector'] == other.name and about['patches'] == 0
    assert (about['pixel_threshold'] is None) == (not has_maps)
    assert answer['threshold'] == about['threshold'] == inspector.calibration.image_threshold

  def test_bank(self, other, good, tmp_path, capsys):
    path = shutil.copytree(other, tmp_path / 'model')
    _bank('calibrate', bank=path, images=good, false_alarm_rate=0.2)
    _bank('info', bank=path)
    told, name = capsys.readouterr().out, other.name
    assert f'{name}, ' in told and '(held out): at most' in told and '11.png' in told
    assert (' for pixels' in told) == (name in ('padim', 'spade'))
    before = store.restore(path).description
    for action, values in (('append', {'images': good}), ('merge', {'other': path}),
                           ('drop', {'images': '03.png'}), ('shrink', {'share': 0.1})):
      with pytest.raises(BankError, match=f'A model of {name} has no rows') as error:
        _bank(action, bank=path, **values)
      assert '\n' not in str(error.value) and store.restore(path).description == before

  def test_scores_of_good_images_may_be_negative(self, other):
    """The boundary of an OCSVM is at 0, and what lies inside is below."""
    found = store.restore(other).description.calibration
    assert (min(found.image_scores) < 0) == (other.name == 'ocsvm')
    limit = found.image_threshold
    values = [calibration.calibrated_score(found, limit + d) for d in (-0.1 * limit, 0, 0.1 * limit)]
    assert values[1] == 0.5 and (np.diff(values) > 0).all()

  def test_several_networks(self, good, pristine, tmp_path):
    path, names = tmp_path / 'model', 'tests.small:backbone+tests.fit_test:other_network'
    fit.run(_config(good, backbone__name=names, coreset__method='random', calibration__folds=2), str(path))
    inspector = inspection.load(path)
    assert len(inspector.backbones) == 2 and inspector.detector.name == 'ensemble'
    images = str(pristine / 'bolt/test/hole/001.png')
    assert predict.run(predict.Options(str(path), images, str(tmp_path / 'out')))[:3] == (1, 1, 0)
    with pytest.raises(BankError, match='A model of ensemble has no rows'):
      _bank('append', bank=path, images=good)


class TestSurvey:

  def test_counts(self, tmp_path):
    for i in range(30):
      Image.new('RGB', (40, 30), (i, 0, 0)).save(tmp_path / f'{i:02}.png')
    Image.new('L', (40, 30)).save(tmp_path / 'gray.png')
    Image.new('RGB', (41, 30)).save(tmp_path / 'wide.png')
    (tmp_path / 'bad.png').write_bytes(b'?')
    shutil.copy(tmp_path / '03.png', tmp_path / 'twin.png')
    found = survey.survey(folder.find_images(tmp_path))
    assert found.sizes == {(40, 30): 32, (41, 30): 1} and found.modes == {'RGB': 32, 'L': 1}
    assert [(os.path.basename(p), why) for p, why in found.odd] == [
        ('gray.png', 'mode L'), ('wide.png', '41 x 30 pixels')]
    assert [[os.path.basename(p) for p in g] for g in found.duplicates] == [['03.png', 'twin.png']]
    assert [os.path.basename(p) for p, _ in found.unreadable] == ['bad.png']


class TestFindImages:

  def test_where_they_are_looked_for(self, tmp_path):
    for name in ('a/train/good/1.png', 'b/good/2.jpg', 'c/3.bmp', 'c/train/good/4.png'):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).touch()
    names = {k: [os.path.basename(p) for p in folder.find_images(tmp_path / k)] for k in 'abc'}
    assert names == {'a': ['1.png'], 'b': ['2.jpg'], 'c': ['3.bmp']}
    assert len(folder.find_images(str(tmp_path / '**/*.png'))) == 2
    assert folder.find_images(tmp_path / 'c/3.bmp') == [str(tmp_path / 'c/3.bmp')]
