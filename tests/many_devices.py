"""What `many_devices_test` runs in processes of their own: writes what must not depend on the devices.

    python -m tests.many_devices RESULT.json [NUM_PROCESSES PROCESS_ID PORT]
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from patchcore_jax import parallel, scoring
from patchcore_jax.search import coreset, k_center, neighbors
from patchcore_jax.search.neighbors import SearchSpec
from tests import patchcore_test


def points():
  """[6001, 24] float32 in clusters, with ties: rows that occur twice. No number of devices divides it."""
  rng = np.random.default_rng(3)
  centers = 4 * rng.standard_normal((20, 24))
  rows = centers[rng.integers(20, size=5001)] + rng.standard_normal((5001, 24))
  return np.concatenate([rows, rows[:1000]]).astype(np.float32)


def bank_and_queries():
  """[1501, 128], [203, 128] float32 of few dimensions, so that the search reduces them."""
  rng = np.random.default_rng(4)
  basis = rng.standard_normal((20, 128))
  rows = rng.standard_normal((1704, 20)) @ basis + 0.1 * rng.standard_normal((1704, 128))
  rows = rows.astype(np.float32)
  return rows[:1501], rows[1501:]


def selections(mesh):
  rows = points()
  whole = coreset.greedy_k_center(rows, 700, start=[5, 600, 6000], mesh=mesh)
  states = []
  first = coreset.greedy_k_center(
      rows, 300, start=[7], select_start=True, mesh=mesh,
      checkpoint=lambda s: states.append(int(s.count)))
  assert states == sorted(states) and states[-1] == 300
  return [whole.tolist(), first.tolist()]


def neighbours(mesh):
  bank, queries = bank_and_queries()
  found = []
  for shortlist in ('float32', 'bfloat16'):
    prepared = parallel.split(
        neighbors.prepare(bank, shortlist, num_shards=mesh.size), mesh)
    found += [neighbors.sharded_nearest_neighbors(queries, prepared, mesh, k=k) for k in (1, 5)]
  return jax.tree.map(np.ndarray.tolist, found)


def predictions(spec):
  """Scores of all images and two bank sizes, with the bank whole and in shards."""
  bank = patchcore_test._fit(8)
  found = [
      patchcore_test._predict(bank, 8, sizes=(96, 10), search=SearchSpec(bank=b), scoring_spec=spec)
      for b in ('replicated', 'sharded')]
  return bank.indices.tolist(), [p.image_scores.tolist() for p in found]


SPECS = (scoring.ScoringSpec(), scoring.ScoringSpec(image_score='reweighted', num_neighbors=2))


def main(path, *distributed):
  if distributed:
    processes, process, port = map(int, distributed)
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'localhost:{port}', processes, process)
    sizes = [jax.device_count()]
  else:
    sizes = [size for size in (1, 2, 4, 8) if size <= jax.device_count()]
  meshes = [Mesh(np.array(jax.devices()[:size]), (k_center.AXIS,)) for size in sizes]
  result = {
      'devices': [jax.device_count(), jax.local_device_count()],
      'selections': [selections(mesh) for mesh in meshes],
      'neighbors': [neighbours(mesh) for mesh in meshes],
      'predictions': [predictions(spec) for spec in SPECS]}
  Path(path).write_text(json.dumps(result))


if __name__ == '__main__':
  main(*sys.argv[1:])
