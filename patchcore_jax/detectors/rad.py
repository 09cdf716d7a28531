"""RAD (Zhang et al., arXiv 2601.22763): retrieves the good images that are like an image, and compares each
patch with theirs at about the same place."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from patchcore_jax import scoring
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.banks.provenance import Recorder
from patchcore_jax.detectors import streaming, tokens
from patchcore_jax.detectors.base import LIVE, LOOP_FREE, Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.settings import RAD
from patchcore_jax.embedding import unit_length
from patchcore_jax.search import neighbors, search_bank
from patchcore_jax.settings import SearchSpec

_BLUR_RADIUS = 2  # the released code has 5 x 5 taps
_VALUES = 2**25  # of patches that are gathered at once: 128 MB as float32


def fit(detector: RAD, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Keeps the class token and every patch of good images, each of unit length.

  Memory on the host: n r c d values, with r x c patches of d channels in all layers: 4.8 MB an image in
  float16 for ViT-B/16 at 448 px and four layers, 963 MB for 200 images, which is half of float32. No copy of
  them is made: they are collected as they are kept, on disk while they are made if `run.scratch` is given.
  Only the class token that retrieval asks for is kept, and scoring gathers a few images at a time.

  Returns:
    A `Model` of the arrays class_tokens [n, c] float32 and, for each layer, patches_0, patches_1, ...
    [n, rows, columns, c_l] float16 or float32.

  Raises:
    ValueError: a network whose last layer is no class token, layers of several grids, no images, fewer than
      are to be retrieved, or a window that is larger than the grid.
  """
  (backbone,) = backbones
  _check_enough(len(data.examples), detector)
  read = Recorder(data.batches(), run.keep_images)
  (token, *patches), image_size = streaming.collect(
      _kept_fn(_features_fn(streaming.maps_of(backbone)), detector.dtype), backbone.variables, read,
      len(data.examples), run)
  grid = patches[0].shape[1:3]
  _check_enough(len(token), detector)
  _check_window(grid, detector)
  arrays = {'class_tokens': token} | {f'patches_{i}': layer for i, layer in enumerate(patches)}
  return streaming.made(detector, (backbone,), arrays, data, read, run, image_size=image_size, grid=grid)


