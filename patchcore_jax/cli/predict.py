"""patchcore predict: scores images with a model, and shows what was found."""

import click

from patchcore_jax.cli import arguments, options, terminal

_PICTURES, _DECISIONS, _MACHINE = 'Pictures', 'Decisions', 'Machine'


def _scale(ctx, parameter, text):
  """Parses --scale: (low, high), or () where it is not given."""
  if not text:
    return ()
  try:
    low, high = map(float, text.split(','))
  except ValueError as e:
    raise click.BadParameter(f'expected two numbers, the larger one last, as 1.5,6; got {text!r}.') from e
  return low, high


@click.command('predict', cls=options.Command)
@click.argument('bank')
@click.argument('images')
@options.option('--out', required=True, metavar='DIR',
                help='Folder to write to. An earlier run in it is replaced.')
@options.option('--watch', is_flag=True,
                help='Take images as they arrive, each when its size has stood still, until Ctrl-C.')
@options.option('--watch-seconds', type=click.FloatRange(0), default=0.0, metavar='SECONDS',
                show_default='no end', help='End --watch after so long.')
@options.option('--why', is_flag=True, group=_PICTURES,
                help='Draw the most anomalous patch of each image beside the nearest normal one.')
@options.option('--overlays/--no-overlays', default=True, group=_PICTURES, help='Draw heatmaps.')
@options.option('--maps', type=click.Choice(('npy', 'tif', 'none')), default='npy', group=_PICTURES,
                help='Write anomaly maps as NumPy arrays or 32-bit TIFF.')
@options.option('--scale', callback=_scale, metavar='LOW,HIGH', group=_PICTURES,
                show_default="half of the bank's pixel threshold, and twice that",
                help='Values of the map where colour begins and where it is red.')
@options.option('--threshold', type=float, group=_DECISIONS, metavar='SCORE', show_default="the bank's",
                help='Scores from here on are anomalous.')
@options.option('--batch-size', type=click.IntRange(1), default=None, group=_MACHINE,
                show_default='8, or 1 with --watch', help='Images that pass through the network at once.')
@arguments.backbone_weights
@options.common
@click.pass_context
def command(
    ctx, bank, images, out, batch_size, backbone_weights, compilation_cache, debug, **settings) -> None:
  """Score IMAGES with the model BANK, and show what was found.

  IMAGES is a folder, a file, or a pattern such as 'parts/**/*.png'. DIR then holds predictions.csv and
  predictions.jsonl (a row for each image), overlays/, maps/, why/ and report.html. Pictures and positions
  are in pixels of the original images.

  Exit code: 0 if every image was scored, 2 if some could not be, 1 if the run failed, 130 if it was stopped.
  """
  with terminal.readable_errors(debug):
    arguments.check_model(bank)
    arguments.check_images(images, arriving=settings['watch'])
    try:
      code = _run(bank, images, out, compilation_cache, settings | {
          'batch_size': batch_size or 0, 'weights': backbone_weights})
    except KeyboardInterrupt:
      if not settings['watch']:
        raise
      code = 0  # there is no other way to end it
      terminal.say('Ended.')
  ctx.exit(code)


def _run(bank, images, out, compilation_cache, settings):
  """Imports what is slow to import, runs, and returns the exit code."""
  from patchcore_jax.report import prediction_run

  terminal.keep_compiled(compilation_cache)
  summary = prediction_run.run(prediction_run.Options(bank, images, out, **settings), say=terminal.say)
  return 130 if summary.stopped else 2 if summary.failed else 0
