"""MVTec AD as TensorFlow Datasets: what lies in the records is what lies in the folders."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import mvtec
from patchcore_jax.data import folder, mvtec_ad, pipeline, preprocess
from patchcore_jax.data.mvtec_ad_builder import MVTecAD
from patchcore_jax.settings import Preprocessing
from tests import conftest, plates


@pytest.fixture(scope='module')
def extracted(pristine, tmp_path_factory):
  """The plates under names that MVTec AD has, with files of several modes."""
  root = tmp_path_factory.mktemp('extracted')
  for plate, category in (('bolt', 'bottle'), ('nut', 'screw')):
    shutil.copytree(pristine / plate, root / category)
  screw = root / 'screw'
  with Image.open(screw / 'train/good/000.png') as image:  # the real screws are gray
    image.convert('L').save(screw / 'train/good/000.png')
    deep = np.asarray(image.convert('L')).astype(np.uint16) * 257
  Image.fromarray(deep).save(screw / 'test/good/000.png')
  truncated = (screw / 'test/good/001.png').read_bytes()[:3000]  # its header is whole
  (screw / 'test/good/001.png').write_bytes(truncated)
  return root


@pytest.fixture(scope='module')
def prepared(extracted, tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('tfds')
  mvtec_ad.prepare(data_dir, extracted, ['bottle', 'screw'])
  return data_dir


class TestPrepare:

  def test_progress_and_categories_that_are_there_are_left_alone(self, extracted, tmp_path, capsys):
    calls = []
    mvtec_ad.prepare(tmp_path, extracted, ['screw'], progress=lambda *x: calls.append(x))
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file()}
    mvtec_ad.prepare(tmp_path, extracted, ['screw', 'bottle'], progress=lambda *x: calls.append(x))
    assert calls == [(1, 1), (1, 2), (2, 2)]
    assert all(p.stat().st_mtime_ns == time for p, time in files.items() if 'screw' in p.parts)
    assert capsys.readouterr().out == ''

  def test_the_licence_lies_beside_the_records(self, prepared):
    assert 'CC BY-NC-SA 4.0' in (prepared / 'mvtec_ad/screw/1.0.0/LICENSE').read_text()

  def test_unknown_category(self, extracted, tmp_path):
    with pytest.raises(ValueError, match="'bolt' in MVTec AD. There are: bottle, cable"):
      mvtec_ad.prepare(tmp_path, extracted, ['bolt'])

  @pytest.mark.parametrize('damage, words', [
      (lambda d: shutil.rmtree(d / 'bottle/ground_truth'), 'No masks of bottle'),
      (lambda d: (d / 'bottle/ground_truth/spot/000_mask.png').unlink(), 'No mask for'),
      (lambda d: (d / 'bottle/ground_truth/spot/000_mask.jpg').touch(), 'Several masks for'),
      (lambda d: Image.new('L', (8, 8)).save(
          d / 'bottle/test/good/9.tif', save_all=True, append_images=[Image.new('L', (8, 8), 9)]),
       '9.tif has several pages'),
      (lambda d: (d / 'bottle/test/spot/002.png').write_text('text'), 'spot/002.png is not an image'),
      (lambda d: shutil.rmtree(d / 'bottle'), "No category 'bottle'.* There are: screw")])
  def test_bad_folders_leave_nothing(self, damage, words, extracted, tmp_path):
    copy = shutil.copytree(extracted, tmp_path / 'extracted')
    damage(copy)
    with pytest.raises(ValueError, match=words):
      mvtec_ad.prepare(tmp_path / 'tfds', copy, ['bottle'])
    assert not mvtec_ad.is_prepared(tmp_path / 'tfds', 'bottle')
    assert not list((tmp_path / 'tfds').rglob('*.array_record*'))


class TestLoadCategory:

  @pytest.mark.parametrize('name', ['bottle', 'screw'])
  def test_order_labels_and_bytes_are_those_of_the_folders(self, name, extracted, prepared):
    records, files = mvtec_ad.load_category(prepared, name), folder.MVTEC.load_category(extracted, name)
    assert (records.name, records.has_masks) == (files.name, files.has_masks) == (name, True)
    for a, b in zip(records.train + records.test, files.train + files.test, strict=True):
      assert (a.label, a.category, a.defect) == (b.label, b.category, b.defect)
      for path, file in zip((a.image_path, *a.mask_paths), (b.image_path, *b.mask_paths), strict=True):
        assert str(extracted / path) == file
        with open(file, 'rb') as f:
          assert a.read(path) == f.read()
    assert len(records.train) == 6 and len(records.test) == 8

  def test_examples_pickle_after_they_were_read(self, prepared):
    example = mvtec_ad.load_category(prepared, 'screw').test[-1]
    data = example.read(example.image_path)
    again = pickle.loads(pickle.dumps(example))
    assert again.read(again.image_path) == data

  def test_pixels_and_masks(self, extracted, prepared):
    spec = Preprocessing(resize=(64,), crop=(56,))
    pairs = zip(mvtec_ad.load_category(prepared, 'bottle').test,
                folder.MVTEC.load_category(extracted, 'bottle').test, strict=True)
    for a, b in pairs:
      for x, y in zip(preprocess.load(a, spec, with_mask=True), preprocess.load(b, spec, with_mask=True)):
        np.testing.assert_array_equal(x, y)

  def test_not_prepared(self, prepared):
    with pytest.raises(ValueError, match="'wood' is not prepared .* bottle, screw.*--categories=wood"):
      mvtec_ad.load_category(prepared, 'wood')


class TestListCategories:

  def test_those_that_are_prepared(self, prepared):
    assert mvtec_ad.list_categories(prepared) == ['bottle', 'screw']

  def test_wrong_folders(self, prepared, extracted, tmp_path):
    for wrong in (prepared / 'mvtec_ad', prepared / 'mvtec_ad/screw'):
      with pytest.raises(ValueError, match=f'Pass the folder {prepared}'):
        mvtec_ad.list_categories(wrong)
    with pytest.raises(ValueError, match='Prepare it: python -m experiments.prepare'):
      mvtec_ad.list_categories(extracted)
    with pytest.raises(ValueError, match='none does not exist'):
      mvtec_ad.list_categories(tmp_path / 'none')


class TestMVTecAD:

  def test_as_other_programs_read_it(self, prepared):
    rows = list(MVTecAD(config='bottle', data_dir=prepared).as_data_source('test'))
    assert [r['name'].decode() for r in rows[:2]] == [
        'bottle/test/good/000.png', 'bottle/test/good/001.png']
    assert [r['label'] for r in rows] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert rows[-1]['defect'] == b'spot'
    for row in rows:
      assert row['image'].shape == (60, 72, 3) and row['mask'].shape == (60, 72, 1)
      assert row['mask'].sum() == 255 * 81 * row['label']  # a square of 9 pixels

  def test_tensorflow_is_not_imported(self, prepared):
    code = (f'import sys; from patchcore_jax.data import mvtec_ad, preprocess;'
            f'e = mvtec_ad.load_category({str(prepared)!r}, "bottle").test[0];'
            f'preprocess.load(e, preprocess.Preprocessing(resize=(), crop=()));'
            f'assert "tensorflow" not in sys.modules')
    subprocess.run([sys.executable, '-c', code], cwd=conftest.ROOT, check=True)


class TestResults:

  def test_records_and_folders_give_the_same(self, extracted, prepared, tmp_path, capsys):
    for source, root in (('folder', extracted), ('tfds', prepared)):
      mvtec.run(plates.config(root, data__source=source, data__on_error='skip'), tmp_path / source)
    results = plates.results(tmp_path / 'tfds')
    assert results == plates.results(tmp_path / 'folder')
    # One of the screws is truncated.
    assert [(r['category'], r['num_test'], r['num_skipped']) for r in results[::2]] == [
        ('bottle', '8', '0'), ('screw', '7', '1')]
    assert 'skipped: Cannot read screw/test/good/001.png' in capsys.readouterr().out
    for name in ('bottle', 'screw'):
      scores = [(tmp_path / s / f'scores/{name}.csv').read_text() for s in ('folder', 'tfds')]
      assert scores[0].replace(f'{extracted}/', '') == scores[1]

  def test_worker_processes_read_records_too(self, prepared):
    examples, errors = mvtec_ad.load_category(prepared, 'screw').test, []
    by_workers = [
        list(pipeline.batches(
            examples, Preprocessing(resize=(64,), crop=(56,)), batch_size=3, num_workers=num_workers,
            with_masks=True, on_error=errors.append))
        for num_workers in (0, 2)]
    for one, other in zip(*by_workers, strict=True):
      for name, a, b in zip(one._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert len(errors) == 2 and str(errors[0]) == str(errors[1])

  def test_a_damaged_image_is_raised_by_name(self, prepared, tmp_path):
    with pytest.raises(ValueError, match='Cannot read screw/test/good/001.png'):
      mvtec.run(
          plates.config(prepared, data__source='tfds', data__categories=('screw',)), tmp_path / 'run')
