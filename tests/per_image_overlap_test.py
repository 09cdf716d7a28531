"""AUPIMO against its definition, and against what the authors' library and anomalib computed."""

import tracemalloc

import numpy as np
import pytest

from patchcore_jax.metrics import checks
from patchcore_jax.metrics.false_positive_rate import HighestScores
from patchcore_jax.metrics.per_image_overlap import aupimo, aupimo_interpolated

BOUNDS = (0.02, 0.3)


def _made(seed=0, levels=None, sizes=((9, 14),) * 8):
  """Maps and masks, the first of them anomalous."""
  rng = np.random.default_rng(seed)
  maps = [rng.random(size) for size in sizes]
  masks = [np.zeros(size, bool) for size in sizes]
  for i in range(0, len(sizes), 3):
    masks[i][1:5, 2:7] = True
    maps[i][masks[i]] += rng.random() * rng.random(20)
  return [np.round(m * levels) / levels for m in maps] if levels else maps, masks


def _points(maps, masks, thresholds):
  """F and the overlap of each anomalous image, threshold by threshold."""
  good = [m for m, mask in zip(maps, masks) if not mask.any()]
  rates = np.array([np.mean([np.mean(m >= t) for m in good]) for t in thresholds])
  overlaps = {i: np.array([np.mean(m[mask] >= t) for t in thresholds])
              for i, (m, mask) in enumerate(zip(maps, masks)) if mask.any()}
  return rates, overlaps


def _brute_force_nearest(maps, masks, num_thresholds):
  good = np.concatenate([m.ravel() for m, mask in zip(maps, masks) if not mask.any()])
  if num_thresholds:
    thresholds = np.linspace(good.min(), good.max(), num_thresholds)
  else:
    thresholds = np.unique(np.concatenate([m.ravel() for m in maps]))
    thresholds = thresholds[thresholds <= good.max()]
  rates, overlaps = _points(maps, masks, thresholds)
  first, last = (np.argmin(np.abs(rates - bound)) for bound in BOUNDS[::-1])
  inside = slice(first, last + 1)
  width = np.log(BOUNDS[1] / BOUNDS[0])
  return [np.clip(-np.trapezoid(overlaps[i][inside], np.log(rates[inside])) / width, 0, 1) if i in overlaps
          else None for i in range(len(maps))]


def _brute_force_interpolated(maps, masks):
  thresholds = np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]
  rates, overlaps = _points(maps, masks, thresholds)
  thresholds, rates = thresholds[rates > 0], rates[rates > 0]
  values = []
  for i in range(len(maps)):
    if i not in overlaps:
      values.append(None)
      continue
    area, y, x = 0.0, overlaps[i][-len(rates):], np.log(rates)
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:]):
      low, high = max(x0, np.log(BOUNDS[0])), min(x1, np.log(BOUNDS[1]))
      if low < high:
        at = [y0 + (y1 - y0) * (position - x0) / (x1 - x0) for position in (low, high)]
        area += (high - low) * sum(at) / 2
    values.append(area / np.log(BOUNDS[1] / BOUNDS[0]))
  return values


SIZES = {
    'equal': ((9, 14),) * 8,
    'unequal': ((9, 14), (7, 18), (20, 9), (6, 17), (12, 12), (5, 9), (8, 8), (40, 3))}


def _assert_equal(values, expected, tolerance=1e-12):
  assert [v is None for v in values] == [v is None or np.isnan(v) for v in expected]
  for value, other in zip(values, expected):
    if value is not None:
      assert type(value) is float and value == pytest.approx(other, rel=0, abs=tolerance)


