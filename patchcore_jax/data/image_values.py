"""Reads the values of open image files as they are, a few rows at a time.

What Pillow would drop - bits, bands - is read by `tiff_files`, `png_files` and `ppm_files`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from patchcore_jax.data import png_files, ppm_files, tiff_files
from patchcore_jax.data.image_contents import Source, orientation_of
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.settings import Preprocessing

_BLOCK = 2**20  # values that are converted at a time: the steps between take several times their memory


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


def are_needed(source: Source, preprocessing: Preprocessing) -> bool:
  """Tells whether the values must be read as they are, because Pillow would drop bits or bands."""
  contents = source.contents
  if source.image is None or _banded(source):
    return True
  # Without a range, colours of 16 bits keep their upper 8, as Pillow reads them, and banks before did.
  return contents.deep and (bool(preprocessing.value_range) or source.image.mode[0] in 'IF')


def blocks(source: Source, preprocessing: Preprocessing) -> Iterator[Values]:
  """Yields the values a few rows at a time: the chosen bands, not scaled, and perhaps not turned upright."""
  image, directory, file = source.image, source.directory, source.file
  if _by_samples(source):
    if problem := directory.problem():
      raise ImageError(
          f'it is {source.contents.kind} with {problem}, which is not read: save it with 8 or 16 bits, and '
          'with Deflate, LZW or no compression.')
    yield from (_of_samples(values, directory, preprocessing)
                for values in tiff_files.blocks(file, directory, source.most_bytes))
  elif image.format == 'PNG' and source.contents.deep and image.mode != 'I;16':
    yield from _of_png(source, preprocessing)
  elif image.format == 'PPM' and source.contents.deep and image.mode == 'RGB':
    yield from _of_ppm(source, preprocessing)
  else:
    image.load()
    values = np.asarray(image)
    key = image.info.get('transparency') if source.contents.alpha else None
    for part in row_blocks(values):
      part = values[part]
      alpha = None if key is None else (part != key).astype(np.float32)
      yield Values(_chosen(part[..., None] if part.ndim == 2 else part, preprocessing), alpha)


def stored_size(source: Source) -> tuple[int, int]:
  """Returns the (width, height) of what `blocks` yields. Pillow turns a TIFF itself."""
  return source.directory.size if _by_samples(source) else source.image.size


def still_to_turn(source: Source) -> int:
  """Returns EXIF's number of how what `blocks` yielded is turned; some files tell it behind their pixels."""
  if source.directory is not None:
    return source.contents.orientation if _by_samples(source) else 1
  return orientation_of(source.image)


def row_blocks(values: np.ndarray) -> Iterator[slice]:
  """Cuts an array into slices of rows that are converted at a time."""
  rows = max(1, _BLOCK // max(1, values[:1].size))
  for i in range(0, len(values), rows):
    yield slice(i, i + rows)


def _by_samples(source: Source) -> bool:
  """Tells whether `blocks` reads the samples of a TIFF itself."""
  directory = source.directory
  return directory is not None and (source.image is None or _banded(source) or directory.samples > 1)


def _banded(source: Source) -> bool:
  """Tells whether a TIFF has samples that Pillow drops."""
  directory = source.directory
  return directory is not None and directory.bands > directory.colours


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


def _of_png(source: Source, preprocessing: Preprocessing) -> Iterator[Values]:
  """Yields the values of a PNG of 16 bits with colours or transparency."""
  if source.contents.pages > 1:
    raise ImageError('it is an animation of 16 bits, which is not read: write its frames as files.')
  key = source.image.info.get('transparency')
  values = png_files.deep_values(source.image, source.file, gray=source.contents.bands == 1)
  for rows in row_blocks(values):
    part, alpha = values[rows], None
    if part.shape[-1] in (2, 4):
      part, alpha = part[..., :-1], part[..., -1] / np.float32(65535)
    elif key is not None:
      alpha = (part != np.array(key)).any(axis=-1).astype(np.float32)
    yield Values(_chosen(part, preprocessing), alpha)


def _of_ppm(source: Source, preprocessing: Preprocessing) -> Iterator[Values]:
  """Yields the values of a colour PPM with 16 bits, scaled to 0 to 65535 as Pillow does gray ones."""
  values, most = ppm_files.deep_values(source.image, source.file)
  for rows in row_blocks(values):
    part = np.rint(values[rows] * (65535 / most)).astype(np.uint16)
    yield Values(_chosen(part, preprocessing))
