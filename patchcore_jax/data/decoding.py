"""Decodes image files of any mode to 8-bit RGB, upright, and masks to numbers.

What a file has beyond 8 bits, three bands and opaque pixels is brought to them as `Preprocessing` says, or
the file is refused: nothing is dropped unsaid. `contents` tells by the header what a file has.
"""

import contextlib
import io
import itertools
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patchcore_jax.data import gif_files, tiff_files
from patchcore_jax.settings import DataSpec, Preprocessing

# What Pillow may try. Its other readers are many, less used, and one starts a program (EPS, Ghostscript).
FORMATS = ('PNG', 'JPEG', 'BMP', 'DIB', 'TIFF', 'WEBP', 'GIF', 'PPM')
# What Pillow's decoders raise on broken files is not documented; these are what fuzzing shows.
DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError, MemoryError,
    AttributeError, struct.error, Image.DecompressionBombError)
# It logs an error for TIFFs of more bands than it knows, which are read here all the same.
logging.getLogger('PIL.TiffImagePlugin').setLevel(logging.CRITICAL)
_PAGE = re.compile(r'(.+)#([1-9][0-9]{0,8})', re.DOTALL)
# Images that are decoded at a time have no more pixels, or are one: each takes 4 to 20 bytes a pixel.
_PIXELS_AT_ONCE = 100_000_000
_BLOCK = 2**20  # values that are converted at a time: the steps between take several times their memory
_ADVICE = 'Make it smaller, cut it into pieces, or raise the limit (--max-megapixels, max_megapixels).'
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
_BYTES_A_PIXEL = 8  # what strips of a TIFF may unpack to, for each pixel that is allowed
# The pictures of a multi-picture JPEG that are the same one smaller, or no picture (depth, gain).
_NO_PICTURES = ('Large Thumbnail', 'Undefined')

Read = Callable[[str], bytes] | None


class ImageError(ValueError):
  """An image or mask file that cannot be used; the message names the file and the remedy."""


class UnknownFormatError(ImageError):
  """The content is of none of `FORMATS`."""


class TooManyPixelsError(ImageError):
  """The header tells of more pixels than are allowed; none was decoded."""


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


class Decoded(NamedTuple):
  """A decoded image.

  Attributes:
    image: mode 'RGB', upright.
    outside: the share of its pixels whose value lies outside of the value range, 0 to 1; 0.0 for 8-bit files.
  """

  image: Image.Image
  outside: float


class Values(NamedTuple):
  """Some rows of an image, as the file has them.

  Attributes:
    values: [rows, width, 1 or 3].
    alpha: [rows, width] float32, 0 transparent to 1 opaque; None where all is opaque.
    premultiplied: whether the values are multiplied by alpha already.
  """

  values: np.ndarray
  alpha: np.ndarray | None = None
  premultiplied: bool = False


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
  with _opened(path, read, max_pixels) as source:
    _check_bands(path, source.contents, preprocessing)
    if source.as_values(preprocessing):
      return _scaled(path, source, preprocessing)
    image = source.image
    image.load()
    ImageOps.exif_transpose(image, in_place=True)  # otherwise a copy even of what stands upright
    return Decoded(_flat_colours(image, preprocessing), 0.0)


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
  source = _Source(image, None, None, _contents_of(image), 0)
  _check_bands('The image', source.contents, preprocessing)
  if source.as_values(preprocessing):
    return _scaled('The image', source, preprocessing)
  return Decoded(_flat_colours(image, preprocessing), 0.0)


def blocks(
    path: str | os.PathLike, preprocessing: Preprocessing, read: Read = None, *,
    max_pixels: int | None = None) -> Iterator[Values]:
  """Yields the values of an image file a few rows at a time, not scaled, and perhaps not turned upright.

  Arguments and errors are those of `decode`.
  """
  with _opened(path, read, max_pixels) as source:
    _check_bands(path, source.contents, preprocessing)
    yield from source.blocks(preprocessing)


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
  with _opened(path, read, None) as source:
    contents, image = source.contents, source.image
    if contents.pages > 1 and split_page(path, read)[0] == os.fspath(path):
      raise ImageError(f'The mask {path} has {contents.pages} pages: expected one.')
    if image is None or contents.deep and (contents.bands > 1 or contents.alpha):
      parts = list(source.blocks(Preprocessing()))
      values = np.concatenate([part.values.any(axis=-1) for part in parts]).astype(np.uint8)
      if parts[0].alpha is not None:
        values = _with_alpha(values, np.concatenate([part.alpha for part in parts]))
      return np.asarray(turned(Image.fromarray(values), source.still_to_turn))
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


