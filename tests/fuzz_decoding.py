"""Sends damaged images through decoding, surveys, append, predict and the service, until the time is up.

    python -m tests.fuzz_decoding --seconds=600 --seed=1 --keep=FOLDER

Small images of every format and mode are changed where their structure is: header fields, lengths,
chunks, directories and their values, besides flipped bits, cuts and splices; checksums are made right
again, so that a change gets past them. What fails one of these rules is kept, and makes the exit code 1:

- `decoding.decode` and `preprocess.transform` raise nothing but ValueError, the former and what reads masks
  and headers nothing but ImageError: with and without a value range, bands and a background, for each page,
- an image is as large as its header says,
- an image takes less than 2 s of the processor and 500 MB,
- the service answers with JSON, 200 where the page can be read and 400, 413, 415 or 422 where it cannot,
- of a folder, every image that goes in is surveyed or named as unreadable, appended to a bank or named as
  skipped, and predicted: a finding or an error.

A crash or a hang of more than 30 s ends the process; the case is then in FOLDER/current.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import faulthandler
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, PngImagePlugin

from patchcore_jax import inspection
from patchcore_jax.banks import store
from patchcore_jax.data import decoding, image_contents, image_files, image_finding, preprocess, value_range
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.survey import survey
from patchcore_jax.inspection import upkeep
from patchcore_jax.report import prediction_run
from patchcore_jax.serving.app import Options, create_app
from patchcore_jax.settings import Preprocessing
from tests import drawn_files, small

MAX_PIXELS = 25_000_000
SECONDS, MEGABYTES, HANG_SECONDS = 2.0, 500, 30
ALLOWED = (200, 400, 413, 415, 422)
MOST_PAGES = 3  # of a file are looked at
FOLDER_EVERY, FOLDER_SIZE = 30.0, 24  # seconds, and images
# How images are read, for a service each.
VARIANTS = {
    'plain': {}, 'ranged': {'value_range': (100.0, 40_000.0), 'background': ()},
    'banded': {'value_range': (-1.0, 1.0), 'bands': (3, 1, 2), 'background': (10, 200, 30)}}
_NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 257, 4095, 32767, 32768, 65535, 65536, 100_000,
            2**24 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


def seeds() -> list[bytes]:
  """Small files of every format and mode that is read."""
  rng = np.random.default_rng(0)
  rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
  smooth = rgb.resize((40, 33), Image.Resampling.BICUBIC)
  gray16 = Image.fromarray(rng.integers(0, 65536, (24, 32), np.uint16))
  palette, rgba = rgb.quantize(16), rgb.convert('RGBA')
  exif = Image.Exif()
  exif[0x0112], exif[0x010E], exif[0x9286] = 6, 'a part', 'a comment'
  text = PngImagePlugin.PngInfo()
  text.add_text('a', 'b' * 40, zip=True)
  text.add_itxt('c', 'd' * 40, 'en', 'e', zip=True)
  frames = [rgb.rotate(90 * i) for i in range(3)]
  files = []

  def add(image, kind, **kwargs):
    file = io.BytesIO()
    image.copy().save(file, kind, **kwargs)  # saving leaves settings behind in the image
    files.append(file.getvalue())

  for mode in ('1', 'L', 'LA', 'RGB', 'RGBA', 'P'):
    add(rgb.convert(mode), 'PNG')
  add(gray16, 'PNG')
  add(palette, 'PNG', transparency=3, bits=4)
  add(rgb, 'PNG', pnginfo=text, exif=exif, icc_profile=b'x' * 200, dpi=(72, 72))
  add(rgb, 'PNG', save_all=True, append_images=frames)
  for mode in ('L', 'RGB', 'CMYK'):
    add(smooth.convert(mode), 'JPEG')
    add(smooth.convert(mode), 'JPEG', progressive=True, exif=exif, restart_marker_rows=1)
  add(smooth, 'JPEG', subsampling=0, icc_profile=b'x' * 200, comment=b'c', optimize=True)
  add(smooth, 'MPO', save_all=True, append_images=frames[:1])
  for mode in ('1', 'L', 'P', 'RGB', 'RGBA'):
    add(rgb.convert(mode), 'BMP')
  add(rgb, 'DIB')
  for compression in ('raw', 'tiff_lzw', 'tiff_adobe_deflate', 'packbits', 'jpeg', 'zstd', 'lzma'):
    with contextlib.suppress(Exception):  # what this build of libtiff has
      add(rgb, 'TIFF', compression=compression)
  for mode in ('1', 'L', 'P', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'F', 'I'):
    add(rgb.convert(mode) if mode not in ('LAB', 'F', 'I') else
        rgb.convert('L').convert(mode) if mode != 'LAB' else Image.new('LAB', (8, 8)), 'TIFF')
  add(rgb.convert('1'), 'TIFF', compression='group4')
  add(gray16, 'TIFF', exif=exif)
  add(rgb, 'TIFF', big_tiff=True)
  add(rgb, 'WEBP', lossless=True)
  add(smooth, 'WEBP', quality=50)
  add(rgba, 'WEBP', exif=exif, icc_profile=b'x' * 200)
  add(rgb, 'WEBP', save_all=True, append_images=frames, duration=10)
  add(palette, 'GIF')
  add(palette, 'GIF', interlace=1, transparency=2, comment=b'c')
  add(rgb, 'GIF', save_all=True, append_images=frames, loop=0, disposal=2)
  for mode in ('1', 'L', 'RGB', 'I;16'):
    add(gray16 if mode == 'I;16' else rgb.convert(mode), 'PPM')
  files.append(b'P3 2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12\n')
  files.append(b'P1 4 2\n1 0 1 0\n0 1 0 1\n')
  return files


def further_seeds() -> list[bytes]:
  """Small files of any depth and number of bands, with transparency and pages: what Pillow writes not."""
  rng, files = np.random.default_rng(1), []
  for kind in drawn_files.KINDS:
    if not kind.mode:
      levels = rng.integers(0, 100, (2 if kind.pages else 1, 24, 32, kind.channels)).astype(kind.dtype)
      with tempfile.TemporaryDirectory() as folder:
        drawn_files.write(Path(folder) / 'a', kind, levels, orientation=int(rng.integers(1, 9)))
        files.append((Path(folder) / 'a').read_bytes())
  for bands in (4, 5):
    pixels = rng.integers(0, 2**16, (24, 32, bands)).astype(np.uint16)
    files.append(drawn_files.tiff([pixels], compressed=True, planar=bands == 5))
  return files


def _form(image):
  """A multipart form with one image and another field."""
  return b'\r\n'.join((
      b'--x', b'Content-Disposition: form-data; name="a"', b'', b'b',
      b'--x', b'Content-Disposition: form-data; name="file"; filename="c.png"', b'Content-Type: image/png',
      b'', image, b'--x--', b''))


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
  """One to four changes of a file; checksums of a PNG are mostly made right again."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
    if len(data) < 2:
      break
    rng.choice(_CHANGES)(data, others, rng)
  if data[:4] == b'\x89PNG' and rng.random() < 0.9:
    data = png(_png_chunks(data))
  return bytes(data)


