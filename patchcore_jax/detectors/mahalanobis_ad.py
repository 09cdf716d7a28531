"""MahalanobisAD (Rippel et al., "Modeling the Distribution of Normal Data in Pre-Trained Deep Features
for Anomaly Detection", ICPR 2020): one Gaussian of the pooled features of each level. Image-level only.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from sklearn.covariance import empirical_covariance, ledoit_wolf, shrunk_covariance

from patchcore_jax import parallel
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import base
from patchcore_jax.detectors import model as models
from patchcore_jax.detectors.base import Prediction, Progress
from patchcore_jax.detectors.model import Model


@dataclasses.dataclass(frozen=True)
class Spec:
  """Settings.

  Attributes:
    shrinkage: None, as in the paper, for the share that Ledoit and Wolf (2004) estimate for each
      level; else a share in (0, 1]. The covariance is (1 - share) S + share trace(S) / d I, where S is
      the empirical one.

  Raises:
    ValueError: a value out of range.
  """

  shrinkage: float | None = None

  def __post_init__(self):
    if self.shrinkage is not None and not 0 < self.shrinkage <= 1:
      raise ValueError(
          f'mahalanobis_ad.shrinkage={self.shrinkage}: expected None (Ledoit and Wolf) or '
          '0 < shrinkage <= 1.')


def describe(backbone: Backbone, spec: Spec) -> dict:
  """What a model must agree on with the network and the settings it is used with."""
  return models.describe('mahalanobis_ad', backbone, **dataclasses.asdict(spec))


def fit(
    backbone: Backbone,
    batches: Iterable[Batch],
    num_images: int,
    *,
    spec: Spec,
    progress: Progress | None = None,
) -> Model:
  """Estimates the Gaussian of every level (the paper's section III).

  A level is one of the backbone's layers, averaged over its positions. The paper takes all levels of
  the network: for a ResNet set the layers to stem, layer1, layer2, layer3, layer4.

  Args:
    backbone: frozen network.
    batches: good images of one size; the batch size is a multiple of the number of local devices.
    num_images: how many images the batches hold at most.
    spec: settings.
    progress: called with ('embed', done, num_images).

  Returns:
    A `Model` of, for each level of c channels,
      mean_<layer> [c] float32;
      factor_<layer> [c, c] float32, L^-1 of the covariance LL'.

  Raises:
    ValueError: fewer than two images, or a level that is equal for all images.
  """
  features, image_size = models.collect(
      models.pooled_fn(base.maps_of(backbone)), backbone.variables, batches, num_images,
      progress=progress)
  if len(features[0]) < 2:
    raise ValueError(f'MahalanobisAD needs two images or more for a covariance, got {len(features[0])}.')
  arrays = {}
  for layer, values in zip(backbone.layers, features):
    values = values.astype(np.float64)  # the directions of small variance are those that tell
    arrays[f'mean_{layer}'] = values.mean(axis=0).astype(np.float32)
    arrays[f'factor_{layer}'] = _factor(_covariance(values, spec), layer)
  return models.make(
      arrays, describe(backbone, spec), num_images=len(features[0]), image_size=image_size)


def predict(
    backbone: Backbone,
    model: Model,
    batches: Iterable[Batch],
    *,
    spec: Spec,
) -> Iterator[Prediction]:
  """Scores images: the sum over levels of the Mahalanobis distances (the paper's section III).

  Args:
    backbone, spec: as in `fit`.
    model: from `fit`.
    batches: images of one size; the batch size is a multiple of the number of local devices.

  Yields:
    A `Prediction` for every batch, with s = 1 and no anomaly maps (None).

  Raises:
    BankError: the model was made with another detector, network, setting or image size.
  """
  store.check(model.description, describe(backbone, spec))
  fn = _predict_fn(models.pooled_fn(base.maps_of(backbone)))
  gaussians = [
      (model.arrays[f'mean_{layer}'], model.arrays[f'factor_{layer}']) for layer in backbone.layers]
  for batch, scores in base.stream(
      fn, parallel.replicate((backbone.variables, gaussians)), batches, expected=model.description):
    yield Prediction(batch.index[batch.valid], scores[batch.valid][None], None)


def _covariance(values, spec):
  if spec.shrinkage is None:
    return ledoit_wolf(values)[0]
  return shrunk_covariance(empirical_covariance(values), spec.shrinkage)


def _factor(covariance, layer):
  try:
    lower = np.linalg.cholesky(covariance)
  except np.linalg.LinAlgError as e:
    raise ValueError(
        f'The covariance of {layer} is singular: its pooled features are equal for all images. Leave '
        'the layer out, or give other images.') from e
  return scipy.linalg.solve_triangular(lower, np.eye(len(lower)), lower=True).astype(np.float32)


@functools.lru_cache(maxsize=16)
def _predict_fn(pooled_fn):
  """((variables, [(mean, factor)]), images) -> image scores [b]."""

  def score(parameters, images):
    variables, gaussians = parameters
    total = 0.0
    for values, (mean, factor) in zip(pooled_fn(variables, images), gaussians):
      whitened = jnp.dot(values - mean, factor.T, precision=lax.Precision.HIGHEST)
      total += jnp.sqrt(jnp.square(whitened).sum(axis=1))
    return total

  return score
