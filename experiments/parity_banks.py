"""Compares AnomalyDINO, SoftPatch and MH-PatchCore with their released code and with anomalib, on stored
embeddings.

Part of `experiments.parity`.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from experiments import reference
from experiments.comparisons import Row, compare, load, of_largest
from patchcore_jax import foreground, rotation, scoring, whitening
from patchcore_jax.backbones import FeatureMaps
from patchcore_jax.detectors import (
    AnomalyDINO,
    MHPatchCore,
    SoftPatch,
    anomaly_dino,
    mh_patchcore,
    soft_patch,
)
from patchcore_jax.detectors.base import LOOP_FREE
from patchcore_jax.detectors.patchcore.scores import against_bank
from patchcore_jax.search import merge_reduce, search_bank
from patchcore_jax.settings import ScoringSpec, SearchSpec


def similar_patches(folder: Path) -> Iterator[Row]:
  """Compares masks, patch scores, image scores and maps of AnomalyDINO."""
  arrays = load(folder, 'anomaly_dino.npz')
  if not arrays:
    return
  size = tuple(map(int, arrays['map_size']))
  references, tokens = (arrays[f'{name}_tokens'].reshape(-1, *arrays['grid'], 16) for name in ('ref', 'test'))
  both = np.concatenate([tokens, references])
  masks = {along: np.asarray(jax.jit(foreground.masks, static_argnums=1)(both, along))
           for along in ('raster', 'grid')}
  for along, whose, origin in (('raster', 'authors', 'authors'), ('grid', 'anomalib', 'AL')):
    yield _different(f'AnomalyDINO foreground, along the {along}', origin,
                     masks[along][:4].reshape(4, -1), arrays[f'{whose}_mask'])
  components = jax.jit(foreground.principal_scores)(arrays['test_tokens'])
  yield compare('AnomalyDINO principal component', 'scikit-learn', components, arrays['first_pc_full_f64'],
                1e-4, 'power iterations; a mask asks whether it is above 10')
  height, width, _ = arrays['rotation_image_shape']
  image = reference.successor_image(32, height, width)
  turned = np.array([rotation.turned(image[None], *rotation.tables((height, width), angle))[0]
                     for angle in arrays['rotation_angles']], int)
  yield compare('AnomalyDINO turned pixels', 'OpenCV', turned, arrays['rotated'], 1, 'halves are rounded')
  yield compare('AnomalyDINO turned pixels, share that differs', 'OpenCV',
                (turned != arrays['rotated']).mean(), 0, 1e-3, 'halves are rounded')
  for name, settings in (
      ('plain', {}), ('masked', {'foreground': 'pca_raster'}), ('k3', {'num_neighbors': 3}),
      ('l2', {'distance': 'euclidean'})):
    patches = _similar(tokens, references, **settings)
    yield of_largest(f'AnomalyDINO {name} patch scores', 'authors', patches, arrays[f'authors_{name}_dist'])
    yield of_largest(f'AnomalyDINO {name} image scores', 'authors', scoring.top_share_scores(patches, 0.01),
                     arrays[f'authors_{name}_score'])
    if name == 'plain':
      yield of_largest('AnomalyDINO map', 'authors', scoring.anomaly_maps(patches, size, ScoringSpec()),
                       arrays['authors_plain_map'])
  for name in ('plain', 'masked'):
    kept = references[masks['grid'][4:]] if name == 'masked' else references  # as it has it
    patches = _similar(tokens, kept, foreground='pca' if name == 'masked' else 'none')
    yield of_largest(f'AnomalyDINO {name} image scores', 'AL', scoring.top_share_scores(patches, 0.01),
                     arrays[f'anomalib_{name}_score'])
    spec = ScoringSpec(upsampling='nearest', blur_edges='reflect')
    yield of_largest(f'AnomalyDINO {name} map', 'AL', scoring.anomaly_maps(patches, size, spec),
                     arrays[f'anomalib_{name}_map'], 2e-6, 'theirs is float32, and off by 6e-7 itself')


def weighted_patches(folder: Path) -> Iterator[Row]:
  """Compares what SoftPatch weighs, leaves out, selects and scores."""
  arrays = load(folder, 'softpatch.npz')
  if not arrays:
    return
  detector = SoftPatch(float(arrays['coreset_ratio']), first_pick='any')
  points = arrays['features'].reshape(-1, arrays['features'].shape[-1])
  noisy = 'theirs adds the rounding of the distance to itself'
  for name, settings, tolerance, why in (
      ('lof5', {}, 1e-6, ''), ('lof6', {'num_neighbors': 6}, 1e-6, ''),
      ('lof_gpu5', {}, 5e-6, 'theirs has distances from float32 products'),
      ('nearest', {'outlyingness': 'nearest'}, 2e-3, noisy),
      ('gaussian', {'outlyingness': 'gaussian'}, 2e-5, 'a float32 inverse')):
    found = soft_patch.patch_weights(SoftPatch(**settings), arrays['features'])
    yield of_largest(f'SoftPatch weights {name}', 'authors', found, arrays[f'weight_{name}'], tolerance, why)
  weights = soft_patch.patch_weights(detector, arrays['features']).reshape(-1)
  noise, threshold = soft_patch.taken_for_noise(weights, detector.noise_share)
  yield of_largest('SoftPatch threshold', 'authors', threshold, arrays['threshold'])
  yield _different('SoftPatch noise', 'authors', np.flatnonzero(noise), arrays['discarded'])
  picks = soft_patch.select(
      points, noise, len(arrays['coreset_index']), arrays['start_points'], detector.first_pick)
  yield _different('SoftPatch coreset', 'authors', picks, arrays['coreset_index'])
  yield of_largest('SoftPatch weights of the bank', 'authors', weights[picks], arrays['coreset_weight'])
  bank, size = points[picks], tuple(map(int, arrays['map_size']))
  queries = arrays['queries'].reshape(2, *arrays['grid'], -1)
  scores = _scores(queries, bank, ScoringSpec(), size, weights=weights[picks])
  yield of_largest('SoftPatch image scores', 'authors', scores.image, arrays['image_score'])
  yield of_largest('SoftPatch maps', 'authors', scores.map, arrays['map'])
  plain = _scores(queries, bank, ScoringSpec(), size)
  yield of_largest('SoftPatch image scores without weights', 'authors', plain.image,
                   arrays['query_distance_squared'].max(axis=1))


def whitened_patches(folder: Path) -> Iterator[Row]:
  """Compares the components, whitening, bank and scores of MH-PatchCore."""
  arrays = load(folder, 'mh_patchcore.npz')
  if not arrays:
    return
  detector = MHPatchCore(
      bank_patches=int(arrays['bank_size']), block_patches=int(arrays['local_coreset_size']))
  ends = np.cumsum(arrays['batch_sizes'])
  found = functools.reduce(
      whitening.merged, map(whitening.moments, np.split(arrays['batches'], ends[:-1])))
  components = whitening.principal_components(found)
  kept = components.needed(detector.variance)
  yield _different('MH-PatchCore number of components', 'AL', [kept], [arrays['pca_num_components']])
  axes = components.axes[:kept]
  covariance = axes @ found.covariance @ axes.T
  regular = whitening.shrunk(covariance, detector.shrinkage)
  for name, value, truth in (
      ('mean', found.mean, 'pca_mean_f64'), ('variance', components.variance, 'pca_explained_variance'),
      ('ratio of variance', components.ratio, 'pca_explained_variance_ratio'),
      ('components', axes, 'pca_components'), ('covariance', covariance, 'cov_raw'),
      ('covariance, shrunk', regular, 'cov_regularized'),
      ('whitening', whitening.whitening_matrix(regular), 'whitening')):
    yield of_largest(f'MH-PatchCore {name}', 'AL', value, arrays[truth], 1e-6, 'theirs projects in float32')
  mean, matrix = mh_patchcore.whitening_of(found, detector)
  rows = np.asarray(mh_patchcore.whitened(arrays['batches'], mean, matrix))
  for whose, origin in (('', 'AL'), ('authors_', 'authors')):
    yield of_largest('MH-PatchCore whitened', origin, rows, arrays[f'{whose}whitened_f64'])
  tree, levels = mh_patchcore.tree_of(detector), []
  for begin, end in zip((0, *ends), ends):
    tree.add(_part(rows, begin, end))
    levels.append(sum(len(part.rows) for part in tree.parts))
  yield _different('MH-PatchCore patches held', 'AL', levels, arrays['level_sizes_after_batch'].sum(axis=1))
  bank = tree.root(detector.bank_patches)
  yield _different('MH-PatchCore bank', 'AL', bank.rows, arrays['bank_index'])
  for name, origin in (('bank', 'AL'), ('authors_bank', 'authors')):
    yield of_largest('MH-PatchCore bank', origin, bank.points, arrays[name])
  first = merge_reduce.Reducer(jax.random.key(0), outermost=True).reduce([_part(rows, 0, ends[0])], 10)
  yield _different('MH-PatchCore first block', 'AL', first.rows, arrays['coreset_of_batch0_index'])
  size, grid = tuple(map(int, arrays['map_size'])), arrays['map_grid']
  queries = np.asarray(mh_patchcore.whitened(arrays['queries'], mean, matrix)).reshape(2, *grid, -1)
  for case, patches, rows, numbers in (
      ('image_score', queries, bank.points, (1, 9)),
      ('eq7_image_score', arrays['eq7_queries'][:, None], arrays['eq7_bank'], (2, 9, 20))):
    for number in numbers:
      scores = _scores(patches, rows, mh_patchcore.scoring_of(MHPatchCore(support_neighbors=number)), size)
      yield of_largest(f'MH-PatchCore {case}, {number} neighbours', 'AL', scores.image,
                       arrays[f'{case}_k{number}'], 2e-6)
    if case == 'image_score':
      yield of_largest('MH-PatchCore maps', 'AL', scores.map, arrays['map'], 2e-6)


CHECKS: tuple[Callable[[Path], Iterator[Row]], ...] = (similar_patches, weighted_patches, whitened_patches)
FILES = ('anomaly_dino.npz', 'softpatch.npz', 'mh_patchcore.npz')


def _similar(tokens, references, **settings):
  """Scores patches by AnomalyDINO: [b, rows, columns]."""
  detector, bank = AnomalyDINO(rotations=1, **settings), references.reshape(-1, references.shape[-1])
  prepared = search_bank.in_one_pass(np.asarray(anomaly_dino.directed(bank, detector.distance)))
  return jax.jit(lambda tokens, prepared: anomaly_dino.patch_scores(
      tokens, prepared, detector, anomaly_dino.background(tokens, detector), size=len(bank),
      kernels=False)[0])(tokens, prepared)


def _scores(embeddings, bank, spec, size, weights=None):
  """Scores embeddings [b, rows, columns, d] as a model does, without its network."""
  score_fn = against_bank(
      _as_they_are, None, bank, spec, (len(bank),), SearchSpec(), LOOP_FREE, weights=weights)
  (scores,) = jax.jit(score_fn.fn)(score_fn.parameters, FeatureMaps({'embeddings': embeddings}, size))
  return scores


def _as_they_are(variables, features):
  """Returns embeddings that are at hand, in the place of a function that computes them."""
  return features.maps['embeddings']


def _part(rows, begin, end):
  """Makes a block of the rows from `begin` to `end`."""
  return merge_reduce.Part(rows[begin:end], np.arange(begin, end), np.empty((end - begin, 0), np.float32))


def _different(quantity, origin, value, truth):
  """Counts what differs, where the same is expected."""
  value, truth = np.asarray(value), np.asarray(truth)
  if value.shape != truth.shape:
    return compare(quantity, origin, value, truth, 0, 'shapes')
  different = int((value != truth).sum())
  return Row(f'{quantity}, what differs', origin, different, different / truth.size, 0, 'the same')
