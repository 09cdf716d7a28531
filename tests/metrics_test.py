"""Metrics against scikit-learn and brute force. `parity_test` compares with reference arrays;
`metrics_contract_test` holds what is true of every metric."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import scipy.ndimage
import sklearn.metrics

from patchcore_jax import metrics


def _scores(n=500, levels=None, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.random(n) < 0.2
  scores = rng.standard_normal(n) + labels
  return labels, np.round(scores * levels) / levels if levels else scores


def _maps(seed=0, levels=None, n=4, size=24):
  rng = np.random.default_rng(seed)
  masks = np.stack([scipy.ndimage.gaussian_filter(rng.standard_normal((size, size)), 2) > 0.17
                    for _ in range(n)])
  masks[-1] = False  # a good image
  maps = rng.random((n, size, size)) + 0.5 * masks
  return np.round(maps * levels) / levels if levels else maps, masks


def _brute_force_aupro(maps, masks, max_fpr, connectivity):
  """The definition, threshold by threshold and region by region."""
  structure = np.ones((3, 3)) if connectivity == 8 else None
  regions = []
  for i, mask in enumerate(masks):
    labels, count = scipy.ndimage.label(mask, structure)
    regions += [maps[i][labels == k] for k in range(1, count + 1)]
  points = [(0.0, 0.0)]
  for t in np.unique(maps)[::-1]:
    points.append((np.mean(maps[~masks] >= t), np.mean([np.mean(r >= t) for r in regions])))
  x, y = np.array(points).T
  keep = x <= max_fpr
  area = np.trapezoid(y[keep], x[keep])
  if keep.sum() < len(x):
    (x0, y0), (x1, y1) = points[keep.sum() - 1], points[keep.sum()]
    at_limit = y0 + (max_fpr - x0) / (x1 - x0) * (y1 - y0)
    area += (max_fpr - x0) * (y0 + at_limit) / 2
  return area / max_fpr


def _peak(function, *args, **kwargs):
  """Bytes that a call needs at most beside its input. NumPy tells tracemalloc of its arrays; the
  process's own high-water mark would hide everything below what an earlier test used."""
  tracemalloc.start()
  try:
    function(*args, **kwargs)
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


class TestAuroc:

  def test_by_hand(self):
    assert metrics.auroc([1, 0, 1, 0], [3, 2, 2, 1]) == 3.5 / 4

  @pytest.mark.parametrize('levels', [None, 3])
  @pytest.mark.parametrize('flip', [False, True])
  def test_equals_scikit_learn(self, levels, flip):
    labels, scores = _scores(levels=levels)
    labels = labels ^ flip  # either class may be the rarer one
    assert metrics.auroc(labels, scores) == pytest.approx(
        sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)

  def test_extremes(self):
    labels, _ = _scores()
    assert metrics.auroc(labels, labels) == 1
    assert metrics.auroc(labels, ~labels) == 0
    assert metrics.auroc(labels, np.zeros(labels.size)) == 0.5

  @pytest.mark.parametrize('labels, scores, words', [
      ([0, 1], [1.0], r'\(2,\) and scores \(1,\) differ in shape'),
      ([0, 2], [1.0, 2.0], r'expected 0 \(good\) and 1 \(anomalous\), got values such as \[0, 2\]'),
      ([0, 1], [np.nan, 1.0], 'got 1 NaN or infinite'),
      ([0, 1], [np.inf, 1.0], 'got 1 NaN or infinite'),
      ([0, 0], [1.0, 2.0], 'Only one class among 2 labels: .* all are 0'),
      ([], [], 'at least one score')])
  def test_errors(self, labels, scores, words):
    with pytest.raises(ValueError, match=words):
      metrics.auroc(labels, scores)


class TestAveragePrecision:

  def test_by_hand(self):
    # Found at scores 4 (precision 1/1), 2 (2/3, after one false alarm at 3).
    assert metrics.average_precision([1, 0, 1, 0], [4, 3, 2, 1]) == pytest.approx((1 + 2 / 3) / 2)
    # A tie is one step: all at once, at the share of anomalous ones.
    assert metrics.average_precision([1, 0, 1, 0], [1, 1, 1, 1]) == pytest.approx(0.5)

  @pytest.mark.parametrize('levels', [None, 3])
  def test_equals_the_sum_over_thresholds(self, levels):
    labels, scores = _scores(levels=levels)
    area, recall = 0.0, 0.0
    for t in np.unique(scores)[::-1]:
      now = labels[scores >= t].sum() / labels.sum()
      area, recall = area + (now - recall) * labels[scores >= t].mean(), now
    assert metrics.average_precision(labels, scores) == pytest.approx(area, abs=1e-12)
    theirs = sklearn.metrics.average_precision_score(labels, scores)
    assert metrics.average_precision(labels, scores) == pytest.approx(theirs, rel=0, abs=1e-15)


