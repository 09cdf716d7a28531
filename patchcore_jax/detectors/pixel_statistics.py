"""Plain numbers of the pixels of an image, without any training, beside which methods are read.

Where one of them parts good images from defective ones, a method may do no more than measure brightness.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.settings import PixelStatistics
from patchcore_jax.learned import transforms
from patchcore_jax.settings import SearchSpec


def fit(detector: PixelStatistics, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Keeps the gray values of good images (`Detector.fit`).

  Returns:
    A `Model` of the array gray [n, h, w] float32, enough for every statistic.
  """
  read = Recorder(data.batches(), run.keep_images)
  (gray,), size = streaming.collect(
      _gray_fn(detector.size, detector.standardise), (), read, len(data.examples), run)
  return streaming.made(detector, (), {'gray': gray}, data, read, run, image_size=size)


def score_fn(
    detector: PixelStatistics, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`), with what its statistic needs of the good images."""
  gray = model.arrays['gray']
  mean = gray.mean(axis=0, dtype=np.float64).astype(np.float32)
  parameters = {
      'brightness_distance': (mean.mean(dtype=np.float64).astype(np.float32),), 'mean_image': (mean,),
      'nearest_image': (mean, gray)}
  return ScoreFn(_score_fn(detector), parameters.get(detector.statistic, ()))


@functools.lru_cache(maxsize=16)
def _gray_fn(size, standardise):
  """Makes the function that takes the mean of the three channels, [b, h, w], in [0, 1] or standardised."""

  def gray(parameters, images):
    x = transforms.scaled(transforms.squared(images, size) if size else images).mean(axis=-1)
    if standardise:
      x = x - x.mean(axis=(1, 2), keepdims=True)
      x = x / (jnp.sqrt(jnp.square(x).mean(axis=(1, 2), keepdims=True)) + 1e-6)
    return (x,)

  return gray


@functools.lru_cache(maxsize=16)
def _score_fn(detector):
  """Makes the function (parameters, images) -> `Scores`."""
  gray, statistic = _gray_fn(detector.size, detector.standardise), STATISTICS[detector.statistic]
  return lambda parameters, images: Scores(statistic(gray((), images)[0], *parameters))


def _brightness(x):
  return x.mean(axis=(1, 2))


def _deviation(x):
  return jnp.sqrt(jnp.square(x - _brightness(x)[:, None, None]).mean(axis=(1, 2)))


def _half_norm(x):
  return 0.5 * jnp.square(2 * x - 1).sum(axis=(1, 2))


def _brightness_distance(x, mean):
  return jnp.abs(_brightness(x) - mean)


def _mean_image(x, mean):
  return jnp.square(x - mean).sum(axis=(1, 2))


def _nearest_image(x, mean, gray):
  """Computes squared distances to the nearest; about the mean, so that no large numbers cancel."""
  x, gray = ((images - mean).reshape(len(images), -1) for images in (x, gray))
  products = jnp.matmul(x, gray.T, precision=lax.Precision.HIGHEST)
  norms = jnp.square(x).sum(axis=1, keepdims=True), jnp.square(gray).sum(axis=1)
  return jnp.maximum(norms[0] + norms[1] - 2 * products, 0).min(axis=1)


STATISTICS = {
    'brightness': _brightness, 'deviation': _deviation, 'half_norm': _half_norm,
    'brightness_distance': _brightness_distance, 'mean_image': _mean_image, 'nearest_image': _nearest_image}
