"""Reads the values of TIFF files as they are: any number of bands, 8 to 64 bits, integers or floats.

Pillow reads the common kinds, and drops bands and bits of others unsaid, or knows them not at all. Here it
only undoes the compression: strips or tiles are handed to it as if they held bytes of one gray band.
"""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

# none, LZW, Deflate (twice), PackBits, LZMA, Zstandard: those that know nothing of bands and bits
_COMPRESSIONS = {1, 5, 8, 32946, 32773, 34925, 50000}
_PREDICTED = {5, 8, 32946, 34925, 50000}
_NAMES = {2: 'CCITT', 3: 'CCITT', 4: 'CCITT', 6: 'JPEG', 7: 'JPEG', 34712: 'JPEG 2000', 50001: 'WebP'}
_KINDS = {3: 'palette', 5: 'CMYK', 6: 'YCbCr', 8: 'LAB', 32803: 'mosaic'}
# So many samples of a pixel are colours, by the photometric interpretation.
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_FORMATS = {1: 'B', 3: 'H', 4: 'I', 6: 'b', 8: 'h', 9: 'i', 13: 'I', 16: 'Q', 17: 'q', 18: 'Q'}
_BLOCK = 2**24  # bytes that are decoded at a time, where strips or tiles are no larger
_MOST_PAGES, _MOST_VALUES = 10_000, 4096  # what a damaged file can tell of is more
_STRIPS, _TILES = (273, 279), (324, 325)  # offsets and lengths of the pieces, which can be many
_NEEDED = {254, 255, 256, 257, 258, 259, 262, 266, 274, 277, 278, 284, 317, 322, 323, 338, 339}
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3


class Directory(NamedTuple):
  """One page of a file, as its directory describes it.

  Attributes:
    order: '<' or '>', the order of bytes.
    tags: {number: values}.
    pieces: {number: entry} of the tags that tell where strips or tiles lie, which `blocks` reads.
    at: its position in the chain of the file's directories, from 0.
  """

  order: str
  tags: dict[int, tuple[int, ...]]
  pieces: dict[int, tuple[int, int, bytes]]
  at: int

  def first(self, tag: int, default: int) -> int:
    """Returns the first value of a tag."""
    return int(self.tags.get(tag, (default,))[0])

  @property
  def size(self) -> tuple[int, int]:
    """(width, height) as stored, not turned."""
    return self.first(256, 0), self.first(257, 0)

  @property
  def samples(self) -> int:
    """The number of values of a pixel."""
    if 277 not in self.tags and self.photometric in (2, 6) and self.first(259, 1) in (6, 7):
      return 3
    return self.first(277, 1)

  @property
  def photometric(self) -> int:
    return self.first(262, 0)

  @property
  def colours(self) -> int:
    """The number of samples that the photometric interpretation speaks of."""
    return _COLOURS.get(self.photometric, 1)

  @property
  def alpha(self) -> int | None:
    """The position of the sample that is transparency; None without."""
    extra = self.tags.get(338, ())[:max(0, self.samples - self.colours)]
    return next((self.colours + i for i, kind in enumerate(extra) if kind in (1, 2, 999)), None)

  @property
  def premultiplied(self) -> bool:
    """Whether the colours are multiplied by the transparency already."""
    return self.alpha is not None and self.tags[338][self.alpha - self.colours] == 1

  @property
  def bands(self) -> int:
    """The number of samples that are no transparency."""
    return self.samples - (self.alpha is not None)

  @property
  def bits(self) -> int:
    """The most bits of a sample."""
    return max(self.tags.get(258, (1,)))

  @property
  def kind(self) -> int:
    """What the samples are: 1 unsigned, 2 signed, 3 floats."""
    kind = self.first(339, _UNSIGNED)
    return _UNSIGNED if kind == 4 else kind

  @property
  def predictor(self) -> int:
    """How values are foretold from those before them, 1 for not; compressions without it ignore its tag."""
    return self.first(317, 1) if self.first(259, 1) in _PREDICTED else 1

  @property
  def is_thumbnail(self) -> bool:
    """Whether this is a smaller copy, or the transparency, of another page."""
    return bool(self.first(254, 0) & 5) or self.first(255, 1) == 2

  @property
  def orientation(self) -> int:
    return self.first(274, 1)

  def problem(self) -> str:
    """Says why `blocks` cannot read the page; '' where it can."""
    bits, formats = set(self.tags.get(258, (1,))), set(self.tags.get(339, (1,)))
    if self.photometric not in (0, 1, 2):
      return f'{_KINDS.get(self.photometric, "unusual")} colours (number {self.photometric})'
    if (compression := self.first(259, 1)) not in _COMPRESSIONS:
      return f'{_NAMES.get(compression, "unknown")} compression (number {compression})'
    if len(bits) > 1 or len(formats) > 1:
      return 'bands of different kinds'
    if self.kind not in (_UNSIGNED, _SIGNED, _FLOAT):
      return 'complex numbers'
    whole = {_FLOAT: (16, 32, 64)}.get(self.kind, (8, 16, 32, 64))
    if self.bits not in whole and not (self.kind == _UNSIGNED and 8 < self.bits < 32):
      return f'{self.bits}-bit values'
    if self.predictor not in (1, 2, 3) or self.predictor > 1 and self.bits not in whole:
      return f'predictor {self.predictor}'
    return ''


