"""Checks and measures the package on this machine's accelerator, torch beside it, in one command.

    python -m experiments.gpu_check --out=runs/gpu
    python -m experiments.gpu_check --out=runs/gpu --points=screw128.npy --parts=selection,search

Prints Markdown and writes it to OUT/gpu_check.md as it goes, so that a run that is stopped keeps what it
had; OUT/measured.json holds the figures, OUT/kernels.md what ran on the card. The parts, the most
important first:

    selection    greedy selections, ours and torch's: time, and whether the picks are the same
    network      WideResNet-50-2 to layer3, images a second
    search       exact nearest neighbours
    predict      from pixels to maps on the host; launches of a batch
    equality     the same picks, neighbours and scores as on this machine's CPU
    parity       the reference arrays of the two PyTorch originals (experiments.parity)
    demo         the demo config, twice, with a compilation cache
    resolution   fits and predictions at 448 and 768 px

The parts run in another process, `experiments.gpu_parts`, which is started anew when one of them fails
hard or takes too long. Without a GPU they run on the CPU; torch is left out where it is not installed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from experiments import gpu_report


class Limit(NamedTuple):
  """Seconds: what a part needs to be begun at all, and after how many it is stopped."""

  least: float
  most: float


PARTS = {
    'selection': Limit(15, 100), 'network': Limit(20, 150), 'search': Limit(20, 100),
    'predict': Limit(30, 150), 'equality': Limit(30, 200), 'parity': Limit(15, 100),
    'demo': Limit(40, 200), 'resolution': Limit(30, 150)}


def arguments() -> argparse.Namespace:
  """Reads the command line, not by absl, whose flags are those of all imported modules."""
  parser = argparse.ArgumentParser(
      prog='python -m experiments.gpu_check', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', required=True, type=Path, help='Folder for gpu_check.md and measured.json.')
  parser.add_argument(
      '--points', default='', help='Points of the selection, [n, 128] float32 .npy; else they are made.')
  parser.add_argument('--seconds', type=float, default=350, help='The most that all parts may take.')
  parser.add_argument(
      '--small', action='store_true', help='Tiny sizes, for trying it out: the figures mean nothing.')
  parser.add_argument(
      '--golden', default='tests/testdata', help='Folder with reference arrays, for `parity`.')
  parser.add_argument('--torch_compile', action='store_true', help='torch.compile too; it takes long.')
  parser.add_argument('--parts', default=','.join(PARTS), help='Which parts, in this order.')
  found = parser.parse_args()
  found.parts = found.parts.split(',')
  if unknown := set(found.parts) - set(PARTS):
    parser.error(f'--parts: unknown {sorted(unknown)}; there are {", ".join(PARTS)}.')
  return found


def main() -> None:
  given = arguments()
  given.out.mkdir(parents=True, exist_ok=True)
  for name in (gpu_report.REPORT, gpu_report.MEASURED):
    (given.out / name).unlink(missing_ok=True)
  run_parts(given, time.time() + given.seconds)
  gpu_report.say(given.out, *gpu_report.table(gpu_report.measured(given.out)))


def run_parts(given: argparse.Namespace, until: float) -> None:
  """Runs the parts in another process, in a new one after each that ends it.

  Args:
    given: what `arguments` read.
    until: the time at which all must have ended, as `time.time` tells it.
  """
  folder, parts = given.out, given.parts
  while parts and time.time() < until:
    with tempfile.TemporaryDirectory() as scratch:
      settings = {
          'parts': parts, 'until': until, 'points': given.points, 'small': given.small,
          'golden': given.golden, 'torch_compile': given.torch_compile, 'scratch': scratch,
          'limits': PARTS}
      process = subprocess.Popen(
          [sys.executable, '-m', 'experiments.gpu_parts', str(folder), json.dumps(settings)],
          env=_environment(), start_new_session=True)
      try:
        why = _watch(process, folder, until)
      finally:
        if process.poll() is None:
          os.killpg(process.pid, signal.SIGKILL)
          process.wait()
    begun = gpu_report.measured(folder).get('begun', [])
    if why:
      gpu_report.say(folder, f'**{begun[-1] if begun else "The start"}: {why}.**\n')
    if not begun:
      return
    parts = [part for part in parts if part not in begun]


def _watch(process, folder, until):
  """Waits for the process, and tells why it did not end well, or ''."""
  current, began = None, time.time()
  while process.poll() is None:
    time.sleep(0.1)
    begun = gpu_report.measured(folder).get('begun', [])
    if begun and begun[-1] != current:
      current, began = begun[-1], time.time()
    most = PARTS[current].most if current else 120
    if time.time() - began > most:
      return f'stopped after {most:.0f} s'
    if time.time() > until + 5:
      return 'stopped, because the time is over'
  return f'ended the process with exit code {process.returncode}' if process.returncode else ''


def _environment():
  """Makes variables by which JAX leaves torch some of the card, and reuses what it compiled before."""
  cache = Path(tempfile.gettempdir()) / 'patchcore_gpu_check_cache'
  defaults = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.6', 'JAX_COMPILATION_CACHE_DIR': str(cache),
              'TF_CPP_MIN_LOG_LEVEL': '2', 'PYTHONUNBUFFERED': '1'}
  return defaults | os.environ


if __name__ == '__main__':
  main()
