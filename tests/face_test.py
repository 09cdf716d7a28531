"""`import patchcore_jax as pc`: from images to decisions in Python, and on to the command and back."""

import dataclasses
import json
import multiprocessing
import pickle
import pydoc
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

import patchcore_jax as pc
from patchcore_jax import inspection
from patchcore_jax.banks.model import BankError
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from tests import command, conftest, plates, small

NAMED = 'tests.small:backbone'  # a network that can be made again by its name
DETECTOR = pc.PatchCore(0.3, pc.EmbeddingSpec('mean'), pc.CoresetSpec(projection_dim=4))
PREPROCESSING = pc.Preprocessing(resize=(64,), crop=(56,))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """8 good plates, and 2 with a hole beside them."""
  root, rng = tmp_path_factory.mktemp('plates'), np.random.default_rng(0)
  for i in range(8):
    plates._draw(root / f'good/{i}.png', rng)
  for i in range(2):
    plates._draw(root / f'new/{i}.png', rng, 'hole')
  return root


@pytest.fixture(scope='module')
def of_files(folder):
  return pc.fit(folder / 'good', detector=DETECTOR, backbone=NAMED, preprocessing=PREPROCESSING,
                false_alarm_rate=0.2)


@pytest.fixture(scope='module')
def of_arrays():
  return _fit()


def _fit(good=None, **arguments):
  good = small.images(8) if good is None else good
  return pc.fit(good, **{'detector': DETECTOR, 'backbone': NAMED, 'false_alarm_rate': 0.2} | arguments)


def _same(one, other):
  """Whether two findings, or lists of them, are equal, their maps too."""
  if isinstance(one, list):
    return len(one) == len(other) and all(map(_same, one, other))
  return one == other and np.array_equal(one.map, other.map)


def test_from_arrays_to_a_bank_that_the_command_reads(tmp_path):
  images, new = small.images(8), small.images(1, seed=1)[0]
  bank = tmp_path / 'bank'
  # Five lines.
  inspector = pc.fit(images, backbone=NAMED, false_alarm_rate=0.2)
  finding = inspector.inspect(new)
  assert finding.anomalous in (True, False) and finding.map.shape == (32, 24)
  inspector.save(bank)
  again = pc.load(bank)

  assert _same(again.inspect(new), finding)
  Image.fromarray(new).save(tmp_path / 'new.png')
  command.done('predict', bank, tmp_path / 'new.png', '--out', tmp_path / 'out')
  (row,) = map(json.loads, (tmp_path / 'out/predictions.jsonl').read_text().splitlines())
  assert row['score'] == pytest.approx(finding.score, rel=1e-5) and row['decision'] == finding.decision
  assert tuple(row['box']) == finding.box


def test_what_the_command_made_python_loads(folder, tmp_path):
  command.done('fit', folder / 'good', '--out', tmp_path / 'bank', *command.flags())
  inspector = pc.load(tmp_path / 'bank')
  path = folder / 'new/0.png'
  finding = inspector.inspect(path)
  assert finding.anomalous and inspector.preprocessing == PREPROCESSING
  command.done('predict', tmp_path / 'bank', path, '--out', tmp_path / 'out')
  row = json.loads((tmp_path / 'out/predictions.jsonl').read_text())
  found = finding.to_json()
  assert row['decision'] == found['decision'] == 'anomalous' and row['box'] == found['box']
  assert row['score'] == pytest.approx(found['score'], rel=1e-5)


