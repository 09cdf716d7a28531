"""The reader of PyTorch's files, against files written here by the layouts of torch, without torch."""

import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from patchcore_jax.backbones import torch_file

ARRAYS = {
    'weight': np.arange(24, dtype=np.float32).reshape(2, 3, 4), 'count': np.array(7, np.int64),
    'half': np.ones((0, 3), np.float16), 'flags': np.array([True, False])}
_STORAGES = {
    'float32': 'FloatStorage', 'int64': 'LongStorage', 'float16': 'HalfStorage', 'bool': 'BoolStorage'}
_MAGIC = 0x1950A86A20F9469CFC6C


class _Global:
  """Pickles as the name of something in a module that need not be there."""

  def __init__(self, module, name):
    self.module, self.name = module, name


class _Call:
  """Pickles as the call of a `_Global`."""

  def __init__(self, function, *args):
    self.function, self.args = function, args


class _Storage:
  """Pickles as a reference to values that are elsewhere in the file."""

  def __init__(self, key, values):
    self.key, self.values = key, values


class _Pickler(pickle._Pickler):  # the one in Python, whose save can be extended

  def __init__(self, file, end=(None,)):
    super().__init__(file, 2)
    self._end = end

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, _Global):
      self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
    elif isinstance(obj, _Call):
      self.save(obj.function)
      self.save(obj.args)
      self.write(pickle.REDUCE)
    elif isinstance(obj, _Storage):
      kind = _Global('torch', _STORAGES[obj.values.dtype.name])
      self.save(('storage', kind, obj.key, 'cpu', obj.values.size, *self._end))
      self.write(pickle.BINPERSID)
    else:
      super().save(obj, save_persistent_id)


def _pickled(obj, **kwargs):
  file = io.BytesIO()
  _Pickler(file, **kwargs).dump(obj)
  return file.getvalue()


def state_of(arrays, transposed=()):
  """Makes what torch pickles of arrays by name; those in `transposed` are views whose axes are turned."""
  state = collections.OrderedDict()
  for key, value in arrays.items():
    flat = value.T if key in transposed else value
    strides = [s // value.itemsize for s in np.array(flat, order='C').strides]
    strides = strides[::-1] if key in transposed else strides
    storage = _Storage(str(len(state)), np.ascontiguousarray(flat).reshape(-1))
    state[key] = _Call(
        _Global('torch._utils', '_rebuild_tensor_v2'), storage, 0, value.shape, tuple(strides), False,
        collections.OrderedDict())
  return state


def _storages(state):
  return [call.args[0] for call in state.values()]


def write_zip(path, state, **members):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('w/data.pkl', _pickled(state, end=()))
    for storage in _storages(state):
      archive.writestr(f'w/data/{storage.key}', storage.values.tobytes())
    for name, data in members.items():
      archive.writestr(f'w/{name}', data)


def write_pickles(path, state, little_endian=True):
  with open(path, 'wb') as file:
    for obj in (_MAGIC, 1001, {'little_endian': little_endian}, state, [s.key for s in _storages(state)]):
      file.write(_pickled(obj))
    for storage in _storages(state):
      file.write(struct.pack('<q', storage.values.size) + storage.values.tobytes())


WRITERS = pytest.mark.parametrize('write', [write_zip, write_pickles])


@WRITERS
@pytest.mark.parametrize('transposed', [(), ('weight',)])
def test_arrays(tmp_path, write, transposed):
  write(tmp_path / 'w.pth', state_of(ARRAYS, transposed))
  found = torch_file.read(tmp_path / 'w.pth')
  assert list(found) == list(ARRAYS)
  for name, value in ARRAYS.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value)


@WRITERS
def test_parameters_of_old_files(tmp_path, write):
  state = state_of({'weight': ARRAYS['weight']})
  storages = _storages(state)
  state['weight'] = _Call(
      _Global('torch._utils', '_rebuild_parameter'), state['weight'], True, collections.OrderedDict())
  _write_with(write, tmp_path / 'w.pth', state, storages)
  np.testing.assert_array_equal(torch_file.read(tmp_path / 'w.pth')['weight'], ARRAYS['weight'])


def _write_with(write, path, state, storages):
  """Writes a state whose storages are not the first arguments of its calls."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(globals(), '_storages', lambda _: storages)
    write(path, state)


@WRITERS
@pytest.mark.parametrize('harm', [
    _Call(_Global('os', 'system'), 'touch harmed'), _Call(_Global('builtins', 'eval'), '1'),
    _Global('torch', 'load')])
def test_nothing_else_is_called(tmp_path, write, harm, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _write_with(write, 'w.pth', {'weight': harm}, [])
  with pytest.raises(ValueError, match='which no arrays need'):
    torch_file.read('w.pth')
  assert os.listdir() == ['w.pth']


@WRITERS
@pytest.mark.parametrize('state', [{'weight': 3}, [1, 2], {5: 6}])
def test_something_else(tmp_path, write, state):
  _write_with(write, tmp_path / 'w.pth', state, [])
  with pytest.raises(ValueError, match='something else than arrays by name'):
    torch_file.read(tmp_path / 'w.pth')


@WRITERS
@pytest.mark.parametrize(
    'shape, strides', [((2, 3, 5), (12, 4, 1)), ((2, 3, 4), (-1, 4, 1)), ((10**9,), (1,))])
def test_views_stay_inside(tmp_path, write, shape, strides):
  state = state_of({'weight': ARRAYS['weight']})
  function, args = state['weight'].function, state['weight'].args
  state['weight'] = _Call(function, args[0], 0, shape, strides, *args[4:])
  write(tmp_path / 'w.pth', state)
  with pytest.raises(ValueError, match='reaches beyond its values'):
    torch_file.read(tmp_path / 'w.pth')


@WRITERS
def test_cut_off_anywhere(tmp_path, write):
  write(tmp_path / 'w.pth', state_of(ARRAYS))
  whole = (tmp_path / 'w.pth').read_bytes()
  for size in range(0, len(whole) - 1, 7):
    (tmp_path / 'w.pth').write_bytes(whole[:size])
    with pytest.raises(ValueError, match='not a whole PyTorch state dict'):
      torch_file.read(tmp_path / 'w.pth')


def test_big_endian(tmp_path):
  write_zip(tmp_path / 'zip.pth', state_of(ARRAYS), byteorder='big')
  write_pickles(tmp_path / 'pickles.pth', state_of(ARRAYS), little_endian=False)
  for name in ('zip.pth', 'pickles.pth'):
    with pytest.raises(ValueError, match='big-endian'):
      torch_file.read(tmp_path / name)
