"""MH-PatchCore (Ferrari et al., arXiv 2605.27748): a small bank of whitened patches, selected block by block
in memory that does not grow with the number of images."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax import parallel, whitening
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Data, Run, ScoreFn
from patchcore_jax.detectors.patchcore import one_pass
from patchcore_jax.detectors.patchcore.scores import against_bank, embed_fn_of, only
from patchcore_jax.detectors.settings import MHPatchCore
from patchcore_jax.search import merge_reduce
from patchcore_jax.settings import EmbeddingSpec, ScoringSpec, SearchSpec


def fit(detector: MHPatchCore, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Reads the images twice: for the principal components of all patches, and for a bank of whitened ones.

  Memory on the host: three times a block of patches, and some [d, d] matrices; 0.3 GB for 16 images of
  784 patches of 1024 values. `run.notify` is told how many components and patches are kept.

  The stages of the progress are 'embed' and 'coreset'.

  Returns:
    A `Model` of the arrays
      mean [d] float32, of all patches;
      axes [d, k] float32: whitened patches are (patch - mean) axes;
      embeddings [m, k] float32, whitened patches;
      indices [m] int32, where each comes from: image * p + patch.

  Raises:
    ValueError: no images, or patches that are all equal.
  """
  (backbone,), read = backbones, Recorder(data.batches(), run.keep_images)
  first, batches = streaming.first_of(read)
  embed = embed_fn_of(backbone, EmbeddingSpec(detector.embedding))
  part_of = np.zeros(len(data.examples), int)  # all are one

  def blocks(fn, parameters, batches, stage):
    embedded = streaming.stream(fn, parallel.replicate(parameters), batches)
    return one_pass.blocks(
        embedded, part_of, detector.block_images, lambda _, *done: run.progress(stage, *done))

  found = functools.reduce(whitening.merged, (
      whitening.moments(rows) for _, _, rows in blocks(embed, backbone.variables, batches, 'embed')))
  mean, axes = whitening_of(found, detector)
  dim, kept = axes.shape
  rows, columns = jax.eval_shape(embed, backbone.variables, first.image).shape[1:3]
  tree = tree_of(detector)
  for _, positions, values in blocks(
      _whitened_fn(embed), (backbone.variables, mean, axes), data.batches(), 'coreset'):
    numbers = (positions[:, None] * (rows * columns) + np.arange(rows * columns)).ravel()
    tree.add(merge_reduce.Part(values, numbers, np.empty((len(values), 0), np.float32)))
  bank = tree.root(detector.bank_patches)
  image, patch = np.divmod(bank.rows, rows * columns)
  image = np.searchsorted(read.index, image)  # some may have been no images
  run.notify(
      f'{len(bank.rows)} of {found.count} patches, of {kept} of {dim} values, which have '
      f'{100 * detector.variance:g} % of the variance; every patch is within {bank.bound:.4g} of one of them')
  return streaming.made(
      detector, (backbone,), {
          'mean': mean, 'axes': axes, 'embeddings': bank.points,
          'indices': (image * (rows * columns) + patch).astype(np.int32)},
      data, read, run, image_size=first.image.shape[1:3], grid=(rows, columns))


def score_fn(
    detector: MHPatchCore, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`).

  A patch scores the squared distance to the nearest whitened patch of the bank. The parameters are the
  network's variables with mean and axes, and the bank.
  """
  (backbone,), bank = backbones, model.arrays['embeddings']
  several = against_bank(
      _whitened_fn(embed_fn_of(backbone, EmbeddingSpec(detector.embedding))),
      (backbone.variables, model.arrays['mean'], model.arrays['axes']), bank, scoring_of(detector),
      (len(bank),), search, program)
  return ScoreFn(only(several.fn), several.parameters, several.sharded)


def scoring_of(detector: MHPatchCore) -> ScoringSpec:
  """Says how distances become scores."""
  if detector.support_neighbors == 1:  # nothing to weigh with
    return ScoringSpec(sigma=detector.sigma)
  return ScoringSpec(
      image_score='reweighted_squared', support_neighbors=detector.support_neighbors, sigma=detector.sigma)


def whitening_of(found: whitening.Moments, detector: MHPatchCore) -> tuple[np.ndarray, np.ndarray]:
  """Makes of the moments of all patches what whitens them: mean [d] and axes [d, k], float32."""
  components = whitening.principal_components(found)
  axes = components.axes[:components.needed(detector.variance)]
  covariance = whitening.shrunk(axes @ found.covariance @ axes.T, detector.shrinkage)
  return tuple(
      x.astype(np.float32) for x in (found.mean, (whitening.whitening_matrix(covariance) @ axes).T))


def tree_of(detector: MHPatchCore) -> merge_reduce.Tree:
  """Makes what reduces blocks as they come: two of a level become one of the next, from the outermost on."""
  return merge_reduce.Tree(
      min(detector.block_patches, detector.bank_patches),
      merge_reduce.Reducer(jax.random.key(0), outermost=True), merged=2)


def whitened(embeddings: jax.Array, mean: jax.Array, axes: jax.Array) -> jax.Array:
  """Whitens embeddings [..., d]: [..., k]."""
  return jnp.dot(embeddings - mean, axes, precision=lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=16)
def _whitened_fn(embed):
  """Makes the function ((variables, mean, axes), images) -> whitened embeddings [b, rows, columns, k]."""

  def embed_and_whiten(parameters, images):
    variables, mean, axes = parameters
    return whitened(embed(variables, images), mean, axes)

  return embed_and_whiten
