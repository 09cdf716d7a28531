"""MuSc (Li et al., arXiv 2401.16753, ICLR 2024): the images of an unlabelled set score each other."""

import functools
import hashlib
import math
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax import parallel, scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import BankError, Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming, tokens
from patchcore_jax.detectors.base import Data, HostScoreFn, Run, Scores
from patchcore_jax.detectors.settings import MuSc
from patchcore_jax.embedding import patch_embeddings, unit_length
from patchcore_jax.search import neighbors
from patchcore_jax.settings import EmbeddingSpec, SearchSpec

_EPSILON = 1e-5  # of the normalisation of maps
_DIGEST = 16  # bytes


def fit(detector: MuSc, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Scores every image of the set by all others (section 3 of the paper). Labels are not looked at.

  Memory on the host: the patches of all images, 22 MB an image for ViT-L/14 at 518 px and four layers, on
  disk if `run.scratch` is given; on each device, those of one layer at a time, 5.6 MB an image, and the
  distances of one image's patches to each other image. Products: n^2 p^2 d for each layer and degree.

  Returns:
    A `Model` of the arrays
      patch_scores [n, rows, columns] float32, means over layers and degrees;
      maxima [n] float32, of the maps at the size of the images;
      class_tokens [n, c] float32;
      digests [n, 16] uint8, by which an image is known again.

  Raises:
    ValueError: a network whose last layer is no class token, layers of several grids, no images, or too few.
  """
  (backbone,) = backbones
  read = _Digested(Recorder(data.batches(), run.keep_images))
  (token, *layers), image_size = streaming.collect(
      _tokens_fn(streaming.maps_of(backbone)), backbone.variables, read, len(data.examples), run)
  n, rows, columns, _ = layers[0].shape
  _check_enough(n, detector)
  total, patch_scores = len(detector.degrees) * len(layers) * n, np.zeros((n, rows, columns))
  for i, degree in enumerate(detector.degrees):
    for j, layer in enumerate(layers):
      done = (i * len(layers) + j) * n
      patch_scores += mutual_scores(
          layer, degree, detector.share, lambda count, done=done: run.progress('score', done + count, total))
  patch_scores = (patch_scores / (total / n)).astype(np.float32)
  enlarged = jax.jit(maps, static_argnums=1)
  maxima = [np.asarray(enlarged(scores[None], image_size)).max() for scores in patch_scores]
  unlabelled = types.SimpleNamespace(
      examples=[example._replace(label=0) for example in data.examples], preprocessing=data.preprocessing,
      outside_range=getattr(data, 'outside_range', None))
  return streaming.made(
      detector, (backbone,), {
          'patch_scores': patch_scores, 'maxima': np.array(maxima, np.float32), 'class_tokens': token,
          'digests': np.frombuffer(b''.join(read.digests), np.uint8).reshape(n, _DIGEST)},
      unlabelled, read.recorder, run, image_size=image_size, grid=(rows, columns))


def score_fn(
    detector: MuSc, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> HostScoreFn:
  """Makes the score function (`Detector.score_fn`): it knows the images of the set, and what the fit found.

  Its step on the host raises BankError for an image that is none of them.

  Raises:
    ValueError: larger neighbourhoods than there are images.
  """
  patch_scores, image_size = model.arrays['patch_scores'], tuple(model.description.image_size)
  _check_enough(len(patch_scores), detector)
  images = rescored(model.arrays['maxima'], model.arrays['class_tokens'], detector.neighborhoods)
  # The last of equal images, which have equal scores, stands for all.
  known = {digest.tobytes(): i for i, digest in enumerate(model.arrays['digests'])}

  def finish(seen):
    at = [known.get(digest) for digest in _digests(seen)]
    if None in at:
      raise BankError(
          f'{at.count(None)} of {len(at)} images are none of the {len(known)} that this model of MuSc was '
          'fitted on, as the network saw them: expected images of that set. Fit on those to be scored.')
    at = np.array(at, int)
    found = patch_scores[at]
    worst = found.reshape(len(at), math.prod(patch_scores.shape[1:])).argmax(1).astype(np.int32)
    return Scores(images[at], np.asarray(maps(found, image_size)), {'patch': worst})

  return HostScoreFn(_as_they_are, (), finish=finish)


def mutual_scores(maps: np.ndarray, degree: int, share: float, progress=lambda done: None) -> np.ndarray:
  """Scores the patches of n images by the other images (section 3.2).

  The distance of a patch to another image is that to the nearest of its patches; the score is the mean of the
  smallest of these n - 1 distances.

  Args:
    maps: [n, rows, columns, c] float32, of one layer.
    degree: r, the patches of r x r are averaged before.
    share: how many of the n - 1 count, as a share.
    progress: called with the number of images that are done.

  Returns:
    [n, rows, columns] float32.
  """
  n, rows, columns, _ = maps.shape
  devices, mutual = jax.local_device_count(), parallel.data_parallel(_mutual_fn(int(share * (n - 1))))
  aggregate = jax.jit(aggregated, static_argnums=1)
  images = np.concatenate([np.asarray(aggregate(image[None], degree)) for image in maps])
  images = images.reshape(n, rows * columns, -1)
  bank, found = parallel.replicate(images), []
  for begin in range(0, n, devices):  # one image on each device; the last fills the last batch
    own = np.minimum(np.arange(begin, begin + devices), n - 1).astype(np.int32)
    found.append(parallel.gather(mutual(bank, (images[own], own))))
    progress(min(begin + devices, n))
  return np.concatenate(found)[:n].reshape(n, rows, columns)


def aggregated(maps: jax.Array, degree: int) -> jax.Array:
  """Averages the neighbourhoods of patches (section 3.1).

  Args:
    maps: [b, rows, columns, c] float32; each is first brought to mean 0 and variance 1 over all its values.
    degree: r, the mean is over r x r patches, with zeros beyond the edge.

  Returns:
    Vectors of unit length, of the same shape.
  """
  every = (1, 2, 3)
  centred = maps - maps.mean(every, keepdims=True)
  normalised = centred / jnp.sqrt(jnp.square(centred).mean(every, keepdims=True) + _EPSILON)
  return unit_length(patch_embeddings([normalised], EmbeddingSpec('mean', degree)))


def maps(patch_scores: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Enlarges patch scores [b, rows, columns] to maps [b, *size], corners on corners."""
  return scoring.enlarged(patch_scores, size, 'aligned')


def rescored(scores: np.ndarray, class_tokens: np.ndarray, neighborhoods: Sequence[int]) -> np.ndarray:
  """Averages the scores of images that are alike (section 3.3).

  Args:
    scores: [n].
    class_tokens: [n, c]; their products are the weights.
    neighborhoods: the numbers of images, itself among them, whose weighted means are averaged; () for none.

  Returns:
    [n] float32, of the scores brought to 0 to 1; the scores as they are for no neighbourhoods.

  >>> found = rescored(np.array([1., 3., 5.]), np.array([[1., 0.], [3., 1.], [0., 2.]]), (2,))
  >>> [round(float(score), 3) for score in found]
  [0.375, 0.385, 0.833]
  """
  if not neighborhoods:
    return np.asarray(scores, np.float32)
  scores, vectors = np.asarray(scores, np.float64), np.asarray(class_tokens, np.float64)
  scores = (scores - scores.min()) / (np.ptp(scores) or 1.0)
  weights = vectors @ vectors.T
  order = np.argsort(-weights, axis=1, kind='stable')
  means = []
  for k in neighborhoods:
    nearest = np.take_along_axis(weights, order[:, :k], 1)
    means.append((nearest * scores[order[:, :k]]).sum(1) / nearest.sum(1))
  return np.mean(means, 0).astype(np.float32)


class _Digested:
  """Passes batches on, and keeps a digest of every image."""

  def __init__(self, recorder: Recorder):
    self.recorder, self.digests = recorder, []

  def __iter__(self):
    for batch in self.recorder:
      self.digests += _digests(jax.tree.map(lambda x, valid=batch.valid: x[valid], batch.image))
      yield batch


def _digests(images: Any) -> list[bytes]:
  """Makes a digest of each of some images, which may also be shared feature maps."""
  leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(images)]
  return [hashlib.blake2b(b''.join(x[i].tobytes() for x in leaves), digest_size=_DIGEST).digest()
          for i in range(len(leaves[0]))]


