"""Files that appear whole, or not at all."""

import contextlib
import os
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
