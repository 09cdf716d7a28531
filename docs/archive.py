"""Scores an archive of images with Ray Data, on one machine or a cluster: what was found, as Parquet.

    pip install 'patchcore_jax[ray]'
    python docs/archive.py banks/part ARCHIVE findings        docs/archives.md explains it
"""

import argparse
import json
from pathlib import Path

import numpy as np
import ray

import patchcore_jax as pc
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.image_finding import find_images


class Inspect:
  """Inspects batches of paths; Ray keeps it in a process of its own, which loads the bank once."""

  def __init__(self, bank: str):
    self.inspector = pc.load(bank)

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
    """Answers for each path: decision, score, all of the finding as JSON, or the error."""
    paths = [str(path) for path in batch['path']]
    try:
      found = list(self.inspector.inspect(paths, batch_size=len(paths)))
    except ImageError:  # one by one, so that a file that cannot be read costs no other its row
      found = [self._one(path) for path in paths]
    return {
        'path': paths,
        'decision': [getattr(finding, 'decision', 'not scored') for finding in found],
        'score': [getattr(finding, 'score', float('nan')) for finding in found],
        'finding': ['' if isinstance(f, ImageError) else json.dumps(f.to_json()) for f in found],
        'error': [str(f) if isinstance(f, ImageError) else '' for f in found]}

  def _one(self, path):
    try:
      return self.inspector.inspect(path)
    except ImageError as e:
      return e


def inspected(bank: str, archive: str, *, processes: int = 1, gpus: float = 0, batch_size: int = 32):
  """Makes the dataset of what is found in all images below a folder, or of a pattern.

  Args:
    bank: folder of the bank.
    archive: folder or pattern.
    processes: how many inspect at a time.
    gpus: GPUs that each of them has.
    batch_size: images that one of them is given at a time.
  """
  paths = ray.data.from_items([{'path': str(Path(path).absolute())} for path in find_images(archive)])
  return paths.repartition(max(1, paths.count() // batch_size)).map_batches(
      Inspect, fn_constructor_args=(str(Path(bank).absolute()),), batch_size=batch_size, num_gpus=gpus,
      compute=ray.data.ActorPoolStrategy(size=processes))


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ('bank', 'archive', 'out'):
    parser.add_argument(name)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--gpus', type=float, default=0)
  given = parser.parse_args()
  answers = inspected(given.bank, given.archive, processes=given.processes, gpus=given.gpus).materialize()
  answers.write_parquet(given.out)
  for row in answers.groupby('decision').count().take_all():
    print(f'{row["count()"]} {row["decision"]}')
