"""Follows a folder of good images to a bank that answers, and what may go wrong on the way."""

import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from patchcore_jax import backbones, inspection
from patchcore_jax.backbones import simulation
from patchcore_jax.banks import calibration, editing, provenance, store
from patchcore_jax.banks.model import BankError
from patchcore_jax.cli import fit
from patchcore_jax.data import folder, image_finding, survey
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.detectors import streaming, trained
from patchcore_jax.detectors.patchcore import fit_time
from patchcore_jax.inspection import differences
from patchcore_jax.learned import loop
from patchcore_jax.serving.app import Options
from tests import command, plates, small
from tests.serve_test import ask, running


def _fit(good, out, **values):
  """What `patchcore fit GOOD --out OUT` makes and says, with the values of flags."""
  told = command.done('fit', good, '--out', out, *command.flags(**values))
  return store.restore(out), told


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
  _fit(good, out, false_alarm_rate=0.1, folds=3)
  return out


@pytest.fixture(scope='module', params=['tensorfloat32', 'bfloat16'])
def made(request, good, tmp_path_factory):
  out = tmp_path_factory.mktemp('rounded') / 'plates'
  _fit(good, out, backbone='resnet18_slim.procedural', precision=request.param, folds=3, false_alarm_rate=0.1)
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
    again, _ = _fit(good, tmp_path / 'b', folds=3, batch_size=5)
    before = store.restore(fitted).description.calibration
    np.testing.assert_allclose(
        again.description.calibration.image_scores, before.image_scores, rtol=1e-4)

  def test_no_image_meets_its_own_patches(self, good, tmp_path):
    """At ratio 1 every patch of a training image is in the bank, at distance 0."""
    bank, _ = _fit(good, tmp_path / 'b', coreset_method='identity', ratio=1, folds=12)
    assert min(bank.description.calibration.image_scores) > 1e-3

  def test_a_defect_among_the_good_is_named(self, good, pristine, tmp_path):
    root = tmp_path / 'mixed'
    shutil.copytree(good, root)
    shutil.copy(pristine / 'bolt/test/hole/001.png', root / 'zz.png')
    _, told = _fit(root, tmp_path / 'b', folds=13)
    assert '1 training image looks unlike the others' in told and 'zz.png (score' in told
    without, found = (
        float(re.search(pattern, told)[1]) for pattern in (r'would be ([\d.]+):', r'threshold ([\d.]+) for'))
    assert without < found
    assert 'were asked for, which takes 99 images; 13 can vouch for 7.1 %' in told

  def test_times_are_told_beforehand(self, good, tmp_path, monkeypatch):
    _, told = _fit(good, tmp_path / 'short', folds=2)
    assert 'from here' not in told
    monkeypatch.setattr(fit_time, '_LONG', 0)
    _, told = _fit(good, tmp_path / 'a', folds=2)
    line = next(line for line in told.splitlines() if 'from here' in line)
    assert line.startswith('bank: about ') and 'selection' in line and 'thresholds' in line
    assert told.index('patches; about') < told.index('from here') < told.index('coreset')
    _, told = _fit(good, tmp_path / 'b', folds=0)
    assert 'from here: ' in told and ', thresholds' not in told

  def test_other_methods_tell_the_time_of_the_network(self, good, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, '_LONG', 0)
    told = command.done(
        'fit', good, '--out', tmp_path / 'a', '--backbone=tests.small:backbone', '--detector=padim',
        '--padim-num-dims=10', '--folds=2', '--batch-size=4')
    assert 'from here, or more: network 0 s, thresholds' in told

  def test_unreadable_and_odd_files_are_told(self, good, tmp_path):
    root = tmp_path / 'odd'
    shutil.copytree(good, root)
    (root / 'empty.png').write_bytes(b'')
    (root / 'text.png').write_text('not an image')
    Image.new('L', (300, 40), 128).save(root / 'flat.jpg')
    shutil.copy(root / '00.png', root / 'copy.png')
    asked = command.run('fit', root, '--out', tmp_path / 'b', *command.flags(folds=0))
    assert asked.code == 1 and '300 x 40 pixels, and the others are about 72 x 60' in asked.err
    assert '--accept flat.jpg' in asked.err and not (tmp_path / 'b').exists()
    bank, told = _fit(root, tmp_path / 'b', folds=0, accept='flat.jpg')
    assert bank.description.num_images == 14 and bank.description.num_skipped == 2
    assert 'equal files' in told and 'copy.png' in told
    assert f'cannot be read: 2 more ({root / "empty.png"}, ' in asked.out
    assert 'skipped: Cannot read' in told and 'empty.png' in told and 'text.png' in told
    assert '14 of 16 images were used, 2 could not be read' in told
    assert bank.description.calibration is None
    refused = command.refused(
        'fit', root, '--out', tmp_path / 'c', *command.flags(on_error='raise', accept='all'))
    assert 'Cannot read' in refused and not (tmp_path / 'c').exists()

  def test_a_folder_of_unreadable_files_names_them(self, fitted, tmp_path):
    bad = tmp_path / 'bad'
    bad.mkdir()
    for name in ('one.png', 'two.jpg'):
      (bad / name).write_text('not an image')
    for arguments in (('fit', bad, '--out', tmp_path / 'b', *command.flags()),
                      ('bank', 'append', fitted, bad, '--out', tmp_path / 'b')):
      code, out, err = command.run(*arguments)
      assert code == 1 and 'none could be read' in err and err.count('\n') == 1
      assert 'one.png' in out and 'two.jpg' in out and not (tmp_path / 'b').exists()

  @pytest.mark.parametrize('values, message', [
      ({'detector': 'nothing'}, "detector='nothing'"), ({'ratio': '0.2,0.1'}, 'expected a number'),
      ({'ratio': 2}, 'ratio 2.0'), ({'folds': 1}, 'folds=1'), ({'false_alarm_rate': 2.0}, 'share between'),
      ({'backbone': 'resnet81'}, 'resnet18')])
  def test_bad_settings(self, good, tmp_path, values, message):
    told = command.refused('fit', good, '--out', tmp_path / 'b', *command.flags(**values))
    assert message in told and not (tmp_path / 'b').exists()

  def test_bad_places(self, good, fitted, tmp_path):
    (tmp_path / 'none').mkdir()
    for where, out, message in (
        (good, fitted, 'is not overwritten'), (tmp_path / 'nowhere', tmp_path / 'b', 'does not exist'),
        (tmp_path / 'none', tmp_path / 'b', 'No images in'), (tmp_path / '*.png', tmp_path / 'b',
                                                              'matches no image')):
      assert message in command.refused('fit', where, '--out', out, *command.flags())
    (tmp_path / 'a.zip').write_text('not an image')
    assert 'is not a known image' in command.refused('fit', tmp_path / 'a.zip', '--out', tmp_path / 'b')
    code, out, err = command.run('fit', good, '--out', tmp_path / 'a.zip' / 'b', *command.flags())
    assert code == 1 and 'There is a file where a folder is to be' in err and 'coreset' not in out
    assert not (tmp_path / 'b').exists()


