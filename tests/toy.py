"""A method of one's own, and all that it takes: one record in one file.

    DETECTORS['toy'] = 'tests.toy:Toy'
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp

from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import Detector, Run, ScoreFn, Scores, streaming
from patchcore_jax.detectors.base import LIVE


@dataclasses.dataclass(frozen=True)
class Toy(Detector):
  """Keeps the mean of the good images; a pixel scores its squared distance to it. There is no network.

  Attributes:
    range: the value that stands for white.
    weight: of all scores.
  """

  name: ClassVar[str] = 'toy'
  title: ClassVar[str] = 'Toy'
  only_scoring: ClassVar[tuple[str, ...]] = ('weight',)

  range: float = 1.0
  weight: float = 1.0

  def fit(self, data, backbones, run=None):
    run = run or Run()
    read = Recorder(data.batches(), run.keep_images)
    (images,), size = streaming.collect(_pixels_fn(self.range), (), read, len(data.examples), run)
    return streaming.made(self, (), {'mean': images.mean(axis=0)}, data, read, run, image_size=size)

  def score_fn(self, model, backbones, *, search=None, program=LIVE):
    streaming.check(self, model, backbones)
    return ScoreFn(_score_fn(self), (model.arrays['mean'],))


@functools.lru_cache
def _pixels_fn(white):
  return lambda parameters, images: (images * jnp.float32(white / 255),)


@functools.lru_cache
def _score_fn(toy):

  def score(parameters, images):
    (mean,), (pixels,) = parameters, _pixels_fn(toy.range)((), images)
    maps = toy.weight * jnp.square(pixels - mean).sum(axis=-1)
    return Scores(maps.max(axis=(1, 2)), maps)

  return score
