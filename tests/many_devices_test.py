"""One device, eight, or two processes of two: the same selections, neighbours and scores.

Fake devices must be asked for before JAX starts, hence other processes; see `many_devices`.
"""

import functools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from patchcore_jax.search import coreset, neighbors
from tests import many_devices


def _run(path, devices, num_processes=1):
  """The results of processes that run side by side."""
  env = os.environ | {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'JAX_PLATFORMS': 'cpu'}
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  results = [path / f'{i}.json' for i in range(num_processes)]
  processes = []
  for i, result in enumerate(results):
    distributed = [str(x) for x in (num_processes, i, port)] if num_processes > 1 else []
    processes.append(subprocess.Popen(
        [sys.executable, '-m', 'tests.many_devices', result, *distributed], env=env,
        stdout=subprocess.DEVNULL))
  try:
    assert [p.wait(timeout=300) for p in processes] == [0] * num_processes
  finally:
    for process in processes:
      process.kill()
  return [json.loads(result.read_text()) for result in results]


@functools.cache
def _expected():
  """Computes the same in this process, on one device."""
  points = many_devices.points()
  selections = [
      coreset.dense_greedy_k_center(points, 700, start=[5, 600, 6000]).tolist(),
      coreset.dense_greedy_k_center(points, 300, start=[7], select_start=True).tolist()]
  bank, queries = many_devices.bank_and_queries()
  found = [
      [x.tolist() for x in map(np.asarray, neighbors.nearest_neighbors(queries, bank, k=k))]
      for _, k in many_devices.SEARCHES]
  return selections, found, many_devices.predictions(('replicated',))


def _check(result):
  selections, found, (indices, (scores,)) = _expected()
  for value in result['selections']:
    assert value == selections
  for value in result['neighbors']:
    assert value == found  # distances too, to the last bit
  selected, (replicated, sharded) = result['predictions']
  assert selected == indices and replicated == sharded
  # Not to the last bit: the network's products may be blocked in another way for another batch.
  np.testing.assert_allclose(replicated, scores, rtol=1e-5)


@pytest.mark.parametrize(
    'devices', [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4)), 8])
def test_number_of_devices_has_no_influence(devices, tmp_path):
  (result,) = _run(tmp_path, devices)
  assert result['devices'] == [devices, devices]
  _check(result)


def test_number_of_processes_has_no_influence(tmp_path):
  for result in _run(tmp_path, 2, num_processes=2):
    assert result['devices'] == [4, 2]
    _check(result)