def _flip(data, _, rng):
  for _ in range(rng.choice((1, 1, 2, 8))):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data, _, rng):
  del data[rng.randrange(len(data)):]


def _remove(data, _, rng):
  at = rng.randrange(len(data))
  del data[at:at + rng.choice((1, 2, 4, 12, 64))]


def _repeat(data, _, rng):
  at, n = rng.randrange(len(data)), rng.choice((1, 4, 12, 64, 512))
  data[at:at] = data[at:at + n] * rng.choice((1, 1, 2, 50))


def _insert(data, _, rng):
  at = rng.randrange(len(data))
  data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 30)))


def _number(data, _, rng):
  """A number of 1, 2 or 4 bytes, mostly near the beginning, where headers are."""
  code = rng.choice(('B', '<H', '>H', '<I', '>I'))
  size = struct.calcsize(code)
  limit = rng.choice((32, 64, 256, len(data)))
  at = rng.randrange(min(limit, len(data)))
  if at + size <= len(data):
    data[at:at + size] = struct.pack(code, rng.choice(_NUMBERS) % 256**size)


def _splice(data, others, rng):
  other = rng.choice(others)
  at = rng.randrange(len(data))
  data[at:] = other[rng.randrange(len(other)):]


def _structure(data, others, rng):
  """Where this format keeps its numbers."""
  if data[:4] == b'\x89PNG':
    _change_png(data, rng)
  elif data[:2] == b'\xff\xd8':
    _change_jpeg(data, rng)
  elif data[:2] in (b'II', b'MM'):
    _change_tiff(data, rng)
  elif data[:4] == b'RIFF':
    _change_chunked(data, rng, 12, '<I')
  elif data[:3] == b'GIF':
    _change_gif(data, rng)
  else:
    _number(data, others, rng)


