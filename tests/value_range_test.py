"""The range of values: measured over training images, kept with the model, and what lies outside of it."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import patchcore_jax as pc
from patchcore_jax.data import decoding, survey, value_range
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.inspection import image_sizes
from patchcore_jax.inspection.acceptance import NotAccepted
from patchcore_jax.settings import Preprocessing
from tests import command, serve_test, small, tiff

RNG = np.random.default_rng(0)


def _files(folder, arrays):
  """Writes arrays as TIFF files, and lists them."""
  folder.mkdir(exist_ok=True)
  return [str(tiff.write(folder / f'{i}.tif', array)) for i, array in enumerate(arrays)]


def _scene(dtype=np.uint16, low=29400, high=29900, shape=(40, 50)):
  """Values that go evenly from low to high."""
  return np.linspace(low, high, shape[0] * shape[1]).reshape(shape).astype(dtype)


class TestMeasured:

  @pytest.mark.parametrize('dtype', [np.uint16, np.float32])
  def test_what_was_seen_and_a_quarter_on_both_sides(self, dtype, tmp_path):
    paths = _files(tmp_path, [_scene(dtype), _scene(dtype, 29500, 30000)])
    found, outside = value_range.measured(paths, Preprocessing())
    assert found.value_range == pytest.approx((29400 - 150, 30000 + 150), abs=2)
    assert outside == 0

  def test_it_ends_where_the_files_values_end(self, tmp_path):
    found, _ = value_range.measured(_files(tmp_path, [_scene(low=100, high=65000)]), Preprocessing())
    assert found.value_range == (0, 65535)

  def test_a_few_dead_and_hot_pixels_do_not_widen_it(self, tmp_path):
    scene = _scene(shape=(100, 100))
    scene[0, :3], scene[0, 3:5] = 0, 65535
    found, outside = value_range.measured(_files(tmp_path, [scene, _scene()]), Preprocessing())
    assert found.value_range == pytest.approx((29400 - 125, 29900 + 125), abs=3)
    assert outside == 5 / 100**2

  def test_images_of_one_value(self, tmp_path):
    paths = _files(tmp_path, [np.full((4, 5), 700, np.uint16)])
    found, _ = value_range.measured(paths, Preprocessing())
    assert found.value_range[0] < 700 < found.value_range[1]
    assert value_range.measured(_files(tmp_path / 'zero', [np.zeros((4, 5), np.uint16)]), Preprocessing())[
        0].value_range[1] > 0

  def test_files_of_8_bits_need_none(self, tmp_path):
    Image.new('RGB', (4, 5)).save(tmp_path / 'i.png')
    (tmp_path / 'bad.tif').write_bytes(b'II*\0')
    paths = [str(tmp_path / name) for name in ('i.png', 'bad.tif', 'none.tif')]
    assert value_range.measured(paths, Preprocessing()) == (Preprocessing(), 0.0)

  def test_a_range_that_is_set_stays(self, tmp_path):
    settings = Preprocessing(value_range=(29400.0, 29650.0))
    found, outside = value_range.measured(_files(tmp_path, [_scene()]), settings)
    assert found == settings and outside == pytest.approx(0.5, abs=0.01)

  def test_integers_and_floats_do_not_fit_one(self, tmp_path):
    paths = _files(tmp_path, [_scene(), _scene(np.float32, 20, 80)])
    with pytest.raises(ValueError, match='1 files hold integers .*0.tif.* 1 floats .*1.tif.*: expected one'):
      value_range.measured(paths, Preprocessing())
    settings = Preprocessing(value_range=(0.0, 1.0))
    assert value_range.measured(paths, settings)[0] == settings

  def test_only_what_is_seen_counts(self, tmp_path):
    """Neither bands that are not chosen, nor transparent pixels, nor what is no number."""
    scene = _scene()
    banded = np.dstack([scene, scene, scene, np.full_like(scene, 5), scene])
    found, _ = value_range.measured(_files(tmp_path / 'b', [banded]), Preprocessing(bands=(1, 3, 5)))
    assert found.value_range[0] > 29000
    hidden = np.dstack([scene, scene, scene, np.full_like(scene, 65535)])
    hidden[:10] = 0
    path = tiff.write(tmp_path / 'h.tif', hidden, extra=[2])
    assert value_range.measured([str(path)], Preprocessing())[0].value_range[0] > 29000
    floats = _scene(np.float32)
    floats[0] = np.nan
    found, outside = value_range.measured(_files(tmp_path / 'n', [floats]), Preprocessing())
    assert found.value_range[0] > 29000 and outside == 1 / 40


def test_outside_is_what_decoding_tells(tmp_path):
  settings = Preprocessing(value_range=(29500.0, 29700.0))
  paths = _files(tmp_path, [_scene(), _scene(np.float32), _scene(low=29550, high=29600),
                            np.zeros((4, 5), np.uint8)])
  found = value_range.outside(paths, settings)
  assert found == pytest.approx([decoding.decode(path, settings).outside for path in paths])
  assert found[0] > 0.5 and found[2:] == [0, 0]
  assert value_range.outside(paths, Preprocessing()) == [0] * 4


def test_data_is_measured_once(tmp_path, monkeypatch):
  data = FileData(
      [Example(path, (), 0, 'c', 'good') for path in _files(tmp_path, [_scene()])],
      Preprocessing(resize=(), crop=()), 1)
  data = data.measured()
  assert data.preprocessing.value_range and data.outside_range == 0
  (batch,) = data.part([0]).batches()
  assert 35 < batch.image.min() < 50 and 205 < batch.image.max() < 220  # a sixth of the levels on each side
  monkeypatch.setattr(value_range, 'measured', None)
  assert data.measured() is data


class TestSurvey:

  def test_what_is_more_than_8_bits_three_bands_and_one_page(self, tmp_path):
    paths = _files(tmp_path, [_scene(), np.zeros((4, 5, 6), np.uint8)])
    Image.new('RGBA', (4, 5)).save(tmp_path / 'a.png')
    page = Image.new('RGB', (4, 5))
    page.save(tmp_path / 'p.tif', save_all=True, append_images=[page, page])
    pages = [f'{tmp_path}/p.tif#{i}' for i in (1, 2, 3)]
    found = survey.survey([*paths, str(tmp_path / 'a.png'), *pages])
    assert (found.deep, found.banded, found.transparent) == (1, 1, 1)
    assert found.pages == {f'{tmp_path}/p.tif': 3} and not found.duplicates
    assert found.modes == {
        'RGB': 3, 'gray of 16 bits': 1, 'multiband (6 bands)': 1, 'RGB with transparency': 1}
    said = ' '.join(found.reading(Preprocessing(background=(1, 2, 3), bands=(6, 5, 1))))
    assert all(word in said for word in ('p.tif#1', '6, 5, 1', '1,2,3 (--background)', '3 in all'))
    assert 'as if it were not' in found.reading(Preprocessing(background=()))[-1]

  def test_bands_must_be_chosen_where_all_files_have_too_many(self, tmp_path):
    found = survey.survey(_files(tmp_path, [np.zeros((4, 5, 6), np.uint8)] * 2))
    with pytest.raises(ValueError, match=r'2 multiband \(6 bands\).*--bands'):
      found.check_bands(Preprocessing())
    found.check_bands(Preprocessing(bands=(1, 2, 3)))

  def test_the_line_of_the_range(self):
    settings = Preprocessing(value_range=(20.5, 80.0))
    assert survey.range_line(settings, 0.01, 2) == (
        '2 images have more than 8 bits: values from 20.5 to 80 become black to white (--value-range); up to '
        '1 % of a training image lies outside')
    assert survey.range_line(Preprocessing(), 0.0, 0) == ''


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Raw counts of a thermal camera; `hot` has a spot that is far above what good parts have."""
  root = tmp_path_factory.mktemp('thermal')

  def frame(seed, hot=False):
    counts = np.random.default_rng(seed).integers(29400, 29900, (64, 64)).astype(np.uint16)
    counts[20:30, 20:30] += 5000 * hot
    return counts

  _files(root / 'train', map(frame, range(6)))
  _files(root / 'good', map(frame, range(50, 52)))
  _files(root / 'hot', [frame(60, hot=True)])
  return root


