"""Scores of the training images as if they were new: each against patches of the others."""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from patchcore_jax import disk_arrays, parallel, processes, scoring
from patchcore_jax.backbones import Backbone, FeatureMaps
from patchcore_jax.banks.model import Model
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import CrossScores, Data, Run, Statistics
from patchcore_jax.detectors.patchcore import fitting, one_pass, scores
from patchcore_jax.detectors.settings import PatchCore
from patchcore_jax.search import coreset, neighbors, search_bank
from patchcore_jax.settings import ScoringSpec, SearchSpec, check_number

_EMBEDDINGS = 'embeddings'


def fit_and_cross_score(
    detector: PatchCore, data: Data, backbones: Sequence[Backbone], run: Run, *, folds: int,
    search: SearchSpec) -> tuple[Model, CrossScores]:
  """Fits and cross-scores with one pass through the network (`Detector.fit_and_cross_score`).

  Each part is scored against a bank of the others, selected at the same ratio. No image meets a patch of its
  own. `run.progress` is also called with ('calibrate', done, number of images).

  Raises:
    ValueError: besides what `fit` raises: fewer than 2 images, or method 'kmeans', whose centres belong to no
      image.
  """
  if detector.coreset.method == 'kmeans':
    raise ValueError(
        f'folds={folds}, coreset.method={detector.coreset.method!r}: thresholds need a method that selects '
        "patches of images ('greedy', 'random' or 'identity').")
  if detector.coreset.method == 'merge_reduce':
    return one_pass.fit_and_cross_score(detector, data, backbones, run, folds=folds, search=search)
  return fitting.fit_and_use(
      detector, data, backbones, run, folds=folds,
      use=functools.partial(_cross_score, run, folds=folds, search=search))


