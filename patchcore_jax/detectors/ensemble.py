"""Ensembles of PatchCore banks, as of several backbones (table S1 to S3 of the paper's supplement).

Members differ in the unit of their scores. The paper's released code brings them to a common one by the
smallest and the largest score of the test set, so that the score of an image depends on the others
tested. Here each is normalised by statistics of the training images alone, before anything is tested.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from patchcore_jax import parallel, scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.banks.store import MemoryBank
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import base, patchcore
from patchcore_jax.detectors.base import Prediction, Progress
from patchcore_jax.embedding import EmbeddingSpec
from patchcore_jax.scoring import ScoringSpec
from patchcore_jax.search import neighbors
from patchcore_jax.search.neighbors import SearchSpec


class Statistics(NamedTuple):
  """Of the patch scores of good images; float64.

  Attributes:
    mean, std: [s], for each of s bank sizes.
  """

  mean: np.ndarray
  std: np.ndarray


def statistics(
    backbone: Backbone,
    bank: MemoryBank,
    batches: Iterable[Batch],
    *,
    embedding: EmbeddingSpec,
    scoring_spec: ScoringSpec,
    search: SearchSpec | None = None,
    sizes: tuple[int, ...] = (),
    progress: Progress | None = None,
) -> Statistics:
  """Mean and standard deviation of patch scores of the training images, each against the others' patches.

  A training image's own patches are in the bank, or near to what is: against the whole bank it would
  score too low, and 0 at ratio 1. So the images are parted in two halves, every other one, and the
  patches of each half are scored against those rows of the bank that come from the other. No patch
  meets one of its own image. Two things remain to be known: half a bank covers less than the whole, and
  it was selected while the other half's patches were there too; both make these scores somewhat higher
  than those of new good images. They do so for every member.

  Args:
    backbone, bank, embedding, scoring_spec, search, sizes: as in `patchcore.predict`; the bank is on
      every device.
    batches: the images that the bank was fitted on, in that order.
    progress: called with ('statistics', done, total).

  Raises:
    BankError: the bank was made with another network, embedding or image size.
    ValueError: other images than those of the fit, fewer patches in a half of the bank than neighbours
      asked for, or patches that all score the same.
  """
  store.check(bank.description, patchcore.describe(backbone, embedding))
  num_images = bank.description['num_images']
  image = np.asarray(bank.indices) // (bank.description['num_patches'] // num_images)
  even = image % 2 == 0
  half_sizes = tuple(
      tuple(int(half[:size].sum()) for size in sizes or (len(even),)) for half in (even, ~even))
  if min(map(min, half_sizes)) < scoring_spec.num_neighbors:
    raise ValueError(
        f'The bank has {min(map(min, half_sizes))} patches of every other of the {num_images} training '
        f'images, and {scoring_spec.num_neighbors} neighbours are asked for. Use a larger bank.')
  shortlist = (search or SearchSpec()).shortlist
  halves = tuple(neighbors.prepare(bank.embeddings[half], shortlist) for half in (even, ~even))
  fn = _scores_fn(patchcore._embed_fn_of(backbone, embedding), scoring_spec, half_sizes)

  kept, done = [], 0
  for batch, scores in base.stream(
      fn, parallel.replicate((backbone.variables, halves)), batches, expected=bank.description):
    scores = scores[batch.valid]
    number = done + np.arange(len(scores))
    kept.append(scores[np.arange(len(scores)), 1 - number % 2])  # those against the other half
    done += len(scores)
    if progress:
      progress('statistics', done, num_images)
  if done != num_images:
    raise ValueError(
        f'{done} images were given, the bank was fitted on {num_images}. Give those, in that order.')
  scores = np.concatenate(kept).swapaxes(0, 1).reshape(kept[0].shape[1], -1).astype(np.float64)
  found = Statistics(scores.mean(axis=1), scores.std(axis=1))
  if not (found.std > 0).all():
    raise ValueError('All patches of the training images score the same: scores have no scale.')
  return found


def combine(
    members: Sequence[Iterable[Prediction]], statistics: Sequence[Statistics]
) -> Iterator[Prediction]:
  """The mean over members of their normalised scores and maps, (score - mean) / std.

  Only `std` decides how members weigh against each other: `mean` adds the same to all images.

  Args:
    members: from `patchcore.predict`, of the same images in the same batches, at one size.
    statistics: of each member.

  Yields:
    A `Prediction` for every batch; 0 is the mean patch of a good image, 1 a standard deviation.

  Raises:
    ValueError: members of other images, sizes of map or numbers of banks.
  """
  if not members or len(members) != len(statistics):
    raise ValueError(f'Expected statistics for each member, got {len(statistics)} for {len(members)}.')
  for parts in itertools.zip_longest(*members):
    if any(p is None or not np.array_equal(p.index, parts[0].index) for p in parts):
      raise ValueError('The members of an ensemble must be given the same images in the same batches.')
    shapes = {p.anomaly_maps.shape for p in parts}
    if len(shapes) > 1 or any(s.mean.shape != parts[0].image_scores.shape[:1] for s in statistics):
      raise ValueError(
          f'The members of an ensemble differ: maps [banks, images, height, width] of {sorted(shapes)}, '
          f'statistics of {[len(s.mean) for s in statistics]} banks. Use one image size, and the same '
          'number of banks.')
    yield Prediction(
        parts[0].index,
        _mean([p.image_scores for p in parts], statistics),
        _mean([p.anomaly_maps for p in parts], statistics))


def _mean(values, statistics):
  def normalized(x, s):
    mean, std = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in s)
    return ((x - mean) / std).astype(np.float32)

  return sum(map(normalized, values, statistics)) / np.float32(len(values))


@functools.lru_cache(maxsize=16)
def _scores_fn(embed_fn, spec, half_sizes):
  """((variables, the two halves of the bank), images) -> patch scores [b, 2, s, p]."""

  def score(parameters, images):
    variables, halves = parameters
    embeddings = embed_fn(variables, images)
    queries = embeddings.reshape(-1, embeddings.shape[-1])
    scores = [
        [scoring.patch_scores(distances_sq, spec).reshape(len(images), -1)
         for distances_sq, _ in neighbors.nested_nearest_neighbors(
             queries, half, sizes, k=spec.num_neighbors)]
        for half, sizes in zip(halves, half_sizes)]
    return jnp.moveaxis(jnp.asarray(scores), 2, 0)

  return score
