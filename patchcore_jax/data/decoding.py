"""Decodes image files of any mode to 8-bit RGB, upright, and masks to numbers.

What a file has beyond 8 bits, three bands and opaque pixels is brought to them as `Preprocessing` says, or
the file is refused: nothing is dropped unsaid. `image_contents` tells by the header what a file has.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from patchcore_jax.data import image_values
from patchcore_jax.data.image_contents import Contents, Source, contents_of, opened
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.image_files import Read, split_page
from patchcore_jax.data.image_values import Values
from patchcore_jax.settings import Preprocessing

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


class Decoded(NamedTuple):
  """A decoded image.

  Attributes:
    image: mode 'RGB', upright.
    outside: the share of its pixels whose value lies outside of the value range, 0 to 1; 0.0 for 8-bit files.
    full_range: whether values of more than 8 bits were read without such a range, from 0 to 65535.
  """

  image: Image.Image
  outside: float = 0.0
  full_range: bool = False


def decode(
    path: str | os.PathLike, preprocessing: Preprocessing, read: Read = None, *,
    max_pixels: int | None = None) -> Decoded:
  """Decodes an image file as `preprocessing` says (value range, bands, background), not yet resized.

  Args:
    path: the file, as messages name it; NAME#2 is the second page of a file with several.
    preprocessing: how deep, banded and transparent files are read.
    read: gives the file's bytes, where it is no file on disk.
    max_pixels: images of more pixels are refused before they are decoded; None for the default of
      `DataSpec.max_megapixels`.

  Raises:
    UnknownFormatError: the content is no image of a known format.
    TooManyPixelsError: the image is larger than allowed.
    ImageError: (the two above are kinds of it) the file is missing, truncated, damaged, has bands of which
      none were chosen, or holds 32-bit integers or floats, whose range is not known.
  """
  with opened(path, read, max_pixels) as source:
    _check_bands(path, source.contents, preprocessing)
    if image_values.are_needed(source, preprocessing):
      return _scaled(path, source, preprocessing)
    image = source.image
    image.load()
    ImageOps.exif_transpose(image, in_place=True)  # otherwise a copy even of what stands upright
    return Decoded(_flat_colours(image, preprocessing), full_range=source.contents.deep)


def read_image(
    path: str | os.PathLike, read: Read = None, *, preprocessing: Preprocessing | None = None,
    max_pixels: int | None = None) -> Image.Image:
  """Decodes an image file as `decode` does, with the defaults where no preprocessing is given."""
  return decode(path, preprocessing or Preprocessing(), read, max_pixels=max_pixels).image


def convert(image: Image.Image, preprocessing: Preprocessing) -> Decoded:
  """Converts an image at hand as `decode` does files.

  Raises:
    ValueError: 32-bit integers or floats whose range is not known, or bands that it does not have.
  """
  image = ImageOps.exif_transpose(image)
  source = Source(image, None, None, contents_of(image), 0)
  _check_bands('The image', source.contents, preprocessing)
  if image_values.are_needed(source, preprocessing):
    return _scaled('The image', source, preprocessing)
  return Decoded(_flat_colours(image, preprocessing), full_range=source.contents.deep)


def blocks(
    path: str | os.PathLike, preprocessing: Preprocessing, read: Read = None, *,
    max_pixels: int | None = None) -> Iterator[Values]:
  """Yields the values of an image file a few rows at a time, not scaled, and perhaps not turned upright.

  Arguments and errors are those of `decode`.
  """
  with opened(path, read, max_pixels) as source:
    _check_bands(path, source.contents, preprocessing)
    yield from image_values.blocks(source, preprocessing)


def read_mask(path: str | os.PathLike, read: Read = None) -> Image.Image:
  """Decodes a mask file to mode 'L': 255 where the file is not zero (black) nor transparent, 0 elsewhere.

  Arguments and errors are those of `read_image`.
  """
  return Image.fromarray(np.where(mask_values(path, read) != 0, 255, 0).astype(np.uint8))


def mask_values(path: str | os.PathLike, read: Read = None) -> np.ndarray:
  """Decodes a mask file to what it has in each pixel: [h, w] numbers, 0 where nothing is marked.

  Of colours the numbers are red + 256 green + 65536 blue. A mask of one colour whose transparency varies is
  its transparency; of others, transparent pixels are 0. Arguments and errors are those of `read_image`.

  Raises:
    ImageError: as `read_image`, and for a mask of several pages.
  """
  with opened(path, read, None) as source:
    contents, image = source.contents, source.image
    if contents.pages > 1 and split_page(path, read)[0] == os.fspath(path):
      raise ImageError(f'The mask {path} has {contents.pages} pages: expected one.')
    if image is None or contents.deep and (contents.bands > 1 or contents.alpha):
      parts = list(image_values.blocks(source, Preprocessing()))
      values = np.concatenate([part.values.any(axis=-1) for part in parts]).astype(np.uint8)
      if parts[0].alpha is not None:
        values = _with_alpha(values, np.concatenate([part.alpha for part in parts]))
      return np.asarray(turned(Image.fromarray(values), image_values.still_to_turn(source)))
    image.load()
    image = ImageOps.exif_transpose(image)
    if contents.alpha:
      image = _with_transparency(image)
      *colours, alpha = (np.asarray(band) for band in image.split())
      numbers = sum(band.astype(np.uint32) << 8 * i for i, band in enumerate(colours))
      return _with_alpha(numbers, alpha)
    if image.mode in ('P', 'RGB', 'CMYK', 'YCbCr', 'LAB'):
      return np.asarray(image.convert('RGB')) @ np.array([1, 256, 65536], np.uint32)
    return np.asarray(image)


def turned(image: Image.Image, orientation: int) -> Image.Image:
  """Turns an image or a mask upright by EXIF's number of its orientation."""
  return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _check_bands(path, contents: Contents, preprocessing: Preprocessing) -> None:
  """Raises ImageError for bands that a file lacks, and for more than three where none are chosen."""
  wanted, have = preprocessing.bands, f'{path} has {contents.bands} band{"s"[:contents.bands > 1]}'
  if wanted and max(wanted) > contents.bands:
    raise ImageError(
        f'{have}, and the bands {", ".join(map(str, wanted))} are to be read (bands): expected a file that '
        'has them.')
  if not wanted and contents.bands not in (1, 3):
    example = '1,2,2' if contents.bands == 2 else '1,2,3'
    raise ImageError(
        f'{have}, and the network sees three: have a model fitted on three of them, such as --bands '
        f'{example}, or write files of one band or three.')


