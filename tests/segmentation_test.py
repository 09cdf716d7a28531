"""F1 at a given threshold, against scikit-learn and stored counts."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from patchcore_jax.metrics.segmentation import Counts, count_marked

RULES = {'greater': np.greater, 'greater_equal': np.greater_equal}


def _made(seed=0, levels=10):
  rng = np.random.default_rng(seed)
  sizes = [(6, 9), (11, 4), (8, 8), (5, 5)]
  masks = [rng.random(size) < 0.2 for size in sizes]
  masks[3][:] = False
  return [np.round((rng.random(mask.shape) + 0.3 * mask) * levels) / levels for mask in masks], masks


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('threshold', [-1, 0.5, 0.9, 9])
def test_equals_scikit_learn(rule, threshold):
  for seed in range(3):
    maps, masks = _made(seed)
    labels, marked = (np.concatenate([a.ravel() for a in arrays]) for arrays in (
        masks, [RULES[rule](m, threshold) for m in maps]))
    found = count_marked(maps, masks, threshold=threshold, rule=rule)
    _, false, missed, true = confusion_matrix(labels, marked).ravel()
    assert found.pixels == (true, false, missed)
    assert found.seg_f1 == pytest.approx(f1_score(labels, marked), abs=1e-15)
    labels, marked = ([a.any() for a in arrays] for arrays in (
        masks, [RULES[rule](m, threshold) for m in maps]))
    assert found.class_f1 == pytest.approx(f1_score(labels, marked), abs=1e-15)


def test_rules_differ_at_the_threshold_only():
  maps, masks = [np.array([[1.0, 2.0, 3.0]])], [np.array([[0, 1, 1]])]
  assert count_marked(maps, masks, threshold=2, rule='greater').pixels == Counts(1, 0, 1)
  assert count_marked(maps, masks, threshold=2).pixels == Counts(2, 0, 0)


def test_the_threshold_is_not_rounded_to_the_type_of_the_maps():
  for dtype in (np.float16, np.float32):
    value = dtype(0.1)
    maps, masks = [np.array([[value, 0]], dtype)], [np.array([[1, 0]])]
    for threshold in (float(value), np.nextafter(float(value), 1)):
      found = count_marked(maps, masks, threshold=threshold)
      assert found.pixels.true_positives == (threshold == float(value))


def test_labels_of_folders():
  maps, masks = [np.array([[1.0]]), np.array([[1.0]]), np.array([[0.0]])], [np.zeros((1, 1), bool)] * 3
  assert count_marked(maps, masks, threshold=0.5).images == Counts(0, 2, 0)
  assert count_marked(maps, masks, threshold=0.5, labels=[1, 0, 1]).images == Counts(1, 1, 1)


def test_not_defined():
  found = count_marked([np.zeros((2, 2))], [np.zeros((2, 2), bool)], threshold=1)
  assert found.seg_f1 is None and found.class_f1 is None


@pytest.mark.parametrize('change, words', [
    ({'threshold': np.nan}, 'finite threshold'), ({'rule': '>'}, "'greater_equal' or 'greater'"),
    ({'labels': [0, 1]}, '2 labels and 4 masks'), ({'labels': [0, 1, 2, 1]}, 'expected 0'),
    ({'maps': _made()[0][:2]}, 'differ in shape'),
    ({'maps': [np.full((6, 9), np.inf), *_made()[0][1:]]}, 'image 0, maps: expected finite'),
    ({'masks': [255 * mask.astype(int) for mask in _made()[1]]}, 'image 0, masks: expected 0')])
def test_errors(change, words):
  maps, masks = _made()
  with pytest.raises(ValueError, match=words):
    count_marked(**{'maps': maps, 'masks': masks, 'threshold': 0.5} | change)


@pytest.mark.parametrize('name', ['can', 'vial'])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('rule', RULES)
def test_stored_values(golden, name, dtype, rule):
  arrays = np.load(golden / 'evaluation' / 'ad2.npz')
  maps = arrays[f'{name}_test'].astype(dtype)
  masks = np.unpackbits(arrays[f'{name}_masks']).reshape(maps.shape)
  threshold, stored = float(arrays[f'{name}_threshold']), f'{name}_{dtype}_{rule}'
  found = count_marked(maps, masks, threshold=threshold, rule=rule)
  assert list(found.pixels) == arrays[f'{stored}_counts'].tolist()
  assert found.seg_f1 == pytest.approx(float(arrays[f'{stored}_seg_f1']), rel=0, abs=1e-12)
  assert found.class_f1 == pytest.approx(float(arrays[f'{stored}_class_f1']), rel=0, abs=1e-12)
  bad = count_marked(maps[4:], masks[4:], threshold=threshold, rule=rule)
  assert bad.seg_f1 == pytest.approx(float(arrays[f'{stored}_seg_f1_bad_only']), rel=0, abs=1e-12)
