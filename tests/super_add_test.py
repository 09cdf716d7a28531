"""SuperADD: windows, thinning by density, binary maps, and fits against NumPy in float64."""

import dataclasses

import numpy as np
import pytest

from patchcore_jax import morphology, scoring, windows
from patchcore_jax.detectors import SuperADD, superadd
from patchcore_jax.search import thinning
from tests import small

pytestmark = pytest.mark.accelerator

PLAIN = SuperADD(window=24, overlap=8, brightness=0.0, held_out=3, bank_rows=10**6, map_scale=0.5, radius=2)
GOOD, NEW, LAYERS = small.images(7), small.images(3, 7), ('b', 'c')


class TestWindows:

  @pytest.mark.parametrize('cells, window, overlap', [
      (4, 4, 1), (5, 4, 1), (95, 40, 8), (13, 4, 1), (9, 3, 0), (80, 40, 19)])
  def test_cover_every_cell_once_and_share_twice_the_overlap(self, cells, window, overlap):
    plan = windows.plan(cells, window, overlap)
    kept = [place.start + cell for place in plan for cell in range(place.first, place.last)]
    assert kept == list(range(cells))
    assert all(before.start + window - after.start >= 2 * overlap for before, after in zip(plan, plan[1:]))

  @pytest.mark.parametrize('loops', [True, False])
  def test_maps_of_windows_are_joined_where_they_lie(self, loops):
    images = np.random.default_rng(0).standard_normal((2, 23, 32, 3)).astype(np.float32)

    def means(parts):  # of 4 x 4 pixels
      b, height, width, _ = parts.shape
      return [parts.reshape(b, height // 4, 4, width // 4, 4, 3).mean((2, 4))]

    rows, columns = (windows.plan(cells, 3, 1) for cells in (6, 8))
    (found,) = windows.joined_maps(means, images, rows, columns, 12, 4, loops=loops)
    whole = np.pad(images, [(0, 0), (0, 1), (0, 0), (0, 0)], mode='edge')
    np.testing.assert_allclose(found, means(whole)[0], rtol=0, atol=1e-6)

  @pytest.mark.parametrize('fields, words', [
      ({'window': 32}, 'window=32: expected at most the sides of the images, which are 32 x 24 pixels'),
      ({'window': 20, 'overlap': 8}, 'window=20, overlap=8: expected multiples of the 6 pixels'),
      ({'overlap': 4}, 'window=24, overlap=4: expected multiples of the 8 pixels')])
  def test_that_do_not_fit(self, fields, words):
    with pytest.raises(ValueError, match=words):
      small.fit(dataclasses.replace(PLAIN, **fields), GOOD, network=small.backbone(LAYERS))


class TestThinning:

  def thinned(self, vectors, number, rounds=4, num_neighbors=20):
    return thinning.thinned(
        vectors, number, rounds=rounds, num_neighbors=num_neighbors, rng=np.random.RandomState(0))

  def test_dense_places_lose_more(self):
    rng = np.random.default_rng(0)
    dense, sparse = rng.normal(0, 0.01, (300, 3)), rng.uniform(-5, 5, (100, 3))
    kept = self.thinned(np.concatenate([dense, sparse]).astype(np.float32), 80)
    assert len(kept) == 80 and (np.diff(kept) > 0).all()
    assert (kept >= 300).mean() > 0.5  # a quarter of all

  def test_of_no_more_than_wanted_all_stay(self):
    assert self.thinned(np.zeros((5, 2), np.float32), 5).tolist() == [0, 1, 2, 3, 4]

  def test_ends_where_no_radius_thins_enough(self):
    # All are neighbours of all, but only two count: a third would stay of each part, and a tenth may.
    kept = self.thinned(np.zeros((40, 2), np.float32), 4, num_neighbors=2)
    assert len(set(kept.tolist())) == 4


class TestBinaryMaps:

  def test_a_gap_in_a_line_is_closed_and_two_points_apart_are_not_joined(self):
    marked = np.zeros((20, 20), bool)
    marked[9:11, 3:8] = marked[9:11, 10:15] = True  # a gap of two
    marked[17, 3] = marked[17, 15] = True
    found = morphology.closed_along_lines(marked, 4)
    assert found[9:11, 3:15].all() and not found[17, 8:11].any()
    assert (found >= marked).all()

  def test_holes_are_filled_by_4_neighbours(self):
    ring = np.array([[0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]], bool)  # closed but for corners
    assert morphology.without_holes(ring)[1].all()

  def test_above_the_threshold(self):
    scores = np.full((30, 30), 0.5)
    scores[5:25, 5:25] = 2.0
    scores[10:14, 10:14] = 0.1  # a hole, too low for a closing
    expected = np.zeros((30, 30), bool)
    expected[6:24, 6:24] = True
    np.testing.assert_array_equal(superadd.marked(scores, 1.0, 3, 0.8), expected)


def _nearest(queries, bank):
  return np.linalg.norm(queries[..., None, :] - bank, axis=-1).min(-1) / queries.shape[-1]


@pytest.fixture(scope='module')
def network():
  return small.backbone(LAYERS)


@pytest.fixture(scope='module')
def model(network):
  return small.fit(PLAIN, GOOD, network=network)


@pytest.fixture(scope='module')
def patches():
  """The scores of patches of all images, by the bank of those not held out."""
  layers = [(small.maps(GOOD, (name,))[0], small.maps(NEW, (name,))[0]) for name in LAYERS]
  bank = [good[[1, 2, 4, 5]].reshape(-1, good.shape[-1]) for good, _ in layers]
  return [np.mean([_nearest(layer[i], rows) for layer, rows in zip(layers, bank)], 0) for i in range(2)]


class TestFit:

  def test_the_bank_is_of_images_not_held_out(self, model):
    for i, name in enumerate(LAYERS):
      expected = small.maps(GOOD[[1, 2, 4, 5]], (name,))[0]
      np.testing.assert_allclose(
          model.arrays[f'bank_{i}'], expected.reshape(-1, expected.shape[-1]), rtol=0, atol=1e-5)

  def test_the_threshold_is_of_those_held_out(self, model, patches):
    maps = scoring.enlarged(patches[0][[0, 3, 6]].astype(np.float32), (16, 12))
    expected = np.quantile(np.asarray(maps, np.float64), 0.95) * 1.421
    np.testing.assert_allclose(model.arrays['pixel_threshold'], [expected], rtol=1e-5)

  def test_scores_equal_brute_force(self, model, network, patches):
    found = small.predict(PLAIN, model, NEW, network=network)
    np.testing.assert_array_equal(found.evidence['patch'], patches[1].reshape(3, -1).argmax(1))
    np.testing.assert_allclose(found.map[:, ::31, ::23], patches[1][:, ::3, ::2], rtol=1e-4)
    np.testing.assert_array_equal(found.image, found.map.max((1, 2)))  # a thousandth of 768 is the largest
    binary = superadd.binary_maps(model, found.map)
    assert binary.shape == (3, 16, 12) and binary.dtype == bool

  def test_images_become_brighter_or_darker_but_those_held_out(self):
    detector, images = dataclasses.replace(PLAIN, brightness=0.2), np.full((7, 8, 8, 3), 200, np.uint8)
    found = [
        np.concatenate([batch.image[batch.valid] for batch in superadd._brightened(
            small.batches(images, size), detector, seed)])
        for size, seed in ((4, 0), (7, 0), (7, 1))]
    np.testing.assert_array_equal(found[0], found[1])
    values = found[0][:, 0, 0, 0]
    assert (found[0] == values[:, None, None, None]).all() and (values[[0, 3, 6]] == 200).all()
    assert len(set(values.tolist())) >= 4 and values.min() >= 160 and values.max() <= 240
    assert (found[1] != found[2]).any()

  def test_without_images_held_out_no_threshold_of_its_own(self, network):
    model = small.fit(dataclasses.replace(PLAIN, held_out=0), GOOD[:3], network=network)
    assert model.arrays.keys() == {'bank_0', 'bank_1'}
    with pytest.raises(ValueError, match='no threshold of its own'):
      superadd.binary_maps(model, np.zeros((1, 32, 24), np.float32))

  def test_one_image(self, network):
    with pytest.raises(ValueError, match='super_add.held_out=3 leaves no image of 1 for the bank'):
      small.fit(PLAIN, GOOD[:1], network=network)

  def test_layers_of_several_grids(self):
    with pytest.raises(ValueError, match='SuperADD compares patches of one grid: .* got 3 x 3, 6 x 6'):
      small.fit(PLAIN, GOOD, network=small.backbone(('a', 'b')))

  def test_the_last_pixels_are_seen_where_they_lie(self, network):
    detector = dataclasses.replace(PLAIN, window=16, overlap=0, held_out=0)
    good = np.full((3, 18, 25, 3), 90, np.uint8)
    model = small.fit(detector, good, network=network)
    new = good[:1].copy()
    new[0, 16, 24] = 255  # in the corner that is no whole patch
    found = small.predict(detector, model, new, network=network)
    assert found.map.shape == (1, 18, 25) and found.map[0].argmax() == 17 * 25 + 24

  def test_one_window_is_the_image_as_it_is(self, model, network):
    # Each position of this network sees one pixel: windows change nothing.
    whole = dataclasses.replace(PLAIN, window=0)
    found = small.fit(whole, GOOD, network=network)
    for i in range(2):
      np.testing.assert_allclose(found.arrays[f'bank_{i}'], model.arrays[f'bank_{i}'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('fields, message', [
    ({'overlap': 320}, 'window=640, overlap=320'), ({'window': -1}, 'window=-1'), ({'held_out': 1}, 'out=1'),
    ({'bank_rows': 0}, 'bank_rows=0'), ({'radius': 0}, 'radius=0'), ({'brightness': 1.5}, 'brightness=1.5'),
    ({'map_scale': 0.0}, 'map_scale=0.0'), ({'sigma': -1.0}, 'sigma=-1.0'), ({'lower': 2.0}, 'lower=2.0')])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    SuperADD(**fields)
