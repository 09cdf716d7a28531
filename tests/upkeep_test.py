"""Images and banks that do not look good are asked about before a model learns of them."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

import patchcore_jax as pc
from patchcore_jax.banks import editing, provenance, store
from patchcore_jax.inspection import acceptance, upkeep
from patchcore_jax.inspection.acceptance import NotAccepted, Questioned
from patchcore_jax.report import questioned
from tests import command, small

_SIDE = 64


def _part(seed, *, defect=False, gain=1.0):
  """A gray field with noise and a bright square; a defective one has a black spot."""
  rng = np.random.default_rng(seed)
  image = rng.integers(90, 110, (_SIDE, _SIDE, 3)).astype(float)
  image[20:44, 20:44] += 60
  if defect:
    image[28:36, 28:36] = 0
  return (image * gain).clip(0, 255).astype(np.uint8)


def _strange(number):
  return [np.random.default_rng(i).integers(0, 255, (_SIDE, _SIDE, 3), np.uint8) for i in range(number)]


def _write(folder, images):
  folder.mkdir(parents=True)
  for name, image in images.items():
    Image.fromarray(image).save(folder / name)
  return folder


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Folders of images; `mixed` has one defect among three good parts, `lot` is brighter than the training."""
  root = tmp_path_factory.mktemp('line')
  _write(root / 'train', {f'{i}.png': _part(i) for i in range(10)})
  good = {f'g{i}.png': _part(100 + i) for i in range(3)}
  _write(root / 'mixed', good | {'oops.png': _part(200, defect=True)})
  _write(root / 'lot', {f'v{i}.png': _part(300 + i, gain=1.4) for i in range(6)})
  _write(root / 'new', {f'defect{i}.png': _part(400 + i, defect=True) for i in range(3)} | {
      f'variant{i}.png': _part(510 + i, gain=1.4) for i in range(3)})
  return root


@pytest.fixture(scope='module')
def inspector(root):
  """Its threshold has room: what is asked about does not hang on the luck of ten images."""
  found = pc.fit(root / 'train', backbone=small.backbone(), detector=pc.PatchCore(
      0.3, pc.EmbeddingSpec('mean')), preprocessing=pc.Preprocessing(resize=(_SIDE, _SIDE), crop=()))
  known = found.calibration
  return found.with_model(found.model.with_description(calibration=dataclasses.replace(
      known, image_threshold=1.5 * known.image_threshold)))


def _asked(change, *arguments, **more):
  with pytest.raises(NotAccepted) as refused:
    change(*arguments, **more)
  return [image.name.rpartition('/')[2] for image in refused.value.images]