class TestDefinition:

  @pytest.mark.parametrize('sizes', SIZES)
  @pytest.mark.parametrize('levels', [None, 60])
  @pytest.mark.parametrize('num_thresholds', [57, 400, None])
  def test_nearest(self, sizes, levels, num_thresholds):
    for seed in range(3):
      maps, masks = _made(seed, levels, SIZES[sizes])
      found = aupimo(maps, masks, bounds=BOUNDS, num_thresholds=num_thresholds, force=True)
      _assert_equal(found.values, _brute_force_nearest(maps, masks, num_thresholds))
      assert found.mean == pytest.approx(np.mean([v for v in found.values if v is not None]))

  @pytest.mark.parametrize('sizes', SIZES)
  @pytest.mark.parametrize('levels', [None, 60])
  def test_interpolated(self, sizes, levels):
    for seed in range(3):
      maps, masks = _made(seed, levels, SIZES[sizes])
      found = aupimo_interpolated(maps, masks, bounds=BOUNDS)
      _assert_equal(found.values, _brute_force_interpolated(maps, masks))
      assert found.rule == 'interpolated' and found.reached == found.bounds == BOUNDS
      good = np.unique(np.concatenate([m.ravel() for m, mask in zip(maps, masks) if not mask.any()]))
      rates, _ = _points(maps, masks, good)
      assert found.thresholds == tuple(good[rates <= bound].min() for bound in BOUNDS)

  def test_by_hand(self):
    # Good pixels 1 to 10: F(t) = (11 - t) / 10. Half of the mask lies above 10, the rest below 1.
    maps, masks = np.array([[np.arange(1.0, 11)], [[20, 0] * 5]]), np.array([[[0] * 10], [[1] * 10]])
    assert aupimo_interpolated(maps, masks, bounds=(0.1, 1)).values == (None, pytest.approx(0.5))
    found = aupimo(maps, masks, bounds=(0.18, 0.52), num_thresholds=10, force=True)
    # F = 0.2 at 9 and F = 0.5 at 6 are nearest; the width stays nominal.
    assert found.values[1] == pytest.approx(0.5 * np.log(0.5 / 0.2) / np.log(0.52 / 0.18))
    assert found.reached == (0.2, 0.5) and found.thresholds == (9, 6) and found.points == 4
    assert found.notes == ('the rate nearest to 0.18 is 0.2', 'the rate nearest to 0.52 is 0.5',
                           'only 4 thresholds lie between the bounds')

  @pytest.mark.parametrize('bounds', [(0.02, 0.3), (0.011, 0.97), (0.1, 1)])
  def test_extremes(self, bounds):
    maps, masks = _made()
    perfect = [m * 0.1 + mask for m, mask in zip(maps, masks)]
    found = aupimo_interpolated(perfect, masks, bounds=bounds)
    assert {value for value in found.values if value is not None} == {1.0} and found.mean == 1
    inverted = [m * 0.1 - mask for m, mask in zip(maps, masks)]
    assert aupimo_interpolated(inverted, masks, bounds=BOUNDS).mean == 0

  def test_without_skill(self):
    rng = np.random.default_rng(0)
    maps, masks = rng.random((8, 100, 100)), np.zeros((8, 100, 100), bool)
    masks[4:] = True
    expected = (0.1 - 0.01) / np.log(10)
    assert aupimo_interpolated(maps, masks, bounds=(0.01, 0.1)).mean == pytest.approx(expected, abs=2e-3)

  def test_only_the_order_of_scores_counts(self):
    maps, masks = _made(levels=100)
    expected = aupimo_interpolated(maps, masks, bounds=BOUNDS).values
    for transform in (np.exp, lambda m: 4 * m - 7, np.float32, lambda m: np.round(100 * m).astype(int)):
      assert aupimo_interpolated([transform(m) for m in maps], masks, bounds=BOUNDS).values == expected

  @pytest.mark.parametrize('compute', [aupimo, aupimo_interpolated])
  def test_normal_pixels_of_anomalous_images_do_not_count(self, compute):
    maps, masks = _made()
    expected = compute(maps, masks, bounds=BOUNDS).values
    for values, mask in zip(maps, masks):
      if mask.any():
        values[~mask] = 9
    assert compute(maps, masks, bounds=BOUNDS).values == expected


class TestHighestScores:

  @pytest.mark.parametrize('sizes', SIZES)
  @pytest.mark.parametrize('levels', [None, 20, 2])
  @pytest.mark.parametrize('limit', [0.01, 0.2, 1])
  def test_rates(self, monkeypatch, sizes, levels, limit):
    monkeypatch.setattr('patchcore_jax.metrics.false_positive_rate._ROOM', 10)
    for seed in range(3):
      maps, _ = _made(seed, levels, SIZES[sizes])
      highest = HighestScores(limit, len(maps) + 3)  # more were expected
      for values in maps:
        highest.add(values)
      scores, rates = highest.scores()
      everything = np.unique(np.concatenate([m.ravel() for m in maps]))
      expected = np.array([np.mean([np.mean(m >= t) for m in maps]) for t in everything])
      np.testing.assert_array_equal(scores, everything[everything >= highest.lowest])
      np.testing.assert_allclose(rates, expected[-len(scores):], rtol=1e-13)
      assert highest.lowest == -np.inf or rates[0] > limit
      between = np.concatenate([scores, scores[:-1] + np.diff(scores) / 2, scores[-1:] + 1])
      np.testing.assert_allclose(
          highest.rates(between), [np.mean([np.mean(m >= t) for m in maps]) for t in between], rtol=1e-13)

  def test_memory_does_not_grow_with_images(self):
    rng = np.random.default_rng(0)
    mask, marked = np.zeros((256, 256), bool), np.zeros((256, 256), bool)
    marked[:20] = True

    class Maps:
      def __len__(self):
        return 60

      def __getitem__(self, i):
        return rng.random((256, 256), np.float32)

    tracemalloc.start()
    try:
      aupimo_interpolated(Maps(), [mask] * 50 + [marked] * 10, bounds=(1e-4, 1e-3))
      peak = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
    assert peak < 20 * 4 * 256 * 256  # of 60 maps


