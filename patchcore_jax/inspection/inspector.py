"""A saved bank -> answers about images: what prediction, the service and the export have in common.

    inspector = load('banks/bottle')
    for prediction in predict(inspector, batches): ...      # many images
    score = scorer(inspector, batch_size=8)                 # images that come one by one

A bank says how images are to be prepared, embedded and scored, so nothing else is needed.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from patchcore_jax import backbones, parallel
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.banks.store import BankError, MemoryBank
from patchcore_jax.data import placement
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.data.preprocess import ImageError, Preprocessing
from patchcore_jax.detectors import base, patchcore
from patchcore_jax.detectors.base import Prediction
from patchcore_jax.embedding import EmbeddingSpec
from patchcore_jax.inspection import calibration, regions
from patchcore_jax.inspection.calibration import Calibration
from patchcore_jax.scoring import ScoringSpec
from patchcore_jax.search.neighbors import SearchSpec

SAMPLE = 32  # images that tell how far scores are off elsewhere


class Inspector(NamedTuple):
  """A bank with everything that is needed to use it.

  Attributes:
    calibration: None for a bank without thresholds.
  """

  backbone: Backbone
  bank: MemoryBank
  preprocessing: Preprocessing
  embedding: EmbeddingSpec
  scoring: ScoringSpec
  search: SearchSpec
  calibration: Calibration | None

  @property
  def image_size(self) -> tuple[int, int]:
    """(height, width) of the network's input."""
    return tuple(self.bank.description['image_size'])


class Finding(NamedTuple):
  """The answer for one image. Boxes and points are in pixels of the original file, turned upright.

  Attributes:
    score: larger is more anomalous; its unit is the bank's own.
    calibrated_score: 0 to 1, 0.5 at the threshold (`calibration.calibrated_score`); None without thresholds.
    p_value: of the hypothesis that the part is good (`calibration.p_value`); None without thresholds.
    anomalous: whether the score reaches the threshold; None without one.
    box: (left, top, right, bottom) of the most anomalous region, right and bottom exclusive.
    centroid: (x, y) of that region.
    anomaly_map: [h, w] float32 at the size of the network's input.
    patch: (row, column) of the most anomalous patch on the grid.
    nearest: the row of the bank that is nearest to it; `provenance.origin` tells where that comes from.
  """

  score: float
  calibrated_score: float | None
  p_value: float | None
  anomalous: bool | None
  box: tuple[int, int, int, int]
  centroid: tuple[float, float]
  anomaly_map: np.ndarray
  patch: tuple[int, int]
  nearest: int


def described(
    *, preprocessing: Preprocessing, scoring: ScoringSpec, source: Mapping[str, Any],
) -> dict[str, Any]:
  """What a bank's description needs, besides what `patchcore.fit` writes, for `load`.

  Args:
    source: 'name', 'weights' and 'seed', arguments of `backbones.create`.
  """
  return {
      'preprocess': geometry(preprocessing), 'scoring': dataclasses.asdict(scoring), 'source': dict(source),
      'device': jax.default_backend()}


def geometry(preprocessing: Preprocessing) -> dict[str, Any]:
  """The fields that change images, not those of masks, which are no concern of a bank's."""
  return {k: v for k, v in vars(preprocessing).items() if not k.startswith('mask_')}


def load(path: str | os.PathLike, *, name: str = '', weights: str = '') -> Inspector:
  """Restores a bank, and makes the network that it was made with.

  Args:
    path: of the bank.
    name, weights: of the backbone, where it is called otherwise or lies elsewhere on this machine; '' for
      what the bank says.

  Raises:
    BankError: no bank, a damaged one, one that does not say how it is to be used, or other weights than
      it was made with.
    ValueError: what `backbones.create` raises.
  """
  return of_bank(store.restore(path), name=name, weights=weights, path=path)


def of_bank(bank: MemoryBank, *, name: str = '', weights: str = '', path: Any = '') -> Inspector:
  """`load` of a bank at hand."""
  description = bank.description
  missing = [k for k in ('preprocess', 'scoring', 'source') if k not in description]
  if missing:
    raise BankError(
        f'The bank {path} does not say how it is to be used: {", ".join(missing)} missing from its '
        'description. It was made by an older version, or from Python; fit it again with experiments.fit.')
  made, source = description['backbone'], description['source']
  name, weights = name or source['name'], weights or ('' if name else source['weights'])
  backbone = backbones.create(
      name, weights=weights, layers=tuple(made['layers']), seed=source['seed'],
      # A factory's is its own affair; that it is the bank's is checked with all else when the two meet.
      precision=backbones.AUTO if ':' in name else made['precision'])
  found = base.describe(backbone)
  if found['weights'] != made['weights']:
    raise BankError(
        f'The bank {path} was made with the weights {made["weights"]} of {made["name"]}, and those of '
        f'{found["name"]} here are {found["weights"]}: expected the same. Pass the file that was used as '
        '--backbone_weights.')
  # The same values by another name are the same network.
  backbone = dataclasses.replace(backbone, name=made['name'])
  return Inspector(
      backbone, bank, Preprocessing(**{k: tuple(v) if isinstance(v, list) else v
                                       for k, v in description['preprocess'].items()}),
      EmbeddingSpec(**description['embedding']), ScoringSpec(**description['scoring']), SearchSpec(),
      calibration.from_json(description['calibration']) if description.get('calibration') else None)


