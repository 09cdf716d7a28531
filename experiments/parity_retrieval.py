"""Compares RAD, MuSc and SuperADD with their released code, on stored tokens.

Part of `experiments.parity`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.comparisons import Row, compare, load, of_largest
from patchcore_jax import scoring
from patchcore_jax.detectors import RAD, MuSc, musc, rad, tokens


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


def mutual_comparisons(folder: Path) -> Iterator[Row]:
  """Compares what MuSc aggregates, its mutual scores and maps, and its image scores, shared or not."""
  arrays = load(folder, 'musc.npz')
  if not arrays:
    return
  grid, size, share = tuple(arrays['grid']), tuple(map(int, arrays['map_size'])), MuSc().share
  layers = [layer.reshape(len(layer), *grid, -1) for layer in arrays['tokens']]
  found = [jax.jit(musc.aggregated, static_argnums=1)(layer, 3) for layer in layers]
  yield of_largest('MuSc aggregated', 'MuSc', np.stack(found, 3).reshape(arrays['aggregated_r3_f64'].shape),
                   arrays['aggregated_r3_f64'])
  means = []
  for degree in arrays['r_list'].tolist():
    scores = np.stack([musc.mutual_scores(layer, degree, share) for layer in layers])
    truth = arrays[f'mutual_r{degree}_f64']
    yield of_largest(f'MuSc mutual scores, r = {degree}', 'MuSc', scores.reshape(truth.shape), truth)
    means.append(scores.mean(0))
  scores = np.mean(means, 0)
  yield of_largest('MuSc patch scores', 'MuSc', scores.reshape(len(scores), -1), arrays['patch_scores_f64'])
  maps = musc.maps(scores, size)
  yield of_largest('MuSc maps', 'MuSc', maps, arrays['map_f64'])
  maxima = np.asarray(maps).max((1, 2))
  yield of_largest('MuSc largest of maps', 'MuSc', maxima, arrays['image_max_f64'])
  for ks in ((1, 2, 3), (2, 3)):
    scores = musc.rescored(maxima, arrays['class_tokens'], ks)
    truth = arrays[f'rscin_k{"".join(map(str, ks))}_f64']
    yield of_largest(f'MuSc image scores, k in {ks}', 'MuSc', scores, truth)


CHECKS: tuple[Callable[[Path], Iterator[Row]], ...] = (retrieved_comparisons, mutual_comparisons)
FILES = ('rad.npz', 'musc.npz')
