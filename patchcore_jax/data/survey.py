"""A look at image files before the long work: sizes, kinds, equal files, and which are unlike the rest."""

import collections
import concurrent.futures
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from patchcore_jax.data import image_contents, image_files
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.settings import Preprocessing

# A size or mode that fewer than one file in so many has is odd.
_ODD_SHARE = 20
_THREADS = 8


class Survey(NamedTuple):
  """What was found in files, by their headers. A page of a file with several counts as a file.

  Attributes:
    sizes: {(width, height), upright: number of files}, the most frequent first.
    modes: {kind, such as 'RGB', 'L' or 'gray of 16 bits' (`Contents.kind`): number of files}, likewise.
    odd: [(path, why)] of files with a rare size or mode.
    duplicates: groups of paths whose files are equal, byte by byte.
    unreadable: [(path, why)].
    deep: number of files with more than 8 bits a value.
    transparent: number of files whose pixels can be transparent.
    banded: number of files with more than three bands, or two.
    pages: {file: number of pages} of the files with several.
  """

  sizes: dict[tuple[int, int], int]
  modes: dict[str, int]
  odd: list[tuple[str, str]]
  duplicates: list[list[str]]
  unreadable: list[tuple[str, str]]
  deep: int = 0
  transparent: int = 0
  banded: int = 0
  pages: dict[str, int] = {}  # noqa: RUF012

  def reading(self, preprocessing: Preprocessing) -> list[str]:
    """Tells in lines what is done to files that are not simply read: bands, transparency, pages.

    >>> Survey({}, {}, [], [], [], transparent=3).reading(Preprocessing())
    ['3 images have transparency: what is transparent is laid on the colour 255,255,255 (--background)']
    """
    lines = []
    if self.pages:
      files, pages = len(self.pages), sum(self.pages.values())
      name = f'{next(iter(self.pages))}#1'
      lines.append(f'{files} file{"s have" if files > 1 else " has"} several pages, {pages} in all, each of '
                   f'which is an image: {name} and so on')
    if preprocessing.bands:
      lines.append(
          f'of each image the bands {", ".join(map(str, preprocessing.bands))} are seen (--bands), as red, '
          'green and blue; others are not')
    if self.transparent:
      what = 'is laid on the colour ' + ','.join(map(str, preprocessing.background))
      if not preprocessing.background:
        what = 'is seen as if it were not'
      lines.append(f'{_images(self.transparent)} transparency: what is transparent {what} (--background)')
    return lines

  def check_bands(self, preprocessing: Preprocessing) -> None:
    """Raises ValueError where all files have bands of which three must be chosen, and none are."""
    if self.banded and self.banded == sum(self.modes.values()) and not preprocessing.bands:
      kinds = ', '.join(f'{n} {mode}' for mode, n in self.modes.items())
      raise ValueError(
          f'The images have bands of which the network sees three ({kinds}): choose them, such as --bands '
          '1,2,3 for red, green and blue, or give images of one band or three.')


def survey(paths: Sequence[str]) -> Survey:
  """Surveys image files by their headers, and compares their contents; it decodes none.

  Args:
    paths: image files, or pages of them.
  """
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    looked_at = list(zip(paths, pool.map(_look, paths), strict=True))
  unreadable = [(path, found) for path, found in looked_at if isinstance(found, str)]
  found = {path: known for path, known in looked_at if not isinstance(known, str)}
  contents = collections.defaultdict(list)
  for path, (_, digest) in found.items():
    contents[digest, image_files.split_page(path)[1]].append(path)
  headers = {path: header for path, (header, _) in found.items()}
  sizes, modes = (
      dict(collections.Counter(values).most_common())
      for values in ([h.size for h in headers.values()], [h.kind for h in headers.values()]))
  odd = []
  for path, header in headers.items():
    rare = []
    if _ODD_SHARE * sizes[header.size] < len(headers):
      rare.append('{} x {} pixels'.format(*header.size))
    if _ODD_SHARE * modes[header.kind] < len(headers):
      rare.append(f'mode {header.kind}')
    if rare:
      odd.append((path, ', '.join(rare)))
  return Survey(
      sizes, modes, odd, [g for g in contents.values() if len(g) > 1], unreadable,
      deep=sum(h.deep for h in headers.values()), transparent=sum(h.alpha for h in headers.values()),
      banded=sum(h.bands not in (1, 3) for h in headers.values()),
      pages={image_files.file_of(path): h.pages for path, h in headers.items() if h.pages > 1})


def range_line(preprocessing: Preprocessing, outside: float, deep: int) -> str:
  """Tells in a line how the values of files with more than 8 bits are read; '' where there are none.

  Args:
    preprocessing: with its range.
    outside: the largest share of a training image that lies outside of it.
    deep: how many such files there are.

  >>> range_line(Preprocessing(value_range=(29400.0, 29900.0)), 0.002, 8)[:71]
  '8 images have more than 8 bits: values from 29400 to 29900 become black'
  """
  if not deep or not preprocessing.value_range:
    return ''
  low, high = preprocessing.value_range
  beyond = f'; up to {100 * outside:.2g} % of a training image lies outside' if outside else ''
  return (f'{_images(deep)} more than 8 bits: values from {low:.6g} to {high:.6g} become black to white '
          f'(--value-range){beyond}')


def _look(path: str):
  """Reads a file's header and the digest of its contents, or returns why that cannot be done."""
  try:
    header = image_contents.contents(path)
    file = image_files.file_of(path)
    return header, hashlib.sha256(Path(file).read_bytes()).digest()
  except (ImageError, OSError) as e:
    return str(e)


def _images(count: int) -> str:
  return f'{count} image{"s have" if count > 1 else " has"}'
