"""PatchSVDD (Yi and Yoon, "Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation", ACCV 2020;
arXiv 2006.16067), whose patches are compared by the exact search.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.detectors import trained
from patchcore_jax.detectors.base import LIVE, LOOP_FREE, ScoreFn, Scores
from patchcore_jax.detectors.trained import Method, adam, computed, descent, fit, fit_and_cross_score
from patchcore_jax.detectors.trained_settings import PatchSVDD
from patchcore_jax.learned import starts, transforms
from patchcore_jax.learned.layers import ConvWithin, Dense
from patchcore_jax.search import coreset, neighbors, search_bank
from patchcore_jax.settings import SearchSpec

__all__ = ['fit', 'fit_and_cross_score', 'method', 'score_fn']

STRIDES = {64: 16, 32: 4}  # of patches that are scored, by their side
_AT_ONCE = 32  # images that are brought to [0, 1] together
_NOISE = 0.02  # standard deviation of what is added to colours and to values
_SIGNS = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x])  # of the eight directions
_leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.1)
# Behind eight layers that start as PyTorch's do, all codes would be the same but for rounding.
_conv = functools.partial(ConvWithin, kernel_init=starts.HE_UNIFORM)


class Encoder(nn.Module):
  """Encodes patches of 32 pixels, or all of an image, two pixels apart: [b, s, s, 3] -> [b, m, m, code].

  Attributes:
    width: channels of the first layer.
    code: numbers of a code.
  """

  width: int = 32
  code: int = 64

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i, factor in enumerate((1, 2, 4, 4, 2, 1, 1)):
      x = _leaky_relu(_conv(factor * self.width, stride=1 if i else 2)(x))
    return jnp.tanh(_conv(self.code)(x))


class Network(nn.Module):
  """The encoder, the head that makes the code of a patch of 64 pixels of its four quarters', and classifiers.

  Attributes are those of `Encoder`.
  """

  width: int = 32
  code: int = 64

  def setup(self):
    self.encoder = Encoder(self.width, self.code)
    self.head = [_conv(2 * self.code, 2), _conv(self.code, 1)]
    self.places = {str(side): _Place() for side in STRIDES}

  def __call__(self, large: jax.Array, small: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes patches [n, 64, 64, 3] and [m, 32, 32, 3]: [n, code] and [m, code]."""
    quarters = large.reshape(-1, 2, 32, 2, 32, 3).swapaxes(2, 3).reshape(-1, 32, 32, 3)
    codes = self.encoder(jnp.concatenate([quarters, small]))[:, 0, 0]
    return self.joined(codes[:len(quarters)].reshape(-1, 2, 2, self.code)), codes[len(quarters):]

  def joined(self, quarters: jax.Array) -> jax.Array:
    """Makes codes [n, code] of the codes of quarters [n, 2, 2, code]."""
    return jnp.tanh(self.head[1](_leaky_relu(self.head[0](quarters))))[:, 0, 0]

  def of_images(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes all patches of images [b, s, s, 3] that are scored: [b, m, m, code], for either size."""
    cells = self.encoder(x)  # for the patch at the pixel 2 i
    step = STRIDES[64] // 2
    last = (x.shape[1] - 64) // 2
    corners = [cells[:, i:i + last + 1:step, j:j + last + 1:step] for i in (0, 16) for j in (0, 16)]
    # XLA for GPUs (JAX 0.10 and 0.11) ends the process where it joins a slice with steps and a product.
    quarters, small = lax.optimization_barrier((jnp.stack(corners, axis=3), cells[:, ::2, ::2]))
    large = self.joined(quarters.reshape(-1, 2, 2, self.code))
    return large.reshape(*quarters.shape[:3], self.code), small

  def direction(self, side: int, difference: jax.Array) -> jax.Array:
    """Tells by the difference of two codes [n, code] where the second patch lies: logits [n, 8]."""
    return self.places[str(side)](difference)


class _Place(nn.Module):
  """Tells one of eight directions; its last weights stay as they start, as in the authors' code."""

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = _leaky_relu(Dense(128)(x))
    weights = lax.stop_gradient(self.param('last', starts.TORCH, (128, 8)))
    weights /= jnp.linalg.norm(weights, axis=1, keepdims=True)
    return x @ weights + self.param('bias', nn.initializers.zeros, (8,))


def neighbours(key: jax.Array, side: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws a patch of an image, and one beside it: the corners [2] of both, and which direction that is."""
  places = size - side + 1
  drawn = jax.random.randint(key, (5,), 0, jnp.array([places, places, side // 4, side // 4, 8]))
  first, direction = drawn[:2], drawn[4]
  move = jnp.asarray(_SIGNS)[direction] * (3 * side // 4 + drawn[2:4])
  return first, (first + move).clip(0, size - side), direction


def jittered(key: jax.Array, side: int, size: int) -> tuple[jax.Array, jax.Array]:
  """Draws a patch of an image, and one a pixel or two away: the corners [2] of both."""
  places, most = size - side + 1, side // 32
  moves = np.array([(y, x) for y in range(-most, most + 1) for x in range(-most, most + 1) if y or x])
  drawn = jax.random.randint(key, (3,), 0, jnp.array([places, places, len(moves)]))
  return drawn[:2], (drawn[:2] + jnp.asarray(moves)[drawn[2]]).clip(0, size - side)


def spread(scores: jax.Array, side: int, size: int) -> jax.Array:
  """Gives every pixel the mean score of the patches that cover it: [b, m, m] -> [b, size, size].

  Args:
    side: of the patches.
  """
  starts = STRIDES[side] * np.arange(scores.shape[1])
  within = (starts <= np.arange(size)[:, None]) & (np.arange(size)[:, None] < starts + side)
  share = jnp.asarray(within / within.sum(axis=1, keepdims=True), jnp.float32)
  return jnp.einsum('yi,bij,xj->byx', share, scores, share, precision=lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=16)
def method(detector: PatchSVDD) -> Method:
  """Makes the method: what is trained, and how it scores."""
  network, size = Network(detector.width, detector.code), detector.size

  def prepared(variables, images):
    return transforms.scaled(images, detector.standardise) - variables['given']['mean']

  def given(pretrained, images, run):
    total = sum(
        np.asarray(transforms.scaled(images[i:i + _AT_ONCE], detector.standardise), np.float64).sum(axis=0)
        for i in range(0, len(images), _AT_ONCE))
    return {'mean': (total / len(images)).astype(np.float32)}

  def drawn(x, key, draw, side, noise):
    """Cuts both patches of a pair out of each image: [2 b, side, side, 3], and the directions, if any."""
    placing, *adding = jax.random.split(key, 3)
    first, second, *labels = jax.vmap(lambda k: draw(k, side, size))(jax.random.split(placing, len(x)))
    patches = jnp.concatenate([
        jax.vmap(lambda image, corner: lax.dynamic_slice(image, (*corner, 0), (side, side, 3)))(x, corners)
        for corners in (first, second)])
    for k, shape in zip(adding, ((len(patches), 1, 1, 3), patches.shape)):
      patches += noise * jax.random.normal(k, shape)
    return patches, labels

  def loss(variables, images, key, train):
    x, params = prepared(variables, images), {'params': variables['params']}
    patches, labels = {}, {}
    for i, side in enumerate(STRIDES):
      beside, (labels[side],) = drawn(x, jax.random.fold_in(key, i), neighbours, side, _NOISE)
      near, _ = drawn(x, jax.random.fold_in(key, 2 + i), jittered, side, 0.0)
      patches[side] = jnp.concatenate([beside, near])
    total, report = 0.0, {}
    for side, codes in zip(STRIDES, network.apply(params, *patches.values())):
      first, second, one, other = jnp.split(codes, 4)
      logits = network.apply(params, side, first - second, method='direction')
      likelihoods = jnp.take_along_axis(nn.log_softmax(logits), labels[side][:, None], axis=1)
      apart = jnp.sqrt(jnp.square(one - other).sum(axis=1) + 1e-12).mean()  # of equal ones, with a slope
      total += detector.closeness * apart - likelihoods.mean()
      report[f'apart_{side}'] = apart
    return total, {'report': report}

  def codes(variables, images):
    found = network.apply({'params': variables['params']}, prepared(variables, images), method='of_images')
    return dict(zip(('bank64', 'bank32'), found))

  def finish(variables, images, held):
    banks = {}
    for name, found in computed(codes, variables, images).items():
      rows = found.reshape(-1, detector.code)
      count = max(1, round(detector.bank_ratio * len(rows)))
      banks[name] = rows[coreset.greedy_k_center(rows, count, start=[0], select_start=True)] if (
          count < len(rows)) else rows
    return banks

  def score(variables, images, kernels=False):
    maps = 1.0
    for side, (name, found) in zip(STRIDES, codes(variables, images).items()):
      bank = variables['finished'][name]
      rows = bank.rows if isinstance(bank, search_bank.SearchBank) else bank
      ((distances_sq, _),) = neighbors.nested_nearest_neighbors(
          found.reshape(-1, detector.code), bank, (len(rows),), kernels=kernels)
      maps *= spread(jnp.sqrt(distances_sq).reshape(found.shape[:3]), side, size)
    return Scores(maps.max(axis=(1, 2)), maps)

  def init(key):
    patches = [jnp.zeros((1, side, side, 3)) for side in STRIDES]
    return starts.variables(network, key, *patches, method=_everything)

  return Method(
      *descent(init, loss, lambda: adam(detector.learning_rate)), score, finish, given=given)


def _everything(network, large, small):
  """Uses all parts of the network, so that they start."""
  for side, codes in zip(STRIDES, network(large, small)):
    network.direction(side, codes)


def score_fn(
    detector: PatchSVDD, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`). Its parameters hold the banks, ready for the search."""
  variables = trained.variables_of(model)
  for name, bank in variables['finished'].items():
    ready = search_bank.in_one_pass(bank) if program == LOOP_FREE else (
        search_bank.prepare(bank, search.shortlist))
    variables['finished'][name] = ready
  return ScoreFn(_score_fn(detector, program == LIVE), (variables,))


@functools.lru_cache(maxsize=16)
def _score_fn(detector, kernels):
  """Makes the function ((variables,), images) -> `Scores`, by kernels for one kind of device or without."""
  return trained.of_any_size(functools.partial(method(detector).score, kernels=kernels), detector.size)
