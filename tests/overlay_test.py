"""Pictures for people."""

import numpy as np
import pytest

from patchcore_jax.inspection import colours
from patchcore_jax.report import overlay
from tests import small

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (300, 40, 3), np.uint8)


class TestLimits:

  def test_the_threshold_itself_is_plain(self):
    bank = small.inspector()
    low, high = colours.limits(bank)
    level = bank.calibration.pixel_threshold
    assert (low, high) == (level / 2, 2 * level)
    gray = np.full((1, 2, 3), 128, np.uint8)
    good, marked = overlay.overlay(gray, np.array([[0.49 * level, level]]), low, high)[0].astype(int)
    assert (good == 128).all() and marked[0] - marked[2] > 100  # yellow

  def test_where_the_model_says_nothing_each_map_has_its_own(self):
    values = np.array([[np.nan, 1, 2], [2, 3, 7]])
    assert colours.limits_of_map(values) == (2, 7)
    low, high = colours.limits_of_map(np.ones((2, 2)))
    assert low == 1 < high


class TestOverlay:

  def test_against_a_pixel_by_pixel_computation(self):
    values = RNG.uniform(-1, 3, (300, 40))
    drawn = overlay.overlay(IMAGE, values, 0.5, 2.0)
    for y, x in RNG.integers(0, (300, 40), (200, 2)):
      heat = min(max((values[y, x] - 0.5) / 1.5, 0), 1)
      alpha = 0.75 * min(2 * heat, 1)
      colour = np.array([255, 255 * 0.8 * (1 - heat), 0])
      expected = IMAGE[y, x] * (1 - alpha) + colour * alpha
      assert np.abs(drawn[y, x] - expected).max() <= 1.001  # cut to whole numbers, from float32

  def test_below_the_beginning_nothing_changes(self):
    np.testing.assert_array_equal(overlay.overlay(IMAGE, np.zeros((300, 40)), 0.0, 1.0), IMAGE)

  def test_the_same_value_has_the_same_colour_in_every_picture(self):
    gray = np.full((2, 2, 3), 90, np.uint8)
    one = overlay.overlay(gray, np.array([[1.0, 0], [0, 0]]), 0.5, 2)
    other = overlay.overlay(gray, np.array([[1.0, 9], [9, 9]]), 0.5, 2)
    np.testing.assert_array_equal(one[0, 0], other[0, 0])

  def test_what_was_not_seen_is_darker_and_not_coloured(self):
    values = np.full((300, 40), 5.0)
    values[:, :10] = np.nan
    drawn = overlay.overlay(IMAGE, values, 0, 1)
    assert (drawn[:, :10] <= IMAGE[:, :10] * 0.46).all()
    assert (drawn[:, 10:, 0] >= 191).all()  # red

  @pytest.mark.parametrize('values, limits, words', [
      (np.zeros((3, 3)), (0, 1), r'shape \(300, 40, 3\) and a map of shape \(3, 3\)'),
      (np.zeros((300, 40)), (1, 1), 'expected the end above the beginning'),
      (np.zeros((300, 40)), (0, float('nan')), 'expected the end above the beginning')])
  def test_errors(self, values, limits, words):
    with pytest.raises(ValueError, match=words):
      overlay.overlay(IMAGE, values, *limits)


class TestOutlined:

  def test_the_frame_is_outside_of_the_box(self):
    drawn = overlay.outlined(IMAGE, (10, 100, 20, 140))
    np.testing.assert_array_equal(drawn[100:140, 10:20], IMAGE[100:140, 10:20])
    assert (drawn[99, 10:20] == 255).all() and (drawn[100:140, 20] == 255).all()
    assert (drawn[98, 10:20] == 0).all() and (drawn[100:140, 8] == 0).all()
    changed = (drawn != IMAGE).any(-1)
    assert not changed[:98].any() and not changed[142:].any() and not changed[:, 22:].any()

  def test_a_box_that_is_the_whole_image_or_one_pixel(self):
    for box in ((0, 0, 40, 300), (39, 299, 40, 300)):
      assert overlay.outlined(IMAGE, box).shape == IMAGE.shape
    assert overlay.outlined(IMAGE[:1, :1], (0, 0, 1, 1)).shape == (1, 1, 3)


class TestComparison:

  def test_both_patches_are_shown_enlarged_and_framed(self):
    image, normal = np.full((64, 64, 3), 60, np.uint8), np.full((64, 64, 3), 180, np.uint8)
    image[24:32, 8:16] = 255, 0, 0
    normal[56:64, 56:64] = 0, 255, 0
    drawn = overlay.comparison(image, (8, 24, 16, 32), normal, (56, 56, 64, 64), ('query', 'normal'))
    half = drawn.shape[1] // 2
    patch = 288 * 8 // 64  # of a panel of 288 pixels
    for side, colour in ((drawn[:, :half], (255, 0, 0)), (drawn[:, half:], (0, 255, 0))):
      ys, xs = np.nonzero((side == colour).all(-1))
      # The frame may lie on it where the patch touches the edge of the image.
      assert patch - 2 <= np.ptp(ys) + 1 <= patch and patch - 2 <= np.ptp(xs) + 1 <= patch
      assert len(ys) == (np.ptp(ys) + 1) * (np.ptp(xs) + 1)

  def test_without_a_picture_it_says_so(self):
    image = np.full((64, 64, 3), 60, np.uint8)
    drawn = overlay.comparison(image, (8, 24, 16, 32), None, None, ('query', 'x' * 300))
    other = overlay.comparison(image, (8, 24, 16, 32), image, (0, 0, 8, 8), ('query', 'x' * 300))
    assert drawn.shape == other.shape and (drawn == 211).all(-1).sum() > 288 * 250

  def test_names_that_the_font_cannot_write(self):
    image = np.full((20, 30, 3), 60, np.uint8)
    overlay.comparison(image, (0, 0, 5, 5), image, (25, 15, 30, 20), ('\u65e5\u672c.png', '\udcff.png'))
