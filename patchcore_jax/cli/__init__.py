"""The command `patchcore`: one module a subcommand, imported when it is used."""

import importlib
import sys

import click

from patchcore_jax import __version__
from patchcore_jax.cli import interrupts, options

# In the order of the help: a line for each, so that the help need not import them.
COMMANDS = {
    'fit': 'Learn a part from images of good ones.',
    'predict': 'Score images, and show what was found.',
    'serve': 'Answer over HTTP, with a page to try it in a browser.',
    'bank': 'Look into a model, and change it.',
    'export': 'Write a program that scores images with JAX alone.',
    'evaluate': 'Fit and measure on labelled data.',
    'submission': "Write, check and pack what MVTec AD 2's server scores.",
    'backbones': 'List networks, and fetch their weights.',
    'demo': 'Try everything on drawn parts.',
}


class _Commands(options.Group):
  """The subcommands, found by name."""

  def list_commands(self, ctx):
    return list(COMMANDS)

  def get_command(self, ctx, name):
    if name not in COMMANDS:
      return None
    return importlib.import_module(f'patchcore_jax.cli.{name}').command

  def format_commands(self, ctx, formatter):
    with formatter.section('Commands'):
      formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Commands, context_settings={'help_option_names': ['-h', '--help'], 'max_content_width': 110})
@click.version_option(__version__, prog_name='patchcore')
def command() -> None:
  """Find defects in images of parts, after seeing good parts only (PatchCore in JAX).

  \b
  patchcore fit GOOD --out BANK              learn a part from a folder of good images
  patchcore predict BANK IMAGES --out DIR    score new images, with heatmaps and a report

  `patchcore COMMAND --help` explains each.
  """


def _sentence(error):
  """Makes click's message of a mistake one line that ends as a sentence does, and says what is usual."""
  text = ' '.join(error.format_message().split())
  if text.startswith('Got unexpected extra argument'):
    return f'{text}. Put a path with spaces, and a pattern, in quotes.'
  return text if text.endswith(('.', '?', '?)')) else f'{text}.'


def main(arguments: list[str] | None = None) -> None:
  """Runs the command line. A mistake is one line on the standard error, and exit code 2 or 1.

  Args:
    arguments: those of the command line; None for those of the process, which ends with the command.
  """
  try:
    code = command.main(arguments, prog_name='patchcore', standalone_mode=False)
  except click.exceptions.NoArgsIsHelpError as e:
    print(e.format_message())
    code = 0
  except click.ClickException as e:
    hint = f' See {e.ctx.command_path} --help.' if getattr(e, 'ctx', None) else ''
    print(f'error: {_sentence(e)}{hint}', file=sys.stderr)
    code = 2
  except click.Abort:
    print('error: interrupted.', file=sys.stderr)
    code = 130
  except SystemExit as e:
    code = e.code
  if arguments is None and code == 130:
    interrupts.end('', code)
  sys.exit(code if isinstance(code, int) else 0)