_CHANGES = (_flip, _cut, _remove, _repeat, _insert, _number, _number, _splice, *(_structure,) * 8)


def _png_chunks(data):
  chunks, at = [], 8
  while at + 8 <= len(data):
    size, kind = struct.unpack_from('>I4s', data, at)
    chunks.append([kind, bytes(data[at + 8:at + 8 + size]), size])
    at += 12 + size
  return chunks


def png(chunks):
  parts = [b'\x89PNG\r\n\x1a\n']
  for kind, body, *size in chunks:
    parts.append(struct.pack('>I', size[0] if size else len(body)) + kind + body)
    parts.append(struct.pack('>I', zlib.crc32(kind + body)))
  return b''.join(parts)


def _change_png(data, rng):
  chunks = _png_chunks(data)
  if not chunks:
    return
  i = rng.randrange(len(chunks))
  kind, body, size = chunks[i]
  what = rng.randrange(8)
  if what == 0:
    chunks.insert(rng.randrange(len(chunks)), chunks[i])
  elif what == 1:
    del chunks[i]
  elif what == 2:
    chunks.insert(rng.randrange(len(chunks)), chunks.pop(i))
  elif what == 3:
    chunks[i][2] = rng.choice(_NUMBERS)
  elif what == 4 and chunks[0][0] == b'IHDR' and len(chunks[0][1]) == 13:
    fields = list(struct.unpack('>IIBBBBB', chunks[0][1]))
    j = rng.randrange(7)
    fields[j] = rng.choice(_NUMBERS) if j < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    chunks[0][1] = struct.pack('>IIBBBBB', *fields)
  elif what == 5:
    bomb = zlib.compress(bytes(rng.choice((1000, 2**21, 2**26))))
    chunks.insert(1, [*rng.choice((
        (b'zTXt', b'a\0\0' + bomb), (b'iTXt', b'a\0\1\0\0\0' + bomb), (b'iCCP', b'a\0\0' + bomb),
        (b'IDAT', bomb), (b'eXIf', b'Exif\0\0' + bomb))), 0])
    chunks[1][2] = len(chunks[1][1])
  elif what == 6:
    kinds = (
        b'tRNS', b'PLTE', b'gAMA', b'cHRM', b'pHYs', b'acTL', b'fcTL', b'fdAT', b'eXIf', b'sRGB', b'tEXt')
    body = rng.randbytes(rng.choice((0, 1, 4, 9, 26, 32, 300)))
    chunks.insert(rng.randrange(1, len(chunks) + 1), [rng.choice(kinds), body, len(body)])
  elif body:
    changed = bytearray(body)
    _number(changed, None, rng)
    chunks[i] = [kind, bytes(changed), size]
  data[:] = png(chunks)


def _change_jpeg(data, rng):
  at, segments = 2, []
  while at + 4 <= len(data) and data[at] == 0xFF:
    size = struct.unpack_from('>H', data, at + 2)[0]
    segments.append((at, size))
    at += 2 + size
  if not segments:
    return
  at, size = rng.choice(segments)
  what = rng.randrange(5)
  if what == 0:
    struct.pack_into('>H', data, at + 2, rng.choice(_NUMBERS) % 65536)
  elif what == 1:
    data[at:at] = data[at:at + 2 + size] * rng.choice((1, 1, 100))
  elif what == 2:
    data[at + 1] = rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xFE))
  elif what == 3:
    del data[at:at + 2 + size]
  else:
    for _ in range(3):
      offset = at + 4 + rng.randrange(max(1, min(size, 20)))
      if offset < len(data):
        data[offset] = rng.choice(_NUMBERS) % 256


