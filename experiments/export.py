"""Writes a program that scores images with JAX alone: one file with the network, the bank and all between.

    python -m experiments.export --bank=BANK --out=FOLDER
    python -m experiments.export --bank=BANK --out=FOLDER --camera=2048x2448

FOLDER appears with program.jax, description.json, README.md and run.py, an example that needs neither this
package nor the bank:

    python FOLDER/run.py IMAGE...

By default the program takes images of the network's size; with --camera it takes whole frames of the camera
and resizes and crops them itself. Before anything is written it is compared with prediction on this
machine. docs/export.md tells how it is taken to other runtimes.
"""

import re

from absl import flags

from experiments import cli
from patchcore_jax import inspection
from patchcore_jax.export import folder

cli.key_flags('bank', 'out', 'backbone_weights')
_CAMERA = flags.DEFINE_string(
    'camera', '', 'HEIGHTxWIDTH of camera frames in pixels, for a program that takes them as they come.')
_PLATFORMS = flags.DEFINE_list(
    'platforms', ['cpu', 'cuda', 'tpu'],
    f'Where the program is to run, this machine among them; of {", ".join(folder.PLATFORMS)}.')
_AT_ONCE = flags.DEFINE_integer(
    'at_once', 8, 'So many images pass through the network together; of a batch, the rest singly. More is '
    'faster on accelerators with large batches.')
_ONNX = flags.DEFINE_bool('onnx', False, "Also write program.onnx; needs the extra 'onnx'.")


def main(_) -> None:
  inspector, out = inspection.load(cli.BANK.value, weights=cli.WEIGHTS.value), cli.OUT.value
  with cli.progress_bar('export') as progress:
    description = folder.write(
        out, inspector, camera=frame_size(_CAMERA.value), platforms=_PLATFORMS.value,
        at_once=_AT_ONCE.value, onnx=_ONNX.value, progress=progress)
  parity, shape = description['parity'], ' x '.join(map(str, description['input']['shape']))
  cli.console.print(
      f'{out}: takes {shape} uint8, for {", ".join(description["platforms"])}; '
      f'{description["bytes"] / 2**20:.1f} MiB', markup=False)
  cli.console.print(
      f'differs from prediction by {parity["largest_difference"]:.1e} at most '
      f'(on {parity["platform"]})')
  if onnx := description.get('onnx'):
    cli.console.print(
        f'{onnx["program"]}: one image at a time, {onnx["bytes"] / 2**20:.1f} MiB, differs by '
        f'{onnx["largest_difference"]:.1e} at most')
  cli.console.print(f'python {out}/run.py IMAGE...', markup=False)


def frame_size(text: str) -> tuple[int, int] | None:
  """Parses --camera: (height, width), or None if it is empty.

  Raises:
    ValueError: another form.

  >>> frame_size('2048x2448')
  (2048, 2448)
  """
  if not text:
    return None
  if not (match := re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)):
    raise ValueError(f'--camera={text}: expected HEIGHTxWIDTH in pixels, for example 2048x2448.')
  return int(match[1]), int(match[2])


if __name__ == '__main__':
  flags.mark_flags_as_required(['bank', 'out'])
  cli.run(main)
