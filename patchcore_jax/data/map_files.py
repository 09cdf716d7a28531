"""Reads and writes anomaly maps as TIFF, as MVTec's scripts do; maps and masks at the originals' size.

    sizes, names = original_sizes(category.test), map_names(category.test, root)
    masks = OriginalMasks(category.test, sizes)
    maps = MapFiles('maps', names, sizes)                  # those of a folder, or
    maps = OriginalMaps(scores.map, sizes, preprocessing)  # those of a run, at the network's size
    write_maps('maps', names, maps)

The map of <root>/<category>/test/<defect>/<image>.png is <maps>/<category>/test/<defect>/<image>.tiff: the
image's path below the data set's root, with another suffix. Maps and masks are sequences that hold no array:
each is read, or made, whenever it is asked for, so that a category of any size takes the memory of one image.

Sources: MVTec's evaluation scripts for MVTec AD (Bergmann et al., CVPR 2019) and LOCO (IJCV 2022), and the
submissions of MVTec AD 2 (arXiv 2503.21622). Those scripts know .png images of one page alone. Pages of a
file, and images that differ in their suffixes only, have maps of their own here (`map_names`). The script for
MVTec AD passes these by; LOCO's refuses a map without ground truth unless it is one of a good image.
"""

import collections
import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from patchcore_jax import atomic_files, extras
from patchcore_jax.data import image_contents, image_files, preprocess, tiff_files
from patchcore_jax.data import placement as placements
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.settings import Preprocessing

SUFFIXES = ('.tif', '.tiff', '.TIF', '.TIFF')  # those that MVTec's scripts look for
_SHOWN = 3  # names in a line


def map_names(examples: Sequence[Example], root: str | os.PathLike) -> list[str]:
  """Names the maps of images: their paths below the maps' folder, without a suffix.

  A page NAME#2 of NAME.tif is NAME#2. Images that differ in their suffixes only, a.png and a.jpg, keep them:
  their maps are a.png.tiff and a.jpg.tiff.

  Args:
    examples: the images.
    root: folder of the data set, above the categories.

  Raises:
    ValueError: an image outside of the root, or one that is there twice.

  >>> paths = ('mvtec/nut/test/good/0.png', 'mvtec/nut/test/cut/a.png', 'mvtec/nut/test/cut/a.jpg')
  >>> map_names([Example(path, (), 0, 'nut', 'good') for path in paths], 'mvtec')
  ['nut/test/good/0', 'nut/test/cut/a.png', 'nut/test/cut/a.jpg']
  """
  files, pages = [], []
  for example in examples:
    path = image_files.split_page(example.image_path, example.read)[0]
    files.append(_below(path, root, example))
    pages.append(example.image_path[len(path):])
  short = [f'{os.path.splitext(file)[0]}{page}' for file, page in zip(files, pages)]
  times = collections.Counter(short)
  names = [file + page if times[name] > 1 else name for file, page, name in zip(files, pages, short)]
  if len(set(names)) < len(names):
    twice = collections.Counter(names).most_common(1)[0][0]
    raise ValueError(f'Two images would have the map {twice}.tiff: expected each image once.')
  return names


def original_sizes(examples: Sequence[Example]) -> list[tuple[int, int]]:
  """Reads the (height, width) of images from the headers of their files, upright.

  Raises:
    ImageError: a file that cannot be read, as far as its header tells.
  """
  return [image_contents.contents(e.image_path, e.read).size[::-1] for e in examples]


def read_map(path: str | os.PathLike) -> np.ndarray:
  """Reads an anomaly map.

  Args:
    path: a TIFF of one page and one value a pixel: floats of 16, 32 or 64 bits, or integers of up to 32.

  Returns:
    [h, w] of the type that is stored; float32 or float64 for integers, which they hold exactly.

  Raises:
    ImageError: a file of another kind, a damaged one, or NaN or infinity in it.
  """
  with _opened(path) as (file, page):
    height, width = page.size[::-1]
    room = 2**26 + 8 * height * width  # tiles may be larger than the map
    values = np.concatenate(list(tiff_files.blocks(file, page, room)))[..., 0]
  if values.dtype.kind != 'f':
    values = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
  if number := values.size - np.count_nonzero(np.isfinite(values)):
    raise ImageError(
        f'The map {path} has {number} NaN or infinite values of {values.size}: expected finite ones. Pixels '
        'that a network did not see take the smallest value of all maps.')
  return values


