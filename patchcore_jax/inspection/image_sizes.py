"""Images beside what the network sees: what a crop leaves out or squeezes, which size or colour is odd."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath

import numpy as np

from patchcore_jax.banks import provenance
from patchcore_jax.banks.model import Description
from patchcore_jax.data import image_contents, preprocess
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.inspection.acceptance import Questioned
from patchcore_jax.settings import Preprocessing

Size = tuple[int, int]  # (width, height) in pixels

# How many times an image is longer or larger than the others before it is asked about. A photograph turned on
# its side is 1.8 times as long (4 : 3); a copy of half the size still passes.
_ODD_ASPECT, _ODD_AREA = 1.5, 4.0
# Another shape is said from here on. What is cut by hand differs by less.
_OTHER_ASPECT = 1.1
_MULTIPLE = 32  # what a ResNet's deepest layer divides an image by
_SHOWN = 5  # names, and shares, in a message
GRAY = 'the image is gray, and all training images have colours'
COLOURED = 'the image has colours, and all training images are gray'
FULL_RANGE = 'values of more than 8 bits are read from 0 to 65535, because the model knows no range of them'
_LEAST = 0.005  # a share that is worth a line: less would be written as 0 %


def of_files(paths: Iterable[str]) -> dict[str, Size]:
  """Reads the sizes of image files, upright, from their headers; what cannot be read is left out."""
  paths = list(paths)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return {path: size for path, size in zip(paths, pool.map(_of_file, paths)) if size}


def odd(sizes: Mapping[str, Size], usual: Size | None = None) -> list[Questioned]:
  """Finds images whose size is far from that of the rest, where only few are like them.

  Args:
    sizes: {name of the image: its size}.
    usual: the size to compare with, where it is known; then all that are far from it are odd.

  >>> sizes = {f'{i}.png': (1024, 1024) for i in range(20)} | {'dot.png': (1, 1)}
  >>> [image.line for image in odd(sizes)]
  ['dot.png: is 1 x 1 pixels, and the others are about 1024 x 1024']
  """
  if not sizes or usual is None and len(sizes) < 3:
    return []
  counts = collections.Counter(sizes.values())
  places = {size: _place(size) for size in counts}
  of_all = np.array([places[size] for size in sizes.values()])
  if usual is None:
    middle, others = np.sort(of_all, axis=0)[(len(sizes) - 1) // 2], 'the others are about'
    most = max(min(len(sizes) // 4, 5), len(sizes) // 10, 1)
  else:
    middle, others, most = _place(usual), 'the training images are about', len(sizes)
  rare = {size for size, place in places.items()
          if not _near(place, middle) and np.count_nonzero(_near(of_all, place)) <= most}
  if not rare:
    return []
  width, height = usual or preprocess.usual_size({s: n for s, n in counts.items() if s not in rare} or counts)
  return [Questioned(name, f'is {size[0]} x {size[1]} pixels, and {others} {width} x {height}')
          for name, size in sizes.items() if size in rare]


def usual(sizes: Iterable[Size]) -> Size | None:
  """Finds the size that stands for all (`preprocess.usual_size`); None where there is none."""
  sizes = list(sizes)
  return preprocess.usual_size(sizes) if sizes else None


def on_one_grid(
    sizes: Iterable[Size], preprocessing: Preprocessing | None, multiple: int = 1) -> Preprocessing:
  """Chooses one size of the network's input for images of any size, where no crop and no padding does.

  Args:
    sizes: those of the images.
    preprocessing: with a resize of one side, the other follows from the usual size. None for the whole image
      at the usual scale (`preprocess.whole_image`).
    multiple: what the sides must be multiples of for the network; only where there is no preprocessing.
  """
  found = usual(sizes)
  if found is None:  # no file can be read, which whoever reads them says
    return preprocessing or Preprocessing()
  if preprocessing is None:
    return preprocess.whole_image([found], multiple if multiple > 1 else _MULTIPLE)
  if preprocessing.crop or preprocessing.pad or len(preprocessing.resize) != 1:
    return preprocessing
  width, height = found
  return dataclasses.replace(preprocessing, resize=preprocess.resized_size(height, width, preprocessing))


def at_fit(sizes: Mapping[str, Size], preprocessing: Preprocessing) -> list[str]:
  """Tells in lines how the network sees the images that a model is fitted on, and what it does not see.

  Args:
    sizes: {name of the image: its size}.
    preprocessing: what is done to them.

  >>> at_fit({'a.png': (500, 500)}, Preprocessing())
  ['23 % of each image is not inspected: a crop leaves it out. Without the crop all is']
  >>> at_fit({'a.png': (2000, 500)}, Preprocessing(resize=(224, 896), crop=()))
  ['the whole of each image is inspected, at 896 x 224 pixels; --resize HEIGHT,WIDTH chooses another size']
  """
  places = _places(sizes.values(), preprocessing)
  if not places:
    return []
  lines, seen = left_out(sizes.values(), preprocessing), {place.size for place in places.values()}
  if not lines:
    (height, width), *others = seen
    lines = ['the whole of each image is inspected' + ('' if others else (
        f', at {width} x {height} pixels{_why_so_small(sizes, height, width)}; --resize HEIGHT,WIDTH chooses '
        'another size'))]
  return lines + squeezed(sizes, preprocessing)


def left_out(sizes: Iterable[Size], preprocessing: Preprocessing) -> list[str]:
  """Tells in a line, if there is something to tell, the share of images that a crop leaves out."""
  shares = [preprocess.not_inspected(height, width, preprocessing)
            for width, height in _places(sizes, preprocessing)]
  if max(shares, default=0) < _LEAST:
    return []
  return [f'{_range(shares)} of each image is not inspected: a crop leaves it out. Without the crop all is']


def squeezed(sizes: Mapping[str, Size], preprocessing: Preprocessing) -> list[str]:
  """Tells in lines that images of several sizes are brought to one, and which are squeezed by that.

  >>> sizes = {'a.png': (640, 480), 'b.png': (640, 480), 'c.png': (640, 640)}
  >>> for line in squeezed(sizes, Preprocessing(resize=(224, 288), crop=())):
  ...   print(line)
  2 sizes of images are brought to one, 288 x 224 pixels
  1 of 3 images is squeezed, by up to 1.3 times: c.png
  """
  if len(preprocessing.resize) != 2:
    return []
  (height, width), different, lines = preprocessing.resize, len(set(sizes.values())), []
  if different > 1:
    lines.append(f'{different} sizes of images are brought to one, {width} x {height} pixels')
  stretch = {name: _times(_aspect(*size), width / height) for name, size in sizes.items()}
  if others := [name for name, times in stretch.items() if times > _OTHER_ASPECT]:
    lines.append(
        f'{len(others)} of {len(sizes)} images {"is" if len(others) == 1 else "are"} squeezed, by up to '
        f'{_short(max(stretch.values()))} times: {_some(others)}')
  return lines


def of_training(description: Description) -> list[str]:
  """Tells in a line, if there is something to tell, the share of images as a model's own that is left out."""
  if description.original_size is None or description.preprocessing is None:
    return []
  return left_out([description.original_size], description.preprocessing)


