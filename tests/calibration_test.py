"""Thresholds: by hand, and by what they promise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.banks import calibration
from patchcore_jax.banks.model import Calibration, from_json, to_json


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
    assert from_json(Calibration, json.loads(json.dumps(to_json(found)))) == found

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

  @pytest.mark.parametrize('sign', [1, -1], ids=['distances', 'a boundary'])
  def test_where_good_images_may_lie_inside_of_a_boundary(self, sign):
    """0.1 is the median good image and 0.9 as far outside; of negative scores the scale is linear."""
    scores = sign * np.random.default_rng(0).lognormal(-3, 0.3, 199)
    found = calibration.calibrate(scores, None, false_alarm_rate=0.05)
    middle, limit = np.median(found.image_scores), found.image_threshold
    far = limit ** 2 / middle if sign > 0 else 2 * limit - middle
    points = np.array([middle, limit, far])
    np.testing.assert_allclose(calibration.calibrated_scores(found, points), [0.1, 0.5, 0.9], atol=1e-6)
    values = np.linspace(middle - 0.2 if sign < 0 else 0.001, limit + 0.2, 500)
    assert (np.diff(calibration.calibrated_scores(found, values)) >= 0).all()
    # The formula of the exported program, in float32.
    compiled = jax.jit(lambda x: calibration.calibrated_scores(found, x, jnp))(jnp.float32(values))
    np.testing.assert_allclose(compiled, calibration.calibrated_scores(found, values), atol=1e-5)
    assert (np.diff(compiled) >= -1e-6).all()

  def test_the_alarm_of_negative_scores_is_the_threshold_itself(self):
    found = calibration.calibrate([-4.0, -3.0, -2.0, -1.0], None, false_alarm_rate=0.2)
    assert -1 < found.image_threshold < -1 + 1e-4 and found.pixel_threshold is None
    assert calibration.calibrated_score(found, -0.5) > 0.5 > calibration.calibrated_score(found, -1.5)

  def test_an_allowance_that_takes_much_of_the_room(self):
    scores = [1.0, 1.1, 1.2, 2.0]  # the room is from 1.15 to 2
    few, many = (calibration.calibrate(scores, scores, false_alarm_rate=0.2, allowances=(a, 0.0))
                 for a in (0.08, 0.09))
    assert not calibration.allows_much(few) and calibration.allows_much(many)

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

  def test_negative_scores(self):
    scores = np.random.default_rng(0).normal(-1, 0.1, 50)
    scores[[3, 30]] = 0.5, 0.1
    assert calibration.suspicious(scores) == [3, 30]

  def test_too_few_to_tell(self):
    assert calibration.suspicious([1, 1, 1, 100]) == []
