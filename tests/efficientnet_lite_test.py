"""EfficientNet-Lite0 against definitions in NumPy; `experiments.parity` compares it with timm's."""

import jax
import numpy as np
import pytest

from patchcore_jax import backbones
from patchcore_jax.backbones import efficientnet_lite

pytestmark = pytest.mark.accelerator


def _by_definition(x, kernel, stride, pads):
  """Convolves each channel [h, w, c] in float64."""
  x = np.pad(x.astype(np.float64), [*pads, (0, 0)])
  size = len(kernel)
  rows, columns = ((n - size) // stride + 1 for n in x.shape[:2])
  return np.array([[
      (x[r * stride:r * stride + size, c * stride:c * stride + size] * kernel[:, :, 0]).sum((0, 1))
      for c in range(columns)] for r in range(rows)])


@pytest.mark.parametrize('for_cpu', [True, False])
@pytest.mark.parametrize(
    'height, width, size, stride', [(8, 9, 3, 2), (9, 8, 5, 2), (7, 6, 5, 1), (6, 7, 3, 1)])
def test_depthwise(for_cpu, height, width, size, stride):
  rng = np.random.default_rng(0)
  x, kernel = rng.standard_normal((height, width, 4)), rng.standard_normal((size, size, 1, 4))
  layer = efficientnet_lite.Convolution(4, size, stride, depthwise=True, active=False, for_cpu=for_cpu)
  variables = {'params': {'kernel': kernel.astype(np.float32), 'bias': np.zeros(4, np.float32)}}
  # TensorFlow's 'SAME': as many results as n / stride, rounded up, and the odd pixel of padding behind.
  pads = [(total // 2, total - total // 2) for total in (
      max((-(-n // stride) - 1) * stride + size - n, 0) for n in (height, width))]
  found = layer.apply(variables, x[None].astype(np.float32))[0]
  assert found.shape == (-(-height // stride), -(-width // stride), 4)
  np.testing.assert_allclose(found, _by_definition(x, kernel, stride, pads), atol=1e-5)


def test_layers():
  backbone = backbones.create('efficientnet_lite0', weights='random', layers=('stem', 'e5', 'd10', 'e11'))
  images = jax.ShapeDtypeStruct((1, 224, 200, 3), np.float32)
  maps = jax.eval_shape(backbone.apply, backbone.variables, images)
  assert {name: m.shape[1:] for name, m in maps.items()} == {
      'stem': (112, 100, 32), 'e5': (28, 25, 240), 'd10': (14, 13, 672), 'e11': (14, 13, 672)}
  assert 'b10' in backbone.variables['params'] and 'd11' not in backbone.variables['params']
