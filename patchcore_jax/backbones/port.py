"""Converts files of weights to the variables of a network, with nothing left over on either side."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from patchcore_jax.backbones import torch_file
from patchcore_jax.backbones.family import Family

BATCH_NORM = ('weight', 'bias', 'running_mean', 'running_var')  # what a checkpoint has of one
BATCH_NORM_EPS = 1e-5  # PyTorch's default


class PortError(ValueError):
  """A checkpoint that does not fit the architecture; the message names the keys."""


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a checkpoint file of float arrays by PyTorch name.

  Args:
    path: a .safetensors file, or a .pth / .pt file (read by `torch_file`, which runs nothing of it).

  Raises:
    ValueError: no such file, an unknown suffix, a damaged file, or a file whose content does not match the
      hash in its name.
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
  return torch_file.read(path)


def port(
    state_dict: Mapping[str, np.ndarray], family: Family, architecture: str, *, source: Any = 'checkpoint'
) -> Any:
  """Converts a whole checkpoint to the variables of a network, with nothing missing and nothing left over.

  Args:
    state_dict: arrays by name, in the layout that is published.
    family: family of the network.
    architecture: one of the family's.
    source: what errors call the checkpoint.

  Returns:
    Variables, NumPy float32.

  Raises:
    PortError: keys that are missing, left over, or of another shape.
  """
  expected = family.state_dict_shapes(architecture)
  needed = {key: shape for key, shape in expected.items() if shape is not None}
  spelt = {key: family.current_key(key) for key in state_dict}
  twice = [key for key, name in spelt.items() if key != name and name in state_dict]
  state_dict = {name: state_dict[key] for key, name in spelt.items()}
  _report(
      source, [key for key in needed if key not in state_dict],
      sorted([*(state_dict.keys() - expected.keys()), *twice]),
      [f'{key} {state_dict[key].shape}, expected {shape}' for key, shape in needed.items()
       if key in state_dict and state_dict[key].shape != shape])
  return family.convert(state_dict, architecture)


def fold_batch_norm(
    state_dict: Mapping[str, np.ndarray], conv: str, norm: str, *, epsilon: float = BATCH_NORM_EPS
) -> dict[str, np.ndarray]:
  """Folds a batch norm into the convolution before it.

  scale = gamma / sqrt(variance + epsilon); kernel = weight * scale; bias = beta - mean * scale, in float64.

  Args:
    state_dict: PyTorch arrays; the weight of the convolution is [out, in / groups, height, width].
    conv, norm: what the keys of the two begin with, as 'layer1.0.conv1' and 'layer1.0.bn1'.
    epsilon: the batch norm's epsilon.

  Returns:
    'kernel' [height, width, in / groups, out] and 'bias' [out], float32.

  >>> norm = {'bn.weight': 3.0, 'bn.bias': 1.0, 'bn.running_mean': 2.0, 'bn.running_var': 4.0}
  >>> state = {k: np.full(1, v) for k, v in norm.items()} | {'conv.weight': np.ones((1, 1, 1, 1))}
  >>> folded = fold_batch_norm(state, 'conv', 'bn', epsilon=0.0)
  >>> folded['kernel'].item(), folded['bias'].item()
  (1.5, -2.0)
  """
  scale, bias = _scale_and_bias(state_dict, norm, epsilon)
  weight = np.asarray(state_dict[f'{conv}.weight'], np.float64)
  return {'kernel': kernel(weight * scale[:, None, None, None]), 'bias': bias.astype(np.float32)}


def batch_norm(
    state_dict: Mapping[str, np.ndarray], norm: str, *, epsilon: float = BATCH_NORM_EPS
) -> dict[str, np.ndarray]:
  """Converts a batch norm that no convolution comes before: 'scale' and 'bias' [channels], float32.

  Arguments and sums are those of `fold_batch_norm`.
  """
  scale, bias = _scale_and_bias(state_dict, norm, epsilon)
  return {'scale': scale.astype(np.float32), 'bias': bias.astype(np.float32)}


def kernel(weight: np.ndarray) -> np.ndarray:
  """Converts PyTorch's [out, in / groups, height, width] to [height, width, in / groups, out] float32."""
  return np.ascontiguousarray(weight.transpose(2, 3, 1, 0), np.float32)


def _scale_and_bias(state_dict, norm, epsilon):
  """Computes what a batch norm multiplies each channel by, and what it adds, in float64."""
  gamma, beta, mean, variance = (np.asarray(state_dict[f'{norm}.{name}'], np.float64) for name in BATCH_NORM)
  scale = gamma / np.sqrt(variance + epsilon)
  return scale, beta - mean * scale


def _report(source, missing, left, wrong, most=6):
  """Raises PortError where keys are missing, left over or of a wrong shape."""
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
  """Checks a file against its name, which ends in the first 8 digits of its SHA-256 if torchvision's."""
  if match := re.search(r'-([0-9a-f]{8})$', path.stem):
    with path.open('rb') as f:
      digest = hashlib.file_digest(f, 'sha256').hexdigest()
    if not digest.startswith(match[1]):
      raise ValueError(
          f'{path} is damaged: its SHA-256 starts with {digest[:8]}, its name says {match[1]}. '
          'Delete it and fetch it again.')