def contents(path: str | os.PathLike, read: Read = None) -> Contents:
  """Tells by its header what an image file has; no pixel is decoded, and its size is not limited.

  Raises:
    ImageError: as `decode`, as far as the header tells.
  """
  with _opened(path, read, -1) as source:
    return source.contents


def orientation(path: str | os.PathLike, read: Read = None) -> int:
  """Returns EXIF's number of how an image file is turned, 1 for not.

  Raises:
    ImageError: as `contents`.
  """
  return contents(path, read).orientation


def turned(image: Image.Image, orientation: int) -> Image.Image:
  """Turns an image or a mask upright by EXIF's number of its orientation."""
  return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


@contextlib.contextmanager
def one_at_a_time(pixels: int = 0) -> Iterator[None]:
  """Keeps the room of large images that this thread decodes in a block until its end.

  Others that would take too much memory beside them wait for that. Outside of such a block the room is kept
  while decoding alone.

  Args:
    pixels: room for so many is taken at once, for work on an image that was decoded before.
  """
  with _memory.kept(), _memory.room(pixels):
    yield


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
    return contents(path, read).pages
  except ImageError:  # what is wrong with the file is said by whoever decodes it
    return 1


class _Source(NamedTuple):
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

  def as_values(self, preprocessing: Preprocessing) -> bool:
    """Tells whether the values must be read as they are, because Pillow would drop bits or bands."""
    contents = self.contents
    if self.image is None or self._banded:
      return True
    # Without a range, colours of 16 bits keep their upper 8, as Pillow reads them, and banks before did.
    return contents.deep and (bool(preprocessing.value_range) or self.image.mode[0] in 'IF')

  @property
  def _by_samples(self) -> bool:
    """Whether `blocks` reads the samples of a TIFF itself."""
    directory = self.directory
    return directory is not None and (self.image is None or self._banded or directory.samples > 1)

  @property
  def stored_size(self) -> tuple[int, int]:
    """(width, height) of what `blocks` yields. Pillow turns a TIFF itself."""
    return self.directory.size if self._by_samples else self.image.size

  @property
  def still_to_turn(self) -> int:
    """EXIF's number of how what `blocks` yielded is turned; some files tell it behind their pixels."""
    if self.directory is not None:
      return self.contents.orientation if self._by_samples else 1
    return _orientation(self.image)

  @property
  def _banded(self) -> bool:
    """Whether a TIFF has samples that Pillow drops."""
    directory = self.directory
    return directory is not None and directory.bands > directory.colours

  def blocks(self, preprocessing: Preprocessing) -> Iterator[Values]:
    """Yields the values a few rows at a time."""
    image, directory, file = self.image, self.directory, self.file
    if self._by_samples:
      if problem := directory.problem():
        raise ImageError(
            f'it is {self.contents.kind} with {problem}, which is not read: save it with 8 or 16 bits, and '
            'with Deflate, LZW or no compression.')
      yield from (_of_samples(values, directory, preprocessing)
                  for values in tiff_files.blocks(file, directory, self.most_bytes))
    elif image.format == 'PNG' and self.contents.deep and image.mode != 'I;16':
      yield from _of_png(image, self.contents, file, preprocessing)
    elif image.format == 'PPM' and self.contents.deep and image.mode == 'RGB':
      yield from _of_ppm(image, file, preprocessing)
    else:
      image.load()
      values = np.asarray(image)
      key = image.info.get('transparency') if self.contents.alpha else None
      for part in _row_blocks(values):
        part = values[part]
        alpha = None if key is None else (part != key).astype(np.float32)
        yield Values(_chosen(part[..., None] if part.ndim == 2 else part, preprocessing), alpha)


