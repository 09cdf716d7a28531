"""Decodes image files of any mode to 8-bit RGB, upright, and masks to black and white.

What a file has beyond 8 bits, three bands and opaque pixels is brought to them as `Preprocessing` says, or
the file is refused: nothing is dropped unsaid.
"""

import io
import os
import re
import struct
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patchcore_jax.settings import Preprocessing

# What Pillow may try. Its other readers are many, less used, and one starts a program (EPS, Ghostscript).
FORMATS = ('PNG', 'JPEG', 'BMP', 'DIB', 'TIFF', 'WEBP', 'GIF', 'PPM')
# What Pillow's decoders raise on broken files is not documented; these are what fuzzing shows.
DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError, MemoryError,
    struct.error, Image.DecompressionBombError)
_PAGE = re.compile(r'(.+)#([1-9][0-9]{0,8})', re.DOTALL)

Read = Callable[[str], bytes] | None


class ImageError(ValueError):
  """An image or mask file that cannot be used; the message names the file and the remedy."""


class UnknownFormatError(ImageError):
  """The content is of none of `FORMATS`."""


class TooManyPixelsError(ImageError):
  """The header tells of more pixels than are allowed; none was decoded."""


class Decoded(NamedTuple):
  """A decoded image.

  Attributes:
    image: mode 'RGB', upright.
    outside: the share of its pixels whose value lies outside of the value range, 0 to 1; 0.0 for 8-bit files.
  """

  image: Image.Image
  outside: float


def decode(
    path: str | os.PathLike, preprocessing: Preprocessing, read: Read = None, *,
    max_pixels: int | None = None) -> Decoded:
  """Decodes an image file as `preprocessing` says (value range, bands, background), not yet resized.

  Args:
    path: the file, as messages name it; NAME#2 is the second page of a file with several.
    preprocessing: how deep, banded and transparent files are read.
    read: gives the file's bytes, where it is no file on disk.
    max_pixels: images of more pixels are refused before they are decoded; None for Pillow's limit against
      decompression bombs alone (twice `Image.MAX_IMAGE_PIXELS`, 179 million).

  Raises:
    UnknownFormatError: the content is no image of a known format.
    TooManyPixelsError: the image is larger than allowed.
    ImageError: (the two above are kinds of it) the file is missing, truncated, damaged, or holds 32-bit
      integers or floats, whose range is not known.
  """
  image = _open(path, read, max_pixels)
  if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
    values = np.asarray(image)
    if not preprocessing.value_range:
      # 16-bit files of some formats are decoded as 32-bit integers.
      if image.mode == 'F' or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f'{path} holds {"floats" if image.mode == "F" else "32-bit integers"} whose range is not '
            'known: convert it to 8 or 16 bits a channel.')
      return Decoded(_from_16_bit(values).convert('RGB'), 0.0)
    low, high = preprocessing.value_range
    outside = float(((values < low) | (values > high)).mean())
    scaled = np.rint((np.clip(values, low, high) - low) * (255 / (high - low))).astype(np.uint8)
    return Decoded(Image.fromarray(scaled).convert('RGB'), outside)
  if image.mode == 'P' and 'transparency' in image.info:
    image = image.convert('RGBA')  # a palette with transparency warns on the direct way
  return Decoded(image.convert('RGB'), 0.0)


def read_image(
    path: str | os.PathLike, read: Read = None, *, preprocessing: Preprocessing | None = None,
    max_pixels: int | None = None) -> Image.Image:
  """Decodes an image file as `decode` does, with the defaults where no preprocessing is given."""
  return decode(path, preprocessing or Preprocessing(), read, max_pixels=max_pixels).image


def read_mask(path: str | os.PathLike, read: Read = None) -> Image.Image:
  """Decodes a mask file to mode 'L': 255 where the file is not zero (black), 0 elsewhere.

  Arguments and errors are those of `read_image`.
  """
  return Image.fromarray(np.where(mask_values(path, read) != 0, 255, 0).astype(np.uint8))


def mask_values(path: str | os.PathLike, read: Read = None) -> np.ndarray:
  """Decodes a mask file to what it has in each pixel: [h, w] numbers, 0 where nothing is marked.

  Of colours the numbers are red + 256 green + 65536 blue. Arguments and errors are those of `read_image`.
  """
  image = _open(path, read)
  if image.mode in ('P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LA', 'PA'):
    return np.asarray(image.convert('RGB')) @ np.array([1, 256, 65536], np.uint32)
  return np.asarray(image)


def split_page(path: str | os.PathLike, read: Read = None) -> tuple[str, int]:
  """Splits the name of a page into that of its file, and the number of the page from 0.

  A file that really has that name wins.

  >>> split_page('stack.tif#2'), split_page('part.png'), split_page('part #0.png')
  (('stack.tif', 1), ('part.png', 0), ('part #0.png', 0))
  """
  path = os.fspath(path)
  found = _PAGE.fullmatch(path)
  if found is None or read is None and os.path.exists(path):
    return path, 0
  return found[1], int(found[2]) - 1


def num_pages(path: str | os.PathLike, read: Read = None) -> int:
  """Counts the pages of an image file, or the frames of an animation; 1 where it cannot be read."""
  try:
    with Image.open(io.BytesIO(read(os.fspath(path))) if read else path, formats=FORMATS) as image:
      return getattr(image, 'n_frames', 1)
  except DECODING_ERRORS:  # what is wrong with the file is said by whoever decodes it
    return 1


def _open(path, read=None, max_pixels=None) -> Image.Image:
  """Decodes an image and turns it upright; every failure becomes an `ImageError`."""
  file, page = split_page(path, read)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      with Image.open(io.BytesIO(read(file)) if read else file, formats=FORMATS) as image:
        if page:  # otherwise the pages are not counted, which takes time
          if page >= (pages := getattr(image, 'n_frames', 1)):
            raise ImageError(f'{file} has {pages} page{"s"[:pages > 1]}: there is no page {page + 1}.')
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


def _from_16_bit(values: np.ndarray) -> Image.Image:
  """Scales 16-bit values to 8 bits, full range to full range: 257 * v becomes v, rounded."""
  result = np.empty(values.shape, np.uint8)
  rows = max(1, 2**20 // values.shape[1])  # at a time: the steps between take several times as much memory
  for i in range(0, len(values), rows):
    result[i:i + rows] = (values[i:i + rows].astype(np.uint32) + 128) // 257
  return Image.fromarray(result)
