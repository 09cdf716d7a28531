"""AE-SSIM: its network, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax.detectors import AESSIM, ae_ssim
from tests import trained


@pytest.mark.parametrize('size, latent, expected', [(128, 100, 1_050_599)])
def test_parameters_are_the_paper_s(size, latent, expected):
  network = ae_ssim.Network(size, latent)
  variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == expected


@pytest.mark.parametrize('size', [32, 64, 256])
def test_other_sizes(size):
  network = ae_ssim.Network(size, 7)
  restored, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((2, size, size, 3)))
  assert restored.shape == (2, size, size, 3)


def test_the_map_is_largest_in_what_was_not_restored(monkeypatch):
  clean = trained.parts(1)[0]
  monkeypatch.setattr(ae_ssim.Network, '__call__', lambda network, x: jnp.asarray(clean[None] / 255))
  pasted = clean.copy()
  pasted[20:30, 30:40] = 255 - pasted[20:30, 30:40]
  ae_ssim.method.cache_clear()
  scores = ae_ssim.method(AESSIM(size=64)).score({}, pasted[None])
  ae_ssim.method.cache_clear()
  row, column = np.unravel_index(np.argmax(scores.map[0]), (64, 64))
  assert 15 <= row < 35 and 25 <= column < 45


@pytest.mark.slow
def test_learns_parts():
  trained.assert_learns(AESSIM(size=64, batch_size=16, steps=150, learning_rate=2e-3, latent=16), factor=2)


@pytest.mark.slow
def test_learns_parts_in_pieces():
  trained.assert_learns(
      AESSIM(size=64, crop=32, batch_size=16, steps=150, learning_rate=2e-3, latent=16, stride=16), factor=2)


@pytest.mark.parametrize('changes, words', [
    ({'size': 100}, 'ae_ssim.size=100: expected a multiple of 16'),
    ({'crop': 256}, 'ae_ssim.crop=256: expected a multiple of 16, at most size=128'),
    ({'window': 200}, 'ae_ssim.window=200: expected .*128 pixels'),
    ({'flip': 'up'}, "ae_ssim.flip='up': expected one of none, horizontal, both"),
    ({'steps': -1}, 'ae_ssim.steps=-1: expected at least 0'),
    ({'held_out': 0.7}, 'ae_ssim.held_out=0.7: expected 0 to 0.5')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    AESSIM(**changes)
