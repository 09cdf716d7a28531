"""Scores images against a bank, by one pure function from pixels to scores and maps."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax import parallel, rotation, scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import LIVE, LOOP_FREE, ScoreFn, Scores
from patchcore_jax.detectors.settings import PatchCore
from patchcore_jax.embedding import patch_embeddings
from patchcore_jax.search import coreset, neighbors, search_bank
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, ScoringSpec, SearchSpec


def score_fn(
    detector: PatchCore, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`).

  Its parameters are the network's variables and the bank, made ready for the search.

  Raises:
    ValueError: more neighbours than patches.
  """
  several = _score_fn(detector, model, backbones, (len(model.arrays['embeddings']),), search, program)
  return ScoreFn(only(several.fn), several.parameters, several.sharded)


def score_fn_at(
    detector: PatchCore, model: Model, backbones: Sequence[Backbone], ratios: Sequence[float], *,
    search: SearchSpec | None = None) -> ScoreFn:
  """Makes the function that scores images at several coreset ratios in one pass.

  A bank is in the order of its selection, so its first rows are the bank of a smaller ratio: all of them
  together cost what the largest alone costs.

  Args:
    detector, model, backbones, search: see `Detector.score_fn`.
    ratios: in any order, none larger than the model's.

  Returns:
    A `ScoreFn` whose function returns a tuple, the `Scores` of each ratio.

  Raises:
    BankError: the model was made with other settings or networks.
    ValueError: a ratio larger than the model's, or more neighbours than patches.
  """
  streaming.check(detector, model, backbones)
  detector = detector.resolved(backbones)
  sizes = tuple(bank_size(model, ratio) for ratio in ratios)
  return _score_fn(detector, model, backbones, sizes, search or SearchSpec(), LIVE)


def bank_size(model: Model, ratio: float) -> int:
  """Counts the patches that the bank of a ratio holds.

  Raises:
    ValueError: a ratio larger than the bank was selected with, or a smaller one where the first rows of the
      bank are not the bank of that.
  """
  size, held = coreset.coreset_size(model.description.num_candidates, ratio), len(model.arrays['embeddings'])
  if size > held:
    raise ValueError(
        f'The bank holds {held} patches, ratio {ratio} needs {size}. Fit it with a larger ratio.')
  known = model.description.settings
  method = known['coreset']['method']
  if ratio < known['ratio'] and not CoresetSpec(method).nested:
    raise ValueError(
        f"Ratio {ratio} of a bank of {known['ratio']}: coreset.method='{method}' makes another bank for "
        'every ratio. Fit one, or shrink this one (patchcore bank shrink).')
  return size


def embed_fn_of(backbone: Backbone, embedding: EmbeddingSpec) -> Callable:
  """Makes the function (variables, images [b, h, w, 3] uint8) -> embeddings [b, rows, columns, d].

  It is the same object for the same arguments, so that it is compiled once.
  """
  return _embed_fn(streaming.maps_of(backbone), embedding)


@dataclasses.dataclass(frozen=True)
class References:
  """How the patches of training images are embedded: upright, and then, below each other, turned.

  Attributes:
    fn: (parameters, images) -> embeddings [b, angles * rows, columns, d]; one object for the same settings.
    parameters: those of `fn`, a pytree.
    shape: [angles * rows, columns, d].
    grid: (rows, columns) of an upright image.
    cells: see `upright_cells`.
  """

  fn: Callable
  parameters: Any
  shape: tuple[int, int, int]
  grid: tuple[int, int]
  cells: np.ndarray | None = None


def references(backbone: Backbone, embedding: EmbeddingSpec, images: Any) -> References:
  """Says how images like these, [b, h, w, 3] uint8 or features of such, are embedded for a bank."""
  fn = embed_fn_of(backbone, embedding)
  *grid, dim = jax.eval_shape(fn, backbone.variables, images).shape[1:]
  parameters, size = backbone.variables, images.shape[1:3]
  if embedding.rotations > 1:
    fn = _one_below_the_other(rotation.embed_turned(fn))
    parameters = (parameters, *rotation.tables_of_angles(size, embedding.rotations))
  return References(
      fn, parameters, (embedding.rotations * grid[0], grid[1], dim), tuple(grid),
      upright_cells(embedding, size, tuple(grid)))


