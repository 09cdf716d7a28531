"""Tells in lines which folders images were found in, and what was passed by there.

Nothing is left out unsaid: hidden files, what an earlier prediction wrote, and what is no image by its name
are counted, those that look like images or videos first.
"""

import collections
import os
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from patchcore_jax.data.image_files import Listing, file_of, is_file, listed, root_of, shown, suffixes

# Files that hold images or videos, as their names tell, but of kinds that are not read.
_VIDEOS = (
    '.avi', '.mp4', '.m4v', '.mov', '.mkv', '.mpg', '.mpeg', '.wmv', '.webm', '.mjpg', '.mjpeg', '.flv',
    '.3gp', '.mts', '.m2ts', '.h264', '.y4m', '.yuv')
_OTHER_IMAGES = (
    '.heic', '.heif', '.avif', '.jp2', '.j2k', '.jpx', '.jxl', '.jxr', '.jls', '.raw', '.dng', '.cr2', '.cr3',
    '.nef', '.arw', '.orf', '.rw2', '.psd', '.svg', '.eps', '.exr', '.hdr', '.tga', '.pcx', '.ico', '.pfm',
    '.pam', '.npy', '.npz', '.mat', '.dcm', '.fits', '.sgi', '.xcf', '.dds', '.qoi', '.mpo', '.apng', '.pdf')
# How the files begin that are read, so that one without a suffix is not taken for a text.
_BEGINNINGS = (b'\x89PNG\r\n', b'\xff\xd8\xff', b'GIF8', b'II*\0', b'MM\0*', b'BM')
_SHOWN = 3  # names in a line
_MOST_FOLDERS = 12
_MOST_OPENED = 1000  # files without a known suffix whose beginning is looked at


def origins(where: str | os.PathLike, paths: Sequence[str]) -> list[str]:
  """Tells in lines which folders images come from, where there are several, and which files have pages.

  Args:
    where: what `image_finding.find_images` was given.
    paths: what it found.
  """
  root = root_of(os.fspath(where))
  folders = _counted(list(dict.fromkeys(map(file_of, paths))), root)
  pages = collections.Counter(file for p in paths if (file := file_of(p)) != p)
  lines = [f'images of {len(folders)} folders: {_counts(folders)}'] if len(folders) > 1 else []
  if pages:
    lines.append('each page is an image of its own: ' + _some([
        f'{_relative(path, root)} has {n}' for path, n in pages.items()]))
  return lines


def left_out(where: str | os.PathLike, paths: Sequence[str]) -> list[str]:
  """Tells in lines what was passed by: images beside a folder that was taken, and files that are none.

  Args:
    where: a folder, or a pattern.
    paths: the images that were taken of it.
  """
  where = os.fspath(where)
  if is_file(where) or not paths:
    return []
  root, taken = root_of(where), {file_of(path) for path in paths}
  unread, lines = [p for p in listed(where).images if p not in taken], []
  if unread:
    names = sorted({os.path.dirname(path) for path in taken})
    lines.append(f'taken: {_some(names)}. Not read, beside it: {_counts(_counted(unread, root))}')
  return lines + passed_by(where)


def unread_of(
    where: str | os.PathLike, paths: Iterable[str], aside: str | os.PathLike = '') -> list[str]:
  """Tells in lines which images below a folder are not among some, and what looks like images and is none.

  Args:
    where: the folder.
    paths: images that were taken of it.
    aside: a folder that is not told of.
  """
  where = os.fspath(where)
  found, taken = listed(where), {file_of(path) for path in paths}
  if aside:
    found = Listing(*([p for p in files if not p.startswith(os.path.join(aside, ''))] for files in found))
  unread = [p for p in found.images if p not in taken]
  lines = [f'not read: {_counts(_counted(unread, Path(where)))}'] if unread else []
  return lines + of_listing(where, found._replace(others=[p for p in found.others if not _kind(p, True)[0]]))


