"""Arguments of several commands. What is wrong with a path is told before anything slow is imported."""

import os
from pathlib import Path

import click

from patchcore_jax.cli import options
from patchcore_jax.data import image_files, image_finding
from patchcore_jax.settings import DataSpec

backbone_weights = options.option(
    '--backbone-weights', default='', metavar='FILE', group='Machine', show_default='as at the fit',
    help="File of the network's weights, where it lies elsewhere than at the fit; for an ensemble a file for "
    "each network, in their order, joined by '+'.")

max_megapixels = options.option(
    '--max-megapixels', type=click.FloatRange(0, min_open=True), default=DataSpec.max_megapixels,
    group='Machine', help='Images of more pixels, in millions, are refused before they are decoded.')

min_area = options.option(
    '--min-area', type=click.FloatRange(0), default=0.0, group='Decisions', metavar='PIXELS',
    help='Ignore regions of fewer pixels: an image in which all regions are smaller is good.')

accept = options.option(
    '--accept', multiple=True, metavar='NAMES', group='Common', show_default=False,
    help="Images that are asked about and may be learnt from, as 'a.png,b.png', or 'all' of them.")


def check_model(path: str) -> None:
  """Raises ValueError where no model can be."""
  if os.path.isdir(f'{path}.before'):  # what a killed change left
    return
  if os.path.isdir(path):
    if not any(os.path.exists(os.path.join(path, name)) for name in ('description', 'arrays')):
      raise ValueError(
          f'{path} is a folder, and no model: expected one that `patchcore fit` made. Look at the path, and '
          'at the order of the arguments.')
    return
  found = 'it is a file' if os.path.exists(path) else 'there is nothing'
  raise ValueError(
      f'No model at {path}: expected the folder that `patchcore fit` made, and {found}. '
      'Look at the path, or fit a model: patchcore fit GOOD --out BANK.')


def check_images(where: str, *, arriving: bool = False) -> None:
  """Raises ValueError where there cannot be images, or where none can arrive."""
  if image_files.is_pattern(where) or Path(where).is_dir() or Path(where).exists() and not arriving:
    return
  if arriving:
    found = 'it is a file' if Path(where).exists() else 'it does not exist'
    raise ValueError(f'{where}: expected a folder in which images arrive, or a pattern, and {found}.')
  image_finding.find_images(where)


