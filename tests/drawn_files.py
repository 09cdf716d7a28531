"""Image files of every kind that is read, written from plain arrays: what Pillow does not write too."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112  # number of the EXIF field


class Kind(NamedTuple):
  """A kind of file.

  Attributes:
    suffix: of its name.
    dtype: of the values.
    channels: values of a pixel, alpha among them.
    mode: the mode in which Pillow writes it; '' where `png` or `tiff` does.
    alpha: whether the last value is opacity.
    planar: whether a TIFF holds one channel after another.
    big: whether a TIFF begins with the high byte of numbers.
    pages: whether there may be several.
    turns: whether EXIF may turn it.
  """

  suffix: str
  dtype: str = 'u1'
  channels: int = 3
  mode: str = ''
  alpha: bool = False
  planar: bool = False
  big: bool = False
  pages: bool = False
  turns: bool = False


KINDS = (
    *(Kind('.png', dtype, channels, alpha=channels in (2, 4), turns=True)
      for dtype in ('u1', 'u2') for channels in (1, 2, 3, 4)),
    Kind('.png', channels=1, mode='1', turns=True), Kind('.png', channels=1, mode='P', turns=True),
    *(Kind('.tif', dtype, channels, pages=True, turns=True, big=big)
      for dtype in ('u1', 'u2', 'i2', 'u4', 'f4', 'f8') for channels in (1, 3) for big in (False, True)),
    *(Kind('.tif', dtype, channels, planar=planar, pages=True, turns=True)
      for dtype in ('u1', 'u2', 'f4') for channels in (2, 4, 5) for planar in (False, True)),
    *(Kind('.tif', dtype, channels, alpha=True, pages=True, turns=True)
      for dtype in ('u1', 'u2') for channels in (2, 4)),
    *(Kind('.tif', channels=channels, mode=mode) for mode, channels in (
        ('1', 1), ('P', 1), ('CMYK', 4), ('YCbCr', 3), ('LAB', 3))),
    *(Kind('.jpg', channels=channels, mode=mode, turns=True) for mode, channels in (
        ('L', 1), ('RGB', 3), ('CMYK', 4))),
    *(Kind('.bmp', channels=channels, mode=mode) for mode, channels in (
        ('1', 1), ('L', 1), ('P', 1), ('RGB', 3))),
    Kind('.webp', mode='RGB', turns=True), Kind('.webp', channels=4, mode='RGBA', alpha=True, turns=True),
    Kind('.gif', channels=1, mode='P', pages=True),
    Kind('.pbm', channels=1, mode='1'), Kind('.pgm', channels=1, mode='L'), Kind('.ppm', mode='RGB'),
    Kind('.pgm', 'u2', 1), Kind('.ppm', 'u2'))


def write(path: Path, kind: Kind, pages: Sequence[np.ndarray], orientation: int = 1) -> None:
  """Writes a file.

  Args:
    pages: [h, w, channels] of the kind's dtype each, as they are stored; of mode '1' 0 and 1, of mode 'P'
      numbers of a palette that goes from black to white.
    orientation: EXIF's number.
  """
  if kind.mode:
    images = [_image(page, kind.mode) for page in pages]
    options = {'exif': _exif(orientation)} if orientation != 1 else {}
    if kind.suffix == '.webp':
      options |= {'lossless': True, 'exact': True}
    if len(images) > 1:
      options |= {'save_all': True, 'append_images': images[1:]}
    images[0].save(path, **options)
  elif kind.suffix == '.png':
    path.write_bytes(png(pages[0], orientation))
  elif kind.suffix == '.tif':
    path.write_bytes(tiff(pages, alpha=kind.alpha, planar=kind.planar, big=kind.big, orientation=orientation))
  else:
    height, width, channels = pages[0].shape
    head = f'P{5 if channels == 1 else 6}\n{width} {height}\n65535\n'
    path.write_bytes(head.encode() + pages[0].astype('>u2').tobytes())


def png(pixels: np.ndarray, orientation: int = 1) -> bytes:
  """Writes a PNG of 8 or 16 bits: gray, gray and alpha, RGB or RGBA."""
  height, width, channels = pixels.shape
  deep = pixels.dtype.itemsize == 2
  rows = pixels.astype('>u2' if deep else 'u1').reshape(height, -1)
  body = b''.join(b'\0' + row.tobytes() for row in rows)
  header = struct.pack('>2I5B', width, height, 8 * (1 + deep), (0, 4, 2, 6)[channels - 1], 0, 0, 0)
  chunks = [(b'IHDR', header), (b'IDAT', zlib.compress(body)), (b'IEND', b'')]
  if orientation != 1:
    chunks.insert(1, (b'eXIf', _exif(orientation).tobytes()[6:]))
  return b'\x89PNG\r\n\x1a\n' + b''.join(
      struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
      for name, data in chunks)


def tiff(
    pages: Sequence[np.ndarray], *, alpha: bool = False, planar: bool = False, big: bool = False,
    orientation: int = 1, compressed: bool = False) -> bytes:
  """Writes a TIFF without compression or with Deflate, of any number of bands, any depth and any pages.

  Args:
    alpha: whether the last band is opacity.
    planar: whether a band comes after another.
    big: whether numbers begin with their high byte.
  """
  order = '>' if big else '<'
  file = (b'MM' if big else b'II') + struct.pack(order + 'HI', 42, 8)
  for i, page in enumerate(pages):
    file += _tiff_page(page, order, len(file), i + 1 == len(pages), alpha, planar, orientation, compressed)
  return file


def _tiff_page(page, order, begin, is_last, alpha, planar, orientation, compressed):
  """Writes a page that begins at a place of the file: its directory, then what that points to."""
  height, width, channels = page.shape
  colours = 3 if channels - alpha >= 3 else 1
  values = page.astype(page.dtype.newbyteorder(order))
  strips = [values[..., i].tobytes() for i in range(channels)] if planar else [values.tobytes()]
  strips = [zlib.compress(strip) for strip in strips] if compressed else strips
  entries = {
      256: ('I', [width]), 257: ('I', [height]), 258: ('H', [8 * page.dtype.itemsize] * channels),
      259: ('H', [8 if compressed else 1]), 262: ('H', [2 if colours == 3 else 1]), 273: ('I', strips),
      274: ('H', [orientation]), 277: ('H', [channels]), 278: ('I', [height]),
      279: ('I', [len(strip) for strip in strips]), 284: ('H', [2 if planar else 1]),
      339: ('H', [{'u': 1, 'i': 2, 'f': 3}[page.dtype.kind]] * channels)}
  if channels > colours:
    entries[338] = 'H', [0] * (channels - colours - alpha) + [2] * alpha
  directory = struct.pack(order + 'H', len(entries))
  behind, following = b'', begin + 2 + 12 * len(entries) + 4

  def placed(data):
    nonlocal behind
    behind += data + bytes(len(data) % 2)
    return following + len(behind) - len(data) - len(data) % 2

  for tag, (code, numbers) in sorted(entries.items()):
    if numbers is strips:
      numbers = [placed(strip) for strip in strips]
    packed = struct.pack(f'{order}{len(numbers)}{code}', *numbers)
    if len(packed) > 4:
      packed = struct.pack(order + 'I', placed(packed))
    kind = {'H': 3, 'I': 4}[code]
    directory += struct.pack(order + 'HHI', tag, kind, len(numbers)) + packed.ljust(4, b'\0')
  link = 0 if is_last else following + len(behind)
  return directory + struct.pack(order + 'I', link) + behind


def _image(page, mode):
  """Makes an image of a mode that Pillow writes."""
  if mode == '1':
    return Image.fromarray(page[..., 0].astype(bool))
  if mode == 'P':
    image = Image.fromarray(page[..., 0]).copy()
    image.putpalette([v for i in range(256) for v in (i, i, i)])
    return image
  if page.shape[-1] == 1:
    return Image.fromarray(page[..., 0])
  return Image.frombytes(mode, page.shape[1::-1], page.tobytes())


def _exif(orientation):
  exif = Image.Exif()
  exif[_ORIENTATION] = orientation
  return exif
