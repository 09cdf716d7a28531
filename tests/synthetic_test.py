"""Tests of the built-in data set: determinism, exact masks, and how it is written to disk."""

import json
import multiprocessing
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.builtin import synthetic

DEFECTS = [(c, d) for c, subject in synthetic.SUBJECTS.items() for d in subject.defects]
SMALL = 'wood_veneer'  # the quickest to draw


@pytest.fixture
def few_images(monkeypatch):
  """Two training images and one test image of each kind, so that a category is written quickly."""
  subject = synthetic.SUBJECTS[SMALL]._replace(num_each=2, defects=('crack', 'stain'))
  monkeypatch.setitem(synthetic.SUBJECTS, SMALL, subject)
  monkeypatch.setattr(synthetic, 'NUM_TRAIN', 2)
  monkeypatch.setattr(synthetic, 'NUM_TEST', 5)
  return 7  # images


class TestImagesOf:

  @pytest.mark.parametrize('category', synthetic.CATEGORIES)
  def test_counts(self, category):
    images = synthetic.images_of(category)
    kinds = [(split, defect) for split, defect, _ in images]
    assert len(set(images)) == len(images) == 100
    assert kinds.count(('train', 'good')) == 60
    assert sum(split == 'test' for split, _ in kinds) == 40
    assert 15 <= kinds.count(('test', 'good')) <= 20
    assert len({defect for _, defect in kinds if defect != 'good'}) >= 3

  def test_unknown_category(self):
    with pytest.raises(ValueError, match="Unknown category 'bottle'.*gear, circuit_board"):
      synthetic.images_of('bottle')

  def test_no_two_images_share_their_dice(self):
    # The dice are seeded by a checksum of 32 bits; two equal ones would give twin images.
    seeds = {zlib.crc32(f'0/{c}/{s}/{d}/{n}/{use}'.encode()) for c in synthetic.CATEGORIES
             for s, d, n in synthetic.images_of(c) for use in ('part', 'flaw/0', 'grain')}
    assert len(seeds) == 400 * 3