def _cross_score(run, fit: 'fitting.Fit', *, folds, search):
  """Scores each part of the images against a bank selected from the others' patches."""
  num_images, joint = int(fit.images.sum()), len(fit.images) > 1
  check_number(num_images, folds)
  folds = min(folds, num_images)
  own = processes.own(fit.images)
  patches = len(fit.points) // (own.stop - own.start)
  fold_of_all = np.random.default_rng(run.seed).permutation(np.arange(num_images) % folds)
  fold_of = fold_of_all[own]
  found = CrossScores(*np.zeros((2, len(fold_of)), np.float32))
  select = _select_jointly if joint else _select
  if joint and fit.detector.coreset.method == 'greedy':  # to the host once, not for every fold
    fit = dataclasses.replace(fit, project=functools.partial(fitting.given, np.asarray(fit.project())))
  smallest = num_images - -(-num_images // folds)  # images in the smallest complement of a fold

  def score(stopped, fold):
    rows = select(fit, np.repeat(fold_of != fold, patches), smallest * patches, run.seed, stopped)
    scored = np.flatnonzero(fold_of == fold)
    if len(scored):  # of several processes, one may have none
      new = score_embeddings(
          fit.embeddings, rows, fit.image_size, images=scored, batch_size=fit.batch_size, grid=fit.grid,
          scoring_spec=fit.detector.scoring, search=search)
      for kept, values in zip(found, new, strict=True):
        kept[scored] = values

  for fold, _ in enumerate(parallel.in_threads(score, range(folds), fit.plan.folds_at_once)):
    run.progress('calibrate', int((fold_of_all <= fold).sum()), num_images)
  return CrossScores(*map(processes.joined, found)) if joint else found


def _select(fit, others, num_points, seed, stopped):
  """Selects a bank from some of the patches, of the size that `num_points` of them give.

  All folds so have one size, and one program; that of the whole bank serves them too.
  """
  if fit.detector.coreset.method != 'greedy':
    return _select_jointly(fit, others, num_points, seed, stopped)
  size = coreset.coreset_size(num_points, fit.detector.ratio)
  return fitting.rows_at(fit, fitting.greedy(
      fit, seed, size=size, valid=others, progress=lambda *_: stopped()))


def _select_jointly(fit, others, num_points, seed, stopped):
  """Selects a bank from some of the patches of each process, as if there were no more."""
  rows, project, size = np.flatnonzero(others), None, None
  if fit.detector.coreset.method == 'greedy':
    size = coreset.coreset_size(num_points, fit.detector.ratio)
    project = functools.partial(disk_arrays.read_rows, fit.project(), rows)
  part = dataclasses.replace(
      fit, points=fitting.Rows(fit.points, rows), counts=fitting.counts(len(rows), len(fit.images) > 1),
      project=project)
  return fitting.select(part, seed, lambda *_: stopped(), size=size)[0]


def score_embeddings(
    embeddings: np.ndarray,
    bank: np.ndarray,
    image_size: tuple[int, int],
    *,
    scoring_spec: ScoringSpec,
    grid: tuple[int, int] | None = None,
    images: np.ndarray | None = None,
    batch_size: int = 32,
    search: SearchSpec | None = None,
) -> CrossScores:
  """Scores images whose embeddings are at hand, as their pixels would be scored.

  Args:
    embeddings: [n, rows, columns, d], on the host or in one piece on the device.
    bank: [m, d] embeddings.
    image_size: (height, width) of the images.
    scoring_spec: how distances become scores.
    grid: (rows, columns) of the patches of an upright image, where turned ones lie below; None for all.
    images: positions of those that are scored; None for all.
    batch_size: a multiple of the number of local devices.
    search: how neighbours are found; no influence on the result.
  """
  images = np.arange(len(embeddings)) if images is None else images
  fn = streaming.maxima_fn(scores.only(scores.scores_of_embeddings(
      _embeddings_as_they_are, scoring_spec, (len(bank),))))
  prepared = search_bank.prepare(bank, (search or SearchSpec()).shortlist)
  found = []
  batches = _batches_of(embeddings, grid and grid[0], images, batch_size, tuple(image_size))
  for batch, values in streaming.stream(fn, parallel.replicate((None, prepared)), batches):
    found.append([x[batch.valid] for x in values])
  return CrossScores(*map(np.concatenate, zip(*found, strict=True)))


def _batches_of(embeddings, rows, images, batch_size, image_size):
  """Yields batches of embeddings [n, rows, columns, d] in the place of images."""
  for begin in range(0, len(images), batch_size):
    index = images[begin:begin + batch_size].astype(np.int32)
    missing = batch_size - len(index)
    values = embeddings[np.pad(index, (0, missing), mode='edge')][:, :rows]
    yield Batch(
        FeatureMaps({_EMBEDDINGS: values}, image_size), None,
        np.pad(index, (0, missing), constant_values=-1))


def _embeddings_as_they_are(variables, features):
  """Returns embeddings that are at hand, in the place of a function that computes them."""
  return features.maps[_EMBEDDINGS]


def statistics(
    detector: PatchCore, model: Model, data: Data, backbones: Sequence[Backbone], run: Run, *,
    search: SearchSpec) -> Statistics:
  """Measures how the patch scores of the training images spread (`Detector.statistics`).

  See `statistics_at`.
  """
  return statistics_at(detector, model, data, backbones, run, (detector.ratio,), search=search)[0]


def statistics_at(
    detector: PatchCore, model: Model, data: Data, backbones: Sequence[Backbone], run: Run,
    ratios: Sequence[float], *, search: SearchSpec) -> list[Statistics]:
  """Measures mean and standard deviation of the training images' patch scores against the others' patches.

  A training image's own patches are in the bank, or near to others that are: against the whole bank it would
  score too low, and 0 at ratio 1. So the images are parted in two halves, every other one, and the
  patches of each half are scored against those rows of the bank that come from the other. No patch
  meets one of its own image. Two things remain to be known: half a bank covers less than the whole, and
  it was selected while the other half's patches were there too; both make these scores somewhat higher
  than those of new good images. They do so for every member of an ensemble.

  Args:
    data: the images that the model was fitted on, in that order.
    ratios: coreset ratios; one pass serves all.
    run: its progress is called with ('statistics', done, total).

  Raises:
    BankError: images of another size.
    ValueError: other images than those of the fit, fewer patches in a half of the bank than neighbours
      asked for, or patches that all score the same.
  """
  detector = detector.resolved(backbones)
  (backbone,), spec = backbones, detector.scoring
  bank, num_images = model.arrays['embeddings'], model.description.num_images
  image = np.asarray(model.arrays['indices']) // (model.description.num_patches // num_images)
  even = image % 2 == 0
  sizes = [scores.bank_size(model, ratio) for ratio in ratios]
  half_sizes = tuple(tuple(int(half[:size].sum()) for size in sizes) for half in (even, ~even))
  if min(map(min, half_sizes)) < spec.num_neighbors:
    raise ValueError(
        f'The bank has {min(map(min, half_sizes))} patches of every other of the {num_images} training '
        f'images, and {spec.num_neighbors} neighbours are asked for. Use a larger bank.')
  halves = tuple(search_bank.prepare(bank[half], search.shortlist) for half in (even, ~even))
  fn = _halves_fn(scores.embed_fn_of(backbone, detector.embedding), spec, half_sizes)

  kept, done = [], 0
  for batch, values in streaming.stream(
      fn, parallel.replicate((backbone.variables, halves)), data.batches(),
      image_size=model.description.image_size):
    values = values[batch.valid]
    number = done + np.arange(len(values))
    kept.append(values[np.arange(len(values)), 1 - number % 2])  # those against the other half
    done += len(values)
    run.progress('statistics', done, num_images)
  if done != num_images:
    raise ValueError(
        f'{done} images were given, the bank was fitted on {num_images}. Give those, in that order.')
  found = np.concatenate(kept).swapaxes(0, 1).reshape(kept[0].shape[1], -1).astype(np.float64)
  return [Statistics(float(s.mean()), float(s.std())) for s in found]


@functools.lru_cache(maxsize=16)
def _halves_fn(embed_fn, spec, half_sizes):
  """Makes ((variables, the two halves of the bank), images) -> patch scores [b, 2, s, p]."""

  def score(parameters, images):
    variables, halves = parameters
    embeddings = embed_fn(variables, images)
    ignored = scoring.background(embeddings, spec)
    seen = 1 if ignored is None else ~ignored.reshape(len(images), -1)
    queries = embeddings.reshape(-1, embeddings.shape[-1])
    found = [
        [scoring.patch_scores(distances_sq, spec).reshape(len(images), -1) * seen
         for distances_sq, _ in neighbors.nested_nearest_neighbors(
             queries, half, sizes, k=spec.num_neighbors)]
        for half, sizes in zip(halves, half_sizes, strict=True)]
    return jnp.moveaxis(jnp.asarray(found), 2, 0)

  return score