def passed_by(where: str | os.PathLike, out: str | os.PathLike = '') -> list[str]:
  """Tells in lines what `find_images` does not take: hidden images, files that are none, and so on.

  Args:
    where: what `image_finding.find_images` is given.
    out: a folder that is written to, which is not told of.
  """
  where, found = os.fspath(where), listed(where)
  if out:
    inside = os.path.join(os.path.abspath(out), '')
    found = Listing(*([p for p in files if not os.path.abspath(p).startswith(inside)] for files in found))
  lines = of_listing(where, found)
  if found.others:
    lines[-1] += f'. Images are named {suffixes()}'
  return lines


def passed_by_among(where: str | os.PathLike, found: Listing, paths: Container[str]) -> list[str]:
  """Tells in lines what was passed by, of some paths only."""
  return of_listing(os.fspath(where), Listing(*([p for p in files if p in paths] for files in found)))


def of_listing(where: str, found: Listing) -> list[str]:
  """Tells in lines what was listed and is no image to look at."""
  root, lines = root_of(where), []
  for paths, what in (
      (found.hidden, 'hidden'), (found.written, 'pictures of an earlier prediction'),
      (found.linked, 'links to what is taken anyway'), (found.denied, 'folders that cannot be read')):
    if paths:
      lines.append(f'not read, {what}: {len(paths)} ({_some([_relative(p, root) for p in paths])})')
  if found.others:
    kinds = collections.defaultdict(list)
    for i, path in enumerate(found.others):
      kinds[_kind(path, i < _MOST_OPENED)].append(_relative(path, root))
    parts = [f'{len(names)} {kind} ({_some(names)})' for (_, kind), names in sorted(kinds.items())]
    lines.append(f'not read, because of their names: {", ".join(parts)}')
  return lines


def looking_like_images(paths: Iterable[str]) -> list[str]:
  """Lists those of other files that look like images or videos by their names."""
  return [p for p in paths if os.path.splitext(p)[1].lower() in (*_VIDEOS, *_OTHER_IMAGES)]


def _kind(path: str, looked_at: bool) -> tuple[int, str]:
  """Names the kind of a file that is not named as an image; what looks like one comes first."""
  suffix = os.path.splitext(path)[1].lower()
  if suffix in _VIDEOS or suffix in _OTHER_IMAGES:
    return 0, f'{suffix}{" video" if suffix in _VIDEOS else ""}'
  if not os.path.isfile(path):
    return 0, f'{suffix or "without suffix"}, not a file'
  if looked_at and suffix not in ('.txt', '.csv', '.json', '.xml', '.html'):
    try:
      with open(path, 'rb') as f:
        beginning = f.read(12)
    except OSError:
      beginning = b''
    if beginning.startswith(_BEGINNINGS) or beginning[8:] == b'WEBP':
      return 0, f'{suffix or "without suffix"}, images by their content'
  return 1, suffix or 'without suffix'


def _counted(paths: Sequence[str], root: Path) -> dict[str, int]:
  """Counts images by the folder that they lie in."""
  names = (_relative(os.path.dirname(p) or os.curdir, root) for p in paths)
  return dict(collections.Counter('the folder itself' if name == os.curdir else name for name in names))


def _counts(folders: dict[str, int]) -> str:
  """Lists folders with the number of their images."""
  names = [f'{name} ({number})' for name, number in folders.items()]
  more = len(names) - _MOST_FOLDERS
  return ', '.join(names[:_MOST_FOLDERS]) + (f' and {more} more folders' if more > 0 else '')


def _relative(path: str, root: Path) -> str:
  """Names a path from a folder, for messages."""
  return shown(Path(os.path.relpath(path, root)).as_posix())


def _some(names: Sequence[str]) -> str:
  """Lists the first of some names."""
  return ', '.join(names[:_SHOWN]) + (', ...' if len(names) > _SHOWN else '')
