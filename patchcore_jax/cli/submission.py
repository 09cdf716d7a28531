"""`patchcore submission`: writes, checks and packs a submission to the server of MVTec AD 2."""

from collections.abc import Callable
from pathlib import Path

import click

from patchcore_jax.cli import arguments, interrupts, options, terminal

_MOST_SHOWN = 20  # findings
_SHOW_CURSOR = '\x1b[?25h'  # progress bars hide it
_GOES_ON = 'Finished objects are kept; start the same command again to go on.'


@click.group('submission', cls=options.Group)
def command() -> None:
  """Write, check and pack what the server of MVTec AD 2 scores: anomaly maps of its private test images."""


def _action(name: str, short_help: str) -> Callable:
  """Makes an action of a function; the short help stands in the list of actions."""
  return command.command(name, cls=options.Command, short_help=short_help)


_data = options.option(
    '--data', default='', metavar='DATA', show_default='sizes are not compared',
    help='Folder of the data set, with whose images the sizes of the maps are compared.')


def _banks(ctx, parameter, texts):
  """Parses --bank."""
  found = dict(text.partition('=')[::2] for text in texts)
  for name, path in found.items():
    if not path:
      raise click.BadParameter(f'expected OBJECT=FOLDER, got {name!r}.')
  return found


@_action('write', 'Score the private images, and check and pack what is to be uploaded.')
@click.argument('run')
@click.argument('data')
@options.option('--out', required=True, metavar='NAME', show_default=False,
                help='Folder to write; its name is that of the submission. One that was stopped goes on.')
@options.option('--bank', 'banks', multiple=True, callback=_banks, metavar='OBJECT=FOLDER',
                show_default='in RUN', help='The bank of an object that lies elsewhere; as often as needed.')
@options.option('--rule', default='k_sigma', metavar='NAME,KEY=VALUE',
                help='How the threshold of pixels follows from maps of validation/good: k_sigma, maximum, '
                'quantile, scaled_quantile, largest_area or at_false_positive_rate, with its own keywords, '
                'such as quantile,share=0.999.')
@options.option('--scores', type=click.Choice(('ranks', 'linear')), default='ranks',
                help="How scores become 16-bit floats: 'ranks' keeps their order best, 'linear' their "
                'distances.')
@options.option('--batch-size', default=0, type=click.IntRange(min=0), group='Machine',
                help='Images that pass through the network at once; 0 for 8 on CPUs and 32 on accelerators.')
@arguments.max_megapixels
@arguments.backbone_weights
@options.common
def _write(run: str, data: str, out: str, banks: dict[str, str], rule: str, scores: str, batch_size: int,
           max_megapixels: float, backbone_weights: str, debug: bool, compilation_cache: str) -> None:
  """Score the private images of all objects of DATA with the banks of RUN, check the files, and pack them.

  RUN is the folder of `patchcore evaluate DATA --layout mvtec_ad_2 --out RUN`, or one with a bank for each
  object. NAME, NAME.json (thresholds, and how scores became 16-bit floats) and NAME.tar.gz are written; all
  maps together take tens of gigabytes.
  """
  with terminal.readable_errors(debug):
    from patchcore_jax.evaluation import submission

    wanted = submission.Options(
        data, out, submission.banks_of(run) | banks, submission.Rule.parse(rule), scores, batch_size,
        backbone_weights, max_megapixels)
    submission.check_complete(wanted)
    # An object is whole or not there, whenever the process ends; readers of banks swallow exceptions.
    cursor = _SHOW_CURSOR if terminal.console.is_terminal else ''
    with interrupts.ends_at_once(f'{cursor}error: interrupted. {_GOES_ON}'):
      terminal.keep_compiled(compilation_cache)
      with terminal.progress_bar(Path(out).name) as progress:
        submission.write(wanted, say=terminal.say, progress=progress)
    _check_and_pack(out, data, packed=True)


@_action('check', 'Look for what is wrong with a submission, made here or elsewhere.')
@click.argument('folder')
@_data
@options.common
def _check(folder: str, data: str, debug: bool, compilation_cache: str) -> None:
  """Look for what is wrong with the submission FOLDER, made here or elsewhere.

  Exit code: 0 if nothing is wrong or doubtful only, 1 otherwise.
  """
  with terminal.readable_errors(debug):
    _check_and_pack(folder, data, packed=False)


@_action('pack', 'Check a submission, and pack it.')
@click.argument('folder')
@_data
@options.common
def _pack(folder: str, data: str, debug: bool, compilation_cache: str) -> None:
  """Check the submission FOLDER, and pack it as FOLDER.tar.gz unless something is wrong."""
  with terminal.readable_errors(debug):
    _check_and_pack(folder, data, packed=True)


def _check_and_pack(folder: str, data: str, *, packed: bool) -> None:
  """Prints what was found, and packs where nothing is wrong.

  Raises:
    ValueError: something is wrong.
  """
  from patchcore_jax.evaluation import submission_check

  with terminal.progress_bar(Path(folder).name) as progress:
    found = submission_check.check(folder, data=data, progress=progress)
  for finding in sorted(found, key=lambda finding: not finding.is_error)[:_MOST_SHOWN]:
    kind = 'wrong' if finding.is_error else 'doubtful'
    terminal.say(f'{kind}: {finding.path or folder}: {finding.problem}', loud=finding.is_error)
  if len(found) > _MOST_SHOWN:
    terminal.say(f'and {len(found) - _MOST_SHOWN} more')
  if wrong := sum(finding.is_error for finding in found):
    raise ValueError(f'{folder} has {wrong} mistakes: it is not packed, and would be refused.')
  terminal.say(f'{folder}: nothing is wrong' + (f', {len(found)} doubtful' if found else ''))
  if packed:
    terminal.say(f'{submission_check.pack(folder)}: to be uploaded')