def remark(size: Size, description: Description) -> str:
  """Tells in a few words what is unusual about the size of an image for a model; '' where nothing is.

  >>> description = Description('padim', {}, (), (224, 224), 5, original_size=(640, 640))
  >>> remark((640, 640), description), remark((1280, 640), description)
  ('', 'the image is 1280 x 640 pixels, of another shape than the training images (640 x 640)')
  """
  usual = description.original_size
  if usual is None:
    return ''
  stretch = _times(_aspect(*size), _aspect(*usual))
  scale = _times(_area(*size), _area(*usual))
  width, height = size
  if stretch > _OTHER_ASPECT:
    return (f'the image is {width} x {height} pixels, of another shape than the training images '
            f'({usual[0]} x {usual[1]})')
  if scale > _ODD_AREA:
    far = 'larger' if _area(*size) > _area(*usual) else 'smaller'
    return (f'the image is {width} x {height} pixels, far {far} than the training images ({usual[0]} x '
            f'{usual[1]})')
  return ''


def remark_on_colours(pixels: np.ndarray, description: Description) -> str:
  """Tells in a few words that an image [h, w, 3] has colours and a model knows none, or the other way round.

  >>> description = Description('padim', {}, (), (1, 1), 5, colours='coloured')
  >>> remark_on_colours(np.zeros((1, 1, 3), np.uint8), description)
  'the image is gray, and all training images have colours'
  """
  if description.colours not in ('gray', 'coloured'):
    return ''
  coloured = bool(provenance.has_colour(pixels))
  return '' if coloured == (description.colours == 'coloured') else COLOURED if coloured else GRAY


