"""Metrics against scikit-learn, brute force, and the reference arrays (../shared/golden)."""

import resource

import numpy as np
import pytest
import scipy.ndimage
import sklearn.metrics

from patchcore_jax import metrics

_CASES = ('plain', 'ties', 'raw', 'perfect')


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


class TestGolden:

  @pytest.mark.parametrize('case', _CASES)
  def test_equal_the_reference(self, case, golden):
    z = {k.split('/')[1]: v for k, v in np.load(golden / 'metrics.npz').items()
         if k.startswith(f'{case}/')}
    labels, scores, masks, maps = (z[k] for k in ('labels', 'scores', 'masks', 'maps'))
    assert metrics.auroc(labels, scores) == pytest.approx(z['image_auroc'], abs=1e-9)
    assert metrics.auroc(masks, maps) == pytest.approx(z['pixel_auroc'], abs=1e-9)
    assert metrics.average_precision(labels, scores) == pytest.approx(z['image_ap'], abs=1e-9)
    assert metrics.average_precision(masks, maps) == pytest.approx(z['pixel_ap'], abs=1e-9)
    best = metrics.f1_optimal(labels, scores)
    assert best.f1 == pytest.approx(z['image_f1'], abs=1e-9)
    assert best.threshold == z['image_f1_threshold']
    for limit in ('0.01', '0.05', '0.3', '1.0'):
      for connectivity in (8, 4):
        value = metrics.aupro(maps, masks, max_fpr=float(limit), connectivity=connectivity)
        # The same definition; what is left is the order of float64 sums.
        assert value == pytest.approx(z[f'aupro{connectivity}_{limit}'], abs=1e-9)
      assert metrics.aupro(maps, masks, max_fpr=float(limit)) == pytest.approx(
          z[f'anomalib_aupro_{limit}'], abs=1e-6)  # theirs is float32


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

  def test_monotone_transform_changes_nothing(self):
    labels, scores = _scores()
    assert metrics.auroc(labels, np.exp(scores)) == metrics.auroc(labels, scores)

  @pytest.mark.parametrize('labels, scores, words', [
      ([0, 1], [1.0], 'differ in shape'), ([0, 2], [1.0, 2.0], 'expected 0 and 1'),
      ([0, 1], [np.nan, 1.0], 'NaN'), ([0, 0], [1.0, 2.0], 'Only one class')])
  def test_errors(self, labels, scores, words):
    for function in (metrics.auroc, metrics.average_precision, metrics.f1_optimal,
                     metrics.error_at_full_recall):
      with pytest.raises(ValueError, match=words):
        function(labels, scores)


class TestF1Optimal:

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


class TestAupro:

  def test_by_hand(self):
    # Two regions, of 2 pixels (scores 9, 2) and of 1 (score 5); normal pixels score 7, 3, 1, 0.
    maps, masks = np.array([[[9, 2, 7, 5]], [[3, 1, 0, 0]]]), np.array([[[1, 1, 0, 1]], [[0, 0, 0, 0]]])
    # PRO after each score: 9: 1/4 | 7: 1/4, FPR 1/5 | 5: 3/4 | 3: 3/4, FPR 2/5 | 2: 1.
    assert metrics.aupro(maps, masks, max_fpr=0.4) == pytest.approx((0.2 * 0.25 + 0.2 * 0.75) / 0.4)

  @pytest.mark.parametrize('levels', [None, 40, 5, 1])
  @pytest.mark.parametrize('max_fpr', [0.01, 0.3, 1.0])
  @pytest.mark.parametrize('connectivity', [4, 8])
  def test_equals_brute_force(self, levels, max_fpr, connectivity):
    for seed in range(3):
      maps, masks = _maps(seed, levels)
      assert metrics.aupro(maps, masks, max_fpr=max_fpr, connectivity=connectivity) == pytest.approx(
          _brute_force_aupro(maps, masks, max_fpr, connectivity), abs=1e-12)

  def test_perfect_maps_give_one_and_never_more(self):
    for seed in range(20):
      maps, masks = _maps(seed)
      for perfect in (maps * 0.1 + masks, masks.astype(np.float32)):
        assert 1 - 1e-12 <= metrics.aupro(perfect, masks) <= 1.0

  def test_order_of_images_does_not_matter(self):
    maps, masks = _maps()
    assert metrics.aupro(maps[::-1], masks[::-1]) == pytest.approx(
        metrics.aupro(maps, masks), abs=1e-12)

  @pytest.mark.parametrize('kwargs, words', [
      ({'max_fpr': 0}, 'max_fpr'), ({'connectivity': 6}, 'connectivity')])
  def test_errors(self, kwargs, words):
    with pytest.raises(ValueError, match=words):
      metrics.aupro(*_maps(), **kwargs)
    with pytest.raises(ValueError, match='Only one class'):
      metrics.aupro(_maps()[0], np.zeros((4, 24, 24)))
    with pytest.raises(ValueError, match=r'Expected maps \[n, h, w\]'):
      metrics.aupro(np.zeros(4), np.zeros(4))

  @pytest.mark.slow
  def test_memory_of_a_category_at_448(self):
    rng = np.random.default_rng(0)
    maps = rng.random((160, 448, 448), np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[:120, 100:150, 200:280] = True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metrics.evaluate(np.arange(160) < 120, maps.max((1, 2)), masks, maps)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert used < 1.5, f'{used:.2f} GiB on top of the {maps.nbytes / 2**30:.2f} GiB of maps'


class TestEvaluate:

  def test_agrees_with_the_single_functions(self):
    maps, masks = _maps()
    labels, scores = masks.any((1, 2)), maps.max((1, 2))
    value = metrics.evaluate(labels, scores, masks, maps)
    assert value['image_auroc'] == metrics.auroc(labels, scores)
    assert value['aupro'] == metrics.aupro(maps, masks)
    assert value['pixel_auroc'] == metrics.auroc(masks, maps)

  def test_absent_is_none(self):
    labels, scores = _scores(10)
    value = metrics.evaluate([0, 0, 1], [1.0, 2.0, 3.0])
    assert value['pixel_auroc'] is None and value['aupro'] is None and value['image_auroc'] == 1
    maps, masks = _maps()
    value = metrics.evaluate([1, 1, 1, 1], maps.max((1, 2)), np.zeros_like(masks), maps)
    assert set(value.values()) == {None}
