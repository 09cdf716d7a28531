"""Measures which values the images of a part take, where its files have more than 8 bits.

The network sees 256 levels. Of the values that a file can hold, a part takes few: 12 of 16 bits, or a
thousandth of what a thermal camera tells apart. So the range is measured over good images, and kept with
what is learnt.
"""

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchcore_jax.data import decoding, decoding_memory, image_contents
from patchcore_jax.data.image_contents import Contents
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.settings import Preprocessing

# This share of the pixels of each image, at either end, does not count: dead and hot pixels, and glints.
_ENDS = 1e-3
# On either side of what was seen, this share of it: good images differ, and so do defects, which must not all
# look alike. A quarter on both sides leaves 170 of the 256 levels to good parts.
_HEADROOM = 0.25
_MOST_THREADS = 16


class _Ends(NamedTuple):
  """The smallest and largest values of one image, beyond those that count, and the values that do."""

  low: float
  high: float
  lows: np.ndarray
  highs: np.ndarray
  unknown: int  # pixels that are no number
  pixels: int
  limits: tuple[float, float]  # what values of this type can be


def measured(
    paths: Sequence[str], preprocessing: Preprocessing, *, max_pixels: int | None = None,
) -> tuple[Preprocessing, float]:
  """Measures the value range of image files, unless it is set.

  Args:
    paths: training images. What cannot be read is passed by; whoever reads the images says so.
    preprocessing: how they are read.
    max_pixels: as of `decoding.decode`.

  Returns:
    The preprocessing with its range, which is () where no file has more than 8 bits, and the largest share of
    the pixels of one image that lie outside of it.

  Raises:
    ValueError: files of integers beside files of floats, which no range fits both.
  """
  with _threads() as pool:
    deep = {path: found for path, found in zip(paths, pool.map(_contents, paths)) if found and found.deep}
    kinds = collections.Counter(found.floats for found in deep.values())
    if len(kinds) > 1 and not preprocessing.value_range:
      whole, real = (
          next(path for path, found in deep.items() if found.floats is kind) for kind in (False, True))
      raise ValueError(
          f'{kinds[False]} files hold integers (such as {whole}) and {kinds[True]} floats (such as {real}): '
          'expected one kind, because one range of values cannot fit both. Convert one of '
          'them, or set the range (--value-range LOW,HIGH).')
    jobs = [pool.submit(_ends, path, preprocessing, max_pixels) for path in deep]
    ends = [job.result() for job in jobs]
  ends = [found for found in ends if found is not None]
  if not ends:
    return preprocessing, 0.0
  if not preprocessing.value_range:
    preprocessing = dataclasses.replace(preprocessing, value_range=_with_headroom(ends))
  return preprocessing, max(_outside(found, preprocessing) for found in ends)


def outside(
    paths: Sequence[str], preprocessing: Preprocessing, *, max_pixels: int | None = None) -> list[float]:
  """Measures the share of each image's pixels that lies outside of the value range.

  It is 0 for files of 8 bits, for what cannot be read, and where there is no range.

  Args:
    paths, preprocessing, max_pixels: as of `measured`.
  """
  if not preprocessing.value_range:
    return [0.0] * len(paths)

  def of_one(path):
    header = _contents(path)
    found = _ends(path, preprocessing, max_pixels) if header and header.deep else None
    return 0.0 if found is None else _outside(found, preprocessing)

  with _threads() as pool:
    return list(pool.map(of_one, paths))


def _threads() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, max(4, os.cpu_count() or 1)))


def _outside(found: _Ends, preprocessing: Preprocessing) -> float:
  """Computes the share of an image's pixels that lies outside of the range, by either end."""
  low, high = preprocessing.value_range
  beyond = np.count_nonzero(found.lows < low) + np.count_nonzero(found.highs > high)
  return min(1.0, (found.unknown + beyond) / found.pixels)


def _contents(path: str) -> Contents | None:
  """Reads the header of a file; None where that fails."""
  try:
    return image_contents.contents(path)
  except ImageError:
    return None


def _ends(path: str, preprocessing: Preprocessing, max_pixels: int | None) -> _Ends | None:
  """Finds the smallest and largest values of an image; None where it cannot be read or has none."""
  lows, highs, pixels, limits = [], [], 0, (-np.inf, np.inf)
  try:
    with decoding_memory.one_at_a_time():
      for part in decoding.blocks(path, preprocessing, max_pixels=max_pixels):
        values = part.values
        pixels += values.shape[0] * values.shape[1]
        if values.dtype.kind == 'u':
          limits = 0.0, float(np.iinfo(values.dtype).max)
        if part.premultiplied:
          values = values / np.maximum(part.alpha, 1e-6)[..., None]
        if part.alpha is not None:
          values = values[part.alpha > 0]
        lows.append(values.min(axis=-1).reshape(-1))
        highs.append(values.max(axis=-1).reshape(-1) if values.shape[-1] > 1 else lows[-1])
  except ImageError:
    return None
  lows, highs = np.concatenate(lows), np.concatenate(highs)
  known = np.isfinite(lows) & np.isfinite(highs)
  unknown = int(known.size - np.count_nonzero(known))
  if unknown:
    lows, highs = lows[known], highs[known]
  if not lows.size:
    return None
  if preprocessing.value_range:
    low, high = preprocessing.value_range
    return _Ends(low, high, lows[lows < low], highs[highs > high], unknown, pixels, limits)
  passed_by = int(_ENDS * lows.size)
  low = float(np.partition(lows, passed_by)[passed_by])
  high = float(np.partition(highs, lows.size - 1 - passed_by)[lows.size - 1 - passed_by])
  return _Ends(low, high, lows[lows < low], highs[highs > high], unknown, pixels, limits)


def _with_headroom(ends: Sequence[_Ends]) -> tuple[float, float]:
  """Widens what was seen in all images."""
  low, high = min(found.low for found in ends), max(found.high for found in ends)
  room = _HEADROOM * (high - low) or max(1.0, abs(high) / 100)  # of images of one value there is no range
  least, most = min(found.limits[0] for found in ends), max(found.limits[1] for found in ends)
  return max(low - room, least), min(high + room, most)
