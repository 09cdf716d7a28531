"""Changes to images on their way to a network that is trained, all within its program."""

import jax
import jax.numpy as jnp
from jax import lax

FLIPS = ('none', 'horizontal', 'both')
# Means of few gray values often lie halfway between two. A little above that, no sum of another order, as on
# another device, rounds them to another value.
_HALF = 0.5 + 2**-10


def squared(images: jax.Array, size: int) -> jax.Array:
  """Brings images [b, h, w, 3] uint8 to [b, size, size, 3] uint8, averaging where they get smaller."""
  if images.shape[1:3] == (size, size):
    return images
  shape = (len(images), size, size, images.shape[-1])
  resized = jax.image.resize(images.astype(jnp.float32), shape, 'linear')
  return jnp.floor(resized + _HALF).clip(0, 255).astype(jnp.uint8)


def scaled(images: jax.Array, standardise: bool = False) -> jax.Array:
  """Scales images [b, h, w, 3] uint8 to [0, 1].

  Args:
    standardise: first brings the values of each image to a mean of 0 and a deviation of 1, and then two
      deviations to each side into the range, so that how bright an image is tells nothing.
  """
  x = images.astype(jnp.float32) / 255
  if not standardise:
    return x
  mean = x.mean(axis=(1, 2, 3), keepdims=True)
  deviation = jnp.sqrt(jnp.square(x - mean).mean(axis=(1, 2, 3), keepdims=True))
  return (0.5 + (x - mean) / (4 * deviation + 1e-6)).clip(0, 1)


def augmented(
    images: jax.Array, key: jax.Array, *, flip: str = 'none', turn: float = 0.0, share: float = 1.0,
) -> jax.Array:
  """Flips each image with a probability of 1/2 along each axis, and turns some.

  Args:
    images: [b, h, w, c] in [0, 1].
    flip: 'none', 'horizontal' or 'both'.
    turn: the largest angle to either side, in degrees; what comes in from outside is mirrored.
    share: of the images that are turned.
  """
  keys = jax.random.split(key, 4)
  if flip != 'none':
    images = _flipped(images, keys[0], axis=2)
  if flip == 'both':
    images = _flipped(images, keys[1], axis=1)
  if turn:
    angles = jnp.deg2rad(turn) * jax.random.uniform(keys[2], (len(images),), minval=-1, maxval=1)
    angles = jnp.where(jax.random.uniform(keys[3], (len(images),)) < share, angles, 0.0)
    images = rotated(images, angles)
  return images


def _flipped(images, key, axis):
  """Flips each image along an axis, or leaves it."""
  which = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
  return jnp.where(which, jnp.flip(images, axis), images)


def rotated(images: jax.Array, angles: jax.Array, *, order: int = 1, mode: str = 'mirror') -> jax.Array:
  """Turns images [b, h, w, c] counter-clockwise about their middle, by angles [b] in radians.

  Args:
    order: 1 for bilinear interpolation, 0 for the nearest pixel.
    mode: what comes in from outside: 'mirror' for the image mirrored about its border pixels, 'constant' for
      zeros.

  >>> image = jnp.arange(9.0).reshape(1, 3, 3, 1)
  >>> rotated(image, jnp.array([jnp.pi / 2]))[0, :, :, 0].round().astype(int).tolist()
  [[2, 5, 8], [1, 4, 7], [0, 3, 6]]
  """
  h, w = images.shape[1:3]
  y, x = jnp.meshgrid(jnp.arange(h) - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2, indexing='ij')

  def one(image, angle):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    places = [cos * y + sin * x + (h - 1) / 2, cos * x - sin * y + (w - 1) / 2]
    turned = [jax.scipy.ndimage.map_coordinates(image[..., c], places, order, mode)
              for c in range(image.shape[-1])]
    return jnp.stack(turned, axis=-1)

  return jax.vmap(one)(images, angles.astype(jnp.float32))


def cropped(images: jax.Array, key: jax.Array, size: int) -> jax.Array:
  """Cuts a square of `size` pixels from a random place of each image [b, h, w, c]."""
  if images.shape[1:3] == (size, size):
    return images
  room = jnp.array(images.shape[1:3]) - size + 1
  corners = jax.random.randint(key, (len(images), 2), 0, room)
  return jax.vmap(lambda image, corner: lax.dynamic_slice(
      image, (corner[0], corner[1], 0), (size, size, image.shape[-1])))(images, corners)