def _change_tiff(data, rng):
  order = '<' if data[:2] == b'II' else '>'
  if len(data) < 16:
    return
  big = struct.unpack_from(order + 'H', data, 2)[0] == 43
  at = struct.unpack_from(order + 'Q', data, 8)[0] if big else struct.unpack_from(order + 'I', data, 4)[0]
  width = 20 if big else 12
  if at + 8 > len(data):
    return
  count = struct.unpack_from(order + 'H', data, at)[0]
  entry = at + (8 if big else 2) + width * rng.randrange(max(1, min(count, 64)))
  if entry + width > len(data):
    return
  tags = (254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 282, 284, 292, 317, 320, 322, 323, 324,
          325, 330, 338, 339, 347, 513, 514, 529, 530, 700, 34377, 34665, 34675, 34853)
  what = rng.randrange(6)
  if what == 0:
    struct.pack_into(order + 'H', data, entry, rng.choice(tags))
  elif what == 1:
    kinds = (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 16, 99)
    struct.pack_into(order + 'H', data, entry + 2, rng.choice(kinds))
  elif what == 2:
    struct.pack_into(order + 'I', data, entry + 4, rng.choice(_NUMBERS))
  elif what in (3, 4):
    code = rng.choice('HI')
    struct.pack_into(order + code, data, entry + width - 4 * (1 + big), rng.choice(_NUMBERS) % (
        65536 if code == 'H' else 2**32))
  else:
    struct.pack_into(order + 'H', data, at, rng.choice((0, 1, count - 1, count + 1, 1000, 65535)) % 65536)


def _change_chunked(data, rng, at, code):
  """RIFF: chunks with a name and a length."""
  chunks = []
  while at + 8 <= len(data):
    size = struct.unpack_from(code, data, at + 4)[0]
    chunks.append((at, size))
    at += 8 + size + size % 2
  if not chunks:
    return
  at, size = rng.choice(chunks)
  what = rng.randrange(4)
  if what == 0:
    struct.pack_into(code, data, at + 4, rng.choice(_NUMBERS))
  elif what == 1:
    data[at:at + 4] = rng.choice(
        (b'VP8 ', b'VP8L', b'VP8X', b'ALPH', b'ANIM', b'ANMF', b'EXIF', b'ICCP', b'XMP '))
  elif what == 2:
    data[at:at] = data[at:at + 8 + size]
  else:
    offset = at + 8 + rng.randrange(max(1, min(size, 24)))
    if offset + 3 <= len(data):
      data[offset:offset + 3] = struct.pack('<I', rng.choice(_NUMBERS))[:3]


def _change_gif(data, rng):
  frames = [i for i, b in enumerate(data) if b == 0x2C]
  offsets = (6, 8, 10, 11, *(i + o for i in frames[:4] for o in (1, 3, 5, 7, 9, 10)))
  at = rng.choice(offsets)
  if at + 2 <= len(data):
    struct.pack_into('<H', data, at, rng.choice(_NUMBERS) % 65536)