@pytest.mark.slow_for('tensorfloat32')
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

  def test_in_float32_nothing_is_computed(self, good, tmp_path, monkeypatch):
    monkeypatch.setattr(differences, 'sample_of', None)
    # On accelerators it is not what 'auto' stands for.
    precision = 'auto' if jax.default_backend() == 'cpu' else 'float32'
    bank, told = _fit(good, tmp_path / 'b', backbone='resnet18_slim.procedural', precision=precision, folds=2)
    assert bank.description.backbones[0].precision == 'float32'
    assert bank.description.calibration.image_allowance == 0
    assert 'precision float32' in told and 'another kind of device' not in told

  def test_it_is_said_and_so_is_that_it_is_much(self):
    scores = [1.0, 1.1, 1.2, 2.0]
    few, many = (calibration.calibrate(scores, scores, false_alarm_rate=0.2, allowances=(a, a))
                 for a in (0.05, 0.1))
    assert not calibration.allows_much(few) and calibration.allows_much(many)
    told, more = (' '.join(fit.verdict(c, list('abcd'))) for c in (few, many))
    assert 'off by up to 0.05, which is 2.4 % of the threshold' in told and '--precision float32' not in told
    assert 'off by up to 0.1' in more and '--precision float32' in more

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


class TestBank:

  def test_all_actions(self, fitted, good, tmp_path):
    path = tmp_path / 'bank'
    shutil.copytree(fitted, path)
    more = tmp_path / 'more'
    rng = np.random.default_rng(5)
    for i in range(3):
      plates._draw(more / f'new{i}.png', rng)
    (more / 'bad.png').write_text('not an image')
    told = command.done('bank', 'append', path, more, '--batch-size=2')
    assert 'appended 3 images' in told and 'skipped: Cannot read' in told and 'bad.png' in told
    assert 'dropped' in command.done('bank', 'drop', path, 'new1.png', '00.png')
    before = store.restore(path).description
    assert 'merged with' in command.done('bank', 'merge', path, fitted, '--out', tmp_path / 'both')
    assert store.restore(tmp_path / 'both').description.num_images == 25
    assert store.restore(path).description == before  # --out leaves it alone
    told = command.done('bank', 'shrink', path, '--ratio=0.05')
    assert 'shrunk from' in told and 'Its thresholds are gone' in told
    assert store.restore(path).description.calibration is None
    told = command.done('bank', 'calibrate', path, good, '--false-alarm-rate=0.05')
    assert '11 images have the name of a training image' in told
    assert '5 % were asked for, which takes 19 images; 12 can vouch for 7.7 %' in told
    told = command.done('bank', 'info', path)
    for said in ('patches of ', 'new2.png', 'held out', 'appended 3 images', 'shrunk from'):
      assert said in told, said

  def test_mistakes(self, fitted, tmp_path):
    for arguments, message in (
        (('append', fitted), "Missing argument 'IMAGES'"), (('drop', fitted), "Missing argument 'NAMES...'"),
        (('info', fitted, '--ratio=0.1'), '--ratio'), (('shrink', fitted), "Missing option '--ratio'"),
        (('explode', fitted), "no command 'explode'. There are info, append"),
        (('apend', fitted), "did you mean 'append'"),
        (('drop', fitted, '77.png'), '77.png'), (('merge', fitted, tmp_path), str(tmp_path)),
        (('info', tmp_path / 'none'), 'none'),
        (('drop', fitted, '00.png', '--out', tmp_path), 'is not overwritten'),
        (('append', fitted, tmp_path / 'nowhere'), 'does not exist'),
        (('append', fitted, tmp_path), 'No images in')):
      assert message in command.refused('bank', *arguments)


