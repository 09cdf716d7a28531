"""Thresholds from maps of good images, against NumPy on all pixels at once, and against stored values."""

import numpy as np
import pytest
from scipy import ndimage

from patchcore_jax.metrics import thresholds

SIZES = ((9, 7), (4, 11), (8, 8), (1, 5))


def _maps(seed=0, levels=None, dtype=np.float32):
  """Maps of several sizes, with scores below 0."""
  rng = np.random.default_rng(seed)
  maps = [rng.standard_normal(size).astype(dtype) for size in SIZES]
  return [np.round(values * levels) / dtype(levels) for values in maps] if levels else maps


def _pixels(maps):
  return np.concatenate([values.ravel() for values in maps])


class Once:
  """A sequence that counts how often each image is read."""

  def __init__(self, maps):
    self.maps, self.reads = maps, [0] * len(maps)

  def __len__(self):
    return len(self.maps)

  def __getitem__(self, i):
    self.reads[i] += 1
    return self.maps[i]


class TestKSigma:

  def test_by_hand(self):
    assert thresholds.k_sigma([[[1.0, 3.0]], [[5.0], [7.0]]], k=2) == pytest.approx(4 + 2 * 5**0.5)

  @pytest.mark.parametrize('shift', [0, 1e6])
  def test_equals_numpy(self, shift):
    maps = [values.astype(np.float64) + shift for values in _maps()]
    expected = np.mean(_pixels(maps)) + 2.5 * np.std(_pixels(maps))
    assert thresholds.k_sigma(maps, k=2.5) == pytest.approx(expected, rel=1e-14)

  def test_reads_each_map_once(self):
    maps = Once(_maps())
    thresholds.k_sigma(maps)
    assert set(maps.reads) == {1}


class TestQuantile:

  @pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
  @pytest.mark.parametrize('levels', [None, 3])
  @pytest.mark.parametrize('method', ['higher', 'lower', 'linear'])
  def test_equals_numpy(self, dtype, levels, method):
    for seed in range(3):
      maps = _maps(seed, levels, dtype)
      for share in (0, 0.001, 0.3, 0.5, 0.95, 0.999, 1):
        expected = np.quantile(_pixels(maps).astype(np.float64), share, method=method)
        assert thresholds.quantile(maps, share=share, method=method) == expected

  def test_zeros_of_both_signs_are_equal(self):
    assert thresholds.quantile([np.array([[-0.0, 0.0, 0.0, -0.0, 1.0]])], share=0.5) == 0

  def test_whole_numbers(self):
    assert thresholds.quantile([np.array([[1, 2, 3]])], share=0.4) == 2

  @pytest.mark.parametrize('dtype, reads', [(np.float16, 1), (np.float32, 2), (np.float64, 4)])
  def test_reads(self, dtype, reads):
    maps = Once(_maps(dtype=dtype))
    thresholds.quantile(maps)
    assert max(maps.reads) <= reads + 1  # and once for the type

  def test_no_more_alarm_than_asked(self):
    maps = _maps(levels=2)
    for share in (0.5, 0.9, 0.99):
      assert np.mean(_pixels(maps) > thresholds.quantile(maps, share=share)) <= 1 - share

  def test_scaled(self):
    maps = _maps()
    assert thresholds.scaled_quantile(maps) == 1.421 * thresholds.quantile(maps, share=0.95, method='linear')


def test_maximum():
  assert thresholds.maximum(_maps()) == _pixels(_maps()).max()


class TestLargestArea:

  def test_by_hand(self):
    # At 3 a component of 3, at 4 one of 2: above 3 nothing is larger than 2 pixels.
    maps = [np.array([[5.0, 4.0, 3.0], [0.0, 0.0, 0.0]]), np.array([[9.0, 1.0, 2.0]])]
    assert thresholds.largest_area(maps, area=2) == np.nextafter(3.0, 9)
    assert thresholds.largest_area(maps, area=0) == np.nextafter(9.0, 10)

  def test_corners(self):
    maps = [np.array([[3.0, 0.0], [1.0, 2.0]])]
    assert thresholds.largest_area(maps, area=1) == np.nextafter(2.0, 9)
    assert thresholds.largest_area(maps, area=1, connectivity=4) == np.nextafter(1.0, 9)

  @pytest.mark.parametrize('levels', [None, 3])
  @pytest.mark.parametrize('area', [0, 1, 4, 20])
  def test_equals_trying_every_score(self, levels, area):
    for seed in range(3):
      maps = _maps(seed, levels)
      def largest(t, maps=maps):
        labels = [ndimage.label(values >= t, np.ones((3, 3)))[0] for values in maps]
        return max(np.bincount(found.ravel())[1:].max(initial=0) for found in labels)
      last = max(t for t in np.unique(_pixels(maps)) if largest(t) > area)
      threshold = thresholds.largest_area(maps, area=area)
      assert threshold == np.nextafter(last, np.float32(np.inf))
      assert largest(threshold) <= area

  def test_errors(self):
    for words, kwargs in (('below that of a map', {'area': 10**4}), ('from 0 on', {'area': -1}),
                          ('connectivity 4 or 8', {'area': 1, 'connectivity': 6})):
      with pytest.raises(ValueError, match=words):
        thresholds.largest_area(_maps(), **kwargs)


