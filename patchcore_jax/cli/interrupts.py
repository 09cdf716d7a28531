"""What Ctrl-C does: while nothing is being written it ends the process, at once and quietly.

Afterwards it is an exception, which must not be lost.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator

NOTHING_WRITTEN = 'Nothing was written; the same command starts anew.'
TRAINING_KEPT = 'No bank was written; the same command goes on where the training was a minute ago.'
_COLLECTING = ('_xla_gc_callback',)  # what is called while Python collects garbage
_SOON = 0.02  # seconds


@contextlib.contextmanager
def ends_at_once(message: str, code: int = 130) -> Iterator[None]:
  """Has Ctrl-C end the process in a block, with a line on the standard error.

  There is no KeyboardInterrupt: libraries that are being imported swallow it, and it would wait for the
  compiler, which holds the main thread for up to a minute. Python tells of a signal through a pipe even then,
  and a thread reads that.

  Args:
    message: the line.
    code: exit code.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def wait():
    with open(reader, 'rb', buffering=0) as pipe:
      while number := pipe.read(1):
        if number[0] == signal.SIGINT:
          end(message, code)

  threading.Thread(target=wait, name='interrupts', daemon=True).start()
  handler = signal.signal(signal.SIGINT, lambda *_: None)
  descriptor = signal.set_wakeup_fd(writer)
  try:
    yield
  finally:
    signal.set_wakeup_fd(descriptor)
    signal.signal(signal.SIGINT, handler)
    os.close(writer)  # which ends the thread


@contextlib.contextmanager
def never_lost() -> Iterator[None]:
  """Has Ctrl-C raise KeyboardInterrupt in a block also where it comes while Python collects garbage.

  JAX adds a function to Python's collector, in which time passes while the network computes. Python writes
  exceptions that are raised there to the standard error, and goes on. So the signal is sent again when that
  is over, and until it is seen: CPython does not notice one that comes as its main thread waits for its turn
  before the next call returns, which may be a long one, unless another signal ends that.
  """
  if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or (
      threading.current_thread() is not threading.main_thread()):
    yield
    return

  seen = 0

  def handle(number, frame):
    nonlocal seen
    seen += 1
    if _is_collecting(frame):
      threading.Thread(target=send_again, args=(number, seen), name='interrupts', daemon=True).start()
    else:
      raise KeyboardInterrupt

  def send_again(number, before):
    time.sleep(_SOON)
    while seen == before:
      os.kill(os.getpid(), number)
      time.sleep(_SOON)

  signal.signal(signal.SIGINT, handle)
  try:
    yield
  finally:
    seen += 1  # or what is sent again would come after the block
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_collecting(frame: types.FrameType | None) -> bool:
  """Tells whether Python collects garbage; also where this interrupts what an earlier interrupt started."""
  while frame is not None:
    if frame.f_code.co_name in _COLLECTING:
      return True
    frame = frame.f_back
  return False


def end(message: str, code: int) -> None:
  """Ends the process without the orderly exit of Python, which crashes while threads of JAX compute."""
  if message:
    print(message, file=sys.stderr)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
      stream.flush()
  os._exit(code)
