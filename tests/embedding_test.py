"""Patch embeddings against their definition. `parity_test` compares with the paper's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import embedding
from patchcore_jax.embedding import EmbeddingSpec
from tests import precision

pytestmark = pytest.mark.accelerator


def _maps(*shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((2, *s), dtype=np.float32)) for s in shapes]


class TestAdaptive:

  @pytest.mark.parametrize('patch_size', [1, 3, 5, 7, 9])
  @pytest.mark.parametrize('channels, dims, fast', [
      ((16, 32), (32, 32), True),  # WRN-50 in small: 512, 1024 -> 1024
      ((4, 8), (32, 32), True),  # ResNet-18 in small
      ((8, 16), (64, 32), True),
      ((16, 32), (32, 8), True),
      ((8, 16, 32), (32, 32), False),  # bins straddle the layers
      ((12, 18), (32, 32), False),
      ((16, 32), (24, 12), False),
      ((8, 16, 32, 32), (32, 50), False),
      ((5, 7), (16, 40), False)])  # more values than there were
  def test_closed_form_equals_the_definition(self, channels, dims, fast, patch_size):
    maps = _maps(*((12 // 2**i, 10 // 2**i, c) for i, c in enumerate(channels)))
    spec = EmbeddingSpec('adaptive', patch_size, *dims)
    plans = [embedding._plan(c, len(channels), spec) for c in channels]
    assert all(p is not None for p in plans) == fast
    np.testing.assert_allclose(
        embedding.patch_embeddings(maps, spec), embedding.adaptive_embeddings(maps, spec),
        rtol=0, atol=2e-6)

  def test_float64_agrees(self):
    maps = _maps((12, 10, 16), (6, 5, 32))
    spec = EmbeddingSpec('adaptive', 3, 32, 32)
    single = embedding.patch_embeddings(maps, spec)
    with jax.enable_x64(True):
      double = embedding.adaptive_embeddings([jnp.asarray(m, jnp.float64) for m in maps], spec)
      assert double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-6)


class TestMean:

  @pytest.mark.parametrize('patch_size', [1, 3, 5])
  def test_equals_a_loop(self, patch_size):
    (maps,) = _maps((4, 5, 3))
    value = embedding.patch_embeddings([maps], EmbeddingSpec('mean', patch_size))
    margin = patch_size // 2
    padded = np.pad(maps, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    for y in range(4):
      for x in range(5):
        window = padded[:, y:y + patch_size, x:x + patch_size]
        np.testing.assert_allclose(value[:, y, x], window.mean((1, 2)), atol=1e-6)

  def test_deeper_maps_are_enlarged_bilinearly(self):
    row = jnp.asarray([[0.0, 4.0]])[..., None, :, None]
    value = embedding.patch_embeddings(
        [jnp.zeros((1, 1, 4, 1)), row.reshape(1, 1, 2, 1)], EmbeddingSpec('mean', 1))
    np.testing.assert_allclose(value[0, 0, :, 1], [0, 1, 3, 4])

  def test_layers_keep_their_channels(self):
    shallow, deep = _maps((4, 4, 3), (2, 2, 5))
    value = embedding.patch_embeddings([shallow, deep], EmbeddingSpec('mean', 1))
    np.testing.assert_array_equal(value[..., :3], shallow)


def test_products_ask_for_the_highest_precision():
  precision.assert_highest(
      lambda *maps: embedding.patch_embeddings(maps, EmbeddingSpec('mean')),
      *_maps((8, 8, 4), (4, 4, 8)))


class TestErrors:

  @pytest.mark.parametrize('kwargs, words', [
      ({'kind': 'max'}, 'embedding.kind'), ({'patch_size': 2}, 'odd number'),
      ({'target_dim': 0}, 'target_dim')])
  def test_spec_names_the_field(self, kwargs, words):
    with pytest.raises(ValueError, match=words):
      EmbeddingSpec(**kwargs)

  def test_shapes(self):
    with pytest.raises(ValueError, match='Expected maps'):
      embedding.patch_embeddings([jnp.zeros((4, 4, 3))], EmbeddingSpec('mean'))
