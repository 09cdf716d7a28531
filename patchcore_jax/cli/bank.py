"""`patchcore bank`: looks into a model, and changes it.

A change replaces the model in one step, or with --out leaves it alone, and is recorded in its history.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from patchcore_jax import atomic_files
from patchcore_jax.cli import arguments, options, terminal
from patchcore_jax.data import image_finding, passed_by
from patchcore_jax.settings import max_pixels

_HELP = {
    'info': 'Tell what there is to know about a model.',
    'append': 'Add later good images: what the bank does not cover yet.',
    'merge': 'Make BANK cover what either of two banks does.',
    'drop': 'Take training images out.',
    'shrink': 'Make a smaller, faster bank.',
    'calibrate': 'Make thresholds of good images that are not in the bank; without IMAGES, for another '
                 '--false-alarm-rate from the scores that the bank has.',
}


@click.group('bank', cls=options.Group)
def command() -> None:
  """Look into a model, and change it: later good images are added, others taken out."""


def _action(function: Callable) -> Callable:
  """Makes an action of a function of an inspector, or of a model, and what is given."""
  function = options.common(function)
  return command.command(function.__name__.removeprefix('_'), cls=options.Command,
                         help=_HELP[function.__name__.removeprefix('_')])(function)


_out = options.option(
    '--out', metavar='NEW', group='Common', show_default=False,
    help='A new folder for the changed model; by default it replaces BANK in one step.')
_batch_size = options.option(
    '--batch-size', default=0, type=click.IntRange(min=0), group='Common',
    help='Images that pass through the network at once; 0 for 8 on CPUs and 32 on accelerators.')
_pictures = options.option(
    '--pictures', default='', metavar='FILE', group='Common', show_default='BANK.questioned.html',
    help='A page for pictures of the images that are asked about, if there are such.')


@_action
@click.argument('bank')
def _info(bank: str, debug: bool, compilation_cache: str) -> None:
  with terminal.readable_errors(debug):
    arguments.check_model(bank)
    from patchcore_jax.banks import store

    for line in info(store.restore(bank)):
      terminal.say(line)


@_action
@click.argument('bank')
@click.argument('images')
@_out
@arguments.accept
@_pictures
@_batch_size
@arguments.max_megapixels
@arguments.backbone_weights
def _append(bank: str, images: str, out: str, accept: tuple[str, ...], pictures: str, batch_size: int,
            max_megapixels: float, backbone_weights: str, debug: bool, compilation_cache: str) -> None:
  def change(inspector, skipped):
    from patchcore_jax.inspection import upkeep

    if again := upkeep.known_names(inspector, images):
      terminal.say(
          f'{_known(again)}: if they are the same, they count twice for the thresholds, and these promise '
          'too much.')
    with terminal.progress_bar('images') as progress:
      extended = upkeep.append(
          inspector, images, accept=accept, batch_size=batch_size, max_megapixels=max_megapixels,
          on_error=skipped.append, progress=progress)
    if (was := inspector.model.description.colours) != extended.model.description.colours == 'both':
      terminal.say(f'All images of the bank were {was}, and now there are gray and coloured ones.')
    return extended

  with terminal.readable_errors(debug):
    _change_inspector(
        bank, out, pictures, backbone_weights, compilation_cache, images, max_megapixels, change)


@_action
@click.argument('bank')
@click.argument('images', required=False, default='')
@options.option('--false-alarm-rate', default=0.01, group='Common',
                help='The share of good images that may be called anomalous.')
@_out
@arguments.accept
@_pictures
@_batch_size
@arguments.max_megapixels
@arguments.backbone_weights
def _calibrate(bank: str, images: str, false_alarm_rate: float, out: str, accept: tuple[str, ...],
               pictures: str, batch_size: int, max_megapixels: float, backbone_weights: str, debug: bool,
               compilation_cache: str) -> None:
  def change(inspector, skipped):
    from patchcore_jax.inspection import upkeep

    if again := upkeep.known_names(inspector, images):
      terminal.say(
          f'{_known(again)}: if they are the same, their scores are too small, and so will be the '
          'thresholds.')
    return upkeep.calibrate(
        inspector, images, false_alarm_rate=false_alarm_rate, accept=accept, batch_size=batch_size,
        max_megapixels=max_megapixels, on_error=skipped.append)

  with terminal.readable_errors(debug):
    if not images:
      _set_rate(bank, out, false_alarm_rate)
      return
    _change_inspector(
        bank, out, pictures, backbone_weights, compilation_cache, images, max_megapixels, change)


def _set_rate(bank, out, false_alarm_rate):
  """Makes thresholds of the scores that the bank has; options about images are refused."""
  context = click.get_current_context()
  given = {
      p.name: p.opts[0] for p in context.command.params
      if context.get_parameter_source(p.name) is not click.core.ParameterSource.DEFAULT}  # or of --config
  needless = [
      given[name] for name in ('accept', 'pictures', 'batch_size', 'max_megapixels', 'backbone_weights')
      if name in given]
  if needless or 'false_alarm_rate' not in given:
    what = f'{", ".join(needless)} has no effect' if needless else 'nothing to do'
    raise ValueError(
        f'{what} without IMAGES: expected good images, or --false-alarm-rate alone for other thresholds from '
        'the scores that the bank has.')

  def change(model):
    from patchcore_jax.banks import editing

    return editing.at_rate(model, false_alarm_rate)

  _change_model(bank, out, change)


@_action
@click.argument('bank')
@click.argument('other')
@_out
@arguments.accept
@_pictures
def _merge(bank: str, other: str, out: str, accept: tuple[str, ...], pictures: str, debug: bool,
           compilation_cache: str) -> None:
  def change(model):
    from patchcore_jax.banks import store
    from patchcore_jax.inspection import acceptance, upkeep

    given, doubts = store.restore(other), []
    try:
      return upkeep.merge(model, given, name=other, accept=accept, say=terminal.say, show=doubts.extend)
    except acceptance.NotAccepted as e:
      from patchcore_jax.report import questioned

      _show(e, bank, out, pictures, questioned.page_of_rows, model, given, doubts, e.images)
      raise

  with terminal.readable_errors(debug):
    arguments.check_model(other)
    _change_model(bank, out, change)


@_action
@click.argument('bank')
@click.argument('names', nargs=-1, required=True)
@_out
def _drop(bank: str, names: tuple[str, ...], out: str, debug: bool, compilation_cache: str) -> None:
  def change(model):
    from patchcore_jax.banks import editing

    return editing.drop(model, names)

  with terminal.readable_errors(debug):
    _change_model(bank, out, change)


@_action
@click.argument('bank')
@options.option('--ratio', type=float, required=True, group='Common', show_default=False,
                help='The share of all training patches to keep.')
@_out
def _shrink(bank: str, ratio: float, out: str, debug: bool, compilation_cache: str) -> None:
  def change(model):
    from patchcore_jax.banks import editing

    return editing.shrink(model, ratio)

  with terminal.readable_errors(debug):
    _change_model(bank, out, change)


def _change_inspector(
    bank, out, pictures, weights, compilation_cache, images, max_megapixels, change) -> None:
  """Changes a model whose network is needed, and tells which images could not be read.

  Where images are asked about, a page shows them.
  """
  _check(bank, out)
  paths = image_finding.find_images(images)
  for line in (*passed_by.origins(images, paths), *passed_by.left_out(images, paths)):
    terminal.say(line)
  from patchcore_jax.banks import store

  before = store.restore(bank)
  terminal.keep_compiled(compilation_cache)
  from patchcore_jax import inspection

  inspector = inspection.of_model(before, weights=weights, path=bank)
  skipped: list[Exception] = []
  try:
    after = change(inspector, skipped).model
  except inspection.NotAccepted as e:
    from patchcore_jax.report import questioned

    _show(e, bank, out, pictures, questioned.page_of_files, inspector, e.images, max_pixels(max_megapixels))
    raise
  finally:  # also where none can be read
    for message in sorted({str(error) for error in skipped}):
      terminal.say(f'skipped: {message}')
  _keep(bank, out, before, after)


def _known(names) -> str:
  """Counts images that have the name of a training image."""
  have = 'image has' if len(names) == 1 else 'images have'
  return f'{len(names)} {have} the name of a training image ({names[0]})'


def _show(asked, bank, out, pictures, write, *what) -> None:
  """Writes a page that shows what is asked about, and adds to the lines of the error where it is.

  It is written by write(path, title, *what).
  """
  path = pictures or f'{str(out or bank).rstrip("/")}.questioned.html'
  try:
    write(path, f'Asked about: {Path(bank).name}', *what)
  except (OSError, ValueError) as e:  # the question stands all the same
    asked.lines.append(f'there is no page of pictures: {e}')
  else:
    asked.lines.append(f'see {path}')


def _change_model(bank, out, change) -> None:
  """Changes a model whose network is not needed."""
  _check(bank, out)
  from patchcore_jax.banks import store

  before = store.restore(bank)
  _keep(bank, out, before, change(before))


def _check(bank, out) -> None:
  """Raises ValueError where there is no model, or --out exists, and OSError where it could not be written.

  That is before anything slow is imported.
  """
  arguments.check_model(bank)
  if out and Path(out).exists():
    raise ValueError(f'{out} exists: a model is not overwritten. Choose another --out.')
  atomic_files.check_place(out or bank)


def _keep(bank, out, before, after) -> None:
  """Writes the changed model, and says what was changed."""
  from patchcore_jax.banks import store

  if out:
    store.save(out, after)
  else:
    store.replace(bank, after)
  terminal.say(f'{out or bank}: {after.description.history[-1].what}')
  if found := after.description.calibration:
    from patchcore_jax.cli.fit import promise

    for line in promise(found):
      terminal.say(line)
    if (old := before.description.calibration) and old.image_threshold != found.image_threshold:
      terminal.say(f'the threshold for images was {old.image_threshold:.4g}')
  if before.description.calibration and not after.description.calibration:
    terminal.say(
        'Its thresholds are gone, because scores are larger now. `patchcore bank calibrate` makes new ones '
        'from good images.')


def info(model: Any) -> list[str]:
  """Tells in lines what there is to know about a model."""
  import numpy as np

  from patchcore_jax.banks.model import flat, to_json
  from patchcore_jax.detectors import DETECTORS

  d, rows = model.description, model.arrays.get('embeddings')
  size = ' x '.join(map(str, reversed(d.image_size)))
  nbytes = sum(array.nbytes for array in model.arrays.values())
  if rows is None:
    lines = [f'{d.detector}, {nbytes / 1e6:.1f} MB, from {d.num_images} images']
  else:
    lines = [
        f'{len(rows)} patches of {rows.shape[1]} values, {rows.nbytes / 1e6:.1f} MB, from {d.num_images} '
        f'images of {d.num_patches // d.num_images} patches']
  lines += [
      f'backbone {network.name}, layers {", ".join(network.layers)}, weights {network.weights}, precision '
      f'{network.precision}, made on {d.device or "an unknown device"}' for network in d.backbones]
  usual = flat(DETECTORS[d.detector]().settings()) if d.detector in DETECTORS else {}
  others = [f'{name} {value}' for name, value in flat(d.settings).items() if usual.get(name) != value]
  lines.append(f'method {d.detector}{", with " * bool(others)}{", ".join(others)}')
  how = to_json(d.preprocessing) if d.preprocessing else 'no preprocessing: images come as they are'
  lines.append(f'images of {size} pixels (width x height) after {how}')
  if found := d.calibration:
    pixels = '' if found.pixel_threshold is None else f', {found.pixel_threshold:.4g} for pixels'
    lines.append(
        f'threshold {found.image_threshold:.4g} for images{pixels}, from {len(found.image_scores)} images '
        f'({found.method}): at most {100 * found.guaranteed_rate:.2g} % of good images are called anomalous')
  else:
    lines.append('no thresholds')
  noise = model.arrays.get('noise')
  if noise is not None:
    lines.append(f'{np.sum(noise)} of {d.num_patches} patches were taken for noise')
  lines += [f'{event.when} {event.what}' for event in d.history]
  if 'indices' in model.arrays:
    image = np.asarray(model.arrays['indices']) // (d.num_patches // d.num_images)
    counts = np.bincount(image, minlength=d.num_images)
    others = [''] * d.num_images if noise is None else [f', {n} taken for noise' for n in noise]
    lines += [f'  {count:6} patches of {name}{rest}' for count, name, rest in zip(counts, d.images, others)]
  else:
    lines += [f'  {name}' for name in d.images]
  return lines
