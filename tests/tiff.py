"""Writes TIFF files of any bands and bits, as light stages and cameras give them."""

import struct
import zlib

import numpy as np


def tiff(pages, *, order='<', deflate=False, planar=False, rows=None, predictor=1, extra=None, big=False,
         photometric=None, tags=()) -> bytes:
  """Writes pages [h, w, bands] as a TIFF of strips.

  Args:
    order: '<' or '>'.
    deflate: compresses.
    planar: each band by itself.
    rows: rows of a strip; None for all.
    predictor: 1, or 2 for differences of neighbours.
    extra: values of ExtraSamples; by default 0 for each band beyond the third (of three, or more).
    big: a BigTIFF.
    photometric: by default RGB for three bands and more.
    tags: further (number, value) of each page.
  """
  word, head = ('Q', 16) if big else ('I', 8)
  out = bytearray(head)
  out[:4] = (b'II' if order == '<' else b'MM') + struct.pack(f'{order}H', 43 if big else 42)
  if big:
    out[4:8] = struct.pack(f'{order}HH', 8, 0)
  link = head - struct.calcsize(word)
  for page in pages:
    page = page[..., None] if page.ndim == 2 else page
    h, w, bands = page.shape
    strips = []
    for part in ([page[..., i:i + 1] for i in range(bands)] if planar else [page]):
      for i in range(0, h, rows or h):
        values = part[i:i + (rows or h)]
        if predictor == 2:
          whole = values.view(f'u{values.dtype.itemsize}')
          values = np.diff(whole, axis=1, prepend=np.zeros_like(whole[:, :1]))
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()
        strips.append(zlib.compress(data) if deflate else data)
    offsets = []
    for data in strips:
      offsets.append(len(out))
      out += data
    colours = 3 if bands >= 3 else 1
    extra_samples = [0] * (bands - colours) if extra is None else list(extra)
    kind = {'u': 1, 'i': 2, 'f': 3}[page.dtype.kind]
    entries = dict([
        (256, [w]), (257, [h]), (258, [page.dtype.itemsize * 8] * bands), (259, [8 if deflate else 1]),
        (262, [photometric if photometric is not None else 2 if bands >= 3 else 1]), (273, offsets),
        (277, [bands]), (278, [rows or h]), (279, [len(s) for s in strips]), (284, [2 if planar else 1]),
        (317, [predictor]), (339, [kind] * bands), *([(338, extra_samples)] if extra_samples else []),
        *((number, [value]) for number, value in tags)])
    written = b''
    for tag, values in sorted(entries.items()):
      data = struct.pack(f'{order}{len(values)}I', *values)
      if len(data) > struct.calcsize(word):
        data, at = struct.pack(order + word, len(out)), data
        out += at
      written += struct.pack(f'{order}HH{word}', tag, 4, len(values))
      written += data.ljust(struct.calcsize(word), b'\0')
    out[link:link + struct.calcsize(word)] = struct.pack(order + word, len(out))
    out += struct.pack(order + ('Q' if big else 'H'), len(entries)) + written
    link = len(out)
    out += bytes(struct.calcsize(word))
  return bytes(out)


def write(path, *pages, **arguments):
  """Writes pages as a file."""
  path.write_bytes(tiff(pages, **arguments))
  return path