class TestAppendAndCalibrate:

  @pytest.mark.parametrize('change', ['append', 'calibrate'])
  def test_only_the_defective_one_is_asked_about(self, change, inspector, root):
    with pytest.raises(NotAccepted) as refused:
      getattr(inspector, change)(root / 'mixed')
    (asked,) = refused.value.images
    assert asked.name == str(root / 'mixed/oops.png')
    assert asked.score == pytest.approx(inspector.inspect(root / 'mixed/oops.png').score, rel=1e-4)
    assert asked.score > inspector.calibration.image_threshold
    assert asked.nearest == inspector.inspect(root / 'mixed/oops.png').nearest.name
    assert '--accept oops.png' in str(refused.value)

  @pytest.mark.slow_for('calibrate')
  @pytest.mark.parametrize('change', ['append', 'calibrate'])
  @pytest.mark.parametrize('accept', ['oops.png', ['mixed/oops.png'], 'all'])
  def test_accepted_it_counts(self, change, accept, inspector, root):
    after = getattr(inspector, change)(root / 'mixed', accept=accept)
    assert after.calibration.image_threshold > inspector.calibration.image_threshold
    assert not after.inspect(root / 'mixed/oops.png').anomalous

  @pytest.mark.slow_for('calibrate')
  @pytest.mark.parametrize('change', ['append', 'calibrate'])
  def test_good_ones_are_not_asked_about(self, change, inspector, root):
    images = [root / f'mixed/g{i}.png' for i in range(3)]
    after = getattr(inspector, change)(images)
    number = len(inspector.calibration.image_scores) if change == 'append' else 0
    assert len(after.calibration.image_scores) == number + 3

  @pytest.mark.slow_for('calibrate')
  @pytest.mark.parametrize('change', ['append', 'calibrate'])
  def test_of_an_array_they_have_numbers(self, change, inspector):
    images = np.stack([_part(100), _part(200, defect=True), _part(101)])
    assert _asked(getattr(inspector, change), images) == ['images[1]']
    getattr(inspector, change)(images, accept='images[1]')

  @pytest.mark.slow
  def test_a_new_lot_is_scored_as_its_later_images_will_be(self, inspector, root):
    names = [f'v{i}.png' for i in range(6)]
    assert set(_asked(inspector.append, root / 'lot')) == set(names)
    assert _asked(inspector.append, root / 'lot', accept=','.join(names[:5])) == ['v5.png']
    alone = [finding.score for finding in inspector.inspect(root / 'lot')]
    after = inspector.append(root / 'lot', accept=[','.join(names[:3]), *names[3:]])
    assert max(after.calibration.image_scores[10:]) < min(alone)
    decisions = {f.path.rpartition('/')[2]: f.anomalous for f in after.inspect(root / 'new')}
    assert decisions == {f'defect{i}.png': True for i in range(3)} | {
        f'variant{i}.png': False for i in range(3)}

  def test_one_that_is_alone_has_the_score_that_it_had(self, inspector, root):
    after = inspector.append([root / 'lot/v0.png'], accept='all')
    assert after.calibration.image_scores[-1] == pytest.approx(
        inspector.inspect(root / 'lot/v0.png').score, rel=1e-4)

  @pytest.mark.slow_for('calibrate')
  @pytest.mark.parametrize('change', ['append', 'calibrate'])
  def test_without_thresholds_what_stands_out_is_asked_about(self, change, inspector, root):
    blind = inspector.with_model(inspector.model.with_description(calibration=None))
    images = np.stack([*(_part(100 + i) for i in range(9)), _part(200, defect=True)])
    assert _asked(getattr(blind, change), images) == ['images[9]']
    after = getattr(blind, change)(images, accept='all')
    assert (after.calibration is None) == (change == 'append')

  @pytest.mark.parametrize('change', ['append', 'calibrate'])
  def test_another_size_is_asked_about(self, change, inspector, root, tmp_path):
    image = Image.fromarray(_part(100)).resize((_SIDE * 8, _SIDE * 8), Image.Resampling.NEAREST)
    image.save(tmp_path / 'large.png')
    with pytest.raises(NotAccepted, match='large.png') as refused:
      getattr(inspector, change)([tmp_path / 'large.png', root / 'mixed/g0.png'])
    assert f'is {8 * _SIDE} x {8 * _SIDE} pixels' in refused.value.lines[0]

  @pytest.mark.parametrize('change', ['append', 'calibrate'])
  def test_values_beyond_the_range_are_asked_about(self, change, root, tmp_path):
    def deep(seed, bright=0):
      image = _part(seed)[..., 0].astype(np.uint16) * 10
      image[:bright, :bright] = 60_000
      return image

    train = _write(tmp_path / 'train', {f'{i}.png': deep(i) for i in range(8)})
    found = pc.fit(train, backbone=small.backbone(), detector=pc.PatchCore(0.3, pc.EmbeddingSpec('mean')),
                   preprocessing=pc.Preprocessing(resize=(_SIDE, _SIDE), crop=()))
    far = found.with_model(found.model.with_description(calibration=dataclasses.replace(
        found.calibration, image_threshold=1e9)))  # whatever the score
    more = _write(tmp_path / 'more', {'a.png': deep(50), 'glare.png': deep(51, bright=20)})
    assert _asked(getattr(far, change), more) == ['glare.png']
    after = getattr(far, change)(more, accept='glare.png')
    assert after.model.description.outside_range == pytest.approx(400 / _SIDE**2)