@pytest.mark.parametrize('levels', [None, 3])
def test_curves_equal_scikit_learns(levels):
  labels, scores = _scores(levels=levels)
  false, true, _ = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
  np.testing.assert_allclose(metrics.roc_curve(labels, scores), (false, true), rtol=0, atol=1e-12)
  precision, recall, _ = sklearn.metrics.precision_recall_curve(labels, scores)
  np.testing.assert_allclose(
      metrics.precision_recall_curve(labels, scores), (precision[::-1], recall[::-1]), rtol=0, atol=1e-12)


class TestF1Optimal:

  def test_by_hand(self):
    # At or above 3: 1 of 2 found, no false alarm, F1 2/3. At or above 1: both, two, F1 4/6: a tie.
    assert metrics.f1_optimal([1, 0, 0, 1], [3, 2, 1, 1]) == (1, pytest.approx(2 / 3), 2, 0)
    assert metrics.f1_optimal([1, 0], [2, 1]) == (2, 1, 0, 0)

  @pytest.mark.parametrize('levels', [None, 3])
  def test_equals_a_loop(self, levels):
    labels, scores = _scores(levels=levels)
    f1 = {t: sklearn.metrics.f1_score(labels, scores >= t) for t in np.unique(scores)}
    best = metrics.f1_optimal(labels, scores)
    assert best.f1 == pytest.approx(max(f1.values()), abs=1e-12)
    assert best.threshold == min(t for t, v in f1.items() if v > max(f1.values()) - 1e-12)
    assert best.false_positives == ((scores >= best.threshold) & ~labels).sum()
    assert best.false_negatives == ((scores < best.threshold) & labels).sum()


class TestErrorAtFullRecall:

  def test_by_hand(self):
    assert metrics.error_at_full_recall([1, 0, 0, 0, 1], [2, 2, 3, 1, 5]) == 2 / 5
    assert metrics.error_at_full_recall([1, 0], [2, 1]) == 0

  @pytest.mark.parametrize('levels', [None, 3])
  def test_equals_a_loop(self, levels):
    labels, scores = _scores(levels=levels)
    full = max(t for t in np.unique(scores) if (scores[labels] >= t).all())
    assert metrics.error_at_full_recall(labels, scores) == np.mean((scores >= full) != labels)


