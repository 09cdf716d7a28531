"""SoftPatch (Jiang et al., "SoftPatch: Unsupervised Anomaly Detection with Noisy Data", NeurIPS 2022): a
PatchCore bank without the patches that stand out, and weights for those that are in it."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from patchcore_jax import foreground, outliers
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Data, Run, ScoreFn
from patchcore_jax.detectors.patchcore.scores import against_bank, embed_fn_of, only
from patchcore_jax.detectors.settings import SoftPatch
from patchcore_jax.search import coreset, k_center
from patchcore_jax.settings import EmbeddingSpec, ScoringSpec, SearchSpec


def fit(detector: SoftPatch, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Weighs all patches, leaves out those taken for noise, and selects a bank from the others (section 3).

  Memory: n p d floats on the host for n images of p patches, on disk while they are weighed if `run.scratch`
  is given; as many points of `projection_dim` values on the device, twice; and some arrays of n^2 values, see
  `outliers`. `run.notify` is told how many patches are taken for noise.

  The stages of the progress are 'embed', 'project' and 'coreset'.

  Returns:
    A `Model` of the arrays
      embeddings [m, d] float32, in order of selection;
      indices [m] int32, where each comes from: image * p + patch;
      weights [m] float32, about 1 for a patch like those at its place, and larger the more it stands out;
      noise [n] int32, how many patches of each image are taken for noise.

  Raises:
    ValueError: no images, fewer than the neighbours ask for, or a ratio that keeps no patch.
  """
  (backbone,), read = backbones, Recorder(data.batches(), run.keep_images)
  _, batches = streaming.first_of(read)
  _check_number(detector, len(data.examples))
  foreground.announce(detector.foreground, run.notify)
  (embeddings,), image_size = streaming.collect(
      streaming.result_in_tuple(embed_fn_of(backbone, EmbeddingSpec(detector.embedding))), backbone.variables,
      batches, len(data.examples), run)
  n, rows, columns, dim = embeddings.shape
  _check_number(detector, n)  # some may have been no images
  points = embeddings.reshape(-1, dim)
  weighing, selection, start = jax.random.split(jax.random.key(run.seed), 3)

  def projected(key):
    return coreset.random_projection(
        points, detector.projection_dim, key=key, progress=lambda *done: run.progress('project', *done))

  weights = patch_weights(detector, projected(weighing).reshape(n, rows * columns, -1)).reshape(-1)
  noise, threshold = taken_for_noise(weights, detector.noise_share)
  picks = select(
      projected(selection), noise, coreset.coreset_size(len(points), detector.ratio),
      np.asarray(jax.random.choice(
          start, len(points), (min(detector.num_start_points, len(points)),), replace=False)),
      detector.first_pick, lambda *done: run.progress('coreset', *done))
  of_image = noise.reshape(n, -1).sum(axis=1, dtype=np.int32)
  run.notify(
      f'{noise.sum()} of {len(noise)} patches are taken for noise, up to {of_image.max()} of the '
      f'{rows * columns} of an image: they weigh more than {threshold:.4g}; {noise[picks].sum()} of them in '
      f'the bank of {len(picks)}, which weigh {weights[picks].min():.4g} to {weights[picks].max():.4g}')
  return streaming.made(
      detector, (backbone,), {
          'embeddings': points[picks], 'indices': picks.astype(np.int32), 'weights': weights[picks],
          'noise': of_image},
      data, read, run, image_size=image_size, grid=(rows, columns))


def score_fn(
    detector: SoftPatch, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`, section 3.4).

  A patch scores the squared distance to the nearest patch of the bank, times the weight of that one. Which is
  nearest, the distance alone decides. The parameters are the network's variables, the bank and its weights.
  """
  (backbone,), bank = backbones, model.arrays['embeddings']
  several = against_bank(
      embed_fn_of(backbone, EmbeddingSpec(detector.embedding)), backbone.variables, bank,
      _scoring(detector), (len(bank),), search, program,
      weights=np.asarray(model.arrays['weights']) if detector.weighted else None)
  return ScoreFn(only(several.fn), several.parameters, several.sharded)


def _scoring(detector):
  """Says how distances become scores."""
  return ScoringSpec(
      sigma=detector.sigma, image_score=detector.image_score, top_share=detector.top_share,
      foreground=detector.foreground)


def patch_weights(detector: SoftPatch, points: jax.Array) -> np.ndarray:
  """Weighs patches by how much each stands out of those at its place in the other images (section 3.2).

  Args:
    detector: the settings.
    points: [n, p, d] float32, the p patches of n images.

  Returns:
    [n, p] float32.
  """
  groups = jnp.swapaxes(points, 0, 1)
  if detector.outlyingness == 'lof':
    found = outliers.local_outlier_factors(groups, detector.num_neighbors)
  elif detector.outlyingness == 'nearest':
    found = 1 + outliers.nearest_distances(groups)
  else:
    found = 1 + outliers.mahalanobis_distances(groups)
  return np.asarray(found).T


def taken_for_noise(weights: np.ndarray, share: float) -> tuple[np.ndarray, float]:
  """Finds the patches whose weights lie above the quantile that leaves this share of them out.

  Args:
    weights: [n] float32, of all patches.
    share: in [0, 1).

  Returns:
    [n] bool, and the quantile, between two weights by linear interpolation.

  >>> taken_for_noise(np.float32([1, 1, 5, 2, 1]), 0.3)[0].tolist()
  [False, False, True, True, False]
  """
  threshold = float(np.quantile(weights.astype(np.float64), 1 - share))
  return weights > threshold, threshold


def select(
    points: jax.Array, noise: np.ndarray, size: int, start: np.ndarray, first_pick: str,
    progress: Callable[[int, int], None] | None = None) -> np.ndarray:
  """Selects patches as PatchCore does, but none that are taken for noise (section 3.3).

  Args:
    points: [n, d] float32.
    noise: [n] bool.
    size: how many.
    start: indices of points, noise or not, from the mean distance to which the selection starts.
    first_pick: as of `SoftPatch`: with 'any', the first may be noise.
    progress: see `coreset.greedy_k_center`.

  Returns:
    [size] int32 indices, in order of selection.
  """
  devices, valid = jax.local_devices(), ~noise
  if first_pick == 'any':
    valid[coreset.greedy_k_center(points, 1, start=start, capacity=size)] = True
  return coreset.greedy_k_center(
      points, size, start=start, valid=valid, progress=progress,
      mesh=Mesh(np.array(devices), (k_center.AXIS,)) if len(devices) > 1 else None)


def _check_number(detector, number):
  """Raises ValueError for fewer images than a weight takes."""
  needed = detector.fewest_images()
  if number < needed:
    raise ValueError(
        f'{number} images: SoftPatch compares each patch with those of the other images: expected at least '
        f'{needed}, also where thresholds leave some out (--folds). Give more, or lower '
        'soft_patch.num_neighbors.')
