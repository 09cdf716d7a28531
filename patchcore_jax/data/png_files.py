"""Reads of PNG files what Pillow does not: the lower 8 bits of 16-bit colours, and the number of frames."""

import os
import struct
from typing import BinaryIO

import numpy as np
from PIL import Image


def count_frames(file: BinaryIO) -> int:
  """Counts the frames that an animated PNG has: a damaged one can tell of two billion."""
  at, count = file.tell(), 0
  file.seek(8)
  while len(head := file.read(8)) == 8:
    length, name = struct.unpack('>I4s', head)
    count += name == b'fcTL'
    file.seek(length + 4, os.SEEK_CUR)
  file.seek(at)
  return count


def deep_values(image: Image.Image, file: BinaryIO, *, gray: bool) -> np.ndarray:
  """Reads the values of a PNG of 16 bits with colours or transparency; Pillow drops the lower 8.

  Args:
    image: what Pillow makes of it. It is told what the file says behind its pixels.
    file: the file.
    gray: whether it has one band, beside its transparency.

  Returns:
    [h, w, 2, 3 or 4] uint16, transparency last.
  """

  def decoded(rawmode):
    file.seek(0)
    with Image.open(file, formats=('PNG',)) as half:
      half.tile = [tile._replace(args=rawmode) for tile in half.tile]
      half.load()
      image.info |= half.info
      return np.asarray(half)

  if gray:  # with alpha four bytes, which fill the four bands of 'RGBA'
    both = decoded('RGBA').astype(np.uint16)
    return both[..., ::2] << 8 | both[..., 1::2]
  # Pillow takes the first byte of each value, or the second, which is the lower one here.
  values = decoded(f'{image.mode};16B').astype(np.uint16) << 8
  values |= decoded(f'{image.mode};16L')
  return values