@pytest.fixture(scope='module', params=['mahalanobis_ad', 'ocsvm', 'padim', 'spade'])
def other(request, good, tmp_path_factory):
  """A model of a method without a bank."""
  out = tmp_path_factory.mktemp('others') / request.param
  own = {'padim': {'padim_num_dims': 8}, 'spade': {'spade_num_images': 3}}.get(request.param, {})
  of_patchcore = dict.fromkeys(('embedding_kind', 'ratio', 'coreset_projection_dim'))
  _fit(good, out, detector=request.param, folds=3, false_alarm_rate=0.1, **of_patchcore, **own)
  return out


class TestOtherMethods:
  """They go through the same doors: images in, answers out; what they do not know is said."""

  def test_predict(self, other, good, pristine, tmp_path):
    images, out = tmp_path / 'images', tmp_path / 'out'
    has_maps, has_patch = other.name in ('padim', 'spade'), other.name == 'padim'
    images.mkdir()
    shutil.copy(good / '03.png', images / 'good.png')
    shutil.copy(pristine / 'bolt/test/hole/001.png', images / 'hole.png')
    told = command.done('predict', other, images, '--out', out, '--why')
    title = inspection.load(other).detector.title
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

  def test_bank(self, other, good, tmp_path):
    path = shutil.copytree(other, tmp_path / 'model')
    command.done('bank', 'calibrate', path, good, '--false-alarm-rate=0.2')
    told, name = command.done('bank', 'info', path), other.name
    assert f'{name}, ' in told and '(held out): at most' in told and '11.png' in told
    assert (' for pixels' in told) == (name in ('padim', 'spade'))
    before = store.restore(path).description
    for action, argument in (
        ('append', good), ('merge', path), ('drop', '03.png'), ('shrink', '--ratio=0.1')):
      refused = command.refused('bank', action, path, argument)
      assert f'A model of {name} has no rows' in refused and store.restore(path).description == before

  def test_scores_of_good_images_may_be_negative(self, other):
    """The boundary of an OCSVM is at 0, and what lies inside is below."""
    found = store.restore(other).description.calibration
    assert (min(found.image_scores) < 0) == (other.name == 'ocsvm')
    limit = found.image_threshold
    values = [calibration.calibrated_score(found, limit + d) for d in (-0.1 * limit, 0, 0.1 * limit)]
    assert values[1] == 0.5 and (np.diff(values) > 0).all()

  def test_several_networks(self, good, pristine, tmp_path):
    path, names = tmp_path / 'model', 'tests.small:backbone+tests.fit_test:other_network'
    _fit(good, path, backbone=names, coreset_method='random', folds=2)
    inspector = inspection.load(path)
    assert len(inspector.backbones) == 2 and inspector.detector.name == 'ensemble'
    images = pristine / 'bolt/test/hole/001.png'
    command.done('predict', path, images, '--out', tmp_path / 'out')
    (row,) = (tmp_path / 'out/predictions.jsonl').read_text().splitlines()
    assert json.loads(row)['decision'] == 'anomalous'
    assert 'A model of ensemble has no rows' in command.refused('bank', 'append', path, good)


