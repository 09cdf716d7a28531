"""Lists image files by their names: those below a folder, those of a pattern, pages of a file.

A folder means all images below it. Hidden files and folders, what file browsers leave, and the pictures that
an earlier prediction wrote are no images to look at; they are listed apart, as everything that is not taken.
"""

import fnmatch
import glob
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (
    '.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.bmp', '.dib', '.tif', '.tiff', '.webp', '.gif', '.ppm',
    '.pgm', '.pbm', '.pnm')
# What file browsers, archives and network storage leave beside images; all in small letters.
_LEFT_BEHIND = (
    '__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '@eadir', '#recycle', '$recycle.bin',
    'system volume information', 'lost+found')
# What `report.predictions` writes: a folder that holds the first names was written by a run.
RUN_FILES = ('predictions.jsonl', 'predictions.csv', 'report.html')
RUN_UNFINISHED = 'predictions.unfinished'
RUN_FOLDERS = ('overlays', 'maps', 'why', 'masks', RUN_UNFINISHED)
# Names of folders of good parts, without capitals, spaces, points, hyphens and underscores.
_GOOD = (
    'good', 'ok', 'okay', 'io', 'normal', 'nominal', 'pass', 'passed', 'gut', 'defectfree', 'nodefect',
    'nodefects', 'nondefective', 'faultfree', 'anomalyfree')
_PAGE = re.compile(r'(.+)#([1-9][0-9]{0,8})', re.DOTALL)

Read = Callable[[str], bytes] | None


class Listing(NamedTuple):
  """What lies below a folder, or agrees with a pattern. All are sorted paths.

  Attributes:
    images: image files. One of several pages is one of these.
    hidden: image files that are hidden, or lie in hidden folders.
    others: files that are not named as images.
    written: pictures that an earlier prediction wrote.
    linked: links to what is listed anyway, or to a folder around it.
    denied: folders that cannot be read.
  """

  images: list[str]
  hidden: list[str]
  others: list[str]
  written: list[str]
  linked: list[str]
  denied: list[str]


def listed(where: str | os.PathLike) -> Listing:
  """Lists what lies below a folder, a file, or what agrees with a pattern (folders that do: all below them).

  A folder is looked into once, however many links lead there.

  Args:
    where: a folder, a file, or a pattern with *, ? or [, in which ** stands for any folders. A folder or file
      that is really called so wins over the pattern.

  Raises:
    OSError: the folder cannot be read.
  """
  where, walk = os.fspath(where), _Walk()
  if os.path.isdir(where):
    walk.folder(where, top=True)
  elif is_pattern(where):
    root = os.fspath(root_of(where))
    walk.matches('' if root == os.curdir else root, Path(where).parts[len(root_of(where).parts):])
  elif is_file(where):
    walk.images.append(where)
  return walk.listing(where)


def training_folder(where: str | os.PathLike) -> str:
  """Finds the folder of good parts to fit on: `where` itself, or its train/good, good or train.

  The good folder may be called as many lines call it, such as OK.

  Returns:
    `where` where it holds no such folder, or is no folder.

  Raises:
    ValueError: several folders of good parts, or some further down, beside images of something else.

  >>> training_folder('parts/*.png')
  'parts/*.png'
  """
  where = os.fspath(where)
  if not os.path.isdir(where):
    return where
  train = in_any_case(Path(where), 'train')
  for folder in (train, Path(where)):
    found = [p for p in folders_in(folder) if is_good(p.name) and listed(p).images]
    if len(found) > 1:
      raise ValueError(
          f'{where} holds several folders of good parts, {", ".join(map(str, found))}: expected one. Name '
          "the one to fit on, or several by a pattern, such as 'parts/*/good'.")
    if found:
      return str(found[0])
  if train.is_dir() and listed(train).images:
    return str(train)
  images = listed(where).images
  good = sorted({str(folder) for p in images if (folder := _good_above(p, where))})
  others = [p for p in images if not _good_above(p, where)]
  if good and others:
    raise ValueError(
        f'{where} holds folders of good parts, such as {good[0]}, beside other images, such as {others[0]}: '
        "expected good parts only. Name a folder, or several by a pattern, such as 'parts/*/good'.")
  return where


