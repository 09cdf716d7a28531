"""Opens image files at one of their pages, and tells by the header what they have.

A file of more pixels than are allowed is refused here, before one is decoded. What `decoding` does with an
open file happens inside of `opened`, so that every failure of it becomes an `ImageError`.
"""

import contextlib
import io
import itertools
import logging
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from patchcore_jax.data import decoding_memory, gif_files, png_files, tiff_files
from patchcore_jax.data.image_errors import ImageError, TooManyPixelsError, UnknownFormatError
from patchcore_jax.data.image_files import Read, split_page
from patchcore_jax.settings import DataSpec

# What Pillow may try. Its other readers are many, less used, and one starts a program (EPS, Ghostscript).
FORMATS = ('PNG', 'JPEG', 'BMP', 'DIB', 'TIFF', 'WEBP', 'GIF', 'PPM')
# What Pillow's decoders raise on broken files is not documented; these are what fuzzing shows.
DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError, MemoryError,
    AttributeError, struct.error, Image.DecompressionBombError)
# It logs an error for TIFFs of more bands than it knows, which are read here all the same.
logging.getLogger('PIL.TiffImagePlugin').setLevel(logging.CRITICAL)
_ADVICE = 'Make it smaller, cut it into pieces, or raise the limit (--max-megapixels, max_megapixels).'
_BYTES_A_PIXEL = 8  # what strips of a TIFF may unpack to, for each pixel that is allowed
# The pictures of a multi-picture JPEG that are the same one smaller, or no picture (depth, gain).
_NO_PICTURES = ('Large Thumbnail', 'Undefined')


class Contents(NamedTuple):
  """What the header of an image file tells.

  Attributes:
    size: (width, height), upright.
    mode: Pillow's name of the mode, '' where it knows none.
    bands: number of values of a pixel, without transparency; 3 for colours of any kind.
    bits: bits of such a value.
    floats: whether the values are floats.
    alpha: whether pixels can be transparent.
    pages: number of pages or frames.
    orientation: EXIF's number of how the image is turned, 1 for not.
  """

  size: tuple[int, int]
  mode: str
  bands: int
  bits: int
  floats: bool
  alpha: bool
  pages: int
  orientation: int

  @property
  def deep(self) -> bool:
    """Whether values have more than 8 bits, and so need a range."""
    return self.bits > 8

  @property
  def kind(self) -> str:
    """Names the kind: Pillow's mode where that says all, else words such as 'gray of 16 bits'."""
    usual = {'1': 1, 'L': 1, 'P': 3, 'RGB': 3, 'CMYK': 3, 'YCbCr': 3, 'LAB': 3}.get(self.mode)
    if self.bands == usual and not self.deep and not self.alpha:
      return self.mode
    bands = {1: 'gray', 3: 'RGB'}.get(self.bands, f'multiband ({self.bands} bands)')
    depth = '' if not self.deep else f' of {self.bits}-bit floats' if self.floats else f' of {self.bits} bits'
    return f'{bands}{depth}{" with transparency" if self.alpha else ""}'


class Source(NamedTuple):
  """An open image file, at one of its pages.

  Attributes:
    image: what Pillow makes of it; None where it knows the kind not.
    file: the file; None for an image at hand.
    directory: the page, of a TIFF.
    contents: what the header tells.
    most_bytes: how much the strips of a TIFF may unpack to.
  """

  image: Image.Image | None
  file: BinaryIO | None
  directory: tiff_files.Directory | None
  contents: Contents
  most_bytes: int


def contents(path: str | os.PathLike, read: Read = None) -> Contents:
  """Tells by its header what an image file has; no pixel is decoded, and its size is not limited.

  Raises:
    ImageError: as `decoding.decode`, as far as the header tells.
  """
  with opened(path, read, -1) as source:
    return source.contents


def num_pages(path: str | os.PathLike, read: Read = None) -> int:
  """Counts the pages of an image file, or the frames of an animation; 1 where it cannot be read."""
  try:
    return contents(path, read).pages
  except ImageError:  # what is wrong with the file is said by whoever decodes it
    return 1


@contextlib.contextmanager
def opened(path: str | os.PathLike, read: Read, max_pixels: int | None) -> Iterator[Source]:
  """Opens an image file at its page, within the limit of pixels; every failure becomes an `ImageError`.

  Arguments are those of `decoding.decode`; a limit below 0 is none, and takes no room for the pixels.
  """
  name, page = split_page(path, read)
  limit = DataSpec().max_pixels if max_pixels is None else max_pixels
  try:
    with contextlib.ExitStack() as stack:
      stack.enter_context(decoding_memory.without_pillows_limit())
      file = stack.enter_context(io.BytesIO(read(name)) if read else open(name, 'rb'))  # noqa: SIM115
      source = stack.enter_context(_at_page(file, name, page, limit))
      width, height = source.contents.size
      if limit >= 0:
        _check_pixels(path, width, height, limit)
        stack.enter_context(decoding_memory.room(width * height))
      yield source
  except FileNotFoundError as e:
    raise ImageError(f'No such image file: {path}.') from e
  except ImageError as e:
    raise e if str(path) in str(e) or name in str(e) else ImageError(f'Cannot read {path}: {e}') from e
  except UnidentifiedImageError as e:
    raise UnknownFormatError(
        f'Cannot read {path}: its content is not a known image format ({", ".join(FORMATS)}). Replace or '
        'remove it.') from e
  except DECODING_ERRORS as e:
    raise ImageError(
        f'Cannot read {path}: {e or type(e).__name__}. The file is damaged or truncated; replace or '
        'remove it.') from e