def is_tiff(head: bytes) -> bool:
  """Tells whether a file that begins like this is a TIFF."""
  return head[:4] in (b'II*\0', b'MM\0*', b'II\0*', b'MM*\0', b'II+\0', b'MM\0+')


def directories(file: BinaryIO) -> list[Directory]:
  """Reads the directories of a file's pages; smaller copies of pages (thumbnails, pyramids) are no pages.

  Raises:
    ValueError: the file is damaged.
  """
  file.seek(0)
  head = file.read(16)
  order, big = '<' if head[:2] == b'II' else '>', 43 in head[2:4]
  word, entry = ('Q', struct.Struct(f'{order}HHQ8s')) if big else ('I', struct.Struct(f'{order}HHI4s'))
  (offset,) = struct.unpack_from(order + word, head, 8 if big else 4)
  found, seen = [], set()
  while offset and offset not in seen and len(seen) < _MOST_PAGES:
    seen.add(offset)
    file.seek(offset)
    (count,) = struct.unpack(order + ('Q' if big else 'H'), _exactly(file, 8 if big else 2))
    if count > 65535:
      raise ValueError('a directory of the TIFF is damaged')
    entries = _exactly(file, count * entry.size)
    (offset,) = struct.unpack(order + word, (file.read(8 if big else 4) + bytes(8))[:8 if big else 4])
    tags, pieces = {}, {}
    for i in range(count):
      tag, kind, number, value = entry.unpack_from(entries, i * entry.size)
      if kind in _FORMATS and tag in _NEEDED:
        tags[tag] = _values(file, order, kind, number, value, _MOST_VALUES)
      elif kind in _FORMATS and tag in (*_STRIPS, *_TILES):
        pieces[tag] = kind, number, value
    found.append(Directory(order, {k: values for k, values in tags.items() if values}, pieces, len(found)))
  return [d for d in found if not d.is_thumbnail] or found


def _exactly(file, count) -> bytes:
  data = file.read(count)
  if len(data) < count:
    raise ValueError('the TIFF is truncated')
  return data


def _values(file, order, kind, number, value, most) -> tuple[int, ...]:
  """Reads the values of one entry of a directory."""
  if number > most:
    raise ValueError('a directory of the TIFF is damaged')
  size = number * struct.calcsize(_FORMATS[kind])
  if size > len(value):
    here = file.tell()
    file.seek(struct.unpack(order + ('Q' if len(value) == 8 else 'I'), value)[0])
    value = _exactly(file, size)
    file.seek(here)
  return struct.unpack(f'{order}{number}{_FORMATS[kind]}', value[:size])


def dtype(directory: Directory) -> np.dtype:
  """Returns the type of the values that `blocks` yields."""
  size = next(b for b in (8, 16, 32, 64) if b >= directory.bits)
  return np.dtype(f'{ {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}[directory.kind]}{size // 8}')


