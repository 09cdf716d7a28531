"""Draws the figures of the paper's supplement, of what the runs in a folder have measured.

    python -m experiments.figures --workdir=runs/wrn50 --figure=S1
    python -m experiments.figures --workdir=runs/resolution --figure=S4

S1 and S2: wrongly classified images, of one run with --config.report.errors=True. S3: curves of all
detectors. S4: image sizes. S5: neighbourhoods and layers. S6: subsamplers. Writes a PNG and a PDF to
WORKDIR/figures.
"""

import os
from pathlib import Path

from absl import flags

from experiments import cli
from patchcore_jax import atomic_files
from patchcore_jax.cli import terminal
from patchcore_jax.report import figures, runs

cli.key_flags('workdir')

_FIGURE = flags.DEFINE_enum('figure', None, list(figures.FIGURES), 'Which one.')


def main(_) -> None:
  run(cli.WORKDIR.value, _FIGURE.value)


def run(workdir: str | os.PathLike, name: str) -> None:
  """Draws the figure called `name`, and writes it.

  Raises:
    ValueError: no run in `workdir`, or none that this figure could show.
  """
  figure = figures.make(name, runs.find(workdir))
  folder = Path(workdir) / 'figures'
  for suffix in ('png', 'pdf'):
    path = folder / f'figure_{name.lower()}.{suffix}'
    with atomic_files.written(path) as aside:
      figure.savefig(aside, format=suffix, dpi=150)
    terminal.console.print(f'written: {path}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['workdir', 'figure'])
  cli.run(main)