class TestFit:

  def test_a_folder_a_pattern_and_paths_are_the_same(self, folder, of_files):
    good = folder / 'good'
    paths = sorted(good.iterdir())
    for images in (str(good), str(good / '*.png'), paths, [str(path) for path in paths]):
      other = _fit(images, preprocessing=PREPROCESSING)
      np.testing.assert_array_equal(other.model.arrays['embeddings'], of_files.model.arrays['embeddings'])
      assert other.model.description.images == tuple(str(good / f'{i}.png') for i in range(8))
      assert other.calibration == of_files.calibration

  def test_arrays_are_taken_as_they_are_unless_told_otherwise(self, of_arrays):
    assert of_arrays.image_size == (32, 24) and of_arrays.model.description.preprocessing is None
    smaller = _fit(preprocessing=pc.Preprocessing(resize=(24,), crop=(16,)))
    assert smaller.image_size == (16, 16)
    assert smaller.inspect(small.images(1)[0]).image_size == (24, 32)

  def test_an_array_is_the_same_as_its_file(self, folder, of_files):
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted((folder / 'good').iterdir())])
    other = _fit(arrays, preprocessing=PREPROCESSING)
    np.testing.assert_array_equal(other.model.arrays['embeddings'], of_files.model.arrays['embeddings'])

  def test_gray_is_three_equal_channels(self):
    gray = small.images(8)[..., 0]
    one, other = _fit(gray), _fit(np.stack([gray] * 3, axis=-1))
    np.testing.assert_array_equal(one.model.arrays['embeddings'], other.model.arrays['embeddings'])
    assert _same(one.inspect(gray[0]), other.inspect(np.stack([gray[0]] * 3, axis=-1)))

  @pytest.mark.parametrize('images, words', [
      (small.images(3) / 255, ('float64', 'uint8', '255 * images')),
      (small.images(3).astype(np.float32), ('float32', 'uint8')),
      (small.images(3).astype(np.int64), ('int64', 'uint8')),
      (np.zeros((3, 8, 8, 4), np.uint8), ('(3, 8, 8, 4)', '[n, height, width, 3]')),
      (small.images(1)[0], ('(32, 24, 3)', '[n, height, width, 3]')),
      (np.zeros((0, 8, 8, 3), np.uint8), ('(0, 8, 8, 3)', 'at least one')),
      (np.zeros((8, 8), np.uint8), ('(8, 8)', '[n, height, width]')),
      (5, ('folder', 'got a int')), (None, ('folder', 'NoneType')), ([], ('paths', 'list of 0')),
      ([5], ('paths', 'the first a int')), ('nowhere/good', ('nowhere/good', 'does not exist')),
      ('nowhere/*.png', ('nowhere/*.png', 'matches no image'))],
      ids=lambda v: v[0] if isinstance(v, tuple) else '')
  def test_anything_else_is_refused_in_one_line_that_says_what_to_do(self, images, words):
    with pytest.raises(ValueError) as error:
      pc.fit(images, backbone=NAMED)
    message = str(error.value)
    assert '\n' not in message and all(word in message for word in words), message

  def test_a_file_that_cannot_be_read_is_named(self, folder, tmp_path):
    (tmp_path / 'bad.png').write_text('no image')
    with pytest.raises(ImageError, match='bad.png'):
      _fit([folder / 'good/0.png', tmp_path / 'bad.png'])

  def test_without_thresholds(self):
    finding = _fit(false_alarm_rate=None).inspect(small.images(1)[0])
    assert finding.anomalous is finding.threshold is finding.decision is None and finding.score >= 0

  def test_progress(self):
    told = []
    _fit(progress=lambda *stage: told.append(stage))
    assert ('embed', 8, 8) in told and any(name == 'coreset' for name, *_ in told)

  def test_the_seed_decides(self):
    rows = [_fit(seed=seed).model.arrays['embeddings'] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])

  def test_another_detector(self, tmp_path):
    inspector = _fit(detector=pc.PaDiM(num_dims=6))
    finding = inspector.inspect(small.images(1)[0])
    assert finding.nearest is None and finding.map.shape == (32, 24)
    assert 'embeddings' not in inspector.model.arrays
    inspector.save(tmp_path / 'model')
    assert pc.load(tmp_path / 'model').detector == pc.PaDiM(num_dims=6)

  def test_an_ensemble_of_several_networks(self, tmp_path):
    inspector = _fit(detector=pc.Ensemble(DETECTOR), false_alarm_rate=None, backbone=[
        pc.backbones.create(NAMED), pc.backbones.create('tests.fit_test:other_network')])
    finding = inspector.inspect(small.images(1)[0])
    inspector.save(tmp_path / 'model')
    assert _same(pc.load(tmp_path / 'model').inspect(small.images(1)[0]), finding)

  @pytest.mark.parametrize('name, weights, kind', [
      ('resnet18', 'random', 'adaptive'), ('resnet18_slim.procedural', '', 'mean'), (NAMED, '', 'mean')])
  def test_the_network_settles_how_patches_are_embedded(self, name, weights, kind):
    """The paper's embedding is made for usual ResNets."""
    detector = pc.PatchCore(0.5, pc.EmbeddingSpec('auto', target_dim=16), pc.CoresetSpec(projection_dim=4))
    network = pc.backbones.create(name, weights=weights)
    inspector = _fit(small.images(2), detector=detector, backbone=network, false_alarm_rate=None)
    assert inspector.detector.embedding.kind == kind
    assert inspector.model.description.settings['embedding']['kind'] == kind