class TestSurvey:

  def test_counts(self, tmp_path):
    for i in range(30):
      Image.new('RGB', (40, 30), (i, 0, 0)).save(tmp_path / f'{i:02}.png')
    Image.new('L', (40, 30)).save(tmp_path / 'gray.png')
    Image.new('RGB', (41, 30)).save(tmp_path / 'wide.png')
    (tmp_path / 'bad.png').write_bytes(b'?')
    shutil.copy(tmp_path / '03.png', tmp_path / 'twin.png')
    found = survey.survey(image_finding.find_images(tmp_path))
    assert found.sizes == {(40, 30): 32, (41, 30): 1} and found.modes == {'RGB': 32, 'L': 1}
    assert [(os.path.basename(p), why) for p, why in found.odd] == [
        ('gray.png', 'mode L'), ('wide.png', '41 x 30 pixels')]
    assert [[os.path.basename(p) for p in g] for g in found.duplicates] == [['03.png', 'twin.png']]
    assert [os.path.basename(p) for p, _ in found.unreadable] == ['bad.png']


class TestTraining:

  FLAGS = ('--detector', 'dsebm', '--dsebm-size', 16, '--dsebm-batch-size', 4, '--dsebm-filters', 2,
           '--dsebm-hidden', 4, '--dsebm-steps', 6, '--folds', 2, '--false-alarm-rate', 0.1, '--resize', 64)

  def test_interrupted_it_goes_on_where_its_state_was_kept(self, good, tmp_path, monkeypatch):
    out, save = tmp_path / 'bank', loop.Checkpoints.save

    def interrupted(before, after):
      def saved(*arguments):
        if before:
          raise KeyboardInterrupt
        save(*arguments)
        if after:
          raise KeyboardInterrupt
      return saved

    for before, after, words in (
        (True, False, 'starts anew'), (False, True, 'goes on where the training was')):
      with monkeypatch.context() as patch:
        patch.setattr(trained, '_SAVE_EVERY', 0.0)
        patch.setattr(loop.Checkpoints, 'save', interrupted(before, after))
        result = command.run('fit', good, '--out', out, *self.FLAGS)
      assert result.code == 130 and words in result.err and not out.exists()
    told = command.done('fit', good, '--out', out, *self.FLAGS)
    assert 'training goes on after step 1 of 6' in told
    assert [path.name for path in tmp_path.iterdir()] == ['bank']  # the state is gone
    command.done('fit', good, '--out', tmp_path / 'whole', *self.FLAGS)
    whole, resumed = store.restore(tmp_path / 'whole'), store.restore(out)
    assert whole.arrays.keys() == resumed.arrays.keys()
    for name, array in whole.arrays.items():
      np.testing.assert_array_equal(resumed.arrays[name], array, err_msg=name)
