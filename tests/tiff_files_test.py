"""TIFF files of any bands and bits, written here byte by byte, and by Pillow."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.data import tiff_files
from tests.tiff import tiff

RNG = np.random.default_rng(0)


def read(data, page=0):
  """Reads the values of a page."""
  file = io.BytesIO(data)
  return np.concatenate(list(tiff_files.blocks(file, tiff_files.directories(file)[page], 2**30)))


def _values(dtype, shape):
  return (RNG.normal(0, 300, shape)).astype(dtype) if np.dtype(dtype).kind != 'u' else RNG.integers(
      0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize('dtype', ['u1', 'u2', 'u4', 'i2', 'i4', 'f4', 'f8'])
@pytest.mark.parametrize('layout', [
    {}, {'order': '>'}, {'planar': True, 'rows': 4}, {'deflate': True, 'rows': 5}, {'big': True},
    {'deflate': True, 'planar': True, 'order': '>'}])
def test_values_are_read_as_written(dtype, layout):
  for bands in (1, 2, 3, 5):
    values = _values(dtype, (13, 17, bands))
    found = read(tiff([values], **layout))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize('dtype', ['u1', 'u2', 'u4'])
@pytest.mark.parametrize('order', ['<', '>'])
def test_differences_of_neighbours(dtype, order):
  values = _values(dtype, (13, 17, 4))
  np.testing.assert_array_equal(
      read(tiff([values], deflate=True, predictor=2, order=order)), values)


@pytest.mark.parametrize('compression', ['tiff_lzw', 'tiff_adobe_deflate', 'packbits'])
@pytest.mark.parametrize('array', [
    RNG.integers(0, 65536, (13, 17), np.uint16), RNG.normal(size=(13, 17)).astype(np.float32),
    RNG.integers(0, 256, (13, 17, 4), np.uint8)], ids=['16 bits', 'floats', 'four bands'])
def test_files_of_libtiff(compression, array):
  """libtiff's own predictors are undone, that of floats too."""
  for predictor in (1, 3 if array.dtype.kind == 'f' else 2):
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'TIFF', compression=compression, tiffinfo={317: predictor})
    np.testing.assert_array_equal(read(file.getvalue()), array.reshape(13, 17, -1))


def test_packed_bits():
  """12 bits a value, two values in three bytes, and rows begin with a byte."""
  values = np.array([[0x123, 0xABC, 0xFFF], [0, 1, 0x800]])
  rows = [bytes.fromhex('123ABCFFF0'), bytes.fromhex('0000018000')]
  data = bytearray(tiff([values.astype(np.uint16)]))
  data[8:18] = b''.join(rows)
  directory = tiff_files.directories(io.BytesIO(bytes(data)))[0]
  directory = directory._replace(tags=directory.tags | {258: (12,)})
  (found,) = tiff_files.blocks(io.BytesIO(bytes(data)), directory, 2**20)
  np.testing.assert_array_equal(found[..., 0], values)


def test_pages_and_thumbnails():
  pages = [np.full((4, 6), i, np.uint8) for i in range(3)]
  data = tiff(pages)
  assert [read(data, i).max() for i in range(3)] == [0, 1, 2]
  file = io.BytesIO(tiff(pages[:2]))
  assert len(tiff_files.directories(file)) == 2
  reduced = io.BytesIO(tiff([pages[0]], tags=[(254, 1)]))
  assert len(tiff_files.directories(reduced)) == 1  # a file of thumbnails alone has them as pages


@pytest.mark.parametrize('extra, alpha, bands', [((2,), 3, 3), ((1,), 3, 3), ((0,), None, 4), ((), None, 4)])
def test_a_fourth_sample_is_transparency_only_if_the_file_says_so(extra, alpha, bands):
  (directory,) = tiff_files.directories(io.BytesIO(tiff([np.zeros((4, 6, 4), np.uint8)], extra=extra)))
  assert (directory.alpha, directory.bands) == (alpha, bands)
  assert directory.premultiplied == (extra == (1,))


@pytest.mark.parametrize('change, words', [
    (lambda tags: {259: (7,)}, 'JPEG compression'), (lambda tags: {258: (8, 16)}, 'different kinds'),
    (lambda tags: {339: (6,)}, 'complex'), (lambda tags: {258: (5,)}, '5-bit'),
    (lambda tags: {262: (5,)}, 'CMYK')])
def test_what_is_not_read_is_named(change, words):
  file = io.BytesIO(tiff([np.zeros((4, 6), np.uint8)]))
  (directory,) = tiff_files.directories(file)
  directory = directory._replace(tags=directory.tags | change(directory.tags))
  assert words in directory.problem()
  with pytest.raises(ValueError, match=words):
    next(tiff_files.blocks(file, directory, 2**20))


def test_damage_is_told():
  data = tiff([_values('u2', (13, 17, 5))])
  for damaged in (data[:-40], data[:100], b'II*\0\xff\xff\xff\x00'):
    with pytest.raises((ValueError, struct.error)):
      read(damaged)
  with pytest.raises(ValueError, match='more than 0 megabytes'):
    file = io.BytesIO(data)
    next(tiff_files.blocks(file, tiff_files.directories(file)[0], 100))