class TestErrors:

  @pytest.mark.parametrize('compute', [aupimo, aupimo_interpolated])
  def test_not_defined(self, compute):
    maps, masks = _made()
    for words, arguments in (
        ('Only one class', (maps, [np.zeros_like(m) for m in masks])),
        ('Only one class', (maps, [np.ones_like(m) for m in masks])),
        ('down to 1e-05, got 0.00159', (maps, masks)),
        ('down to 0.02, got 1', ([np.ones_like(m) for m in maps], masks))):
      with pytest.raises(checks.NotDefined, match=words):
        compute(*arguments, **({} if '1e-05' in words else {'bounds': BOUNDS}))

  @pytest.mark.parametrize('compute', [aupimo, aupimo_interpolated])
  def test_bad_input(self, compute):
    maps, masks = _made()
    nan = [np.where(mask, np.nan, m) for m, mask in zip(maps, masks)]
    for words, arguments in (
        ('image 0, maps: expected finite', (nan, masks)),
        ('image 0, masks: expected 0', (maps, [255 * m.astype(int) for m in masks])),
        ('differ in shape', (maps[:3], masks)), ('differ in shape', (maps, [m[1:] for m in masks])),
        ('at least one', ([], []))):
      with pytest.raises(ValueError, match=words):
        compute(*arguments, bounds=BOUNDS)
    for bounds in ((0, 0.1), (0.2, 0.1), (0.1, 1.1), (0.1, np.nan), (0.1, 0.2, 0.3)):
      with pytest.raises(ValueError, match='0 < lower < upper <= 1'):
        compute(maps, masks, bounds=bounds)

  def test_thresholds(self):
    maps, masks = _made()
    with pytest.raises(ValueError, match='at least 2 thresholds'):
      aupimo(maps, masks, bounds=BOUNDS, num_thresholds=1)
    with pytest.raises(checks.NotDefined, match='at least 31 thresholds between the bounds, got'):
      aupimo(maps, masks, bounds=BOUNDS, num_thresholds=50)
    with pytest.raises(checks.NotDefined, match='for both'):
      aupimo(maps, masks, bounds=(0.02, 0.021), num_thresholds=50)
    with pytest.raises(checks.NotDefined, match='room for 300,000 thresholds'):
      aupimo([1 + 1e-3 * m.astype(np.float32) for m in maps], masks, bounds=BOUNDS)


@pytest.fixture
def arrays(golden):
  with np.load(golden / 'evaluation' / 'aupimo.npz') as stored:
    return dict(stored)


class TestStoredValues:

  def test_authors_and_anomalib(self, arrays):
    maps, masks = arrays['small_maps'], arrays['small_masks']
    emptied, whole = masks.copy(), masks.copy()
    emptied[9], whole[9] = False, True
    for name, case, num_thresholds in (
        ('small', masks, 1000), ('small', masks, 20000), ('small_emptied', emptied, 1000),
        ('small_whole', whole, 1000), ('small_forced', masks, 60)):
      found = aupimo(maps, case, bounds=(1e-3, 1e-1), num_thresholds=num_thresholds, force='forced' in name)
      for origin in ('authors', 'anomalib'):
        _assert_equal(found.values, arrays[f'{name}_{origin}_{num_thresholds}_aupimo'])
      if name == 'small':
        assert found.points == arrays[f'small_authors_{num_thresholds}_points']
        for bound, threshold, reached in zip((0.001, 0.1), found.thresholds, found.reached):
          _, *expected = arrays[f'small_authors_{num_thresholds}_at_{bound}']
          assert threshold == expected[0] and reached == pytest.approx(expected[1], rel=1e-14)

  def test_every_score(self, arrays):
    maps, masks = arrays['small_maps'], arrays['small_masks']
    found = aupimo(maps, masks, bounds=(1e-3, 1e-1), num_thresholds=None)
    _assert_equal(found.values, arrays['small_limit_nearest'])
    found = aupimo_interpolated(maps, masks, bounds=(1e-3, 1e-1))
    _assert_equal(found.values, arrays['small_limit_interpolated'])
