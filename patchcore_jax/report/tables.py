"""Makes the tables of the paper's supplement from results: its rows, ours, and the difference.

What has not been run is blank. Differences are only taken between means over the same categories.
All values are in percent.
"""

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from patchcore_jax import metrics
from patchcore_jax.report import runs
from patchcore_jax.report.runs import Measured

PUBLISHED = 'third_party/paper_tables'
# The metrics that the paper published, with their titles.
METRICS = {name: metrics.METRICS[name].title for name in ('image_auroc', 'pixel_auroc', 'aupro')}
DIFFERENCE = 'difference'

_CATEGORIES = 15  # number of categories of MVTec AD, over which the published averages go
_ARCHITECTURES = {
    'resnet50': 'ResNet50', 'wide_resnet50_2': 'WideResNet50', 'resnet101': 'ResNet101',
    'wide_resnet101_2': 'WideResNet101', 'resnext101_32x8d': 'ResNeXt101', 'densenet201': 'DenseNet201'}


class Table(NamedTuple):
  """Cells as text; '' is blank. A row of one cell is a heading of the rows below it."""

  title: str
  head: tuple[str, ...]
  rows: list[tuple[str, ...]]


def make(name: str, measured: Sequence[Measured], published: str | Path = PUBLISHED) -> Table:
  """Makes one table.

  Args:
    name: 'S1' to 'S6'.
    measured: what `runs.find` found; what has no place in the table is left out.
    published: folder with the published numbers.

  Raises:
    ValueError: no such table, or no such folder.
  """
  if name not in TABLES:
    raise ValueError(f'No table {name!r}. There are: {", ".join(TABLES)}.')
  if not Path(published).is_dir():
    raise ValueError(f'No published tables in {published}: run from the root of the repository.')
  return TABLES[name](list(measured), Path(published))


def read_published(path: Path) -> list[dict[str, str]]:
  """Reads the rows of a published table, as text."""
  with path.open(newline='') as f:
    return list(csv.DictReader(f))


def _per_category(number: str, metric: str, file: str):
  """Makes the function that makes one of the tables S1 to S3, with a column for each category."""

  def table(measured: list[Measured], published: Path) -> Table:
    theirs = read_published(published / file)
    ours = [m for m in measured if not m.shots and m.coreset_method in ('', 'greedy')]
    columns, comparable = _columns(list(theirs[0])[2:], ours)
    rows = []
    if comparable:
      rows += [(row['method'], *(row.get(c, '') for c in columns)) for row in theirs]
    by_method = {row['method']: row for row in theirs} if comparable else {}
    names = _names(ours, lambda m: f'{m.method}, ours ({m.setting})')
    for name, m in zip(names, ours, strict=True):
      values = _with_average(m.values[metric], columns)
      if set(values.values()) != {None}:
        rows += _with_difference(name, values, by_method.get(m.method))
    return Table(f'Table {number}: {METRICS[metric]}, in percent', ('method', *map(_heading, columns)), rows)

  return table


def _s4(measured: list[Measured], published: Path) -> Table:
  """Makes table S4: larger images and a larger network."""
  theirs = read_published(published / 'table_s4_wide_resnet101_280.csv')
  ours = [m for m in measured if m.detector == 'patchcore' and not m.shots and
          m.coreset_method == 'greedy' and m.coreset_ratio == 0.01 and m.image_size == 280]
  columns, comparable = _columns(list(theirs[0])[3:], ours)
  sections = {layers: [] for layers in dict.fromkeys(row['layers'] for row in theirs)} if comparable else {}
  for m in ours:
    depths = ' '.join(layer.removeprefix('layer') for layer in m.layers) or 'own'
    sections.setdefault(depths, []).append(m)
  rows = []
  for layers, members in sections.items():
    rows.append((f'layers {layers.replace(" ", ", ")}',))
    names = _names(members, lambda m: f'ours ({m.backbone})')
    for metric, heading in METRICS.items():
      line = next((r for r in theirs if (r['layers'], r['metric']) == (layers, metric)), None)
      line = line if comparable else None
      if line:
        rows.append((f'{heading}, published', *(line.get(c, '') for c in columns)))
      for name, m in zip(names, members, strict=True):
        rows += _with_difference(f'{heading}, {name}', _with_average(m.values[metric], columns), line)
  return Table('Table S4: PatchCore-1 with larger images and WideResNet101, in percent',
               ('metric', *map(_heading, columns)), rows)


