"""Several processes of one program, by `jax.distributed`: each has a part of the images, and what they find
is put together. In a program of one process none of this does or costs anything.
"""

import hashlib
import math

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patchcore_jax import disk_arrays

_BLOCK = 2**28  # bytes of each process that every device holds at once while they travel


def is_first() -> bool:
  """Tells whether this is the process that writes files and talks to the user."""
  return jax.process_index() == 0


def part(n: int) -> slice:
  """Computes which of n images are this process's own: even shares, in the order of the processes.

  Raises:
    ValueError: fewer images than processes.

  >>> part(5)
  slice(0, 5, None)
  """
  count, index = jax.process_count(), jax.process_index()
  if n < count:
    raise ValueError(f'{n} images for {count} processes: each needs one. Use fewer processes.')
  return slice(n * index // count, n * (index + 1) // count)


def joined(array: np.ndarray) -> np.ndarray:
  """Joins the arrays [n, ...] of all processes, one after another, in each of them.

  Args:
    array: this process's own; n may differ from process to process, the rest of the shape and the dtype may
      not. Its values have at most 32 bits: JAX would cut longer ones.

  >>> joined(np.array([1, 2], np.int32))
  array([1, 2], dtype=int32)
  """
  if jax.process_count() == 1:
    return array
  if array.dtype.itemsize > 4:
    raise ValueError(f'Expected values of at most 32 bits, got {array.dtype}.')
  counts = multihost_utils.process_allgather(np.int32(len(array)))
  longest, row = int(counts.max()), math.prod(array.shape[1:]) * array.itemsize
  step = max(1, _BLOCK // max(1, row))
  parts = [[array[:0]] for _ in counts]
  for begin in range(0, longest, step):
    block = array[begin:begin + step]
    missing = min(step, longest - begin) - len(block)
    block = np.pad(block, ((0, missing), *[(0, 0)] * (array.ndim - 1)))
    for part, rows, count in zip(parts, multihost_utils.process_allgather(block), counts, strict=True):
      part.append(rows[:max(0, count - begin)])
  return np.concatenate([rows for part in parts for rows in part])


def joined_files(files: list[bytes]) -> list[bytes]:
  """Joins the byte strings of all processes, one after another, in each of them.

  >>> joined_files([b'ab', b'c'])
  [b'ab', b'c']
  """
  data = joined(np.frombuffer(b''.join(files), np.uint8))
  ends = np.cumsum(joined(np.array([len(f) for f in files], np.int32)), dtype=np.int64)
  return [data[end - n:end].tobytes() for n, end in zip(np.diff(ends, prepend=0), ends)]


def counts(n: int) -> np.ndarray:
  """Gathers the `n` of each process: [number of processes] int64.

  >>> counts(3)
  array([3])
  """
  return joined(np.array([n], np.int32)).astype(np.int64)


def own(counts: np.ndarray) -> slice:
  """Computes which of all things are this process's, where `counts` says how many each process has.

  All of them are, where `counts` has a single entry.

  >>> own(np.array([4]))
  slice(0, 4, None)
  """
  i = jax.process_index() if len(counts) > 1 else 0
  return slice(int(counts[:i].sum()), int(counts[:i + 1].sum()))


def gather_rows(
    rows: np.ndarray | disk_arrays.DiskArray, counts: np.ndarray, indices: np.ndarray) -> np.ndarray:
  """Gathers some of the rows of all processes, in each of them.

  Args:
    rows: [n, d], this process's own.
    counts: number of rows in each process; a single entry where there is one, or the rows are not shared.
    indices: [m], counted over all processes, the same in each.

  Returns:
    [m, d], in the order of `indices`.

  >>> gather_rows(np.array([[0.], [1.], [2.]]), np.array([3]), np.array([2, 0])).tolist()
  [[2.0], [0.0]]
  """
  mine = own(counts)
  found = disk_arrays.read_rows(rows, indices[(mine.start <= indices) & (indices < mine.stop)] - mine.start)
  if len(counts) == 1:
    return found
  owner = np.searchsorted(np.cumsum(counts), indices, side='right')
  result = np.empty((len(indices), *found.shape[1:]), found.dtype)
  result[np.argsort(owner, kind='stable')] = joined(found)
  return result


def agree(text: str) -> bool:
  """Tells whether all processes say the same.

  >>> agree('yes')
  True
  """
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
  return bool((joined(digest[None]) == digest).all())


def wait() -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('patchcore_jax')


def mesh(axis: str) -> Mesh:
  """Makes a mesh of all devices of all processes, in the order of the processes."""
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(np.array(devices), (axis,))


def spread(rows: np.ndarray, over: Mesh) -> tuple[jax.Array, np.ndarray]:
  """Spreads the rows of all processes over all devices, as one array; no row leaves its process.

  Args:
    rows: [n, d], this process's own.
    over: a mesh by `mesh`; each process has as many devices as the others.

  Returns:
    The array [m, d], of which every device has the same number of rows, filled up with zeros behind the
    rows of each process; and [m] bool, False for such padding.
  """
  numbers, devices = counts(len(rows)), jax.local_device_count()
  share = -(-int(numbers.max()) // devices) * devices
  padded = np.pad(rows, ((0, share - len(rows)), (0, 0)))
  whole = jax.make_array_from_process_local_data(
      NamedSharding(over, PartitionSpec(over.axis_names)), padded, (share * len(numbers), rows.shape[1]))
  return whole, (np.arange(share) < numbers[:, None]).reshape(-1)
