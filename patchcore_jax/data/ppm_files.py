"""Reads the values of colour PPM files with 16 bits, of which Pillow keeps the upper 8."""

import re
from typing import BinaryIO

import numpy as np
from PIL import Image


def deep_values(image: Image.Image, file: BinaryIO) -> tuple[np.ndarray, int]:
  """Reads the values [h, w, 3], and the one that stands for full brightness.

  Args:
    image: what Pillow makes of the file, not loaded yet.
    file: the file.

  Raises:
    ValueError: a file that is truncated, or has values that are too large.
  """
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
  return values.reshape(height, width, 3), most