def write_map(path: str | os.PathLike, anomaly_map: np.ndarray) -> None:
  """Writes an anomaly map [h, w] float32 or float16 as an uncompressed TIFF; it appears whole, or not at all.

  Raises:
    ValueError: another type or shape, NaN or infinity, or the package tifffile is missing (extra [tiff]).
    OSError: the file cannot be written.
  """
  if anomaly_map.ndim != 2 or not anomaly_map.size or anomaly_map.dtype not in (np.float16, np.float32):
    raise ValueError(
        f'A map of shape {anomaly_map.shape} and type {anomaly_map.dtype} for {path}: expected [h, w] of '
        'float32 or float16.')
  if not np.isfinite(anomaly_map).all():
    raise ValueError(f'The map for {path} has NaN or infinite values: expected finite ones.')
  with extras.needed_for('Writing anomaly maps as TIFF'):
    import tifffile
  with atomic_files.written(path) as aside:
    tifffile.imwrite(aside, anomaly_map, photometric='minisblack', metadata=None, software=False)


def write_maps(
    folder: str | os.PathLike, names: Sequence[str], maps: Sequence[np.ndarray], *,
    dtype: np.typing.DTypeLike = np.float32) -> None:
  """Writes maps as <folder>/<name>.tiff, one after another.

  Args:
    folder: made if absent.
    names: what `map_names` gives.
    maps: one for each name, [h, w]; read once.
    dtype: float32 or float16, to which values are rounded.

  Raises:
    ValueError: as `write_map`; values that the type does not hold; more or fewer maps than names.
  """
  if len(names) != len(maps):
    raise ValueError(f'{len(maps)} maps for {len(names)} names: expected one each.')
  for i, name in enumerate(names):
    with np.errstate(over='ignore'):  # the infinity that comes of it is refused
      write_map(Path(folder) / f'{name}.tiff', np.asarray(maps[i]).astype(dtype, copy=False))


class MapFiles(Sequence):
  """The maps of a category's images in a folder; each is read when it is asked for.

  Item i is the map [h, w] of image i as stored (`read_map`), whose size is that of the original image; a
  slice is the maps of some of the images.

  Attributes:
    paths: the files.
    notes: lines to tell the user: which files belong to no image.

  Args:
    folder: where the maps lie, in a folder for each category.
    names: what `map_names` gives.
    sizes: the (height, width) of each image.

  Raises:
    ValueError: an image without a map, or with two.
    ImageError: a map whose header tells of another kind or size of image.
  """

  def __init__(self, folder: str | os.PathLike, names: Sequence[str], sizes: Sequence[tuple[int, int]]):
    if len(names) != len(sizes):
      raise ValueError(f'{len(names)} names of maps and {len(sizes)} sizes: expected as many.')
    found = _maps_below(Path(folder), {name.partition('/')[0] for name in names})
    if missing := [name for name in names if name not in found]:
      raise ValueError(_missing(Path(folder), names, missing))
    for name in names:
      if len(found[name]) > 1:
        raise ValueError(f'Two maps for one image, {found[name][0]} and {found[name][1]}: expected one.')
    self.paths = [found[name][0] for name in names]
    for path, name, size in zip(self.paths, names, sizes):
      _check_header(path, name, size)
    unused = sorted(path for name in found.keys() - set(names) for path in found[name])
    shown = ', '.join(unused[:_SHOWN]) + (', ...' if len(unused) > _SHOWN else '')
    self.notes = (f'maps of no image, which are not read: {len(unused)} ({shown})',) if unused else ()

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int | slice):
    if isinstance(index, slice):
      part = copy.copy(self)
      part.paths = self.paths[index]
      return part
    return read_map(self.paths[index])


