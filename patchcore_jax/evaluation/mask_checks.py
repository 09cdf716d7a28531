"""Looks at the masks of a category before the long work: for those that would change pixel metrics unsaid."""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchcore_jax.data import decoding, image_contents, preprocess
from patchcore_jax.data.folder import Category, Example
from patchcore_jax.data.image_contents import Contents
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.settings import Preprocessing

_NAMED = 8  # files of each kind
# What may be odd about masks, in the order in which it is said.
EMPTY = 'empty'
LARGE = 'marking more than half of the image (inverted?)'
MANY_VALUES = 'with more than two values, of which all but 0 count'
LOST = 'of which nothing is left in what the network sees (cropped away, or too thin)'
TURNED = 'of an image turned by EXIF, which may be turned already or not, and are taken as they are'
OF_GOOD = 'marking pixels of a good image, which are not used'
UNUSED = 'of no image'
ORDER = EMPTY, LARGE, MANY_VALUES, LOST, TURNED, OF_GOOD, UNUSED


def line(
    category: Category, preprocessing: Preprocessing,
    on_error: Callable[[ImageError], None] | None = None) -> str:
  """Names the masks of a category that are odd, in one line; '' if none is.

  Args:
    category: its images.
    preprocessing: what is done to them.
    on_error: called with the error of each mask that cannot be used; by default the first is raised.

  Raises:
    ImageError: a mask that cannot be read or has another size than its image, and `on_error` is None.
  """
  found = {what: [] for what in ORDER}
  found[UNUSED] += category.unused_masks
  with concurrent.futures.ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1))) as pool:
    jobs = [pool.submit(_odd, e, preprocessing) for e in category.test if e.mask_paths]
    jobs += [pool.submit(_odd_of_good, path) for path in category.masks_of_good]
    try:
      for job in jobs:
        try:
          for what, path in job.result():
            found[what].append(path)
        except ImageError as e:
          if on_error is None:
            raise
          on_error(e)
    finally:
      for job in jobs:
        job.cancel()
  said = [f'{len(paths)} {what}: {_names(paths)}' for what, paths in found.items() if paths]
  return f'odd masks: {"; ".join(said)}' if said else ''


def _odd(example: Example, preprocessing: Preprocessing) -> list[tuple[str, str]]:
  """Lists what is odd about the masks of one image, and their paths."""
  found, contents = [], None
  with contextlib.suppress(ImageError):  # that the image cannot be read is said when it is decoded
    contents = image_contents.contents(example.image_path, example.read)
  for path in example.mask_paths:
    values = decoding.mask_values(path, example.read)
    marked = values != 0
    if not marked.any():
      found.append((EMPTY, path))
    if 2 * np.count_nonzero(marked) > marked.size:
      found.append((LARGE, path))
    if _has_more_than_two(values):
      found.append((MANY_VALUES, path))
    if contents and _may_be_turned(marked, contents, path, example.read):
      found.append((TURNED, path))
  if contents and not any(what == EMPTY for what, _ in found):
    whole = preprocess.joined_mask(example, contents.size)
    with contextlib.suppress(ValueError):  # an image that is too small, which is said then too
      if not preprocess.transform_mask(whole, preprocessing).any():
        found += [(LOST, path) for path in example.mask_paths]
  return found


def _odd_of_good(path: str) -> list[tuple[str, str]]:
  """Tells whether a mask of a good image marks anything."""
  return [(OF_GOOD, path)] if decoding.mask_values(path).any() else []


def _may_be_turned(marked: np.ndarray, image: Contents, path: str, read: Any) -> bool:
  """Tells whether only the user can know how a mask lies: its image is turned, and it fits both ways."""
  if image.orientation in (0, 1) or image.size != marked.shape[::-1] or preprocess.turned_by(path, read):
    return False
  turned = np.asarray(decoding.turned(Image.fromarray(marked), image.orientation))
  return turned.shape == marked.shape and not np.array_equal(turned, marked)


def _has_more_than_two(values: np.ndarray) -> bool:
  """Tells whether there are more than two different values."""
  if values.dtype == bool:
    return False
  if values.dtype == np.uint8:
    return np.count_nonzero(np.bincount(values.reshape(-1), minlength=256)) > 2
  others = values[(values != values.min()) & (values != values.max())]
  return bool(others.size)


def _names(paths: list[str]) -> str:
  """Names files by their last two parts."""
  names = ['/'.join(Path(path).parts[-2:]) for path in paths[:_NAMED]]
  return ', '.join(names) + (f' and {len(paths) - _NAMED} more' if len(paths) > _NAMED else '')