@contextlib.contextmanager
def _opened(path, read, max_pixels) -> Iterator[_Source]:
  """Opens an image file at its page, within the limit of pixels; every failure becomes an `ImageError`."""
  name, page = split_page(path, read)
  limit = DataSpec().max_pixels if max_pixels is None else max_pixels
  try:
    with contextlib.ExitStack() as stack:
      stack.enter_context(_without_pillows_limit())
      file = stack.enter_context(io.BytesIO(read(name)) if read else open(name, 'rb'))  # noqa: SIM115
      source = stack.enter_context(_at_page(file, name, page, limit))
      width, height = source.contents.size
      if limit >= 0:
        _check_pixels(path, width, height, limit)
      if limit >= 0:
        stack.enter_context(_memory.room(width * height))
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


@contextlib.contextmanager
def _at_page(file: BinaryIO, name: str, page: int, limit: int) -> Iterator[_Source]:
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
      found = _contents_of(image, file, len(shown))
    yield _Source(image, file, directory, found, _BYTES_A_PIXEL * max(limit, 0))
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
    count = min(count, 1 + _frames_of_png(file))
  return list(range(count))


def _frames_of_png(file: BinaryIO) -> int:
  """Counts the frames that an animated PNG has: a damaged one can tell of two billion."""
  at, count = file.tell(), 0
  file.seek(8)
  while len(head := file.read(8)) == 8:
    length, name = struct.unpack('>I4s', head)
    count += name == b'fcTL'
    file.seek(length + 4, os.SEEK_CUR)
  file.seek(at)
  return count


def _contents_of(image: Image.Image, file: BinaryIO | None = None, pages: int = 1) -> Contents:
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
  turn = _orientation(image)
  size = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
  alpha = image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info
  return Contents(size, image.mode, bands, bits, image.mode == 'F', alpha, pages, turn)


def _orientation(image: Image.Image) -> int:
  """Returns EXIF's number of how an image is turned, as far as is known: a PNG may tell behind its pixels."""
  return Image.Image.getexif(image).get(0x0112, 1)  # a PNG's own would decode it


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


def _scaled(path, source: _Source, preprocessing: Preprocessing) -> Decoded:
  """Scales values to 8 bits by the value range, and lays transparent pixels on the background."""
  contents, background, stored = source.contents, preprocessing.background, source.stored_size
  coloured = bool(preprocessing.bands) or contents.bands == 3 or contents.alpha
  result = np.empty((stored[1], stored[0], 3 if coloured else 1), np.uint8)
  row = outside = 0
  for part in source.blocks(preprocessing):
    for rows in _row_blocks(part.values):
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
  return Decoded(turned(image, source.still_to_turn), outside / (stored[0] * stored[1]))


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


