"""Makes uint8 arrays of the size that the network sees from image files, and likewise from masks.

The order is: decode to RGB, resize, pad, crop. Defaults are those of the paper's released code:
short side to 256 with Pillow's antialiased bilinear filter, centre crop of 224. Scaling to
(rgb / 255 - mean) / std happens on the device, in `backbones.normalize`, so that a quarter of the
bytes is sent there.
"""

import collections
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops

from patchcore_jax.data import decoding, decoding_memory, image_contents
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.settings import Preprocessing, as_pair

# An image of 20 x 20000 pixels resized to 256 x 256000 still passes; one of 1 x 10^6 would fill the memory.
_MOST_PIXELS = 10**8
# The whole of an image of one's own: its short side, and how many squares of that its area is at most.
SHORT_SIDE, _MOST_SQUARES = 224, 4


def load(
    example: Example, preprocessing: Preprocessing, *, with_mask: bool = False,
    max_pixels: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
  """Reads and preprocesses one example.

  Args:
    example: what to read.
    preprocessing: what is done to it.
    with_mask: also read the mask. A good image has an all-False one.
    max_pixels: as of `decoding.decode`.

  Returns:
    image [h, w, 3] uint8 RGB, and mask [h, w] bool (None unless `with_mask`).

  Raises:
    ImageError: unreadable file, mask of another size than its image, image smaller than the crop.
  """
  with decoding_memory.one_at_a_time():
    image = decoding.read_image(
        example.image_path, example.read, preprocessing=preprocessing, max_pixels=max_pixels)
    try:
      pixels = np.asarray(transform(image, preprocessing))
    except ValueError as e:
      raise ImageError(f'{example.image_path}: {e}') from e
    size = image.size
    del image  # a large one makes room for the next
  if not with_mask:
    return pixels, None
  if not example.mask_paths:
    return pixels, np.zeros(pixels.shape[:2], bool)
  return pixels, transform_mask(joined_mask(example, size), preprocessing)


def joined_mask(example: Example, size: tuple[int, int]) -> Image.Image:
  """Decodes the masks of an image with any, and joins them: mode 'L', 255 where one of them marks a pixel.

  Args:
    example: the image.
    size: its (width, height), upright.

  Raises:
    ImageError: an unreadable mask, or one of another size than its image.
  """
  mask = None
  for path in example.mask_paths:
    part = decoding.read_mask(path, example.read)
    if part.size != size and part.size == size[::-1] and not turned_by(path, example.read):
      # The mask was drawn on the photograph as it is stored, and lies as that does.
      part = decoding.turned(part, turned_by(example.image_path, example.read))
    if part.size != size:
      raise ImageError(
          f'The mask {path} is {part.width} x {part.height} pixels, its image {example.image_path} is '
          f'{size[0]} x {size[1]}: expected the same size.')
    mask = part if mask is None else ImageChops.lighter(mask, part)
  return mask


def turned_by(path: str, read: Any = None) -> int:
  """Returns EXIF's number of how an image file is turned; 0 where it stands upright."""
  found = image_contents.contents(path, read).orientation
  return found if found in range(2, 9) else 0


def transform_mask(mask: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
  """Resizes, pads and crops a mask of mode 'L' with its image: [h, w] bool.

  Raises:
    ValueError: as `transform`.
  """
  resized = np.asarray(transform(mask, preprocessing, nearest=preprocessing.mask_resize == 'nearest'))
  return resized >= np.ceil(255 * preprocessing.mask_threshold)


def transform(
    image: Image.Image, preprocessing: Preprocessing, *, nearest: bool = False) -> Image.Image:
  """Resizes, pads and crops one decoded image or mask (modes 'RGB' and 'L').

  Args:
    image: what `decoding.read_image` or `read_mask` returns.
    preprocessing: sizes.
    nearest: resize without interpolation, taking pixel floor(i * old / new).

  Raises:
    ValueError: the image is smaller than the crop, or so thin that resizing makes it enormous.

  >>> transform(Image.new('RGB', (700, 500)), Preprocessing()).size
  (224, 224)
  >>> transform(Image.new('L', (700, 500)), Preprocessing(crop=())).size  # (width, height)
  (358, 256)
  """
  geometry = geometry_of(image.height, image.width, preprocessing)
  height, width = geometry.resized
  if nearest:
    rows = np.arange(height) * image.height // height
    columns = np.arange(width) * image.width // width
    image = Image.fromarray(np.asarray(image)[rows[:, None], columns])
  elif (height, width) != (image.height, image.width):
    image = image.resize((width, height), Image.Resampling.BILINEAR)
  if any(map(any, geometry.pad)):
    pixels = np.asarray(image)
    # Padding is not part of the object: a defect at the border must not grow into it.
    mode = {'mode': 'constant'} if image.mode == 'L' else {'mode': 'edge'}
    image = Image.fromarray(np.pad(pixels, (*geometry.pad, (0, 0))[:pixels.ndim], **mode))
  (top, left), (height, width) = geometry.crop, geometry.size
  if (height, width) != (image.height, image.width):
    image = image.crop((left, top, left + width, top + height))
  return image


class Geometry(NamedTuple):
  """What `transform` does to images of one size; every size and position is (height, width) or (y, x).

  Attributes:
    resized: size after resizing.
    pad: pixels added then, ((above, below), (left, right)).
    crop: the upper left pixel of the padded image that is kept.
    size: size of the result.
  """

  resized: tuple[int, int]
  pad: tuple[tuple[int, int], tuple[int, int]]
  crop: tuple[int, int]
  size: tuple[int, int]


def geometry_of(height: int, width: int, preprocessing: Preprocessing) -> Geometry:
  """Computes where the pixels of an image of this size go.

  Raises:
    ValueError: the image is smaller than the crop after resizing and padding, or so long and thin
      that resizing would make it huge.

  >>> geometry_of(500, 700, Preprocessing())
  Geometry(resized=(256, 358), pad=((0, 0), (0, 0)), crop=(16, 67), size=(224, 224))
  """
  resized = resized_size(height, width, preprocessing)
  if resized[0] * resized[1] > max(_MOST_PIXELS, height * width):
    raise ValueError(
        f'the image is {width} x {height} pixels and would be {resized[1]} x {resized[0]} after '
        f'resizing, more than {_MOST_PIXELS / 1e6:.0f} million pixels: cut it into pieces, or set '
        'preprocess.resize=(height, width).')
  pad = ((0, 0), (0, 0))
  if preprocessing.pad:
    missing = [max(p - s, 0) for p, s in zip(as_pair(preprocessing.pad), resized)]
    pad = tuple((m // 2, m - m // 2) for m in missing)
  size = tuple(s + before + after for s, (before, after) in zip(resized, pad))
  if not preprocessing.crop:
    return Geometry(resized, pad, (0, 0), size)
  crop = as_pair(preprocessing.crop)
  if crop[0] > size[0] or crop[1] > size[1]:
    raise ValueError(
        f'the image is {size[1]} x {size[0]} pixels after resizing, smaller than the '
        f'crop of {crop[1]} x {crop[0]} (width x height): choose a smaller preprocess.crop, a '
        'larger preprocess.resize, or set preprocess.pad.')
  # Half pixels are rounded to even, as torchvision's CenterCrop does.
  return Geometry(resized, pad, tuple(round((s - c) / 2) for s, c in zip(size, crop)), crop)


def not_inspected(height: int, width: int, preprocessing: Preprocessing) -> float:
  """Computes the share of an image that a crop keeps from the network, 0 to 1.

  Args:
    height, width: size of the image, upright, in pixels.
    preprocessing: what is done to it.

  Raises:
    ValueError: an image that `transform` refuses.

  >>> round(not_inspected(500, 500, Preprocessing()), 2)  # the paper's crop: 224 of 256, on both axes
  0.23
  >>> not_inspected(500, 2000, Preprocessing(resize=(224, 896), crop=()))
  0.0
  """
  geometry, seen = geometry_of(height, width, preprocessing), 1.0
  for first, size, length, (before, _) in zip(geometry.crop, geometry.size, geometry.resized, geometry.pad):
    begin, end = (min(max(edge - before, 0), length) for edge in (first, first + size))
    seen *= (end - begin) / length
  return 1 - seen


def usual_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
  """Finds the size that stands for images of several sizes: the most frequent of the most frequent shape.

  Where several are as frequent, it is the one whose shape is nearest to the median, and then the largest.

  Args:
    sizes: (width, height) of each image, or a mapping of sizes to how many images have them; not empty.

  >>> usual_size([(400, 300), (401, 300), (500, 200), (500, 200), (800, 600)])
  (800, 600)
  """
  counts = collections.Counter(sizes)
  shapes = collections.Counter()
  for (width, height), n in counts.items():
    shapes[whole_size(height, width)] += n
  aspects = sorted(math.log(width / height) for (width, height), n in counts.items() for _ in range(n))
  median = aspects[len(aspects) // 2]

  def rank(size):
    width, height = size
    return (shapes[whole_size(height, width)], counts[size],
            -round(abs(math.log(width / height) - median), 2), width * height, size)

  return max(counts, key=rank)


def whole_size(height: int, width: int, multiple: int = 32) -> tuple[int, int]:
  """Computes the size at which the network sees all of an image: about its aspect, the short side 224 pixels.

  The area is at most four times that of 224 x 224: of images longer than 4 : 1 the short side becomes
  smaller, and where it would be less than `multiple`, the long one shorter than the aspect asks for.

  Args:
    height, width: size of the image in pixels.
    multiple: what both sides become multiples of.

  Returns:
    (height, width).

  >>> whole_size(480, 1280), whole_size(500, 2000), whole_size(300, 3000)
  ((224, 608), (224, 896), (128, 1280))
  """
  most = _MOST_SQUARES * SHORT_SIDE**2

  def rounded(length):
    return max(1, round(length / multiple)) * multiple

  aspect = max(height, width) / min(height, width)
  short = rounded(SHORT_SIDE)
  long = rounded(short * aspect)
  if short * long > max(most, short**2):
    short = max(1, int(math.sqrt(most / aspect) / multiple)) * multiple
    long = min(rounded(short * aspect), max(1, most // short // multiple) * multiple)
  return (short, long) if height <= width else (long, short)


def whole_image(sizes: Iterable[tuple[int, int]], multiple: int = 32) -> Preprocessing:
  """Chooses the preprocessing by which all of every image is seen, images of several sizes on one grid.

  Args:
    sizes: as of `usual_size`, for whose size the grid is made.
    multiple: what the sides of the network's input are multiples of.

  >>> whole_image([(2000, 500)] * 8 + [(1000, 500)])
  Preprocessing(resize=(224, 896), resize_side='short', pad=(), crop=(), ...
  """
  width, height = usual_size(sizes)
  return Preprocessing(resize=whole_size(height, width, multiple), crop=())


def resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
  """Computes the size (height, width) after resizing, before padding and cropping.

  >>> resized_size(500, 700, Preprocessing())
  (256, 358)
  """
  resize = preprocessing.resize
  if len(resize) != 1:
    return as_pair(resize) if resize else (height, width)
  short, long = sorted((height, width))
  if preprocessing.resize_side == 'short':
    new_short, new_long = resize[0], int(resize[0] * long / short)
  else:
    new_short, new_long = max(1, int(resize[0] * short / long)), resize[0]
  return (new_short, new_long) if height <= width else (new_long, new_short)
