"""Networks that describe patches, of one patch or of all patches of an image at once (Bergmann, Fauser,
Sattlegger and Steger, "Uninformed Students", CVPR 2020, as public implementations reconstruct them).

A network is run in one of three ways: on a patch of just its receptive field, which gives one descriptor; on
an image, which gives a descriptor for every few pixels, as many as its pooling has; or densely, for every
pixel, where pooling has stride 1 and what follows it skips pixels instead.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from patchcore_jax.learned.layers import ConvWithin, larger, max_pool

# By receptive field: the size of the kernel, how many times the width it has as channels (0: those of the
# descriptor), and whether there is pooling behind it.
_LAYERS = {
    17: ((6, 1, False), (5, 2, False), (5, 2, False), (4, 0, False)),
    33: ((5, 1, True), (5, 2, True), (2, 2, False), (4, 0, False)),
    65: ((5, 1, True), (5, 1, True), (5, 2, True), (4, 2, False), (1, 0, False))}
STRIDES = {17: 1, 33: 4, 65: 8}  # of a run that is not dense, in pixels
# What reaches a descriptor: of an odd number of rows, pooling leaves out the last.
EXTENTS = {17: 17, 33: 32, 65: 60}
_leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.005)


class PatchNet(nn.Module):
  """Describes patches: images [b, h, w, c] -> descriptors [b, rows, columns, descriptor].

  Attributes:
    field: the receptive field, 17, 33 or 65 pixels by name; see `EXTENTS`.
    width: channels of the first layer; 128 in the paper.
    descriptor: numbers that describe a patch; 128 in the paper.
    dense: whether there is a descriptor for the patch at every pixel.
  """

  field: int
  width: int = 128
  descriptor: int = 128
  dense: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    apart = 1  # pixels between two that a kernel takes
    for i, (size, times, pooled) in enumerate(_LAYERS[self.field]):
      x = _leaky_relu(x) if i else x
      x = ConvWithin(times * self.width or self.descriptor, size, dilation=apart)(x)
      if pooled:  # before the activation, which keeps the order
        x = _largest_near(x, apart) if self.dense else max_pool(x)
        apart *= 2 if self.dense else 1
    return x


def _largest_near(x, apart):
  """Takes the largest of 2 x 2 cells so far apart, for every cell that has them."""
  x = larger(x[:, :-apart], x[:, apart:])
  return larger(x[:, :, :-apart], x[:, :, apart:])


def surrounded(images: jax.Array, field: int, dense: bool) -> jax.Array:
  """Mirrors images [b, h, w, c] at their borders, so that every cell of stride pixels has a descriptor.

  The patch of each has its middle in the middle of the cell, or half a pixel before it.
  """
  margin = EXTENTS[field] - (1 if dense else STRIDES[field])
  sides = margin // 2, margin - margin // 2
  return jnp.pad(images, ((0, 0), sides, sides, (0, 0)), 'reflect')
