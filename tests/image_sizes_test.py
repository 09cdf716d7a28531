"""What the network sees of images of any size: the whole, one grid for several, and what is asked about."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import patchcore_jax as pc
from patchcore_jax.banks import store
from patchcore_jax.data import decoding, preprocess
from patchcore_jax.inspection import image_sizes
from patchcore_jax.inspection.acceptance import NotAccepted
from patchcore_jax.settings import Preprocessing
from tests import command

NAMED = 'tests.small:backbone'
DETECTOR = pc.PatchCore(0.01, pc.EmbeddingSpec('mean'), pc.CoresetSpec('random'))  # quick, of many patches


def _strip(seed, width=400, height=100, at=None):
  """A long image with vertical stripes; a defect is a bright square at that column."""
  rng = np.random.default_rng(seed)
  pixels = 120 + 20 * np.sin(np.arange(width) / 9)[None, :, None] + rng.normal(0, 4, (height, width, 3))
  if at is not None:
    pixels[height // 3:2 * height // 3, at:at + height // 3] = 250
  return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _save(folder, **images):
  folder.mkdir(parents=True, exist_ok=True)
  for name, image in images.items():
    image.save(folder / f'{name}.png')
  return folder


def _strips(folder, n=6, **sizes):
  return _save(folder, **{f's{i}': _strip(i, **sizes) for i in range(n)})


def _flags(**values):
  """The flags of `command.SMALL` without sizes, which are what is tested here."""
  quick = {'coreset_method': 'random', 'ratio': 0.01, 'folds': 2}
  return command.flags(**{'resize': None, 'crop': None} | quick | values)


@pytest.fixture(scope='module')
def strips(tmp_path_factory):
  return _strips(tmp_path_factory.mktemp('strips') / 'good')


@pytest.fixture(scope='module')
def new(tmp_path_factory):
  return _save(tmp_path_factory.mktemp('new') / 'new', left=_strip(20, at=10), middle=_strip(21, at=190),
               right=_strip(22, at=360), good=_strip(23))


@pytest.fixture(scope='module')
def whole(strips, tmp_path_factory):
  out = tmp_path_factory.mktemp('banks') / 'whole'
  return out, command.done('fit', strips, '--out', out, *_flags())


@pytest.fixture(scope='module')
def cropped(strips, tmp_path_factory):
  out = tmp_path_factory.mktemp('banks') / 'cropped'
  return out, command.done('fit', strips, '--out', out, *_flags(crop=224))


def _fit(images, **arguments):
  """An inspector without thresholds, which take several times as long."""
  return pc.fit(images, **{'backbone': NAMED, 'detector': DETECTOR, 'false_alarm_rate': None} | arguments)


def _decisions(bank, images, out):
  """{stem: decision} of a prediction, and what it says."""
  told = command.done('predict', bank, images, '--out', out, '--no-overlays', '--maps=none')
  with open(out / 'predictions.csv', newline='') as f:
    return {Path(row['path']).stem: row for row in csv.DictReader(f)}, told


class TestWholeImages:

  def test_the_whole_is_the_default_of_the_command(self, whole):
    out, told = whole
    assert 'the whole of each image is inspected, at 896 x 224 pixels' in told and 'not inspected' not in told
    description = store.restore(out).description
    assert description.preprocessing == Preprocessing(resize=(224, 896), crop=())
    assert description.image_size == (224, 896) and description.original_size == (400, 100)

  def test_and_of_python(self, strips, whole, recwarn):
    inspector = _fit(strips)
    assert inspector.model.description.preprocessing == store.restore(whole[0]).description.preprocessing
    assert inspector.model.description.original_size == (400, 100)
    assert not [w for w in recwarn if 'inspected' in str(w.message)]

  def test_defects_are_found_wherever_they_are(self, whole, new, tmp_path):
    found, told = _decisions(whole[0], new, tmp_path / 'out')
    assert {name: row['decision'] for name, row in found.items()} == {
        'left': 'anomalous', 'middle': 'anomalous', 'right': 'anomalous', 'good': 'good'}
    assert all(float(row['not_inspected']) == 0 for row in found.values()) and 'not inspected' not in told

  def test_what_a_crop_leaves_out_is_said_at_the_fit_and_at_each_prediction(self, cropped, new, tmp_path):
    out, told = cropped
    assert '81 % of each image is not inspected' in told
    assert store.restore(out).description.preprocessing == Preprocessing(resize=(256,), crop=(224,))
    found, told = _decisions(out, new, tmp_path / 'out')
    assert found['middle']['decision'] == 'anomalous' and found['left']['decision'] == 'good'
    assert told.count('81 % of each image of 400 x 100 pixels is not inspected') == 1
    assert all(float(row['not_inspected']) == pytest.approx(0.81, abs=0.01) for row in found.values())

  def test_python_warns_of_a_crop(self, strips):
    with pytest.warns(UserWarning, match='81 % of each image is not inspected'):
      inspector = _fit(strips, preprocessing=Preprocessing())
    finding = inspector.inspect(strips / 's0.png')
    assert finding.not_inspected == pytest.approx(0.81, abs=0.01)
    with pytest.warns(UserWarning, match='not inspected'):
      _fit(np.stack([np.asarray(_strip(i)) for i in range(4)]), preprocessing=Preprocessing())

  @pytest.mark.parametrize('flags, expected', [
      ({'resize': 64}, Preprocessing(resize=(64, 256), crop=())),
      ({'resize': 256, 'resize_side': 'long'}, Preprocessing((64, 256), 'long', crop=())),
      ({'resize': '64,128'}, Preprocessing(resize=(64, 128), crop=())),
      ({'resize': 'none'}, Preprocessing(resize=(), crop=())),
      ({'crop': 'none'}, Preprocessing(resize=(256, 1024), crop=())),
      ({'resize': 64, 'crop': 56}, Preprocessing(resize=(64,), crop=(56,))),
      ({'crop': 32}, Preprocessing(resize=(256,), crop=(32,))),
      ({'resize': 64, 'pad': '64,300'}, Preprocessing(resize=(64,), pad=(64, 300), crop=()))])
  def test_sizes_that_are_given(self, strips, tmp_path, flags, expected):
    command.done('fit', strips, '--out', tmp_path / 'bank', *_flags(folds=0, **flags))
    assert store.restore(tmp_path / 'bank').description.preprocessing == expected

  def test_long_images_are_seen_smaller_which_is_said(self):
    sizes = {'a': (3000, 300)}
    (line,) = image_sizes.at_fit(sizes, preprocess.whole_image(sizes.values()))
    assert 'at 1280 x 128 pixels, because they are longer than 4 : 1' in line
    (line,) = image_sizes.at_fit(sizes, Preprocessing(resize=(100, 1000), crop=()))
    assert 'at 1000 x 100 pixels;' in line

  def test_a_crop_that_fits_no_image_is_refused_as_before(self, strips, tmp_path):
    told = command.refused('fit', strips, '--out', tmp_path / 'bank', *_flags(crop=300))
    assert 'preprocess.crop=(300,) does not fit' in told


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
  folder = _strips(tmp_path_factory.mktemp('mixed') / 'good', 5, width=120, height=90)
  return _save(folder, larger=_strip(5, 160, 120), longer=_strip(6, 140, 90))


class TestSeveralSizes:

  def test_they_are_brought_to_one_grid(self, mixed, tmp_path):
    told = command.done('fit', mixed, '--out', tmp_path / 'bank', *_flags())
    assert '3 sizes of images are brought to one, 288 x 224 pixels' in told
    assert '1 of 7 images is squeezed, by up to 1.2 times: longer.png' in told
    description = store.restore(tmp_path / 'bank').description
    assert description.image_size == (224, 288) and description.original_size == (120, 90)
    assert description.num_images == 7

  def test_python_warns(self, mixed):
    with pytest.warns(UserWarning, match='3 sizes of images are brought to one') as told:
      inspector = _fit(mixed)
    assert inspector.image_size == (224, 288) and any('longer.png' in str(w.message) for w in told)

  def test_with_one_side_of_a_resize_too(self, mixed, tmp_path):
    command.done('fit', mixed, '--out', tmp_path / 'bank', *_flags(resize=60, folds=0))
    assert store.restore(tmp_path / 'bank').description.image_size == (60, 80)

  def test_another_shape_is_told_once_by_a_prediction(self, whole, tmp_path):
    folder = _save(tmp_path / 'new', a=_strip(7), b=_strip(8, 300, 150), c=_strip(9, 200, 200), d=_strip(10))
    found, told = _decisions(whole[0], folder, tmp_path / 'out')
    assert told.count('of another shape than the training images (400 x 100)') == 1 and 'b.png: the' in told
    assert all('another shape' in found[name]['note'] for name in 'bc')
    assert not any(found[name]['note'] for name in 'ad')
    finding = pc.load(whole[0]).inspect(folder / 'c.png')
    assert finding.note == (
        'the image is 200 x 200 pixels, of another shape than the training images (400 x 100)')
    assert finding.to_json()['note'] == finding.note


class TestOddSizes:

  @pytest.fixture
  def folder(self, tmp_path):
    folder = _strips(tmp_path / 'good', 8, width=120, height=90)
    return _save(folder, dot=Image.new('RGB', (1, 1)), thread=Image.new('RGB', (2000, 2)))

  def test_nothing_is_fitted_before_they_are_accepted(self, folder, tmp_path):
    out = tmp_path / 'bank'
    result = command.run('fit', folder, '--out', out, *_flags())
    assert result.code == 1 and not out.exists() and 'embed' not in result.out
    lines = result.err.splitlines()
    assert [line.partition('good/')[2].partition(':')[0] for line in lines[:2]] == ['dot.png', 'thread.png']
    assert '1 x 1 pixels' in lines[0] and '2000 x 2 pixels' in lines[1] and '120 x 90' in lines[0]
    assert lines[2].startswith('error: ') and '--accept dot.png,thread.png' in lines[2] and len(lines) == 3
    result = command.run('fit', folder, '--out', out, *_flags(), '--accept=dot.png')
    assert result.code == 1 and 'thread.png' in result.err and 'dot.png:' not in result.err

  @pytest.mark.parametrize('accept', ['all', 'dot.png,thread.png'])
  def test_accepted_they_are_fitted_on(self, folder, tmp_path, accept):
    command.done('fit', folder, '--out', tmp_path / 'bank', *_flags(folds=0), f'--accept={accept}')
    assert store.restore(tmp_path / 'bank').description.num_images == 10

  @pytest.mark.parametrize('name, told', [
      ('s0.png', 'dot.png'),  # which is not asked about: it accepts nothing that is
      ('s99.png', 's99.png')])
  def test_another_name_accepts_none(self, name, told, folder, tmp_path):
    result = command.run('fit', folder, '--out', tmp_path / 'bank', *_flags(), f'--accept={name}')
    assert result.code and told in result.err.splitlines()[-1] and not (tmp_path / 'bank').exists()

  def test_python(self, folder):
    with pytest.raises(NotAccepted) as error:
      _fit(folder)
    assert [image.name.rsplit('/', 1)[1] for image in error.value.images] == ['dot.png', 'thread.png']
    with pytest.warns(UserWarning, match='squeezed'):
      inspector = _fit(folder, accept='all')
    assert inspector.model.description.num_images == 10

  @pytest.mark.parametrize('sizes, expected', [
      ([(1024, 1024)] * 200 + [(1, 1), (20_000, 20)], [200, 201]),
      ([(1024, 1024)] * 2 + [(1, 1)], [2]),
      ([(1024, 1024)] * 100 + [(512, 512)] * 3, []),  # a copy of half the size
      ([(1024, 1024)] * 100 + [(500, 500)] * 3, [100, 101, 102]),
      ([(400, 300)] * 30 + [(300, 400)], [30]),  # turned on its side
      ([(400, 300)] * 30 + [(300, 400)] * 30, []),  # as many: both are usual
      ([(400, 300)] * 30 + [(380, 300), (410, 280)], []),
      # Each kind is rare, though they are many together.
      ([(320, 240)] * 10 + [(240, 320)] * 2 + [(160, 120), (1, 1), (20_000, 20)], [10, 11, 13, 14]),
      ([(320, 240)] * 10 + [(240, 320)] * 4 + [(1, 1)], [14]), ([(40, 30), (400, 300), (800, 100)], [0, 2]),
      ([(400 + i, 300 + i) for i in range(40)] + [(40, 30)], [40]),
      ([(4, 4), (400, 300)], []), ([(4, 4)], []), ([], [])])
  def test_rare_and_far_is_odd(self, sizes, expected):
    found = image_sizes.odd({str(i): size for i, size in enumerate(sizes)})
    assert [int(image.name) for image in found] == expected

  def test_beside_a_known_size_all_that_are_far_are_odd(self):
    sizes = {'a': (400, 300), 'b': (1, 1), 'c': (2, 2)}
    assert [image.name for image in image_sizes.odd(sizes, (400, 300))] == ['b', 'c']


class TestOneImage:

  def test_it_is_refused_before_the_work_with_what_it_allows(self, tmp_path):
    folder = _strips(tmp_path / 'good', 1)
    result = command.run('fit', folder, '--out', tmp_path / 'bank', *_flags())
    assert result.code == 1 and result.err.startswith('error: One image') and not result.out
    assert '--folds 0' in result.err and '--threshold' in result.err and not (tmp_path / 'bank').exists()
    with pytest.raises(ValueError, match='One image.*false_alarm_rate=None'):
      pc.fit(folder, backbone='nowhere:at_all')  # no network is made

  def test_one_among_unreadable_ones(self, tmp_path):
    folder = _strips(tmp_path / 'good', 1)
    (folder / 'text.png').write_text('no image')
    result = command.run('fit', folder, '--out', tmp_path / 'bank', *_flags())
    assert result.code == 1 and 'One image of 2 can be read' in result.err and 'embed' not in result.out

  def test_what_it_allows(self, tmp_path, strips):
    folder, bank = _strips(tmp_path / 'good', 1), tmp_path / 'bank'
    command.done('fit', folder, '--out', bank, *_flags(folds=0))
    found, told = _decisions(bank, strips, tmp_path / 'out')
    assert 'no threshold' in told and all(row['score'] and not row['decision'] for row in found.values())
    assert _fit(folder).calibration is None


class TestSizesOfFiles:

  def test_upright_and_without_what_cannot_be_read(self, tmp_path):
    folder = _save(tmp_path / 'images', plain=_strip(0, 40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    _strip(0, 40, 30).save(folder / 'turned.jpg', exif=exif)
    (folder / 'text.png').write_text('no image')
    names = 'plain.png', 'turned.jpg', 'text.png', 'none'
    found = image_sizes.of_files([str(folder / name) for name in names])
    assert {path.rsplit('/', 1)[1]: size for path, size in found.items()} == {
        'plain.png': (40, 30), 'turned.jpg': (30, 40)}
    for path, size in found.items():
      assert decoding.read_image(path).size == size

  def test_each_page_has_a_size(self, tmp_path):
    path = tmp_path / 'stack.tif'
    _strip(0, 40, 30).save(path, save_all=True, append_images=[_strip(1, 50, 20)])
    assert image_sizes.of_files([f'{path}#1', f'{path}#2', f'{path}#3']) == {
        f'{path}#1': (40, 30), f'{path}#2': (50, 20)}