def score_fn(
    detector: RAD, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`).

  Its parameters are the network's variables, the class tokens, and the patches as the model has them, so that
  a device holds as much as the model. Both searches are exact.

  Raises:
    ValueError: more images than there are, a window that is larger than the grid, weights for another number
      of layers, or a sharded bank.
  """
  (backbone,), token = backbones, model.arrays['class_tokens']
  _check_enough(len(token), detector)
  _check_window(model.description.grid, detector)
  patches = tuple(model.arrays[f'patches_{i}'] for i in range(len(backbone.layers) - 1))
  if detector.weights and len(detector.weights) != len(patches):
    raise ValueError(
        f'rad.weights={detector.weights}: expected one for each of the {len(patches)} layers of patches.')
  if search.bank != 'replicated':
    raise ValueError(f"search.bank={search.bank!r}: RAD's bank has to be whole on every device.")
  prepared = (
      search_bank.in_one_pass(token) if program == LOOP_FREE else search_bank.prepare(token, 'float32'))
  fn = _scores_fn(
      _features_fn(streaming.maps_of(backbone)), detector, len(token), program != LOOP_FREE, program == LIVE)
  return ScoreFn(fn, (backbone.variables, prepared, patches))


def retrieve(token: jax.Array, bank: jax.Array | search_bank.SearchBank, k: int, **search) -> jax.Array:
  """Finds the training images whose class tokens are most like those of some images.

  Args:
    token: [b, c] float32, of unit length.
    bank: [n, c] float32, of unit length, or what `search_bank.prepare` made of it.
    k: how many.
    search: see `neighbors.nested_nearest_neighbors`.

  Returns:
    [b, k] int32, the largest cosine similarity first; of equal ones, the lowest index.
  """
  size = len(bank.rows if isinstance(bank, search_bank.SearchBank) else bank)
  # The order of distances of unit vectors is that of their cosines.
  ((_, images),) = neighbors.nested_nearest_neighbors(token, bank, (size,), k=k, **search)
  return images


def similarities(
    queries: jax.Array, bank: jax.Array, images: jax.Array, radius: int, *, loops: bool = True) -> jax.Array:
  """Finds how like each patch is to the one most like it of some training images, near its own place.

  Args:
    queries: [b, rows, columns, c] float32, of unit length.
    bank: [n, rows, columns, c], of unit length, of any float type; products are of float32.
    images: [b, k] int32, the training images for each image.
    radius: how many rows and columns away the other may lie; -1 for anywhere.
    loops: whether few images may be gathered at a time; else all k are.

  Returns:
    The cosine similarities [b, rows, columns] float32.

  >>> queries = jnp.array([[[[1., 0.]], [[0., 1.]]]])
  >>> bank = jnp.array([[[[0., 1.]], [[0.6, 0.8]]]])
  >>> [similarities(queries, bank, jnp.array([[0]]), radius).ravel().tolist() for radius in (0, -1)]
  [[0.0, 0.800000011920929], [0.6000000238418579, 1.0]]
  """
  k = images.shape[1]
  block = min(k, max(1, _VALUES // queries.size)) if loops else k
  # The last image fills the last block: the maximum is the same.
  filled = images[:, np.minimum(np.arange(-(-k // block) * block), k - 1)]
  blocks = filled.reshape(len(images), -1, block).swapaxes(0, 1)

  def step(best, chosen):
    references = bank[chosen].astype(jnp.float32)
    found = _anywhere(queries, references) if radius < 0 else _in_window(queries, references, radius)
    return jnp.maximum(best, found), None

  start = jnp.full(queries.shape[:3], -1.0, jnp.float32)
  if len(blocks) == 1:
    return step(start, blocks[0])[0]
  return lax.scan(step, start, blocks)[0]


def patch_scores(
    patches: Sequence[jax.Array], banks: Sequence[jax.Array], images: jax.Array, detector: RAD, *,
    loops: bool = True) -> jax.Array:
  """Computes patch scores: the weighted mean over layers of 1 - similarity.

  Args:
    patches, banks: for each layer, queries and bank of `similarities`.
    images, loops: see `similarities`.
    detector: its radius and weights.

  Returns:
    [b, rows, columns] float32.
  """
  weights = np.array(detector.weights or (1.0,) * len(patches))
  weights = (weights / weights.sum()).astype(np.float32)
  return sum(
      weight * (1 - similarities(queries, bank, images, detector.radius, loops=loops))
      for weight, queries, bank in zip(weights, patches, banks, strict=True))


def anomaly_maps(patches: jax.Array, size: tuple[int, int], detector: RAD) -> jax.Array:
  """Enlarges patch scores [b, rows, columns] to the maps [b, *size] by which images are scored."""
  return scoring.enlarged(
      patches, size, sigma=detector.sigma, radius=_BLUR_RADIUS, edges=detector.blur_edges)


@functools.lru_cache(maxsize=16)
def _features_fn(maps_fn):
  """Makes the function (variables, images) -> (class token [b, c], patches [b, rows, columns, c] ...)."""

  def features(variables, images):
    patches, token = tokens.with_class_token(maps_fn(variables, images), RAD.title)
    return tuple(map(unit_length, (token, *patches)))

  return features


@functools.lru_cache(maxsize=16)
def _kept_fn(features_fn, dtype):
  """Makes the same function with patches of another type."""

  def kept(variables, images):
    token, *patches = features_fn(variables, images)
    return token, *(layer.astype(dtype) for layer in patches)

  return kept


@functools.lru_cache(maxsize=16)
def _scores_fn(features_fn: Callable, detector: RAD, num_images: int, loops: bool, kernels: bool) -> Callable:
  """Makes the function ((variables, class tokens, patches), images) -> `Scores`."""

  def score(parameters, images):
    variables, class_tokens, banks = parameters
    token, *patches = features_fn(variables, images)
    retrieved = retrieve(token, class_tokens, detector.num_images or num_images, kernels=kernels)
    patches = patch_scores(patches, banks, retrieved, detector, loops=loops)
    size = detector.map_size or images.shape[1:3]
    maps = anomaly_maps(patches, size, detector)
    worst = jnp.argmax(patches.reshape(len(patches), -1), axis=1).astype(jnp.int32)
    return Scores(
        scoring.top_share_scores(maps, detector.top_share),
        maps if size == images.shape[1:3] else scoring.enlarged(maps, images.shape[1:3]), {'patch': worst})

  return score


def _anywhere(queries, references):
  """Finds the largest similarity to any patch of references [b, m, rows, columns, c]."""
  products = jnp.einsum('bijc,bmyxc->bmijyx', queries, references, precision=lax.Precision.HIGHEST)
  return products.max((1, 4, 5))


def _in_window(queries, references, radius):
  """Finds the largest similarity to patches at most `radius` rows and columns away, shift by shift."""
  rows, columns = queries.shape[1:3]
  best = jnp.full(queries.shape[:3], -1.0, jnp.float32)
  for down in range(-radius, radius + 1):
    for right in range(-radius, radius + 1):
      (to_rows, of_rows), (to_columns, of_columns) = _overlap(rows, down), _overlap(columns, right)
      products = jnp.einsum(
          'bijc,bmijc->bmij', queries[:, to_rows, to_columns], references[:, :, of_rows, of_columns],
          precision=lax.Precision.HIGHEST)
      margins = [(0, 0), *((s.start, n - s.stop) for s, n in ((to_rows, rows), (to_columns, columns)))]
      best = jnp.maximum(best, jnp.pad(products.max(1), margins, constant_values=-1.0))
  return best


def _overlap(cells, shift):
  """Finds the cells that have a neighbour `shift` cells on, and those neighbours."""
  return slice(max(0, -shift), cells - max(0, shift)), slice(max(0, shift), cells - max(0, -shift))


def _check_enough(num_images, detector):
  """Raises ValueError where there are fewer training images than are to be retrieved."""
  if num_images < detector.num_images:
    raise ValueError(
        f'rad.num_images={detector.num_images}: an image cannot be compared with so many, there are '
        f'{num_images} training images. Lower it, or set 0 for all there are.')


def _check_window(grid, detector):
  """Raises ValueError for a window that is larger than the grid of patches."""
  side = 2 * detector.radius + 1
  if side > min(grid):
    raise ValueError(
        f'rad.radius={detector.radius}: a window of {side} x {side} patches does not fit into the grid of '
        f'{grid[0]} x {grid[1]}. Lower it, or set -1 for patches anywhere.')