def _s5(measured: list[Measured], published: Path) -> Table:
  """Makes table S5: few training images."""
  theirs = read_published(published / 'table_s5_low_shot.csv')
  shots = list(dict.fromkeys(int(row['shots']) for row in theirs))
  ours = {}
  for m in measured:
    if m.shots in shots and m.coreset_method in ('', 'greedy'):
      ours.setdefault((m.method, m.backbone, m.image_size), []).append(m)
  rows = []
  for metric, heading in METRICS.items():
    rows.append((heading,))
    lines = {}
    for row in theirs:
      if row['metric'] == metric:
        lines.setdefault(row['method'], {})[int(row['shots'])] = row
    for method, line in lines.items():
      rows.append((method, *(_spread(line[s]['mean'], line[s]['std']) if s in line else '' for s in shots)))
    for (method, backbone, _), members in ours.items():
      categories = runs.common_categories(members)
      means = {s: [runs.mean_over(m, metric, categories) for m in members if m.shots == s] for s in shots}
      means = {s: values for s, values in means.items() if values and None not in values}
      if not means:
        continue
      cells = {s: (100 * statistics.fmean(v), f'{100 * statistics.stdev(v):.1f}' if len(v) > 1 else '')
               for s, v in means.items()}
      rows.append((f'{method}, ours ({backbone}, {_pixels(members[0])}, {_over(categories)})',
                   *(_spread(f'{cells[s][0]:.1f}', cells[s][1]) if s in cells else '' for s in shots)))
      if method in lines and len(categories) == _CATEGORIES:
        rows.append((DIFFERENCE, *(
            f'{cells[s][0] - float(lines[method][s]["mean"]):+.1f}'
            if s in cells and s in lines[method] else '' for s in shots)))
  return Table(
      'Table S5: few training images, in percent; ours: mean and sample standard deviation over draws',
      ('training images', *map(str, shots)), rows)


def _s6(measured: list[Measured], published: Path) -> Table:
  """Makes table S6: other backbones."""
  theirs = read_published(published / 'table_s6_backbones.csv')
  ours = {}
  for m in measured:
    if (m.detector == 'patchcore' and not m.shots and m.coreset_method == 'greedy' and
        m.coreset_ratio in (0.1, 0.01)):
      ours.setdefault((_networks(m.backbone), m.coreset_ratio), []).append(m)
  rows = []
  lines = {(row['backbone'], float(row['coreset_ratio'])): row for row in theirs}
  for key in dict.fromkeys((*lines, *sorted(ours, key=lambda k: (k[0], -k[1])))):
    backbone, ratio = key
    share, line = f'{100 * ratio:g}', lines.get(key)
    if line:
      rows.append((backbone, share, *(line[metric] for metric in METRICS)))
    for m in ours.get(key, ()):
      values = {metric: runs.mean_over(m, metric, m.categories) for metric in METRICS}
      rows.append((f'ours ({m.backbone}, {_pixels(m)}, {_over(m.categories)})', share,
                   *map(_percent, values.values())))
      if line and len(m.categories) == _CATEGORIES:
        rows.append((DIFFERENCE, share, *(_minus(values[k], line[k]) for k in METRICS)))
  return Table('Table S6: other backbones, in percent',
               ('backbone', 'coreset', *METRICS.values()), rows)


TABLES: dict[str, Callable[[list[Measured], Path], Table]] = {
    'S1': _per_category('S1', 'image_auroc', 'table_s1_image_auroc.csv'),
    'S2': _per_category('S2', 'pixel_auroc', 'table_s2_pixel_auroc.csv'),
    'S3': _per_category('S3', 'aupro', 'table_s3_aupro.csv'),
    'S4': _s4, 'S5': _s5, 'S6': _s6}


def _columns(theirs: list[str], ours: list[Measured]) -> tuple[list[str], bool]:
  """Lists the columns: (average and categories, whether any of our categories is in the paper)."""
  others = [c for c in dict.fromkeys(c for m in ours for c in m.categories) if c not in theirs]
  comparable = not ours or any(c in theirs for m in ours for c in m.categories)
  return ['average', *(theirs if comparable else ()), *others], comparable


def _with_average(values, columns) -> dict[str, float | None]:
  """Adds the average, unless a column has no value: an average of fewer categories is not comparable."""
  categories = columns[1:16] if len(columns) > 16 else columns[1:]
  chosen = [values.get(c) for c in categories]
  average = None if None in chosen else statistics.fmean(chosen)
  return {c: average if c == 'average' else values.get(c) for c in columns}