def shown(text: str) -> str:
  """Makes a text with names of files such that a terminal shows it in one line.

  Names may hold ends of lines and other control characters, and bytes that are no UTF-8.

  >>> shown('a\\nb.png')
  'a\\\\nb.png'
  """
  return ''.join(
      repr(c)[1:-1] if unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') else c for c in text)


def split_page(path: str | os.PathLike, read: Read = None) -> tuple[str, int]:
  """Splits the name of a page into that of its file, and the number of the page from 0.

  A file that really has that name wins.

  >>> split_page('stack.tif#2'), split_page('part.png'), split_page('part #0.png')
  (('stack.tif', 1), ('part.png', 0), ('part #0.png', 0))
  """
  path = os.fspath(path)
  found = _PAGE.fullmatch(path)
  if found is None or read is None and os.path.exists(path):
    return path, 0
  return found[1], int(found[2]) - 1


def file_of(path: str) -> str:
  """Names the file of an image, which may be one of its pages.

  >>> file_of('stack.tif#2'), file_of('part.png')
  ('stack.tif', 'part.png')
  """
  return split_page(path)[0]


def is_file(path: str) -> bool:
  """Tells whether this is a file, or a page of one."""
  return os.path.isfile(path) or '#' in path and os.path.isfile(file_of(path))


def is_image(path: Path) -> bool:
  """Tells whether a file is an image by its name; hidden files do not count."""
  return _named_as_image(path.name) and not is_hidden(path.name)


def is_hidden(name: str) -> bool:
  """Tells whether a file or folder is hidden, or is one that file browsers and the like leave behind.

  >>> [name for name in ('a.png', '.a.png', '._a.png', 'Thumbs.db', '__MACOSX') if is_hidden(name)]
  ['.a.png', '._a.png', 'Thumbs.db', '__MACOSX']
  """
  return name.startswith('.') or name.lower() in _LEFT_BEHIND


def is_good(name: str, names: Sequence[str] = ()) -> bool:
  """Tells whether a folder is named as one of good parts is.

  Args:
    name: its name.
    names: the names that count, in any case; () for the usual ones.

  >>> [name for name in ('good', 'OK', 'Defect-free', 'NG', 'bad') if is_good(name)]
  ['good', 'OK', 'Defect-free']
  """
  if names:
    return name.casefold() in {n.casefold() for n in names}
  return ''.join(c for c in name.casefold() if c not in ' .-_') in _GOOD and not is_hidden(name)


def images_in(folder: Path) -> list[Path]:
  """Lists the image files of a folder itself, sorted."""
  return sorted(p for p in folder.iterdir() if is_image(p) and not p.is_dir())


def folders_in(folder: Path) -> list[Path]:
  """Lists the folders in a folder that are not hidden, sorted; none where there is no folder."""
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if not is_hidden(p.name) and p.is_dir())


def in_any_case(folder: Path, name: str) -> Path:
  """Finds the folder of this name in a folder, or the first whose name differs in capitals only."""
  if (folder / name).is_dir() or not folder.is_dir():
    return folder / name
  near = [p for p in folders_in(folder) if p.name.casefold() == name.casefold()]
  return near[0] if near else folder / name


def is_pattern(where: str) -> bool:
  """Tells whether `where` is a pattern: whether it holds *, ? or [, and nothing is really called so."""
  return glob.has_magic(where) and not os.path.lexists(where) and not is_file(where)


def root_of(where: str) -> Path:
  """Finds the folder relative to which images of `image_finding.find_images(where)` are named.

  >>> root_of('parts/*/2026/*.png').as_posix()
  'parts'
  """
  path = Path(where)
  if path.is_dir():
    return path
  if not is_pattern(where):
    return path.parent
  root = Path()
  for part in path.parts:
    if glob.has_magic(part) and not os.path.lexists(root / part):
      break
    root /= part
  return root


def listing(folder: Path, most: int = 8) -> str:
  """Lists the first names in a folder, for messages."""
  names = sorted(p.name for p in folder.iterdir())
  shown = ', '.join(names[:most]) + (', ...' if len(names) > most else '')
  return shown or 'nothing'


def suffixes() -> str:
  """Lists the suffixes of image files, for messages."""
  return ' '.join(s[1:] for s in IMAGE_SUFFIXES)