def contents_of(image: Image.Image, file: BinaryIO | None = None, pages: int = 1) -> Contents:
  """Tells what an image that Pillow opened has; not of a TIFF."""
  bands = 1 if image.mode in ('1', 'L', 'LA', 'La') or image.mode[0] in 'IF' else 3
  bits = {'I': 32, 'F': 32}.get(image.mode, 16 if image.mode[0] == 'I' else 1 if image.mode == '1' else 8)
  if image.format == 'PNG' and file is not None:
    file.seek(24)
    bits, colours = (*file.read(2), 0, 0)[:2]
    bands = 1 if colours in (0, 4) else 3
    bits = 8 if colours == 3 else bits
  elif image.format == 'PPM' and file is not None and image.tile:
    arguments = image.tile[0].args
    if image.mode == 'I' or isinstance(arguments, tuple) and image.mode == 'RGB' and arguments[1] > 255:
      bits = 16
  turn = orientation_of(image)
  size = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
  alpha = image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info
  return Contents(size, image.mode, bands, bits, image.mode == 'F', alpha, pages, turn)


def orientation_of(image: Image.Image) -> int:
  """Returns EXIF's number of how an image is turned, as far as is known: a PNG may tell behind its pixels."""
  return Image.Image.getexif(image).get(0x0112, 1)  # a PNG's own would decode it


@contextlib.contextmanager
def _at_page(file: BinaryIO, name: str, page: int, limit: int) -> Iterator[Source]:
  """Reads the header of a file, and goes to one of its pages."""
  beginning = file.read(4)
  directories = tiff_files.directories(file) if tiff_files.is_tiff(beginning) else None
  if directories is not None:
    _check_page(name, page, len(directories))
  file.seek(0)
  if beginning == b'GIF8':
    _check_frames(file, f'{name}#{page + 1}' if page else name, page, limit)
    file.seek(0)
  try:
    image = Image.open(file, formats=FORMATS)
  except UnidentifiedImageError:
    if directories is None or not directories:
      raise
    image = None  # a TIFF of a kind that Pillow does not know
  try:
    if directories is not None:
      directory, found = directories[page], None
      try:
        if image is not None:
          image.seek(directory.at)
      except SyntaxError:  # so is this page
        image = None
      found = _contents_of_directory(directory, image, len(directories))
      if image is not None and sorted(image.size) != sorted(found.size):
        # A tag that comes twice: the limit of pixels is to hold for what is decoded.
        raise ValueError('it tells of two sizes, {} x {} and {} x {}'.format(*image.size, *found.size))
    else:
      directory, shown = None, _pages(image, file)
      _check_page(name, page, len(shown))
      if page:  # otherwise nothing is sought, which takes time
        image.seek(shown[page])
      found = contents_of(image, file, len(shown))
    yield Source(image, file, directory, found, _BYTES_A_PIXEL * max(limit, 0))
  finally:
    if image is not None:
      image.close()


def _check_page(name, page, pages):
  """Raises ImageError for a page that a file does not have."""
  if page >= max(pages, 1):
    raise ImageError(f'{name} has {pages} page{"s"[:pages > 1]}: there is no page {page + 1}.')


def _check_pixels(path, width: int, height: int, limit: int) -> None:
  """Raises TooManyPixelsError for an image of more pixels than the limit."""
  if width * height > limit:
    raise TooManyPixelsError(
        f'{path} is refused: it is {width} x {height} pixels, {width * height / 1e6:.4g} megapixels; '
        f'allowed are {limit / 1e6:g}. {_ADVICE}')


def _check_frames(file: BinaryIO, name: str, page: int, limit: int) -> None:
  """Raises TooManyPixelsError where a frame of a GIF, up to a page, is larger than the limit.

  Those of other animations are as large as the image.
  """
  limit = limit if limit >= 0 else int(DataSpec.max_megapixels * 1e6)
  for size in itertools.islice(gif_files.sizes(file), page + 1):
    _check_pixels(name, *size, limit)


def _pages(image, file: BinaryIO) -> list[int]:
  """Lists the frames of a file that are images of their own."""
  if image.format == 'MPO':
    kinds = [entry['Attribute']['MPType'] for entry in image.mpinfo[0xB002]]
    return [0, *(i for i in range(1, len(kinds)) if not kinds[i].startswith(_NO_PICTURES))]
  count = getattr(image, 'n_frames', 1)
  if image.format == 'PNG' and count > 1:
    count = min(count, 1 + png_files.count_frames(file))
  return list(range(count))


def _contents_of_directory(
    directory: tiff_files.Directory, image: Image.Image | None, pages: int) -> Contents:
  """Tells what a page of a TIFF has."""
  bands, bits = directory.bands, directory.bits
  if bands <= directory.colours:
    bands = 3 if directory.colours >= 3 or directory.photometric == 3 else 1
    if directory.photometric in (3, 5, 6, 8):
      bits = min(bits, 8)  # of such colours Pillow gives 8 bits of the full range
  turn = directory.orientation
  size = directory.size[::-1] if turn in (5, 6, 7, 8) else directory.size
  return Contents(
      size, image.mode if image else '', bands, bits, directory.kind == 3, directory.alpha is not None, pages,
      turn)
