"""A server on loopback that speaks as much of the hub's protocol as the client needs."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator

from patchcore_jax.backbones.checkpoints import Checkpoint


class _Handler(http.server.BaseHTTPRequestHandler):

  def _answer(self, body):
    content = self.server.files.get(self.path)
    self.server.requests.append((self.command, self.path))
    if content is None:
      self.send_response(404)
      self.send_header('X-Error-Code', 'EntryNotFound')
      self.send_header('Content-Length', '0')
      self.end_headers()
      return
    self.send_response(200)
    self.send_header('X-Repo-Commit', '0' * 40)
    self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if body:
      self.wfile.write(content.sent if isinstance(content, Damaged) else content)

  def do_HEAD(self):
    self._answer(False)

  def do_GET(self):
    self._answer(True)

  def log_message(self, *args):
    pass


class Broken(bytes):
  """Says it is longer than what it sends."""

  def __len__(self):
    return super().__len__() + 1000


class Damaged(bytes):
  """Sends the same number of other bytes."""

  @property
  def sent(self) -> bytes:
    return bytes(255 - value for value in self)


@contextlib.contextmanager
def serve() -> Iterator[http.server.ThreadingHTTPServer]:
  """Serves `server.files`, {path: bytes}, at `server.endpoint`, and counts what was asked for."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  server.files, server.requests = {}, []
  server.endpoint = f'http://127.0.0.1:{server.server_port}'
  threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


def path_of(checkpoint: Checkpoint) -> str:
  """Returns the path at which the hub has a checkpoint."""
  return f'/{checkpoint.repo_id}/resolve/main/{checkpoint.filename}'
