"""MahalanobisAD (Rippel et al., "Modeling the Distribution of Normal Data in Pre-Trained Deep Features
for Anomaly Detection", ICPR 2020): one Gaussian of the pooled features of each level. It makes no maps.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax

from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.settings import MahalanobisAD
from patchcore_jax.settings import SearchSpec


def fit(detector: MahalanobisAD, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Estimates the Gaussian of every level (the paper's section III).

  A level is one of the backbone's layers, averaged over its positions. The paper takes all levels of
  the network: for a ResNet set the layers to stem, layer1, layer2, layer3, layer4.

  Returns:
    A `Model` of, for each level of c channels,
      mean_<layer> [c] float32;
      factor_<layer> [c, c] float32, L^-1 of the covariance LL'.

  Raises:
    ValueError: fewer than two images, or a level that is equal for all images.
  """
  (backbone,), read = backbones, Recorder(data.batches(), run.keep_images)
  features, image_size = streaming.collect(
      streaming.pooled_fn(streaming.maps_of(backbone)), backbone.variables, read, len(data.examples), run)
  if len(features[0]) < 2:
    raise ValueError(f'MahalanobisAD needs two images or more for a covariance, got {len(features[0])}.')
  arrays = {}
  for layer, values in zip(backbone.layers, features):
    values = values.astype(np.float64)  # the directions of small variance are those that tell
    arrays[f'mean_{layer}'] = values.mean(axis=0).astype(np.float32)
    arrays[f'factor_{layer}'] = _factor(_covariance(values, detector), layer)
  return streaming.made(detector, (backbone,), arrays, data, read, run, image_size=image_size)


def score_fn(
    detector: MahalanobisAD, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`).

  The score is the sum over levels of the Mahalanobis distances (the paper's section III).
  """
  (backbone,) = backbones
  gaussians = [
      (model.arrays[f'mean_{layer}'], model.arrays[f'factor_{layer}']) for layer in backbone.layers]
  return ScoreFn(
      _score_fn(streaming.pooled_fn(streaming.maps_of(backbone))), (backbone.variables, gaussians))


def _covariance(values, detector):
  """Estimates the covariance of features [n, c], shrunk as the settings say."""
  # This takes a second to import, which scoring need not wait for.
  from sklearn.covariance import empirical_covariance, ledoit_wolf, shrunk_covariance

  if detector.shrinkage is None:
    return ledoit_wolf(values)[0]
  return shrunk_covariance(empirical_covariance(values), detector.shrinkage)


def _factor(covariance, layer):
  """Computes L^-1 of a covariance LL', or raises a ValueError that names the layer."""
  try:
    lower = np.linalg.cholesky(covariance)
  except np.linalg.LinAlgError as e:
    raise ValueError(
        f'The covariance of {layer} is singular: its pooled features are equal for all images. Leave '
        'the layer out, or give other images.') from e
  return scipy.linalg.solve_triangular(lower, np.eye(len(lower)), lower=True).astype(np.float32)


@functools.lru_cache(maxsize=16)
def _score_fn(pooled_fn):
  """Makes the function ((variables, [(mean, factor)]), images) -> `Scores`."""

  def score(parameters, images):
    variables, gaussians = parameters
    total = 0.0
    for values, (mean, factor) in zip(pooled_fn(variables, images), gaussians):
      whitened = jnp.dot(values - mean, factor.T, precision=lax.Precision.HIGHEST)
      total += jnp.sqrt(jnp.square(whitened).sum(axis=1))
    return Scores(total)

  return score
