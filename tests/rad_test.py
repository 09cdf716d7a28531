"""RAD: retrieval by class tokens and the search in windows, against NumPy in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from patchcore_jax.detectors import RAD, rad
from patchcore_jax.settings import SearchSpec
from tests import small

pytestmark = pytest.mark.accelerator


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _by_definition(queries, bank, images, radius):
  """The largest similarity of every patch, one by one."""
  b, rows, columns, _ = queries.shape
  found = np.zeros((b, rows, columns))
  for i, row, column in np.ndindex(b, rows, columns):
    near = bank[images[i]] if radius < 0 else bank[
        images[i], max(0, row - radius):row + radius + 1, max(0, column - radius):column + radius + 1]
    found[i, row, column] = (near @ queries[i, row, column]).max()
  return found


@pytest.fixture(scope='module')
def arrays():
  rng = np.random.default_rng(0)
  queries, bank = (_unit(rng.standard_normal(s)).astype(np.float32) for s in ((2, 5, 4, 6), (7, 5, 4, 6)))
  return queries, bank, np.array([[0, 3, 6], [5, 4, 3]])


class TestSimilarities:

  @pytest.mark.parametrize('radius', [-1, 0, 1])
  def test_by_definition_whatever_is_gathered_at_once(self, arrays, radius, monkeypatch):
    for values in (2**25, 2 * arrays[0].size):  # all three at once, and two at a time
      monkeypatch.setattr(rad, '_VALUES', values)
      found = jax.jit(lambda *x: rad.similarities(*x, radius))(*arrays)
      np.testing.assert_allclose(found, _by_definition(*arrays, radius), rtol=0, atol=1e-6)

  def test_a_window_does_not_reach_around_the_edge(self):
    bank = np.zeros((1, 3, 3, 2), np.float32)
    bank[..., 1] = 1
    bank[0, 2, 2] = 1, 0  # what is looked for lies in one corner
    queries = np.zeros((1, 3, 3, 2), np.float32)
    queries[..., 0] = 1
    found = rad.similarities(queries, bank, np.array([[0]]), 1)[0]
    assert found.tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]


@pytest.fixture(scope='module')
def network():
  return small.with_token()


@pytest.fixture(scope='module')
def models(network):
  return {dtype: small.fit(RAD(num_images=3, dtype=dtype), network=network)
          for dtype in ('float16', 'float32')}


class TestFit:

  def test_keeps_class_tokens_and_patches_of_unit_length(self, models):
    arrays = models['float32'].arrays
    assert arrays.keys() == {'class_tokens', 'patches_0', 'patches_1'}
    b, c = (_unit(m) for m in small.maps(small.images(8), ('b', 'c')))
    token = _unit(small.maps(small.images(8), ('a',))[0].mean((1, 2)))
    for name, expected in (('class_tokens', token), ('patches_0', b), ('patches_1', c)):
      np.testing.assert_allclose(arrays[name], expected, rtol=0, atol=2e-5)

  def test_half_the_memory_for_nearly_the_same_scores(self, models, network):
    whole, half = ([model.arrays[f'patches_{i}'] for i in range(2)] for model in (
        models['float32'], models['float16']))
    assert [2 * x.nbytes for x in half] == [x.nbytes for x in whole]
    found, expected = (
        small.predict(RAD(num_images=3, dtype=dtype), models[dtype], small.images(4, 7), network=network)
        for dtype in ('float16', 'float32'))
    assert 0 < np.abs(found.image - expected.image).max() < 5e-4

  def test_layers_that_do_not_fit(self):
    for layers, words in (
        (small.backbone(('b', 'c')), 'RAD takes a class token from the last of the layers: .* got 4 x 3'),
        (small.with_token(('a', 'b')), 'RAD compares patches of one grid: .* got 4 x 3, 8 x 6'),
        (small.with_token(()), 'RAD compares patches of one grid: .* got none')):
      with pytest.raises(ValueError, match=words):
        small.fit(RAD(num_images=2), network=layers)

  @pytest.mark.parametrize('fields, words', [
      ({'num_images': 9}, 'rad.num_images=9: .* there are 8 training images. Lower it, or set 0'),
      ({'num_images': 3, 'radius': 2}, 'rad.radius=2: a window of 5 x 5 .* the grid of 4 x 3. Lower it')])
  def test_more_than_there_is(self, fields, words, models, network):
    with pytest.raises(ValueError, match=words):
      small.fit(RAD(**fields), network=network)
    with pytest.raises(ValueError, match=words):
      RAD(**fields).score_fn(models['float16'], (network,))


class TestScores:

  @pytest.mark.parametrize('radius, k, weights', [(1, 3, ()), (0, 0, (1.0, 3.0)), (-1, 2, ())])
  def test_equal_brute_force(self, models, network, radius, k, weights):
    new, detector = small.images(4, 7), RAD(
        num_images=k, radius=radius, weights=weights, map_size=(), sigma=0.0, dtype='float32')
    arrays = models['float32'].arrays
    token = _unit(small.maps(new, ('a',))[0].mean((1, 2)))
    images = np.argsort(-(token @ arrays['class_tokens'].T), axis=1)[:, :k or 8]
    expected = sum(weight * (1 - _by_definition(_unit(x), arrays[f'patches_{i}'], images, radius))
                   for i, (weight, x) in enumerate(zip(weights or (1, 1), small.maps(new, ('b', 'c')))))
    expected /= sum(weights or (1, 1))
    found = small.predict(detector, models['float32'], new, network=network)
    np.testing.assert_array_equal(found.evidence['patch'], expected.reshape(4, -1).argmax(1))
    # Pixels at the middle of four cells' pixels are means of them; corners are the cells' own.
    np.testing.assert_allclose(
        found.map[:, ::31, ::23], expected[:, ::3, ::2], rtol=0, atol=1e-5 * expected.max())
    largest = -np.sort(-found.map.reshape(4, -1), 1)[:, :7]  # a hundredth of 768
    np.testing.assert_allclose(found.image, largest.mean(1), rtol=1e-6)

  def test_one_bank_of_two_products(self, network):
    bright, dark = (np.clip(small.images(4, seed) // 4 + at, 0, 255).astype(np.uint8)
                    for seed, at in ((1, 190), (2, 0)))
    model = small.fit(RAD(num_images=4), np.concatenate([bright, dark]), network=network)
    token = _unit(small.maps(small.images(1, 5) // 4 + np.uint8(190), ('a',))[0].mean((1, 2)))
    found = rad.retrieve(token.astype(np.float32), model.arrays['class_tokens'], 4)
    assert sorted(found[0].tolist()) == [0, 1, 2, 3]

  def test_what_cannot_be(self, models, network):
    detector = RAD(num_images=3)
    with pytest.raises(ValueError, match='expected one for each of the 2 layers'):
      dataclasses.replace(detector, weights=(1.0,)).score_fn(models['float16'], (network,))
    with pytest.raises(ValueError, match="search.bank='sharded': RAD"):
      detector.score_fn(models['float16'], (network,), search=SearchSpec(bank='sharded'))


@pytest.mark.parametrize('fields, message', [
    ({'num_images': -1}, 'num_images=-1'), ({'radius': -2}, 'radius=-2'), ({'weights': (0.0,)}, 'weights='),
    ({'map_size': (8,)}, 'map_size='), ({'sigma': -1.0}, 'sigma=-1.0'), ({'blur_edges': 'no'}, "edges='no'"),
    ({'top_share': 1.5}, 'top_share=1.5'), ({'dtype': 'int8'}, "dtype='int8'")])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    RAD(**fields)
