"""EfficientNet-Lite0 against definitions in NumPy, and with the package of its weights against timm."""

import zlib

import jax
import numpy as np
import pytest

from patchcore_jax import backbones
from patchcore_jax.backbones import checkpoints, efficientnet_lite

pytestmark = pytest.mark.accelerator

# Of float32 sums against float64; shared/golden/successors/README.md asks for 3e-6.
TOLERANCE = 3e-6


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


def _made_image(seed, height, width):
  """The image of shared/golden/successors/README.md."""
  rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(f'image{height}x{width}'.encode())]))
  noise = rng.integers(0, 32, size=(height, width, 3))
  y, x = np.mgrid[:height, :width]
  disc = (y - height // 2) ** 2 + (x - width // 3) ** 2 < (min(height, width) // 5) ** 2
  channels = []
  for c in range(3):
    v = ((3 + c) * y + (5 - c) * x + 40 * ((y // 16 + x // 24) % 3)) % 256
    channels.append(np.where(disc, 200 - 50 * c, np.where(v >= 128, 255 - v, v)))
  return np.clip(np.stack(channels, -1) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize('case, seed, height, width', [('a', 21, 224, 224), ('b', 22, 232, 305)])
def test_equals_timm(case, seed, height, width, golden):
  if not checkpoints.installed(checkpoints.find(checkpoints.OFFLINE)):
    pytest.skip('OPTIONAL: the extra [imagenet] is absent; its weights were not compared')
  image = _made_image(seed, height, width)
  with np.load(golden / 'successors/efficientnet_lite0.npz') as arrays:
    assert zlib.crc32(image.tobytes()) == arrays[f'{case}_image_crc32']
    layers = ('stem', 'b2', 'b4', 'e5', 'b7', 'd10', 'b10', 'b15')
    net = backbones.create(checkpoints.OFFLINE, layers=layers)
    np.testing.assert_allclose(net.mean, arrays['mean'])
    np.testing.assert_allclose(net.std, arrays['std'])
    maps = jax.jit(net.apply)(net.variables, backbones.normalize(image[None], net.mean, net.std))
    for layer in layers:
      step, expected = int(arrays[f'{case}_{layer}_step']), arrays[f'{case}_{layer}_f64']
      found = np.asarray(maps[layer][0, ::step, ::step], np.float64)
      found = found[..., ::found.shape[-1] // expected.shape[-1]][..., :expected.shape[-1]]
      assert np.linalg.norm(found - expected) < TOLERANCE * np.linalg.norm(expected), layer
