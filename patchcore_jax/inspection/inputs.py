"""Images as users have them - a folder, a pattern, paths, arrays - in the forms that a model takes."""

import collections
import concurrent.futures
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patchcore_jax import parallel
from patchcore_jax.data import decoding, decoding_memory, image_files, image_finding, passed_by, preprocess
from patchcore_jax.data.dataset import ArrayData, FileData
from patchcore_jax.data.decoding import Decoded
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.inspection import image_sizes
from patchcore_jax.settings import Preprocessing

_AHEAD = 16  # images that are decoded before they are asked for; originals are large
_WHAT = (
    'Expected a folder, a pattern, a list of paths, or a uint8 array [n, height, width, 3] or [n, height, '
    'width]')


def training_data(
    images: Any, preprocessing: Preprocessing | None, batch_size: int, *, paths: Sequence[str] | None = None,
    defects: Any = (), on_error: Callable[[ImageError], None] | None = None,
    **reading) -> FileData | ArrayData:
  """Makes the data that a detector fits on.

  Args:
    images: a folder, a pattern such as 'parts/**/*.png', paths, or an array [n, h, w, 3] or [n, h, w] uint8.
    preprocessing: what is done to them; None for nothing with arrays, and with files for the whole images, on
      one grid (`preprocess.whole_image`).
    batch_size: images that pass through the network at once.
    paths: the files that `images` names, where they were listed already (`find_paths`).
    defects: labelled ones beside the good images: paths of files, or an array as `images`; () for none.
    on_error: called with the error of each file that cannot be read, which is then left out; by default the
      error is raised.
    **reading: further fields of `FileData`.

  Raises:
    ValueError: no images, or something else than images.
  """
  batch_size = parallel.divisible_batch_size(batch_size)
  if isinstance(images, np.ndarray):
    array, labels = as_colour(images), ()
    if len(defects):
      labels = [0] * len(array) + [1] * len(defects)
      array = _joined(array, as_colour(defects))
    if preprocessing is None:
      return ArrayData(array, batch_size, original_size=array.shape[2:0:-1], labels=labels)
    size = array.shape[2:0:-1]
    array = np.stack([preprocess.transform(Image.fromarray(image), preprocessing) for image in array])
    return ArrayData(array, batch_size, preprocessing=preprocessing, original_size=size, labels=labels)
  paths = find_paths(images) if paths is None else paths
  if preprocessing is None:
    preprocessing = image_sizes.on_one_grid(image_sizes.of_files([*paths, *defects]).values(), None)
  name = name_of(images) if isinstance(images, (str, os.PathLike)) else ''
  examples = [Example(path, (), 0, name, 'good') for path in paths]
  examples += [Example(path, (), 1, name, 'defect') for path in defects]
  return FileData(examples, preprocessing, batch_size, on_error=on_error, **reading)


def _joined(good, defects):
  """Joins good images and defects, which must be of one size."""
  if good.shape[1:] != defects.shape[1:]:
    raise ValueError(
        f'The defects are of shape {defects.shape}, and the good images of {good.shape}: expected one height '
        'and width.')
  return np.concatenate([good, defects])


def find_defects(defects: Any, good: Any) -> Any:
  """Finds labelled defects to learn from beside good images.

  Args:
    defects: as the good images are given: a folder, a pattern or paths, or an array; None for none.
    good: the paths of the good images, or their array.

  Returns:
    Paths, or an array [n, h, w, 3] uint8; () for none.

  Raises:
    ValueError: none there, an array beside files, or files that are given as good too.
  """
  if defects is None:
    return ()
  if isinstance(defects, np.ndarray) != isinstance(good, np.ndarray):
    raise ValueError('The good images and the defects are given as an array and as files: expected one kind.')
  if isinstance(defects, np.ndarray):
    return as_colour(defects)
  paths = find_paths(defects)
  known = {os.path.realpath(path) for path in good}
  if both := [path for path in paths if os.path.realpath(path) in known]:
    raise ValueError(
        f'{len(both)} files are given as good and as defects, such as {both[0]}: expected each as one of the '
        'two. Name the folder of the good ones more closely.')
  return paths


def sizes_of(images: Any) -> dict[str, image_sizes.Size]:
  """Finds the sizes of images before they are decoded.

  Args:
    images: as of `training_data`.

  Returns:
    {file: (width, height)} of those whose header can be read; of an array one, by the name ''.

  Raises:
    ValueError: no images, or something else than images.
  """
  if isinstance(images, np.ndarray):
    return {'': as_colour(images).shape[2:0:-1]}
  return image_sizes.of_files(find_paths(images))


def find_paths(images: Any) -> list[str]:
  """Lists the image files that a folder, a pattern or a sequence of paths names.

  Raises:
    ValueError: none, or something else than paths.
  """
  if isinstance(images, (str, os.PathLike)):
    return image_finding.find_images(images)
  if isinstance(images, Sequence) and images and all(isinstance(p, (str, os.PathLike)) for p in images):
    return image_finding.with_pages(map(os.fspath, images))
  raise ValueError(f'{_WHAT}, got {_described(images)}.')


def training_images(images: Any) -> Any:
  """Finds the folder of good parts where a folder holds one (`image_files.training_folder`)."""
  return image_files.training_folder(images) if isinstance(images, (str, os.PathLike)) else images


def warn_of_left_out(images: Any, taken: Any = None) -> None:
  """Warns of the files and folders in a folder that are passed by, as the commands say them.

  Args:
    images: what was given.
    taken: the folder in it that was taken, if not all.
  """
  if isinstance(images, (str, os.PathLike)) and not is_one(images):
    for line in passed_by.left_out(images, image_files.listed(taken or images).images):
      warnings.warn(line, stacklevel=3)


