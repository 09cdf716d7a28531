"""Reads how large the frames of a GIF are, before Pillow makes room for them.

Each frame has a place and a size of its own, and Pillow makes the picture as large as the largest of them
when it comes to a frame, the first one when it opens the file. So 40 bytes can ask for 17 billion pixels.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO


def sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
  """Yields the (width, height) of the picture after each frame; of a damaged file, as far as Pillow reads it.

  Args:
    file: at its beginning.

  >>> import io
  >>> head, frame = b'GIF89a' + struct.pack('<HHBBB', 4, 3, 0, 0, 0), struct.pack('<4HB', 1, 0, 9, 2, 0)
  >>> list(sizes(io.BytesIO(head + b',' + frame + b'\\x02\\x01\\x00\\x00;')))
  [(10, 3)]
  """
  head = file.read(13)
  if len(head) < 13:
    return
  width, height = struct.unpack_from('<HH', head, 6)
  _skip_palette(file, head[10])
  first = True
  while kind := file.read(1):
    if kind == b';':
      return
    if kind == b'!':
      _skip_extension(file, first)
    elif kind == b',':
      place = file.read(9)
      if len(place) < 9:
        return
      left, top, right, bottom, flags = struct.unpack('<4HB', place)
      width, height = max(width, left + right), max(height, top + bottom)
      yield width, height
      _skip_palette(file, flags)
      file.read(1)  # how the pixels are packed
      while _block(file):
        pass
      first = False


def _block(file: BinaryIO) -> bytes:
  """Reads a block with its length before it; b'' for the empty one, which ends several."""
  length = file.read(1)
  return file.read(length[0]) if length and length[0] else b''


def _skip_palette(file: BinaryIO, flags: int) -> None:
  """Passes over a palette, if there is one."""
  if flags & 128:
    file.read(3 << (flags & 7) + 1)


def _skip_extension(file: BinaryIO, first: bool) -> None:
  """Passes over what is no frame as Pillow does: it goes on after an empty block where it expects another."""
  label, block = file.read(1), _block(file)
  if label == b'\xfe':
    while block:
      block = _block(file)
    return
  if label == b'\xff' and first and block.startswith(b'NETSCAPE2.0'):
    _block(file)
  while _block(file):
    pass
