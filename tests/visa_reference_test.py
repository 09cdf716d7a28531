"""VisA's rule against stored values of its code, and threshold by threshold."""

import numpy as np
import pytest
import sklearn.metrics

from patchcore_jax import metrics
from patchcore_jax.metrics import checks
from patchcore_jax.metrics.visa_reference import visa_image_au_pr, visa_pixels


def _made(levels=None):
  rng = np.random.default_rng(0)
  masks = [rng.random(size) < 0.2 for size in ((30, 40), (25, 20), (40, 40))]
  masks[1][:] = False
  maps = [rng.random(mask.shape) + 0.5 * mask for mask in masks]
  return [np.round(m * levels) / levels for m in maps] if levels else maps, masks


@pytest.mark.parametrize('levels', [None, 10])
def test_equals_counting_above_each_threshold(levels):
  maps, masks = _made(levels)
  found = visa_pixels(maps, masks)
  scores, labels = (np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks))
  assert found.thresholds.shape == (202,) and (np.diff(found.thresholds) <= 0).all()
  for i, t in enumerate(found.thresholds):
    marked = scores > t
    assert found.true_positive_rate[i] == pytest.approx(marked[labels].mean(), abs=1e-15)
    assert found.false_positive_rate[i] == pytest.approx(marked[~labels].mean(), abs=1e-15)
    assert found.precision[i] == (pytest.approx(labels[marked].mean()) if marked.any() else 1)
    assert found.f1[i] == pytest.approx(sklearn.metrics.f1_score(labels, marked))


def test_is_near_the_exact_values_of_continuous_scores():
  maps, masks = _made()
  scores, labels = (np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks))
  found = visa_pixels(maps, masks)
  assert found.roc_auc == pytest.approx(metrics.auroc(labels, scores), abs=1e-3)
  assert found.pr_auc == pytest.approx(metrics.average_precision(labels, scores), abs=1e-2)


def test_errors():
  maps, masks = _made()
  for only in (0, 1):
    with pytest.raises(checks.NotDefined, match=f'all are {only}'):
      visa_pixels(maps, [np.full_like(mask, only) for mask in masks])
  with pytest.raises(ValueError, match='image 0, masks: expected 0'):
    visa_pixels(maps, [255 * mask.astype(np.uint8) for mask in masks])


@pytest.mark.parametrize('case', ['basic', 'ties', 'constant', 'float64'])
def test_stored_values(golden, case):
  mvtec, arrays = (np.load(golden / 'evaluation' / name) for name in ('mvtec.npz', 'visa.npz'))
  maps = mvtec['basic_maps']
  maps = {'basic': maps, 'ties': np.round(maps * 16).astype(np.float32) / np.float32(16),
          'constant': np.full_like(maps, 0.5), 'float64': maps.astype(np.float64)}[case]
  found = visa_pixels(maps, mvtec['basic_masks'] > 0)
  assert (found.roc_auc, found.pr_auc) == (arrays[f'{case}_roc_auc'], arrays[f'{case}_pr_auc'])
  for name, value in (('thresholds', found.thresholds), ('fpr', found.false_positive_rate),
                      ('tpr', found.true_positive_rate), ('precision', found.precision), ('f1', found.f1)):
    if f'{case}_{name}' in arrays:
      np.testing.assert_allclose(value, arrays[f'{case}_{name}'], rtol=0, atol=1e-12, err_msg=name)


def test_stored_values_of_images(golden):
  arrays = np.load(golden / 'evaluation' / 'visa.npz')
  labels, scores = arrays['image_labels'], arrays['image_scores']
  assert visa_image_au_pr(labels, scores) == pytest.approx(float(arrays['image_au_pr']), rel=0, abs=1e-12)
  for function, name in ((metrics.auroc, 'image_exact_auroc'), (metrics.average_precision, 'image_exact_ap')):
    assert function(labels, scores) == pytest.approx(float(arrays[name]), rel=0, abs=1e-12)
