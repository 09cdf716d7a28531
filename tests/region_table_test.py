"""The table of regions against counting each by itself, and against stored rows."""

import numpy as np
import pytest
import sklearn.metrics
from scipy import ndimage

from patchcore_jax.metrics import checks, curve
from patchcore_jax.metrics.region_table import area_quartiles, by_area, tabulate_regions

STRUCTURES = {8: np.ones((3, 3)), 4: None}


def _made(seed=0, levels=None):
  rng = np.random.default_rng(seed)
  sizes = [(12, 17), (20, 9), (11, 11), (8, 14), (9, 9)]
  masks = [ndimage.gaussian_filter(rng.standard_normal(size), 1) > 0.3 for size in sizes]
  masks[1][:] = masks[4][:] = False
  maps = [rng.random(mask.shape) + 0.4 * mask for mask in masks]
  return [np.round(m * levels) / levels for m in maps] if levels else maps, masks


@pytest.mark.parametrize('levels', [None, 6])
@pytest.mark.parametrize('connectivity', [8, 4])
def test_every_column(levels, connectivity):
  maps, masks = _made(1, levels)
  table = tabulate_regions(maps, masks, threshold=0.8, connectivity=connectivity)
  normal = np.concatenate([m[~mask] for m, mask in zip(maps, masks)])
  rows = iter(table.regions)
  for i, (values, mask) in enumerate(zip(maps, masks)):
    labels, count = ndimage.label(mask, STRUCTURES[connectivity])
    for number in range(1, count + 1):
      row, inside = next(rows), labels == number
      y, x = np.nonzero(inside)
      scores = values[inside]
      assert row[:7] == (i, number, inside.sum(), x.min(), y.min(), x.max() + 1, y.max() + 1)
      assert row[7:9] == pytest.approx((x.mean(), y.mean()), abs=1e-12)
      assert row.touches_border == (inside.sum() > inside[1:-1, 1:-1].sum())
      assert row.maximum == scores.max() and row.mean == pytest.approx(scores.mean(), abs=1e-12)
      assert row.half_found_at == max(t for t in scores if np.mean(scores >= t) >= 0.5)
      assert row.overlap == np.mean(scores >= 0.8)
      assert row.auroc == pytest.approx(sklearn.metrics.roc_auc_score(
          np.repeat([1, 0], [scores.size, normal.size]), np.concatenate([scores, normal])), abs=1e-12)
  assert next(rows, None) is None


@pytest.mark.parametrize('connectivity', [8, 4])
def test_false_regions(connectivity):
  maps, masks = _made(2)
  table = tabulate_regions(maps, masks, threshold=0.9, connectivity=connectivity)
  false = {True: 0, False: 0}
  for values, mask in zip(maps, masks):
    labels, count = ndimage.label(values >= 0.9, STRUCTURES[connectivity])
    false[bool(mask.any())] += sum(not mask[labels == k].any() for k in range(1, count + 1))
  assert false[True] and false[False]  # there are some
  assert table.false[:3] == (false[False], false[True], 2)
  assert table.false.per_good_image == false[False] / 2
  pixels = sum(mask.size for mask in masks)
  assert table.false.per_megapixel == pytest.approx(sum(false.values()) * 1e6 / pixels)
  shares = [np.mean(m >= 0.9) for m, mask in zip(maps, masks) if not mask.any()]
  assert table.false.marked_share == pytest.approx(np.mean(shares), abs=1e-15)


def test_the_mean_of_all_aurocs_is_the_area_of_the_whole_curve():
  """AU-PRO up to a rate of 1."""
  maps, masks = _made(3, levels=20)
  curve_of_regions = curve.of_regions(maps, masks)
  table = tabulate_regions(maps, masks, threshold=0.5, curve=curve_of_regions)
  assert table == tabulate_regions(maps, masks, threshold=0.5)
  aurocs = [region.auroc for region in table.regions]
  assert np.mean(aurocs) == pytest.approx(curve_of_regions.area(1), abs=1e-12)


def test_what_lies_on_disk_gives_the_same(monkeypatch):
  maps, masks = _made(4)
  expected = tabulate_regions(maps, masks, threshold=0.5)
  monkeypatch.setattr(curve, '_MOST', 16)
  monkeypatch.setattr(curve, '_TOGETHER', 100)
  assert tabulate_regions(maps, masks, threshold=0.5) == expected


def test_not_defined():
  whole = tabulate_regions([np.eye(3)], [np.ones((3, 3), bool)], threshold=0.5)
  assert whole.regions[0].auroc is None
  assert whole.false.per_good_image is None and whole.false.marked_share is None
  none = tabulate_regions([np.eye(3)], [np.zeros((3, 3), bool)], threshold=0.5)
  assert none.regions == () and none.false.per_good_image == 1
  assert [c.overlap for c in by_area(none.regions)] == [None] * 4
  with pytest.raises(checks.NotDefined, match='at least one region'):
    area_quartiles(none.regions)


def test_classes_of_size():
  maps, masks = _made(5)
  regions = tabulate_regions(maps, masks, threshold=0.8).regions
  for areas in ((2, 5, 9), area_quartiles(regions)):
    classes = by_area(regions, areas)
    assert sum(c.regions for c in classes) == len(regions)
    for found, low, high in zip(classes, (0, *areas), (*areas, np.inf)):
      overlaps = [r.overlap for r in regions if low <= r.area < high]
      assert found[2:] == (len(overlaps), np.count_nonzero(overlaps), (np.array(overlaps) >= 0.5).sum(),
                           pytest.approx(np.mean(overlaps)) if overlaps else None)
  for areas in ((), (0, 5), (5, 5)):
    with pytest.raises(ValueError, match='areas above 0 that ascend'):
      by_area(regions, areas)


@pytest.mark.parametrize('change, words', [
    ({'threshold': np.inf}, 'finite threshold'), ({'connectivity': 6}, 'connectivity 4 or 8'),
    ({'curve': curve.of_regions(*_made(7))}, 'curve of these images'),
    ({'maps': [np.full((12, 17), np.nan), *_made()[0][1:]]}, 'image 0, maps: expected finite'),
    ({'masks': [2 * mask.astype(int) for mask in _made()[1]]}, 'image 0, masks: expected 0')])
def test_errors(change, words):
  maps, masks = _made()
  with pytest.raises(ValueError, match=words):
    tabulate_regions(**{'maps': maps, 'masks': masks, 'threshold': 0.5} | change)


def test_stored_rows(golden):
  mvtec, arrays = (np.load(golden / 'evaluation' / name) for name in ('mvtec.npz', 'regions.npz'))
  maps, masks = mvtec['basic_maps'], mvtec['basic_masks'] > 0
  names = ('image', 'number', 'area', 'left', 'top', 'right', 'bottom', 'centroid_x', 'centroid_y',
           'touches_border', 'maximum', 'mean', 'overlap')
  rows = tabulate_regions(maps, masks, threshold=0.8).regions
  found = [[getattr(row, name) for name in names] for row in rows]
  np.testing.assert_allclose(found, arrays['regions'][:, :13], rtol=0, atol=1e-12)
  for connectivity in (4, 8):
    rows = tabulate_regions(maps, masks, threshold=0.8, connectivity=connectivity).regions
    counts = np.bincount([row.image for row in rows], minlength=len(maps))
    np.testing.assert_array_equal(counts, arrays[f'count_{connectivity}'])