class TestAupro:

  def test_by_hand(self):
    # Two regions, of 2 pixels (scores 9, 2) and of 1 (score 5); normal pixels score 7, 3, 1, 0.
    maps = np.array([[[9, 2, 7, 5]], [[3, 1, 0, 0]]])
    masks = np.array([[[1, 1, 0, 1]], [[0, 0, 0, 0]]])
    # PRO after each score: 9: 1/4 | 7: 1/4, FPR 1/5 | 5: 3/4 | 3: 3/4, FPR 2/5 | 2: 1.
    assert metrics.aupro(maps, masks, max_fpr=0.4) == pytest.approx((0.2 * 0.25 + 0.2 * 0.75) / 0.4)

  @pytest.mark.parametrize('levels', [None, 40, 5, 1])
  @pytest.mark.parametrize('max_fpr', [0.01, 0.3, 1.0])
  @pytest.mark.parametrize('connectivity', [4, 8])
  def test_equals_brute_force(self, levels, max_fpr, connectivity):
    for seed in range(3):
      maps, masks = _maps(seed, levels)
      value = metrics.aupro(maps, masks, max_fpr=max_fpr, connectivity=connectivity)
      assert value == pytest.approx(
          _brute_force_aupro(maps, masks, max_fpr, connectivity), abs=1e-12)

  @pytest.mark.parametrize('max_fpr', [0.01, 0.3, 1 / 3, 1.0])
  def test_perfect_maps_give_exactly_one(self, max_fpr):
    for seed in range(20):
      maps, masks = _maps(seed)
      for perfect in (maps * 0.1 + masks, masks.astype(np.float32)):
        assert metrics.aupro(perfect, masks, max_fpr=max_fpr) == 1

  def test_never_above_one(self):
    # Nearly perfect, many small regions, ties across the limit: sums of rounded shares near 1.
    for seed in range(200):
      rng = np.random.default_rng(seed)
      masks = rng.random((2, 15, 17)) < 0.15
      maps = np.round(rng.random(masks.shape) * rng.integers(1, 9)) / 9 + masks
      maps[masks] -= rng.random(masks.sum()) < 0.02
      for max_fpr in (0.01, 0.3, 1 / 3, 1.0):
        assert 0 <= metrics.aupro(maps, masks, max_fpr=max_fpr) <= 1

  def test_regions_that_touch_at_a_corner(self):
    # One pixel above all normal ones, four that touch it at a corner below them.
    maps = np.array([[[3, 0, 0], [0, -1, -1], [0, -1, -1]]])
    masks = maps != 0
    # PRO is constant up to the limit's trapezoid: 1 of 5 pixels of one region, or 1 of 2 regions.
    assert metrics.aupro(maps, masks, connectivity=8) == pytest.approx(1 / 5)
    assert metrics.aupro(maps, masks, connectivity=4) == pytest.approx(1 / 2)

  @pytest.mark.parametrize('kwargs, words', [
      ({'max_fpr': 0}, 'max_fpr'), ({'connectivity': 6}, 'connectivity')])
  def test_errors(self, kwargs, words):
    with pytest.raises(ValueError, match=words):
      metrics.aupro(*_maps(), **kwargs)
    with pytest.raises(ValueError, match=r'Expected maps \[n, h, w\]'):
      metrics.aupro(np.zeros(4), np.zeros(4))

  # At 448 px, 6 copies of the maps are 0.8 GB: half of what a category may take.
  @pytest.mark.parametrize('num, size', [
      (10, 112), pytest.param(160, 448, marks=pytest.mark.slow)])
  @pytest.mark.parametrize('kind', ['continuous', 'constant'])
  def test_memory(self, num, size, kind):
    maps = np.random.default_rng(0).random((num, size, size), np.float32)
    if kind == 'constant':
      maps[:] = 1
    masks = np.zeros(maps.shape, bool)
    masks[:num * 3 // 4, size // 4:size // 3, size // 4:size // 2] = True
    peak = _peak(metrics.evaluate, masks.any((1, 2)), maps.max((1, 2)), masks, maps)
    assert peak < 6 * maps.nbytes, f'{peak / maps.nbytes:.1f} times the maps'


class TestEvaluate:

  def test_each_column_is_of_its_function(self):
    maps, masks = _maps()
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    best = metrics.f1_optimal(labels, scores)
    values = metrics.evaluate(labels, scores, masks, maps, max_fpr=0.1, connectivity=4)
    assert {name: value for name, value in values.items() if value is not None} == {
        'image_auroc': metrics.auroc(labels, scores), 'image_ap': metrics.average_precision(labels, scores),
        'image_f1': best.f1, 'image_threshold': best.threshold, 'false_positives': best.false_positives,
        'false_negatives': best.false_negatives,
        'error_at_full_recall': metrics.error_at_full_recall(labels, scores),
        'full_recall_threshold': scores[labels].min(),
        'pixel_auroc': metrics.auroc(masks, maps),
        'aupro': metrics.aupro(maps, masks, max_fpr=0.1, connectivity=4),
        'aupro_05': metrics.aupro(maps, masks, max_fpr=0.05, connectivity=4),
        'pixel_ap': pytest.approx(metrics.average_precision(masks, maps), abs=1e-15),
        'pixel_f1': metrics.f1_optimal(masks, maps).f1}
    defaults = metrics.evaluate(labels, scores, masks, maps)
    assert defaults['aupro'] == metrics.aupro(maps, masks, max_fpr=0.3, connectivity=8)

  def test_a_working_point_is_found_once(self, monkeypatch):
    calls = []
    def f1_optimal(labels, scores):
      calls.append(labels)
      return metrics.f1_optimal(labels, scores)
    for name, metric in metrics.METRICS.items():
      if metric.function is metrics.f1_optimal:
        monkeypatch.setitem(metrics.METRICS, name, dataclasses.replace(metric, function=f1_optimal))
    metrics.evaluate([0, 1], [1.0, 2.0])
    assert len(calls) == 1

  def test_image_and_pixel_metrics_are_absent_apart(self):
    maps, masks = _maps()
    value = metrics.evaluate([1, 1, 1, 1], maps.max((1, 2)), masks, maps)
    assert value['image_auroc'] is None and value['aupro'] == metrics.aupro(maps, masks)
    value = metrics.evaluate([0, 0, 1, 1], maps.max((1, 2)), np.zeros_like(masks), maps)
    assert value['image_auroc'] is not None and value['pixel_auroc'] is value['aupro'] is None

  @pytest.mark.parametrize('labels, scores, words', [
      ([0, 0], [np.nan, 1.0], 'NaN'), ([0, 0, 0], [1.0], 'differ in shape'),
      ([2, 2], [1.0, 2.0], 'got values such as'), ([], [], 'at least one score')])
  def test_bad_input_is_not_taken_for_absent(self, labels, scores, words):
    with pytest.raises(ValueError, match=words):
      metrics.evaluate(labels, scores)

  def test_errors_of_masks(self):
    maps, masks = _maps()
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    for words, bad in (
        ('Expected maps beside masks', (masks, None)),
        ('4 labels', (masks[:3], maps[:3])),
        ('differ in shape', (masks, maps[:3])),
        ('maps: expected finite', (masks & False, np.full(maps.shape, np.nan))),
        ('masks: expected 0', (masks * 255, maps))):
      with pytest.raises(ValueError, match=words):
        metrics.evaluate(labels, scores, *bad)
