"""The curve of pixels: in memory and by way of the disk, of images of several sizes, read one by one."""

import tracemalloc

import numpy as np
import pytest
import scipy.ndimage

from patchcore_jax.metrics import checks, curve, ranking, regions, working_points


def images(seed=0, n=7, levels=64):
  """Maps and masks of several sizes, with ties."""
  rng = np.random.default_rng(seed)
  maps, masks = [], []
  for i in range(n):
    shape = rng.integers(9, 30, 2)
    mask = scipy.ndimage.gaussian_filter(rng.standard_normal(shape), 2) > 0.1
    masks.append(mask & (i % 3 > 0))
    maps.append((np.round((rng.random(shape) + 0.4 * mask) * levels) / levels).astype(np.float32))
  return maps, masks


class Lazy:
  """Images that are read whenever they are asked for."""

  def __init__(self, arrays):
    self.arrays, self.reads = arrays, []

  def __len__(self):
    return len(self.arrays)

  def __getitem__(self, i):
    self.reads.append(i)
    return np.array(self.arrays[i])


def values(c):
  return [ranking.auroc_of(c), ranking.average_precision_of(c), *working_points.f1_optimal_of(c),
          *(c.area(limit) for limit in (0.01, 0.05, 0.3, 1))]


def test_points_by_hand():
  # Anomalous 5, 2, 2; good 7, 5, 2, 1.
  c = curve.of_scores([1, 1, 1, 0, 0, 0, 0], [5, 2, 2, 7, 5, 2, 1])
  (part,) = c.parts
  assert [a.tolist() for a in part] == [[5, 2], [1, 3], [pytest.approx(1 / 3), 1], [1, 2], [2, 3]]
  assert (c.anomalous, c.good) == (3, 4)


@pytest.mark.parametrize('together, most', [(50, 2**24), (2**23, 256), (100, 64)])
@pytest.mark.parametrize('levels', [4, 64, 10**6])
def test_in_parts_as_at_once(together, most, levels, monkeypatch):
  maps, masks = images(levels=levels)
  whole = curve.of_regions(maps, masks)
  assert len(whole.parts) == 1
  monkeypatch.setattr(curve, '_TOGETHER', together)
  monkeypatch.setattr(curve, '_MOST', most)
  parts = curve.of_regions(maps, masks)
  if most < 256 and levels == 10**6:
    assert len(parts.parts) > 1
  for i, name in enumerate(curve.Part._fields):
    joined = np.concatenate([part[i] for part in parts.parts])
    np.testing.assert_allclose(joined, whole.parts[0][i], rtol=0, atol=1e-12, err_msg=name)
  np.testing.assert_allclose(values(parts), values(whole), rtol=0, atol=1e-12)


def test_pixels_are_those_of_all_images():
  maps, masks = images()
  flat_maps, flat_masks = (np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks))
  c, flat = curve.of_regions(maps, masks), curve.of_scores(flat_masks, flat_maps)
  assert values(c)[:6] == values(flat)[:6]


def test_reads_each_image_twice():
  maps, masks = images()
  lazy = Lazy(maps), Lazy(masks)
  assert values(curve.of_regions(*lazy)) == values(curve.of_regions(maps, masks))
  assert [a.reads for a in lazy] == [[*range(7), *range(7)]] * 2


def test_memory_does_not_grow_with_the_images(monkeypatch):
  monkeypatch.setattr(curve, '_TOGETHER', 2**14)
  monkeypatch.setattr(curve, '_MOST', 2**14)

  class Drawn:
    def __init__(self, n, mask):
      self.n, self.mask = n, mask

    def __len__(self):
      return self.n

    def __getitem__(self, i):
      if self.mask:
        return np.arange(128 * 128).reshape(128, 128) % 128 < 50
      return np.random.default_rng(i).random((128, 128), np.float32)

  def peak(n):
    tracemalloc.start()
    try:
      regions.aupro(Drawn(n, False), Drawn(n, True))
      return tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()

  peak(5)  # imports
  assert peak(80) < 1.5 * peak(20)  # a sample says where to cut


def test_what_is_not_defined():
  maps, masks = images()
  for only in (0, 1):
    c = curve.of_regions(maps, [np.full_like(mask, only) for mask in masks])
    for function in (ranking.auroc_of, ranking.average_precision_of, working_points.f1_optimal_of,
                     regions.aupro_of):
      with pytest.raises(checks.NotDefined, match='Only one class'):
        function(c)


def test_bad_input_names_the_image():
  maps, masks = images()
  maps[4] = maps[4] * np.nan
  with pytest.raises(ValueError, match='image 4, maps: expected finite'):
    curve.of_regions(maps, masks)
  maps, masks = images()
  masks[2] = masks[2][1:]
  with pytest.raises(ValueError, match='image 2, masks .* differ in shape'):
    curve.of_regions(maps, masks)
  with pytest.raises(ValueError, match='7 masks and 3 maps'):
    curve.of_regions(maps[:3], masks)
