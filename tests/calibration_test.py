"""Thresholds: by hand, and by what they promise."""

import numpy as np
import pytest

from patchcore_jax.inspection import calibration


class TestThreshold:

  @pytest.mark.parametrize('n, rate, k', [(19, 0.05, 19), (99, 0.01, 99), (100, 0.05, 96), (39, 0.1, 36)])
  def test_by_hand(self, n, rate, k):
    scores = np.random.default_rng(0).permutation(np.arange(1, n + 1)).astype(np.float32)
    limit, guaranteed = calibration.threshold(scores, rate)
    assert k < limit < k + 1e-3
    assert guaranteed == pytest.approx(1 - k / (n + 1)) and guaranteed <= rate + 1e-12

  def test_a_score_equal_to_the_kth_does_not_alarm(self):
    scores = np.float32([0.1, 0.2, 0.3, 0.7])
    assert calibration.threshold(scores, 0.5)[0] > scores[2]

  @pytest.mark.parametrize('rate', [0.02, 0.1, 0.3])
  def test_the_guarantee_holds(self, rate):
    """Over calibrations and new images, from a distribution that nothing knows."""
    rng = np.random.default_rng(1)
    alarms = []
    for _ in range(4000):
      scores = rng.lognormal(0, 1, 61)
      alarms.append(scores[60] >= calibration.threshold(scores[:60], rate)[0])
    deviation = 3 * np.sqrt(rate * (1 - rate) / len(alarms))
    # Not more than promised, and not much less: a place among 61 is 0.016.
    assert rate - 0.0165 - deviation < np.mean(alarms) < rate + deviation

  def test_too_few_images(self):
    limit, guaranteed = calibration.threshold([3.0, 1.0], 0.01)
    assert limit > 3 and guaranteed == pytest.approx(1 / 3)

  @pytest.mark.parametrize('scores, rate, message', [
      ([], 0.1, 'at least one'), ([np.nan], 0.1, 'finite'), ([1.0], 0.0, 'between 0 and 1'),
      ([1.0], 1.0, 'between 0 and 1')])
  def test_errors(self, scores, rate, message):
    with pytest.raises(ValueError, match=message):
      calibration.threshold(scores, rate)


class TestScores:

  def _found(self):
    scores = np.random.default_rng(0).lognormal(2, 0.3, 200)
    return calibration.calibrate(scores, 2 * scores, false_alarm_rate=0.05)

  def test_round_trip(self):
    found = self._found()
    assert calibration.from_json(calibration.to_json(found)) == found

  def test_p_values_of_good_images_are_uniform(self):
    rng = np.random.default_rng(2)
    found = self._found()
    values = [calibration.p_value(found, s) for s in rng.lognormal(2, 0.3, 2000)]
    # Of one calibration: its own error is that of 200 scores.
    for level in (0.05, 0.2, 0.5):
      assert np.mean(np.array(values) <= level) == pytest.approx(level, abs=0.1)
    assert calibration.p_value(found, 1e9) == pytest.approx(1 / 201)

  def test_calibrated_scores_rise_and_cross_half_at_the_threshold(self):
    found = self._found()
    values = [calibration.calibrated_score(found, s) for s in np.geomspace(1e-3, 1e6, 200)]
    assert (np.diff(values) >= 0).all() and values[0] >= 0 and values[-1] <= 1
    assert calibration.calibrated_score(found, found.image_threshold) == pytest.approx(0.5)
    assert calibration.calibrated_score(found, 0.0) == 0

  def test_equal_scores_have_no_scale_and_still_a_side(self):
    found = calibration.calibrate([2.0] * 20, [2.0] * 20, false_alarm_rate=0.1)
    assert calibration.calibrated_score(found, 1.0) < 1e-3 < 0.999 < calibration.calibrated_score(found, 3.0)

  def test_lengths(self):
    with pytest.raises(ValueError, match='2 image scores and 1 maxima'):
      calibration.calibrate([1.0, 2.0], [1.0], false_alarm_rate=0.1)


class TestSuspicious:

  def test_only_what_is_far_from_the_rest(self):
    rng = np.random.default_rng(0)
    scores = rng.lognormal(0, 0.2, 300)
    assert calibration.suspicious(scores) == []
    scores[[7, 70]] = 20, 40
    assert calibration.suspicious(scores) == [70, 7]

  def test_too_few_to_tell(self):
    assert calibration.suspicious([1, 1, 1, 100]) == []
