"""patchcore export: writes a program that scores images with JAX alone."""

import re

import click

from patchcore_jax import atomic_files
from patchcore_jax.cli import arguments, interrupts, options, terminal

_PROGRAM = 'Program'
_PLATFORMS = 'cpu', 'cuda', 'tpu'


def frame_size(text: str) -> tuple[int, int] | None:
  """Parses --camera: (height, width), or None if it is empty.

  Raises:
    click.BadParameter: another form.

  >>> frame_size('2048x2448')
  (2048, 2448)
  """
  if not text:
    return None
  if not (match := re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)):
    raise click.BadParameter(f'expected HEIGHTxWIDTH in pixels, for example 2048x2448; got {text!r}.')
  return int(match[1]), int(match[2])


@click.command('export', cls=options.Command)
@click.argument('bank')
@options.option('--out', required=True, metavar='FOLDER', help='Folder to write, which must not exist.')
@options.option('--camera', default='', callback=lambda ctx, parameter, text: frame_size(text),
                metavar='HEIGHTxWIDTH', show_default="images of the network's size", group=_PROGRAM,
                help='Take whole camera frames of this size; the program resizes and crops them itself.')
@options.option('--platforms', default=','.join(_PLATFORMS), metavar='NAME,...', group=_PROGRAM,
                help='Where the program is to run, this machine among them: of cpu, cuda, rocm, tpu.')
@options.option('--at-once', type=click.IntRange(1), default=8, group=_PROGRAM,
                help='So many images pass through the network together; of a batch, the rest singly. More is '
                'faster on accelerators with large batches.')
@options.option('--onnx', is_flag=True, group=_PROGRAM,
                help="Also write program.onnx, for ONNX Runtime; needs the extra 'onnx'.")
@arguments.backbone_weights
@options.common
def command(bank, out, camera, platforms, at_once, onnx, backbone_weights, compilation_cache, debug) -> None:
  """Write a program that scores images with JAX alone.

  FOLDER appears with program.jax (the network, the model BANK and all between), description.json, README.md
  and run.py, an example that needs neither this package nor BANK:

  \b
  python FOLDER/run.py IMAGE...

  Before anything is written the program is compared with prediction on this machine.
  """
  platforms = [name.strip() for name in platforms.split(',') if name.strip()]
  with terminal.readable_errors(debug):
    arguments.check_model(bank)
    atomic_files.check_place(out)
    with interrupts.ends_at_once(f'error: interrupted. {interrupts.NOTHING_WRITTEN}'):
      from patchcore_jax import inspection
      from patchcore_jax.export import folder
      from patchcore_jax.inspection import image_sizes

      terminal.keep_compiled(compilation_cache)
      inspector = inspection.load(bank, weights=backbone_weights)
    try:
      with terminal.progress_bar('export') as progress:
        description = folder.write(
            out, inspector, camera=camera, platforms=platforms, at_once=at_once, onnx=onnx, progress=progress)
    except KeyboardInterrupt as e:
      raise terminal.Interrupted(interrupts.NOTHING_WRITTEN) from e
  for line in image_sizes.of_training(inspector.model.description):
    terminal.say(line)
  parity, shape = description['parity'], ' x '.join(map(str, description['input']['shape']))
  terminal.say(
      f'{out}: takes {shape} uint8, for {", ".join(description["platforms"])}; '
      f'{description["bytes"] / 2**20:.1f} MiB')
  terminal.say(
      f'differs from prediction by {parity["largest_difference"]:.1e} at most (on {parity["platform"]})')
  if written := description.get('onnx'):
    terminal.say(
        f'{written["program"]}: one image at a time, {written["bytes"] / 2**20:.1f} MiB, differs by '
        f'{written["largest_difference"]:.1e} at most')
  terminal.say(f'python {out}/run.py IMAGE...')