class TestInspect:

  def test_one_is_a_finding_and_many_are_an_iterator(self, of_arrays):
    images = small.images(5, seed=3)
    many = of_arrays.inspect(images, batch_size=2)
    assert isinstance(many, Iterator)
    many, single = list(many), [of_arrays.inspect(image) for image in images]
    assert [f.score for f in many] == pytest.approx([f.score for f in single], rel=1e-5)
    assert len({f.score for f in many}) == 5  # so the order is theirs
    assert all(isinstance(f, pc.Finding) for f in many)

  def test_files_have_names_and_their_own_sizes(self, folder, of_files, tmp_path):
    wide = tmp_path / 'wide.png'
    Image.new('L', (200, 60), 120).save(wide)
    paths = [folder / 'new/0.png', wide, folder / 'good/3.png']
    found = list(of_files.inspect(paths, batch_size=2))
    assert [f.path for f in found] == [str(path) for path in paths]
    assert [f.image_size for f in found] == [(72, 60), (200, 60), (72, 60)]
    assert found[0].anomalous and not found[2].anomalous
    of_folder = of_files.inspect(str(folder / 'new'))
    assert [f.path for f in of_folder] == [str(folder / f'new/{i}.png') for i in (0, 1)]
    assert len(list(of_files.inspect(str(folder / '*/1.png')))) == 2
    assert of_files.inspect(wide).path == str(wide)

  def test_any_iterable_of_any_images(self, folder, of_files):
    """Reads an endless iterable only some images ahead."""
    path = folder / 'new/0.png'
    pixels = np.asarray(Image.open(path))
    from_file, from_array, from_pillow = of_files.inspect(iter([path, pixels, Image.open(path)]))
    assert from_array.path == from_pillow.path == '' and from_file.path == str(path)
    assert _same(dataclasses.replace(from_file, path=''), from_array) and _same(from_array, from_pillow)
    taken = []

    def endless():
      while True:
        taken.append(1)
        yield pixels

    # Alone or in a batch, some CPUs sum in another order.
    first = next(of_files.inspect(endless(), batch_size=2))
    assert first.score == pytest.approx(from_array.score, rel=1e-5) and len(taken) < 100
    np.testing.assert_allclose(first.map, from_array.map, rtol=1e-4, atol=1e-6)

  def test_files_that_cannot_be_read_are_left_out_where_someone_is_told(self, folder, of_files, tmp_path):
    (tmp_path / 'bad.png').write_text('not an image')
    good, told = sorted((folder / 'new').iterdir())[:2], []
    found = list(of_files.inspect(
        [good[0], tmp_path / 'bad.png', good[1], tmp_path / 'nowhere.png'], on_error=told.append))
    assert [finding.path for finding in found] == [str(path) for path in good]
    assert len(told) == 2 and 'bad.png' in str(told[0]) and 'nowhere.png' in str(told[1])
    with pytest.raises(ImageError, match='bad.png'):  # of one there would be nothing to return
      of_files.inspect(tmp_path / 'bad.png', on_error=told.append)

  def test_an_image_of_another_size_is_left_out_where_someone_is_told(self, of_arrays):
    images, told = [*small.images(2, 3)], []
    images.insert(1, images[0][:-8])
    assert len(list(of_arrays.inspect(images, on_error=told.append))) == 2
    assert len(told) == 1 and 'an array: The image is' in str(told[0])

  def test_a_file_that_cannot_be_read_is_named(self, folder, of_files, tmp_path):
    (tmp_path / 'bad.png').write_text('no image')
    with pytest.raises(ImageError, match='bad.png'):
      of_files.inspect(tmp_path / 'bad.png')
    with pytest.raises(ImageError, match='bad.png'):
      list(of_files.inspect([folder / 'new/0.png', tmp_path / 'bad.png']))
    with pytest.raises(ImageError, match='nowhere.png'):
      of_files.inspect('nowhere.png')

  @pytest.mark.parametrize('images, words', [
      (5, 'got a int'), (np.zeros((32, 24, 3)), 'float64'), (np.zeros((2, 32, 24, 4), np.uint8), 'shape'),
      ([5], 'got a int'), (np.zeros((16, 16, 3), np.uint8), '16 x 16 pixels')])
  def test_anything_else_is_refused(self, of_arrays, images, words):
    with pytest.raises(ValueError, match=words) as error:
      found = of_arrays.inspect(images)
      list(found)
    assert '\n' not in str(error.value)

  def test_they_are_the_findings_of_the_service(self, folder, of_files):
    """The service prepares images and scores them by `scorer` and `find`."""
    data = FileData([Example(str(folder / 'new/0.png'), (), 0, '', '')], PREPROCESSING, 1)
    (batch,) = data.batches()
    scores = inspection.scorer(of_files, 1)(batch.image)
    expected = inspection.find(of_files, scores, 0, (60, 72), path=str(folder / 'new/0.png'))
    found = of_files.inspect(folder / 'new/0.png')
    assert found == expected and json.dumps(found.to_json()) == json.dumps(expected.to_json())
    np.testing.assert_array_equal(found.map, expected.map)

  def test_a_finding_says_where_and_why(self, folder, of_files):
    finding = of_files.inspect(folder / 'new/0.png')
    hole = np.asarray(Image.open(folder / 'new/0.png')).mean(-1)
    y, x = np.nonzero(hole < 50)
    left, top, right, bottom = finding.box
    assert left <= x.mean() < right and top <= y.mean() < bottom
    assert finding.nearest.name in finding.why and f'row {finding.nearest.row}' in finding.why


