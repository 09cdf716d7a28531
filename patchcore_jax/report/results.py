"""Rows of results: to and from `results.csv`, beside published numbers, and as a printed table.

A row is a dict with the columns that `columns` names; a metric that is not defined (no masks, say) is None,
which is an empty cell in the file and a dash in the table, never 0 or NaN.
"""

import csv
import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from patchcore_jax import atomic_files, metrics

COUNTS = ('num_train', 'num_test', 'num_skipped', 'bank_size')
LEAKED = 'num_leaked'  # test images that are training images; older files lack it
DEFECTS = 'num_defects'  # that were learned from beside the good images; only where there are some
NOISE = 'num_noise'  # anomalous images among `num_train` that pass for good; only where there are some
TIMINGS = ('fit_seconds', 'ms_per_image')

Row = Mapping[str, Any]


def columns() -> tuple[str, ...]:
  """Lists the columns of a results.csv that is written now: every metric, and what it was measured on."""
  return ('category', 'coreset_ratio', *COUNTS, *metrics.METRICS, *TIMINGS)


def write_csv(path: str | os.PathLike, rows: Sequence[Row]) -> None:
  """Writes all rows; the file is replaced in one step, so a reader never sees half of it.

  Columns that only `rows` have, such as those read from another version's file, come after the known ones.
  """
  with atomic_files.written(path) as aside, aside.open('w', newline='') as f:
    names = dict.fromkeys(itertools.chain(columns(), *rows))
    writer = csv.DictWriter(f, list(names), lineterminator='\n')
    writer.writeheader()
    writer.writerows({k: '' if v is None else v for k, v in row.items()} for row in rows)
    f.flush()
    os.fsync(f.fileno())


def read_csv(path: str | os.PathLike) -> list[Row]:
  """Reads what `write_csv` of this or another version wrote; without a file there are no rows.

  Versions differ in their metrics. A metric that the file lacks is None in every row. One that is no longer
  in the table is kept as text: nothing shows it, and `write_csv` writes it back, so a run that goes on loses
  nothing of what was measured.

  Raises:
    ValueError: a column is missing that is not a metric.
  """
  path = Path(path)
  if not path.exists():
    return []
  with path.open(newline='') as f:
    reader = csv.DictReader(f)
    given = reader.fieldnames or ()
    missing = [name for name in columns() if name not in metrics.METRICS and name not in given]
    if missing:
      raise ValueError(
          f'{path} has the columns {", ".join(given)}, expected also {", ".join(missing)}: no experiment of '
          'this version wrote it. Use a new workdir.')
    names = dict.fromkeys((*columns(), *given))
    return [{name: _value(name, row.get(name)) for name in names} for row in reader]


def _value(column, text):
  """Converts the text of a cell to its value."""
  if column == 'category' or column not in (*columns(), LEAKED, DEFECTS, NOISE):
    return text
  if not text:
    return None
  metric = metrics.METRICS.get(column)
  is_count = column in (*COUNTS, LEAKED, DEFECTS, NOISE) or metric is not None and metric.kind == 'count'
  return int(text) if is_count else float(text)


def read_published(path: str | os.PathLike, method: str) -> dict[str, float]:
  """Reads one method's row of a published table: {category: value in [0, 1]}.

  Args:
    path: CSV with columns method, average and one per category, in percent.
    method: name in the first column.

  Raises:
    ValueError: no such file, or no such method in it.
  """
  if not Path(path).is_file():
    raise ValueError(f'No table of published results at {path}: run from the root of the repository.')
  with open(path, newline='') as f:
    rows = {row.pop('method'): row for row in csv.DictReader(f)}
  if method not in rows:
    raise ValueError(f'{path} has no method {method!r}. It has: {", ".join(rows)}.')
  return {k: float(v) / 100 for k, v in rows[method].items() if v}


def mean(rows: Sequence[Row], column: str) -> float | None:
  """Computes the mean over the rows; None if any value is missing, as a mean of fewer is not comparable.

  >>> mean([{'aupro': 0.5}, {'aupro': 1.0}], 'aupro')
  0.75
  """
  values = [row[column] for row in rows]
  return None if not values or None in values else statistics.fmean(values)


def print_table(
    rows: Sequence[Row],
    *,
    published: Mapping[tuple[str, float], Mapping[str, float]] | None = None,
    console: Console | None = None,
) -> None:
  """Prints one block per coreset ratio: a row per category and a mean row.

  Args:
    rows: the rows, in any order.
    published: {(metric, ratio): {category: value in [0, 1]}}, shown beside ours as 'paper'.
    console: where to print; the terminal by default.
  """
  names = {row['category'] for row in rows}
  published = {k: v for k, v in (published or {}).items() if names & v.keys()}
  if console is None:
    console = Console()
    if not console.is_terminal:  # a file has no width to fit into
      console = Console(width=120)
  shown = [metric for metric in metrics.METRICS.values()
           if metric.in_terminal and any(row[metric.name] is not None for row in rows)]
  for ratio in sorted({row['coreset_ratio'] for row in rows}, reverse=True):
    block = [row for row in rows if row['coreset_ratio'] == ratio]
    banks = any(row['bank_size'] is not None for row in block)
    table = Table(title=f'Coreset {ratio:.4g} of all patches' if banks else None, title_justify='left')
    table.add_column('category')
    for metric in shown:
      table.add_column(metric.title, justify='right')
      if (metric.name, ratio) in published:
        table.add_column('paper', justify='right', style='dim')
    for title in ('bank', 'fit s', 'ms/image'):
      table.add_column(title, justify='right')
    for row in block:
      cells = [row['category']]
      for metric in shown:
        cells.append(metric.text(row[metric.name]))
        if (metric.name, ratio) in published:
          cells.append(metric.text(published[metric.name, ratio].get(row['category'])))
      cells.append('-' if row['bank_size'] is None else str(row['bank_size']))
      table.add_row(*cells, *(_seconds(row[t]) for t in TIMINGS))
    table.add_section()
    cells = ['mean']
    for metric in shown:
      cells.append(metric.text(mean(block, metric.name)) if metric.is_averaged else '')
      if (metric.name, ratio) in published:
        theirs = [{'value': published[metric.name, ratio].get(row['category'])} for row in block]
        cells.append(metric.text(mean(theirs, 'value')))
    table.add_row(*cells, '', *(_seconds(mean(block, t)) for t in TIMINGS), style='bold')
    console.print(table)


def _seconds(value: float | None) -> str:
  """Writes a time, or a dash where nothing was timed."""
  return '-' if value is None else f'{value:.1f}'
