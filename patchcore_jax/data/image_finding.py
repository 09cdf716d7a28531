"""Finds the images to look at: those below a folder, those of a pattern, one file, each page of a file."""

import os
from collections.abc import Iterable
from pathlib import Path

from patchcore_jax.data import passed_by
from patchcore_jax.data.image_files import file_of, is_file, is_pattern, listed, listing, root_of, suffixes


def find_images(where: str | os.PathLike) -> list[str]:
  """Lists images without labels, sorted; each page of a file with several is one, NAME#1, NAME#2 and so on.

  Args:
    where: a folder, below which all images count; a file, or a page of one, as NAME#2; or a pattern with *, ?
      or [, in which ** stands for any folders, such as 'parts/*/good'.

  Raises:
    ValueError: nothing there, or no images in it.
    OSError: the folder cannot be read.
  """
  where = os.fspath(where)
  if is_file(where):
    return pages_of(where)
  if not os.path.isdir(where) and not is_pattern(where):
    raise ValueError(f'{where} does not exist: expected a folder of images, a file, or a pattern such as '
                     "'parts/*.png'.")
  if not os.path.isdir(root := root_of(where)):
    raise ValueError(f'The pattern {where!r} matches no image: there is no folder {root}.')
  found = listed(where)
  if found.images:
    return with_pages(found.images)
  what = f'No images in {where} or below it' if os.path.isdir(where) else (
      f'The pattern {where!r} matches no image')
  there = '; '.join(passed_by.of_listing(where, found)) or (
      listing(Path(where)) if os.path.isdir(where) else 'nothing')
  raise ValueError(f'{what}: expected files named {suffixes()}; found {there}.')


def pages_of(path: str) -> list[str]:
  """Lists the images of a file: itself, or where it has several pages NAME#1, NAME#2 and so on.

  Raises:
    ValueError: another file has the name of a page.
  """
  from patchcore_jax.data import image_contents  # NumPy, which a slip of the user need not wait for

  number = 1 if file_of(path) != path else image_contents.num_pages(path)
  if number == 1:
    return [path]
  pages = [f'{path}#{i + 1}' for i in range(number)]
  if twice := next(filter(os.path.lexists, pages), None):
    raise ValueError(
        f'{twice} is a file of its own, and page {twice.rpartition("#")[2]} of {path} too: expected one '
        'thing of a name. Rename the file.')
  return pages


def with_pages(paths: Iterable[str]) -> list[str]:
  """Lists the images of several files (`pages_of`)."""
  return [page for path in paths for page in pages_of(path)]
