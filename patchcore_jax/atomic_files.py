"""Files that appear whole, or not at all; and what is said where nothing can be written."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
  """Gives a name beside `path` to write to, and renames it to `path` at the end, in place of an older file.

  Folders above `path` are made. Where an error ends the writing, nothing is left, and an older file stays.

  >>> import tempfile
  >>> path = Path(tempfile.mkdtemp()) / 'made' / 'a.txt'
  >>> with written(path) as aside:
  ...   _ = aside.write_text('all of it')
  >>> [p.name for p in path.parent.iterdir()]
  ['a.txt']
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(path.name + '.tmp')
  try:
    yield aside
    os.replace(aside, path)
  except BaseException:
    aside.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def writing_to(out: str | os.PathLike) -> Iterator[None]:
  """Makes OSErrors in a block say where nothing could be written, and what to do."""
  try:
    yield
  except OSError as e:
    raise cannot_write(out, e) from e


def cannot_write(out: str | os.PathLike, error: OSError) -> OSError:
  """Makes the error that says where nothing could be written, and what to do."""
  advice = {
      errno.ENOSPC: 'Make room for it', errno.EDQUOT: 'Make room for it',
      errno.EACCES: 'Change its permissions',
      errno.EPERM: 'Change its permissions',
      errno.EEXIST: 'There is a file where a folder is to be: move it',
      errno.ENOTDIR: 'There is a file where a folder is to be: move it',
      errno.ENOENT: 'It was moved or removed meanwhile. Leave it alone'}.get(error.errno, 'Look at the disk')
  return OSError(f'Cannot write to {out}: {error.strerror or error}. {advice}, or choose another --out.')


def check_place(path: str | os.PathLike) -> None:
  """Checks that something can be written at `path`, whose folders need not be there yet: before long work.

  Raises:
    OSError: it cannot; the message says why, and what to do.
  """
  with writing_to(path):
    tempfile.TemporaryFile(dir=next(p for p in Path(path).absolute().parents if p.exists())).close()