def bombs() -> dict[str, bytes]:
  """Files that are small and say they are large; the first ones just within the limit, and whole."""
  files = {}

  def add(name, image, kind, **kwargs):
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    files[name] = file.getvalue()

  within, beyond = (5000, 5000), (5100, 5100)
  for size, word in ((within, 'within'), (beyond, 'beyond')):
    for mode in ('L', 'P', 'RGB', 'RGBA', 'I;16'):
      add(f'png {mode} {word}', Image.new(mode, size), 'PNG')
    add(f'png P transparency {word}', Image.new('P', size), 'PNG', transparency=0)
    add(f'gif {word}', Image.new('P', size), 'GIF')
    add(f'webp {word}', Image.new('RGBA', size), 'WEBP', lossless=True, method=0)
    for mode in ('1', 'I', 'CMYK'):
      add(f'tif {mode} {word}', Image.new(mode, size), 'TIFF', compression='tiff_adobe_deflate')
    for mode in ('L', 'CMYK'):
      add(f'jpeg {mode} {word}', Image.new(mode, size), 'JPEG')
  add('animated gif', Image.new('P', (2000, 2000)), 'GIF', save_all=True,
      append_images=[Image.new('P', (2000, 2000), i) for i in range(1, 60)])
  animated = Image.open(io.BytesIO(files['animated gif']))
  assert sum(1 for _ in ImageSequence.Iterator(animated)) > 1
  header = struct.pack('>IIBBBBB', 8, 8, 8, 2, 0, 0, 0)
  rest, large = [[b'IDAT', zlib.compress(bytes(8 * 25))], [b'IEND', b'']], zlib.compress(bytes(2**28), 9)
  for kind, head in ((b'zTXt', b'a\0\0'), (b'iTXt', b'a\0\1\0\0\0'), (b'iCCP', b'a\0\0')):
    files[f'png {kind.decode()}'] = png([[b'IHDR', header], [kind, head + large], *rest])
  many = [[b'zTXt', b'a%d\0\0' % i + zlib.compress(bytes(2**20), 9)] for i in range(200)]
  files['png many zTXt'] = png([[b'IHDR', header], *many, *rest])
  files['png IDAT'] = png([[b'IHDR', header], [b'IDAT', zlib.compress(bytes(2**29), 9)], [b'IEND', b'']])
  for width, height in ((60000, 60000), (13000, 13000), (2**31 - 1, 1), (1, 2**31 - 1), (25_000_000, 1)):
    lie = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    files[f'png {width} x {height}'] = png([[b'IHDR', lie], [b'IDAT', b''], [b'IEND', b'']])
  add('thin', Image.new('L', (20_000_000, 1)), 'PNG')
  add('1 x 1', Image.new('L', (1, 1)), 'PNG')
  add('20,000 x 20', Image.new('L', (20_000, 20)), 'PNG')
  return files


class Checker:
  """Applies the rules to one file after another.

  Args:
    services: {variant: (preprocessing, function that asks its service)}.
  """

  def __init__(self, services: dict[str, tuple[Preprocessing, Callable[..., tuple[int, bytes]]]]):
    self._services = services
    self.counts: dict[str, int] = {}

  def problem(self, data: bytes, variant: str) -> str | None:
    """What rule the file breaks, if any."""
    read, pages = (lambda _: data), 1
    try:
      pages = image_contents.num_pages('the image', read)
      decoding.mask_values('the image', read)
    except ImageError:
      self._count('no mask')
    except BaseException as e:
      return f'as a mask raised {e!r}'
    if pages == 1:
      return self._page_problem(data, variant, '')
    self._count('pages')
    status, body = self._services[variant][1](data)
    if (status, json.loads(body).get('pages')) != (422, pages):
      return f'status {status} for {pages} pages: {body[:200]!r}'
    found = (self._page_problem(data, variant, str(i + 1)) for i in range(min(pages, MOST_PAGES)))
    return next(filter(None, found), None)

  def _page_problem(self, data, variant, page):
    """What rule a page breaks, if any."""
    preprocessing, _ = self._services[variant]
    name = f'the image#{page}' if page else 'the image'
    _reset_peak()
    before, began = _status('VmRSS'), time.process_time()  # others may be at work on the machine
    outcome, error = 'read', None
    try:
      image, outside, _ = decoding.decode(name, preprocessing, lambda _: data, max_pixels=MAX_PIXELS)
      if not 0 <= outside <= 1:
        error = f'{outside} of the pixels lie outside of the range'
      if image_contents.contents(name, lambda _: data).size != image.size:
        error = f'{image.size}, and the header says {image_contents.contents(name, lambda _: data).size}'
      preprocess.transform(image, preprocessing)
    except ImageError as e:
      outcome = type(e).__name__
    except ValueError as e:
      outcome = 'transform'
      if 'pixels' not in str(e):
        error = f'transform raised {e!r}'
    except BaseException as e:
      return f'{variant} raised {e!r}'
    seconds, peak = time.process_time() - began, _status('VmHWM') - before
    self._count(outcome)
    if error:
      return error
    if seconds > SECONDS:
      return f'took {seconds:.1f} s'
    if peak > MEGABYTES:
      return f'took {peak:.0f} MB'
    return self._answer_problem(data, variant, outcome, page=page)

  def form_problem(self, data: bytes, variant: str) -> str | None:
    """`problem` of a multipart form with an image, which the service alone reads."""
    return self._answer_problem(data, variant, None, b'multipart/form-data; boundary=x')

  def _answer_problem(self, data, variant, outcome, content_type=b'', page=''):
    status, body = self._services[variant][1](data, content_type, page)
    self._count(str(status))
    try:
      answer = json.loads(body)
    except ValueError:
      return f'status {status}, and no JSON: {body[:80]!r}'
    if status not in ALLOWED:
      return f'status {status}: {answer}'
    if outcome and (status == 200) != (outcome == 'read'):
      return f'status {status}, where reading ends with: {outcome}'
    return None

  def _count(self, what):
    self.counts[what] = self.counts.get(what, 0) + 1


