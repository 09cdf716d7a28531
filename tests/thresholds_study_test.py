"""The study of thresholds: its scores are the package's, its ways are known, and a run goes on."""

import math

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import thresholds
from patchcore_jax.detectors import patchcore
from patchcore_jax.settings import ScoringSpec


def _patches(n, p=16, seed=0):
  return np.random.default_rng(seed).normal(size=(n, p, 8)).astype(np.float32)


class TestScores:

  @pytest.mark.parametrize('rows', [40, 700])  # fewer and more than bound the patches
  def test_those_of_the_package(self, rows):
    images, bank = _patches(30), _patches(1, rows, seed=1)[0]
    expected = patchcore.score_embeddings(
        images.reshape(30, 4, 4, 8), bank, (32, 32), scoring_spec=ScoringSpec(sigma=0)).image
    np.testing.assert_allclose(thresholds.image_scores(images, bank), expected, rtol=1e-4)

  def test_the_selection_is_the_packages(self):
    points = _patches(1, 300)[0]
    picks = thresholds.select(points, 20, np.random.default_rng(3))
    start = np.random.default_rng(3).choice(300, 10, replace=False)
    assert picks.tolist() == patchcore.fitting.coreset.dense_greedy_k_center(points, 20, start=start).tolist()

  def test_no_image_meets_itself(self):
    """Twelve images at different places: in a bank of its own, each would score 0."""
    good = _patches(14) + 10 * np.arange(14, dtype=np.float32)[:, None, None]
    key = thresholds.Key('made', 'none', 8, 4, 10_000, 12, 4, 0)
    row = thresholds.measure(key, good, _patches(3, seed=5), good, 2)
    assert row.cross.shape == (2, 12) and row.good.shape == (2,) and row.defective.shape == (3,)
    assert row.cross.min() > 30

  def test_some_must_be_left_over(self):
    good = _patches(12)
    with pytest.raises(ValueError, match='left over'):
      thresholds.measure(thresholds.Key('made', 'none', 8, 4, 100, 12, 4, 0), good, good, good, 1)


class TestWays:

  def _alarms(self, way):
    """Measures alarms at 5 % where partitions are as different as new images."""
    rng = np.random.default_rng(0)
    return np.mean([
        np.mean(rng.lognormal(0, 0.3, 500) >= limit)
        for _ in range(200) for limit in thresholds.WAYS[way](rng.lognormal(0, 0.3, (2, 120)), 0.05)])

  @pytest.mark.parametrize('way', [way for way in thresholds.WAYS if way != 'mean of scores'])
  def test_of_many_scores_the_rate_is_met(self, way):
    assert 0.03 < self._alarms(way) < 0.055

  def test_a_mean_of_scores_breaks_the_promise(self):
    """A new image is scored once: what a mean loses of the spread, its score has."""
    assert self._alarms('mean of scores') > 0.08

  def test_a_tail_goes_beyond_the_largest_score(self):
    scores = np.exp(np.random.default_rng(1).normal(0, 0.3, (1, 21)))
    (limit,), (fitted,) = (thresholds.WAYS[way](scores, 0.01) for way in ('one partition', 'normal tail'))
    assert limit == pytest.approx(scores.max(), rel=1e-4) and fitted > limit > scores.max()

  def test_normal_tail_by_hand(self):
    scores = np.exp([-1.0, 0.0, 1.0])  # one above the median, at a distance of 1: Cauchy's quantile
    expected = math.exp(math.sqrt(4 / 3) / math.tan(math.pi * 0.05))
    assert thresholds.normal_tail(scores, 0.05) == pytest.approx(expected)

  def test_equal_scores_have_no_tail(self):
    for tail in (thresholds.normal_tail, thresholds.pareto_tail, thresholds.generalised_pareto_tail):
      assert tail(np.full(20, 2.0), 0.01) == pytest.approx(2)

  def test_spread_is_over_splits_and_between_partitions(self):
    rows = [thresholds.Row(None, np.float32(cross), np.float32([0, 9]), np.float32([9]))
            for cross in ([[1] * 3, [3] * 3], [[1] * 3, [3] * 3])]
    one, mean = (thresholds.outcome(rows, way, 0.3) for way in ('one partition', 'mean of scores'))
    assert (one.spread, one.between) == pytest.approx((0, 0.5)) and mean.between == 0
    assert one.alarms == 0.5 and one.found == 1


class TestRun:

  def test_rows_are_kept_and_tables_printed(self, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(thresholds, 'embedded', lambda network, datas, grid: [
        _patches(len(data), seed=i) for i, data in enumerate(datas)])
    if not flags.FLAGS.is_parsed():
      flags.FLAGS(['test'])
    with flagsaver.flagsaver(
        workdir=str(tmp_path), parts=['gear'], networks=['made'], numbers=['6'], banks=['20'], splits=2,
        partitions=2, folds=3, image_size=32, num_good=10, num_defective=4):
      thresholds.main(None)
      first, rows = capsys.readouterr().out, thresholds.read(tmp_path / 'scores.csv')
      assert [row.key.split for row in rows] == [0, 1] and rows[0].cross.shape == (2, 6)
      assert '| 6 | 20 | one partition |' in first and '| gear | made | 20 | 6 | normal tail | 2 |' in first
      (tmp_path / 'scores.csv').write_text(
          '\n'.join((tmp_path / 'scores.csv').read_text().splitlines()[:2]) + '\n')
      thresholds.main(None)  # the second split is made again, and is the same
      again = thresholds.read(tmp_path / 'scores.csv')
    np.testing.assert_allclose(again[1].cross, rows[1].cross, rtol=1e-5)
    assert capsys.readouterr().out.splitlines()[-3:] == first.splitlines()[-3:]
