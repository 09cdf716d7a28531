"""Comparisons of two methods and of several: against the reference arrays, SciPy, and by brute force."""

import itertools

import numpy as np
import pytest
import scipy.stats

from patchcore_jax import metrics
from patchcore_jax.metrics import paired, ranking


@pytest.fixture
def stats(golden):
  with np.load(golden / 'evaluation' / 'stats.npz') as arrays:
    return dict(arrays)


def two_methods(good=12, anomalous=15, levels=None, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(good + anomalous) >= good
  common = rng.standard_normal(labels.size) + labels
  a, b = (common + 0.5 * rng.standard_normal(labels.size) + shift * labels for shift in (1, 0))
  return (labels, *(np.round(v * levels) / levels if levels else v for v in (a, b)))


class TestReference:

  @pytest.mark.parametrize('pair', ['ab', 'ac'])
  @pytest.mark.parametrize('tolerance', [('raw', 0), ('atol', 1e-3)])
  @pytest.mark.parametrize('zeros', ['wilcox', 'pratt'])
  def test_wilcoxon_equals_scipys(self, stats, pair, tolerance, zeros):
    a, b = (stats[f'scores_{name}'] for name in pair)
    for alternative in ('two-sided', 'greater'):
      statistic, p = stats[f'scipy_wilcoxon_{pair}_{tolerance[0]}_{zeros}_{alternative}']
      found = paired.wilcoxon(a, b, tolerance=tolerance[1], zeros=zeros, alternative=alternative)
      assert found.p_value == pytest.approx(p, abs=1e-12) and found.method == 'normal'
      assert statistic == (
          found.positive if alternative == 'greater' else min(found.positive, found.negative))

  def test_authors(self, stats):
    names = stats['names']
    for (i, a), (j, b) in itertools.permutations(enumerate(stats[f'scores_{name}'] for name in names), 2):
      for alternative in ('greater', 'less', 'two-sided'):
        for test, p in (('wilcoxon', paired.wilcoxon(a, b, alternative=alternative).p_value),
                        ('ttest', paired.paired_t(a, b, alternative=alternative))):
          assert 1 - p == pytest.approx(stats[f'authors_{test}_{alternative}_confidence'][i, j], abs=1e-12)
    ranks = paired.average_ranks(np.stack([stats[f'scores_{name}'] for name in names], axis=1))
    order = np.argsort(ranks)
    assert names[order].tolist() == stats['authors_order'].tolist()
    np.testing.assert_allclose(ranks[order], stats['authors_average_ranks'], rtol=0, atol=1e-12)

  @pytest.mark.parametrize('pair', ['ab', 'ac'])
  def test_ranks_and_signs(self, stats, pair):
    a, b = (stats[f'scores_{name}'] for name in pair)
    found = paired.wilcoxon(a, b)
    assert [found.positive, found.negative, found.remaining] == stats[f'signed_ranks_{pair}'].tolist()
    assert paired.sign_test(a, b) == pytest.approx(float(stats[f'sign_test_{pair}']), abs=1e-12)

  def test_holm(self, stats):
    np.testing.assert_allclose(
        paired.holm(stats['holm_input']), stats['holm_adjusted'], rtol=0, atol=1e-12)


class TestWilcoxon:

  def test_by_hand(self):
    # Differences 4, 3, 2, -1 of ranks 4, 3, 2, 1: of 16 signs two give at least 9, and two at most 1.
    found = paired.wilcoxon([4, 3, 2, 0], [0, 0, 0, 1])
    assert found == (0.25, 9, 1, 4, 0.8, 'all signs')
    # A tie: ranks 1.5, 1.5, 3. Only all signs positive reach 6.
    found = paired.wilcoxon([1, 1, 2], [0, 0, 0], alternative='greater')
    assert (found.p_value, found.positive) == (1 / 8, 6)

  @pytest.mark.parametrize('n', [1, 5, 9])
  def test_few_pairs_without_ties_equal_scipys_exact_test(self, n):
    values = np.random.default_rng(n).standard_normal(n)
    for alternative in ('two-sided', 'greater', 'less'):
      found = paired.wilcoxon(values, np.zeros(n), tolerance=0, alternative=alternative)
      expected = scipy.stats.wilcoxon(values, method='exact', alternative=alternative).pvalue
      assert found.p_value == pytest.approx(expected, abs=1e-12) and found.method == 'all signs'

  @pytest.mark.parametrize('remaining, method', [(9, 'all signs'), (10, 'normal')])
  @pytest.mark.parametrize('zeros', ['wilcox', 'pratt'])
  def test_the_method_depends_on_pairs_that_differ(self, remaining, method, zeros):
    a = np.r_[np.zeros(20), np.arange(1, remaining + 1)]
    found = paired.wilcoxon(a, 0 * a, zeros=zeros)
    assert (found.method, found.remaining, found.effect_size) == (method, remaining, 1)
    assert found.p_value < 0.01

  def test_tolerance(self):
    a, b = [0.5, 0.5, 0.5], [0.4995, 0.5005, 0.5]
    assert paired.wilcoxon(a, b) == (1, 0, 0, 0, 0, 'all signs')
    assert paired.wilcoxon(a, b, tolerance=1e-4).remaining == 2
    assert paired.sign_test(a, b) == 1

  def test_exchanging_methods_exchanges_signs(self):
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 30))
    one, two = paired.wilcoxon(a, b, alternative='greater'), paired.wilcoxon(b, a, alternative='less')
    assert one.p_value == pytest.approx(two.p_value, abs=1e-15)
    assert (one.positive, one.effect_size) == (two.negative, -two.effect_size)

  @pytest.mark.parametrize('a, b, changes, words', [
      ([1], [1, 2], {}, 'of the same images'), ([], [], {}, 'of the same images'),
      ([np.nan], [1], {}, 'None'), ([1], [2], {'tolerance': -1}, 'tolerance'),
      ([1], [2], {'zeros': 'zsplit'}, 'pratt'), ([1], [2], {'alternative': 'two'}, 'two-sided')])
  def test_errors(self, a, b, changes, words):
    with pytest.raises(ValueError, match=words):
      paired.wilcoxon(a, b, **changes)


