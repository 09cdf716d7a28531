"""Makes the tables of the paper's supplement, with what the runs in a folder have measured.

    python -m experiments.tables --workdir=runs/wrn50
    python -m experiments.tables --workdir=runs/s5 --table=S5

Reads config.json and results.csv of all runs in WORKDIR and below it. Prints the tables and writes them
to WORKDIR/tables, as Markdown, CSV and LaTeX.
"""

import os
from pathlib import Path

from absl import flags

from experiments import cli
from patchcore_jax import atomic_files
from patchcore_jax.cli import terminal
from patchcore_jax.report import runs, tables

cli.key_flags('workdir')

_TABLE = flags.DEFINE_enum('table', None, list(tables.TABLES), 'Only this one; all if absent.')
_WRITERS = {'md': tables.to_markdown, 'csv': tables.to_csv, 'tex': tables.to_latex}


def main(_) -> None:
  run(cli.WORKDIR.value, (_TABLE.value,) if _TABLE.value else tuple(tables.TABLES))


def run(workdir: str | os.PathLike, names: tuple[str, ...]) -> None:
  """Writes and prints the tables called `names`.

  Raises:
    ValueError: no run in `workdir`.
  """
  measured = runs.find(workdir)
  folder = Path(workdir) / 'tables'
  for name in names:
    table = tables.make(name, measured)
    for suffix, write in _WRITERS.items():
      path = folder / f'table_{name.lower()}.{suffix}'
      with atomic_files.written(path) as aside:
        aside.write_text(write(table), encoding='utf-8')
    print(tables.to_markdown(table))
  terminal.console.print(f'written to {folder}')


if __name__ == '__main__':
  flags.mark_flag_as_required('workdir')
  cli.run(main)
