"""Keeps the memory that images take while they are decoded within bounds.

Large images are decoded one after the other, and Pillow's own limit of pixels is off meanwhile.
"""

import contextlib
import threading
from collections.abc import Iterator

from PIL import Image

# Images that are decoded at a time have no more pixels, or are one: each takes 4 to 20 bytes a pixel.
_PIXELS_AT_ONCE = 100_000_000


@contextlib.contextmanager
def one_at_a_time(pixels: int = 0) -> Iterator[None]:
  """Keeps the room of large images that this thread decodes in a block until its end.

  Others that would take too much memory beside them wait for that. Outside of such a block the room is kept
  while decoding alone.

  Args:
    pixels: room for so many is taken at once, for work on an image that was decoded before.
  """
  with _memory.kept(), room(pixels):
    yield


class _PillowsLimit:
  """Pillow's own limit of pixels, which is off while files are decoded here: ours is the only one."""

  def __init__(self):
    self._lock, self._inside, self._limit = threading.Lock(), 0, None

  @contextlib.contextmanager
  def off(self) -> Iterator[None]:
    with self._lock:
      if not self._inside:
        self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
      self._inside += 1
    try:
      yield
    finally:
      with self._lock:
        self._inside -= 1
        if not self._inside:
          Image.MAX_IMAGE_PIXELS = self._limit


class _Memory:
  """Room for the pixels of images that are decoded at a time; who finds none waits for others to end."""

  def __init__(self, most: int):
    self._most, self._used, self._changed = most, 0, threading.Condition()
    self._mine = threading.local()

  @contextlib.contextmanager
  def room(self, pixels: int) -> Iterator[None]:
    """Takes room for a block, or until the end of the `kept` around it."""
    mine = self._mine
    with self._changed:
      # Who has room already does not wait: two that do would wait for each other.
      if not getattr(mine, 'held', 0):
        self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._most)
      self._used += pixels
    mine.held = getattr(mine, 'held', 0) + pixels
    try:
      yield
    finally:
      if not getattr(mine, 'keeping', False):
        self._give_back(pixels)

  @contextlib.contextmanager
  def kept(self) -> Iterator[None]:
    """Keeps what is taken in a block until its end."""
    if getattr(self._mine, 'keeping', False):
      yield
      return
    before, self._mine.keeping = getattr(self._mine, 'held', 0), True
    try:
      yield
    finally:
      self._mine.keeping = False
      self._give_back(self._mine.held - before if hasattr(self._mine, 'held') else 0)

  def _give_back(self, pixels):
    with self._changed:
      self._used -= pixels
      self._changed.notify_all()
    self._mine.held = getattr(self._mine, 'held', 0) - pixels


without_pillows_limit = _PillowsLimit().off
_memory = _Memory(_PIXELS_AT_ONCE)
room = _memory.room
