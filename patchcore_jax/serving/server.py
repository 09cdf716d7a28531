"""Listens for an app, with limits on what a connection may hold up, until it is told to end."""

import logging
import signal
import socket
import warnings

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

_GRACE_SECONDS = 30  # time for what is being worked on when the service is told to end


def listen(host: str, port: int) -> socket.socket:
  """Binds a socket; port 0 takes a free one, and `address` tells which.

  Raises:
    OSError: the address is taken or is not one of this machine's; the message says what to do.
  """
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, protocol)
    try:
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      listener.bind(address)
    except BaseException:
      listener.close()
      raise
  except OSError as e:
    raise OSError(
        f'Cannot listen on {host}:{port}: {e.strerror or e}. Choose another --port, or an address of this '
        'machine as --host.') from e
  return listener


def address(listener: socket.socket) -> str:
  """Writes the address of a socket as a browser takes it."""
  host, port = listener.getsockname()[:2]
  return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def make_server(app: Starlette, *, seconds: float) -> uvicorn.Server:
  """Makes a server of the app; `run` starts it, and setting `should_exit` ends it.

  Args:
    seconds: time within which the head of a request must have come, and an answer must be taken.
  """

  class Connection(_Connection):
    patience = seconds

  return uvicorn.Server(uvicorn.Config(
      app, http=Connection, ws='none', lifespan='on', log_level='warning', access_log=False,
      server_header=False, timeout_graceful_shutdown=_GRACE_SECONDS))


def run(server: uvicorn.Server, listener: socket.socket) -> None:
  """Serves until SIGTERM or SIGINT, then finishes what has been taken on. A second SIGINT ends at once."""
  # The answer says what Pillow warns of in damaged files; Python would keep each text for ever, to warn once.
  warnings.filterwarnings('ignore', module='PIL')
  for name in ('PIL', 'python_multipart'):  # the log gets no line for each such file either
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # uvicorn raises the signal again when it is done, for these handlers.
  before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    server.run(sockets=[listener])
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class _Connection(H11Protocol):
  """Ends a connection that does not send the head of a request, or take its answer, in `patience` seconds.

  uvicorn has no limit for either; how long a body may take is for the app.
  """

  patience: float

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._timers = {}

  def connection_made(self, transport):
    super().connection_made(transport)
    self._watch_head()

  def data_received(self, data):
    super().data_received(data)
    self._watch_head()

  def on_response_complete(self):
    super().on_response_complete()
    self._watch_head()

  def pause_writing(self):
    super().pause_writing()
    self._start('answer')

  def resume_writing(self):
    super().resume_writing()
    self._stop('answer')

  def connection_lost(self, exc):
    for name in list(self._timers):
      self._stop(name)
    super().connection_lost(exc)

  def _watch_head(self):
    """Gives the head of the next request its time; stops the clock while a request is answered."""
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop('head')
    elif 'head' not in self._timers:  # a slow head does not get more time with every byte
      self._start('head')

  def _start(self, name):
    self._stop(name)
    self._timers[name] = self.loop.call_later(self.patience, self.transport.abort)

  def _stop(self, name):
    if name in self._timers:
      self._timers.pop(name).cancel()
