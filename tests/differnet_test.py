"""DifferNet: its features and scores against NumPy, its optimiser by hand, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import metrics
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import DifferNet, Run, differnet, streaming
from patchcore_jax.detectors.trained import adam
from patchcore_jax.learned import flow
from tests import small, trained

SMALL = DifferNet(size=32, batch_size=4, steps=2, turns=4, angles='even', test_turns=4, blocks=2, hidden=8)
NETWORK = (small.backbone(),)
IMAGES = trained.parts(6, 32)


def _features(images):
  """Computes the features of images that are not turned, in float64."""
  return np.concatenate([
      layer.mean(axis=(1, 2)) for scale in (1, 2, 4) for layer in small.maps(images[:, ::scale, ::scale])], 1)


@pytest.fixture(scope='module')
def model():
  return SMALL.fit(ArrayData(IMAGES), NETWORK)


def test_features_are_of_three_scales_and_of_quarter_turns():
  features = differnet.features_fn(streaming.maps_of(NETWORK[0]), False)
  for i, angle in enumerate(differnet.even_angles(4)):
    found = jax.jit(features)(NETWORK[0].variables, (IMAGES, np.full(6, angle)))
    np.testing.assert_allclose(found, _features(np.rot90(IMAGES, i, (1, 2))), atol=1e-5)


def test_what_comes_in_from_outside_is_black():
  white = np.full((1, 32, 32, 3), 255, np.uint8)
  views = dataclasses.replace(NETWORK[0], apply=lambda variables, x: {'a': x}, layers=('a',))
  features = differnet.features_fn(streaming.maps_of(views), False)
  bright = features({}, (white, np.zeros(1, np.float32)))
  turned = features({}, (white, np.full(1, np.pi / 4, np.float32)))
  np.testing.assert_allclose(bright, 2.0, rtol=1e-6)  # (1 - 0.5) / 0.25
  np.testing.assert_allclose((turned[0] + 2) / 4, 2 * (2**0.5 - 1), atol=0.04)  # the octagon's share


def test_score_is_the_mean_square_over_all_views(model):
  values = np.stack([_features(np.rot90(IMAGES, i, (1, 2))) for i in range(4)], axis=1).reshape(24, -1)
  deviation = values.std(axis=0)
  values = (values - values.mean(axis=0)) / (deviation + 0.01 * deviation.mean())
  params = {}
  for name, array in model.arrays.items():
    if name.startswith('params.'):
      _, nets, layer = name.split('.')
      params.setdefault(nets, {})[layer] = array
  with jax.default_matmul_precision('highest'):
    z, _ = jax.jit(flow.Flow(54, 2, 8).apply)({'params': params}, values.astype(np.float32))
  found = small.predict(SMALL, model, IMAGES, network=NETWORK[0])
  assert found.map is None
  np.testing.assert_allclose(found.image, np.square(z).reshape(6, -1).mean(axis=1), rtol=1e-3)


def test_one_by_one_as_accelerators_score(model, monkeypatch):
  expected = small.predict(SMALL, model, IMAGES, network=NETWORK[0])
  monkeypatch.setattr(
      differnet.lax, 'platform_dependent', lambda *args, cpu, default: default(*args))
  method = differnet.method.__wrapped__(SMALL, streaming.maps_of(NETWORK[0]), (7, 6, 5))
  (variables,) = SMALL.score_fn(model, NETWORK).parameters
  np.testing.assert_allclose(jax.jit(method.score)(variables, IMAGES).image, expected.image, rtol=1e-4)


def test_any_angles_are_an_image_s_own():
  detector = dataclasses.replace(SMALL, angles='any')
  method = differnet.method(detector, streaming.maps_of(NETWORK[0]), (7, 6, 5))
  same = np.repeat(IMAGES[:1], 3, axis=0)
  found = method.examples(NETWORK[0].variables, same, Run())
  assert found.shape == (3, 4, 54)
  assert np.abs(found[0] - found[1]).max() > 1e-3 < np.abs(found[0, 0] - found[0, 1]).max()


def test_step_of_the_optimiser_by_hand():
  """The decay is added to the gradient, before its moments."""
  optimizer = adam(2e-4, decay=1e-5, b1=0.8, b2=0.8, eps=1e-4)
  weight, slope = 3.0, 2e-4
  update, _ = optimizer.update(jnp.array(slope), optimizer.init(jnp.array(weight)), jnp.array(weight))
  total = slope + 1e-5 * weight
  assert float(update) == pytest.approx(-2e-4 * total / (total + 1e-4), rel=1e-5)


def test_learns_parts():
  detector = dataclasses.replace(SMALL, size=64, batch_size=16, learning_rate=1e-3, hidden=32)
  good, new, (bad, _) = trained.parts(48), trained.parts(16, seed=2), trained.defective(16)
  found = {}
  for steps in (0, 150):
    learned = dataclasses.replace(detector, steps=steps)
    model = learned.fit(ArrayData(good), NETWORK)
    scores = small.predict(learned, model, np.concatenate([new, bad]), network=NETWORK[0])
    found[steps] = metrics.auroc(np.arange(32) >= 16, scores.image)
  losses = model.arrays['losses']
  assert losses[-5:].mean() < losses[:5].mean() - 0.25
  assert found[150] > 0.9 and found[150] >= found[0], found


@pytest.mark.parametrize('changes, words', [
    ({'size': 34}, 'differnet.size=34: expected a multiple of 4'),
    ({'angles': 'none'}, "differnet.angles='none': expected one of any, even"),
    ({'turns': 0}, 'differnet.turns=0: expected at least 1'),
    ({'hidden': 0}, 'differnet.hidden=0: expected at least 1')])
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    DifferNet(**changes)
