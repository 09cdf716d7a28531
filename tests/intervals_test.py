"""Intervals: against the reference arrays, by brute force, and how often they hold the truth."""

import numpy as np
import pytest
import scipy.stats

from experiments import coverage
from patchcore_jax import metrics
from patchcore_jax.metrics import curve, intervals, pixel_resamples, ranking, working_points


@pytest.fixture
def stats(golden):
  with np.load(golden / 'evaluation' / 'stats.npz') as arrays:
    return dict(arrays)


def scored(good=20, anomalous=30, levels=None, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(good + anomalous) >= good
  scores = rng.standard_normal(labels.size) + 1.2 * labels
  return labels, np.round(scores * levels) / levels if levels else scores


def made(levels=None, n=9, seed=0):
  """Maps and masks of two sizes; the first third of the images is good."""
  rng = np.random.default_rng(seed)
  maps, masks = [], []
  for i in range(n):
    mask = np.zeros((14, 16) if i % 2 else (11, 9), bool)
    for _ in range(2 * (i >= n // 3)):
      top, left = rng.integers(0, 7, 2)
      mask[top:top + 4, left:left + 3] = True
    values = rng.random(mask.shape) + 0.4 * mask
    maps.append(np.round(values * levels) / levels if levels else values)
    masks.append(mask)
  return maps, masks


class TestReference:

  def test_resamples_of_auroc(self, stats):
    good, bad = stats['boot_good'], stats['boot_bad']
    labels, scores = np.repeat([0, 1], [good.size, bad.size]), np.concatenate([good, bad])
    picks = intervals.resampled((good.size, bad.size), 1000, 7)
    np.testing.assert_array_equal(picks[0][:3], stats['boot_good_index_head'])
    np.testing.assert_array_equal(picks[1][:3], stats['boot_bad_index_head'])
    (drawn,) = intervals.image_resamples(ranking.auroc, labels, [scores], resamples=1000, seed=7)
    np.testing.assert_allclose(drawn, stats['boot_values'], rtol=0, atol=1e-12)
    assert drawn.std(ddof=1) == pytest.approx(float(stats['boot_standard_error']), abs=1e-12)
    for method in ('percentile', 'basic'):
      found = intervals.image_interval(
          ranking.auroc, labels, scores, method=method, resamples=1000, seed=7)
      np.testing.assert_allclose(
          [found.estimate, found.low, found.high],
          [float(stats['boot_auroc']), *stats[f'boot_{method}_95']], rtol=0, atol=1e-12)
    assert intervals.delong_variance(labels, scores) ** 0.5 == pytest.approx(
        float(stats['delong_standard_error']), abs=1e-12)

  def test_means(self, stats):
    a, b = stats['scores_a'], stats['scores_b']
    for name, values in (('a', a), ('a_minus_b', a - b)):
      rng = np.random.default_rng(7)
      intervals.resampled((30, 20), 1000, rng)  # the reference goes on from there
      found = intervals.mean_interval(
          values, bounds=(-1, 1), method='percentile', resamples=1000, seed=rng)
      assert found.estimate == pytest.approx(float(stats[f'boot_mean_{name}']), abs=1e-12)
      np.testing.assert_allclose(
          [found.low, found.high], stats[f'boot_mean_{name}_percentile_95'], rtol=0, atol=1e-12)
      found = intervals.mean_interval(values, bounds=(-1, 1), resamples=1000, seed=8)
      np.testing.assert_allclose(
          [found.low, found.high], stats[f'boot_mean_{name}_scipy_bca_95'], rtol=0, atol=1e-12)


class TestAurocInterval:

  def test_delong_by_hand(self):
    # Of the good images 0 and 1/2 of the anomalous lie below; of the anomalous 1/2 and 1 of the good.
    assert intervals.delong_variance([0, 0, 1, 1], [1, 3, 2, 4]) == pytest.approx(0.125 / 2 + 0.125 / 2)
    assert intervals.delong_variance([0, 1, 1], [1, 3, 2]) == 0

  @pytest.mark.parametrize('levels', [None, 2])
  def test_is_symmetric_and_knows_no_unit(self, levels):
    labels, scores = scored(levels=levels)
    found = intervals.auroc_interval(labels, scores)
    assert 0 < found.low < found.estimate == metrics.auroc(labels, scores) < found.high < 1
    flipped = intervals.auroc_interval(~labels, scores)
    assert (flipped.low, flipped.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-12)
    again = intervals.auroc_interval(labels, np.exp(scores))
    assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=1e-12)

  def test_a_higher_level_is_wider_and_more_images_are_narrower(self):
    few, more, sure = (
        intervals.auroc_interval(*scored(*size), level=level)
        for size, level in (((20, 30), 0.95), ((200, 300), 0.95), ((20, 30), 0.99)))
    assert more.high - more.low < few.high - few.low < sure.high - sure.low

  @pytest.mark.parametrize('size', [(1, 1), (5, 5), (40, 60), (150, 150)])
  def test_at_one_it_is_no_point(self, size):
    labels = np.arange(sum(size)) >= size[0]
    found = intervals.auroc_interval(labels, labels)
    assert found.estimate == found.high == 1
    # Of the smaller class, less than a share 3.9 / n may be on the wrong side (Clopper and Pearson).
    assert 0.025 ** (1 / min(size)) - 0.1 < found.low < 1 - 1 / (3 * min(size))

  def test_equal_scores_do_not_make_it_sure(self):
    found = intervals.auroc_interval([0] * 20 + [1] * 20, [1.0] * 40)
    assert found.low < 0.35 and found.high > 0.65

  def test_notes_and_text(self):
    found = intervals.auroc_interval(*scored(30, 9))
    assert found.notes == ('Only 9 anomalous images.',)
    assert not intervals.auroc_interval(*scored(30, 10)).notes
    assert found.text(2) == f'{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]'
    assert found.caption == '95 % score intervals'
    assert found.excludes(found.low - 1e-9) and not found.excludes(found.estimate)

  @pytest.mark.parametrize('labels, scores, level, words', [
      ([0, 0], [1, 2], 0.95, 'Only one class'), ([0, 1], [1, np.nan], 0.95, 'NaN'),
      ([0, 1], [1, 2], 1.0, '0 < level < 1')])
  def test_errors(self, labels, scores, level, words):
    with pytest.raises(ValueError, match=words):
      intervals.auroc_interval(labels, scores, level=level)


class TestCoverage:

  @pytest.mark.parametrize('auroc', coverage.AUROCS)
  @pytest.mark.parametrize('size', coverage.SIZES)
  def test_of_normal_scores(self, auroc, size):
    """2,000 sets tell the coverage to about a percent; 5,000 are the benchmark's."""
    _, found = coverage.coverage('normal', auroc, size, 2000)
    assert 0.93 < found['auroc_interval'].held < 0.978

  def test_where_the_estimate_is_one(self):
    perfect, found = coverage.coverage('normal', 0.995, (40, 60), 1000, seed=6)
    assert perfect > 0.05
    # Intervals that end at or below an estimate of 1 and begin above the truth would be among these.
    assert found['auroc_interval'].above == 0 and found['DeLong'].above > perfect

  @pytest.mark.parametrize('shape', coverage.SHAPES)
  def test_of_other_shapes(self, shape):
    _, found = coverage.coverage(shape, 0.995, (150, 150), 500)
    assert found['auroc_interval'].held > 0.91 > found['DeLong'].held

  @pytest.mark.parametrize('shape', coverage.SHAPES)
  @pytest.mark.parametrize('auroc', coverage.AUROCS)
  def test_shapes_have_their_auroc(self, shape, auroc):
    values = np.concatenate([
        coverage.sample_of(*scores).auroc
        for scores in coverage.simulate(shape, auroc, (40, 60), 2000)])
    assert values.mean() == pytest.approx(auroc, abs=4 * values.std() / np.sqrt(values.size))

  def test_samples_are_those_of_the_package(self):
    ((good, anomalous),) = coverage.simulate('normal', 0.8, (7, 9), 3)
    sample = coverage.sample_of(good, anomalous)
    for i in range(3):
      labels, scores = np.repeat([0, 1], [7, 9]), np.concatenate([good[i], anomalous[i]])
      assert sample.auroc[i] == pytest.approx(metrics.auroc(labels, scores), abs=1e-12)
      assert sample.variance[i] == pytest.approx(intervals.delong_variance(labels, scores), abs=1e-12)
      found = intervals.auroc_interval(labels, scores)
      low, high = coverage.ours(sample)
      assert (low[i], high[i]) == pytest.approx((found.low, found.high), abs=1e-12)

  def test_table(self):
    lines = list(coverage.table(20, shapes=('normal',)))
    assert sum(line.startswith('| normal | 0.995 |') for line in lines) == 2


class TestImageIntervals:

  @pytest.mark.parametrize('function', [ranking.auroc, ranking.average_precision])
  @pytest.mark.parametrize('levels', [None, 1])
  @pytest.mark.parametrize('strata', [None, 'kinds'])
  def test_all_at_once_equals_one_by_one(self, function, levels, strata):
    labels, scores = scored(levels=levels)
    strata = np.where(labels, np.arange(labels.size) % 3 + 1, 0) if strata else None
    (drawn,), (one_by_one,) = (
        intervals.image_resamples(f, labels, [scores], strata=strata, resamples=50, seed=3)
        for f in (function, lambda y, s: function(y, s)))
    np.testing.assert_allclose(drawn, one_by_one, rtol=0, atol=1e-12)
    assert np.ptp(drawn) > 0

  def test_blocks_change_nothing(self, monkeypatch):
    labels, scores = scored()
    whole = intervals.image_interval(ranking.average_precision, labels, scores, resamples=200)
    monkeypatch.setattr(intervals, '_CELLS', 70)
    again = intervals.image_interval(ranking.average_precision, labels, scores, resamples=200)
    assert (again.low, again.high) == pytest.approx((whole.low, whole.high), abs=1e-12)

  def test_strata_keep_their_sizes(self):
    strata, labels = np.array(['cut', 'good', 'bent', 'cut', 'good']), np.array([1, 0, 1, 1, 0], bool)
    seen = []
    def function(y, s):
      seen.append(np.sort(s).tolist())
      return y.mean()
    intervals.image_resamples(function, labels, [[0, 10, 20, 1, 11]], strata=strata, resamples=30)
    assert {(sum(v < 5 for v in s), sum(5 < v < 15 for v in s), s.count(20)) for s in seen} == {(2, 2, 1)}

  def test_same_seed_same_interval(self):
    labels, scores = scored()
    first, second, other = (
        intervals.image_interval(ranking.auroc, labels, scores, resamples=300, seed=s) for s in (1, 1, 2))
    assert first == second != other and (first.seed, first.resamples) == (1, 300)

  def test_perfect_scores_have_no_point_for_an_interval(self):
    found = intervals.image_interval(ranking.average_precision, [0, 0, 1, 1], [1, 2, 3, 4], resamples=100)
    assert found.low is found.high is None and not found.excludes(0)
    assert 'the data cannot tell' in found.notes[-1]

  @pytest.mark.parametrize('changes, words', [
      ({'method': 'bca'}, 'percentile, basic'), ({'resamples': 0}, 'at least 1'), ({'level': 0}, 'level'),
      ({'strata': ['a', 'a', 'b', 'b']}, "both in 'a'"), ({'strata': ['a']}, 'a stratum for each of 4')])
  def test_errors(self, changes, words):
    with pytest.raises(ValueError, match=words):
      intervals.image_interval(ranking.auroc, [0, 1, 0, 1], [1, 2, 3, 4], **changes)


class TestMeanInterval:

  def test_equals_scipy(self):
    values = np.random.default_rng(0).random(25) ** 3
    for method, theirs in (('bca', 'BCa'), ('percentile', 'percentile'), ('basic', 'basic')):
      found = intervals.mean_interval(values, method=method, resamples=2000, seed=4)
      expected = scipy.stats.bootstrap(
          (values,), np.mean, n_resamples=2000, method=theirs, rng=np.random.default_rng(4))
      assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)

  def test_equal_values(self):
    """By the rule of three: 60 images without another value leave room for a share of about 3 / 60."""
    ones = intervals.mean_interval(np.ones(60))
    assert ones.high == 1 and ones.low == pytest.approx(0.05 ** (1 / 60)) == pytest.approx(0.95, abs=0.002)
    none = intervals.mean_interval(np.zeros(60), bounds=(-1, 1))
    assert none.low == -none.high and not none.excludes(0)
    assert intervals.mean_interval(np.full(7, 0.1)).estimate == 0.1

  @pytest.mark.parametrize('values, changes, words', [
      ([], {}, 'at least one'), ([0.5, np.nan], {}, 'finite'), ([0.5, 2], {}, 'from 0 to 1'),
      ([0.5, 1], {'resamples': 999}, '1,000'), ([0.5, 1], {'method': 'normal'}, 'bca')])
  def test_errors(self, values, changes, words):
    with pytest.raises(ValueError, match=words):
      intervals.mean_interval(values, **changes)


class TestPixelIntervals:

  @pytest.mark.parametrize('levels', [None, 12])
  @pytest.mark.parametrize('most', [2**23, 40])  # anomalous pixels in one reading
  def test_a_resample_is_what_its_images_give(self, levels, most, monkeypatch):
    monkeypatch.setattr(pixel_resamples, '_MOST', most)
    maps, masks = made(levels)
    whole, limits = curve.of_regions(maps, masks), (0.05, 0.3, 1.0)
    parts = pixel_resamples.parts_of(
        maps, masks, pixel_resamples.thresholds_of(whole, limits), threshold=0.75)
    rng = np.random.default_rng(1)
    picks = np.concatenate([rng.integers(0, 3, (20, 3)), rng.integers(3, 9, (20, 6))], axis=1)
    values = pixel_resamples.values_of(parts, intervals.weights_of(picks, 9), limits)
    for b, chosen in enumerate(picks):
      own = [[arrays[i] for i in chosen] for arrays in (maps, masks)]
      expected = curve.of_regions(*own)
      flat, truth = (np.concatenate([a.ravel() for a in arrays]) for arrays in own)
      marked = flat >= 0.75
      assert {name: drawn[b] for name, drawn in values.items()} == pytest.approx({
          'pixel_auroc': ranking.auroc_of(expected), 'pixel_ap': ranking.average_precision_of(expected),
          'pixel_f1': working_points.f1_optimal_of(expected).f1,
          'aupro_0.05': expected.area(0.05), 'aupro_0.3': expected.area(0.3), 'aupro_1': expected.area(1.0),
          'f1_at_threshold': 2 * (marked & truth).sum() / (marked.sum() + truth.sum())}, abs=1e-12)

  def test_on_a_choice_of_thresholds_values_hardly_change(self, monkeypatch):
    maps, masks = made(n=30, seed=2)
    exact = pixel_resamples.pixel_intervals(maps, masks, resamples=200)
    monkeypatch.setattr(pixel_resamples, '_POINTS', 10)
    monkeypatch.setattr(np, 'linspace', lambda a, b, n, _linspace=np.linspace: _linspace(a, b, n // 10))
    chosen = pixel_resamples.pixel_intervals(maps, masks, resamples=200)
    assert exact['pixel_auroc'] == chosen['pixel_auroc']
    for name, found in chosen.items():
      assert found.estimate == exact[name].estimate
      assert (found.low, found.high) == pytest.approx((exact[name].low, exact[name].high), abs=5e-3)
    assert chosen['aupro_0.3'] != exact['aupro_0.3']

  def test_maps_are_read_one_at_a_time_and_seldom(self):
    maps, masks = made()
    class Lazy:
      reads = []
      def __len__(self):
        return len(maps)
      def __getitem__(self, i):
        self.reads.append(i)
        return maps[i]
    found = pixel_resamples.pixel_intervals(Lazy(), masks, resamples=50, threshold=0.5)
    assert Lazy.reads == [*range(9)] * 4
    Lazy.reads.clear()
    again = pixel_resamples.pixel_intervals(
        Lazy(), masks, resamples=50, threshold=0.5, curve=curve.of_regions(maps, masks))
    assert Lazy.reads == [*range(9)] * 2 and again == found

  def test_labels_and_strata(self):
    maps, masks = made()
    labels = [0, 0, 1, 1, 1, 1, 1, 1, 1]  # the third shows no defect
    plain, labelled, kinds = (
        pixel_resamples.pixel_intervals(maps, masks, resamples=50, **more)['pixel_auroc'] for more in (
            {}, {'labels': labels}, {'strata': list('gggabbbab')}))
    assert plain.estimate == labelled.estimate == kinds.estimate
    assert len({plain.low, labelled.low, kinds.low}) == 3
    assert plain.notes == ('Only 6 anomalous images.',)

  def test_perfect_maps_have_no_point_for_an_interval(self):
    maps, masks = made()
    perfect = [mask.astype(float) for mask in masks]
    for name, found in pixel_resamples.pixel_intervals(perfect, masks, resamples=50).items():
      assert found.estimate == 1 and found.low is None, name

  def test_errors(self):
    maps, masks = made()
    for words, call in (
        ('max_fpr', lambda: pixel_resamples.pixel_intervals(maps, masks, limits=(0,))),
        ('Only one class', lambda: pixel_resamples.pixel_intervals(maps[:3], masks[:3])),
        ('differ in shape', lambda: pixel_resamples.pixel_intervals(maps[:3], masks)),
        ('differ in shape', lambda: pixel_resamples.pixel_intervals(maps, masks, labels=[0, 1])),
        ('NaN', lambda: pixel_resamples.pixel_intervals([maps[0] * np.nan, *maps[1:]], masks)),
        ('both in', lambda: pixel_resamples.pixel_intervals(maps, masks, strata=[0] * 9))):
      with pytest.raises(ValueError, match=words):
        call()