class TestDraw:

  @pytest.mark.parametrize('category', synthetic.CATEGORIES)
  def test_deterministic(self, category):
    defect = synthetic.SUBJECTS[category].defects[0]
    first, second = (synthetic.draw(category, 'test', defect, 1) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    other, _ = synthetic.draw(category, 'test', defect, 1, seed=1)
    assert (first[0] != other).any()

  def test_the_same_in_another_process(self):
    # A hash of a string, say, would differ from process to process.
    code = ('import zlib; from patchcore_jax.builtin import synthetic; '
            'print(*(zlib.crc32(a.tobytes()) for a in synthetic.draw("gear", "test", "rust", 2)))')
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    here = [zlib.crc32(a.tobytes()) for a in synthetic.draw('gear', 'test', 'rust', 2)]
    assert [int(word) for word in run.stdout.split()] == here

  @pytest.mark.parametrize('category', synthetic.CATEGORIES)
  def test_good_images(self, category):
    pictures = []
    for split in ('train', 'test'):
      for index in range(3):
        image, mask = synthetic.draw(category, split, 'good', index)
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape == (*synthetic.SUBJECTS[category].size, 3)
        assert mask.shape == image.shape[:2] and not mask.any()
        # A photograph uses the range of the sensor, without being cut off at either end.
        assert image.std() > 12
        assert np.mean((image == 0) | (image == 255)) < 0.02
        pictures.append(image.astype(np.float64))
    for n, one in enumerate(pictures):
      for other in pictures[:n]:
        # Grain alone makes a difference of about 2 levels; parts and light must vary as well.
        assert np.abs(one - other).mean() > 4

  @pytest.mark.parametrize(('category', 'defect'), DEFECTS)
  def test_masks_are_exact(self, category, defect):
    num_each = synthetic.SUBJECTS[category].num_each
    for index in (0, num_each - 1):  # the faintest and the plainest
      image, mask = synthetic.draw(category, 'test', defect, index)
      clean, _ = synthetic.draw(category, 'test', defect, index, flawless=True)
      assert set(np.unique(mask)) == {0, 255}
      assert synthetic.MIN_MASK <= np.count_nonzero(mask) < 0.25 * mask.size
      change = np.abs(image.astype(int) - clean).max(axis=2)
      # Beyond VISIBLE: rounding (1 level), and grain, which is the same up to its growth with the
      # light (a change of 6 levels changes its deviation by less than 4 %, that is 0.3 levels at
      # four deviations).
      assert change[mask == 0].max() <= synthetic.VISIBLE + 2
      # Closing gaps adds pixels that did not change; most of the mask did.
      assert np.mean(change[mask > 0] > synthetic.VISIBLE - 2) > 0.6

  def test_severity_rises_with_the_index(self):
    areas = [np.count_nonzero(synthetic.draw('gear', 'test', 'rust', n)[1]) for n in range(5)]
    assert areas[0] < areas[2] < areas[4]

  def test_flawless_part_matches_good_light(self):
    image, mask = synthetic.draw('circuit_board', 'test', 'missing_part', 4)
    clean, same_mask = synthetic.draw('circuit_board', 'test', 'missing_part', 4, flawless=True)
    np.testing.assert_array_equal(mask, same_mask)
    assert (image != clean).any()

  def test_grey_category(self):
    image, _ = synthetic.draw('gear', 'train', 'good', 0)
    assert (image[:, :, 0] == image[:, :, 1]).all() and (image[:, :, 0] == image[:, :, 2]).all()

  @pytest.mark.parametrize(('split', 'defect', 'index', 'message'), [
      ('test', 'melted', 0, "no 'test' images of 'melted'.*test/rust"),
      ('train', 'rust', 0, "no 'train' images of 'rust'.*train/good"),
      ('validation', 'good', 0, "no 'validation' images"),
      ('test', 'good', -1, 'counts from 0, but is -1')])
  def test_bad_arguments(self, split, defect, index, message):
    with pytest.raises(ValueError, match=message):
      synthetic.draw('gear', split, defect, index)


class TestPrepare:

  def test_layout(self, tmp_path, few_images):
    calls = []
    root = synthetic.prepare(
        tmp_path / 'new' / 'root', categories=[SMALL], progress=lambda *call: calls.append(call))
    assert root == tmp_path / 'new' / 'root'
    assert calls == [(n + 1, few_images) for n in range(few_images)]
    files = sorted(str(p.relative_to(root / SMALL)) for p in root.rglob('*') if p.is_file())
    assert files == sorted([
        'train/good/000.png', 'train/good/001.png', 'test/good/000.png', 'test/crack/000.png',
        'test/crack/001.png', 'test/stain/000.png', 'test/stain/001.png',
        'ground_truth/crack/000_mask.png', 'ground_truth/crack/001_mask.png',
        'ground_truth/stain/000_mask.png', 'ground_truth/stain/001_mask.png', synthetic.MARKER])
    assert [p.name for p in root.iterdir()] == [SMALL]  # nothing else is left behind
    image, mask = synthetic.draw(SMALL, 'test', 'crack', 1)
    with Image.open(root / SMALL / 'test/crack/001.png') as file:
      assert file.mode == 'RGB'
      np.testing.assert_array_equal(np.asarray(file), image)
    with Image.open(root / SMALL / 'ground_truth/crack/001_mask.png') as file:
      assert file.mode == 'L'
      np.testing.assert_array_equal(np.asarray(file), mask)

  def test_sizes_and_modes(self, tmp_path):
    for category, mode, size in (('gear', 'L', (300, 300)), ('circuit_board', 'RGB', (320, 280))):
      defect = synthetic.SUBJECTS[category].defects[0]
      synthetic._write((tmp_path, category, 'test', defect, 0))
      with Image.open(tmp_path / 'test' / defect / '000.png') as file:
        assert (file.mode, file.size) == (mode, size)
      with Image.open(tmp_path / 'ground_truth' / defect / '000_mask.png') as file:
        assert (file.mode, file.size) == ('L', size)

  def test_second_time_does_nothing(self, tmp_path, few_images):
    synthetic.prepare(tmp_path, categories=[SMALL])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    calls = []
    synthetic.prepare(tmp_path, categories=[SMALL], progress=lambda *call: calls.append(call))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before
    assert calls == []

  def test_a_broken_run_leaves_no_category(self, tmp_path, few_images, monkeypatch):
    def failing(task):
      if task[2:] == ('test', 'stain', 1):
        raise KeyboardInterrupt
      original(task)
    original = synthetic._write
    monkeypatch.setattr(synthetic, '_write', failing)
    with pytest.raises(KeyboardInterrupt):
      synthetic.prepare(tmp_path, categories=[SMALL])
    assert list(tmp_path.iterdir()) == []

  def test_leftover_of_a_killed_run_is_ignored(self, tmp_path, few_images):
    leftover = tmp_path / '.drawing-killed' / SMALL / 'train' / 'good' / '000.png'
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b'half a picture')
    synthetic.prepare(tmp_path, categories=[SMALL])
    assert len(list((tmp_path / SMALL / 'train' / 'good').iterdir())) == 2
    assert leftover.read_bytes() == b'half a picture'
    # Nor would a reader of the layout take it for a category.
    assert [p.parent.parent.name for p in tmp_path.glob('*/train/good')] == [SMALL]

  def test_another_process_was_quicker(self, tmp_path, few_images, monkeypatch):
    def overtaken(task):
      if not (tmp_path / SMALL).exists():
        (tmp_path / SMALL / 'train').mkdir(parents=True)
        (tmp_path / SMALL / synthetic.MARKER).write_text(
            json.dumps({'version': synthetic.VERSION}))
      original(task)
    original = synthetic._write
    monkeypatch.setattr(synthetic, '_write', overtaken)
    synthetic.prepare(tmp_path, categories=[SMALL])
    # The category of the quicker one stays, and ours is cleared away.
    assert sorted(p.name for p in (tmp_path / SMALL).iterdir()) == [synthetic.MARKER, 'train']
    assert [p.name for p in tmp_path.iterdir()] == [SMALL]

  @pytest.mark.parametrize(('marker', 'message'), [
      (None, 'in the way.*missing or unreadable.*Delete or move'),
      ('{"version"', 'in the way.*missing or unreadable'),
      ('[]', 'in the way.*missing or unreadable'),
      ('{"version": -1}', 'drawn by version -1.*Delete or move')])
  def test_foreign_folder(self, tmp_path, marker, message):
    mine = tmp_path / SMALL / 'train' / 'good' / 'mine.png'
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b'mine')
    if marker is not None:
      (tmp_path / SMALL / synthetic.MARKER).write_text(marker)
    with pytest.raises(ValueError, match=message):
      synthetic.prepare(tmp_path, categories=[SMALL])
    assert mine.read_bytes() == b'mine'

  def test_bad_arguments(self, tmp_path):
    with pytest.raises(ValueError, match='Unknown category'):
      synthetic.prepare(tmp_path, categories=[SMALL, 'bottle'])
    with pytest.raises(ValueError, match='num_workers must be 0'):
      synthetic.prepare(tmp_path, num_workers=-1)
    assert list(tmp_path.iterdir()) == []

  def test_worker_processes_write_the_same(self, tmp_path):
    # Spawned workers import the module afresh, so the shortened set of `few_images` is not theirs;
    # `_write` through the pool is what matters.
    tasks = [(tmp_path / SMALL, SMALL, 'train', 'good', n) for n in range(2)]
    with synthetic._mapper(1) as mapper:
      assert list(mapper(synthetic._write, tasks)) == [None, None]
    with Image.open(tmp_path / SMALL / 'train/good/001.png') as file:
      np.testing.assert_array_equal(
          np.asarray(file), synthetic.draw(SMALL, 'train', 'good', 1)[0])
    assert multiprocessing.active_children() == []
