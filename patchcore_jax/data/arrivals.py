"""Image files as they arrive, from a camera or over a network: each is taken when it is complete."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from patchcore_jax.data import image_files, passed_by

_POLL = 0.2  # seconds between two looks
_SHARE = 0.2  # of the time at most, for looks at folders of many files
_SETTLE = 0.5  # a file that has not changed for so many seconds is complete
_SETTLE_EMPTY = 5.0  # an empty one was perhaps only just created


def arriving(
    where: str | os.PathLike, *, stop: threading.Event, seconds: float = math.inf,
    settle: float = _SETTLE, settle_empty: float = _SETTLE_EMPTY,
    notify: Callable[[str], None] | None = None) -> Iterator[str | None]:
  """Lists images that are there or arrive, each when its size and time have not changed for a while.

  That is the only sign that a writer is done. Should a file change after it was taken, because its writer
  paused for long, or because another image has its name, it is taken again.

  Args:
    where: a folder, below which all images count, or a pattern, as in `image_finding.find_images`.
    stop: ends the iterator when it is set, by another thread or a signal.
    seconds: how long the iterator waits for images before it ends.
    settle: seconds for which a file must not have changed.
    settle_empty: the same for a file that is empty.
    notify: called with a sentence when a folder cannot be read, once until it can be again; when files arrive
      that look like images or videos and are not read; and at the end, when images are left.

  Returns:
    An iterator of paths, with a None where there is nothing more for now: time to finish what was begun.

  Raises:
    ValueError: a file, or a folder that does not exist.
  """
  where = os.fspath(where)
  if not (Path(where).is_dir() or image_files.is_pattern(where)):
    raise ValueError(f'{where} is no folder: expected one in which images arrive, or a pattern.')
  return _arriving(where, stop, seconds, settle, settle_empty, notify or (lambda text: None))


def _arriving(where, stop, seconds, settle, settle_empty, notify):
  end, look = time.monotonic() + seconds, _Look(where, Path(where).is_dir(), notify)
  standing: dict[str, tuple] = {}  # path -> (state, since when)
  taken: dict[str, tuple] = {}  # path -> state
  while not stop.is_set() and time.monotonic() < end:
    began = time.monotonic()
    states = look.states()
    if states is None:  # files of a share that is away for a moment are remembered
      states = {}
    else:
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
          break
    else:
      yield None
      stop.wait(max(0.0, min(max(_POLL, (now - began) / _SHARE), end - time.monotonic())))
  left = [path for path, state in (look.states() or {}).items() if taken.get(path) != state]
  if left:
    notify(f'{len(left)} image{"s have" if len(left) > 1 else " has"} arrived and not been looked at, such '
           f'as {left[0]}.')


class _Look:
  """A look at files, again and again."""

  def __init__(self, where, is_folder, notify):
    self._where, self._is_folder, self._notify = where, is_folder, notify
    self._trouble, self._others, self._told = '', frozenset(), set()

  def states(self):
    """Looks at the images: {path: (size, time of the last change)}, in order; None where they are away."""
    try:
      if self._is_folder:
        os.stat(self._where)  # what is away has no images, and is no empty folder
      found, said = image_files.listed(self._where), ''
    except OSError as e:
      found, said = None, f'Cannot read {self._where} ({e.strerror or e}); still waiting.'
    if said and said != self._trouble:
      self._notify(said)
    self._trouble = said
    if found is None:
      return None
    # What is there at two looks is no name that a writer uses for a moment.
    others = frozenset((*passed_by.looking_like_images(found.others), *found.denied))
    self._told &= others
    if new := (others & self._others) - self._told:
      for line in passed_by.passed_by_among(self._where, found, new):
        self._notify(f'{line}.')
      self._told |= new
    self._others = others
    states = {}
    for path in found.images:
      try:
        stat = os.stat(path)
      except OSError:
        continue  # moved away since
      states[path] = stat.st_size, stat.st_mtime_ns
    return states
