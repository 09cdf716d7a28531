"""Arrays that need not fit into memory: they lie in a file that nobody else sees, and are used in parts."""

import math
import os
import resource
import shutil
import sys
import tempfile
from typing import Any

import numpy as np

# Rows that are read at once: 16 MB of 1024-dim embeddings.
_ROWS = 4096
# Bytes; JAX on a CPU copies arrays that begin elsewhere.
_ALIGNED = 64


class DiskArray:
  """A float32 array in a file without a name, which vanishes with the last use of it, or the process.

  It is indexed and assigned like a NumPy array, and gives copies. Every access maps the file anew and
  leaves nothing mapped: the process stays small, and what the system keeps in its cache it can give
  up at any time.

  Args:
    folder: a folder on the disk to use.
    shape: shape of the array, for which room is reserved at once.

  Raises:
    OSError: not enough room, or not writable.

  >>> import tempfile
  >>> array = DiskArray(tempfile.gettempdir(), (3, 2))
  >>> array[1:3] = np.ones((2, 2))
  >>> array[[2, 0]]
  array([[1., 1.],
         [0., 0.]], dtype=float32)
  """

  dtype = np.dtype(np.float32)

  def __init__(self, folder: str | os.PathLike, shape: tuple[int, ...]):
    self.shape, self.ndim = tuple(shape), len(shape)
    needed, free = self.nbytes, shutil.disk_usage(folder).free
    if needed + 2**20 > free:
      raise OSError(
          f'{needed / 1e9:.1f} GB are needed on the disk of {folder} for a time, and {free / 1e9:.1f} GB '
          'are free.')
    self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, open as long as the array lives
    self._file.truncate(needed)
    if hasattr(os, 'posix_fallocate'):
      os.posix_fallocate(self._file.fileno(), 0, max(1, needed))

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, key: Any) -> np.ndarray:
    return np.array(np.memmap(self._file, self.dtype, 'r', shape=self.shape)[key])

  def __setitem__(self, key: Any, value: Any) -> None:
    np.memmap(self._file, self.dtype, 'r+', shape=self.shape)[key] = value

  def view(self, *shape: int) -> 'DiskArray':
    """Views the beginning of the same file in another shape."""
    other = object.__new__(DiskArray)
    other.shape, other.ndim, other._file = shape, len(shape), self._file
    return other


def allocate(
    shape: tuple[int, ...], *, on_disk: bool, folder: str | os.PathLike) -> np.ndarray | DiskArray:
  """Allocates an array to be filled, in memory or on the disk of `folder`.

  In memory it begins where JAX on a CPU can use it without a copy of its own.
  """
  if on_disk:
    return DiskArray(folder, shape)
  size = 4 * math.prod(shape)
  whole = np.empty(size + _ALIGNED, np.uint8)
  begin = -whole.ctypes.data % _ALIGNED
  return whole[begin:begin + size].view(np.float32).reshape(shape)


def view(array: np.ndarray | DiskArray, shape: tuple[int, ...]) -> np.ndarray | DiskArray:
  """Views the beginning of an array in another shape, without a copy."""
  if isinstance(array, DiskArray):
    return array.view(*shape)
  return array.reshape(-1)[:math.prod(shape)].reshape(shape)


def read_rows(array: np.ndarray | DiskArray, indices: np.ndarray) -> np.ndarray:
  """Reads array[indices], for indices in any order, in the order of the file."""
  result = np.empty((len(indices), *array.shape[1:]), array.dtype)
  order = np.argsort(indices)
  for i in range(0, len(order), _ROWS):
    part = order[i:i + _ROWS]
    result[part] = array[indices[part]]
  return result


def resident_bytes() -> int:
  """Measures the bytes that this process takes; where that is not known, the most that it has taken."""
  try:
    with open('/proc/self/statm') as f:
      return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:
    return peak_bytes()


def peak_bytes() -> int:
  """Measures the most bytes of memory that this process has taken."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
