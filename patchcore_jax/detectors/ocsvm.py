"""A one-class SVM (Schölkopf et al., "Estimating the Support of a High-Dimensional Distribution", Neural
Computation 13, 2001) of pooled pretrained features, the usual plain baseline. Image-level only.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from jax import lax
from sklearn.svm import OneClassSVM

from patchcore_jax import parallel
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import base
from patchcore_jax.detectors import model as models
from patchcore_jax.detectors.base import Prediction, Progress
from patchcore_jax.detectors.model import Model
from patchcore_jax.search.distances import distances_sq

# scikit-learn's 1e-3 stops so early that the last digit of a feature decides where.
_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Spec:
  """Settings of scikit-learn's `OneClassSVM` with its RBF kernel exp(-gamma |x - y|^2).

  Attributes:
    nu: largest share of training images outside the boundary, and smallest share of support vectors
      (the paper's nu-property), in (0, 1].
    gamma: of the kernel; 0 for 1 / (dimensions * variance of all values), scikit-learn's 'scale'.

  Raises:
    ValueError: values out of range.
  """

  nu: float = 0.1
  gamma: float = 0.0

  def __post_init__(self):
    if not 0 < self.nu <= 1:
      raise ValueError(f'ocsvm.nu={self.nu}: expected 0 < nu <= 1.')
    if not 0 <= self.gamma < math.inf:
      raise ValueError(f'ocsvm.gamma={self.gamma}: expected more than 0, or 0 to scale by the data.')


def describe(backbone: Backbone, spec: Spec) -> dict:
  """What a model must agree on with the network and the settings it is used with."""
  return models.describe('ocsvm', backbone, **dataclasses.asdict(spec))


def fit(
    backbone: Backbone,
    batches: Iterable[Batch],
    num_images: int,
    *,
    spec: Spec,
    progress: Progress | None = None,
) -> Model:
  """Fits the boundary of good images.

  The features of an image are the means over positions of each of the backbone's layers, joined.

  Args:
    backbone: frozen network.
    batches: good images of one size; the batch size is a multiple of the number of local devices.
    num_images: how many images the batches hold at most.
    spec: settings.
    progress: called with ('embed', done, num_images).

  Returns:
    A `Model` of, for v support vectors of c channels,
      support_vectors [v, c] float32;
      weights [v] float32, at most 1 each;
      gamma [] and offset [] float32, of the kernel and of the boundary.

  Raises:
    ValueError: no images.
  """
  features, image_size = models.collect(
      models.pooled_fn(base.maps_of(backbone)), backbone.variables, batches, num_images,
      progress=progress)
  values = np.concatenate(features, axis=1).astype(np.float64)
  # What 'scale' stands for; 1 where all values are equal, as in scikit-learn.
  gamma = spec.gamma or 1 / (values.shape[1] * values.var() or 1)
  svm = OneClassSVM(nu=spec.nu, gamma=gamma, tol=_TOLERANCE).fit(values)
  arrays = {
      'support_vectors': svm.support_vectors_, 'weights': svm.dual_coef_[0], 'gamma': gamma,
      'offset': svm.offset_[0]}
  return models.make(
      {name: np.asarray(array, np.float32) for name, array in arrays.items()},
      describe(backbone, spec), num_images=len(values), image_size=image_size)


def predict(
    backbone: Backbone,
    model: Model,
    batches: Iterable[Batch],
    *,
    spec: Spec,
) -> Iterator[Prediction]:
  """Scores images: minus scikit-learn's `decision_function`, above 0 outside the boundary.

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
  for batch, scores in base.stream(
      fn, parallel.replicate((backbone.variables, model.arrays)), batches, expected=model.description):
    yield Prediction(batch.index[batch.valid], scores[batch.valid][None], None)


@functools.lru_cache(maxsize=16)
def _predict_fn(pooled_fn):
  """((variables, the model's arrays), images) -> image scores [b]."""

  def score(parameters, images):
    variables, svm = parameters
    values = jnp.concatenate(pooled_fn(variables, images), axis=1)
    # By differences: an image is at 0 from itself, which |x|^2 + |y|^2 - 2xy would blur.
    kernel = jnp.exp(-svm['gamma'] * distances_sq(values[:, None], svm['support_vectors'], axis=-1))
    return svm['offset'] - jnp.dot(kernel, svm['weights'], precision=lax.Precision.HIGHEST)

  return score
