"""A look at image files before the long work: sizes, modes, equal files, and which are unlike the rest."""

import collections
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from patchcore_jax.data import preprocess

# A size or mode that fewer than one file in so many has is odd.
_ODD_SHARE = 20


class Survey(NamedTuple):
  """What was found in files, by their headers.

  Attributes:
    sizes: {(width, height): number of files}, the most frequent first.
    modes: {Pillow's name of the mode, such as 'RGB' or 'L': number of files}, likewise.
    odd: [(path, why)] of files with a rare size or mode.
    duplicates: groups of paths whose files are equal, byte by byte.
    unreadable: [(path, why)].
  """

  sizes: dict[tuple[int, int], int]
  modes: dict[str, int]
  odd: list[tuple[str, str]]
  duplicates: list[list[str]]
  unreadable: list[tuple[str, str]]


def survey(paths: Sequence[str]) -> Survey:
  """Surveys image files by their headers, and compares their contents; it decodes none.

  Args:
    paths: image files.
  """
  found, unreadable, contents = {}, [], collections.defaultdict(list)
  for path in paths:
    try:
      with Image.open(path, formats=preprocess.FORMATS) as image:
        found[path] = image.size, image.mode
      contents[hashlib.sha256(Path(path).read_bytes()).digest()].append(path)
    # A header can break Pillow in the ways that a body can.
    except preprocess.DECODING_ERRORS as e:
      unreadable.append((path, str(e) or type(e).__name__))
  sizes, modes = (dict(collections.Counter(v[i] for v in found.values()).most_common()) for i in (0, 1))
  odd = []
  for path, (size, mode) in found.items():
    rare = []
    if _ODD_SHARE * sizes[size] < len(found):
      rare.append(f'{size[0]} x {size[1]} pixels')
    if _ODD_SHARE * modes[mode] < len(found):
      rare.append(f'mode {mode}')
    if rare:
      odd.append((path, ', '.join(rare)))
  return Survey(sizes, modes, odd, [g for g in contents.values() if len(g) > 1], unreadable)