def _row_blocks(values: np.ndarray) -> Iterator[slice]:
  """Cuts an array into slices of rows that are converted at a time."""
  rows = max(1, _BLOCK // max(1, values[:1].size))
  for i in range(0, len(values), rows):
    yield slice(i, i + rows)


def _chosen(values: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
  """Picks the chosen bands of [rows, width, bands], if any are."""
  return values[..., [b - 1 for b in preprocessing.bands]] if preprocessing.bands else values


def _of_samples(values: np.ndarray, directory: tiff_files.Directory, preprocessing: Preprocessing) -> Values:
  """Takes bands and transparency from the samples of a TIFF."""
  full = 2 ** directory.bits - 1 if values.dtype.kind == 'u' else (
      1.0 if values.dtype.kind == 'f' else 2 ** (directory.bits - 1) - 1)
  bands = [i for i in range(directory.samples) if i != directory.alpha]
  picked = _chosen(values[..., bands], preprocessing)
  if directory.photometric == 0 and values.dtype.kind == 'u':  # 0 is white
    picked = values.dtype.type(full) - picked
  if directory.alpha is None:
    return Values(picked)
  alpha = np.clip(values[..., directory.alpha].astype(np.float32) / np.float32(full), 0, 1)
  return Values(picked, alpha, directory.premultiplied)


def _of_png(image, contents: Contents, file: BinaryIO, preprocessing: Preprocessing) -> Iterator[Values]:
  """Yields the values of a PNG of 16 bits with colours or transparency; Pillow drops the lower 8."""
  if contents.pages > 1:
    raise ImageError('it is an animation of 16 bits, which is not read: write its frames as files.')

  def decoded(rawmode):
    file.seek(0)
    with Image.open(file, formats=('PNG',)) as half:
      half.tile = [tile._replace(args=rawmode) for tile in half.tile]
      half.load()
      image.info |= half.info
      return np.asarray(half)

  key = image.info.get('transparency')
  if contents.bands == 1:  # gray and alpha: four bytes, which fill the four bands of 'RGBA'
    both = decoded('RGBA').astype(np.uint16)
    values = both[..., ::2] << 8 | both[..., 1::2]
  else:  # Pillow takes the first byte of each value, or the second, which is the lower one here
    values = decoded(f'{image.mode};16B').astype(np.uint16) << 8
    values |= decoded(f'{image.mode};16L')
  for rows in _row_blocks(values):
    part, alpha = values[rows], None
    if part.shape[-1] in (2, 4):
      part, alpha = part[..., :-1], part[..., -1] / np.float32(65535)
    elif key is not None:
      alpha = (part != np.array(key)).any(axis=-1).astype(np.float32)
    yield Values(_chosen(part, preprocessing), alpha)


def _of_ppm(image, file: BinaryIO, preprocessing: Preprocessing) -> Iterator[Values]:
  """Yields the values of a colour PPM with 16 bits, scaled to 0 to 65535 as Pillow does gray ones."""
  (tile,) = image.tile
  (width, height), most = image.size, tile.args[1]
  file.seek(tile.offset)
  if tile.codec_name == 'ppm_plain':
    tokens = re.sub(rb'#[^\r\n]*', b' ', file.read()).split()
    values = np.array(tokens[:3 * width * height], np.int64)
  else:
    values = np.frombuffer(file.read(6 * width * height), '>u2')
  if values.size < 3 * width * height or values.min(initial=0) < 0 or values.max(initial=0) > most:
    raise ValueError('it is truncated, or has values that are too large')
  values = values.reshape(height, width, 3)
  for rows in _row_blocks(values):
    part = np.rint(values[rows] * (65535 / most)).astype(np.uint16)
    yield Values(_chosen(part, preprocessing))


class _PillowsLimit:
  """Pillow's own limit of pixels, which is off while files are decoded here: ours is the only one."""

  def __init__(self):
    self._lock, self._inside, self._limit = threading.Lock(), 0, None

  @contextlib.contextmanager
  def off(self) -> Iterator[None]:
    with self._lock:
      if not self._inside:
        self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
      self._inside += 1
    try:
      yield
    finally:
      with self._lock:
        self._inside -= 1
        if not self._inside:
          Image.MAX_IMAGE_PIXELS = self._limit


_without_pillows_limit = _PillowsLimit().off


class _Memory:
  """Room for the pixels of images that are decoded at a time; who finds none waits for others to end."""

  def __init__(self, most: int):
    self._most, self._used, self._changed = most, 0, threading.Condition()
    self._mine = threading.local()

  @contextlib.contextmanager
  def room(self, pixels: int) -> Iterator[None]:
    """Takes room for a block, or until the end of the `kept` around it."""
    mine = self._mine
    with self._changed:
      # Who has room already does not wait: two that do would wait for each other.
      if not getattr(mine, 'held', 0):
        self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._most)
      self._used += pixels
    mine.held = getattr(mine, 'held', 0) + pixels
    try:
      yield
    finally:
      if not getattr(mine, 'keeping', False):
        self._give_back(pixels)

  @contextlib.contextmanager
  def kept(self) -> Iterator[None]:
    """Keeps what is taken in a block until its end."""
    if getattr(self._mine, 'keeping', False):
      yield
      return
    before, self._mine.keeping = getattr(self._mine, 'held', 0), True
    try:
      yield
    finally:
      self._mine.keeping = False
      self._give_back(self._mine.held - before if hasattr(self._mine, 'held') else 0)

  def _give_back(self, pixels):
    with self._changed:
      self._used -= pixels
      self._changed.notify_all()
    self._mine.held = getattr(self._mine, 'held', 0) - pixels


_memory = _Memory(_PIXELS_AT_ONCE)
