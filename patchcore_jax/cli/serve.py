"""patchcore serve: answers over HTTP, with a page to try it in a browser."""

import contextlib
import os
from pathlib import Path

import click

from patchcore_jax import extras
from patchcore_jax.cli import arguments, interrupts, options, terminal

_LIMITS, _MACHINE = 'Limits', 'Machine'


@click.command('serve', cls=options.Command)
@click.argument('bank')
@options.option('--host', default='127.0.0.1', metavar='ADDRESS',
                help='Address to listen on. 0.0.0.0 lets other machines in: think of a token then.')
@options.option('--port', type=click.IntRange(0, 65535), default=8000,
                help='Port to listen on; 0 takes a free one.')
@options.option('--token-file', metavar='FILE', show_default='the variable PATCHCORE_TOKEN, if it is set',
                help='File with a token that requests must bring.')
@options.option('--queue', type=click.IntRange(1), default=64, group=_LIMITS,
                help='Requests at a time; more are sent away with 503.')
@options.option('--max-mb', type=click.FloatRange(0, min_open=True), default=32.0, group=_LIMITS,
                help='The most MiB of a request.')
@options.option('--max-megapixels', type=click.FloatRange(0, min_open=True), default=25.0, group=_LIMITS,
                help='The most million pixels of an image.')
@options.option('--timeout', type=click.FloatRange(0, min_open=True), default=15.0, metavar='SECONDS',
                group=_LIMITS, help='Time in which a request must have come.')
@arguments.min_area
@options.option('--batch-size', type=click.IntRange(1), default=8, group=_MACHINE,
                help='The most images that pass through the network at once.')
@options.option('--wait-ms', type=click.FloatRange(0), default=2.0, metavar='MILLISECONDS', group=_MACHINE,
                help='How long an incomplete batch waits for more images.')
@options.option('--threads', type=click.IntRange(1), default=2, group=_MACHINE,
                help='Threads that decode images and draw heatmaps.')
@arguments.backbone_weights
@options.common
def command(bank, debug, **settings) -> None:
  """Serve the model BANK over HTTP: images in, scores and heatmaps out, and a page to try it in a browser.

  \b
  patchcore serve BANK --port 8000
  curl --data-binary @part.png http://127.0.0.1:8000/inspect

  Nobody but this machine can reach it unless --host says so. Ctrl-C ends it. Needs the extra 'serve'.
  """
  with terminal.readable_errors(debug):
    arguments.check_model(bank)
    _serve(bank, **settings)


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


def _serve(
    bank, host, port, token_file, queue, max_mb, max_megapixels, timeout, min_area, batch_size, wait_ms,
    threads, backbone_weights, compilation_cache):
  """Serves until it is told to end."""
  token = read_token(token_file, os.environ.get('PATCHCORE_TOKEN'))
  with interrupts.ends_at_once('Ended.', 0):
    with extras.needed_for('Serving'):
      from patchcore_jax.serving import server

      listener = server.listen(host, port)  # before the long work: a taken port is told at once
      from patchcore_jax.serving import app
    from patchcore_jax import inspection
    from patchcore_jax.inspection import image_sizes

    limits = app.Options(
        batch_size=batch_size, wait_seconds=wait_ms / 1000, threads=threads, queue=queue,
        max_bytes=int(max_mb * 2**20), max_pixels=int(max_megapixels * 1e6), seconds=timeout,
        min_area=min_area)
    terminal.keep_compiled(compilation_cache)
    inspector = inspection.load(bank, weights=backbone_weights)
    for line in image_sizes.of_training(inspector.model.description):
      terminal.say(line)
  ready, failure, bars = False, None, contextlib.ExitStack()

  def on_ready(error):
    nonlocal ready, failure
    bars.close()
    if error is not None:
      failure, running.should_exit = error, True
      return
    ready = True
    terminal.say(
        f'Ready at {server.address(listener)}: bank {bank}, {inspector.about()}, '
        f'{"a token is needed" if token else "no token"}. Ctrl-C ends it.')

  service = app.create_app(
      inspector, name=Path(bank).name, options=limits, token=token,
      progress=bars.enter_context(terminal.progress_bar('serve')), on_ready=on_ready)
  running = server.make_server(service, seconds=limits.seconds)
  with bars:
    server.run(running, listener)
  if failure:
    raise failure
  terminal.say('Ended.')
  if not ready:
    interrupts.end('', 0)  # a thread is compiling