class OriginalMasks(Sequence):
  """The masks of images at the original size; each is read when it is asked for.

  Item i is [h, w] bool, True where any mask of image i marks a pixel, and False everywhere for a good image.
  Unreadable masks, and those of another size than their image, raise ImageError then.

  Args:
    examples: the images.
    sizes: the (height, width) of each.

  Raises:
    ValueError: an anomalous image without a mask.
  """

  def __init__(self, examples: Sequence[Example], sizes: Sequence[tuple[int, int]]):
    if len(examples) != len(sizes):
      raise ValueError(f'{len(examples)} images and {len(sizes)} sizes: expected as many.')
    if without := [e.image_path for e in examples if e.label and not e.mask_paths]:
      raise ValueError(
          f'{len(without)} anomalous images have no mask, {without[0]} among them: metrics of pixels are not '
          'defined. Add the masks.')
    self._examples, self._sizes = examples, sizes

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> np.ndarray:
    example, (height, width) = self._examples[index], self._sizes[index]
    if not example.mask_paths:
      return np.zeros((height, width), bool)
    return np.asarray(preprocess.joined_mask(example, (width, height))) > 0


class OriginalMaps(Sequence):
  """A run's maps, laid over their original images; each is made when it is asked for.

  Item i is [height, width] float32 (`placement.to_original`: bilinear, corners not aligned). Pixels that the
  network did not see, because they were cropped away, have the smallest score of all maps: they never alarm,
  and a defect there counts as missed.

  Attributes:
    smallest: that score.
    unseen, pixels: how many pixels of the originals the network did not see, and how many they have.

  Args:
    maps: [n, h, w], or one [h, w] an image, at the size of the network's input; read once now.
    sizes: the (height, width) of the original images.
    preprocessing: what they went through.

  Raises:
    ValueError: no map, NaN or infinity, maps of another size than the network's input, or an image that
      the preprocessing refuses.

  >>> from patchcore_jax.settings import Preprocessing
  >>> maps = OriginalMaps(np.float32([[[3, 1], [2, 4]]]), [(2, 4)], Preprocessing(resize=(), crop=(2,)))
  >>> maps[0].tolist(), maps.notes
  ([[1.0, 3.0, 1.0, 1.0], [1.0, 2.0, 4.0, 1.0]], ('the network did not see 4 of 8 pixels (50.0 %): ...
  """

  def __init__(
      self, maps: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], preprocessing: Preprocessing):
    if len(maps) != len(sizes) or not len(maps):
      raise ValueError(f'{len(maps)} maps for {len(sizes)} images: expected one each, and at least one.')
    self._maps = maps
    placed = {size: placements.placement(*size, preprocessing) for size in set(sizes)}
    self._placements = [placed[size] for size in sizes]
    self.smallest = np.inf
    for i in range(len(maps)):
      values = np.asarray(maps[i])
      if not np.isfinite(values).all():
        raise ValueError(f'Map {i} has NaN or infinite values: expected finite ones.')
      self.smallest = min(self.smallest, float(values.min()))
    unseen = {size: int(np.isnan(placements.to_original(np.zeros(placement.size), placement)).sum())
              for size, placement in placed.items()}
    self.unseen = sum(unseen[size] for size in sizes)
    self.pixels = sum(height * width for height, width in sizes)

  @property
  def notes(self) -> tuple[str, ...]:
    """Lines to tell the user: how many pixels have no score of their own."""
    if not self.unseen:
      return ()
    share = f'{self.unseen} of {self.pixels} pixels ({100 * self.unseen / self.pixels:.1f} %)'
    return (f'the network did not see {share}: they have the smallest score of all, {self.smallest:.4g}',)

  def __len__(self) -> int:
    return len(self._maps)

  def __getitem__(self, index: int) -> np.ndarray:
    result = placements.to_original(self._maps[index], self._placements[index])
    result[np.isnan(result)] = self.smallest
    return result