@pytest.fixture(scope='module')
def inspector(root):
  return pc.fit(
      root / 'train', backbone=small.backbone(), detector=pc.PatchCore(0.3, pc.EmbeddingSpec('mean')))


class TestModel:
  """Follows a folder of deep files to a decision."""

  def test_the_range_is_kept_and_decides(self, root, inspector, tmp_path):
    settings = inspector.model.description.preprocessing
    assert settings.value_range == pytest.approx((29400 - 125, 29900 + 125), abs=5)
    inspector.save(tmp_path / 'bank')
    again = pc.load(tmp_path / 'bank', backbone=small.backbone())
    assert again.preprocessing == settings and again.model.description.outside_range == 0
    assert [f.outside_range for f in again.inspect(root / 'good')] == [0, 0]
    (found,) = again.inspect(root / 'hot')
    assert found.anomalous and found.outside_range == pytest.approx(100 / 64**2)
    assert 'outside of the value range' in found.reason

  def test_deep_files_are_told_of_where_the_model_knows_no_range(self, root, tmp_path):
    eight = np.random.default_rng(0).integers(0, 256, (6, 64, 64), np.uint8)
    _files(tmp_path / 'eight', eight)
    command.done('fit', tmp_path / 'eight', '--out', tmp_path / 'bank', *command.flags())
    said = command.done('predict', tmp_path / 'bank', root / 'good', '--out', tmp_path / 'out')
    assert said.count(image_sizes.FULL_RANGE) == 1  # of two
    rows = (tmp_path / 'out/predictions.jsonl').read_text().splitlines()
    assert [image_sizes.FULL_RANGE in json.loads(row)['note'] for row in rows] == [True, True]
    inspector = pc.load(tmp_path / 'bank')
    assert all(image_sizes.FULL_RANGE in found.note for found in inspector.inspect(root / 'good'))
    assert not any(found.note for found in inspector.inspect(tmp_path / 'eight'))
    with serve_test.running(inspector) as address:
      _, _, answer = serve_test.ask(address, body=sorted((root / 'good').iterdir())[0].read_bytes())
    assert image_sizes.FULL_RANGE in answer['note']

  def test_values_beyond_it_are_asked_about(self, root, inspector):
    """Also where the score says nothing."""
    blind = inspector.with_model(inspector.model.with_description(calibration=dataclasses.replace(
        inspector.calibration, image_threshold=1e9)))
    for change in (blind.append, blind.calibrate):
      with pytest.raises(NotAccepted, match='0.tif') as refused:
        change(root / 'hot')
      assert 'outside of the value range' in refused.value.images[0].why
      changed = change(root / 'hot', accept='0.tif')
      assert changed.model.description.outside_range == pytest.approx(100 / 64**2)
      assert change(root / 'good').model.description.outside_range == 0

  def test_one_limit_of_pixels_through_every_door(self, root, inspector):
    limit = 64 * 64 / 1e6 - 1e-6
    small_fit = {'backbone': small.backbone(), 'detector': pc.PatchCore(0.3, pc.EmbeddingSpec('mean'))}
    for use in (
        lambda: list(inspector.inspect(root / 'good', max_megapixels=limit)),
        lambda: inspector.append(root / 'good', max_megapixels=limit),
        lambda: inspector.calibrate(root / 'good', max_megapixels=limit),
        lambda: pc.fit(root / 'train', max_megapixels=limit, **small_fit)):
      with pytest.raises(ImageError, match='64 x 64 pixels.*--max-megapixels, max_megapixels'):
        use()
