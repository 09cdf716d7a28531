"""The regions of a map, in pixels of the original image."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.cluster import DBSCAN

from patchcore_jax.data import placement
from patchcore_jax.data.placement import Placement
from patchcore_jax.inspection import regions
from patchcore_jax.settings import Preprocessing

TOUCHING = np.ones((3, 3))
GEOMETRIES = {
    'enlarged': Preprocessing(resize=(40, 60), crop=()), 'cropped': Preprocessing(resize=(), crop=(16,)),
    'both': Preprocessing(resize=(48,), crop=(32,)),
    'padded': Preprocessing(resize=(48,), resize_side='long', pad=(50,), crop=(50,))}


def _smooth(seed, shape=(40, 60)):
  return ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 3)


def _as_it_came(values):
  """The placement of images that keep their size."""
  return Placement(values.shape, values.shape, (1.0, 1.0), (0.0, 0.0))


class TestAbove:

  def test_by_hand(self):
    values = np.zeros((7, 9))
    values[1, 1:4] = 5, 9, 5
    values[2, 4] = 5  # touches them at a corner
    values[4:, 6:] = 8
    large, small = regions.above(values, 5, _as_it_came(values))
    assert (large.box, large.area, large.maximum, large.centroid) == ((6, 4, 9, 7), 9, 8, (7, 5))
    assert (small.box, small.area, small.maximum) == ((1, 1, 5, 3), 4, 9)
    assert small.centroid == ((1 + 2 + 3 + 4) / 4, (1 + 1 + 1 + 2) / 4)
    assert not regions.above(values, 9.5, _as_it_came(values))

  @pytest.mark.parametrize('name', GEOMETRIES)
  @pytest.mark.parametrize('seed', range(4))
  def test_is_what_the_whole_map_over_the_original_has(self, name, seed):
    """Against SciPy's components of the map that predict writes, whose mask has the same pixels."""
    random = np.random.default_rng(seed)
    place = placement.placement(*map(int, random.integers(20, 300, 2)), GEOMETRIES[name])
    values = _smooth(seed, place.size).astype(np.float32)
    whole = placement.to_original(values, place)
    for share in (0.0, 0.6, 0.95):
      threshold = float(np.quantile(values, share))
      inside = whole >= np.float32(threshold)
      labels, n = ndimage.label(inside, TOUCHING)
      expected = []
      for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        y, x = np.nonzero(labels == number)
        expected.append(((columns.start, rows.start, columns.stop, rows.stop), len(y), whole[y, x].max(),
                         pytest.approx((x.mean(), y.mean()))))
      found = regions.above(values, threshold, place)
      assert len(found) == n and all((r.box, r.area, r.maximum, r.centroid) in expected for r in found)
      assert [r.area for r in found] == sorted((r.area for r in found), reverse=True)
      np.testing.assert_array_equal(regions.mask(values, threshold, place), inside)

  def test_the_outline_has_the_regions_shape_and_holes(self):
    y, x = np.mgrid[:120, :150]
    distance = np.hypot(y - 60, x - 70)
    values = ((distance < 40) & (distance > 15)).astype(float)
    (ring,) = regions.above(values, 0.5, _as_it_came(values))
    assert len(ring.outline) == 2  # around it, and around its hole
    drawn = np.zeros((1200, 1500), bool)
    for line in ring.outline:
      picture = Image.new('1', drawn.shape[::-1])
      ImageDraw.Draw(picture).polygon([(10 * a, 10 * b) for a, b in line], fill=1)
      drawn ^= np.asarray(picture)
    wrong = drawn[5::10, 5::10] != values.astype(bool)
    assert wrong.sum() < 0.03 * ring.area
    assert sum(map(len, ring.outline)) < 80  # not every pixel of the edge

  @pytest.mark.parametrize('seed', range(5))
  def test_is_the_cluster_around_the_peak(self, seed):
    """Against scikit-learn: density clusters of touching pixels are connected components."""
    values = _smooth(seed)
    threshold = np.quantile(values, 0.8)
    points = np.argwhere(values.astype(np.float32) >= np.float32(threshold))
    labels = DBSCAN(eps=1.5, min_samples=1).fit(points).labels_
    found = regions.above(values, threshold, _as_it_came(values))
    assert [r.area for r in found] == sorted(np.bincount(labels), reverse=True)

  def test_large_images_are_thinned(self, monkeypatch):
    values = _smooth(3).astype(np.float32)
    threshold = float(np.quantile(values, 0.9))
    place = Placement((403, 605), values.shape, (10.07, 10.08), (0.0, 0.0))
    exact, exact_mask = regions.above(values, threshold, place), regions.mask(values, threshold, place)
    monkeypatch.setattr(regions, '_MOST_PIXELS', 30_000)  # every third
    found, mask = regions.above(values, threshold, place), regions.mask(values, threshold, place)
    assert len(found) == len(exact) and mask.shape == exact_mask.shape
    for a, b in zip(found, exact, strict=True):
      np.testing.assert_allclose(a.box, b.box, atol=3)
      np.testing.assert_allclose(a.centroid, b.centroid, atol=1)
      assert a.area == pytest.approx(b.area, rel=0.06) and a.maximum == pytest.approx(b.maximum, rel=1e-3)
    assert (mask != exact_mask).mean() < 0.01

  @pytest.mark.parametrize('scale', [0.6, 1.0, 4.5])
  def test_defects_that_lie_close_are_regions_of_their_own(self, scale):
    y, x = np.mgrid[:60, :80]
    peaks = ((20, 20, 8.0), (20, 48, 9.0), (45, 34, 10.0))
    values = sum(h * np.exp(-((y - a) ** 2 + (x - b) ** 2) / 60) for a, b, h in peaks)
    place = Placement((round(60 * scale), round(80 * scale)), values.shape, (scale, scale), (0.0, 0.0))
    inside = placement.to_original(values, place) >= np.float32(0.3)
    assert ndimage.label(inside, TOUCHING)[1] == 1  # at the threshold they touch
    found = regions.above(values, 0.3, place)
    assert len(found) == 3 and sum(r.area for r in found) == inside.sum()
    for a, b, height in peaks:
      (own,) = [r for r in found if abs(r.maximum - height) < 0.2]
      assert own.centroid == pytest.approx((scale * b, scale * a), abs=4 * scale)
    np.testing.assert_array_equal(regions.mask(values, 0.3, place), inside)
    # Small ones of them can be left out of a mask.
    areas = [r.area for r in found]
    assert regions.mask(values, 0.3, place, min_area=areas[1]).sum() == sum(areas[:2])

  def test_a_scratch_is_one_region(self):
    """It is not equally strong everywhere, and no part is twice as strong as what lies between."""
    values = np.zeros((40, 200))
    values[18:22, 10:190] = 4 + np.sin(np.arange(180) / 6)
    values = ndimage.gaussian_filter(values, 2)
    assert len(regions.above(values, 0.2, _as_it_came(values))) == 1

  def test_what_is_thinner_than_a_pixel_of_the_map_has_an_outline(self):
    place = Placement((900, 900), (9, 9), (100.0, 100.0), (0.0, 0.0))
    values = np.zeros((9, 9))
    values[4, 4] = 1
    (region,) = regions.above(values, 0.99, place)
    assert region.area > 1 and len(region.outline) == 1 and len(region.outline[0]) > 2

  def test_nan_belongs_to_no_region(self):
    values = np.zeros((5, 5))
    values[2] = 1, 1, np.nan, 1, 1
    found = regions.above(values, 1, _as_it_came(values))
    assert [r.box for r in found] == [(0, 2, 2, 3), (3, 2, 5, 3)]

  def test_what_lies_in_the_padding_is_nowhere_in_the_image(self):
    place = placement.placement(20, 20, Preprocessing(resize=(), pad=(60,), crop=()))
    values = np.zeros((60, 60))
    values[:8, :8] = 1
    assert not regions.above(values, 1, place) and not regions.mask(values, 1, place).any()

  def test_a_mask_leaves_out_what_is_smaller(self):
    values = np.zeros((9, 9))
    values[1:3, 1:3] = values[5:8, 5:8] = 1
    drawn = regions.mask(values, 1, _as_it_came(values), min_area=5)
    assert drawn.sum() == 9 and drawn[5:8, 5:8].all()
    assert regions.mask(values, 1, _as_it_came(values), min_area=4).sum() == 13