def folder_problem(inspector: inspection.Inspector, files: Sequence[bytes]) -> str | None:
  """What rule a folder of such files breaks, if any."""
  with tempfile.TemporaryDirectory() as root:
    root = Path(root)
    for i, data in enumerate(files):
      suffix = image_files.IMAGE_SUFFIXES[i % len(image_files.IMAGE_SUFFIXES)]
      (root / f'new/{i % 3}').mkdir(parents=True, exist_ok=True)
      (root / f'new/{i % 3}/{i}{suffix}').write_bytes(data)
    names = image_finding.find_images(root / 'new')
    if len({image_files.file_of(name) for name in names}) != len(files):
      return f'{len(files)} files, and {names} are listed'
    seen = survey(names)
    if sum(seen.modes.values()) + len(seen.unreadable) != len(names):
      return f'{len(names)} images, and the survey counts {seen}'
    with contextlib.suppress(ValueError):  # integers and floats
      value_range.measured(names, Preprocessing())
    store.save(root / 'bank', inspector.model)
    skipped = []
    try:
      after = upkeep.append(inspector, root / 'new', accept='all', on_error=skipped.append)
      appended = after.model.description.num_images - inspector.model.description.num_images
    except ValueError as e:
      if 'could be read' not in str(e) and 'No images' not in str(e):
        return f'append raised {e!r}'
      appended = 0
    if appended + len({str(e) for e in skipped}) != len(names):
      return f'{len(names)} images, {appended} appended, skipped {len(skipped)}: {skipped}'
    summary = prediction_run.run(prediction_run.Options(
        str(root / 'bank'), str(root / 'new'), str(root / 'out'), maps='none', overlays=True))
    rows = [json.loads(line) for line in (root / 'out/predictions.jsonl').read_text().splitlines()]
    if sorted(row['path'] for row in rows) != sorted(names) or summary.images + summary.failed != len(names):
      return f'{len(names)} images, {len(rows)} rows, {summary}'
    if any((row['error'] is None) == (row['score'] is None) for row in rows):
      return f'a row has neither a finding nor an error, or both: {rows}'
    return None


def _reset_peak():
  with contextlib.suppress(OSError):
    Path('/proc/self/clear_refs').write_text('5')