def _flat_colours(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
  """Converts what Pillow decoded to RGB; transparent pixels get the colour of the background."""
  on_background = False
  if 'transparency' in image.info or image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa'):
    image = _with_transparency(image)
    on_background = bool(preprocessing.background) and image.getchannel('A').getextrema()[0] < 255
  if not on_background and not preprocessing.bands:
    return image.convert('RGB')
  result, rows = Image.new('RGB', image.size), max(1, 2**20 // image.width)
  for top in range(0, image.height, rows):  # the steps between take several times as much memory
    part = image.crop((0, top, image.width, min(top + rows, image.height)))
    if on_background:
      under = Image.new('RGBA', part.size, (*preprocessing.background, 255))
      under.alpha_composite(part.convert('RGBA'))
      part = under
    if preprocessing.bands:
      bands = (part if part.mode in ('1', 'L') else part.convert('RGB')).split()
      part = Image.merge('RGB', [bands[b - 1].convert('L') for b in preprocessing.bands])
    result.paste(part.convert('RGB'), (0, top))
  return result


def _with_transparency(image: Image.Image) -> Image.Image:
  """Converts an image that has transparency in any way to mode 'LA' or 'RGBA'."""
  if image.mode == 'La':
    return image.convert('LA')
  return image if image.mode in ('LA', 'RGBA') else image.convert('RGBA')


def _with_alpha(numbers: np.ndarray, alpha: np.ndarray) -> np.ndarray:
  """Joins the colours and the transparency of a mask, as `mask_values` says."""
  if (numbers == numbers[:1, :1]).all() and (alpha != alpha[:1, :1]).any():
    return alpha
  return np.where(alpha > 0, numbers, 0)


def _scaled(path, source: Source, preprocessing: Preprocessing) -> Decoded:
  """Scales values to 8 bits by the value range, and lays transparent pixels on the background."""
  contents, background, stored = source.contents, preprocessing.background, image_values.stored_size(source)
  coloured = bool(preprocessing.bands) or contents.bands == 3 or contents.alpha
  result = np.empty((stored[1], stored[0], 3 if coloured else 1), np.uint8)
  row = outside = 0
  for part in image_values.blocks(source, preprocessing):
    for rows in image_values.row_blocks(part.values):
      alpha = None if part.alpha is None else part.alpha[rows]
      values = part.values[rows]
      if part.premultiplied:
        values = values / np.maximum(alpha, 1e-6)[..., None]
      if contents.deep and preprocessing.value_range:
        values, far = _in_range(values, *preprocessing.value_range)
        outside += np.count_nonzero(far if alpha is None else far & (alpha > 0))
      elif contents.deep:
        values = _from_full_range(path, values, contents)
      if alpha is not None and background:
        values = np.rint(values * alpha[..., None] + np.float32(background) * (1 - alpha[..., None]))
      result[row:row + len(values)] = values
      row += len(values)
  if row != stored[1]:
    raise ValueError('rows are missing')
  image = Image.fromarray(result if coloured else result[..., 0]).convert('RGB')
  return Decoded(
      turned(image, image_values.still_to_turn(source)), outside / (stored[0] * stored[1]),
      contents.deep and not preprocessing.value_range)


def _in_range(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
  """Scales values [..., c] from the range to 0 to 255, and finds the pixels [...] that lie outside of it."""
  with np.errstate(invalid='ignore'):
    far = ~((values >= low) & (values <= high)).all(axis=-1)  # NaN is
    scaled = np.rint((np.clip(values, low, high).astype(np.float64) - low) * (255 / (high - low)))
  return np.nan_to_num(scaled, nan=0.0).astype(np.uint8), far


def _from_full_range(path, values: np.ndarray, contents: Contents) -> np.ndarray:
  """Scales 16-bit values to 8 bits, full range to full range: 257 * v becomes v, rounded.

  Raises:
    ImageError: floats, or integers of more than 16 bits.
  """
  # Some 16-bit files are decoded as 32-bit integers.
  if contents.floats or values.dtype.kind == 'f' or values.min() < 0 or values.max() > 65535:
    what = f'{contents.bits}-bit {"floats" if contents.floats else "integers"}'
    raise ImageError(
        f'{path} holds {what} whose range is not known: fit on such files, which measures it, or set it in '
        'a fit (--value-range LOW,HIGH). A model of other files takes 8 or 16 bits a value: convert it.')
  return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