def test_paired_t_is_not_defined_where_nothing_varies():
  assert paired.paired_t([1, 2], [1, 2]) == 1
  for a, b in (([1], [2]), ([1, 2], [2, 3])):
    with pytest.raises(ValueError, match='sign_test'):
      paired.paired_t(a, b)


class TestHolm:

  def test_ties_limits_and_order(self):
    assert paired.holm([0.6, 0.02, 0.6]) == [1, 0.06, 1]
    assert paired.holm([0.03]) == [0.03] and paired.holm([]) == []

  def test_errors(self):
    with pytest.raises(ValueError, match='None'):
      paired.holm([0.1, np.nan])


class TestAurocPermutation:

  @pytest.mark.parametrize('levels', [None, 2])
  def test_equals_brute_force(self, levels):
    """Every way to exchange ranks within images, and AUROCs of what comes out."""
    labels, a, b = two_methods(4, 5, levels)
    found = paired.auroc_permutation(labels, a, b)
    ranks = np.stack([scipy.stats.rankdata(a), scipy.stats.rankdata(b)])
    differences = [
        metrics.auroc(labels, np.where(swap, ranks[1], ranks[0]))
        - metrics.auroc(labels, np.where(swap, ranks[0], ranks[1]))
        for swap in itertools.product([False, True], repeat=9)]
    assert found.difference == pytest.approx(metrics.auroc(labels, a) - metrics.auroc(labels, b), abs=1e-12)
    assert found.p_value == pytest.approx(
        np.mean(np.abs(differences) >= abs(differences[0]) - 1e-9), abs=1e-12)
    assert (found.permutations, found.seed) == (512, None)

  def test_many_permutations_are_near_all(self):
    labels, a, b = two_methods(6, 7)
    exact = paired.auroc_permutation(labels, a, b, permutations=2**13)
    drawn = paired.auroc_permutation(labels, a, b, permutations=2**13 - 1, seed=3)
    assert exact.seed is None and drawn.seed == 3
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.02)
    assert drawn.difference == exact.difference

  def test_units_do_not_matter(self):
    labels, a, b = two_methods()
    assert paired.auroc_permutation(labels, a, b) == paired.auroc_permutation(labels, a, np.exp(7 * b))

  def test_p_values_are_uniform_where_methods_do_not_differ(self):
    rng, p = np.random.default_rng(0), []
    for _ in range(300):
      labels = np.arange(40) >= 15
      common = rng.standard_normal(40) + labels
      a, b = common + rng.standard_normal((2, 40))
      p.append(paired.auroc_permutation(labels, a, 10 * b, permutations=200, seed=rng).p_value)
    assert scipy.stats.kstest(p, 'uniform').pvalue > 0.01

  def test_a_difference_is_found(self):
    labels, a, b = two_methods(40, 60)
    assert paired.auroc_permutation(labels, a, b).p_value < 0.01
    assert paired.auroc_permutation(labels, a, a).p_value == 1

  @pytest.mark.parametrize('labels, a, b, words', [
      ([0, 1], [1, 2], [1, np.nan], 'scores of the second method'), ([0, 1], [1], [1, 2], 'first method'),
      ([1, 1], [1, 2], [1, 2], 'Only one class')])
  def test_errors(self, labels, a, b, words):
    with pytest.raises(ValueError, match=words):
      paired.auroc_permutation(labels, a, b)