@pytest.fixture(scope='module')
def others(inspector, tmp_path_factory):
  """Banks of the same parts, of the same with a defect, and of others."""
  drawn = {
      'same': [_part(600 + i) for i in range(10)],
      'mixed': [*(_part(700 + i) for i in range(9)), _part(709, defect=True)],
      'strange': _strange(10)}
  fitted = {}
  for name, images in drawn.items():
    folder = _write(
        tmp_path_factory.mktemp(name) / name, {f'{name}{i}.png': image for i, image in enumerate(images)})
    fitted[name] = pc.fit(
        folder, backbone=small.backbone(), detector=inspector.detector,
        preprocessing=inspector.preprocessing).model
  return fitted


@pytest.mark.slow  # a minute
def test_real_transistors(realdata, tmp_path):
  """Appends five good parts and a misplaced one: the misplaced one alone is asked about."""
  parts = realdata / 'mvtec_ad/transistor'
  good, misplaced = sorted((parts / 'train/good').glob('*.png')), parts / 'test/misplaced/000.png'
  (tmp_path / 'train').mkdir()
  for path in good[:40]:
    shutil.copy(path, tmp_path / 'train')
  command.done('fit', tmp_path / 'train', '--out', tmp_path / 'bank', '--backbone=resnet18_slim.procedural',
               '--ratio=0.1', '--folds=4')
  found = pc.load(tmp_path / 'bank')
  assert _asked(found.append, [*good[40:45], misplaced]) == ['000.png']
  after = found.append(good[40:45])
  defects = [path for path in sorted(parts.glob('test/*/*.png')) if path.parent.name != 'good']
  before, now = (sum(f.anomalous for f in model.inspect(defects)) for model in (found, after))
  assert len(defects) == 40 and before >= 30 and now >= before - 1


class TestMerge:

  def test_one_of_the_same_parts_is_not_asked_about(self, inspector, others):
    said = []
    merged = upkeep.merge(inspector.model, others['same'], say=said.append)
    assert merged.description.num_images == 20 and 'covering radii' in said[0]
    found = editing.compare(inspector.model, others['same'])
    assert found.distance < found.own

  def test_one_of_other_parts_is_asked_about_by_its_name(self, inspector, others):
    shown = []
    change = {'name': 'banks/strange', 'show': shown.extend}
    assert _asked(upkeep.merge, inspector.model, others['strange'], **change) == ['strange']
    names = {doubt.question.name.rpartition('/')[2] for doubt in shown}
    assert names == {f'strange{i}.png' for i in range(10)}
    merged = upkeep.merge(inspector.model, others['strange'], accept='strange', **change)
    assert merged.description.num_images == 20

  def test_a_defective_image_of_it_is_asked_about(self, inspector, others):
    shown = []
    assert _asked(upkeep.merge, inspector.model, others['mixed'], show=shown.extend) == ['mixed9.png']
    (doubt,) = shown
    assert provenance.origin(others['mixed'], doubt.row).image == 9
    assert upkeep.merge(inspector.model, others['mixed'], accept='mixed9.png').description.num_images == 20

  def test_the_distance_by_hand(self, inspector, others):
    theirs, rows = (m.arrays['embeddings'].astype(np.float64) for m in (others['same'], inspector.model))
    distances = np.sqrt(((theirs[:, None] - rows[None]) ** 2).sum(-1))
    found = editing.compare(inspector.model, others['same'])
    assert found.distance == pytest.approx(
        np.median(distances.min(1)) / editing.covering_radius(inspector.model), rel=1e-3)
    np.testing.assert_array_equal(found.nearest, distances.argmin(1)[found.rows])

  @pytest.mark.parametrize('image_score', ['reweighted', 'top_share'])
  def test_other_image_scores_are_compared_with_their_threshold(self, inspector, others, image_score):
    def other(model):
      settings = dict(model.description.settings)
      return model.with_description(settings=settings | {
          'scoring': settings['scoring'] | {'image_score': image_score, 'top_share': 0.5}})

    plain = editing.compare(inspector.model, others['same']).scores
    found = editing.compare(other(inspector.model), other(others['same'])).scores
    assert (found > 0).all() and (found < plain).all()


