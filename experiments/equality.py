"""Computes the same things on two devices, and compares: on the one that JAX runs on, and on a CPU.

The CPU's answers come from another process, `python -m experiments.equality FILE`, which is told to use
nothing else. What is promised to be exact is compared bit for bit: selections and neighbours of given
arrays. Networks and scores are compared within the rounding of float32.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import entries
from patchcore_jax import backbones
from patchcore_jax.detectors import PatchCore
from patchcore_jax.search import coreset, neighbors, search_bank

Arrays = dict[str, np.ndarray]


class Row(NamedTuple):
  """One comparison: what, how far the two are apart, what is allowed, and whether they are within that."""

  what: str
  difference: str
  allowed: str
  passed: bool


def compare(folder: Path, *, small: bool = False, seconds: float = 100.0) -> Iterator[Row]:
  """Compares this process's device with the CPU.

  Args:
    folder: folder for the CPU's answers.
    small: whether to compute less, for trying out.
    seconds: the most that the CPU may take.
  """
  path = Path(folder) / 'cpu.npz'
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-m', 'experiments.equality', str(path), *(['small'] if small else [])]
  process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
  try:
    ours = {}
    for part in PARTS:  # beside the CPU: they use different processors
      ours |= part(small)
    if process.wait(timeout=seconds):
      raise RuntimeError(f'The process on the CPU ended with exit code {process.returncode}.')
  finally:
    process.kill()
  with np.load(path) as arrays:
    theirs = dict(arrays)
  for name, value in ours.items():
    yield _row(name, value, theirs[name])
  if 'bank/rows' in theirs:
    for name, value in _scores(theirs['bank/rows'], small).items():
      yield _row(name, value, theirs[name])


# Relative to the largest value: float32 sums in another order, through 50 layers and a difference of squares.
_ROUNDING = {'network': 1e-4, 'scores': 1e-3}


def _row(name, ours, theirs):
  """Compares one array with the CPU's: bit for bit, or within rounding."""
  tolerance = _ROUNDING.get(name.partition('/')[0])
  if tolerance is None:
    different = int((ours != theirs).sum()) if ours.shape == theirs.shape else ours.size
    return Row(name, f'{different} of {ours.size} differ', 'none', different == 0)
  difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  return Row(name, f'{difference:.1e}', f'{tolerance:.0e} of the largest', difference <= tolerance)


def selections(small: bool) -> Arrays:
  """Selects from given points: the paper's start, anomalib's, and from points on the host."""
  points = entries.clustered(*((3000, 16) if small else (60_000, 128)))
  size = len(points) // 10
  start = entries.start_of(len(points))
  return {
      'selection, the mean of 10 points': coreset.greedy_k_center(points, size, start=start),
      'selection, one point': coreset.greedy_k_center(points, size, start=start[:1], select_start=True),
      'selection, points on the host': coreset.greedy_k_center(points, size, start=start, stream=True)}


def searches(small: bool) -> Arrays:
  """Searches for neighbours of given queries in given banks."""
  num_queries, num_rows, dim = (100, 1000, 64) if small else (3136, 20_000, 1024)
  rng, found = np.random.default_rng(0), {}
  for rank, k, shortlist in (
      (dim // 16, 1, 'bfloat16'), (dim // 16, 9, 'float32'), (dim, 1, 'float32'), (dim, 9, 'bfloat16')):
    made = rng.standard_normal((num_queries + num_rows, rank), np.float32)
    if rank < dim:  # coarse, so that the order of NumPy's sums does not show
      made = np.round(256 * (made @ rng.standard_normal((rank, dim)))).astype(np.float32) / 256
    prepared = search_bank.prepare(made[num_queries:], shortlist)
    search = jax.jit(functools.partial(neighbors.nearest_neighbors, k=k))
    values, indices = search(made[:num_queries], prepared)
    name = f'neighbours, rank {rank}, k {k}, {shortlist} shortlist'
    found |= {f'{name}: distances': np.asarray(values), f'{name}: indices': np.asarray(indices)}
  return found


def networks(small: bool) -> Arrays:
  """Computes maps of networks in float32."""
  images, maps = entries.pictures(2, 64 if small else 224), {}
  for architecture in ('resnet18',) if small else ('resnet18', entries.WIDE_RESNET):
    network = entries.network('float32', architecture)
    apply = jax.jit(lambda v, x, n=network: n.apply(v, backbones.normalize(x, n.mean, n.std)))
    for layer, value in apply(network.variables, images).items():
      maps[f'network/{architecture} {layer}'] = np.asarray(value)
  return maps


PARTS: tuple[Callable[[bool], Arrays], ...] = (selections, searches, networks)


def _bank(small):
  """Makes a bank of network features: on the CPU only, so that both devices have the same."""
  return PatchCore(0.1).fit(_images(small, seed=0), (_small_network(),)).arrays['embeddings']


def _scores(rows, small):
  """Scores new images against a given bank."""
  from patchcore_jax.detectors import streaming
  data = _images(small, seed=1)
  score_fn = entries.score_fn(_small_network(), rows, data.images.shape[1:3])
  ((_, found),) = streaming.predict(score_fn, data.batches())
  return {'scores/images': found.image, 'scores/maps': found.map}


def _small_network():
  """Makes the network that the scores are of."""
  return entries.network('float32', 'resnet18')


def _images(small, seed):
  """Draws the images that the scores are of."""
  from patchcore_jax.data.dataset import ArrayData
  return ArrayData(entries.pictures(8, 64 if small else 224, seed), batch_size=8)


def main(argv: list[str]) -> None:
  small, answers = 'small' in argv, {}
  for part in PARTS:
    answers |= part(small)
  try:
    answers['bank/rows'] = _bank(small)
    answers |= _scores(answers['bank/rows'], small)
  except ImportError as e:
    print(f'Scores are not compared: {e}', file=sys.stderr)
  np.savez(argv[0], **answers)


if __name__ == '__main__':
  main(sys.argv[1:])
