"""Made parts, and what every method must do with them whose network is trained."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from patchcore_jax import metrics
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import Run, Scores, streaming
from patchcore_jax.detectors.trained import Method, descent
from patchcore_jax.detectors.trained_settings import Trained


@dataclasses.dataclass(frozen=True)
class MeanImage(Trained):
  """Learns the mean of the good images, by small steps: as a method is added, and compiled in no time.

  Attributes:
    start: of the values.
  """

  name: ClassVar[str] = 'mean_image'
  title: ClassVar[str] = 'Mean image'
  method: ClassVar[str] = 'tests.trained'

  start: float = 0.5


@functools.lru_cache
def method(detector):

  def loss(variables, images, key, train):
    noise = 0.01 * train * jax.random.normal(key, images.shape)
    return jnp.square(images / 255 + noise - variables['params']['mean']).mean(), {}

  def score(variables, images):
    maps = jnp.square(images / 255 - variables['params']['mean']).mean(axis=-1)
    return Scores(maps.max(axis=(1, 2)), maps)

  def init(key):
    return {'params': {'mean': jnp.full((detector.size, detector.size, 3), detector.start)}}

  return Method(*descent(init, loss, lambda: optax.sgd(1e3 * detector.learning_rate)), score)


def started(task, seed: int):
  """Starts what is trained as `loop.init` might, with weights drawn by NumPy."""
  rng = np.random.default_rng(seed)

  def start(path, leaf):
    names = [str(getattr(key, 'key', getattr(key, 'name', ''))) for key in path]
    if 'params' not in names or not leaf.ndim:  # of an optimiser, or a batch norm's statistics
      return jnp.full(leaf.shape, names[-1] == 'var', leaf.dtype)
    # Convolutions keep the variance, so that images are told apart behind many of them.
    gain = 6 if names[-1] == 'kernel' and leaf.ndim == 4 else 1
    bound = (gain / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.1
    return jnp.asarray(rng.uniform(-bound, bound, leaf.shape) + (names[-1] == 'scale'), leaf.dtype)

  return jax.tree_util.tree_map_with_path(start, task.init(jax.random.key(0)))


def parts(n: int, size: int = 64, seed: int = 0) -> np.ndarray:
  """Draws good parts, [n, size, size, 3] uint8: smooth stripes, at places and in light that vary a little."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:size, :size] / size
  phase, light = rng.uniform(0, 0.15, (n, 1, 1)), rng.uniform(0.9, 1.1, (n, 1, 1))
  gray = light * (0.45 + 0.25 * np.sin(2 * np.pi * (2 * x + 0.5 * y + phase)))
  images = gray[..., None] * [1.0, 0.95, 0.85] + rng.normal(0, 0.01, (n, size, size, 3))
  return (255 * images).clip(0, 255).astype(np.uint8)


def defective(n: int, size: int = 64, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Draws parts with a bright square each, and the masks [n, size, size] bool of the squares."""
  images, rng = parts(n, size, seed), np.random.default_rng(seed)
  masks = np.zeros(images.shape[:3], bool)
  for mask, (y, x) in zip(masks, rng.integers(0, size - size // 6, (n, 2))):
    mask[y:y + size // 6, x:x + size // 6] = True
  images[masks] = 250
  return images, masks


def assert_learns(detector, factor: float, *, level: float = 0.9, images: np.ndarray | None = None) -> None:
  """Checks that training lowers the loss by a factor, and that bright squares are found by its end.

  Args:
    factor: between the means of the first and of the last five losses.
    level: the AUROC, of pixels where there are maps, else of images, that must be exceeded.
    images: good ones; None for 64 parts.
  """
  model = detector.fit(ArrayData(parts(64) if images is None else images), (), Run())
  losses = model.arrays['losses']
  assert losses[:5].mean() > factor * losses[-5:].mean(), (losses[:5], losses[-5:])
  good = parts(16, seed=2)
  bad, masks = defective(16)
  found = [scores for _, scores in streaming.predict(
      detector.score_fn(model, ()), ArrayData(np.concatenate([good, bad])).batches())]
  if found[0].map is None:
    labels = np.arange(32) >= 16
    assert metrics.auroc(labels, np.concatenate([scores.image for scores in found])) > level
  else:
    maps = np.concatenate([scores.map for scores in found])
    everywhere = np.concatenate([np.zeros_like(masks), masks])
    assert metrics.auroc(everywhere.ravel(), maps.ravel()) > level