class TestOwnNetwork:
  """One that is a Python object, of which no name is known."""

  def test_it_is_given_again_to_load(self, tmp_path):
    inspector = _fit(backbone=small.backbone())
    finding = inspector.inspect(small.images(1)[0])
    inspector.save(tmp_path / 'bank')
    with pytest.raises(BankError, match='`backbone` of load') as error:
      pc.load(tmp_path / 'bank')
    assert '\n' not in str(error.value)
    again = pc.load(tmp_path / 'bank', backbone=small.backbone())
    assert _same(again.inspect(small.images(1)[0]), finding)

  def test_another_one_is_refused(self, tmp_path):
    _fit(backbone=small.backbone()).save(tmp_path / 'bank')
    for other in (small.backbone(('a', 'b')), dataclasses.replace(small.backbone(), variables={
        k: 2 * v for k, v in small.backbone().variables.items()})):
      with pytest.raises(ValueError) as error:
        pc.load(tmp_path / 'bank', backbone=other)
      assert '\n' not in str(error.value)

  def test_the_command_says_what_it_lacks(self, tmp_path):
    _fit(backbone=small.backbone()).save(tmp_path / 'bank')
    Image.fromarray(small.images(1)[0]).save(tmp_path / 'new.png')
    told = command.refused('predict', tmp_path / 'bank', tmp_path / 'new.png', '--out', tmp_path / 'out')
    assert 'does not say how its network' in told and not (tmp_path / 'out').exists()


def _scores_elsewhere(data):
  """Scores of a pickled inspector in another process."""
  return [finding.score for finding in pickle.loads(data).inspect(small.images(3, seed=7))]


@pytest.mark.parametrize('network', [NAMED, 'own'])
def test_pickling(network):
  inspector = _fit(backbone=small.backbone() if network == 'own' else network)
  scores = [finding.score for finding in inspector.inspect(small.images(3, seed=7))]
  data = pickle.dumps(inspector)
  again = pickle.loads(data)
  assert again.detector == inspector.detector and again.calibration == inspector.calibration
  assert _scores_elsewhere(data) == scores
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    assert pool.apply(_scores_elsewhere, (data,)) == pytest.approx(scores, rel=1e-5)


class TestUpkeep:

  def test_append(self, of_arrays):
    before, more = of_arrays.model, small.images(4, seed=9)
    larger = of_arrays.append(more)
    assert larger.model.description.num_images == 12 and of_arrays.model is before
    assert len(larger.model.arrays['embeddings']) > len(before.arrays['embeddings'])
    was, now = (next(i.inspect(more)).score for i in (of_arrays, larger))
    assert now < was

  def test_append_of_files(self, folder, of_files):
    with pytest.raises(pc.NotAccepted, match='--accept (0.png,1.png|1.png,0.png)'):
      of_files.append(folder / 'new')  # parts with holes
    larger = of_files.append(folder / 'new', accept='all')
    assert larger.model.description.images[-1] == str(folder / 'new/1.png')
    assert not larger.inspect(folder / 'new/1.png').score > of_files.inspect(folder / 'new/1.png').score

  def test_calibrate(self, of_arrays):
    held_out = small.images(10, seed=11)
    with pytest.raises(pc.NotAccepted, match=r'images\[2\]'):
      of_arrays.calibrate(held_out, false_alarm_rate=0.1)
    again = of_arrays.calibrate(held_out, false_alarm_rate=0.1, accept='images[2]')
    assert again.calibration.method == 'held out' and len(again.calibration.image_scores) == 10
    alarms = [finding.anomalous for finding in again.inspect(held_out)]
    assert sum(alarms) <= 1
    with pytest.raises(ValueError, match='share between'):
      of_arrays.calibrate(held_out, false_alarm_rate=2)
    other = again.calibrate(false_alarm_rate=0.5).calibration
    assert other.image_scores == again.calibration.image_scores and other.false_alarm_rate == 0.5
    assert other.image_threshold < again.calibration.image_threshold

  def test_export(self, of_arrays, tmp_path):
    about = of_arrays.export(tmp_path / 'program', platforms=['cpu'])
    assert about['platforms'] == ['cpu'] and (tmp_path / 'program/run.py').exists()


