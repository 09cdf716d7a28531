"""Runs one pure function over a batch on all local devices: parameters replicated, images split.

On one device this is `jax.jit`, on several `jax.pmap`.
"""

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = 'device'  # what functions given to `data_parallel` may name in collectives, on several devices


def has_kernels(device: jax.Device) -> bool:
  """Tells whether a device is an NVIDIA GPU for which `k_center_gpu` and `neighbors_gpu` have kernels.

  They are for compute capability 8 (Ampere) and later, where tensorfloat32 began.
  """
  cuda = device.platform == 'gpu' and 'cuda' in device.client.platform_version.lower()
  return cuda and float(device.compute_capability) >= 8


def divisible_batch_size(batch_size: int) -> int:
  """Raises a batch size to the next multiple of the number of local devices.

  0 stands for 8 on CPUs, where networks take as long for each image of a larger batch, and for 32 on others.
  """
  devices = jax.local_device_count()
  batch_size = batch_size or (8 if jax.default_backend() == 'cpu' else 32)
  return -(-batch_size // devices) * devices


def replicate(tree: Any) -> Any:
  """Puts a copy of every array on every local device, once, for use with `data_parallel`."""
  devices = jax.local_devices()
  if len(devices) == 1:
    return jax.device_put(tree, devices[0])
  sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

  def copies(x):
    shards = [jax.device_put(x, device)[None] for device in devices]
    return jax.make_array_from_single_device_arrays((len(devices), *x.shape), sharding, shards)

  return jax.tree.map(copies, tree)


def split(tree: Any, mesh: Mesh | None = None) -> Any:
  """Puts one piece of every array [n, ...] on each of n devices.

  Args:
    tree: arrays on the host, the same in every process.
    mesh: a mesh of one axis and n devices, of one process or several; None for the local devices, for use
      with `data_parallel`.
  """
  mesh = Mesh(np.array(jax.local_devices()), (AXIS,)) if mesh is None else mesh
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  return jax.tree.map(
      lambda x: jax.make_array_from_callback(x.shape, sharding, lambda piece: x[piece]), tree)


def data_parallel(fn: Callable[[Any, jax.Array], Any]) -> Callable[[Any, np.ndarray], Any]:
  """Compiles `fn(parameters, batch) -> results` for all local devices.

  Args:
    fn: a pure function; every result has the batch as its leading axis. Pass the same function object again
      for the compiled program to be used again.

  Returns:
    A function of (parameters by `replicate` or `split`, batch [b, ...]); b must be a multiple of the
    number of local devices. Its results stay on the devices until `gather`.
  """
  mapped = _mapped(fn)
  return lambda parameters, batch: mapped(parameters, _by_device(batch))


def in_threads(
    function: Callable[[Callable[[], None], Any], Any], items: Sequence[Any], at_once: int) -> Iterator[Any]:
  """Yields `function(stopped, item)` of all items in their order, several at a time.

  JAX lets other threads run while it computes. Where the caller goes no further - an error, Ctrl-C - what has
  not begun does not begin, and `stopped`, which long functions call now and then, ends what has: it raises
  `CancelledError`.

  >>> list(in_threads(lambda stopped, x: 2 * x, [1, 2, 3], 2))
  [2, 4, 6]
  """
  ended = threading.Event()

  def stopped():
    if ended.is_set():
      raise concurrent.futures.CancelledError

  with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
    futures = [pool.submit(function, stopped, item) for item in items]
    try:
      for future in futures:
        yield future.result()
    finally:
      ended.set()
      for future in futures:
        future.cancel()


def send(batch: Any) -> Any:
  """Starts copying a batch to the device, so that it is there when `data_parallel` is given it.

  Where there are several devices it is left to `data_parallel`, which splits it.
  """
  return jax.device_put(batch, jax.local_devices()[0]) if jax.local_device_count() == 1 else batch


def compiled(fn: Callable[[Any, jax.Array], Any], parameters: Any, batch: np.ndarray) -> Any:
  """Compiles `fn` for parameters and a batch as `data_parallel` takes them, and runs nothing.

  A later call is spared the compiling. Returns the shapes and dtypes of the results.
  """
  lowered = _mapped(fn).lower(parameters, _by_device(batch))
  lowered.compile()
  return lowered.out_info


def working_bytes(fn: Callable[[Any, jax.Array], Any], parameters: Any, batch: np.ndarray) -> int:
  """Computes the bytes that a batch takes on all local devices together, by the compiler's account.

  Results count twice: one may be on its way to the host while the next is computed.
  """
  memory = _mapped(fn).lower(parameters, _by_device(batch)).compile().memory_analysis()
  each = memory.temp_size_in_bytes + 2 * memory.output_size_in_bytes if memory else 0
  return each * jax.local_device_count()


@functools.lru_cache(maxsize=64)
def _mapped(fn):
  """Compiles a function for all local devices."""
  if jax.local_device_count() == 1:
    return jax.jit(fn)
  return jax.pmap(fn, axis_name=AXIS, devices=jax.local_devices())  # not those of other processes


def _by_device(batch):
  """Gives a batch a leading axis for the devices, where there are several."""
  devices = jax.local_device_count()
  if devices == 1:
    return batch
  return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def fetch(results: Any) -> None:
  """Starts copying results to the host, each as soon as it is computed; `gather` waits for them."""
  for x in jax.tree.leaves(results):
    x.copy_to_host_async()


def gather(results: Any) -> Any:
  """Gathers results of `data_parallel` as NumPy arrays with the batch as leading axis."""
  results = jax.device_get(results)
  if jax.local_device_count() == 1:
    return results
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
