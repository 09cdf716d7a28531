"""Makes locally aware patch embeddings from feature maps (the paper's section 3.1).

There are two kinds:
  'adaptive': the paper's released code. Patches of P x P cells with zero padding, flattened over
    (channel, row, column) and averaged to `pretrain_dim` values per layer, the layers stacked and
    averaged again to `target_dim`; both averages are PyTorch's adaptive_avg_pool1d.
  'mean': the mean over P x P cells for every channel (zero padding counts), layers concatenated.
In both, deeper maps are enlarged bilinearly to the grid of the first layer, the shallowest.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from patchcore_jax.settings import EmbeddingSpec


def patch_embeddings(feature_maps: Sequence[jax.Array], spec: EmbeddingSpec) -> jax.Array:
  """Embeds every cell of the first map's grid.

  Averages over channels and bilinear enlargement are both linear, and in different axes: here every
  layer is averaged in its own grid, and only the values it contributes are enlarged. Where the bins of
  all layers stay within whole channels (layer2 and layer3 of every ResNet at the paper's sizes), the
  averages are weighted sums over the P x P neighbours followed by means of channels. Both are many
  times cheaper than the definition, `adaptive_embeddings`.

  Args:
    feature_maps: [b, h_l, w_l, c_l] float32 each, shallowest first.
    spec: kind and sizes.

  Returns:
    [b, h_0, w_0, d] float32; d is `target_dim`, or the sum of c_l for 'mean'.

  Raises:
    ValueError: no maps, or maps without a batch dimension.

  >>> maps = [jnp.ones((1, 4, 4, 6)), jnp.ones((1, 2, 2, 10))]
  >>> patch_embeddings(maps, EmbeddingSpec('mean')).shape
  (1, 4, 4, 16)
  >>> patch_embeddings(maps, EmbeddingSpec('adaptive', target_dim=8)).shape
  (1, 4, 4, 8)
  """
  if not feature_maps or any(m.ndim != 4 for m in feature_maps):
    raise ValueError(
        f'Expected maps [b, h, w, c], got shapes {[m.shape for m in feature_maps]}.')
  if spec.kind == 'auto':
    raise ValueError("embedding.kind='auto' is settled by the network: expected 'adaptive' or 'mean' here.")
  if spec.unit_length:
    return unit_length(patch_embeddings(feature_maps, dataclasses.replace(spec, unit_length=False)))
  if spec.kind == 'mean':
    plans = [_Plan(1, _uniform(spec.patch_size)) for _ in feature_maps]
  else:
    plans = [_plan(m.shape[-1], len(feature_maps), spec) for m in feature_maps]
  grid = feature_maps[0].shape[1:3]
  if any(plan is None for plan in plans):
    return _joined_shares(feature_maps, spec, grid)
  parts = [_resize(_neighborhood_sums(m, p), grid) for m, p in zip(feature_maps, plans)]
  return jnp.concatenate(parts, axis=-1)


def unit_length(vectors: jax.Array) -> jax.Array:
  """Divides vectors [..., d] by their Euclidean norms.

  >>> unit_length(jnp.array([3., 4.]))
  Array([0.6, 0.8], dtype=float32)
  """
  return vectors / jnp.maximum(jnp.sqrt(jnp.square(vectors).sum(-1, keepdims=True)), 1e-12)


def _joined_shares(feature_maps, spec, grid):
  """Embeds where bins of the second mean may straddle layers: by a sum of what each layer contributes."""
  dim, layers = spec.pretrain_dim, len(feature_maps)
  starts, stops = _bins(layers * dim, spec.target_dim)
  total = 0.0
  for layer, maps in enumerate(feature_maps):
    begin, end = layer * dim, (layer + 1) * dim
    plan = _plan(maps.shape[-1], 1, dataclasses.replace(spec, target_dim=dim))
    if plan is not None:
      values = _neighborhood_sums(maps, plan)
    else:
      patches = jnp.stack(_shifts(maps, spec.patch_size), axis=-1)
      values = _adaptive_mean(patches.reshape(*patches.shape[:3], -1), dim)
    own = np.flatnonzero((stops > begin) & (starts < end))
    sums = _sums(values, np.maximum(starts[own], begin) - begin, np.minimum(stops[own], end) - begin)
    share = _resize(sums / (stops - starts)[own].astype(np.float32), grid)
    total += jnp.pad(share, ((0, 0),) * 3 + ((own[0], spec.target_dim - 1 - own[-1]),))
  return total


def adaptive_embeddings(feature_maps: Sequence[jax.Array], spec: EmbeddingSpec) -> jax.Array:
  """Embeds by the definition of 'adaptive', for any number of channels, layers and sizes.

  Arguments and result are those of `patch_embeddings`.
  """
  grid = feature_maps[0].shape[1:3]
  layers = []
  for maps in feature_maps:
    # [b, h, w, c, P * P]: each of the P * P shifted maps is enlarged on its own, as a map.
    patches = jnp.stack([_resize(s, grid) for s in _shifts(maps, spec.patch_size)], axis=-1)
    layers.append(_adaptive_mean(patches.reshape(*patches.shape[:3], -1), spec.pretrain_dim))
  return _adaptive_mean(jnp.concatenate(layers, axis=-1), spec.target_dim)


def _adaptive_mean(x: jax.Array, size: int) -> jax.Array:
  """Averages the last axis like PyTorch's adaptive_avg_pool1d.

  Bin i of s is [floor(i n / s), ceil((i + 1) n / s)).
  """
  starts, stops = _bins(x.shape[-1], size)
  return _sums(x, starts, stops) / (stops - starts).astype(np.float32)


def _sums(x, starts, stops):
  """Sums x[..., start:stop] for every pair of start and stop, which are about equally far apart."""
  total = 0.0
  for offset in range(int((stops - starts).max())):
    index = starts + offset
    inside = index < stops
    total += jnp.where(inside, x[..., np.where(inside, index, 0)], 0)
  return total


def _bins(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Computes where the bins of an adaptive mean start and stop."""
  i = np.arange(size)
  return i * length // size, -((-(i + 1) * length) // size)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The mean of every `group` adjacent channels, then k weighted sums over the P * P neighbours.

  `taps` is [P * P, k]; outputs are ordered by channel, then by k.
  """

  group: int
  taps: np.ndarray


def _uniform(patch_size: int) -> np.ndarray:
  """Makes the `taps` of a plain mean."""
  return np.full((patch_size**2, 1), 1 / patch_size**2)


def _plan(channels: int, num_layers: int, spec: EmbeddingSpec) -> _Plan | None:
  """Plans the two adaptive means of one layer; None where they mix partial channels.

  With n = channels * P^2 values in `pretrain_dim` bins, whole multiples either way keep every bin
  inside a channel or over whole channels. The second mean then joins `merge` neighbouring bins,
  which must not straddle two layers.
  """
  dim, area = spec.pretrain_dim, spec.patch_size**2
  merge = num_layers * dim // spec.target_dim
  if merge * spec.target_dim != num_layers * dim or dim % merge:
    return None
  if dim % channels == 0:
    per_channel = dim // channels
    starts, stops = _bins(area, per_channel)
    taps = np.zeros((area, per_channel))
    for k, (start, stop) in enumerate(zip(starts, stops)):
      taps[start:stop, k] = 1 / (stop - start)
    if per_channel % merge == 0:
      return _Plan(1, taps.reshape(area, -1, merge).mean(-1))
    if merge % per_channel == 0:
      return _Plan(merge // per_channel, taps.mean(-1, keepdims=True))
    return None
  if channels % dim == 0:
    return _Plan(channels // dim * merge, _uniform(spec.patch_size))
  return None


def _neighborhood_sums(maps: jax.Array, plan: _Plan) -> jax.Array:
  """Applies a plan: [b, h, w, c] -> [b, h, w, c / group * k]. All is linear: channels are averaged first."""
  if plan.group > 1:
    maps = maps.reshape(*maps.shape[:3], -1, plan.group).mean(-1)
  patch_size = math.isqrt(len(plan.taps))
  shifts = _shifts(maps, patch_size)
  sums = [
      sum(float(w) * s for w, s in zip(weights, shifts) if w)
      for weights in plan.taps.T.astype(np.float32)]
  return jnp.stack(sums, axis=-1).reshape(*maps.shape[:3], -1)


def _shifts(maps: jax.Array, patch_size: int) -> list[jax.Array]:
  """Shifts maps by every offset of a patch, row by row, with zeros outside."""
  margin = patch_size // 2
  height, width = maps.shape[1:3]
  padded = jnp.pad(maps, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
  return [
      padded[:, y:y + height, x:x + width] for y in range(patch_size) for x in range(patch_size)]


def _resize(maps: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Resizes bilinearly, corners not aligned, without antialiasing, like PyTorch's interpolate."""
  if maps.shape[1:3] == grid:
    return maps
  shape = (maps.shape[0], *grid, maps.shape[-1])
  return jax.image.resize(
      maps, shape, 'bilinear', antialias=False, precision=jax.lax.Precision.HIGHEST)