class TestImport:

  def test_the_help_shows_what_there_is(self):
    text = pydoc.render_doc(pc, renderer=pydoc.plaintext)
    for name in ('fit(', 'load(', 'evaluate(', 'class Inspector', 'class Finding', 'class PatchCore',
                 'class PaDiM', 'class SPADE', 'class MahalanobisAD', 'class OCSVM', 'class Ensemble',
                 'backbones', 'metrics', 'coreset', 'neighbors', 'class Preprocessing'):
      assert name in text, name
    assert 'Learns what good parts look like' in text

  def test_all_names_are_there(self):
    assert set(pc.__all__) <= set(dir(pc))
    assert all(hasattr(pc, name) for name in pc.__all__)
    with pytest.raises(AttributeError, match='fitt'):
      pc.fitt  # noqa: B018

  def test_it_imports_nothing_and_is_quick(self):
    script = (
        'import sys, time; began = time.perf_counter(); import patchcore_jax; '
        't = time.perf_counter() - began; '
        "print(t, [m for m in ('numpy', 'jax', 'flax', 'PIL') if m in sys.modules])")
    outputs = [
        subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True,
                       cwd=conftest.ROOT).stdout.split(' ', 1) for _ in range(3)]
    assert all(loaded.strip() == '[]' for _, loaded in outputs), outputs
    assert statistics.median(float(seconds) for seconds, _ in outputs) < 0.3


def test_mistakes_are_told_at_once():
  inspector = small.inspector()
  for images, message in (
      (None, 'got a NoneType'), (np.zeros((8, 8, 4), np.uint8), 'of shape'),
      (np.zeros((8, 8)), 'expected uint8')):
    with pytest.raises(ValueError, match=message):
      inspector.inspect(images)  # an iterator would tell only when it is asked
  with pytest.raises(ValueError, match='One image: thresholds take at least 2.*--folds 0'):
    pc.fit(small.images(1), backbone=small.backbone())


def test_a_method_by_its_name():
  inspector = pc.fit(small.images(6), detector='mahalanobis_ad', backbone=small.backbone())
  assert inspector.detector == pc.MahalanobisAD()


def test_what_a_folder_passes_by_is_warned_of(folder, of_files, tmp_path):
  good = shutil.copytree(folder / 'good', tmp_path / 'parts/good')
  (good / 'notes.txt').write_text('')
  shutil.copytree(folder / 'good', good.parent / 'new')
  images = sum(path.suffix == '.png' for path in good.iterdir())
  with pytest.warns(UserWarning) as told:
    found = list(of_files.inspect(good.parent))
  assert len(found) == 2 * images  # below the folder all are looked at
  assert str(told[0].message).startswith('not read, because of their names: 1 .txt (good/notes.txt)')
  with pytest.warns(UserWarning) as told:
    made = pc.fit(good.parent, detector=DETECTOR, backbone=NAMED, preprocessing=PREPROCESSING)
  assert len(made.model.description.images) == images  # a fit takes the good ones
  lines = [str(w.message) for w in told]
  assert f'taken: {good}. Not read, beside it: new ({images})' in lines


def test_each_page_of_a_file_is_an_image(of_files, folder, tmp_path):
  pages = [Image.open(path).convert('RGB') for path in sorted((folder / 'good').glob('*.png'))[:3]]
  pages[0].save(tmp_path / 'stack.tif', save_all=True, append_images=pages[1:])
  for images in (tmp_path / 'stack.tif', tmp_path, [tmp_path / 'stack.tif']):
    found = list(of_files.inspect(images))
    assert [f.path for f in found] == [f'{tmp_path}/stack.tif#{i}' for i in (1, 2, 3)]
  assert of_files.inspect(f'{tmp_path}/stack.tif#2').score == pytest.approx(found[1].score, rel=1e-5)
