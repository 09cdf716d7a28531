"""Makes a bank in one pass over the images, in memory that does not grow with their number.

The images are parted at random into `PARTS` parts. Of each part the patches come in blocks, which
`search.merge_reduce` reduces to as many patches as the bank has; the bank is selected from what is left of
all parts. A fold of the thresholds is a share of the parts: its images are scored, when they are read a
second time, against a bank that is selected from what is left of the other parts, so no image meets a patch
of its own.
"""

import datetime
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from patchcore_jax import disk_arrays, foreground, parallel
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import provenance
from patchcore_jax.banks.model import Model
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import cross_fitting, streaming
from patchcore_jax.detectors.base import CrossScores, Data, Run
from patchcore_jax.detectors.patchcore import fit_plan
from patchcore_jax.detectors.patchcore.scores import embed_fn_of
from patchcore_jax.detectors.settings import PatchCore
from patchcore_jax.search import coreset, merge_reduce
from patchcore_jax.settings import SearchSpec, check_number

PARTS = 10
_LONG = 10.0  # seconds that are worth an estimate
_SAMPLE = 16_384  # patches that are kept aside, to measure how far they are from the bank


def fit(detector: PatchCore, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Selects a memory bank in one pass (`Detector.fit`); the arrays are those of `fitting.fit`.

  Where no part has more patches than the bank, nothing is left out before the last selection: the bank is
  that of 'greedy'. `run.notify` is told the memory before the long work, and in the end the covering radius.

  Raises:
    ValueError: no images, a ratio that keeps no patch, too little memory, or several processes.
  """
  return _pass(detector, data, backbones, run)[0]


def fit_and_cross_score(
    detector: PatchCore, data: Data, backbones: Sequence[Backbone], run: Run, *, folds: int,
    search: SearchSpec) -> tuple[Model, CrossScores]:
  """Fits in one pass, and cross-scores in another (`Detector.fit_and_cross_score`).

  There are at most `PARTS` folds. The model is that of `fit`.
  """
  check_number(len(data.examples), folds)
  model, reducer, parts, part_of, read = _pass(detector, data, backbones, run, folds=folds)
  check_number(len(read), folds, len(data.examples))
  if len(parts) < 2:
    raise ValueError(f'The {len(read)} images that could be read are of one part: give more for thresholds.')
  patches, folds = math.prod(model.description.grid), min(folds, len(parts))
  detector = detector.of_size(patches * len(data.examples))
  fold_of_part = np.full(PARTS, -1)
  fold_of_part[list(parts)] = np.arange(len(parts)) % folds
  fold_of = fold_of_part[part_of[read]]
  image, maxima = np.zeros((2, len(read)), np.float32)
  for fold in range(folds):
    scored = np.flatnonzero(fold_of == fold)
    size = coreset.coreset_size(patches * (len(read) - len(scored)), detector.ratio)
    others = reducer.reduce([part for i, part in parts.items() if fold_of_part[i] != fold], size)
    bank = model._replace(arrays={'embeddings': others.values, 'indices': np.zeros(size, np.int32)})
    found = cross_fitting.score_maxima(
        detector, bank, data.part([read[i] for i in scored]), backbones, search)
    image[scored], maxima[scored] = found
    run.progress('calibrate', int((fold_of <= fold).sum()), len(read))
  return model, CrossScores(image, maxima)


def _pass(detector, data, backbones, run, *, folds=0):
  """Reads all images once.

  Returns:
    The model; what reduces further; the `merge_reduce.Part` that is left of each part that has images, by
    its number; the number of the part of each of the data's images; and the positions of those that could
    be read.
  """
  if run.several_processes:
    raise ValueError("coreset.method='merge_reduce' is not for several processes: use 'greedy'.")
  (backbone,), embedding, spec = backbones, detector.embedding, detector.coreset
  num_images = len(data.examples)
  part_of = np.random.default_rng(run.seed).permutation(np.arange(num_images) % PARTS)
  recorder = provenance.Recorder(_part_by_part(data, part_of), run.keep_images)
  first, batches = streaming.first_of(recorder)
  embed, variables = embed_fn_of(backbone, embedding), parallel.replicate(backbone.variables)
  *grid, dim = jax.eval_shape(embed, backbone.variables, first.image).shape[1:]
  patches = math.prod(grid)
  detector = detector.of_size(patches * num_images)
  size = coreset.coreset_size(patches * num_images, detector.ratio)
  points_dim = spec.projection_dim or coreset.johnson_lindenstrauss_dim(patches * num_images)
  per_block = fit_plan.images_in_block(num_images, patches, size, PARTS)
  device = jax.local_devices()[0]
  run.notify(str(fit_plan.one_pass(
      num_images, patches, size, dim, points_dim, parts=PARTS, folds=folds > 0, memory_gb=run.memory_gb,
      base_bytes=disk_arrays.resident_bytes(),
      batch_bytes=parallel.working_bytes(embed, variables, first.image) if device.platform == 'cpu' else 0,
      picture_bytes=len(provenance.encode(first.image[0])) if run.keep_images else 0)))
  projection_key, key = jax.random.split(jax.random.key(run.seed))
  foreground.announce(detector.scoring.foreground, run.notify)
  reducer = merge_reduce.Reducer(key, spec.num_start_points, spec.start == 'point')
  rng, sample, trees, parts, ends = np.random.default_rng(run.seed), [], {}, {}, []
  share = _SAMPLE / (patches * num_images)
  for part, positions, values in blocks(
      streaming.stream(embed, variables, batches), part_of, per_block, run.progress):
    if part not in trees:
      parts |= {i: tree.root() for i, tree in trees.items()}
      trees = {part: merge_reduce.Tree(size, reducer)}
    points = np.asarray(coreset.random_projection(
        values, points_dim, key=projection_key, kind=spec.projection))
    rows = (positions[:, None] * patches + np.arange(patches)).ravel()
    sample.append(points[rng.permutation(len(points))[:math.ceil(share * len(points))]])
    trees[part].add(merge_reduce.Part(points, rows, values))
    del values, points  # before the next block is there
    ends.append(time.monotonic())
    if len(ends) == 2:  # the first compiled
      _say_time(run, (num_images / len(positions) - 2) * (ends[1] - ends[0]), folds)
  parts |= {i: tree.root() for i, tree in trees.items()}
  if not parts:
    raise ValueError(streaming.NO_IMAGES)
  size = coreset.coreset_size(patches * len(recorder.index), detector.ratio)
  bank = reducer.reduce(list(parts.values()), size, functools.partial(run.progress, 'coreset'))
  sample = np.concatenate(sample)
  reached = merge_reduce.covering_radius(sample, bank.points)
  run.notify(
      f'covering radius {reached:.4g} of {len(sample)} patches drawn from all, at most {bank.bound:.4g} of '
      f'any, in the {points_dim} values in which they are selected')
  order = np.argsort(recorder.index)
  recorder.index = [recorder.index[i] for i in order]
  recorder.files = [recorder.files[i] for i in order] if recorder.files else []
  image = np.searchsorted(recorder.index, bank.rows // patches)
  arrays = {'embeddings': bank.values, 'indices': (image * patches + bank.rows % patches).astype(np.int32)}
  model = streaming.made(
      detector, backbones, arrays, data, recorder, run, image_size=first.image.shape[1:3], grid=tuple(grid))
  return model, reducer, parts, part_of, recorder.index


def _say_time(run, seconds, folds):
  """Says how long the pass takes from here, if that is long."""
  if seconds >= _LONG:
    run.notify(
        f'about {datetime.timedelta(seconds=round(seconds))} from here for this pass' +
        ('; the thresholds take another' if folds else ''))


def _part_by_part(data: Data, part_of: np.ndarray) -> Iterator[Batch]:
  """Yields the images of one part after another, with their positions in all of the data."""
  for part in range(PARTS):
    positions = np.flatnonzero(part_of == part)
    if len(positions):
      for batch in data.part(positions.tolist()).batches():
        yield batch._replace(index=np.where(batch.valid, positions[batch.index], -1).astype(np.int32))


def blocks(
    embedded: Iterable[tuple[Batch, np.ndarray]], part_of: np.ndarray, per_block: int,
    progress: Callable[[str, int, int], None]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Yields (part, positions [b], embeddings [b * patches, d]) of at most so many images of one part.

  Args:
    embedded: batches and their embeddings, as `streaming.stream` yields them.
    part_of: [n] int, the part of each image.
    per_block: b, of all blocks but the last of a part.
    progress: called with ('embed', done, n).
  """
  part, positions, block, done = None, [], None, 0

  def ready():
    return part, np.array(positions), block[:len(positions)].reshape(-1, block.shape[-1])

  for batch, values in embedded:
    for position, value in zip(batch.index[batch.valid], values[batch.valid], strict=True):
      if positions and (part_of[position] != part or len(positions) == per_block):
        yield ready()
        positions = []
      if not positions:
        block = None  # given up before there is another
        part = int(part_of[position])
        block = disk_arrays.allocate((per_block, *value.shape), on_disk=False, folder='')
      block[len(positions)] = value
      positions.append(int(position))
    done += int(batch.valid.sum())
    progress('embed', done, len(part_of))
  if positions:
    yield ready()
