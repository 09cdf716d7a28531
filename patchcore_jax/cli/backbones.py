"""`patchcore backbones`: list networks, show the licence of their weights, and fetch them."""

import click

from patchcore_jax.cli import options, terminal

_IMAGENET_TERMS = (
    "ImageNet's terms of use restrict its images to non-commercial research. What that means for weights "
    'trained on them is for you to judge.')


@click.group(cls=options.Group)
def command() -> None:
  """List networks, and fetch their weights.

  A NAME is an architecture and the tag of its weights, such as wide_resnet50_2.tv_in1k.
  """


@command.command('list')
def list_all() -> None:
  """List every network with its weights, and where they are."""
  from patchcore_jax.backbones import checkpoints

  heads = 'NAME', 'TRAINED ON', 'LICENCE', 'SIZE', 'HERE'
  rows = [
      (c.name, c.trained_on, c.licence, f'{c.megabytes:g} MB', _whereabouts(c))
      for c in checkpoints.CHECKPOINTS.values()]
  widths = [max(map(len, column)) for column in zip(heads, *rows)]
  for row in (heads, *rows):
    terminal.say('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
  name = checkpoints.best_installed()
  terminal.say('')
  terminal.say(f"'auto' stands for {name} here.")
  if advice := checkpoints.better_than(name):
    terminal.say(advice)


def _whereabouts(checkpoint):
  """Says in a word or two where the weights are."""
  from patchcore_jax.backbones import checkpoints

  if checkpoints.installed(checkpoint):
    return 'in the package' if checkpoint.packaged else 'cached'
  return 'to be installed' if checkpoint.packaged else 'to be fetched'


@command.command()
@click.argument('name')
def licence(name: str) -> None:
  """Show the licence and the source of the weights NAME."""
  from patchcore_jax.backbones import checkpoints

  with terminal.readable_errors():
    checkpoint = checkpoints.find(name)
  terminal.say(f'{checkpoint.name}: {checkpoint.licence}, {checkpoint.licence_url}')
  terminal.say(f'Trained by {checkpoint.origin}, on {checkpoint.trained_on}.')
  if not checkpoint.packaged:
    terminal.say(f'File: {checkpoint.url}')
  if checkpoint.torch_file:
    terminal.say(f'The same weights: https://download.pytorch.org/models/{checkpoint.torch_file}')
  if checkpoint.terms:
    terminal.say(
        'It must be accepted before the file is fetched: patchcore backbones fetch '
        f'{checkpoint.name} --accept-licence')
  if checkpoint.trained_on == checkpoints.IMAGENET:
    terminal.say(_IMAGENET_TERMS)


@command.command()
@click.argument('name')
@click.option('--accept-licence', is_flag=True,
              help='Accept the licence of weights that ask for it: `patchcore backbones licence NAME`.')
def fetch(name: str, accept_licence: bool) -> None:
  """Download and verify the weights NAME, once.

  They go to the cache of the Hugging Face Hub, which HF_HOME moves; HF_ENDPOINT names a mirror.
  """
  from patchcore_jax.backbones import checkpoints

  with terminal.readable_errors():
    checkpoint = checkpoints.find(name)
    there = checkpoints.installed(checkpoint)
    if there is not None:
      terminal.say(f'{name} is on this machine: {there}')
      return
    if accept_licence and not checkpoint.terms:
      raise ValueError(
          f'{name} has the licence {checkpoint.licence}, which asks for no acceptance: leave out '
          '--accept-licence.')
    if accept_licence or not checkpoint.terms:
      terminal.say(f'Downloading {name}, {checkpoint.megabytes:g} MB, {checkpoint.licence}.')
    path = checkpoints.fetch(checkpoint, accept_licence=accept_licence)
    terminal.say(f'{name} is on this machine now: {path}')
