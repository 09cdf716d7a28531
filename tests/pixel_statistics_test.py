"""Pixel statistics: each of them by hand, and that they tell what the tables warn of."""

import numpy as np
import pytest

from patchcore_jax import metrics
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import PixelStatistics
from patchcore_jax.detectors.pixel_statistics import STATISTICS
from tests import small

GOOD, NEW = small.images(5), small.images(3, seed=1)


def _scores(statistic, good=GOOD, new=NEW, **settings):
  """Fits and scores; the fit is that of another statistic, which the model does not depend on."""
  model = PixelStatistics('brightness' if not settings.get('standardise') else 'mean_image', **settings).fit(
      ArrayData(good), ())
  score_fn = PixelStatistics(statistic, **settings).score_fn(model, ())
  scores = score_fn.fn(score_fn.parameters, new)
  assert scores.map is None
  return np.asarray(scores.image)


def _standardised(gray):
  mean, deviation = (part(axis=(1, 2), keepdims=True) for part in (gray.mean, gray.std))
  return (gray - mean) / deviation


@pytest.mark.parametrize('standardise', [False, True])
def test_by_hand(standardise):
  good, new = (images.mean(axis=-1) / 255 for images in (GOOD, NEW))
  if standardise:
    good, new = _standardised(good), _standardised(new)
  squares = ((new[:, None] - good[None]) ** 2).sum(axis=(2, 3))
  expected = {
      'brightness': new.mean(axis=(1, 2)),
      'deviation': new.std(axis=(1, 2)),
      'half_norm': 0.5 * ((2 * new - 1) ** 2).sum(axis=(1, 2)),
      'brightness_distance': abs(new.mean(axis=(1, 2)) - good.mean()),
      'mean_image': ((new - good.mean(axis=0)) ** 2).sum(axis=(1, 2)),
      'nearest_image': squares.min(axis=1)}
  assert expected.keys() == STATISTICS.keys()
  for statistic, want in list(expected.items())[-2 if standardise else 0:]:
    np.testing.assert_allclose(
        _scores(statistic, size=0, standardise=standardise), want, rtol=1e-4, atol=1e-6, err_msg=statistic)


def test_is_brought_to_a_size():
  flat = np.full((1, 32, 24, 3), 100, np.uint8)
  assert _scores('half_norm', new=flat, size=8)[0] == pytest.approx(0.5 * 64 * (200 / 255 - 1) ** 2, rel=1e-5)
  assert _scores('half_norm', new=flat, size=0)[0] == pytest.approx(12 * 32 * (200 / 255 - 1) ** 2, rel=1e-5)


def test_an_image_of_the_fit_is_nearest_to_itself():
  np.testing.assert_allclose(_scores('nearest_image', new=GOOD, size=0), 0, atol=1e-3)


def test_what_is_darker_than_the_good_ones_of_the_fit():
  """Good test images as dark as those of screw: brightness finds all defects, honest distances none."""
  rng = np.random.default_rng(0)

  def drawn(n, level):
    gray = rng.normal(level, 1, (n, 1, 1, 1)) + rng.normal(0, 5, (n, 16, 16, 3))
    return gray.clip(0, 255).astype(np.uint8)

  good, new = drawn(8, 185), np.concatenate([drawn(8, 171), drawn(8, 187)])
  auroc = {statistic: float(metrics.auroc(np.arange(16) >= 8, _scores(statistic, good, new, size=0)))
           for statistic in STATISTICS}
  assert auroc['brightness'] == auroc['half_norm'] == 1
  assert auroc['brightness_distance'] == auroc['mean_image'] == auroc['nearest_image'] == 0


@pytest.mark.parametrize('changes, words', [
    ({'statistic': 'median'}, "statistic='median': expected one of brightness, deviation, half_norm, "),
    ({'size': -1}, 'size=-1: expected 0 or more pixels'),
    ({'statistic': 'brightness', 'standardise': True},
     "statistic='brightness' is the same for all standardised images: expected mean_image or nearest_image")])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=f'^pixel_statistics.{words}'):
    PixelStatistics(**changes)
