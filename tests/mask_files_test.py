"""Which mask belongs to which image."""

from pathlib import Path

import pytest

from patchcore_jax.data import folder
from patchcore_jax.data.mask_files import MaskFiles


def _touch(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def _masks(root, images, names=('{}_mask.*', '{}.*')):
  return MaskFiles(root, map(Path, images), names)


def _of(masks, stem):
  return [Path(path).name for path in masks.of(stem)]


@pytest.mark.parametrize('name', ['a_mask.png', 'a_MASK.PNG', 'A_Mask.tif', 'a.png', 'A.BMP'])
def test_capitals_make_no_difference(name, tmp_path):
  _touch(tmp_path, name)
  assert _of(_masks(tmp_path, ['a.png']), 'a') == [name]


def test_the_first_name_that_finds_any_counts(tmp_path):
  _touch(tmp_path, 'a_MASK.png', 'a.png')
  assert _of(_masks(tmp_path, ['a.jpg']), 'a') == ['a.png']  # to the letter before near enough
  _touch(tmp_path, 'a_mask.bmp', 'a_mask.png')
  masks = _masks(tmp_path, ['a.jpg'])
  assert _of(masks, 'a') == ['a_mask.bmp', 'a_mask.png']
  assert [Path(p).name for p in masks.of_no_image()] == ['a.png', 'a_MASK.png']


def test_images_that_differ_in_capitals_keep_their_own(tmp_path):
  _touch(tmp_path, 'a_mask.png', 'A_mask.png')
  masks = _masks(tmp_path, ['a.png', 'A.png'])
  assert (_of(masks, 'a'), _of(masks, 'A')) == (['a_mask.png'], ['A_mask.png'])
  (tmp_path / 'a_mask.png').unlink()
  assert _masks(tmp_path, ['a.png', 'A.png']).of('a') == ()  # not that of another image


def test_several_masks_in_a_folder_of_the_images_name(tmp_path):
  _touch(tmp_path, '000/0.png', '000/1.png', '001/notes.txt', '.000/2.png')
  masks = _masks(tmp_path, ['000.png', '001.png'], ['{}/*'])
  assert _of(masks, '000') == ['0.png', '1.png'] and masks.of('001') == () and masks.of_no_image() == []


@pytest.mark.parametrize('stem', ['a[1]', 'a*', '{}', 'a.b'])
def test_names_are_no_patterns(stem, tmp_path):
  _touch(tmp_path, f'{stem}_mask.png', 'a1_mask.png', 'ab_mask.png')
  assert _of(_masks(tmp_path, [f'{stem}.png']), stem) == [f'{stem}_mask.png']


def test_no_folder(tmp_path):
  masks = _masks(tmp_path / 'none', ['a.png'])
  assert masks.of('a') == () and masks.of_no_image() == []


class TestOfACategory:

  @pytest.fixture
  def root(self, tmp_path):
    _touch(tmp_path, 'nut/train/good/0.png', 'nut/test/good/0.png', 'nut/test/bent/0.png')
    return tmp_path

  def test_folders_in_capitals_too(self, root):
    _touch(root, 'nut/Ground_Truth/Bent/0_MASK.PNG')
    nut = folder.MVTEC.load_category(root, 'nut')
    assert nut.has_masks and [m[-27:] for e in nut.test for m in e.mask_paths] == [
        '/Ground_Truth/Bent/0_MASK.PNG'[-27:]]

  def test_masks_of_no_image_are_listed(self, root):
    _touch(root, 'nut/ground_truth/bent/0_mask.png', 'nut/ground_truth/bent/7_mask.png',
           'nut/ground_truth/torn/1_mask.png', 'nut/ground_truth/good/0_mask.png')
    nut = folder.MVTEC.load_category(root, 'nut')
    assert [Path(m).relative_to(root / 'nut/ground_truth').as_posix() for m in nut.unused_masks] == [
        'bent/7_mask.png', 'torn/1_mask.png']
    assert nut.masks_of_good == (str(root / 'nut/ground_truth/good/0_mask.png'),)

  def test_a_mask_of_another_name_is_told_with_what_is_there(self, root):
    _touch(root, 'nut/ground_truth/bent/0_gt.png')
    with pytest.raises(ValueError, match=r'No mask for .*bent/0.png: expected .*0_mask.png, found 0_gt.png'):
      folder.MVTEC.load_category(root, 'nut')