def _with_difference(name, values, line) -> Iterator[tuple[str, ...]]:
  """Yields a row of ours and, where a row of the paper is given, that of the difference."""
  yield (name, *map(_percent, values.values()))
  if line:
    yield (DIFFERENCE, *(_minus(value, line.get(c)) for c, value in values.items()))


def _names(ours, name) -> list[str]:
  """Names each of ours, with the run's folder where names would be the same."""
  names = [name(m) for m in ours]
  return [f'{n} {m.folder.name}' if names.count(n) > 1 else n for n, m in zip(names, ours, strict=True)]


def _networks(backbone: str) -> str:
  """Names a network as the paper does, and each member of an ensemble.

  >>> _networks('resnet50.tv_in1k'), _networks('densenet201.tv_in1k + module:factory')
  ('ResNet50', 'DenseNet201 + module:factory')
  """
  names = [name.strip() for name in backbone.split('+')]
  return ' + '.join(_ARCHITECTURES.get(name.partition('.')[0], name) for name in names)


def _heading(category):
  return category.replace('_', ' ')


def _pixels(m):
  return 'own sizes' if m.image_size is None else f'{m.image_size} px'


def _over(categories):
  if len(categories) == _CATEGORIES:
    return f'{_CATEGORIES} categories'
  return f'only {", ".join(categories)}'


def _percent(value):
  return '' if value is None else f'{100 * value:.1f}'


def _minus(value, published):
  return f'{100 * value - float(published):+.1f}' if value is not None and published else ''


def _spread(mean, std):
  return f'{mean} ± {std}' if std else mean


# As text.


def to_markdown(table: Table) -> str:
  """Writes a table in GitHub's Markdown.

  >>> print(to_markdown(Table('T', ('method', 'nut'), [('of steel',), ('A', '9.5'), ('B', '')])))
  ### T
  <BLANKLINE>
  | method | nut |
  |---|---:|
  | **of steel** | |
  | A | 9.5 |
  | B | |
  <BLANKLINE>
  """
  lines = [f'### {table.title}', '', _piped(table.head), '|---|' + '---:|' * (len(table.head) - 1)]
  for row in table.rows:
    name = f'**{row[0]}**' if len(row) == 1 else row[0]
    lines.append(_piped((name, *row[1:], *[''] * (len(table.head) - len(row)))))
  return '\n'.join(lines) + '\n'


def _piped(cells):
  """Joins cells to a row of Markdown."""
  return '|' + '|'.join(f' {cell.replace("|", chr(92) + "|")} ' if cell else ' ' for cell in cells) + '|'


def to_csv(table: Table) -> str:
  """Writes a table as comma-separated values; a heading is a row with empty cells."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(table.head)
  writer.writerows((*row, *[''] * (len(table.head) - len(row))) for row in table.rows)
  return text.getvalue()


def to_latex(table: Table) -> str:
  r"""Writes a table as a `table` environment for LaTeX with the package booktabs.

  >>> print(to_latex(Table('T: 5 %', ('a_b', 'nut'), [('C',), ('D', '-0.1')])))
  \begin{table}
  \caption{T: 5 \%}
  \begin{tabular}{lr}
  \toprule
  a\_b & nut \\
  \midrule
  \multicolumn{2}{l}{C} \\
  D & $-$0.1 \\
  \bottomrule
  \end{tabular}
  \end{table}
  <BLANKLINE>
  """
  width = len(table.head)
  lines = [
      r'\begin{table}', rf'\caption{{{_escaped(table.title)}}}',
      rf'\begin{{tabular}}{{l{"r" * (width - 1)}}}', r'\toprule',
      ' & '.join(map(_escaped, table.head)) + r' \\', r'\midrule']
  for row in table.rows:
    if len(row) == 1:
      lines.append(rf'\multicolumn{{{width}}}{{l}}{{{_escaped(row[0])}}} \\')
    else:
      lines.append(' & '.join(map(_escaped, row)) + r' \\')
  return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}', r'\end{table}', ''])


_LATEX = {
    '\\': r'\textbackslash{}', '±': r'$\pm$', 'γ': r'$\gamma$', '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}', **{c: '\\' + c for c in '&%$#_{}'}}


def _escaped(text):
  """Escapes what is special in LaTeX; a number's minus becomes a real one."""
  number = text[:1] == '-' and text[1:2].isdigit()
  return ('$-$' if number else '') + ''.join(_LATEX.get(c, c) for c in text[number:])