def predict(inspector: Inspector, batches: Iterable[Batch]) -> Iterator[Prediction]:
  """`patchcore.predict` with the bank's settings, against the whole bank."""
  return patchcore.predict(
      inspector.backbone, inspector.bank, batches, embedding=inspector.embedding,
      scoring_spec=inspector.scoring, search=inspector.search)


def sample_of(bank: MemoryBank, scoring: ScoringSpec, seed: int = 0) -> tuple[np.ndarray, MemoryBank]:
  """Some of a bank's training images, and the bank without their patches: they are then as good as new to it.

  Args:
    scoring: what scores need patches for; where the others are too few for that, the bank stays whole.

  Returns:
    The positions of at most 32 images and of at most half of them, ascending, and a bank of the patches of
    the others.
  """
  n, patches = bank.description['num_images'], np.prod(bank.description['grid'])
  sample = np.sort(np.random.default_rng(seed).permutation(n)[:min(SAMPLE, n // 2)])
  others = ~np.isin(np.asarray(bank.indices) // patches, sample)
  if others.sum() < max(scoring.num_neighbors, scoring.support_neighbors):
    return sample, bank
  return sample, MemoryBank(
      np.asarray(bank.embeddings)[others], np.asarray(bank.indices)[others], bank.description)


def score_differences(
    backbone: Backbone, bank: MemoryBank, batches: Callable[[], Iterable[Batch]], *, embedding: EmbeddingSpec,
    scoring: ScoringSpec, search: SearchSpec | None = None) -> tuple[np.ndarray, np.ndarray]:
  """How far scores of good images are off where another kind of device computes the network.

  Args:
    backbone: with `elsewhere`; else nothing is computed.
    bank: without patches of these images.
    batches: makes the same batches of good images, twice.

  Returns:
    [n] of the images' scores, and [n] of the largest values of their maps; [0] each where nothing differs.
  """
  if backbone.elsewhere is None:
    return np.zeros(0, np.float32), np.zeros(0, np.float32)
  found = []
  for network in (backbone, backbones.computed_elsewhere(backbone)):
    predictions = list(patchcore.predict(
        network, bank, batches(), embedding=embedding, scoring_spec=scoring, search=search))
    scores = [p.image_scores[0] for p in predictions]
    maxima = [p.anomaly_maps[0].max(axis=(1, 2)) for p in predictions]
    found.append([np.concatenate([np.zeros(0, np.float32), *values]) for values in (scores, maxima)])
  return tuple(np.abs(there - here) for here, there in zip(*found))


def scorer(inspector: Inspector, *batch_sizes: int) -> Callable[[np.ndarray], Prediction]:
  """A function of images [n, h, w, 3] uint8 that returns when they are scored.

  It gives what `predict` gives. The network and the bank are put on the devices now.

  Args:
    batch_sizes: images are padded to the smallest of these that holds them, so that few of them do not wait
      for the time of many. Each is compiled when it is first needed.

  Raises:
    ImageError: (the function) images of another size than the bank's.
    ValueError: (the function) more images than the largest batch.
  """
  fn, parameters = patchcore.prediction(
      inspector.backbone, inspector.bank, embedding=inspector.embedding, scoring_spec=inspector.scoring,
      search=inspector.search)
  run = parallel.data_parallel(fn)
  sizes = sorted(map(parallel.divisible_batch_size, batch_sizes))

  def score(images: np.ndarray) -> Prediction:
    check_size(inspector, images.shape[1:3])
    n = len(images)
    if n > sizes[-1]:
      raise ValueError(f'{n} images for a scorer of batches of at most {sizes[-1]}.')
    padded = np.zeros((next(size for size in sizes if size >= n), *images.shape[1:]), np.uint8)
    padded[:n] = images
    results = parallel.gather(run(parameters, padded))
    return Prediction(np.arange(n, dtype=np.int32), *(r[:n].swapaxes(0, 1) for r in results))

  return score


def check_size(inspector: Inspector, size: tuple[int, int]) -> None:
  """ImageError if images of that (height, width), after preprocessing, are not what the bank was made of."""
  if tuple(size) != inspector.image_size:
    height, width = inspector.image_size
    raise ImageError(
        f'The image is {size[1]} x {size[0]} pixels after resizing and cropping, and the bank was made of '
        f'images of {width} x {height} (width x height). Give images of the shape that it was made of, or '
        'fit a bank with preprocess.crop or preprocess.pad, which make all shapes alike.')


def finding(
    inspector: Inspector, prediction: Prediction, i: int, original_size: tuple[int, int]) -> Finding:
  """The answer for image i of a prediction.

  Args:
    original_size: (height, width) of the image before preprocessing.
  """
  score, anomaly_map = float(prediction.image_scores[0, i]), prediction.anomaly_maps[0, i]
  c, columns = inspector.calibration, inspector.bank.description['grid'][1]
  region = regions.most_anomalous(anomaly_map, c.pixel_threshold if c else None)
  place = placement.placement(*original_size, inspector.preprocessing)
  return Finding(
      score,
      calibration.calibrated_score(c, score) if c else None,
      calibration.p_value(c, score) if c else None,
      score >= c.image_threshold if c else None,
      placement.box_to_original(region.box, place),
      placement.point_to_original(region.centroid, place),
      anomaly_map,
      divmod(int(prediction.patches[0, i]), columns),
      int(prediction.nearest[0, i]))
