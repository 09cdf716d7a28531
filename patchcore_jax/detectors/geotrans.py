"""GeoTrans (Golan and El-Yaniv, "Deep Anomaly Detection Using Geometric Transformations", NeurIPS 2018; arXiv
1805.10917).
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax.detectors.base import Scores
from patchcore_jax.detectors.trained import Method, adam, computed, descent
from patchcore_jax.detectors.trained_settings import GeoTrans
from patchcore_jax.learned import starts, transforms
from patchcore_jax.learned.layers import Conv, Dense, Norm

# Whether it is mirrored, the steps that its content moves up and left, and quarter turns counter-clockwise.
TRANSFORMATIONS = np.array(list(itertools.product((0, 1), (0, -1, 1), (0, -1, 1), range(4))))
_DECAY = 5e-4
_LEAST = -50.0  # of a logarithm of a probability: one image must not decide
# As PyTorch's, but with a bias that starts at 0.
_even = starts.uniform(lambda shape: starts.fan_in(shape) ** -0.5)
_conv = functools.partial(Conv, use_bias=False, kernel_init=starts.HE_NORMAL, before=0)


class WideResNet(nn.Module):
  """A wide residual network with activations before convolutions: images [b, s, s, 3] -> logits [b, 72].

  Attributes:
    depth: 6 n + 4, with n blocks in each of three groups.
    width: times as many channels as 16, 32 and 64.
  """

  depth: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = _conv(16)(x)
    for group, channels in enumerate((16, 32, 64)):
      for block in range((self.depth - 4) // 6):
        features, stride = channels * self.width, 2 if group and not block else 1
        a = nn.relu(Norm()(x, train))
        y = nn.relu(Norm()(_conv(features, stride=stride)(a), train))
        # A shortcut that changes channels starts behind the activation, the others before it.
        x = _conv(features)(y) + (x if x.shape[-1] == features else _conv(features, 1, stride)(a))
    x = nn.relu(Norm()(x, train))
    b, h, w, c = x.shape
    cells = min(h, 8)  # the mean of which counts, along either axis
    x = x.reshape(b, h // cells, cells, w // cells, cells, c).mean(axis=(2, 4)).reshape(b, -1)
    return Dense(len(TRANSFORMATIONS), kernel_init=_even)(x)


def transformed(images: jax.Array, which: jax.Array) -> jax.Array:
  """Mirrors, moves and turns each image [b, s, s, c] by one of `TRANSFORMATIONS`, by its number, [b].

  Content moves by a quarter of the side; what comes in is mirrored, with the border pixels repeated.

  >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
  >>> transformed(image, jnp.array([1]))[0, :, :, 0].astype(int).tolist()[0]  # a quarter turn
  [3, 7, 11, 15]
  """
  step = images.shape[1] // 4

  def one(image, which):
    mirrored, down, right, turns = jnp.asarray(TRANSFORMATIONS)[which]
    image = jnp.where(mirrored, image[:, ::-1], image)
    room = jnp.pad(image, ((step, step), (step, step), (0, 0)), 'symmetric')
    image = lax.dynamic_slice(room, (step * (1 + down), step * (1 + right), 0), image.shape)
    return jnp.stack([jnp.rot90(image, k) for k in range(4)])[turns]

  return jax.vmap(one)(images, which)


def dirichlet(log_probabilities: np.ndarray) -> np.ndarray:
  """Fits a Dirichlet distribution by maximum likelihood (Minka, "Estimating a Dirichlet distribution", 2000).

  Some steps of the fixed point, which stay positive, come first; then Newton's, which end soon.

  Args:
    log_probabilities: [n, k], of n draws.

  Returns:
    Its parameters, [k] float64.
  """
  from scipy.special import digamma, polygamma  # which scoring need not wait for

  logs = np.maximum(log_probabilities.astype(np.float64), _LEAST)
  mean_logs, means = logs.mean(axis=0), np.exp(logs).mean(axis=0)
  spread = (means * (np.log(np.maximum(means, np.exp(_LEAST))) - mean_logs)).sum()
  alpha = means * (len(means) - 1) * -digamma(1) / max(spread, 1e-12)
  for _ in range(10):
    alpha = inverse_digamma(digamma(alpha.sum()) + mean_logs)
  for _ in range(200):
    slope = digamma(alpha.sum()) - digamma(alpha) + mean_logs
    own, shared = -polygamma(1, alpha), polygamma(1, alpha.sum())
    with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
      step = (slope - (slope / own).sum() / (1 / shared + (1 / own).sum())) / own
    if not np.isfinite(step).all():  # draws that are all the same, whose best parameters are infinite
      break
    while (step >= alpha).any():
      step /= 2
    alpha = alpha - step
    if np.linalg.norm(step) < 1e-9 * np.linalg.norm(alpha):
      break
  return alpha


def inverse_digamma(values: np.ndarray) -> np.ndarray:
  """Inverts the digamma function, by Newton's method.

  >>> from scipy.special import digamma
  >>> inverse_digamma(digamma(np.array([0.1, 2.0, 30.0]))).round(6).tolist()
  [0.1, 2.0, 30.0]
  """
  from scipy.special import digamma, polygamma

  x = np.where(values >= -2.22, np.exp(values) + 0.5, -1 / (values - digamma(1)))
  for _ in range(5):
    x = x - (digamma(x) - values) / polygamma(1, x)
  return x


@functools.lru_cache(maxsize=16)
def method(detector: GeoTrans) -> Method:
  """Makes the method: what is trained, and how it scores."""
  network, every = WideResNet(detector.depth, detector.width), len(TRANSFORMATIONS)

  def prepared(images):
    return 2 * transforms.scaled(images, detector.standardise) - 1

  def loss(variables, images, key, train):
    orders = jax.vmap(lambda k: jax.random.permutation(k, every))(jax.random.split(key, len(images)))
    which = orders[:, :detector.at_once].reshape(-1)
    x = transformed(jnp.repeat(prepared(images), detector.at_once, axis=0), which)
    logits, changes = network.apply(variables, x, train, mutable=['batch_stats'])
    likelihoods = jnp.take_along_axis(nn.log_softmax(logits), which[:, None], axis=1)
    return -likelihoods.mean(), changes if train else {}

  def answers(variables, images):
    """Computes log-probabilities of what was done to an image, under each transformation: [b, 72, 72]."""
    x = transformed(jnp.repeat(prepared(images), every, axis=0), jnp.tile(jnp.arange(every), len(images)))
    variables = {name: variables[name] for name in ('params', 'batch_stats')}
    return nn.log_softmax(network.apply(variables, x, False)).reshape(len(images), every, every)

  def finish(variables, images, held):
    found = computed(answers, variables, images, at_once=8)  # each makes 72
    return {'alpha': np.stack([dirichlet(found[:, i]) for i in range(every)]).astype(np.float32)}

  def score(variables, images):
    logs = answers(variables, images)
    if detector.score == 'simple':
      return Scores(-jnp.exp(jnp.diagonal(logs, axis1=1, axis2=2)).mean(axis=1))
    weights = variables['finished']['alpha'] - 1
    return Scores(-(weights * jnp.maximum(logs, _LEAST)).sum(axis=2).mean(axis=1))

  def init(key):
    return starts.variables(network, key, jnp.zeros((1, detector.size, detector.size, 3)), False)

  optimizer = functools.partial(adam, detector.learning_rate, decay=_DECAY, eps=1e-7)
  return Method(*descent(init, loss, optimizer), score, finish)
