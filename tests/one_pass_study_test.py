"""The comparison of banks of one pass with those selected from all."""

import numpy as np
import pytest

from experiments import one_pass


@pytest.fixture(scope='module')
def found():
  rng = np.random.default_rng(0)
  train, test = rng.standard_normal((30, 4, 4, 5), np.float32), rng.standard_normal((6, 4, 4, 5), np.float32)
  test[3:, 1, 1] += 6
  return one_pass.compare(train, test, np.array([0, 0, 0, 1, 1, 1]), 40, 0)


def test_all_ways_keep_their_bounds_and_see_the_defects(found):
  assert list(found) == [one_pass.WHOLE, one_pass.USUAL, one_pass.ONE]
  for way in found.values():
    assert 0 < way.radius <= way.bound and way.image_auroc == 1


def test_what_is_reduced_more_often_is_bounded_less_tightly(found):
  assert found[one_pass.WHOLE].bound < found[one_pass.USUAL].bound <= found[one_pass.ONE].bound
