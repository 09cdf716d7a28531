"""Compares finished runs on the images that all of them saw: by how much they differ, and how sure that is.

    python -m experiments.compare runs/a runs/b
    python -m experiments.compare runs/a runs/b runs/c --ratio=0.1 --out=runs/compared

Prints a table for each two runs and each metric, in Markdown: image AUROC, and AUPIMO where the runs have it
of their images. For three runs and more there are mean ranks over categories and the critical difference too.
With --out everything is written to OUT/comparison.md, the tables as CSV, and figures as PNG and SVG: the
AUPIMO of all images, and critical differences. Runs may have read their images from other folders: an image
is its path from the category on.
"""

import argparse
import itertools
import os
import string
from collections.abc import Sequence
from pathlib import Path

from patchcore_jax import atomic_files
from patchcore_jax.cli import terminal
from patchcore_jax.report import comparison, tables


def main(arguments: Sequence[str] | None = None) -> None:
  # Not absl's flags: folders are arguments, and names of flags are those of all binaries together.
  parser = argparse.ArgumentParser(
      'python -m experiments.compare',
      description='Compares finished runs on the images that all of them saw.')
  parser.add_argument('runs', nargs='+', metavar='RUN', help='workdirs of two runs or more')
  parser.add_argument('--out', help='folder for comparison.md, tables and figures')
  parser.add_argument('--seed', type=int, default=0, help='of resamples and permutations (0)')
  parser.add_argument('--ratio', type=float, help='coreset ratio, of runs that have several')
  parser.add_argument('--resamples', type=int, default=10_000, help='and permutations, of each (10000)')
  parser.add_argument('--debug', action='store_true', help='show the whole trace of an error')
  chosen = parser.parse_args(arguments)
  with terminal.readable_errors(chosen.debug):
    run(chosen.runs, out=chosen.out, seed=chosen.seed, ratio=chosen.ratio, resamples=chosen.resamples)


def run(
    folders: Sequence[str | os.PathLike], *, out: str | os.PathLike | None = None, seed: int = 0,
    ratio: float | None = None, resamples: int = 10_000,
) -> None:
  """Prints the comparison, and writes it to `out`.

  Raises:
    ValueError: one run only, a folder that is no run, runs of other data; a negative seed, or fewer than
      1,000 resamples.
  """
  most = len(string.ascii_uppercase)
  if not 2 <= len(folders) <= most:
    raise ValueError(
        f'Expected two runs or more, at most {most}, got {len(folders)}: name their folders one after '
        'another.')
  if seed < 0 or resamples < 1000:
    raise ValueError(f'Expected a seed of 0 or more and 1,000 resamples or more, got {seed} and {resamples}.')
  compared = [comparison.read(folder, ratio) for folder in folders]
  found, names = comparison.shared(compared), string.ascii_uppercase[:len(compared)]
  lines = ['# Comparison of runs', '']
  lines += [f'- {name}: {run.folder} ({run.title})' for name, run in zip(names, compared, strict=True)]
  lines += [f'- {note}' for note in found.notes]
  written = {}
  measured = [comparison.IMAGE_AUROC, *[comparison.AUPIMO] * comparison.has_aupimo(found.scores)]
  if len(measured) == 1:
    lines.append('- AUPIMO is not compared, as not all runs have it of their images.')
  for metric in measured:
    for i, j in itertools.combinations(range(len(compared)), 2):
      both = {category: (own[i], own[j]) for category, own in found.scores.items()}
      rows, notes = comparison.differences(metric, both, resamples=resamples, seed=seed)
      lines += ['', *(f'- {note}' for note in notes)]
      if not rows:
        continue
      table = comparison.difference_table(metric, rows, (names[i], names[j]))
      lines += ['', tables.to_markdown(table)]
      lines += _paragraphs(comparison.caption(metric, rows, resamples, seed))
      written[f'{_file_name(metric)}_{names[i]}_{names[j]}.csv'] = tables.to_csv(table)
    if len(compared) > 2:
      values = comparison.values_of(metric, found.scores)
      lines += ['', *_paragraphs(comparison.rank_lines(metric, values, names))]
  text = '\n'.join(lines) + '\n'
  print(text)
  if out is not None:
    _write(Path(out), {'comparison.md': text} | written)
    titles = [f'{name} {run.folder.name}' for name, run in zip(names, compared)]
    if comparison.AUPIMO in measured:
      _save(Path(out) / 'aupimo_of_images', comparison.per_image_figure(found.scores, titles))
    if len(compared) > 2:
      _draw(Path(out), measured, found, titles)
    terminal.say(f'written to {out}')


def _paragraphs(lines):
  """Parts lines by empty ones, as Markdown wants it."""
  return [part for line in lines for part in (line, '')]


def _file_name(metric):
  return metric.lower().replace(' ', '_')


def _write(folder, files):
  """Writes texts by their names."""
  for name, text in files.items():
    with atomic_files.written(folder / name) as aside:
      aside.write_text(text, encoding='utf-8')


def _draw(folder, measured, found, names):
  """Draws critical differences by every metric that at least two categories have."""
  for metric in measured:
    values = comparison.values_of(metric, found.scores)
    if len(values) < 2:
      continue
    _save(folder / f'critical_difference_{_file_name(metric)}',
          comparison.critical_difference_figure(metric, values, names))


def _save(path, figure):
  """Writes a figure as PNG and as SVG."""
  for suffix in ('png', 'svg'):
    with atomic_files.written(path.with_name(f'{path.name}.{suffix}')) as aside:
      figure.savefig(aside, format=suffix, dpi=150)


if __name__ == '__main__':
  main()