def _as_they_are(parameters, images):
  return images


@functools.lru_cache(maxsize=16)
def _tokens_fn(maps_fn):
  """Makes the function (variables, images) -> (class token [b, c], patches [b, rows, columns, c] ...)."""

  def found(variables, images):
    patches, token = tokens.with_class_token(maps_fn(variables, images), MuSc.title)
    return token, *patches

  return found


@functools.lru_cache(maxsize=16)
def _mutual_fn(count):
  """Makes the function (images [n, p, c], (queries [b, p, c], own [b])) -> scores [b, p]."""

  def mutual(images, batch):

    def of_image(query):
      patches, own = query
      # One image after the other: [n, p] distances are all that is held.
      distances_sq = lax.map(lambda other: neighbors.nearest_neighbors(patches, other)[0][:, 0], images)
      others = jnp.arange(len(images))[:, None] != own
      return -lax.top_k(-jnp.where(others, jnp.sqrt(distances_sq), jnp.inf).T, count)[0].mean(1)

    return lax.map(of_image, batch)

  return mutual


def _check_enough(num_images, detector):
  """Raises ValueError for sets in which no other image would count, or of fewer than a neighbourhood."""
  if int(detector.share * (num_images - 1)) < 1:
    raise ValueError(
        f'MuSc scores an image by a share of {detector.share:g} of the others: expected at least '
        f'{math.ceil(1 / detector.share) + 1} images, got {num_images}.')
  if max(detector.neighborhoods, default=0) > num_images:
    raise ValueError(
        f'musc.neighborhoods={detector.neighborhoods}: expected at most {num_images}, the number of images.')
