"""Serves a bank over HTTP: images in, scores and heatmaps out, and a page to try it in a browser.

    python -m experiments.serve --bank=BANK --port=8000
    curl --data-binary @part.png http://127.0.0.1:8000/inspect

Nobody but this machine can reach it unless --host says so. docs/serving.md has the addresses, the answers and
the limits. Needs the extra [serve]: pip install -e '.[serve]'.
"""

import contextlib
import os
from pathlib import Path

from absl import flags

from experiments import cli
from patchcore_jax import inspection

cli.key_flags('bank', 'batch_size', 'backbone_weights')
_HOST = flags.DEFINE_string(
    'host', '127.0.0.1', 'Address to listen on. 0.0.0.0 lets other machines in: think of a token then.')
_PORT = flags.DEFINE_integer('port', 8000, 'Port to listen on; 0 takes a free one.', 0, 65535)
_TOKEN_FILE = flags.DEFINE_string(
    'token_file', None, 'File with a token that requests must bring. Without it, that of the environment '
    'variable PATCHCORE_TOKEN, if it is set.')
_WAIT_MS = flags.DEFINE_float('wait_ms', 2.0, 'How long an incomplete batch waits for more images.', 0)
_QUEUE = flags.DEFINE_integer('queue', 64, 'Requests at a time; more are sent away with 503.', 1)
_MAX_MB = flags.DEFINE_float('max_mb', 32.0, 'The most MiB of a request.', 0)
_MAX_MEGAPIXELS = flags.DEFINE_float('max_megapixels', 25.0, 'The most million pixels of an image.', 0)
_TIMEOUT = flags.DEFINE_float('timeout', 15.0, 'Seconds in which a request must have come.', 0)
_THREADS = flags.DEFINE_integer('threads', 2, 'Threads that decode images and draw heatmaps.', 1)


def main(_) -> None:
  app, server = parts()
  options = app.Options(
      batch_size=cli.BATCH_SIZE.value, wait_seconds=_WAIT_MS.value / 1000, threads=_THREADS.value,
      queue=_QUEUE.value, max_bytes=int(_MAX_MB.value * 2**20),
      max_pixels=int(_MAX_MEGAPIXELS.value * 1e6), seconds=_TIMEOUT.value)
  token = read_token(_TOKEN_FILE.value, os.environ.get('PATCHCORE_TOKEN'))
  listener = server.listen(_HOST.value, _PORT.value)  # before the long work: a taken port is told at once
  inspector = inspection.load(cli.BANK.value, weights=cli.WEIGHTS.value)
  failure, bars = None, contextlib.ExitStack()

  def on_ready(error):
    nonlocal failure
    bars.close()
    if error is not None:
      failure, running.should_exit = error, True
      return
    cli.console.print(
        f'Ready at {server.address(listener)}: bank {cli.BANK.value}, {inspector.about()}, '
        f'{"a token is needed" if token else "no token"}. Ctrl-C ends it.', markup=False)

  service = app.create_app(
      inspector, name=Path(cli.BANK.value).name, options=options, token=token,
      progress=bars.enter_context(cli.progress_bar('serve')), on_ready=on_ready)
  running = server.make_server(service, seconds=options.seconds)
  with bars:
    server.run(running, listener)
  if failure:
    raise failure
  cli.console.print('Ended.')


def parts():
  """Imports the modules of the service.

  Raises:
    ValueError: what they need is not installed.
  """
  try:
    from patchcore_jax.serving import app, server
  except ModuleNotFoundError as e:
    raise ValueError(
        f"Serving needs {e.name}, which is not installed: pip install -e '.[serve]'.") from e
  return app, server


def read_token(path: str | None, variable: str | None) -> str | None:
  """Reads the token of a file, or else of an environment variable; None without either.

  Raises:
    ValueError: an empty token, or one that a header cannot carry.
    OSError: the file cannot be read.
  """
  token = Path(path).read_text('utf-8').strip() if path else variable
  if token is None:
    return None
  if not token or not all('!' <= c <= '~' for c in token):
    raise ValueError(
        f'The token in {path or "PATCHCORE_TOKEN"} is empty or has characters that a header cannot carry: '
        'expected letters, digits and signs of ASCII, no blanks.')
  return token


if __name__ == '__main__':
  flags.set_default(cli.BATCH_SIZE, 8)
  flags.mark_flag_as_required('bank')
  cli.run(main)