class _Walk:
  """A walk through folders, which fills the lists of a `Listing`. Links to folders are followed last."""

  def __init__(self):
    self.images, self.hidden, self.others, self.written, self.linked, self.denied = ([] for _ in range(6))
    self.folders: list[str] = []  # those whose images count
    self._seen: set[tuple[int, int]] = set()
    self._links: list[tuple[str, bool, bool]] = []
    self._met_links = False

  def folder(self, path: str, *, top: bool = False) -> None:
    """Looks into a folder, and into all below it. Raises OSError where the top one cannot be read."""
    self._look(path, False, False, top)
    around = os.path.join(os.path.realpath(path), '')
    while self._links:
      link, hidden, written = self._links.pop(0)
      # One that holds the folder itself leads in a circle, and to what was not asked for.
      if around.startswith(os.path.join(os.path.realpath(link), '')) or _identity(link) in self._seen:
        self.linked.append(link)
      else:
        self._look(link, hidden, written)

  def matches(self, folder: str, parts: Sequence[str]) -> None:
    """Adds what agrees with the rest of a pattern in a folder; folders that do, with all below them."""
    if not parts or parts == ('**',):
      if os.path.isdir(folder or os.curdir):
        self.folder(folder or os.curdir)
      else:
        self._file(folder, os.path.isfile(folder) or os.path.islink(folder), False, False)
      return
    part, rest = parts[0], parts[1:]
    if part == '**':
      inner = _Walk()
      inner.folder(folder or os.curdir)
      self._met_links |= inner._met_links
      for name in ('hidden', 'written', 'linked', 'denied'):
        getattr(self, name).extend(getattr(inner, name))
      for below in inner.folders:
        self.matches(below if folder else os.path.relpath(below).removeprefix(os.curdir), rest)
      return
    if not glob.has_magic(part) or os.path.lexists(os.path.join(folder, part)):
      names = [part] if os.path.lexists(os.path.join(folder, part)) else []
    else:
      try:
        names = sorted(os.listdir(folder or os.curdir))
      except OSError:
        self.denied.append(folder)
        return
      names = [n for n in fnmatch.filter(names, part) if part.startswith('.') or not is_hidden(n)]
    for name in names:
      path = os.path.join(folder, name)
      self._met_links |= os.path.islink(path)
      if not rest or os.path.isdir(path):
        self.matches(path, rest)

  def listing(self, where: str) -> Listing:
    """Makes the sorted lists, each file once."""
    lists = {name: sorted(set(getattr(self, name)), key=_parts) for name in Listing._fields}
    if self._met_links:
      root, first = root_of(where), {}
      straight = {p for p in lists['images']
                  if os.path.realpath(p) == os.path.join(os.path.realpath(root), os.path.relpath(p, root))}
      for path in sorted(lists['images'], key=lambda p: p not in straight):  # own names before links
        if first.setdefault(os.path.realpath(path), path) != path:
          lists['linked'].append(path)
      lists['images'] = sorted(first.values(), key=_parts)
    return Listing(**lists)

  def _look(self, path, hidden, written, top=False):
    """Looks into a folder that was not looked into before, and into the folders in it."""
    identity = _identity(path)
    if identity in self._seen:
      return
    try:
      with os.scandir(path) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
      if top:
        raise
      self.denied.append(path)
      return
    if identity is not None:
      self._seen.add(identity)
    if not (hidden or written):
      self.folders.append(path)
    of_a_run = any(entry.name in (RUN_FILES[0], RUN_UNFINISHED) for entry in entries)
    for entry in entries:
      if of_a_run and entry.name in RUN_FILES:
        continue
      inside, link = os.path.join(path, entry.name), entry.is_symlink()
      flags = hidden or is_hidden(entry.name), written or of_a_run and entry.name in RUN_FOLDERS
      self._met_links |= link
      if link and os.path.isdir(inside):
        self._links.append((inside, *flags))
      elif not link and entry.is_dir():
        self._look(inside, *flags)
      else:
        # A link that leads nowhere is an error of its image.
        self._file(inside, link or entry.is_file(), *flags)

  def _file(self, path, is_file, hidden, written):
    """Puts a file into the list that it belongs to."""
    if is_file and _named_as_image(os.path.basename(path)):
      (self.written if written else self.hidden if hidden else self.images).append(path)
    elif not hidden and not written:
      self.others.append(path)


def _parts(path: str) -> list[str]:
  """Splits a path, so that the order is that of `Path`."""
  return path.split(os.sep)


def _identity(path: str) -> tuple[int, int] | None:
  """Returns what all names of one folder have in common; None where that is not known."""
  try:
    found = os.stat(path)
  except OSError:
    return None
  return (found.st_dev, found.st_ino) if found.st_ino else None


def _named_as_image(name: str) -> bool:
  return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or name.lower() in IMAGE_SUFFIXES


def _good_above(path: str, where: str) -> str | None:
  """Finds the folder of good parts that an image below `where` lies in."""
  folder = Path(path).parent
  while folder != Path(where) and folder != folder.parent:
    if is_good(folder.name):
      return str(folder)
    folder = folder.parent
  return None
