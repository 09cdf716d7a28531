"""Compares RAD, MuSc and SuperADD with their released code, on stored tokens.

Part of `experiments.parity`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from experiments.comparisons import Row, compare, load, of_largest
from patchcore_jax import scoring
from patchcore_jax.detectors import RAD, rad, tokens


def retrieved_comparisons(folder: Path) -> Iterator[Row]:
  """Compares what RAD retrieves, its patch scores, maps and image scores, and anomalib's."""
  arrays = load(folder, 'rad.npz')
  if not arrays:
    return
  grid, size = tuple(arrays['grid']), tuple(map(int, arrays['map_size']))
  unit = jax.jit(tokens.unit_length)
  token, bank_token = (unit(arrays[f'{name}_cls'][-1]) for name in ('test', 'bank'))
  patches, banks = (
      [unit(layer.reshape(len(layer), *grid, -1)) for layer in arrays[f'{name}_patches']]
      for name in ('test', 'bank'))
  images = rad.retrieve(token, bank_token, 4)
  yield compare('RAD retrieved', 'RAD', images, arrays['retrieved_k4'], 0, 'indices')
  found = {}
  for name, k, radius in (
      ('global', 4, -1), ('radius0', 4, 0), ('radius1', 4, 1), ('radius2', 4, 2), ('radius1_k2', 2, 1)):
    detector = RAD(radius=radius)
    found[name] = rad.patch_scores(patches, banks, images[:, :k], detector)
    yield of_largest(f'RAD {name} patch scores', 'RAD', found[name], arrays[f'authors_{name}_patch_f64'])
    maps = rad.anomaly_maps(found[name], size, detector)
    if f'authors_{name}_map_f64' in arrays:
      yield of_largest(f'RAD {name} map', 'RAD', maps, arrays[f'authors_{name}_map_f64'])
    yield of_largest(f'RAD {name} image scores', 'RAD', scoring.top_share_scores(maps, detector.top_share),
                      arrays[f'authors_{name}_score_f64'])
  maps = rad.anomaly_maps(found['radius1'], (96, 96), RAD(blur_edges='reflect'))
  yield of_largest('RAD map', 'AL', maps[:, ::2, ::2], arrays['anomalib_radius1_map'])
  yield of_largest('RAD image scores', 'AL', scoring.top_share_scores(maps, 0.01),
                    arrays['anomalib_radius1_score'])


CHECKS: tuple[Callable[[Path], Iterator[Row]], ...] = (retrieved_comparisons,)
FILES = ('rad.npz',)
