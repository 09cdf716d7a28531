"""DifferNet (Rudolph, Wandt and Rosenhahn, "Same Same But DifferNet: Semi-Supervised Defect Detection with
Normalizing Flows", WACV 2021; arXiv 2008.12577), on the pooled features of any network.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, computed, descent
from patchcore_jax.detectors.trained_settings import DifferNet
from patchcore_jax.learned import flow, starts, transforms

SCALES = 1, 2, 4  # by which images get smaller, as in the paper
_LEAST_SHARE = 0.01  # of the mean deviation of features, added to each: some hardly ever vary


def even_angles(count: int) -> np.ndarray:
  """Lists angles that part the circle evenly, in radians: [count] float32.

  >>> np.rad2deg(even_angles(4)).round().tolist()
  [0.0, 90.0, 180.0, 270.0]
  """
  return (2 * np.pi * np.arange(count) / count).astype(np.float32)


@functools.lru_cache(maxsize=16)
def features_fn(maps: Callable, standardise: bool) -> Callable:
  """Makes (network, (images [b, s, s, 3] uint8, angles [b])) -> pooled features of all scales, [b, d].

  Args:
    maps: what `streaming.maps_of` made.
    standardise: see `Trained`.
  """
  pooled = streaming.pooled_fn(maps)

  def features(network, turning):
    images, angles = turning
    if standardise:
      images = jnp.round(255 * transforms.scaled(images, True)).astype(jnp.uint8)
    turned = transforms.rotated(images, angles, order=0, mode='constant')
    found = []
    for scale in SCALES:
      # XLA for GPUs (JAX 0.10 and 0.11) ends the process where it joins a slice with steps and a product.
      found += pooled(network, lax.optimization_barrier(turned[:, ::scale, ::scale]))
    return jnp.concatenate(found, axis=1)

  return features


@functools.lru_cache(maxsize=16)
def method(detector: DifferNet, maps: Callable, channels: tuple[int, ...]) -> Method:
  """Makes the method: what is trained, and how it scores."""
  dim = len(SCALES) * sum(channels)
  network = flow.Flow(dim, detector.blocks, detector.hidden)
  features = features_fn(maps, detector.standardise)

  def likelihood(variables, values):
    """Maps features [..., d] to z [n, d], and the logarithms of determinants [n]."""
    scale = variables['given']
    values = (values.reshape(-1, dim) - scale['mean']) / scale['deviation']
    return network.apply({'params': variables['params']}, values)

  def examples(pretrained, images, run):
    angles = np.broadcast_to(even_angles(detector.turns), (len(images), detector.turns))
    if detector.angles == 'any':  # each image's own, within every part of the circle
      rng = np.random.default_rng((run.seed, detector.turns))
      angles = (angles + rng.uniform(0, 2 * np.pi / detector.turns, angles.shape)).astype(np.float32)
    found = []
    for i in range(detector.turns):
      found.append(computed(features, pretrained, (images, angles[:, i])))
      run.progress('embed', (i + 1) * len(images), detector.turns * len(images))
    return np.stack(found, axis=1)

  def given(pretrained, examples, run):
    values = examples.reshape(-1, dim).astype(np.float64)
    deviation = values.std(axis=0)
    deviation += _LEAST_SHARE * deviation.mean() or 1
    return {'mean': values.mean(axis=0).astype(np.float32), 'deviation': deviation.astype(np.float32)}

  def loss(variables, examples, key, train):
    return flow.negative_log_likelihood(*likelihood(variables, examples)).mean(), {}

  def score(variables, images):
    angles = even_angles(detector.test_turns)

    def at_once(pretrained, images):
      turning = jnp.repeat(images, len(angles), axis=0), jnp.tile(angles, len(images))
      return features(pretrained, turning).reshape(len(images), len(angles), dim)

    def one_by_one(pretrained, images):  # which takes less memory, and is as fast where loops are
      found = lax.map(lambda angle: features(pretrained, (images, jnp.full(len(images), angle))), angles)
      return found.swapaxes(0, 1)

    values = lax.platform_dependent(variables['network'], images, cpu=at_once, default=one_by_one)
    z, _ = likelihood(variables, values)
    return Scores(jnp.square(z).reshape(len(images), -1).mean(axis=1))

  def init(key):
    return {'params': starts.variables(network, key, jnp.zeros((1, dim)))['params']}

  def optimizer():
    return adam(detector.learning_rate, decay=1e-5, b1=0.8, b2=0.8, eps=1e-4)

  return Method(*descent(init, loss, optimizer), score, examples=examples, given=given, network_scores=True)
