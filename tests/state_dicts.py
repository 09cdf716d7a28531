"""PyTorch state dicts of the ResNet family, made from a rule instead of a download."""

import numpy as np

from patchcore_jax.backbones import resnet


def shapes(architecture):
  """{PyTorch key: shape}, batch norm and classifier included."""
  features = 2048 if resnet.ARCHITECTURES[architecture].bottleneck else 512
  unused = {'fc.weight': (1000, features), 'fc.bias': (1000,)}
  return {key: unused.get(key, ()) if shape is None else shape
          for key, shape in resnet.state_dict_shapes(architecture).items()}


def make(architecture, rule):
  """{PyTorch key: rule(key, shape)}; where the rule gives None, the integer 0."""
  values = {key: rule(key, shape) for key, shape in shapes(architecture).items()}
  return {key: np.array(0) if value is None else value for key, value in values.items()}


def simple_rule(key, shape):
  """Small random weights; batch-norm statistics that are neither 0 nor 1."""
  if key.endswith('num_batches_tracked'):
    return None
  rng = np.random.default_rng(len(key) + 31 * sum(shape))
  values = rng.standard_normal(shape, dtype=np.float32)
  if len(shape) > 1:
    return values * np.float32((2 / np.prod(shape[1:])) ** 0.5)
  return np.abs(values) * np.float32(0.1) + np.float32(0.5)
