"""Image files as they arrive, from a camera or over a network: each is taken when it is complete."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from patchcore_jax.data import folder

_POLL = 0.2  # seconds between two looks
_SETTLE = 0.5  # a file that has not changed for so many seconds is complete
_SETTLE_EMPTY = 5.0  # an empty one was perhaps only just created


def arriving(
    where: str | os.PathLike, *, stop: threading.Event, seconds: float = math.inf,
    settle: float = _SETTLE, settle_empty: float = _SETTLE_EMPTY,
    notify: Callable[[str], None] | None = None) -> Iterator[str | None]:
  """Lists images that are there or arrive, each when its size and time have not changed for a while.

  That is the only sign that a writer is done. Should a file change after it was taken, because its writer
  paused for long, it is taken again.

  Args:
    where: a folder, whose own images count, or a pattern, as in `folder.find_images`.
    stop: ends the iterator when it is set, by another thread or a signal.
    seconds: how long the iterator waits for images before it ends.
    settle: seconds for which a file must not have changed.
    settle_empty: the same for a file that is empty.
    notify: called with a sentence when the folder cannot be read, once until it can be again.

  Returns:
    An iterator of paths, with a None where there is nothing more for now: time to finish what was begun.

  Raises:
    ValueError: a file, or a folder that does not exist.
  """
  where = os.fspath(where)
  is_folder = Path(where).is_dir()
  if not (is_folder or folder.is_pattern(where)):
    raise ValueError(f'{where} is no folder: expected one in which images arrive, or a pattern.')
  return _arriving(where, is_folder, stop, seconds, settle, settle_empty, notify)


def _arriving(where, is_folder, stop, seconds, settle, settle_empty, notify):
  end, trouble = time.monotonic() + seconds, ''
  standing: dict[str, tuple] = {}  # path -> (state, since when)
  taken: dict[str, tuple] = {}  # path -> state
  while not stop.is_set() and time.monotonic() < end:
    try:
      states, said = _states(where, is_folder), ''
    except OSError as e:
      states, said = {}, f'Cannot read {where} ({e.strerror or e}); still waiting.'
    if said and said != trouble and notify:
      notify(said)
    trouble = said
    if not said:  # files of a share that is away for a moment are remembered
      standing, taken = ({k: v for k, v in known.items() if k in states} for known in (standing, taken))
    now = time.monotonic()
    for path, state in states.items():
      if taken.get(path) == state:
        continue
      if path not in standing or standing[path][0] != state:
        standing[path] = state, now
      elif now - standing[path][1] >= (settle if state[0] else settle_empty):
        taken[path] = state
        del standing[path]
        yield path
        if stop.is_set():
          return
    yield None
    stop.wait(max(0.0, min(_POLL, end - time.monotonic())))


def _states(where, is_folder):
  """Looks at the files: {path: (size, time of the last change)}, in the order of their names."""
  paths = map(str, folder.images_in(Path(where))) if is_folder else folder.matching(where)
  states = {}
  for path in paths:
    try:
      found = os.stat(path)
    except OSError:
      continue  # moved away since
    states[path] = found.st_size, found.st_mtime_ns
  return states