class TestMostAnomalous:

  def test_half_the_peak_counts(self):
    values = np.full((5, 30), 2.0)
    values[2, 10:15] = 2.9, 3, 4, 3.1, 2.9
    assert regions.most_anomalous(values) == ((11, 2, 14, 3), (12, 2))

  def test_a_flat_map_is_one_region(self):
    for value in (0.1, 0.0, 1e30):
      assert regions.most_anomalous(np.full((3, 4), value, np.float32)) == ((0, 0, 4, 3), (1.5, 1))

  def test_nan_belongs_to_no_region(self):
    values = np.zeros((5, 5))
    values[2] = 1, 1, np.nan, 1, 2
    assert regions.most_anomalous(values).box == (3, 2, 5, 3)

  def test_moves_and_scales_with_the_map(self):
    values = np.pad(_smooth(7), 5)
    one, moved = (regions.most_anomalous(v) for v in (values, np.roll(values, (2, -3), (0, 1)) * 4))
    assert moved.box == tuple(np.add(one.box, (-3, 2, -3, 2)))
    np.testing.assert_allclose(moved.centroid, np.add(one.centroid, (-3, 2)))

  @pytest.mark.parametrize('values', [np.zeros(4), np.full((2, 2), np.nan), np.zeros((0, 3))])
  def test_no_map(self, values):
    with pytest.raises(ValueError, match='expected \\[height, width\\] with a number'):
      regions.most_anomalous(values)