class TestCommand:

  @pytest.fixture
  def bank(self, tmp_path, root):
    path = tmp_path / 'bank'
    values = command.flags(
        resize=_SIDE, crop=_SIDE, ratio=0.3, embedding_patch_size=3, coreset_projection_dim=None, folds=5)
    command.done('fit', root / 'train', '--out', path, *values)
    model = store.restore(path)
    known = model.description.calibration
    store.replace(path, model.with_description(calibration=dataclasses.replace(
        known, image_threshold=1.5 * known.image_threshold)))
    return path

  @pytest.mark.parametrize('action', ['append', 'calibrate'])
  def test_images(self, action, bank, root, tmp_path):
    before = store.restore(bank)
    result = command.run('bank', action, bank, root / 'mixed')
    lines = result.err.splitlines()
    assert result.code == 1 and len(lines) == 3, result
    assert lines[0].startswith(f'{root}/mixed/oops.png: scores ') and 'the most similar' in lines[0]
    assert lines[1] == f'see {bank}.questioned.html' and lines[2].startswith('error: nothing was changed')
    after = store.restore(bank)
    assert after.description == before.description
    np.testing.assert_array_equal(after.arrays['embeddings'], before.arrays['embeddings'])
    page = (tmp_path / 'bank.questioned.html').read_text()
    assert 'oops.png' in page and 'g0.png' not in page and page.count('data:image/') >= 2
    told = command.done('bank', action, bank, root / 'mixed', '--accept', 'oops.png')
    assert 'the threshold for images was' in told
    assert store.restore(bank).description.calibration.image_threshold > (
        before.description.calibration.image_threshold)

  def test_it_is_known_before_the_work_that_nothing_can_be_written(self, bank, root, tmp_path):
    (tmp_path / 'file').write_text('')
    for arguments in (
        ['bank', 'append', bank, root / 'mixed', '--accept=all'], ['bank', 'drop', bank, 'g0.png'],
        ['export', bank]):
      result = command.run(*arguments, '--out', tmp_path / 'file/new')
      assert result.code == 1 and 'error: Cannot write to' in result.err and not result.out, result

  def test_another_rate_from_the_scores_that_are_there(self, bank, root):
    before = store.restore(bank).description.calibration
    assert 'expected good images, or --false-alarm-rate alone' in command.refused('bank', 'calibrate', bank)
    refused = command.refused('bank', 'calibrate', bank, '--false-alarm-rate=0.4', '--accept=all')
    assert '--accept has no effect without IMAGES' in refused
    told = command.done('bank', 'calibrate', bank, '--false-alarm-rate=0.4')
    after = store.restore(bank).description.calibration
    assert 'the threshold for images was' in told and after.image_scores == before.image_scores
    assert after.image_threshold < before.image_threshold and after.method == before.method
    (bank.parent / 'rate.toml').write_text('false-alarm-rate = 0.3\n')
    command.done('bank', 'calibrate', bank, '--config', bank.parent / 'rate.toml')
    assert store.restore(bank).description.calibration.false_alarm_rate == 0.3

  def test_out_and_pictures(self, bank, root, tmp_path):
    result = command.run('bank', 'append', bank, root / 'mixed', '--out', tmp_path / 'more', '--pictures',
                         tmp_path / 'deep/page.html', '--accept', 'none.png')
    assert result.code == 1 and "no image 'none.png' to accept" in result.err
    result = command.run('bank', 'append', bank, root / 'mixed', '--out', tmp_path / 'more', '--pictures',
                         tmp_path / 'deep/page.html')
    assert result.code == 1 and (tmp_path / 'deep/page.html').exists() and not (tmp_path / 'more').exists()

  def test_the_question_stands_where_no_page_can_be_written(self, bank, root, tmp_path):
    (tmp_path / 'file').write_text('')
    result = command.run('bank', 'append', bank, root / 'mixed', '--pictures', tmp_path / 'file/page.html')
    assert result.code == 1 and 'there is no page of pictures' in result.err and 'oops.png' in result.err

  def test_merge(self, bank, tmp_path):
    strange = _write(tmp_path / 'strange', {f'{i}.png': image for i, image in enumerate(_strange(6))})
    command.done('fit', strange, '--out', tmp_path / 'other', *command.flags(
        resize=_SIDE, crop=_SIDE, ratio=0.3, embedding_patch_size=3, coreset_projection_dim=None, folds=3))
    result = command.run('bank', 'merge', bank, tmp_path / 'other', '--out', tmp_path / 'both')
    assert result.code == 1 and 'covering radii' in result.out and not (tmp_path / 'both').exists()
    assert 'perhaps it is of other parts' in result.err and '--accept other' in result.err
    assert (tmp_path / 'both.questioned.html').exists()
    command.done('bank', 'merge', bank, tmp_path / 'other', '--out', tmp_path / 'both', '--accept=other')