class TestDifferenceInterval:

  def test_draws_are_the_same_for_both(self):
    labels, a, b = two_methods(30, 30)
    found = paired.image_difference_interval(ranking.auroc, labels, a, b, resamples=2000)
    assert found.estimate == metrics.auroc(labels, a) - metrics.auroc(labels, b)
    assert found.low < found.estimate < found.high
    same = paired.image_difference_interval(ranking.auroc, labels, a, 3 * a, resamples=2000)
    assert (same.estimate, same.low) == (0, None)  # no resample differs: nothing is known
    noise = np.random.default_rng(5).standard_normal(60)
    apart = paired.image_difference_interval(ranking.auroc, labels, a, noise + labels, resamples=2000)
    assert apart.high - apart.low > found.high - found.low  # methods that agree have a narrower one


class TestRanks:

  def test_equal_scipys_friedman_test(self):
    values = np.round(np.random.default_rng(0).random((10, 4)), 1)
    found = paired.compare_ranks(values)
    expected = scipy.stats.friedmanchisquare(*values.T)
    assert (found.statistic, found.p_value) == pytest.approx(tuple(expected), abs=1e-12)
    np.testing.assert_allclose(found.average, 5 - paired.compare_ranks(-values).average, atol=1e-12)
    lower = paired.compare_ranks(-values, higher_is_better=False)
    np.testing.assert_array_equal(lower.average, found.average)

  @pytest.mark.parametrize('k, q', [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
  def test_critical_values_are_demsars(self, k, q):
    """Demsar 2006, table 5 (a), the two-tailed Nemenyi test at 0.05."""
    values = np.random.default_rng(k).random((15, k))
    expected = q * np.sqrt(k * (k + 1) / (6 * 15))
    assert paired.compare_ranks(values).critical_difference == pytest.approx(expected, abs=1e-3)

  def test_ties_everywhere(self):
    found = paired.compare_ranks(np.ones((5, 3)))
    assert found.average.tolist() == [2, 2, 2] and (found.statistic, found.p_value) == (0, 1)

  @pytest.mark.parametrize('values, words', [
      ([[1.0, 2.0]], '2 methods'), ([[1.0], [2.0]], '2 methods'), ([[1, np.nan]] * 2, 'None'),
      ([1.0, 2.0], 'data sets, methods')])
  def test_errors(self, values, words):
    with pytest.raises(ValueError, match=words):
      paired.compare_ranks(values)