def as_colour(array: np.ndarray) -> np.ndarray:
  """Checks an array of images; gray ones get three equal channels.

  Args:
    array: [n, h, w, 3] or [n, h, w] uint8.

  Returns:
    [n, h, w, 3] uint8.

  Raises:
    ValueError: another type or shape.
  """
  if array.dtype != np.uint8:
    advice = ''
    if array.dtype.kind == 'f':
      advice = ' Floats between 0 and 1 become pixels by np.round(255 * images).astype(np.uint8).'
    raise ValueError(f'The images are of type {array.dtype}: expected uint8, 0 to 255.{advice}')
  if array.ndim == 3 and array.shape[-1] > 4 and len(array):
    return np.repeat(array[..., None], 3, axis=-1)
  if array.ndim == 4 and array.shape[-1] == 3 and len(array):
    return array
  raise ValueError(
      f'The images are of shape {array.shape}: expected [n, height, width, 3] in RGB, or [n, height, width] '
      'in gray, with at least one image.')


def check(images: Any) -> None:
  """Raises ValueError, before anything is done, for what cannot be one image or many."""
  if isinstance(images, np.ndarray):
    as_colour(images[None] if is_one(images) else images)
  elif not isinstance(images, (str, os.PathLike, Image.Image, Iterable)):
    raise ValueError(f'{_WHAT}, got {_described(images)}.')


def is_one(images: Any) -> bool:
  """Tells whether this is a single image: a file of one page, or an array [h, w, 3] or [h, w].

  >>> is_one(np.zeros((8, 9, 3), np.uint8)), is_one(np.zeros((5, 8, 9), np.uint8))
  (True, False)
  """
  if isinstance(images, (str, os.PathLike)):
    path = os.fspath(images)
    several = os.path.isdir(path) or image_files.is_pattern(path)
    return not several and image_finding.pages_of(path) == [path]
  if isinstance(images, np.ndarray):
    return images.ndim == 2 or images.ndim == 3 and images.shape[-1] == 3
  return isinstance(images, Image.Image)


def opened(
    images: Any, preprocessing: Preprocessing, *, max_pixels: int | None = None,
    then: Callable[[Decoded], Any] = lambda decoded: decoded,
    on_error: Callable[[ImageError], Any] | None = None) -> Iterator[tuple[str, Any]]:
  """Yields the name of each image, '' for arrays, and the image in its original size.

  Files are decoded in threads, some ahead.

  Args:
    images: one image or many: files, a folder, a pattern, an array, or any iterable of paths and arrays.
    preprocessing: how files are decoded.
    max_pixels: as of `decoding.decode`.
    then: what is made of each decoded image and yielded in its place; what is large is best left behind.
    on_error: called with the error of each file that cannot be read, which is then left out; by default the
      first such error ends it.

  Raises:
    ImageError: a file cannot be read, and there is no `on_error`.
    ValueError: something else than images.
  """
  if isinstance(images, Image.Image):
    images = [images]
  elif isinstance(images, np.ndarray):
    images = as_colour(images[None] if is_one(images) else images)
  elif isinstance(images, (str, os.PathLike)):
    images = [images] if is_one(images) else image_finding.find_images(images)
  elif not isinstance(images, Iterable):
    raise ValueError(f'{_WHAT}, got {_described(images)}.')
  with concurrent.futures.ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1))) as pool:
    pending = collections.deque()

    def next_one():
      try:
        yield pending.popleft().result()
      except ImageError as e:
        if on_error is None:
          raise
        on_error(e)

    try:
      for image in _each_page(images):
        pending.append(pool.submit(_open, image, preprocessing, max_pixels, then))
        if len(pending) > _AHEAD:
          yield from next_one()
      while pending:
        yield from next_one()
    finally:
      for job in pending:
        job.cancel()


def name_of(where: str | os.PathLike) -> str:
  """Names what images show, for messages: by the folder that they lie in.

  >>> name_of('data/screw/train/good'), name_of('parts/*.png')
  ('screw', 'parts')
  """
  parts = [p for p in Path(where).absolute().parts if not any(c in p for c in '*?[')]
  meaningful = [p for p in parts if p.lower() != 'train' and not image_files.is_good(p)]
  return (meaningful or parts)[-1]


def _each_page(images: Iterable[Any]) -> Iterator[Any]:
  """Yields images, and for a file of several pages each of them."""
  for image in images:
    if isinstance(image, (str, os.PathLike)):
      yield from image_finding.pages_of(os.fspath(image))
    else:
      yield image


def _open(image, preprocessing, max_pixels, then) -> tuple[str, Any]:
  """Opens one image of any kind."""
  if isinstance(image, (str, os.PathLike)):
    with decoding_memory.one_at_a_time():
      return os.fspath(image), then(decoding.decode(image, preprocessing, max_pixels=max_pixels))
  if isinstance(image, Image.Image):
    return '', then(decoding.convert(image, preprocessing))
  if isinstance(image, np.ndarray):
    return '', then(Decoded(Image.fromarray(as_colour(image[None])[0])))
  raise ValueError(f'An image: expected a path or a uint8 array, got {_described(image)}.')


def _described(images: Any) -> str:
  """Describes what was given in place of images."""
  if isinstance(images, Sequence) and not isinstance(images, str):
    first = f', the first a {type(images[0]).__name__}' if len(images) else ''
    return f'a {type(images).__name__} of {len(images)}{first}'
  return f'a {type(images).__name__}'
