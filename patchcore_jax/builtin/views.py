"""Two views of an image, and which points of them show the same place.

Positions are pixel indices (x, y): (0, 0) is the centre of the first pixel. A cell (row, column) of a
feature map of stride s is centred on pixel (s * column, s * row) in every network of the family, whose
padding is (size - 1) / 2; so the position on the map is the pixel's, divided by s.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# The precision of positions: that of a GPU or TPU by default would move a place by up to half a pixel.
_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class ViewSpec:
  """How views are taken. Strengths are standard deviations or limits, in units of the range 0..1.

  Attributes:
    size: height and width of a view in pixels.
    zoom: image pixels for a pixel of the view, from and to; the logarithm is drawn uniformly.
    turn: standard deviation of the angle, in degrees.
    shift: the largest distance of the centres of two views along each axis, as a share of `size`.
    points: number along each axis; points * points of the first view are followed into the second.
    gain: strength of the change of the exposure's logarithm.
    channel_gain: strength of the same change in each channel.
    bias: strength of an offset of all pixels.
    gray: share of the views without colour.
    slope: strength of the change of light from the centre to an edge.
    blur: the largest weight of each neighbour along an axis; up to 1 / 3, where all three count alike.
    noise: the largest strength of gray noise, of single pixels and of cells of 4 x 4.
  """

  size: int = 64
  zoom: tuple[float, float] = (0.7, 1.4)
  turn: float = 10.0
  shift: float = 0.25
  points: int = 5
  gain: float = 0.3
  channel_gain: float = 0.05
  bias: float = 0.12
  gray: float = 0.3
  slope: float = 0.1
  blur: float = 0.15
  noise: float = 0.04


class Views(NamedTuple):
  """Views of n images and p places in each.

  Attributes:
    views: [2, n, size, size, 3] float32, about 0..1.
    points: [2, n, p, 2] float32, the same places in both.
    visible: [n, p] bool, whether a place lies inside the second view.
  """

  views: jax.Array
  points: jax.Array
  visible: jax.Array


def draw(key: jax.Array, images: jax.Array, spec: ViewSpec) -> Views:
  """Takes two views of every image.

  Args:
    key: PRNG key, on which all that is random depends.
    images: [n, h, w, 3] uint8.
    spec: sizes and strengths.
  """
  place, grid, light = jax.random.split(key, 3)
  transforms = _transforms(place, len(images), images.shape[1:3], spec)
  first = _points(grid, len(images), spec)
  second = follow(first, transforms[0], transforms[1])
  visible = ((second >= 0) & (second <= spec.size - 1)).all(-1)
  views = jax.vmap(lambda t: sample(images, t, spec.size))(transforms)
  views = photograph(light, views.reshape(-1, *views.shape[2:]), spec).reshape(views.shape)
  return Views(views, jnp.stack([first, second]), visible)


def _transforms(key, n, image_size, spec):
  """Chooses transforms [2, n, 2, 3] from pixels of a view to pixels of the image."""
  keys = jax.random.split(key, 4)
  low, high = jnp.log(spec.zoom[0]), jnp.log(spec.zoom[1])
  zoom = jnp.exp(jax.random.uniform(keys[0], (2, n), minval=low, maxval=high))
  angle = jnp.deg2rad(spec.turn) * jax.random.normal(keys[1], (2, n))
  # A common centre somewhere; what lies outside of the image is mirrored.
  height, width = image_size
  common = jax.random.uniform(keys[2], (n, 2)) * jnp.array([width - 1, height - 1])
  apart = jax.random.uniform(keys[3], (2, n, 2), minval=-0.5, maxval=0.5) * spec.shift * spec.size
  cos, sin = zoom * jnp.cos(angle), zoom * jnp.sin(angle)
  linear = jnp.stack([cos, -sin, sin, cos], -1).reshape(2, n, 2, 2)
  middle = jnp.full((2,), (spec.size - 1) / 2)
  offset = common + apart - jnp.matmul(linear, middle, precision=_HIGHEST)
  return jnp.concatenate([linear, offset[..., None]], -1)


def _points(key, n, spec):
  """Chooses points [n, points^2, 2]: one in each cell of a grid, so that few are close by chance."""
  line = jnp.arange(spec.points) / spec.points
  corners = jnp.stack(jnp.meshgrid(line, line), -1).reshape(1, -1, 2)
  inside = jax.random.uniform(key, (n, spec.points**2, 2)) / spec.points
  return (corners + inside) * (spec.size - 1)


def follow(points: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
  """Moves points [n, p, 2] of the views by the transforms `first` [n, 2, 3] to the views by `second`."""

  def turned(matrices, points):
    return jnp.einsum('nij,npj->npi', matrices, points, precision=_HIGHEST)

  in_image = turned(first[..., :2], points) + first[:, None, :, 2]
  return turned(jnp.linalg.inv(second[..., :2]), in_image - second[:, None, :, 2])


def sample(images: jax.Array, transforms: jax.Array, size: int) -> jax.Array:
  """Takes views [n, size, size, 3] float32 in 0..1 of uint8 images: bilinear, mirrored at the edges."""
  height, width = images.shape[1:3]
  line = jnp.arange(size, dtype=jnp.float32)
  grid = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)

  def one(image, transform):
    x, y = (jnp.matmul(grid, transform[:, :2].T, precision=_HIGHEST) + transform[:, 2]).T
    x, y = _mirrored(x, width), _mirrored(y, height)
    left, top = jnp.floor(x), jnp.floor(y)
    column, row = left.astype(jnp.int32), top.astype(jnp.int32)
    right, below = jnp.minimum(column + 1, width - 1), jnp.minimum(row + 1, height - 1)
    flat = image.reshape(-1, 3)

    def at(row, column):
      return flat[row * width + column].astype(jnp.float32)

    x, y = (x - left)[:, None], (y - top)[:, None]
    upper = at(row, column) * (1 - x) + at(row, right) * x
    lower = at(below, column) * (1 - x) + at(below, right) * x
    return (upper * (1 - y) + lower * y).reshape(size, size, 3) / 255

  return jax.vmap(one)(images, transforms)


def _mirrored(x, size):
  """Mirrors positions outside of an axis into it."""
  period = 2 * (size - 1)
  x = jnp.mod(x, period)
  return jnp.minimum(x, period - x)


def photograph(key: jax.Array, views: jax.Array, spec: ViewSpec) -> jax.Array:
  """Changes views [n, s, s, 3] as another camera in another light may show them."""
  n, size = views.shape[:2]
  keys = jax.random.split(key, 9)

  def normal(key, *shape):
    return jax.random.normal(key, (n, *shape, *(1,) * (3 - len(shape))))

  gray = jax.random.bernoulli(keys[0], spec.gray, (n, 1, 1, 1))
  views = jnp.where(gray, views.mean(-1, keepdims=True), views)
  weight = jax.random.uniform(keys[1], (n, 1, 1, 1), maxval=spec.blur)
  for axis in (1, 2):
    padded = jnp.pad(views, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode='edge')
    before, after = (
        lax.slice_in_dim(padded, start, start + size, axis=axis) for start in (0, 2))
    views = views + weight * (before + after - 2 * views)
  line = jnp.linspace(-1, 1, size)
  slope = spec.slope * normal(keys[2], 2)[:, 0:2]
  light = 1 + slope[:, :1] * line[None, :, None, None] + slope[:, 1:] * line[None, None, :, None]
  gain = jnp.exp(
      spec.gain * normal(keys[3]) + spec.channel_gain * jax.random.normal(keys[4], (n, 1, 1, 3)))
  views = views * light * gain + spec.bias * normal(keys[5])
  strength = jax.random.uniform(keys[6], (2, n, 1, 1, 1), maxval=spec.noise)
  fine = jax.random.normal(keys[7], (n, size, size, 1))
  coarse = jax.random.normal(keys[8], (n, -(-size // 4), -(-size // 4), 1))
  coarse = jax.image.resize(coarse, (n, size, size, 1), 'linear')
  return views + strength[0] * fine + strength[1] * coarse


def at_points(maps: jax.Array, points: jax.Array, stride: float) -> jax.Array:
  """Reads features [n, p, c] of maps [n, h, w, c] at pixels [n, p, 2]: bilinear, held at the edges."""
  weights = []
  for axis, size in ((1, maps.shape[1]), (0, maps.shape[2])):
    position = jnp.clip(points[..., axis] / stride, 0, size - 1)
    weights.append(jnp.maximum(0, 1 - jnp.abs(position[..., None] - jnp.arange(size))))
  rows, columns = weights
  both = (rows[..., :, None] * columns[..., None, :]).reshape(*points.shape[:2], -1)
  return jnp.einsum('npk,nkc->npc', both, maps.reshape(len(maps), -1, maps.shape[-1]))