class SeenMaps(Sequence):
  """A run's maps, laid over their original images without the pixels that the network did not see.

  Item i is [h, w] float32, made when it is asked for: what a crop left of image i. It is for thresholds from
  good images, whose mean and deviation would change by pixels without a score of their own.

  Args:
    maps, sizes, preprocessing: as for `OriginalMaps`.

  Raises:
    ValueError: more or fewer maps than sizes, or an image that the preprocessing refuses.

  >>> from patchcore_jax.settings import Preprocessing
  >>> SeenMaps(np.float32([[[3, 1], [2, 4]]]), [(2, 4)], Preprocessing(resize=(), crop=(2,)))[0]
  array([[3., 1.],
         [2., 4.]], dtype=float32)
  """

  def __init__(
      self, maps: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], preprocessing: Preprocessing):
    if len(maps) != len(sizes):
      raise ValueError(f'{len(maps)} maps for {len(sizes)} images: expected one each.')
    self._maps = maps
    self._placements = [placements.placement(*size, preprocessing) for size in sizes]

  def __len__(self) -> int:
    return len(self._maps)

  def __getitem__(self, index: int) -> np.ndarray:
    laid = placements.to_original(self._maps[index], self._placements[index])
    seen = ~np.isnan(laid)  # a rectangle
    return laid[np.ix_(seen.any(axis=1), seen.any(axis=0))]


def _below(path: str, root: str | os.PathLike, example: Example) -> str:
  """Names an image's file relative to the root."""
  file = PurePath(path)
  if file.is_relative_to(root):
    file = file.relative_to(root)
  elif file.is_absolute() or example.read is None:  # what is read from archives has relative names
    raise ValueError(f'{path} does not lie in {root}: expected the folder of the data set.')
  # An archive may have been unpacked into <name>/<name>.
  if file.parts[:2] == (example.category, example.category):
    file = file.relative_to(example.category)
  return file.as_posix()


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple]:
  """Opens a TIFF that can be a map, and yields the file and its one page; every failure is an ImageError."""
  try:
    with open(path, 'rb') as file:
      if not tiff_files.is_tiff(file.read(4)):
        raise ImageError(f'The map {path} is no TIFF: expected one.')
      pages = tiff_files.directories(file)
      if len(pages) != 1 or pages[0].samples != 1:
        values = pages[0].samples if pages else 0
        raise ImageError(
            f'The map {path} has {len(pages)} pages of {values} values a pixel: expected one of each.')
      problem = pages[0].problem()
      if not problem and pages[0].kind != 3 and pages[0].bits > 32:
        problem = f'{pages[0].bits}-bit integers'
      if problem:
        raise ImageError(f'The map {path} has {problem}: expected floats of 16, 32 or 64 bits.')
      yield file, pages[0]
  except ImageError:
    raise
  except image_contents.DECODING_ERRORS as e:
    raise ImageError(f'Cannot read the map {path}: {e or type(e).__name__}.') from e


def _check_header(path: str, name: str, size: tuple[int, int]) -> None:
  """Raises ImageError for a file that is no map of an image of this (height, width)."""
  with _opened(path) as (_, page):
    if page.size != (size[1], size[0]):
      raise ImageError(
          f'The map {path} is {page.size[0]} x {page.size[1]} pixels, its image {name} is {size[1]} x '
          f'{size[0]}: expected the size of the original image.')


def _maps_below(folder: Path, first: set[str]) -> dict[str, list[str]]:
  """Finds the TIFF files in some folders of a folder, or beginning there: {name: paths, sorted}."""
  found = collections.defaultdict(list)
  if not folder.is_dir():
    raise ValueError(f'There is no folder {folder}: expected one of anomaly maps.')

  def add(path):
    stem, suffix = os.path.splitext(path)
    if suffix in SUFFIXES and not image_files.is_hidden(os.path.basename(path)):
      found[PurePath(stem).relative_to(folder).as_posix()].append(path)

  for entry in sorted(folder.iterdir()):
    if entry.name in first and entry.is_dir():
      for inner, _, files in os.walk(entry):
        for file in sorted(files):
          add(os.path.join(inner, file))
    elif entry.stem in first:  # an image that lies in the root itself
      add(str(entry))
  return found


def _missing(folder: Path, names: Sequence[str], missing: Sequence[str]) -> str:
  """Says which maps are missing."""
  expected = folder / f'{missing[0]}.tiff'
  near = next(parent for parent in expected.parents if parent.is_dir())
  return (
      f'{len(missing)} of {len(names)} images have no map in {folder}, {missing[0]} the first: expected '
      f'{expected} (or .tif, .TIF, .TIFF), and {near} holds {image_files.listing(near)}.')
