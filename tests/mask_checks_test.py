"""Masks that would change pixel metrics unsaid are named before the work."""

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.data import folder
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.evaluation import mask_checks
from patchcore_jax.settings import Preprocessing

WHOLE = Preprocessing(resize=(), crop=())
PARTLY = Preprocessing(resize=(), crop=(16,))


def _save(path, pixels, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **kwargs)


def _mask(height=20, width=20, at=(8, 4), value=255):
  mask = np.zeros((height, width), np.uint8)
  mask[at[0]:at[0] + 3, at[1]:at[1] + 5] = value
  return mask


@pytest.fixture
def root(tmp_path):
  """A category of 3 defective images, whose masks are all right."""
  for i in range(3):
    _save(tmp_path / f'nut/test/bent/{i}.png', np.full((20, 20, 3), 100))
    _save(tmp_path / f'nut/ground_truth/bent/{i}_mask.png', _mask())
  _save(tmp_path / 'nut/train/good/0.png', np.full((20, 20, 3), 100))
  _save(tmp_path / 'nut/test/good/0.png', np.full((20, 20, 3), 100))
  return tmp_path


def _line(root, preprocessing=WHOLE, **kwargs):
  return mask_checks.line(folder.MVTEC.load_category(root, 'nut'), preprocessing, **kwargs)


def test_usual_masks_are_not_mentioned(root):
  assert _line(root) == ''
  _save(root / 'nut/ground_truth/bent/0_mask.png', _mask(value=1))  # some data sets number the defect
  assert _line(root) == ''
  _save(root / 'nut/ground_truth/good/0_mask.png', np.zeros((20, 20)))  # and some have one for every image
  assert _line(root) == ''


@pytest.mark.parametrize('pixels, what', [
    (np.zeros((20, 20)), mask_checks.EMPTY),
    (255 - _mask(), mask_checks.LARGE),
    (np.full((20, 20), 255), mask_checks.LARGE),
    (_mask() + _mask(at=(1, 1), value=128), mask_checks.MANY_VALUES),
    (np.stack([_mask(), _mask(at=(1, 1)), _mask(at=(9, 9))], -1), mask_checks.MANY_VALUES)])
def test_odd_ones_are_named(pixels, what, root):
  _save(root / 'nut/ground_truth/bent/1_mask.png', pixels)
  assert _line(root) == f'odd masks: 1 {what}: bent/1_mask.png'


def test_values_of_more_than_8_bits(root):
  mask = _mask().astype(np.uint16)
  mask[0, 0] = 60000
  Image.fromarray(mask).save(root / 'nut/ground_truth/bent/1_mask.png')
  assert mask_checks.MANY_VALUES in _line(root)


def test_masks_of_no_image_and_of_good_ones(root):
  _save(root / 'nut/ground_truth/bent/9_mask.png', _mask())
  _save(root / 'nut/ground_truth/good/0_mask.png', _mask())
  assert _line(root) == (
      f'odd masks: 1 {mask_checks.OF_GOOD}: good/0_mask.png; 1 {mask_checks.UNUSED}: bent/9_mask.png')


def test_what_the_crop_leaves_nothing_of(root):
  _save(root / 'nut/ground_truth/bent/2_mask.png', _mask(at=(0, 0))[:, ::1] * (np.arange(20)[:, None] < 2))
  assert _line(root) == ''
  assert _line(root, PARTLY) == f'odd masks: 1 {mask_checks.LOST}: bent/2_mask.png'


@pytest.mark.parametrize('orientation, shape, named', [
    (1, (20, 20), False), (6, (20, 20), True), (3, (20, 30), True), (6, (20, 30), False)])
def test_images_that_exif_turns(orientation, shape, named, root):
  exif = Image.Exif()
  exif[0x0112] = orientation
  _save(root / 'nut/test/bent/0.png', np.full((*shape, 3), 100), exif=exif)
  _save(root / 'nut/ground_truth/bent/0_mask.png', _mask(*shape))
  assert (mask_checks.TURNED in _line(root)) == named
  # One that is turned itself, or the same both ways, is not in question.
  _save(root / 'nut/ground_truth/bent/0_mask.png', _mask(*shape), exif=exif)
  assert _line(root) == ''
  even = np.zeros(shape)
  even[9:-9, 9:-9] = 255
  _save(root / 'nut/ground_truth/bent/0_mask.png', even)
  assert _line(root) == ''


def test_many_names_are_cut_short(root):
  for i in range(12):
    _save(root / f'nut/ground_truth/bent/{i}_mask.png', np.zeros((20, 20)))
    _save(root / f'nut/test/bent/{i}.png', np.full((20, 20, 3), 100))
  line = _line(root)
  assert line.startswith(f'odd masks: 12 {mask_checks.EMPTY}: bent/0_mask.png, ')
  assert line.endswith(' and 4 more')


def test_masks_that_cannot_be_used(root):
  _save(root / 'nut/ground_truth/bent/0_mask.png', _mask(10, 10, (0, 0)))
  with pytest.raises(ImageError, match='0_mask.png is 10 x 10 pixels, its image .* 20 x 20'):
    _line(root)
  (root / 'nut/ground_truth/bent/1_mask.png').write_bytes(b'nothing')
  errors = []
  assert _line(root, on_error=errors.append) == '' and len(errors) == 2