def blocks(file: BinaryIO, directory: Directory, most_bytes: int) -> Iterator[np.ndarray]:
  """Yields the values [rows, width, samples] of a page from above, a few rows at a time.

  Args:
    file: the whole file.
    directory: the page, one of `directories(file)`.
    most_bytes: the most that the strips or tiles beside each other may unpack to.

  Raises:
    ValueError: the file is damaged, or of a kind that `Directory.problem` names.
  """
  if problem := directory.problem():
    raise ValueError(problem)
  width, height = directory.size
  if directory.samples < 1:
    raise ValueError('the TIFF has no samples')
  planes = directory.samples if directory.first(284, 1) == 2 else 1
  each = directory.samples // planes  # samples that lie beside each other
  tiled, packed = _TILES[0] in directory.pieces, directory.first(259, 1) != 1
  across, down = (directory.first(322, 0), directory.first(323, 0)) if tiled else (
      width, min(directory.first(278, height), height))  # of a piece
  if min(width, height, each, across, down) < 1:
    raise ValueError('the TIFF has no size')
  columns, rows, in_a_row = -(-width // across), -(-height // down), _row_bytes(directory, across, each)
  # What is not compressed can be cut anywhere.
  step = down if packed else max(1, min(down, _BLOCK // (planes * columns * in_a_row)))
  if planes * columns * in_a_row * step > most_bytes:
    raise ValueError(f'its values take more than {most_bytes / 1e6:.0f} megabytes at once')
  number = planes * columns * rows
  offsets, lengths = (
      _values(file, directory.order, *directory.pieces[tag], 2 * number) if tag in directory.pieces else ()
      for tag in (_TILES if tiled else _STRIPS))
  if len(offsets) < number or packed and len(lengths) < number:
    raise ValueError('strips or tiles of the TIFF are missing')

  def values(plane, row, column, begin, count):
    """Reads rows of one strip or tile."""
    i = (plane * rows + row) * columns + column
    if not packed:
      file.seek(offsets[i] + begin * in_a_row)
      return _piece(_exactly(file, count * in_a_row), directory, across, count, each)
    file.seek(offsets[i])
    # Rows of a tile that lie below the image are stored all the same.
    return _piece(_exactly(file, lengths[i]), directory, across, down if tiled else count, each)[:count]

  for row in range(rows):
    here = min(down, height - row * down)
    for begin in range(0, here, step):
      count = min(step, here - begin)
      found = [
          np.concatenate([values(plane, row, column, begin, count) for column in range(columns)], axis=1)
          for plane in range(planes)]
      yield np.concatenate(found, axis=2)[:, :width]


def _row_bytes(directory, width, samples) -> int:
  return -(-width * samples * directory.bits // 8)


def _piece(data, directory, width, rows, samples) -> np.ndarray:
  """Decodes a strip or tile to values [rows, width, samples]."""
  across = _row_bytes(directory, width, samples)
  raw = _decompressed(data, directory, across, rows)
  bits, kind, order, predictor = directory.bits, dtype(directory), directory.order, directory.predictor
  if bits not in (8, 16, 32, 64):
    each = np.unpackbits(raw, axis=1)[:, :width * samples * bits].reshape(rows, width, samples, bits)
    powers = (1 << np.arange(bits - 1, -1, -1)).astype(kind)
    return (each * powers).sum(axis=-1, dtype=kind)
  if predictor == 3:  # Adobe's technical note 3: bytes of like weight lie together, and differences are kept
    raw = np.cumsum(raw.reshape(rows, -1, samples), axis=1, dtype=np.uint8)
    planes = raw.reshape(rows, bits // 8, width * samples)
    values = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(kind.newbyteorder('>'))
    return values.reshape(rows, width, samples).astype(kind, copy=False)
  values = raw.view(kind.newbyteorder(order)).reshape(rows, width, samples)
  if predictor == 2:
    whole = values.view(f'{order}u{bits // 8}')
    return np.cumsum(whole, axis=1, dtype=f'u{bits // 8}').view(kind)
  return values.astype(kind, copy=False)


def _decompressed(data, directory, across, rows) -> np.ndarray:
  """Undoes the compression: bytes [rows, across]."""
  compression = directory.first(259, 1)
  if compression == 1 and directory.first(266, 1) == 1:
    if len(data) < across * rows:
      raise ValueError('the TIFF is truncated')
    return np.frombuffer(data, np.uint8, across * rows).reshape(rows, across)
  tags = [
      (256, across), (257, rows), (258, 8), (259, compression), (262, 1), (266, directory.first(266, 1)),
      (273, 8), (277, 1), (278, rows), (279, len(data))]
  written = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
  directory_at = 8 + len(data)
  file = b'II*\0' + struct.pack('<I', directory_at) + data + struct.pack('<H', len(tags)) + written + bytes(4)
  with Image.open(io.BytesIO(file), formats=('TIFF',)) as image:
    return np.array(image)
