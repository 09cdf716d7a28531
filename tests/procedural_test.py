"""Drawn training images: what they are a function of, and that they show something."""

import numpy as np
import pytest

from patchcore_jax.builtin import procedural


class TestDraw:

  @pytest.mark.parametrize('kind', procedural.SHARES)
  def test_every_kind(self, kind):
    images = [procedural.draw(3, i, 64, kind) for i in range(6)]
    for image in images:
      assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(images[0], procedural.draw(3, 0, 64, kind))
    # Structure: most are neither flat nor saturated.
    assert np.median([image.std() for image in images]) > 5
    assert np.median([np.isin(image, (0, 255)).mean() for image in images]) < 0.6
    assert (images[0] != procedural.draw(4, 0, 64, kind)).mean() > 0.3
    for i in range(6):
      for j in range(i):
        assert (images[i] != images[j]).mean() > 0.3

  def test_many_of_the_smallest(self):
    for i in range(150):  # every branch, also in the small motifs of tiles
      procedural.draw(8, i, 16)
      procedural.draw(8, i, 32, 'tiles')

  def test_kinds_differ_and_each_is_drawn(self):
    whole = [procedural.draw(0, 5, 32, kind) for kind in procedural.SHARES]
    assert len({image.tobytes() for image in whole}) == len(procedural.SHARES)
    assert sum(procedural.SHARES.values()) == 20
    rng = np.random.default_rng(0)
    drawn = [procedural._any_kind(rng) for _ in range(2000)]
    for kind, share in procedural.SHARES.items():
      assert abs(drawn.count(kind) / 2000 - share / 20) < 0.03

  def test_does_not_depend_on_what_was_drawn_before(self):
    alone = procedural.draw(1, 9, 32)
    for i in range(9):
      procedural.draw(1, i, 32)
    np.testing.assert_array_equal(procedural.draw(1, 9, 32), alone)

  @pytest.mark.parametrize('args, words', [
      ((0, 0, 15), 'size=15: expected an even number'), ((0, 0, 8), 'size=8'),
      ((0, 0, 32, 'photo'), "kind='photo': expected one of leaves")])
  def test_errors(self, args, words):
    with pytest.raises(ValueError, match=words):
      procedural.draw(*args)


class TestField:

  def test_spectrum_falls_with_the_asked_slope(self):
    rng = np.random.default_rng(0)
    power = np.mean([
        np.abs(np.fft.rfft2(procedural._field(rng, 64, 2.0))) ** 2 for _ in range(200)], axis=0)
    octaves = [power[0, 2**k] for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(np.diff(np.log2(octaves)), -2, atol=0.35)  # of 200 draws
