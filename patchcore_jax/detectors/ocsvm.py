"""A one-class SVM (Schölkopf et al., "Estimating the Support of a High-Dimensional Distribution", Neural
Computation 13, 2001) of pooled pretrained features, the usual plain baseline. It makes no maps.
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
from patchcore_jax.detectors.settings import OCSVM
from patchcore_jax.search.distances import distances_sq
from patchcore_jax.settings import SearchSpec

# scikit-learn's 1e-3 stops so early that the last digit of a feature decides where.
_TOLERANCE = 1e-5


def fit(detector: OCSVM, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Fits the boundary of good images.

  The features of an image are the means over positions of each of the backbone's layers, joined.

  Returns:
    A `Model` of, for v support vectors of c channels,
      support_vectors [v, c] float32;
      weights [v] float32, at most 1 each;
      gamma [] and offset [] float32, of the kernel and of the boundary.

  Raises:
    ValueError: no images.
  """
  from sklearn.svm import OneClassSVM  # a second to import, which scoring need not wait for

  (backbone,), read = backbones, Recorder(data.batches(), run.keep_images)
  features, image_size = streaming.collect(
      streaming.pooled_fn(streaming.maps_of(backbone)), backbone.variables, read, len(data.examples), run)
  values = np.concatenate(features, axis=1).astype(np.float64)
  # This is scikit-learn's 'scale'; as there, 1 stands in for a variance of 0.
  gamma = detector.gamma or 1 / (values.shape[1] * values.var() or 1)
  svm = OneClassSVM(nu=detector.nu, gamma=gamma, tol=_TOLERANCE).fit(values)
  arrays = {
      'support_vectors': svm.support_vectors_, 'weights': svm.dual_coef_[0], 'gamma': gamma,
      'offset': svm.offset_[0]}
  return streaming.made(
      detector, (backbone,), {name: np.asarray(array, np.float32) for name, array in arrays.items()},
      data, read, run, image_size=image_size)


def score_fn(
    detector: OCSVM, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`).

  The score is minus scikit-learn's `decision_function`: it is above 0 outside the boundary.
  """
  (backbone,) = backbones
  svm = {name: model.arrays[name] for name in ('support_vectors', 'weights', 'gamma', 'offset')}
  return ScoreFn(_score_fn(streaming.pooled_fn(streaming.maps_of(backbone))), (backbone.variables, svm))


@functools.lru_cache(maxsize=16)
def _score_fn(pooled_fn):
  """Makes the function ((variables, the model's arrays), images) -> `Scores`."""

  def score(parameters, images):
    variables, svm = parameters
    values = jnp.concatenate(pooled_fn(variables, images), axis=1)
    # Differences put an image at 0 from itself, which |x|^2 + |y|^2 - 2xy would blur.
    kernel = jnp.exp(-svm['gamma'] * distances_sq(values[:, None], svm['support_vectors'], axis=-1))
    return Scores(svm['offset'] - jnp.dot(kernel, svm['weights'], precision=lax.Precision.HIGHEST))

  return score