class TestAtFalsePositiveRate:

  @pytest.mark.parametrize('levels', [None, 40, 3])
  @pytest.mark.parametrize('rate', [0.01, 0.1, 0.5, 1])
  def test_equals_trying_every_score(self, levels, rate):
    for seed in range(3):
      maps = _maps(seed, levels)
      rates = {t: np.mean([np.mean(m >= t) for m in maps]) for t in np.unique(_pixels(maps))}
      reached = [t for t, value in rates.items() if value <= rate + 1e-12]
      if reached:
        assert thresholds.at_false_positive_rate(maps, rate=rate) == min(reached)
      else:
        with pytest.raises(ValueError, match='take at least'):
          thresholds.at_false_positive_rate(maps, rate=rate)

  def test_out_of_range(self):
    with pytest.raises(ValueError, match=r'in \(0, 1\]'):
      thresholds.at_false_positive_rate(_maps(), rate=0)


@pytest.mark.parametrize('name', thresholds.RULES)
class TestEveryRule:

  def _call(self, name, maps):
    kwargs = {'largest_area': {'area': 3}, 'at_false_positive_rate': {'rate': 0.1}}.get(name, {})
    return thresholds.RULES[name](maps, **kwargs)

  def test_the_form_of_the_sequence_and_order_change_nothing(self, name):
    maps = np.random.default_rng(0).random((5, 6, 8))
    value = self._call(name, maps)
    assert type(value) is float
    assert self._call(name, list(maps)) == value
    assert self._call(name, maps[::-1]) == pytest.approx(value, rel=1e-14)
    assert self._call(name, Once(maps)) == value

  @pytest.mark.parametrize('maps, words', [
      ([], 'at least one map'), ([np.zeros(4)], r'expected \[height, width\]'),
      ([np.zeros((2, 2)), np.array([[0, np.nan]])], 'image 1, maps: expected finite'),
      ([np.array([[0, np.inf]])], 'image 0, maps: expected finite')])
  def test_errors(self, name, maps, words):
    with pytest.raises(ValueError, match=words):
      self._call(name, maps)


def test_errors_of_numbers():
  with pytest.raises(ValueError, match='k=nan'):
    thresholds.k_sigma(_maps(), k=np.nan)
  with pytest.raises(ValueError, match='1.1'):
    thresholds.quantile(_maps(), share=1.1)
  with pytest.raises(ValueError, match='midpoint'):
    thresholds.quantile(_maps(), method='midpoint')
  with pytest.raises(ValueError, match='image 1, maps: expected float32 as of image 0, got float64'):
    thresholds.quantile([np.zeros((2, 2), np.float32), np.zeros((2, 2))])


def test_stored_values(golden):
  stats, ad2 = (np.load(golden / 'evaluation' / name) for name in ('stats.npz', 'ad2.npz'))
  maps = ad2['can_validation']
  for k in (1, 2, 3):
    expected = float(stats[f'val_mean_plus_{k}_std'])
    assert thresholds.k_sigma(maps, k=k) == pytest.approx(expected, rel=0, abs=1e-12)
  assert thresholds.maximum(maps) == stats['val_maximum']
  for share in (0.95, 0.99, 0.995, 0.999):
    for method, tolerance in (('higher', 0), ('lower', 0), ('linear', 1e-12)):
      expected = float(stats[f'val_quantile_{share}_{method}'])
      value = thresholds.quantile(maps, share=share, method=method)
      assert value == pytest.approx(expected, rel=0, abs=tolerance)
  for name in ('can', 'vial'):
    expected = float(ad2[f'{name}_threshold'])
    assert thresholds.k_sigma(ad2[f'{name}_validation']) == pytest.approx(expected, rel=0, abs=1e-12)
