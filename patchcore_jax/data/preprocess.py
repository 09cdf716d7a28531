"""Makes uint8 arrays of the size that the network sees from image files, and likewise from masks.

The order is: decode to RGB, resize, pad, crop. Defaults are those of the paper's released code:
short side to 256 with Pillow's antialiased bilinear filter, centre crop of 224. Scaling to
(rgb / 255 - mean) / std happens on the device, in `backbones.normalize`, so that a quarter of the
bytes is sent there.
"""

import io
import os
import struct
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from patchcore_jax.data.folder import Example
from patchcore_jax.settings import Preprocessing, as_pair

# What Pillow may try. Its other readers are many, less used, and one starts a program (EPS, Ghostscript).
FORMATS = ('PNG', 'JPEG', 'BMP', 'DIB', 'TIFF', 'WEBP', 'GIF', 'PPM')
# An image of 20 x 20000 pixels resized to 256 x 256000 still passes; one of 1 x 10^6 would fill the memory.
_MOST_PIXELS = 10**8


# What Pillow's decoders raise on broken files is not documented; these are what fuzzing shows.
DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError, MemoryError,
    struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
  """An image or mask file that cannot be used; the message names the file and the remedy."""


class UnknownFormatError(ImageError):
  """The content is of none of `FORMATS`."""


class TooManyPixelsError(ImageError):
  """The header tells of more pixels than are allowed; none was decoded."""


def load(
    example: Example, preprocessing: Preprocessing, *, with_mask: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
  """Reads and preprocesses one example.

  Args:
    example: what to read.
    preprocessing: sizes.
    with_mask: also read the mask. A good image has an all-False one.

  Returns:
    image [h, w, 3] uint8 RGB, and mask [h, w] bool (None unless `with_mask`).

  Raises:
    ImageError: unreadable file, mask of another size than its image, image smaller than the crop.
  """
  image = read_image(example.image_path, example.read, page=example.page)
  try:
    pixels = np.asarray(transform(image, preprocessing))
  except ValueError as e:
    raise ImageError(f'{example.image_path}: {e}') from e
  if not with_mask:
    return pixels, None
  if not example.mask_paths:
    return pixels, np.zeros(pixels.shape[:2], bool)
  mask = None
  for path in example.mask_paths:
    part = read_mask(path, example.read)
    if part.size != image.size:
      raise ImageError(
          f'The mask {path} is {part.width} x {part.height} pixels, its image {example.image_path} is '
          f'{image.width} x {image.height}: expected the same size.')
    mask = part if mask is None else ImageChops.lighter(mask, part)
  resized = np.asarray(transform(mask, preprocessing, nearest=preprocessing.mask_resize == 'nearest'))
  return pixels, resized >= np.ceil(255 * preprocessing.mask_threshold)


def read_image(
    path: str | os.PathLike, read: Callable[[str], bytes] | None = None, *, page: int = 0,
    max_pixels: int | None = None,
) -> Image.Image:
  """Decodes an image file of any mode to 8-bit RGB, turned upright by its EXIF orientation.

  16-bit grayscale is scaled from its full range, so that 65535 becomes 255; transparency is
  dropped, as Pillow's conversion to RGB does.

  Args:
    path: the file, as messages name it.
    read: gives its bytes, where it is no file on disk.
    page: number of the page, or of the frame of an animation, from 0.
    max_pixels: images of more pixels are refused before they are decoded; None for Pillow's limit against
      decompression bombs alone (twice `Image.MAX_IMAGE_PIXELS`, 179 million).

  Raises:
    UnknownFormatError: the content is no image of a known format.
    TooManyPixelsError: the image is larger than allowed.
    ImageError: (the two above are kinds of it) the file is missing, truncated, damaged, or holds 32-bit
      integers or floats, whose range is not known.
  """
  return _to_rgb(_open(path, read, page, max_pixels), path)


def read_mask(
    path: str | os.PathLike, read: Callable[[str], bytes] | None = None) -> Image.Image:
  """Decodes a mask file to mode 'L': 255 where the file is not zero (black), 0 elsewhere.

  Arguments and errors are those of `read_image`.
  """
  image = _open(path, read)
  if image.mode in ('P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LA', 'PA'):
    values = np.asarray(image.convert('RGB')).any(axis=-1)
  else:
    values = np.asarray(image) != 0
  return Image.fromarray(np.where(values, 255, 0).astype(np.uint8))


def transform(
    image: Image.Image, preprocessing: Preprocessing, *, nearest: bool = False) -> Image.Image:
  """Resizes, pads and crops one decoded image or mask (modes 'RGB' and 'L').

  Args:
    image: what `read_image` or `read_mask` returns.
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


def _open(path, read, page=0, max_pixels=None) -> Image.Image:
  """Decodes an image and turns it upright; every failure becomes an `ImageError`."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      with Image.open(io.BytesIO(read(path)) if read else path, formats=FORMATS) as image:
        if page:  # otherwise the pages are not counted, which takes time
          if page >= (pages := getattr(image, 'n_frames', 1)):
            raise ImageError(f'{path} has {pages} pages: there is no page {page}, counted from 0.')
          image.seek(page)
        if max_pixels is not None and image.width * image.height > max_pixels:
          raise TooManyPixelsError(
              f'{path} is refused: it is {image.width} x {image.height} pixels, allowed are '
              f'{max_pixels / 1e6:g} megapixels. Make it smaller.')
        image.load()
        return ImageOps.exif_transpose(image)
  except FileNotFoundError as e:
    raise ImageError(f'No such image file: {path}.') from e
  except ImageError:
    raise
  except Image.DecompressionBombError as e:
    raise TooManyPixelsError(f'{path} is refused: {e} Make it smaller.') from e
  except UnidentifiedImageError as e:
    raise UnknownFormatError(
        f'Cannot read {path}: its content is not a known image format ({", ".join(FORMATS)}). Replace or '
        'remove it.') from e
  except DECODING_ERRORS as e:
    raise ImageError(
        f'Cannot read {path}: {e or type(e).__name__}. The file is damaged or truncated; replace or '
        'remove it.') from e


def _to_rgb(image: Image.Image, path: str | os.PathLike) -> Image.Image:
  if image.mode in ('I', 'F'):
    values = np.asarray(image)
    # 16-bit files of some formats are decoded as 32-bit integers.
    if image.mode == 'F' or values.min() < 0 or values.max() > 65535:
      raise ImageError(
          f'{path} holds {"floats" if image.mode == "F" else "32-bit integers"} whose range is not '
          'known: convert it to 8 or 16 bits a channel.')
    image = _from_16_bit(values)
  elif image.mode.startswith('I;16'):
    image = _from_16_bit(np.asarray(image))
  elif image.mode == 'P' and 'transparency' in image.info:
    image = image.convert('RGBA')  # a palette with transparency warns on the direct way
  return image.convert('RGB')


def _from_16_bit(values: np.ndarray) -> Image.Image:
  """Scales 16-bit values to 8 bits, full range to full range: 257 * v becomes v, rounded."""
  result = np.empty(values.shape, np.uint8)
  rows = max(1, 2**20 // values.shape[1])  # at a time: the steps between take several times as much memory
  for i in range(0, len(values), rows):
    result[i:i + rows] = (values[i:i + rows].astype(np.uint32) + 128) // 257
  return Image.fromarray(result)
