"""patchcore predict: scores images with a model, and shows what was found."""

import click

from patchcore_jax.cli import arguments, interrupts, options, terminal

_PICTURES, _DECISIONS, _MACHINE = 'Pictures', 'Decisions', 'Machine'
_INTERRUPTED = f'error: interrupted. {interrupts.NOTHING_WRITTEN}'


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
                help='Take images as they arrive, also in folders below, each when its size has stood still, '
                'until Ctrl-C.')
@options.option('--watch-seconds', type=click.FloatRange(0), default=0.0, metavar='SECONDS',
                show_default='no end', help='End --watch after so long.')
@options.option('--why', is_flag=True, group=_PICTURES,
                help='Draw the most anomalous patch of each image beside the nearest normal one.')
@options.option('--overlays/--no-overlays', default=True, group=_PICTURES, help='Draw heatmaps.')
@options.option('--maps', type=click.Choice(('npy', 'tif', 'none')), default='npy', group=_PICTURES,
                help='Write anomaly maps as NumPy arrays or 32-bit TIFF.')
@options.option('--masks', is_flag=True, group=_PICTURES,
                help='Write the regions above the pixel threshold as PNG masks, white on black.')
@options.option('--scale', callback=_scale, metavar='LOW,HIGH', group=_PICTURES,
                show_default="half of the bank's pixel threshold, and twice that",
                help='Values of the map where colour begins and where it is red.')
@options.option('--threshold', type=float, group=_DECISIONS, metavar='SCORE', show_default="the bank's",
                help='Scores from here on are anomalous.')
@arguments.min_area
@options.option('--batch-size', type=click.IntRange(1), default=None, group=_MACHINE,
                show_default='8, or 1 with --watch', help='Images that pass through the network at once.')
@arguments.max_megapixels
@arguments.backbone_weights
@options.common
@click.pass_context
def command(
    ctx, bank, images, out, batch_size, backbone_weights, compilation_cache, debug, **settings) -> None:
  """Score IMAGES with the model BANK, and show what was found.

  IMAGES is a folder, below which all images count, a file, or a pattern such as 'parts/*/new'. Each page of a
  file with several is an image, NAME#1, NAME#2 and so on. DIR then holds predictions.csv and
  predictions.jsonl (a row for each image), overlays/, maps/, masks/, why/ and report.html. Pictures and
  positions are in pixels of the original images.

  Exit code: 0 if every image was scored, 2 if some could not be, 1 if the run failed, 130 if it was stopped.
  """
  with terminal.readable_errors(debug):
    arguments.check_model(bank)
    arguments.check_images(images, arriving=settings['watch'])
    with interrupts.ends_at_once(*(('Ended.', 0) if settings['watch'] else (_INTERRUPTED, 130))):
      from patchcore_jax.report import prediction_run

      terminal.keep_compiled(compilation_cache)
      wanted = prediction_run.Options(
          bank, images, out, batch_size=batch_size or 0, weights=backbone_weights, **settings)
      prepared = prediction_run.prepare(wanted, say=terminal.say)
    try:
      summary = prediction_run.run(wanted, prepared, say=terminal.say)
    except KeyboardInterrupt as e:
      raise terminal.Interrupted(str(e) or interrupts.NOTHING_WRITTEN) from e
    except prediction_run.Unanswered as e:
      terminal.fail(str(e))
  ctx.exit(130 if summary.stopped else 2 if summary.failed else 0)