class Remarks:
  """Says once, as images come, what of them is not inspected, and that some are of another shape or colour.

  Several threads may use it.

  Args:
    description: that of the model.
    say: called with a line.
  """

  def __init__(self, description: Description, say: Callable[[str], None]):
    self._description, self._say = description, say
    self._shares, self._others, self._noted, self._lock = set(), False, set(), threading.Lock()

  def see(self, size: Size, not_inspected: float, name: str, *, note: str = '') -> None:
    """Takes notice of an image.

    Args:
      size: (width, height) of the original.
      not_inspected: the share of it that is not inspected, 0 to 1.
      name: what it is called.
      note: of its finding.
    """
    with self._lock:
      self._see(size, not_inspected, name)
      for text in (FULL_RANGE, GRAY, COLOURED):
        if text in note and text not in self._noted:
          self._noted.add(text)
          self._say(f'{name}: {text}. Its scores may mean less; this is said once')

  def _see(self, size, not_inspected, name):
    share = _percent(not_inspected)
    if not_inspected >= _LEAST and share not in self._shares and len(self._shares) < _SHOWN:
      self._shares.add(share)
      self._say(f'{share} of each image of {size[0]} x {size[1]} pixels is not inspected: the bank was '
                'fitted with a crop')
    if not self._others and (text := remark(size, self._description)):
      self._others = True
      self._say(f'{name}: {text}. Its scores may mean less; this is said once')


def _of_file(path: str) -> Size | None:
  """Reads the size of an image file, upright; None where it cannot be read."""
  try:
    size = image_contents.contents(path).size
  except ImageError:
    return None
  return size if min(size) > 0 else None


def _places(sizes: Iterable[Size], preprocessing: Preprocessing) -> dict[Size, preprocess.Geometry]:
  """Finds where images of each size go; what will be refused by name when it is read is left out."""
  places = {}
  for width, height in dict.fromkeys(sizes):
    with contextlib.suppress(ValueError):
      places[width, height] = preprocess.geometry_of(height, width, preprocessing)
  return places


def _why_so_small(sizes: Mapping[str, Size], height: int, width: int) -> str:
  """Says that the size of the network's input is bounded for long images, where it is."""
  short, usual_width_height = preprocess.SHORT_SIDE, usual(sizes.values())
  if min(height, width) >= short or preprocess.whole_size(*usual_width_height[::-1]) != (height, width):
    return ''
  return f', because they are longer than 4 : 1, and more than 4 times {short} x {short} would take long'


def _place(size: Size) -> np.ndarray:
  """Places a size among others: how long and how large it is, in units of what is odd."""
  return np.array([
      math.log(_aspect(*size)) / math.log(_ODD_ASPECT), math.log(_area(*size)) / math.log(_ODD_AREA)])


def _near(places: np.ndarray, place: np.ndarray) -> np.ndarray:
  """Tells which of some places [..., 2] are no odd ones beside another."""
  return (np.abs(places - place) <= 1 + 1e-9).all(axis=-1)


def _aspect(width: int, height: int) -> float:
  return width / height


def _area(width: int, height: int) -> float:
  return width * height


def _times(one: float, other: float) -> float:
  """Computes how many times the larger of two is the smaller."""
  return max(one / other, other / one)


def _short(times: float) -> str:
  """Writes how many times something is.

  >>> _short(1.284), _short(777.8)
  ('1.3', '778')
  """
  return f'{times:.2g}' if times < 10 else f'{times:.0f}'


def _percent(share: float) -> str:
  """Writes a share; what is not all is not written as all.

  >>> _percent(0.187), _percent(0.997)
  ('19 %', '99 %')
  """
  return f'{min(round(100 * share), 99)} %'


def _range(shares: Sequence[float]) -> str:
  """Writes the least and the largest of shares."""
  low, high = (_percent(f(shares)) for f in (min, max))
  return high if low == high else f'{low.removesuffix(" %")} to {high}'


def _some(names: Sequence[str]) -> str:
  """Lists the first of some files, and says how many more there are."""
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return ', '.join(PurePath(name).name for name in names[:_SHOWN]) + more
