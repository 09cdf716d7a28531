"""What `many_devices_test` runs in processes of their own: writes what must not depend on the devices.

    python -m tests.many_devices RESULT.json [NUM_PROCESSES PROCESS_ID PORT]
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from patchcore_jax import parallel
from patchcore_jax.search import coreset, k_center, neighbors, search_bank
from patchcore_jax.settings import ScoringSpec, SearchSpec
from tests import patchcore_test

SEARCHES = (('float32', 1), ('bfloat16', 5))  # how candidates are found, and the number of neighbours


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
  for shortlist, k in SEARCHES:
    prepared = parallel.split(
        search_bank.prepare(bank, shortlist, num_shards=mesh.size), mesh)
    found.append(neighbors.sharded_nearest_neighbors(queries, prepared, mesh, k=k))
  return jax.tree.map(np.ndarray.tolist, found)


def predictions(banks=('replicated', 'sharded')):
  """The bank of a fit on these devices, and scores at two ratios, with the bank whole and in shards.

  The scores are those that ask most of a bank in shards: of several neighbours, and of the neighbours of a
  neighbour. `detectors_contract_test` has the plain ones.
  """
  detector = dataclasses.replace(
      patchcore_test.DETECTOR, scoring=ScoringSpec(image_score='reweighted', num_neighbors=2))
  model = patchcore_test.fit(detector)
  found = [
      patchcore_test.predict_at(model, (0.2, 10 / 480), detector, search=SearchSpec(bank=bank))
      for bank in banks]
  return model.arrays['indices'].tolist(), [[scores.image.tolist() for scores in each] for each in found]


def main(path, *distributed):
  if distributed:
    processes, process, port = map(int, distributed)
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(f'localhost:{port}', processes, process)
    sizes = [jax.device_count()]
  else:
    # A mesh of some of the devices too, whose number divides nothing.
    sizes = [3, 8] if jax.device_count() == 8 else [jax.device_count()]
  meshes = [Mesh(np.array(jax.devices()[:size]), (k_center.AXIS,)) for size in sizes]
  result = {
      'devices': [jax.device_count(), jax.local_device_count()],
      'selections': [selections(mesh) for mesh in meshes],
      'neighbors': [neighbours(mesh) for mesh in meshes],
      'predictions': predictions()}
  Path(path).write_text(json.dumps(result))


if __name__ == '__main__':
  main(*sys.argv[1:])
