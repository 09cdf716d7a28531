"""PyTorch state dicts -> Flax variables, with batch norm folded in and nothing left over."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

BATCH_NORM_EPS = 1e-5  # PyTorch's default, which the whole family uses
# The classifier has no use here; every other key must find its place.
_CLASSIFIER = ('fc.weight', 'fc.bias')


class PortError(ValueError):
  """A checkpoint that does not fit the architecture; the message names the keys."""


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a checkpoint file of float arrays by PyTorch name.

  Args:
    path: a .safetensors file, or a .pth / .pt file (needs torch, the extra `[torch]`; read with
      `weights_only=True`, so nothing in it is executed).

  Raises:
    ValueError: no such file, an unknown suffix, a damaged file, torch missing, or a torchvision
      file whose content does not match the hash in its name.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f'No weights file {path}: expected a .safetensors or .pth file.')
  if path.suffix == '.safetensors':
    try:
      return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError) as e:
      raise ValueError(
          f'{path} is not a whole safetensors file ({e}). Delete it and fetch it again.') from e
  if path.suffix not in ('.pth', '.pt'):
    raise ValueError(f'{path}: expected a file that ends in .safetensors or .pth.')
  _check_hash_in_name(path)
  try:
    import torch  # an optional dependency
  except ImportError as e:
    raise ValueError(
        f'{path} is a PyTorch file, and torch is not installed. Install the extra: pip install '
        "-e '.[torch]', or use the .safetensors file of the same checkpoint.") from e
  try:
    state = torch.load(path, map_location='cpu', weights_only=True)
    return {key: value.numpy() for key, value in state.items()}
  except Exception as e:  # torch raises half a dozen unrelated types here
    raise ValueError(
        f'{path} is not a whole PyTorch state dict ({type(e).__name__}: {e}). Delete it and fetch it '
        'again.') from e


def port(
    state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, source: Any = 'checkpoint'
) -> dict[str, Any]:
  """Folds batch norm into the convolutions and renames to Flax.

  scale = gamma / sqrt(variance + eps); kernel = weight * scale; bias = beta - mean * scale.

  Args:
    state_dict: arrays by PyTorch name; kernels are [out, in / groups, height, width].
    shapes: variables to fill, as from `resnet.init_shapes`; kernels are [height, width, in / groups,
      out].
    source: named in errors.

  Returns:
    Flax variables, NumPy float32.

  Raises:
    PortError: keys that are missing, left over, or of another shape.
  """
  left = dict(state_dict)
  for key in _CLASSIFIER:
    left.pop(key, None)
  missing, wrong = [], []

  def take(key, shape):
    value = left.pop(key, None)
    if value is None:
      missing.append(key)
    elif value.shape != shape:
      wrong.append(f'{key} {value.shape}, expected {shape}')
    else:
      return np.asarray(value, np.float64)
    return np.ones(shape)  # only to go on and find every fault at once

  def fold(conv, norm, target):
    height, width, inputs, outputs = target['kernel'].shape
    weight = take(f'{conv}.weight', (outputs, inputs, height, width))
    gamma, beta, mean, variance = (
        take(f'{norm}.{name}', (outputs,))
        for name in ('weight', 'bias', 'running_mean', 'running_var'))
    left.pop(f'{norm}.num_batches_tracked', None)
    scale = gamma / np.sqrt(variance + BATCH_NORM_EPS)
    kernel = (weight * scale[:, None, None, None]).transpose(2, 3, 1, 0)
    return {'kernel': np.ascontiguousarray(kernel, np.float32),
            'bias': (beta - mean * scale).astype(np.float32)}

  params = {}
  for name, target in shapes['params'].items():
    if name == 'conv1':
      params[name] = fold('conv1', 'bn1', target)
    else:
      params[name] = {
          conv: fold(*_torch_names(name, conv), shape) for conv, shape in target.items()}
  _report(source, missing, sorted(left), wrong)
  return {'params': params}


def torch_shapes(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """{PyTorch key: shape} of the checkpoint that `port` expects for these variables."""
  result = {}
  for block, convs in shapes['params'].items():
    for conv, target in {'': convs}.items() if block == 'conv1' else convs.items():
      key, norm = ('conv1', 'bn1') if block == 'conv1' else _torch_names(block, conv)
      height, width, inputs, outputs = target['kernel'].shape
      result[f'{key}.weight'] = (outputs, inputs, height, width)
      for name in ('weight', 'bias', 'running_mean', 'running_var'):
        result[f'{norm}.{name}'] = (outputs,)
      result[f'{norm}.num_batches_tracked'] = ()
  return result


def _torch_names(block: str, conv: str) -> tuple[str, str]:
  """('layer2_0', 'conv1') -> ('layer2.0.conv1', 'layer2.0.bn1')."""
  block = block.replace('_', '.')
  if conv == 'downsample':
    return f'{block}.downsample.0', f'{block}.downsample.1'
  return f'{block}.{conv}', f'{block}.{conv.replace("conv", "bn")}'


def _report(source, missing, left, wrong, most=6):
  def some(keys):
    return ', '.join(keys[:most]) + (f', ... ({len(keys)} in all)' if len(keys) > most else '')

  faults = [
      f'{what}: {some(keys)}' for what, keys in
      (('missing in the file', missing), ('left over in the file', left), ('wrong shape', wrong))
      if keys]
  if faults:
    raise PortError(
        f'{source} does not fit the architecture. ' + '; '.join(faults)
        + '. Is it the checkpoint of another network?')


def _check_hash_in_name(path: Path) -> None:
  """torchvision's file names end in the first 8 digits of their SHA-256."""
  if match := re.search(r'-([0-9a-f]{8})$', path.stem):
    with path.open('rb') as f:
      digest = hashlib.file_digest(f, 'sha256').hexdigest()
    if not digest.startswith(match[1]):
      raise ValueError(
          f'{path} is damaged: its SHA-256 starts with {digest[:8]}, its name says {match[1]}. '
          'Delete it and fetch it again.')
