import jax
import numpy as np
import pytest
from PIL import Image

from patchcore_jax.data import camera_frames, preprocess
from patchcore_jax.settings import Preprocessing


class TestTransformFn:

  @pytest.mark.parametrize('height, width, sizes', [
      (100, 140, {'resize': (64,), 'crop': (56,)}),
      (140, 100, {'resize': (64,), 'crop': (56,)}),  # tall: Pillow 13 goes along the columns first
      (216, 72, {'resize': (47, 88), 'crop': ()}),
      (60, 200, {'resize': (64,), 'crop': ()}),
      (30, 20, {'resize': (50,), 'crop': (49, 33)}),  # enlarged; half pixels in the crop
      (80, 64, {'resize': (40,), 'resize_side': 'long', 'pad': (40,), 'crop': (36,)}),
      (64, 64, {'resize': (64, 30), 'crop': ()}),  # along one axis only
      (64, 30, {'resize': (), 'pad': (71, 90), 'crop': ()}),
      (48, 64, {'resize': (), 'crop': (17, 64)}),
      (1, 1, {'resize': (9, 12), 'crop': (8,)}),
      (600, 700, {'resize': (16,), 'crop': (16,)}),
  ])
  def test_pillows_pixels_to_the_last_bit(self, height, width, sizes):
    preprocessing = Preprocessing(**sizes)
    images = np.random.default_rng(1).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    images[1] = np.where(images[1] > 127, 255, 0)  # the most that sums can reach
    want = [np.asarray(preprocess.transform(Image.fromarray(image), preprocessing)) for image in images]
    got = jax.jit(camera_frames.transform_fn(height, width, preprocessing))(images)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)

  def test_another_pillow_is_noticed(self, monkeypatch):
    transform = preprocess.transform
    monkeypatch.setattr(
        preprocess, 'transform', lambda *arguments: transform(*arguments).point(lambda value: value ^ 1))
    with pytest.raises(ValueError, match='resizes 20 x 30 pixels to 10 x 15 in a way that is not known'):
      camera_frames.transform_fn(30, 20, Preprocessing(resize=(10,), crop=()))

  def test_errors(self):
    with pytest.raises(ValueError, match='smaller than the crop of 224 x 224'):
      camera_frames.transform_fn(100, 100, Preprocessing(resize=()))
    with pytest.raises(ValueError, match='positive'):
      camera_frames.transform_fn(0, 100, Preprocessing())
