"""Compares RAD, MuSc and SuperADD with their released code, on stored tokens.

Part of `experiments.parity`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.comparisons import Row, compare, load, of_largest
from patchcore_jax import morphology, scoring, windows
from patchcore_jax.detectors import RAD, MuSc, SuperADD, musc, rad, superadd
from patchcore_jax.embedding import unit_length
from patchcore_jax.search import thinning


def retrieved_comparisons(folder: Path) -> Iterator[Row]:
  """Compares what RAD retrieves, its patch scores, maps and image scores, and anomalib's."""
  arrays = load(folder, 'rad.npz')
  if not arrays:
    return
  grid, size = tuple(arrays['grid']), tuple(map(int, arrays['map_size']))
  unit = jax.jit(unit_length)
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


def windowed_comparisons(folder: Path) -> Iterator[Row]:
  """Compares SuperADD's windows, thinning, distances, map and steps of binary maps, and anomalib's map."""
  arrays = load(folder, 'superadd.npz')
  if not arrays:
    return
  for name, window, overlap in (('split_64_16_16', 64, 16), ('split_640_128_16', 640, 128)):
    found = [
        (side, 16 * place.start, 16 * place.start + window, place.first, place.last)
        for side in np.unique(arrays[name][:, 0])
        for place in windows.plan(side // 16, window // 16, overlap // 16)]
    yield compare(f'SuperADD windows of {window}', 'SuperADD', found, arrays[name][:, :5], 0, 'integers')
  rows, columns = (windows.cells_of(windows.plan(cells, 4, 1)) for cells in (7, 5))
  found = np.stack([
      rows[:, None, 0] * (columns[:, 0].max() + 1) + columns[:, 0],
      *np.broadcast_arrays(rows[:, None, 1], columns[:, 1])], -1)
  yield compare('SuperADD joined windows', 'SuperADD', found, arrays['stitched_112x80'], 0, 'integers')
  kept = thinning.thinned(
      arrays['features'], int(arrays['subsample_target']), rounds=4, num_neighbors=20,
      rng=np.random.RandomState(3))
  yield compare('SuperADD thinned', 'SuperADD', kept, arrays['subsample_index'], 0, 'indices')
  bank = arrays['features'][kept]
  for i, queries in enumerate(arrays['queries']):
    distances = 6 * superadd.patch_scores([queries[None, None]], [bank])[0, 0]
    yield of_largest(f'SuperADD distances {i}', 'SuperADD', distances, arrays['nearest_distance'][i])
  layers, size = [layer[None] for layer in arrays['predict_tokens']], tuple(arrays['predict_image_size'] // 4)
  found = superadd.patch_scores(layers, [bank, arrays['predict_bank1']])
  yield of_largest('SuperADD map', 'SuperADD', scoring.enlarged(found, size)[0], arrays['predict_map'])
  found = superadd.patch_scores(layers, [arrays['features'][:50], arrays['features'][50:100]])
  found = scoring.enlarged(found, (80, 96), sigma=4.0, edges='reflect')
  yield of_largest('SuperADD map', 'AL', found[0], arrays['anomalib_map_80x96'], 5e-6, 'theirs is float32')
  score = scoring.top_share_scores(found, SuperADD().top_share)
  yield of_largest('SuperADD image score', 'AL', score, arrays['anomalib_score'])
  yield from _binary_maps(arrays)


def _binary_maps(arrays):
  """Compares the steps from a map of SuperADD to its binary map, by the numbers of other pixels."""
  for radius, tolerance in ((5, 0), (26, 8)):
    yield _pixels(f'lines of radius {radius}', np.stack(morphology.line_elements(radius)),
                  arrays[f'kernels_r{radius}'], tolerance)
  found, threshold = arrays['post_input'], float(arrays['post_threshold'])
  radius, lower = int(arrays['post_radius']), float(arrays['post_lower'])
  closed = morphology.closed_along_lines(found > threshold, radius)
  yield _pixels('closed', closed, arrays['post_closed_no_lower'])
  closed &= found > lower * threshold
  yield _pixels('closed above the lower threshold', closed, arrays['post_closed'])
  yield _pixels('filled', morphology.without_holes(closed), arrays['post_filled'])
  yield _pixels('binary map', superadd.marked(found, threshold, radius, lower), arrays['post_eroded'])
  yield _pixels('filled by 4 neighbours', morphology.without_holes(arrays['fill_input'] > 0),
                arrays['fill_output'])


def _pixels(quantity, found, truth, tolerance=0):
  """Counts the pixels that differ."""
  number = float(np.sum(found != (truth > 0)))
  return Row(f'SuperADD {quantity}', 'SuperADD', number, number / found.size, tolerance, 'pixels', 'absolute')


CHECKS: tuple[Callable[[Path], Iterator[Row]], ...] = (
    retrieved_comparisons, mutual_comparisons, windowed_comparisons)
FILES = ('rad.npz', 'musc.npz', 'superadd.npz')