def upright_cells(
    embedding: EmbeddingSpec, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray | None:
  """Finds the patch of the upright image that each patch of an image at all angles shows.

  Args:
    size: (height, width) of images.
    grid: (rows, columns) of the patches of an upright one.

  Returns:
    [angles * rows * columns] int; None where images are not turned.
  """
  if embedding.rotations == 1:
    return None
  return rotation.upright_patches(*rotation.tables_of_angles(size, embedding.rotations), size, grid).ravel()


@functools.lru_cache(maxsize=16)
def _one_below_the_other(fn):
  """Makes embeddings [b, angles, rows, columns, d] those of one high image each."""

  def below(parameters, images):
    found = fn(parameters, images)
    return found.reshape(len(found), -1, *found.shape[3:])

  return below


@functools.lru_cache(maxsize=16)
def _embed_fn(maps_fn, embedding):
  """Makes the function of `embed_fn_of`, once for the same arguments."""

  def embed(variables, images):
    return patch_embeddings(maps_fn(variables, images), embedding)

  return embed


def _score_fn(detector, model, backbones, sizes, search, program):
  """Makes the `ScoreFn` that scores against the bank's first rows, one result for each of `sizes`."""
  (backbone,) = backbones
  return against_bank(
      embed_fn_of(backbone, detector.embedding), backbone.variables, model.arrays['embeddings'],
      detector.scoring, sizes, search, program)


def against_bank(
    embed: Callable, variables: Any, bank: np.ndarray, spec: ScoringSpec, sizes: tuple[int, ...],
    search: SearchSpec, program: str, *, weights: np.ndarray | None = None) -> ScoreFn:
  """Makes the function that scores embeddings against a bank, with its parameters.

  Args:
    embed: (variables, images) -> [b, rows, columns, d]; the same object for the same settings.
    variables: those of `embed`, a pytree.
    bank: [m, d] float32.
    spec: how distances become scores.
    sizes: numbers of leading rows of the bank; the function returns a tuple, the `Scores` of each.
    search, program: see `Detector.score_fn`.
    weights: [m] float32, by which the score of a patch is multiplied whose nearest row it is; None for none.

  Raises:
    ValueError: more neighbours than patches.
  """
  devices = jax.local_device_count()
  sharded = search.bank == 'sharded' and devices > 1 and program == LIVE
  fn = scores_of_embeddings(embed, spec, sizes, parallel.AXIS if sharded else None, program == LIVE)
  if program == LOOP_FREE:
    prepared = search_bank.in_one_pass(bank)
  else:
    prepared = search_bank.prepare(bank, search.shortlist, num_shards=devices if sharded else None)
  if weights is None:
    return ScoreFn(fn, (variables, prepared), (False, sharded))
  return ScoreFn(fn, (variables, prepared, weights), (False, sharded, False))


@functools.lru_cache(maxsize=16)
def only(fn: Callable) -> Callable:
  """Makes a function that returns a tuple with one member return the member."""

  def score(parameters, images):
    (scores,) = fn(parameters, images)
    return scores

  return score


@functools.lru_cache(maxsize=16)
def scores_of_embeddings(
    embed: Callable, spec: ScoringSpec, sizes: tuple[int, ...], axis_name: str | None = None,
    kernels: bool = True) -> Callable:
  """Makes ((variables, bank), images) -> `Scores` for each of some numbers of leading rows.

  The weights of `against_bank` are a third parameter, where there are some.

  Args:
    embed: (variables, images) -> [b, rows, columns, d].
    spec: how distances become scores.
    sizes: numbers of rows.
    axis_name, kernels: see `neighbors.nested_nearest_neighbors`.
  """

  def score(parameters, images):
    variables, bank, *weights = parameters
    embeddings = embed(variables, images)
    b, rows, columns, dim = embeddings.shape
    found = neighbors.nested_nearest_neighbors(
        embeddings.reshape(-1, dim), bank, sizes, k=spec.num_neighbors, axis_name=axis_name,
        kernels=kernels)
    ignored, why, results = scoring.background(embeddings, spec), {}, []
    if ignored is not None:
      why['background_share'] = ignored.mean((1, 2))
      found = [(jnp.where(ignored.reshape(-1, 1), 0, d), i) for d, i in found]
    for size, (distances_sq, indices) in zip(sizes, found, strict=True):
      patches = scoring.patch_scores(distances_sq, spec)
      if weights:
        patches *= weights[0][indices[:, 0]]
      patches = patches.reshape(b, rows, columns)
      if spec.image_score == 'max':
        image_scores = scoring.image_scores(patches)
      elif spec.image_score == 'top_share':
        image_scores = scoring.top_share_scores(patches, spec.top_share)
      else:
        image_scores = scoring.reweighted_image_scores(
            embeddings.reshape(b, -1, dim), distances_sq.reshape(b, -1, spec.num_neighbors),
            indices.reshape(b, -1, spec.num_neighbors), bank, spec, size=size,
            axis_name=axis_name, kernels=kernels)
      worst = jnp.argmax(patches.reshape(b, -1), axis=1).astype(jnp.int32)
      nearest = jnp.take_along_axis(
          indices[:, 0].reshape(b, -1), worst[:, None], axis=1)[:, 0].astype(jnp.int32)
      results.append(Scores(
          image_scores, scoring.anomaly_maps(patches, images.shape[1:3], spec),
          {'patch': worst, 'nearest': nearest, **why}))
    return tuple(results)

  return score
