"""Makes the inputs of the reference arrays from their definitions: weights and images from a name alone.

The arrays were made by running the paper's released code and anomalib on these very inputs, so that
neither a weight file nor an image is needed to compare with them. Everything follows from
NumPy's PCG64 seeded with the CRC-32 of a name.
"""

import math
import zlib

import numpy as np

from patchcore_jax.backbones import port, registry


def rng_for(name: str) -> np.random.Generator:
  """Makes the random generator of everything called `name`."""
  return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
  """Draws the tensor of a PyTorch state-dict key, float32.

  Convolutions are normal with variance 2 / fan_in; batch norm has scales 1 + 0.1 z (a fifth of that
  at the end of a bottleneck), shifts and means 0.1 z, variances 1 + 0.1 |z|.
  """
  name = key.rpartition('.')[2]
  z = rng_for(key).standard_normal(shape, dtype=np.float32)
  if len(shape) > 1:
    return z * np.float32(math.sqrt(2 / math.prod(shape[1:])))
  small = np.float32(0.1)
  if name in ('bias', 'running_mean'):
    return small * z
  if name == 'running_var':
    return np.float32(1) + small * np.abs(z)
  scale = np.float32(1) + small * z
  return scale * np.float32(0.2) if key.endswith('.bn3.weight') else scale


def successor_weight(seed: int, key: str, shape: tuple[int, ...]) -> np.ndarray:
  """Draws the tensor of a key of timm's Vision Transformers, float32, by the recipe of later arrays."""
  n = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())])).standard_normal(shape)
  name = key.rpartition('.')[2]
  if name in ('cls_token', 'reg_token', 'pos_embed'):
    value = 0.5 * n
  elif name.startswith('gamma'):
    value = 0.5 + 0.1 * n
  elif name.endswith('bias'):
    value = 0.1 * n
  else:
    value = 1 + 0.1 * n if len(shape) == 1 else n / np.sqrt(math.prod(shape[1:]))
  return value.astype(np.float32)


def successor_image(seed: int, height: int, width: int) -> np.ndarray:
  """Draws stripes, steps, a disc and noise, by the recipe of later arrays: uint8 [height, width, 3]."""
  noise = np.random.Generator(np.random.PCG64(
      [seed, zlib.crc32(f'image{height}x{width}'.encode())])).integers(0, 32, (height, width, 3))
  y, x, c = np.ogrid[:height, :width, :3]
  stripes = ((3 + c) * y + (5 - c) * x + 40 * ((y // 16 + x // 24) % 3)) % 256
  stripes = np.where(stripes >= 128, 255 - stripes, stripes)
  disc = (y - height // 2) ** 2 + (x - width // 3) ** 2 < (min(height, width) // 5) ** 2
  return np.clip(np.where(disc, 200 - 50 * c, stripes) + noise, 0, 255).astype(np.uint8)


def variables(architecture: str) -> dict:
  """Makes the Flax variables of a network whose PyTorch weights are `weight(key, shape)`."""
  family = registry.find_family(architecture)
  shapes = family.state_dict_shapes(architecture)
  state = {key: weight(key, shape) for key, shape in shapes.items() if shape is not None}
  return port.port(state, family, architecture, source='reference')


def image(width: int, height: int) -> np.ndarray:
  """Draws a colour gradient with noise: uint8 [height, width, 3]."""
  noise = rng_for(f'synthetic/{width}x{height}').integers(0, 256, (height, width, 3), dtype=np.int64)
  y, x, c = np.ogrid[:height, :width, :3]
  return ((x * (c + 1) // 2 + y * (3 - c) // 2 + noise // 4) % 256).astype(np.uint8)


def part(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Draws an image of the made category: a chequered plate, inverted in a rectangle where it is defective.

  Args:
    path: 'train/good/000.png', 'test/good/000.png' or 'test/<defect>/000.png'.

  Returns:
    image uint8 [256, 256, 3] and mask uint8 [256, 256], 0 or 255.
  """
  rng = rng_for(f'synthetic_part/{path}')
  noise = rng.integers(0, 32, (256, 256, 3), dtype=np.int64)
  lows, highs = [0, 0, 40, 40, 20, 20], [8, 8, 160, 160, 60, 60]
  dx, dy, left, top, width, height = rng.integers(lows, highs, dtype=np.int64)
  y, x, c = np.ogrid[:256, :256, :3]
  pixels = 90 * (((x + dx) // 16 + (y + dy) // 16) % 2) + (x // 2 + 40 * c) % 128 + noise
  mask = np.zeros((256, 256), np.uint8)
  if '/good/' not in path:
    window = np.s_[top:top + height, left:left + width]
    pixels[window] = 255 - pixels[window][..., ::-1]
    mask[window] = 255
  return pixels.astype(np.uint8), mask


def cloud(name: str) -> np.ndarray:
  """Makes a cloud of points called 'kind_NxD', float32 [N, D]; kinds gauss, relu, ints, dups."""
  kind, shape = name.split('_')
  n, d = map(int, shape.split('x'))
  rng = rng_for(f'cloud/{name}')
  if kind == 'dups':  # every point ten times
    return np.tile(rng.integers(-2, 3, (n // 10, d)).astype(np.float32), (10, 1))
  if kind == 'ints':
    return rng.integers(-2, 3, (n, d)).astype(np.float32)
  points = rng.standard_normal((n, d), dtype=np.float32)
  return points if kind == 'gauss' else np.abs(points) + np.float32(1)
