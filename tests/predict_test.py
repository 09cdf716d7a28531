"""Own images in, answers and pictures out: where defects are reported to be, and what bad input gets."""

import csv
import datetime
import errno
import itertools
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchcore_jax import backbones, inspection
from patchcore_jax.backbones import checkpoints
from patchcore_jax.banks import editing, store
from patchcore_jax.cli import terminal
from patchcore_jax.data import placement, preprocess
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import PatchCore, Run
from patchcore_jax.inspection import colours
from patchcore_jax.report import answers, overlay, prediction_run, predictions
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing
from tests import conftest

DETECTOR = PatchCore(0.25, EmbeddingSpec('mean'), CoresetSpec('random'))
# All give 128 x 128 pixels, so that one program serves them: compiling is most of the time here.
CROP = Preprocessing(resize=(160,), crop=(128,))
PAD = Preprocessing(resize=(128,), resize_side='long', pad=(128,), crop=())
NO_CROP = Preprocessing(resize=(128, 128), crop=())
SIZES = [(700, 500), (300, 900)]  # width, height


def _part(size, seed, defect=None):
  """A striped part; the defect, (left, top, right, bottom), is brighter."""
  (width, height), rng = size, np.random.default_rng(seed)
  x = np.arange(width)[None, :, None] + 10 * (seed % 4)
  pixels = 120 + 40 * np.sin(x / 12) + rng.normal(0, 3, (height, width, 3))
  if defect:
    left, top, right, bottom = defect
    pixels[top:bottom, left:right] += 80
  return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _fit(path, preprocessing, sizes=SIZES, calibrated=True, pictures=True):
  """A bank of good parts at `path`; thresholds from as many others."""
  backbone = backbones.create(checkpoints.BUILT_IN)

  def load(first):
    return np.stack([
        np.asarray(preprocess.transform(_part(size, i), preprocessing))
        for i in range(first, first + 8 // len(sizes)) for size in sizes])

  images = load(0)
  data = ArrayData(images, 8, [f'good/{i}.png' for i in range(len(images))])
  bank = DETECTOR.fit(data, (backbone,), Run(keep_images=pictures))
  bank = bank.with_description(preprocessing=preprocessing, category='part')
  if calibrated:
    scores = inspection.scorer(inspection.of_model(bank), 8)(load(100))
    bank = editing.calibrate(bank, scores.image, scores.map.max((1, 2)), false_alarm_rate=0.15)
  store.save(path, bank)
  return str(path)


@pytest.fixture(scope='module')
def bank(tmp_path_factory):
  return _fit(tmp_path_factory.mktemp('banks') / 'crop', CROP)


@pytest.fixture(scope='module')
def plain_bank(tmp_path_factory):
  """Without thresholds, and without pictures."""
  return _fit(tmp_path_factory.mktemp('banks') / 'plain', CROP, calibrated=False, pictures=False)


@pytest.fixture
def parts(tmp_path):
  """A good part, and two of one name of which one is defective."""
  folder = tmp_path / 'parts'
  for name, seed, defect in (
      ('a/1.png', 0, None), ('b/1.png', 200, (350, 200, 420, 260)), ('b/2.jpg', 1, None)):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    _part(SIZES[0], seed, defect).save(folder / name, quality=95)
  return folder


def _run(bank, images, out, **kwargs):
  options = prediction_run.Options(bank, str(images), str(out), **({'maps': 'none'} | kwargs))
  return prediction_run.run(options, say=terminal.say)


def _rows(out):
  return [json.loads(line) for line in (Path(out) / 'predictions.jsonl').read_text().splitlines()]


def _files(folder):
  return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())


class TestPlaces:
  """A defect at known pixels lies inside of the reported box."""

  def _check(self, bank, sizes, tmp_path, preprocessing):
    defects, folder = {}, tmp_path / 'defective'
    folder.mkdir()
    for (width, height), (x, y) in itertools.product(sizes, [(0.55, 0.4), (0.35, 0.5)]):
      left, top = round(x * width), round(y * height)
      name = f'{width}-{x}.png'
      defects[name] = left, top, left + 70, top + 60
      _part((width, height), 300, defects[name]).save(folder / name)
    _run(bank, folder, tmp_path / 'out', maps='npy')
    for row in _rows(tmp_path / 'out'):
      left, top, right, bottom = defects[Path(row['path']).name]
      box = row['box']
      assert box[0] <= left and box[1] <= top and box[2] >= right and box[3] >= bottom, row
      width, height = row['image_size']
      place = placement.placement(height, width, preprocessing)
      # The network looks about 25 of its pixels far, and the blur spreads that by a few more.
      reach = 40 * max(place.scale)
      assert left - box[0] < reach and box[2] - right < reach and top - box[1] < reach
      x, y = row['centroid']
      assert left < x < right and top < y < bottom and row['decision'] == 'anomalous'
      patch = row['patch_box']
      px, py = (patch[0] + patch[2]) / 2, (patch[1] + patch[3]) / 2
      slack = 8 * max(place.scale)
      assert left - slack < px < right + slack and top - slack < py < bottom + slack
      values = np.load(tmp_path / 'out' / row['map'])
      assert values.shape == (height, width) and values.dtype == np.float32
      peak_y, peak_x = np.unravel_index(np.nanargmax(values), values.shape)
      assert left <= peak_x < right and top <= peak_y < bottom
      assert np.isnan(values).any() == bool(preprocessing.crop)

  def test_with_a_crop(self, bank, tmp_path):
    self._check(bank, SIZES, tmp_path, CROP)

  @pytest.mark.parametrize('preprocessing', [PAD, NO_CROP], ids=['padded', 'not cropped'])
  def test_without_a_crop(self, preprocessing, tmp_path):
    self._check(_fit(tmp_path / 'bank', preprocessing), SIZES, tmp_path, preprocessing)

  @pytest.mark.slow
  @pytest.mark.parametrize('size', SIZES)
  def test_not_square_and_not_cropped(self, size, tmp_path):
    preprocessing = Preprocessing(resize=(128,), crop=())
    self._check(_fit(tmp_path / 'bank', preprocessing, [size]), [size], tmp_path, preprocessing)


class TestRun:

  def test_tables_pictures_and_report(self, bank, parts, tmp_path, capsys):
    out = tmp_path / 'out'
    summary = _run(bank, parts / '**/*.*', out, maps='tif', why=True)
    assert summary[:3] == (3, 1, 0) and summary.seconds > 0 and not summary.stopped
    names = ['a/1', 'b/1', 'b/2']
    assert _files(out) == sorted([
        'predictions.csv', 'predictions.jsonl', 'report.html', *(f'maps/{n}.tif' for n in names),
        *(f'{kind}/{n}.png' for kind in ('overlays', 'why') for n in names)])
    said = capsys.readouterr().out
    assert '[2/3]' in said and 'ANOMALOUS' in said and 'images/s, 1 anomalous' in said
    with (out / 'predictions.csv').open(newline='') as f:
      rows = list(csv.DictReader(f))
    assert [r['decision'] for r in rows] == ['good', 'anomalous', 'good']
    assert rows[1]['path'] == str(parts / 'b/1.png') and rows[1]['overlay'] == 'overlays/b/1.png'
    assert float(rows[1]['calibrated_score']) > 0.5 > float(rows[0]['calibrated_score'])
    assert float(rows[1]['p_value']) == pytest.approx(1 / 9)  # above all of eight good images
    page = (out / 'report.html').read_text()
    assert 'b/1.png' in page and 'of good images reach it' in page and 'good/' in page

  def test_overlays_are_of_the_whole_image_with_fixed_colours(self, bank, parts, tmp_path):
    _run(bank, parts / 'b/1.png', tmp_path / 'out', maps='npy')
    image = np.asarray(Image.open(parts / 'b/1.png'))
    found = np.asarray(Image.open(tmp_path / 'out/overlays/1.png'))
    values = np.load(tmp_path / 'out/maps/1.npy')
    limits = colours.limits(inspection.load(bank))
    expected = overlay.outlined(
        overlay.overlay(image, values, *limits), *(r['box'] for r in _rows(tmp_path / 'out')[0]['regions']))
    np.testing.assert_array_equal(found, expected)
    _run(bank, parts / 'b/1.png', tmp_path / 'wide', scale=(1e6, 2e6))
    plain = np.asarray(Image.open(tmp_path / 'wide/overlays/1.png'))
    np.testing.assert_array_equal(plain[200:260, 350:420], image[200:260, 350:420])

  def test_a_second_run_replaces_the_first(self, bank, parts, tmp_path):
    _run(bank, parts / '**/*.*', tmp_path / 'out', maps='npy', why=True)
    _run(bank, parts / 'a', tmp_path / 'out', overlays=False)
    assert _files(tmp_path / 'out') == ['predictions.csv', 'predictions.jsonl', 'report.html']
    assert len(_rows(tmp_path / 'out')) == 1

  def test_own_pictures_are_not_scored(self, bank, parts, tmp_path):
    for _ in range(2):
      assert _run(bank, parts / '**/*.png', parts, maps='tif', why=True).images == 2
    with pytest.raises(ValueError, match='only pictures that an earlier run wrote'):
      _run(bank, parts / 'overlays/**/*.png', parts)

  def test_a_folder_means_all_images_below_it(self, bank, parts, tmp_path, capsys):
    (parts / 'b').rename(parts / 'bent')
    (parts / 'a').rename(parts / 'good')
    (parts / 'clip.avi').touch()
    (parts / '.hidden').mkdir()
    _part(SIZES[0], 0).save(parts / '.hidden/1.png')
    assert _run(bank, parts, tmp_path / 'out')[:3] == (3, 1, 0)
    said = capsys.readouterr().out
    assert 'images of 2 folders: bent (2), good (1)' in said
    for line in ('not read, hidden: 1 (.hidden/1.png)',
                 'not read, because of their names: 1 .avi video (clip.avi)'):
      assert said.count(line) == 2  # before the images and after them
      assert line[1:] in (tmp_path / 'out/report.html').read_text()

  def test_pictures_of_any_earlier_run_are_not_scored(self, bank, parts, tmp_path, capsys):
    _run(bank, parts, parts / 'first', maps='tif', why=True)
    assert _run(bank, parts, tmp_path / 'out').images == 3
    assert 'pictures of an earlier prediction: 9 (first/maps/a/1.tif, ' in capsys.readouterr().out

  def test_images_of_one_stem_have_their_own_pictures(self, bank, tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    for i, name in enumerate(('a.png', 'a.jpg', 'a.bmp', 'a.png.png')):
      _part((200 + 8 * i, 160), i).save(folder / name)
    _run(bank, folder, tmp_path / 'out', maps='npy', why=True)
    for row in _rows(tmp_path / 'out'):
      shape = tuple(reversed(row['image_size']))
      assert np.load(tmp_path / 'out' / row['map']).shape == shape
      assert np.asarray(Image.open(tmp_path / 'out' / row['overlay'])).shape[:2] == shape
    assert [row['overlay'] for row in _rows(tmp_path / 'out')] == [
        f'overlays/a{s}.png' for s in ('', '.jpg', '.2', '.png')]

  def test_rows_carry_a_time(self, bank, parts, tmp_path):
    before = datetime.datetime.now(datetime.UTC)
    _run(bank, parts, tmp_path / 'out')
    times = [datetime.datetime.fromisoformat(row['time']) for row in _rows(tmp_path / 'out')]
    assert before - datetime.timedelta(seconds=1) < times[0] <= times[1] <= times[2]
    with (tmp_path / 'out/predictions.csv').open(newline='') as f:
      assert [datetime.datetime.fromisoformat(row['time']) for row in csv.DictReader(f)] == times

  def test_an_image_without_an_answer_is_an_error(self, bank, parts, tmp_path, monkeypatch):
    real = prediction_run.batched
    monkeypatch.setattr(prediction_run, 'batched', lambda items, n: (batch[1:] for batch in real(items, n)))
    with pytest.raises(prediction_run.Unanswered, match='1 images have no answer: .*a/1.png.* It lies in'):
      _run(bank, parts, tmp_path / 'out')
    assert not (tmp_path / 'out/report.html').exists()

  def test_without_thresholds_scores_only(self, plain_bank, parts, tmp_path, capsys):
    _run(plain_bank, parts / '**/*.*', tmp_path / 'out', why=True)
    rows = _rows(tmp_path / 'out')
    assert [(r['decision'], r['p_value'], r['calibrated_score']) for r in rows] == [(None,) * 3] * 3
    assert rows[1]['score'] > 2 * rows[0]['score']
    said = capsys.readouterr().out
    assert said.count('no threshold') == 1 and said.count('holds no pictures') == 1
    assert 'anomalous,' not in said

  @pytest.mark.parametrize('which', ['bank', 'plain_bank'])
  def test_own_threshold(self, which, parts, tmp_path, request):
    bank = request.getfixturevalue(which)
    _run(bank, parts / '**/*.*', tmp_path / 'out', threshold=1e-6)
    rows = _rows(tmp_path / 'out')
    assert [r['decision'] for r in rows] == ['anomalous'] * 3
    assert 'given threshold' in (tmp_path / 'out/report.html').read_text()
    if which == 'bank':
      assert min(r['calibrated_score'] for r in rows) > 0.5

  def test_memory_does_not_grow_with_the_images(self, bank, tmp_path, monkeypatch):
    """At most a few of 80 images are held at a time; the report shows those that tell most."""
    monkeypatch.setattr(answers, '_GALLERY', 4)
    folder, alive, most = tmp_path / 'many', set(), []
    folder.mkdir()
    for i in range(80):
      _part((220, 180), i).save(folder / f'{i:02}.png')
    read = prediction_run.read

    class Tracked(Image.Image):
      def __del__(self):
        alive.discard(id(self))

    def counted(*arguments):
      loaded = read(*arguments)
      loaded.image.__class__ = Tracked
      alive.add(id(loaded.image))
      most.append(len(alive))
      return loaded

    monkeypatch.setattr(prediction_run, 'read', counted)
    assert _run(bank, folder, tmp_path / 'out', overlays=False).images == 80
    # Read ahead, being scored and being drawn: a batch each, and one that waits in between.
    assert max(most) <= 8 * 4 + 2
    page = (tmp_path / 'out/report.html').read_text()
    assert sum(f'"{i:02}.png"' in page for i in range(80)) == 4


class TestBadInput:

  def test_unreadable_images_are_rows_and_the_others_are_scored(self, bank, tmp_path, capsys):
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / 'a_empty.png').write_bytes(b'')
    (folder / 'b_text.png').write_text('hello')
    _part(SIZES[0], 1).save(folder / 'c_good.png')
    (folder / 'd_half.png').write_bytes((folder / 'c_good.png').read_bytes()[:9000])
    (folder / 'e_bomb.png').write_bytes(_bomb())
    (folder / 'f_folder.png').mkdir()  # a folder, whatever it is called
    (folder / 'f_link.png').symlink_to('nowhere')
    Image.fromarray(np.zeros((5, 5), np.float32)).save(folder / 'g_floats.tif')
    Image.fromarray(np.zeros((1, 2_000_000), np.uint8)).save(folder / 'h_thread.png')
    _part(SIZES[0], 2).save(folder / 'i_good.png')
    summary = _run(bank, folder, tmp_path / 'out', why=True)
    assert summary[:3] == (2, 0, 7)
    rows = {Path(r['path']).name: r for r in _rows(tmp_path / 'out')}
    assert sorted(rows) == sorted(p.name for p in folder.iterdir() if not p.is_dir())
    for name, words in {
        'a_empty.png': 'not a known image format', 'b_text.png': 'not a known image format',
        'd_half.png': 'damaged or truncated', 'e_bomb.png': 'is refused', 'f_link.png': 'No such image',
        'g_floats.tif': 'range is not known', 'h_thread.png': 'million pixels'}.items():
      assert words in rows[name]['error'] and name in rows[name]['error']
      assert rows[name]['score'] is None
    assert rows['c_good.png']['decision'] == 'good'
    said = capsys.readouterr().out
    assert '[9/9]' in said and '7 could not be scored' in said and 'not scored: ' in said
    assert '7 files could not be scored' in (tmp_path / 'out/report.html').read_text()

  def test_odd_images_are_scored(self, bank, tmp_path):
    folder, gray = tmp_path / 'in', np.asarray(_part((200, 160), 3).convert('L'))
    folder.mkdir()
    Image.fromarray(np.uint8([[7]])).save(folder / '1x1.png')
    Image.fromarray(np.tile(gray[:20], (1, 100))).save(folder / '20000x20.png')
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / '16bit.png')
    _part((200, 160), 3).convert('CMYK').save(folder / 'cmyk.jpg')
    frames = [_part((200, 160), i) for i in range(3)]
    frames[0].save(folder / 'animated.png', save_all=True, append_images=frames[1:])
    frames[0].save(folder / 'animated.webp', save_all=True, append_images=frames[1:])
    assert _run(bank, folder, tmp_path / 'out', maps='npy', why=True)[:3:2] == (10, 0)
    for row in _rows(tmp_path / 'out'):
      shape = tuple(reversed(row['image_size']))
      assert math.isfinite(row['score'])
      assert np.load(tmp_path / 'out' / row['map']).shape == shape
      assert np.asarray(Image.open(tmp_path / 'out' / row['overlay'])).shape == (*shape, 3)
      left, top, right, bottom = row['box']
      assert 0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0]

  @pytest.mark.parametrize('suffix', ['tif', 'gif'])
  def test_each_page_is_an_image(self, suffix, bank, tmp_path, capsys):
    pages = [_part(SIZES[0], 0), _part(SIZES[0], 200, (350, 200, 420, 260)), _part(SIZES[0], 1)]
    if suffix == 'gif':
      pages = [page.quantize() for page in pages]
    pages[0].save(tmp_path / f'a.{suffix}', save_all=True, append_images=pages[1:])
    for what in (tmp_path, tmp_path / f'a.{suffix}'):
      assert _run(bank, what, tmp_path / 'out').images == 3
      rows = _rows(tmp_path / 'out')
      assert [Path(row['path']).name for row in rows] == [f'a.{suffix}#{i}' for i in (1, 2, 3)]
      assert rows[1]['decision'] == 'anomalous' and rows[1]['overlay'] == 'overlays/a#2.png'
    assert f'a.{suffix} has 3' in capsys.readouterr().out
    assert _run(bank, tmp_path / f'a.{suffix}#2', tmp_path / 'one')[:2] == (1, 1)

  def test_images_of_another_size_than_the_bank(self, tmp_path):
    bank = _fit(tmp_path / 'bank', NO_CROP, [SIZES[0]])
    # As if it had been made of square images.
    store.save(tmp_path / 'square', store.restore(bank).with_description(
        preprocessing=Preprocessing(resize=(128,), crop=())))
    _part((128, 128), 1).save(tmp_path / 'a.png')
    _part((190, 128), 1).save(tmp_path / 'b.png')
    assert _run(str(tmp_path / 'square'), tmp_path / '*.png', tmp_path / 'out')[:3:2] == (1, 1)
    assert '190 x 128' in _rows(tmp_path / 'out')[1]['error']

  def test_nothing_to_score(self, bank, tmp_path):
    (tmp_path / 'empty').mkdir()
    for images, words in (
        ('empty', 'No images in'), ('*.png', 'matches no image'), ('none', 'does not exist')):
      with pytest.raises(ValueError, match=words):
        _run(bank, tmp_path / images, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()

  def test_folders_that_may_not_be_read(self, bank, parts, tmp_path, monkeypatch):
    """Permissions do not bind every user, so they are played."""
    scandir, iterdir = os.scandir, Path.iterdir

    def denied(path, real):
      if not isinstance(path, int) and os.path.basename(os.fspath(path)) == 'b':
        raise PermissionError(errno.EACCES, 'Permission denied', os.fspath(path))
      return real(path)

    monkeypatch.setattr(os, 'scandir', lambda path: denied(path, scandir))
    monkeypatch.setattr(Path, 'iterdir', lambda path: denied(path, iterdir))
    assert _run(bank, parts / '**/*.png', tmp_path / 'out')[:3:2] == (1, 1)
    assert 'permission denied' in _rows(tmp_path / 'out')[0]['error']
    with pytest.raises(OSError, match='Permission denied'):
      _run(bank, parts / 'b', tmp_path / 'out')

  def test_a_folder_that_cannot_be_written(self, bank, parts, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='is a file'):
      _run(bank, parts / 'a', tmp_path / 'file')
    with pytest.raises(OSError, match='Cannot write to .*file/out: .*choose another --out'):
      _run(bank, parts / 'a', tmp_path / 'file/out')

  def test_two_runs_into_one_folder(self, bank, parts, tmp_path):
    out = tmp_path / 'out'
    with predictions.claimed(out):
      for watch in (False, True):
        with pytest.raises(ValueError, match='Another prediction writes to .*out: wait .* another --out'):
          _run(bank, parts / 'a', out, watch=watch)
    prepared = prediction_run.prepare(options := prediction_run.Options(bank, str(parts), str(out)))
    with predictions.claimed(out), pytest.raises(ValueError, match='Another prediction'):
      prediction_run.run(options, prepared)  # the other began meanwhile
    assert _run(bank, parts / 'a', out).images == 1

  def test_a_folder_that_goes_away_meanwhile(self, bank, parts, tmp_path, monkeypatch):
    def gone(path, image):
      raise FileNotFoundError(errno.ENOENT, 'No such file or directory')

    monkeypatch.setattr(answers.predictions, 'write_png', gone)
    with pytest.raises(OSError, match='It was moved or removed meanwhile. .* another --out') as error:
      _run(bank, parts / 'a', tmp_path / 'out')
    assert 'permissions' not in str(error.value)

  def test_a_full_disk_keeps_what_was_there_and_what_was_done(self, bank, parts, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    _run(bank, parts / 'a', out)
    before, real = _files(out), answers.predictions.write_png

    def full(path, image):
      if path.name == '2.png':
        raise OSError(errno.ENOSPC, 'No space left on device')
      real(path, image)

    monkeypatch.setattr(answers.predictions, 'write_png', full)
    with pytest.raises(OSError, match='No space left on device. Make room .* lies in .*unfinished') as error:
      _run(bank, parts / '**/*.*', out)
    assert str(error.value).count('\n') == 0
    assert [f for f in _files(out) if 'unfinished' not in f] == before and len(_rows(out)) == 1
    assert len(_rows(out / 'predictions.unfinished')) == 2
    monkeypatch.undo()
    _run(bank, parts / 'b', out)
    assert not (out / 'predictions.unfinished').exists()

  def test_a_name_that_does_not_fit_is_a_matter_of_one_image(self, bank, tmp_path, monkeypatch):
    folder, real = tmp_path / 'in', answers.predictions.write_png
    folder.mkdir()
    _part((200, 160), 1).save(folder / 'a.png')
    _part((200, 160), 1).save(folder / ('b' * 251 + '.png'))
    assert _run(bank, folder, tmp_path / 'out')[:3:2] == (2, 0)
    assert all((tmp_path / 'out' / row['overlay']).exists() for row in _rows(tmp_path / 'out'))

    def refused(path, image):
      if path.name == 'a.png':
        raise OSError(errno.ENAMETOOLONG, 'File name too long')
      real(path, image)

    monkeypatch.setattr(answers.predictions, 'write_png', refused)
    assert _run(bank, folder, tmp_path / 'out')[:3:2] == (1, 1)
    assert 'name too long' in _rows(tmp_path / 'out')[0]['error']

  def test_names_that_are_no_utf_8(self, bank, tmp_path, capsys):
    folder = tmp_path / 'in'
    folder.mkdir()
    name = os.fsdecode(b'a\xff.png')
    _part((200, 160), 1).save(folder / name)
    assert _run(bank, folder, tmp_path / 'out', maps='npy', why=True).images == 1
    assert (tmp_path / 'out/overlays' / name).exists() and r'a\udcff.png' in capsys.readouterr().out

  def test_names_do_not_break_lines(self, bank, tmp_path, capsys):
    folder = tmp_path / 'in'
    folder.mkdir()
    _part((200, 160), 1).save(folder / 'a\nb\x1b[31m.png')
    (folder / 'c\r.png').write_text('text')
    (folder / 'd\n.avi').write_text('text')
    assert _run(bank, folder, tmp_path / 'out')[:3:2] == (1, 1)
    said = capsys.readouterr().out
    assert r'a\nb\x1b[31m.png' in said and r'c\r.png' in said and r'd\n.avi' in said
    begins = '[', '/', 'not read', '49 %', '1 image in', 'see'
    assert all(line.startswith(begins) for line in said.splitlines())
    assert Path(_rows(tmp_path / 'out')[0]['path']).name == 'a\nb\x1b[31m.png'
    assert [p.name for p in (tmp_path / 'out/overlays').iterdir()] == ['a_b_[31m.png']

  def test_no_bank(self, parts, tmp_path):
    with pytest.raises(ValueError, match='No model at'):
      _run(str(tmp_path / 'none'), parts / 'a', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()

  @pytest.mark.parametrize('kwargs, words', [
      ({'maps': 'png'}, 'npy, tif, none'), ({'threshold': math.inf}, 'a number'),
      ({'scale': (2.0, 1.0)}, 'larger'),
      ({'batch_size': -1}, '0 or more'), ({'watch_seconds': 3.0}, 'Set watch too'),
      ({'images': ''}, 'images is empty')])
  def test_bad_options(self, kwargs, words):
    with pytest.raises(ValueError, match=words):
      prediction_run.Options(**({'bank': 'b', 'images': 'i', 'out': 'o'} | kwargs))


class TestWatch:

  def test_images_are_answered_as_they_come(self, bank, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_run, '_REPORT_SECONDS', 0.1)
    folder, out, stop = tmp_path / 'in', tmp_path / 'out', threading.Event()
    folder.mkdir()
    _part(SIZES[0], 1).save(folder / '1.png')
    options = prediction_run.Options(bank, str(folder), str(out), watch=True, maps='none', batch_size=8)
    results = []
    thread = threading.Thread(target=lambda: results.append(prediction_run.run(options, stop=stop)))
    thread.start()
    try:
      _wait(lambda: out.exists() and (out / 'predictions.jsonl').exists() and len(_rows(out)) == 1)
      data = tmp_path / 'new.png'
      _part(SIZES[0], 200, (350, 200, 420, 260)).save(data)
      data, arriving = data.read_bytes(), folder / '2.png'
      for end in range(0, len(data), len(data) // 4):  # slower than files are looked at
        arriving.write_bytes(data[:end + len(data) // 4])
        time.sleep(0.25)
      (folder / '3.png').write_text('text')
      _wait(lambda: len(_rows(out)) == 3)
      _wait(lambda: (out / 'report.html').exists() and '2.png' in (out / 'report.html').read_text())
    finally:
      stop.set()
      thread.join()
    assert results[0][:3] == (2, 1, 1) and not results[0].stopped
    rows = {Path(r['path']).name: r for r in _rows(out)}
    assert rows['2.png']['decision'] == 'anomalous' and 'not a known' in rows['3.png']['error']
    assert (out / 'report.html').exists() and (out / rows['2.png']['overlay']).exists()
    assert not (out / 'predictions.unfinished').exists()

  def test_a_file_that_is_replaced_keeps_what_was_found_before(self, bank, tmp_path):
    folder, out, stop = tmp_path / 'in', tmp_path / 'out', threading.Event()
    (folder / 'cam1').mkdir(parents=True)
    image = folder / 'cam1/1.png'
    _part(SIZES[0], 1).save(image)
    options = prediction_run.Options(bank, str(folder), str(out), watch=True, maps='npy')
    thread = threading.Thread(target=lambda: prediction_run.run(options, stop=stop))
    thread.start()
    try:
      for i, defect in enumerate(((350, 200, 420, 260), None), 1):
        _wait(lambda i=i: (out / 'predictions.jsonl').exists() and len(_rows(out)) == i)
        _part(SIZES[0], 200 + i, defect).save(tmp_path / 'new.png')
        (tmp_path / 'new.png').replace(image)
      _wait(lambda: len(_rows(out)) == 3)
    finally:
      stop.set()
      thread.join()
    rows = _rows(out)
    assert [row['decision'] for row in rows] == ['good', 'anomalous', 'good']
    assert [row['overlay'] for row in rows] == [f'overlays/cam1/1{n}.png' for n in ('', '.2', '.3')]
    maps = [np.load(out / row['map']) for row in rows]
    assert np.nanmax(maps[1]) > 2 * max(np.nanmax(maps[0]), np.nanmax(maps[2]))
    assert len({row['time'] for row in rows}) == 3

  def test_what_arrived_is_answered_when_it_is_stopped(self, bank, tmp_path, monkeypatch):
    folder, stop = tmp_path / 'in', threading.Event()
    folder.mkdir()
    for i in range(6):
      _part((200, 160), i).save(folder / f'{i}.png')
    monkeypatch.setattr(prediction_run, 'read', _after(4, stop.set, prediction_run.read))
    options = prediction_run.Options(bank, str(folder), str(tmp_path / 'out'), watch=True, maps='none')
    said = []
    summary = prediction_run.run(options, say=lambda line, loud=False: said.append(line), stop=stop)
    left = [line for line in said if 'arrived and not been looked at' in line]
    assert summary.images == len(_rows(tmp_path / 'out')) >= 4
    assert bool(left) == (summary.images < 6) and (not left or left[0].startswith(str(6 - summary.images)))

  def test_a_folder_that_is_not_there_costs_nothing(self, bank, parts, tmp_path):
    _run(bank, parts / 'a', tmp_path / 'out')
    with pytest.raises(ValueError, match='none is no folder'):
      _run(bank, tmp_path / 'none', tmp_path / 'out', watch=True)
    assert len(_rows(tmp_path / 'out')) == 1

  def test_ends_by_itself(self, bank, tmp_path):
    (tmp_path / 'in').mkdir()
    began = time.monotonic()
    summary = _run(bank, tmp_path / 'in', tmp_path / 'out', watch=True, watch_seconds=0.5, batch_size=8)
    assert summary == (0, 0, 0, summary.seconds, False)
    assert time.monotonic() - began < 20 and (tmp_path / 'out/report.html').exists()


class TestStop:

  def test_what_was_done_is_kept_aside(self, bank, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / 'in', tmp_path / 'out'
    folder.mkdir()
    for i in range(30):
      _part((200, 160), i).save(folder / f'{i:02}.png')
    _run(bank, folder / '00.png', out)
    stop = threading.Event()
    monkeypatch.setattr(prediction_run, 'read', _after(10, stop.set, prediction_run.read))
    options = prediction_run.Options(bank, str(folder), str(out), batch_size=8, maps='none')
    summary = prediction_run.run(options, say=terminal.say, stop=stop)
    assert summary.stopped and 0 < summary.images < 30
    assert len(_rows(out)) == 1 and len(_rows(out / 'predictions.unfinished')) == summary.images
    assert f'stopped: {summary.images} of 30' in capsys.readouterr().out


class TestMain:

  def test_as_a_user_runs_it(self, bank, parts, tmp_path):
    """One process: unreadable files, exit code, and Ctrl-C while it waits for images."""
    (parts / 'a' / '2.png').write_text('text')
    command = [sys.executable, '-m', 'patchcore_jax', 'predict', bank, parts / 'a', '--out', tmp_path / 'out',
               '--watch', '--maps', 'tif', '--threshold', '1e-6']
    with subprocess.Popen(command, cwd=conftest.ROOT, stdout=subprocess.PIPE, text=True) as process:
      lines = []
      for line in process.stdout:
        lines.append(line)
        if len([x for x in lines if '.png' in x]) == 2:
          process.send_signal(signal.SIGINT)
          break
      rest, _ = process.communicate(timeout=60)
    assert process.returncode == 2, rest
    assert '1 image in' in rest and '1 anomalous; 1 could not be scored' in rest
    assert len(_rows(tmp_path / 'out')) == 2 and (tmp_path / 'out/report.html').exists()


class TestInterrupted:
  """Ctrl-C in a process of its own: an exit code, one line, and nothing half-written."""

  def _interrupted(self, bank, folder, out, when, *more):
    """(exit code, output) of a run that is interrupted after seconds, or at a line with a text."""
    command = [sys.executable, '-m', 'patchcore_jax', 'predict', bank, folder, '--out', out, *more]
    with subprocess.Popen(
        command, cwd=conftest.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {'PYTHONUNBUFFERED': '1'}) as process:
      said = ''
      if isinstance(when, float):
        time.sleep(when)
      else:
        for line in process.stdout:
          said += line
          if when in line:
            break
      process.send_signal(signal.SIGINT)
      said += process.communicate(timeout=60)[0]
    assert 'Traceback' not in said
    return process.returncode, said

  @pytest.fixture
  def many(self, tmp_path):
    folder = tmp_path / 'many'
    folder.mkdir()
    for i in range(60):
      _part((200, 160), i % 4).save(folder / f'{i:02}.png')
    return folder

  @pytest.mark.parametrize('seconds', [0.4, 1.0])
  def test_while_it_imports_and_compiles(self, bank, many, tmp_path, seconds):
    code, said = self._interrupted(bank, many, tmp_path / 'out', seconds, '--compilation-cache=off')
    assert code == 130 and 'interrupted. Nothing was written; the same command starts anew.' in said
    assert not (tmp_path / 'out').exists()

  def test_while_it_scores(self, bank, many, tmp_path):
    out = tmp_path / 'out'
    code, said = self._interrupted(bank, many, out, '[1/60]')
    done = len(_rows(out / 'predictions.unfinished'))
    assert code == 130 and f'stopped: {done} of 60' in said and 'starts anew' in said
    assert [p.name for p in out.iterdir()] == ['predictions.unfinished']

  def test_while_it_watches(self, bank, many, tmp_path):
    code, _ = self._interrupted(bank, many, tmp_path / 'out', 0.4, '--watch')
    assert code == 0 and not (tmp_path / 'out').exists()
    code, said = self._interrupted(bank, many, tmp_path / 'out', 'waiting for images', '--watch')
    assert code == 0 and 'see ' in said and (tmp_path / 'out/report.html').exists()


class TestCommand:
  """What is wrong is told at once, before anything slow is imported."""

  @pytest.mark.parametrize('arguments, code, words', [
      (['none', '.', '--out=x'], 1, 'No model at none: expected the folder that `patchcore fit` made'),
      ([__file__, '.', '--out=x'], 1, 'it is a file'),
      (['{model}', 'none', '--out=x'], 1, 'none does not exist: expected a folder of images'),
      (['{model}', 'none', '--out=x', '--watch'], 1, 'expected a folder in which images arrive'),
      (['.', '.'], 2, '--out'), (['.', '.', '--out=x', '--scale=3'], 2, 'two numbers'),
      (['.', '.', '--out=x', '--maps=png'], 2, 'npy'), (['.', '.', '--out=x', '--batch-size=0'], 2, 'x>=1')])
  def test_mistakes(self, arguments, code, words, tmp_path):
    (tmp_path / 'description').mkdir()  # as a model has
    arguments = [argument.format(model=tmp_path) for argument in arguments]
    result = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'patchcore_jax', 'predict', *arguments], cwd=conftest.ROOT,
        capture_output=True, text=True)
    said = [line for line in result.stderr.splitlines() if not line.startswith('import time:')]
    assert result.returncode == code and len(said) == 1 and words in said[0]
    assert ' jax' not in result.stderr and ' numpy' not in result.stderr

  @pytest.mark.parametrize('name', ['predict', 'serve', 'export'])
  def test_the_binaries_of_before_say_where_they_went(self, name):
    result = subprocess.run(
        [sys.executable, '-m', f'experiments.{name}', '--bank=x'], cwd=conftest.ROOT, capture_output=True,
        text=True)
    assert result.returncode == 2 and f'patchcore {name} BANK' in result.stderr


class TestBatched:

  def test_order_is_kept(self):
    items = [1, None, 2, 3, 4, None]
    assert list(prediction_run.batched(items, 2)) == [[1], [2, 3], [4]]
    assert [x for batch in prediction_run.batched(range(10), 3) for x in batch] == list(range(10))


class TestLimits:

  def test_of_a_bank_without_thresholds(self, plain_bank, bank):
    plain, full = inspection.load(plain_bank), inspection.load(bank)
    assert colours.limits(plain, 3.0) == (1.5, 6.0)
    rows = np.asarray(plain.model.arrays['embeddings'], np.float64)
    sample = rows[np.linspace(0, len(rows) - 1, 256).astype(int)]
    distances = np.sort(
        (sample ** 2).sum(1)[:, None] - 2 * sample @ rows.T + (rows ** 2).sum(1), axis=1)[:, 1]
    # float32 differences of squares.
    assert colours.limits(plain)[0] == pytest.approx(0.5 * np.median(distances), rel=1e-3)
    assert colours.limits(full)[1] == 2 * full.calibration.pixel_threshold
    assert colours.limits(full, 3.0) == colours.limits(full)


def _wait(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it did not come'
    time.sleep(0.05)


def _after(calls, action, function):
  """The function, which does something besides from the n-th call on."""
  count = itertools.count(1)

  def wrapped(*args):
    if next(count) >= calls:
      action()
    return function(*args)

  return wrapped


def _bomb():
  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  header = struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')