def _status(field):
  """MB of the process, from /proc."""
  for line in Path('/proc/self/status').read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) / 1000
  return 0.0


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--seconds', type=float, default=600)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--keep', type=Path, required=True, help='folder for what breaks a rule')
  args = parser.parse_args()
  args.keep.mkdir(parents=True, exist_ok=True)
  warnings.simplefilter('ignore')
  rng, originals, found = random.Random(args.seed), [*seeds(), *further_seeds()], {}
  inspector = small.inspector()
  inspectors = {
      name: inspector.with_model(inspector.model.with_description(
          preprocessing=dataclasses.replace(inspector.preprocessing, **fields)))
      for name, fields in VARIANTS.items()}

  def keep(problem, data, name):
    """Keeps what breaks a rule; of several alike, the first."""
    if problem and problem[:60] not in found:
      found[problem[:60]] = data
      path = args.keep / f'{args.seed}-{name}'
      path.write_bytes(data)
      print(f'{path} ({len(data)} bytes): {problem}', flush=True)

  with contextlib.ExitStack() as stack:
    services = {name: (i.preprocessing, stack.enter_context(service(i))) for name, i in inspectors.items()}
    checker = Checker(services)
    for name, data in bombs().items():
      for variant in VARIANTS:
        keep(checker.problem(data, variant), data, f'bomb-{name}')
    for i, data in enumerate(originals):
      for variant in VARIANTS:
        keep(checker.problem(data, variant), data, f'seed-{i}')
    end, cases, current = time.monotonic() + args.seconds, 0, args.keep / 'current'
    pool, said, folders, latest = list(originals), time.monotonic(), time.monotonic(), []
    while time.monotonic() < end:
      form, variant = rng.random() < 0.05, rng.choice(list(VARIANTS))
      data = mutate(_form(rng.choice(originals)) if form else rng.choice(pool), originals, rng)
      current.write_bytes(data)
      faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
      problem = (checker.form_problem if form else checker.problem)(data, variant)
      faulthandler.cancel_dump_traceback_later()
      cases += 1
      keep(problem, data, cases)
      if not form:
        latest = [*latest, data][-FOLDER_SIZE:]
      # What still can be read is a starting point for more.
      if problem is None and not form and rng.random() < 0.02 and len(data) < 20_000:
        pool.append(data)
        if len(pool) > 4000:
          pool[rng.randrange(len(originals), len(pool))] = pool.pop()
      if time.monotonic() - folders > FOLDER_EVERY:
        folders, variant = time.monotonic(), rng.choice(list(VARIANTS))
        files = [*latest, *rng.choices(originals, k=4)]
        if problem := folder_problem(inspectors[variant], files):
          keep(f'folder: {problem}', b'', f'folder-{cases}')
          shutil.rmtree(args.keep / f'folder-{cases}', ignore_errors=True)
          (args.keep / f'folder-{cases}').mkdir()
          for i, content in enumerate(files):
            (args.keep / f'folder-{cases}/{i}').write_bytes(content)
        checker.counts['folders'] = checker.counts.get('folders', 0) + 1
      if time.monotonic() - said > 60:
        said = time.monotonic()
        print(f'{cases} cases, {checker.counts}, {_status("VmRSS"):.0f} MB', flush=True)
  print(f'{cases} cases in {args.seconds:.0f} s, {len(found)} found, {checker.counts}')
  sys.exit(bool(found))


@contextlib.contextmanager
def service(inspector):
  """Yields a function that posts bytes to the app, in this process, and gives (status, body)."""
  loop = asyncio.new_event_loop()
  app = create_app(inspector, name='fuzz', options=Options(max_pixels=MAX_PIXELS, wait_seconds=0))

  async def call(body, content_type=b'', page=''):
    answer, sent = {'body': b''}, False

    async def receive():
      nonlocal sent
      if sent:
        return {'type': 'http.disconnect'}
      sent = True
      return {'type': 'http.request', 'body': body, 'more_body': False}

    async def send(message):
      answer['status'] = message.get('status', answer.get('status'))
      answer['body'] += message.get('body', b'')

    query = 'map=png&why=png&mask=png' + (f'&page={page}' if page else '')
    await app(
        {'type': 'http', 'method': 'POST', 'path': '/inspect', 'query_string': query.encode(),
         'headers': [(b'content-length', str(len(body)).encode()), (b'content-type', content_type)]},
        receive, send)
    return answer['status'], answer['body']

  async def started():
    await context.__aenter__()
    while (await call(b''))[0] == 503:
      await asyncio.sleep(0.05)

  context = app.router.lifespan_context(app)
  loop.run_until_complete(started())
  try:
    yield lambda *args: loop.run_until_complete(call(*args))
  finally:
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


if __name__ == '__main__':
  main()