class TestSettle:

  ASKED = (Questioned('a/x.png', 'scores 3'), Questioned('b/x.png', 'scores 2'), Questioned('c,d.png', 'odd'))

  def test_all_names_and_last_parts(self):
    for accept in ('all', ['a/x.png', 'b/x.png', 'c,d.png'], ['a/x.png,b/x.png', 'c,d.png']):
      acceptance.settle(self.ASKED, accept)
    acceptance.settle((), ())
    acceptance.settle((), 'all')

  def test_what_is_left_is_named_with_what_was_accepted(self):
    with pytest.raises(NotAccepted) as refused:
      acceptance.settle(self.ASKED[:2], 'a/x.png')
    assert refused.value.images == self.ASKED[1:2] and refused.value.lines == ['b/x.png: scores 2']
    assert '--accept a/x.png,b/x.png, or --accept all' in str(refused.value)
    assert refused.value.__notes__ == ['b/x.png: scores 2']

  @pytest.mark.parametrize('accept, words', [
      ('x.png', 'may be each of a/x.png, b/x.png'), ('y.png', "no image 'y.png' to accept")])
  def test_names_that_are_none(self, accept, words):
    with pytest.raises(ValueError, match=words):
      acceptance.settle(self.ASKED, accept)
    with pytest.raises(ValueError, match='Nothing is asked about, and y.png was accepted'):
      acceptance.settle((), 'y.png')

  def test_one_that_is_not_asked_about_does_no_harm(self):
    acceptance.settle((), 'y.png', ['new/y.png'])
    acceptance.settle([Questioned('new/x.png', 'odd')], ['y.png', 'x.png'], ['new/x.png', 'new/y.png'])
    with pytest.raises(NotAccepted, match='because x.png is'):
      acceptance.settle([Questioned('new/x.png', 'odd')], 'y.png', ['new/x.png', 'new/y.png'])
    acceptance.settle([Questioned('b/x.png', 'odd')], 'x.png', ['a/x.png', 'b/x.png'])  # the one it is about

  def test_a_name_is_no_pattern(self):
    acceptance.settle([Questioned('line[2]/*.png', 'odd')], '*.png')
    with pytest.raises(ValueError, match='no image'):
      acceptance.settle([Questioned('ab.png', 'odd')], 'a*.png')

  @pytest.mark.parametrize('name, offered', [
      ('a.png', '--accept a.png, or'), ('my part.png', "--accept 'my part.png', or"),
      ('stack.tif#2', "--accept 'stack.tif#2', or"), ('a,b.png', ': --accept all'),
      ('a\nb.png', ': --accept all')])
  def test_what_is_offered_can_be_copied_to_a_shell(self, name, offered):
    with pytest.raises(NotAccepted) as refused:
      acceptance.settle([Questioned(f'new/{name}', 'odd')])
    assert offered in str(refused.value)

  def test_many_are_one_line(self):
    with pytest.raises(NotAccepted) as refused:
      acceptance.settle([Questioned(f'new/{i}.png', 'odd') for i in range(50)])
    assert 'and 40 more are' in str(refused.value) and len(refused.value.lines) == 50
    assert str(refused.value).count('\n') == 0 and '--accept all' in str(refused.value)


def test_the_page_shows_images_as_large_as_were_allowed(tmp_path):
  path = _write(tmp_path / 'new', {'a.png': _part(0)}) / 'a.png'
  asked, shown = [Questioned(str(path), 'is an example', 1.0)], tmp_path / 'page.html'
  inspector = pc.fit(np.stack([_part(i) for i in range(4)]), backbone=small.backbone(), false_alarm_rate=None)
  with pytest.raises(ValueError, match='pixels'):
    questioned.page_of_files(shown, 'Asked about', inspector, asked, max_pixels=_SIDE**2 - 1)
  questioned.page_of_files(shown, 'Asked about', inspector, asked, max_pixels=_SIDE**2)
  assert 'is an example' in shown.read_text()
