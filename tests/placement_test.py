"""Maps, boxes and points of the network's input, laid back over the original image."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from patchcore_jax import scoring
from patchcore_jax.data import placement, preprocess
from patchcore_jax.settings import Preprocessing

SPECS = [
    Preprocessing(),
    Preprocessing(crop=()),
    Preprocessing(resize=(256, 256), crop=()),
    Preprocessing(resize=(200, 320), crop=(180, 224)),
    Preprocessing(resize=(), crop=(300,)),
    Preprocessing(resize=(), crop=()),
    Preprocessing(resize=(256,), resize_side='long', pad=(256,), crop=()),
    Preprocessing(resize=(255,), resize_side='long', pad=(256,), crop=(224,)),
    Preprocessing(resize=(), pad=(1001, 1000), crop=(999, 990)),
]
SIZES = [(500, 700), (700, 500), (300, 900), (333, 777)]  # height, width
# Original pixels. Pillow samples its filter at whole pixels: its centre of gravity is off by up to 0.07.
_FILTER = 0.1


def _ramp(height, width, axis):
  """Every pixel holds its own y or x. Resizing keeps straight lines straight, but for the border."""
  return Image.fromarray(np.indices((height, width))[axis].astype(np.float32))


class TestPlacement:

  def test_by_hand(self):
    # 300 x 400 -> long side 200: 150 x 200; 25 above and below to 200; a crop of 100 from (50, 50).
    found = placement.placement(
        300, 400, Preprocessing(resize=(200,), resize_side='long', pad=(200,), crop=(100,)))
    assert found == ((300, 400), (100, 100), (2.0, 2.0), (50.0, 100.0))

  def test_padding_gives_a_negative_offset(self):
    found = placement.placement(
        300, 400, Preprocessing(resize=(200,), resize_side='long', pad=(200,), crop=()))
    assert found.offset == (-50.0, 0.0) and found.size == (200, 200)

  @pytest.mark.parametrize('size', SIZES)
  @pytest.mark.parametrize('spec', SPECS)
  def test_size_is_that_of_transform(self, spec, size):
    image = preprocess.transform(Image.new('L', size[::-1]), spec)
    assert placement.placement(*size, spec).size == (image.height, image.width)

  def test_images_that_transform_refuses(self):
    with pytest.raises(ValueError, match='smaller than the crop of 224 x 224'):
      placement.placement(100, 300, Preprocessing(resize=()))
    with pytest.raises(ValueError, match='expected at least 1 x 1'):
      placement.placement(0, 300, Preprocessing())


class TestToOriginal:

  @pytest.mark.parametrize('size', SIZES)
  @pytest.mark.parametrize('spec', SPECS)
  def test_undoes_transform(self, spec, size):
    """The whole convention at once: half pixels, crop and padding, on both axes."""
    place = placement.placement(*size, spec)
    for axis in (0, 1):
      ramp = _ramp(*size, axis)
      back = placement.to_original(np.asarray(preprocess.transform(ramp, spec)), place)
      assert back.shape == size and back.dtype == np.float32
      ramp = np.asarray(ramp)
      # Half a pixel of the input inside what was seen; at the border of the image the filter of the resizing
      # sees one side only.
      low = max(place.offset[axis] + place.scale[axis] / 2, 2 * place.scale[axis])
      high = place.offset[axis] + place.scale[axis] * (place.size[axis] - 0.5)
      high = min(high, size[axis] - 2 * place.scale[axis])
      inner = ~np.isnan(back) & (ramp >= low) & (ramp <= high - 1)
      assert inner.sum() > 1000
      np.testing.assert_allclose(back[inner], ramp[inner], atol=_FILTER)

  def test_what_was_cropped_is_nan_and_nothing_else(self):
    place = placement.placement(512, 768, Preprocessing())  # scale 2, crop of 224 from 256 x 384
    seen = ~np.isnan(placement.to_original(np.zeros((224, 224)), place))
    expected = np.zeros((512, 768), bool)
    expected[32:480, 160:608] = True
    np.testing.assert_array_equal(seen, expected)

  def test_padding_is_left_out(self):
    spec = Preprocessing(resize=(), pad=(6, 4), crop=())
    values = np.arange(24.0).reshape(6, 4)
    np.testing.assert_array_equal(
        placement.to_original(values, placement.placement(2, 4, spec)), values[2:4])

  def test_enlargement_by_hand(self):
    place = placement.placement(1, 4, Preprocessing(resize=(1, 2), crop=()))
    # Centres at 0.25, 0.75, 1.25, 1.75 of the map's pixels, whose centres are 0.5 and 1.5.
    np.testing.assert_allclose(placement.to_original([[0., 4.]], place), [[0, 1, 3, 4]])

  def test_is_what_scoring_does(self):
    """The other enlargement of the package, from patches to pixels."""
    values = np.random.default_rng(0).random((7, 9), np.float32)
    place = placement.placement(50, 71, Preprocessing(resize=(7, 9), crop=()))
    expected = scoring.anomaly_maps(jnp.asarray(values[None]), (50, 71), scoring.ScoringSpec(sigma=0))[0]
    np.testing.assert_allclose(placement.to_original(values, place), expected, atol=1e-6)  # float32

  def test_map_of_another_size(self):
    with pytest.raises(ValueError, match=r'shape \(3, 3\): expected \(224, 224\)'):
      placement.to_original(np.zeros((3, 3)), placement.placement(500, 700, Preprocessing()))


class TestBoxToOriginal:

  @pytest.mark.parametrize('size', SIZES)
  @pytest.mark.parametrize('spec', SPECS)
  def test_holds_what_is_inside(self, spec, size):
    place = placement.placement(*size, spec)
    top, left = size[0] // 2 - 20, size[1] // 2 + 10
    mask = np.zeros(size, np.uint8)
    mask[top:top + 40, left:left + 50] = 255
    seen = np.argwhere(np.asarray(preprocess.transform(Image.fromarray(mask), spec)))
    (y0, x0), (y1, x1) = seen.min(axis=0), seen.max(axis=0) + 1
    x0, y0, x1, y1 = placement.box_to_original((x0, y0, x1, y1), place)
    assert x0 <= left and y0 <= top and x1 >= left + 50 and y1 >= top + 40
    # The filter spreads by less than two new pixels on each side, but not over the edge.
    assert left - x0 <= 2 * place.scale[1] + 1 and x1 - left - 50 <= 2 * place.scale[1] + 1
    assert top - y0 <= 2 * place.scale[0] + 1 and y1 - top - 40 <= 2 * place.scale[0] + 1

  def test_stays_inside_and_is_never_empty(self):
    place = placement.placement(100, 50, Preprocessing(resize=(), pad=(100,), crop=()))
    assert placement.box_to_original((0, 0, 100, 100), place) == (0, 0, 50, 100)
    assert placement.box_to_original((2, 3, 9, 8), place) == (0, 3, 1, 8)
    assert placement.box_to_original((90, 3, 99, 8), place) == (49, 3, 50, 8)

  def test_whole_pixels_stay_whole(self):
    """500 / 256 * 256 is no exact product."""
    for size in range(1, 600, 7):
      place = placement.placement(size, size, Preprocessing(resize=(256, 256), crop=()))
      assert placement.box_to_original((0, 0, 256, 256), place) == (0, 0, size, size)

  def test_empty_box(self):
    with pytest.raises(ValueError, match='is empty'):
      placement.box_to_original((3, 3, 3, 4), placement.placement(500, 700, Preprocessing()))


class TestPointToOriginal:

  @pytest.mark.parametrize('spec', SPECS)
  def test_agrees_with_the_maps(self, spec):
    place = placement.placement(500, 700, spec)
    x, y = place.size[1] // 2 + 3, place.size[0] // 2 - 5
    for axis, found in ((1, 0), (0, 1)):
      seen = np.asarray(preprocess.transform(_ramp(500, 700, axis), spec))[y, x]
      assert placement.point_to_original((x, y), place)[found] == pytest.approx(seen, abs=_FILTER)

  def test_a_point_in_the_padding_is_moved_to_the_image(self):
    place = placement.placement(100, 50, Preprocessing(resize=(), pad=(100,), crop=()))
    assert placement.point_to_original((0, 7), place) == (0, 7)
    assert placement.point_to_original((99, 7), place) == (49, 7)
