"""Reads files of `torch.save` that hold arrays by name, without torch and without running what they say.

Such a file is a pickle, which may name any function of Python to be called. This reader knows the few things
that a file of arrays needs, an ordered dict, a tensor, its storage and the type of that, and refuses all else
by name. Both layouts are read: the zip archive of torch 1.6 and later, and the row of pickles before.
"""

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # of the older layout, as torch/serialization.py has it
_TYPES = {
    'DoubleStorage': 'float64', 'FloatStorage': 'float32', 'HalfStorage': 'float16', 'LongStorage': 'int64',
    'IntStorage': 'int32', 'ShortStorage': 'int16', 'CharStorage': 'int8', 'ByteStorage': 'uint8',
    'BoolStorage': 'bool'}


class _Storage(NamedTuple):
  """A flat array that tensors are views of; in the older layout its values come after all tensors."""

  key: str
  values: np.ndarray


class _Tensor(NamedTuple):
  """A view of a storage, in its elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def array(self) -> np.ndarray:
    """Copies what the view shows.

    Raises:
      ValueError: it reaches beyond its storage.
    """
    values, size = self.storage.values, self.storage.values.itemsize
    last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
    if self.offset < 0 or min((0, *self.shape, *self.strides)) < 0 or (
        np.prod(self.shape, dtype=object) and last >= len(values)):
      raise ValueError('a tensor reaches beyond its values')
    return np.lib.stride_tricks.as_strided(
        values[self.offset:], self.shape, [s * size for s in self.strides]).copy()


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the arrays of a file by name.

  Args:
    path: a file of `torch.save(state_dict)`, of any version of torch, for little-endian machines.

  Raises:
    ValueError: a damaged file, or one that holds more than arrays by name; the message says what.
  """
  try:
    with open(path, 'rb') as file:
      found = _from_zip(file) if zipfile.is_zipfile(file) else _from_pickles(file, Path(path).stat().st_size)
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, _Tensor) for k, v in found.items()):
      raise ValueError('it holds something else than arrays by name')
    return {name: tensor.array() for name, tensor in found.items()}
  # Whatever a pickle that is cut off, or made to do harm, leads to.
  except (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OSError, OverflowError,
          RecursionError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
    reason = str(e) or type(e).__name__
    raise ValueError(
        f'{path} is not a whole PyTorch state dict ({reason}). Delete it and fetch it again.') from e


def _from_zip(file) -> Any:
  """Reads the layout of an archive: data.pkl, and a member for each storage."""
  with zipfile.ZipFile(file) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith('/data.pkl')]
    folder = name.removesuffix('data.pkl')
    if f'{folder}byteorder' in archive.namelist() and archive.read(f'{folder}byteorder') != b'little':
      raise ValueError('its values are big-endian')

    def values(kind, key, count):
      data = np.frombuffer(archive.read(f'{folder}data/{key}'), kind)
      if len(data) != count:
        raise ValueError(f'storage {key} has {len(data)} values, expected {count}')
      return data

    return _Unpickler(io.BytesIO(archive.read(name)), values).load()


def _from_pickles(file, size) -> Any:
  """Reads the older layout: a magic number, a version, the machine, the tensors, and then their values."""
  file.seek(0)
  if _Unpickler(file).load() != _MAGIC:
    raise ValueError('it is no file of torch.save')
  _Unpickler(file).load()  # the version of the layout, 1001 since 2017
  if not _Unpickler(file).load().get('little_endian', True):
    raise ValueError('its values are big-endian')

  def values(kind, key, count):
    if not 0 <= count * np.dtype(kind).itemsize <= size:
      raise ValueError(f'storage {key} is larger than the file')
    return np.empty(count, kind)

  unpickler = _Unpickler(file, values)
  found = unpickler.load()
  for key in _Unpickler(file).load():
    storage = unpickler.storages[key].values
    count = int.from_bytes(file.read(8), 'little')
    data = file.read(storage.nbytes)
    if count != len(storage) or len(data) != storage.nbytes:
      raise ValueError(f'storage {key} is cut off')
    storage[:] = np.frombuffer(data, storage.dtype)
  return found


class _Unpickler(pickle.Unpickler):
  """An unpickler that makes tensors, and nothing that it does not know.

  Attributes:
    storages: those seen so far, by key.
  """

  def __init__(self, file, values: Callable[[str, str, int], np.ndarray] | None = None):
    super().__init__(file)
    self._values = values
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ('collections', 'OrderedDict'):
      return collections.OrderedDict
    if module == 'torch._utils' and name in _MAKERS:
      return _MAKERS[name]
    if module == 'torch' and name in _TYPES:
      return _TYPES[name]
    raise ValueError(f'it asks for {module}.{name}, which no arrays need')

  def persistent_load(self, pid: Any) -> _Storage:
    what, kind, key, _, count, *_ = pid
    if what != 'storage' or self._values is None:
      raise ValueError(f'it refers to {what!r}')
    if key not in self.storages:
      self.storages[key] = _Storage(key, self._values(kind, key, count))
    return self.storages[key]


def _tensor(storage, offset, shape, strides, *_) -> _Tensor:
  """Makes a tensor of the arguments of torch's own function."""
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


# Names of functions of torch._utils, and what takes their place. Parameters are what the files of 2017 hold.
_MAKERS = {
    '_rebuild_tensor': _tensor, '_rebuild_tensor_v2': _tensor,
    '_rebuild_parameter': lambda tensor, *_: tensor}
