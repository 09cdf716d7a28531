"""Compares finished runs image by image: differences with intervals and tests, and ranks of several runs."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchcore_jax import extras, metrics
from patchcore_jax.metrics import intervals, paired, ranking
from patchcore_jax.metrics.checks import NotDefined
from patchcore_jax.metrics.intervals import Interval
from patchcore_jax.report import per_image, results, runs
from patchcore_jax.report.per_image import Score
from patchcore_jax.report.tables import Table

if TYPE_CHECKING:
  from matplotlib.figure import Figure

IMAGE_AUROC, AUPIMO = 'image AUROC', 'AUPIMO'
_SIGNIFICANT = 0.05


class Run(NamedTuple):
  """A finished run with one coreset ratio.

  Attributes:
    folder: where it lies.
    title: what was run, for people.
    scores: {category: {image: its score}}; an image is its path from the category on.
    protocol: how it was measured.
  """

  folder: Path
  title: str
  scores: Mapping[str, Mapping[str, Score]]
  protocol: str = 'paper'


class Shared(NamedTuple):
  """The images that all runs have seen.

  Attributes:
    scores: {category: for each run the scores of the same images, in one order}.
    notes: which images and categories are left out; sentences.
  """

  scores: Mapping[str, Sequence[Sequence[Score]]]
  notes: tuple[str, ...]


class Difference(NamedTuple):
  """Two runs on a category, by one metric.

  Attributes:
    category: its name.
    images: how many good and anomalous ones the values are of.
    first, second: the values of both.
    difference: of the first less the second.
    p_value: of the test that there is none.
    effect_size: the rank-biserial correlation of the images' values; None for the AUROC, whose difference is
      one.
    remaining: images whose values differ; None for the AUROC.
    student_p: p value of Student's paired test; None for the AUROC, and where differences do not vary.
    drawn: [resamples] differences.
  """

  category: str
  images: tuple[int, int]
  first: Interval
  second: Interval
  difference: Interval
  p_value: float
  effect_size: float | None
  remaining: int | None
  student_p: float | None
  drawn: np.ndarray


def read(folder: str | os.PathLike, ratio: float | None = None) -> Run:
  """Reads the scores of a finished run.

  Args:
    folder: its workdir.
    ratio: coreset ratio; a run with only one has that, whatever is asked for.

  Raises:
    ValueError: no run, scores that are missing, several ratios of which none is asked for, an image twice.
  """
  folder = Path(folder)
  if not (folder / 'results.csv').is_file():
    raise ValueError(
        f'{folder} is no finished run: expected a folder with results.csv and scores, as experiments.mvtec '
        'and patchcore evaluate write it.')
  if (folder / 'config.json').is_file():
    measured = {m.coreset_ratio: _title(m) for m in runs.find(folder) if m.folder == folder}
  else:  # of anomaly maps, whoever made them
    measured = {row['coreset_ratio']: 'anomaly maps' for row in results.read_csv(folder / 'results.csv')}
  chosen = list(measured) if len(measured) == 1 else [
      own for own in measured if ratio is not None and math.isclose(own, ratio)]
  if not chosen:
    raise ValueError(
        f'{folder} has the coreset ratios {", ".join(f"{r:g}" for r in measured)}: expected one of them as '
        f'--ratio, got {"none" if ratio is None else f"{ratio:g}"}.')
  (own,) = chosen
  categories = [row['category'] for row in results.read_csv(folder / 'results.csv')
                if row['coreset_ratio'] == own]
  scores = {}
  for category in categories:
    images = scores[category] = {}
    for score in per_image.read_scores(folder / 'scores' / f'{category}.csv'):
      if math.isclose(score.coreset_ratio, own):
        image = image_of(score.path, category)
        if image in images:
          raise ValueError(
              f'{folder} has two scores of {image}: expected one of each image. Run the experiment again.')
        images[image] = score
  protocol = _protocol(folder)
  return Run(folder, f'{measured[own]}, measured as {protocol}', scores, protocol)


def _protocol(folder):
  """Reads how a run was measured; older ones know of one way only."""
  for name in ('config.json', per_image.MAPS):
    if (folder / name).is_file():
      return json.loads((folder / name).read_text()).get('metrics', {}).get('protocol', 'paper')
  return 'unknown'


def _title(own: runs.Measured) -> str:
  """Says what was run."""
  shots = f', {own.shots} training images' if own.shots else ''
  return f'{own.method}, {own.setting}{shots}'


def image_of(path: str, category: str) -> str:
  """Takes the part of a path that names an image wherever its data set lies: from the category on.

  >>> image_of('/data/mvtec/screw/test/good/000.png', 'screw')
  'screw/test/good/000.png'
  """
  parts = path.replace('\\', '/').split('/')
  if category not in parts[:-1]:
    return '/'.join(parts)
  last = len(parts) - 1 - parts[:-1][::-1].index(category) - 1
  return '/'.join(parts[last:])


def shared(compared: Sequence[Run]) -> Shared:
  """Finds the images that all runs have seen.

  Raises:
    ValueError: one run only, no image in common, or an image that is good in one run and anomalous in
      another.
  """
  if len(compared) < 2:
    raise ValueError(f'Expected two runs or more, got {len(compared)}: name their folders one after another.')
  scores, notes = {}, []
  if len({run.protocol for run in compared}) > 1:
    notes.append(
        f'The runs were measured otherwise ({", ".join(run.protocol for run in compared)}): differences are '
        'of that too.')
  for category in dict.fromkeys(c for run in compared for c in run.scores):
    without = [run for run in compared if category not in run.scores]
    if without:
      notes.append(f'{category} is left out: {_named(without)} did not see it.')
      continue
    own = [run.scores[category] for run in compared]
    common = [image for image in own[0] if all(image in other for other in own[1:])]
    for run, images in zip(compared, own, strict=True):
      alone = [image for image in images if image not in set(common)]
      if alone:
        notes.append(
            f'{category}: {len(alone)} of {len(images)} images of {run.folder} are left out, which another '
            f'run did not see: {", ".join(alone[:3])}{", ..." if len(alone) > 3 else ""}.')
    if not common:
      notes.append(f'{category} is left out: no image in common.')
      continue
    for image in common:
      if len({images[image].label for images in own}) > 1:
        raise ValueError(
            f'{image} is good in one run and anomalous in another: expected runs of the same data.')
    scores[category] = [[images[image] for image in common] for images in own]
  if not scores:
    raise ValueError(
        f'No images in common of {_named(compared)}: expected runs of the same data. They saw '
        f'{"; ".join(", ".join(run.scores) for run in compared)}.')
  return Shared(scores, tuple(notes))


def _named(some):
  return ' and '.join(str(run.folder) for run in some)


# Two runs.


def differences(
    metric: str, scores: Mapping[str, Sequence[Sequence[Score]]], *, resamples: int = 10_000, seed: int = 0,
) -> tuple[list[Difference], tuple[str, ...]]:
  """Compares two runs on each category by one metric.

  Args:
    metric: `IMAGE_AUROC` or `AUPIMO`.
    scores: {category: scores of both runs on the same images}.
    resamples: of the bootstrap, and permutations of the test of AUROCs.
    seed: of PCG64. Each category has numbers of its own, so that they do not move together.

  Returns:
    The categories on which the metric is defined, and notes on what is left out.
  """
  found, notes = [], []
  for position, (category, both) in enumerate(scores.items()):
    compare = {IMAGE_AUROC: _aurocs, AUPIMO: _aupimos}[metric]
    result = compare(category, *both, resamples, (seed, position))
    if isinstance(result, str):
      notes.append(f'{category} is left out: {result}')
    else:
      found.append(result)
  return found, tuple(notes)


def _aurocs(category, first, second, resamples, seed):
  """Compares image AUROCs."""
  labels = np.array([score.label for score in first], bool)
  a, b = (np.array([score.image_score for score in own]) for own in (first, second))
  if labels.all() or not labels.any():
    return f'all {labels.size} images are {"anomalous" if labels.all() else "good"}.'
  rng = [np.random.default_rng([*seed, k]) for k in range(2)]
  drawn = np.subtract(*intervals.image_resamples(
      ranking.auroc, labels, [a, b], resamples=resamples, seed=rng[0]))
  values = [intervals.auroc_interval(labels, own) for own in (a, b)]
  test = paired.auroc_permutation(labels, a, b, permutations=resamples, seed=rng[1])
  return Difference(
      category, (int((~labels).sum()), int(labels.sum())), *values,
      intervals.of_resamples(values[0].estimate - values[1].estimate, drawn, notes=intervals.few(labels)),
      test.p_value, None, None, None, drawn)


def _aupimos(category, first, second, resamples, seed):
  """Compares means of AUPIMO over anomalous images."""
  both = [(a.aupimo, b.aupimo) for a, b in zip(first, second, strict=True) if a.label]
  pairs = np.array([pair for pair in both if None not in pair], np.float64)
  if not len(pairs):
    return 'no image has an AUPIMO in both runs.'
  a, b = pairs.T
  values = [intervals.mean_interval(own, resamples=resamples, seed=np.random.default_rng(seed))
            for own in (a, b)]
  difference = intervals.mean_interval(
      a - b, bounds=(-1, 1), resamples=resamples, seed=np.random.default_rng(seed))
  if len(pairs) < len(both):
    difference = difference._replace(notes=(
        *difference.notes, f'{len(both) - len(pairs)} of {len(both)} anomalous images are left out, whose '
        'AUPIMO is not defined in both runs.'))
  (picks,) = intervals.resampled((a.size,), resamples, np.random.default_rng(seed))
  test = paired.wilcoxon(a, b)
  try:
    student = paired.paired_t(a, b)
  except NotDefined:
    student = None
  return Difference(
      category, (0, a.size), *values, difference, test.p_value, test.effect_size, test.remaining, student,
      (a - b)[picks].mean(axis=1))


def has_aupimo(scores: Mapping[str, Sequence[Sequence[Score]]]) -> bool:
  """Tells whether every run has an AUPIMO of some image."""
  found = zip(*scores.values(), strict=True)
  return all(any(s.aupimo is not None for images in own for s in images) for own in found)


def differs(own: Difference, adjusted: float) -> int:
  """Tells which is better: 1 for the first, -1 for the second, 0 where the data do not tell.

  The interval of the difference excludes 0, and the adjusted p value is below 0.05.
  """
  if not own.difference.excludes(0) or adjusted >= _SIGNIFICANT:
    return 0
  return int(np.sign(own.difference.estimate))


def difference_table(metric: str, found: Sequence[Difference], names: tuple[str, str]) -> Table:
  """Makes the table of two runs: a row for each category, and one over all of them.

  Args:
    metric: `IMAGE_AUROC` or `AUPIMO`.
    found: of `differences`, at least one.
    names: of the runs, short.
  """
  adjusted = paired.holm([own.p_value for own in found])
  own_columns = ('images that differ', 'effect size', 'p, Student') if metric == AUPIMO else ()
  head = ('category', 'images', *names, f'{names[0]} - {names[1]}', *own_columns, 'p', 'p, Holm', 'better')
  rows = []
  for own, p in zip(found, adjusted, strict=True):
    sign = differs(own, p)
    cells = ()
    if metric == AUPIMO:
      student = '' if own.student_p is None else _p(own.student_p)
      cells = f'{own.remaining}', f'{own.effect_size:+.2f}', student
    rows.append((
        own.category, f'{own.images[0]} + {own.images[1]}' if metric == IMAGE_AUROC else f'{own.images[1]}',
        own.first.text(), own.second.text(), _signed(own.difference), *cells, _p(own.p_value), _p(p),
        {1: names[0], -1: names[1], 0: ''}[sign]))
  rows.append(_over_categories(found, len(own_columns)))
  return Table(f'{metric}: {names[0]} and {names[1]}', head, rows)


def _over_categories(found, blank):
  """Makes the last row: plain means, and a test of the categories' values."""
  means = [np.mean([own.first.estimate for own in found]), np.mean([own.second.estimate for own in found])]
  overall = intervals.of_resamples(means[0] - means[1], np.mean([own.drawn for own in found], axis=0))
  test = paired.wilcoxon(
      [own.first.estimate for own in found], [own.second.estimate for own in found], tolerance=0)
  return (f'mean of {len(found)}', '', f'{means[0]:.3f}', f'{means[1]:.3f}', _signed(overall),
          *[''] * blank, _p(test.p_value), '', '')


def caption(metric: str, found: Sequence[Difference], resamples: int, seed: int) -> list[str]:
  """Writes what a reader must know of the table: methods, numbers, seed and unit."""
  n = len(found)
  if metric == IMAGE_AUROC:
    unit = 'images, good ones drawn among good ones and anomalous ones among anomalous ones'
    kinds = 'values have score intervals, differences percentile intervals'
    test = f'permutation test that exchanges the ranks of an image, {resamples:,} permutations'
  else:
    unit = 'anomalous images; the good ones, which set the thresholds, are taken as they are'
    kinds = 'all are BCa intervals, or by the rule of three where all images have one value'
    test = (f"Wilcoxon's signed-rank test, two-sided; differences of at most {paired.TOLERANCE:g} are none; "
            'from 10 images that differ on by the normal distribution, below by all signs; effect size: '
            "rank-biserial correlation; p, Student: his paired test, which takes differences for normal ones")
  lines = [
      f'Unit: {unit}. Intervals are at 95 %: {kinds}; the same {resamples:,} resamples for both, seed '
      f'{seed}. A limit that is a dash: all resamples agree, the data cannot tell.',
      f'p: {test}. Holm: adjusted for {n} {"category" if n == 1 else "categories"}. Better: the interval of '
      f'the difference excludes 0 and the adjusted p is below {_SIGNIFICANT:g}; a blank is no proof that '
      'runs are equal.',
      'Last row: plain means; the percentile interval is of these categories and other images of them, and p '
      f"is Wilcoxon's of the n = {n} categories' values, which cannot be below {_p(_least_p(n))}."]
  alike = [own.category for own in found if np.ptp(own.drawn) == 0]
  if alike:
    lines.append(
        f'The last interval is too narrow: it takes the difference on {" and ".join(alike)} for certain.')
  return lines + list(dict.fromkeys(
      f'{own.category}: {note}' for own in found
      for interval in (own.first, own.second, own.difference) for note in interval.notes))


def _least_p(n):
  """Computes the least two-sided p value that n pairs can have."""
  return paired.wilcoxon(np.arange(1, n + 1), np.zeros(n)).p_value


def _signed(interval):
  """Formats a difference, with a sign."""
  low, high = ('-' if v is None else f'{v:+.3f}' for v in (interval.low, interval.high))
  return f'{interval.estimate:+.3f} [{low}, {high}]'


def _p(value):
  """Formats a p value.

  >>> [_p(0.0299), _p(0.00004), _p(1.0)]
  ['0.030', '< 0.001', '1.000']
  """
  return '< 0.001' if value < 0.001 else f'{value:.3f}'


# Several runs.


def values_of(metric: str, scores: Mapping[str, Sequence[Sequence[Score]]]) -> dict[str, list[float]]:
  """Computes a metric of every run on the categories where all have it: {category: [value of each run]}."""
  found = {}
  for category, own in scores.items():
    if metric == IMAGE_AUROC:
      labels = [score.label for score in own[0]]
      if 0 < sum(labels) < len(labels):
        found[category] = [metrics.auroc(labels, [s.image_score for s in run]) for run in own]
    else:
      images = [[s.aupimo for s in scores] for scores in zip(*own, strict=True) if scores[0].label]
      images = [image for image in images if None not in image]
      if images:
        found[category] = np.mean(images, axis=0).tolist()
  return found


def rank_lines(metric: str, values: Mapping[str, Sequence[float]], names: Sequence[str]) -> Iterator[str]:
  """Yields lines on ranks of three runs or more over categories; of fewer than two categories says so."""
  if len(values) < 2:
    yield f'No ranks by {metric}: {len(values)} categories, expected two or more.'
    return
  ranks = paired.compare_ranks(list(values.values()))
  order = np.argsort(ranks.average, kind='stable')
  yield (f'Mean ranks by {metric} over n = {len(values)} categories (1 is best): ' + ', '.join(
      f'{names[i]} {ranks.average[i]:.2f}' for i in order) + '.')
  yield (f"Friedman's test: p = {_p(ranks.p_value)}. Critical difference at 5 % (Nemenyi): "
         f'{ranks.critical_difference:.2f}; runs that are closer cannot be told apart'
         f'{"; few categories make it large" if len(values) < 10 else ""}.')


def critical_difference_figure(
    metric: str, values: Mapping[str, Sequence[float]], names: Sequence[str]) -> 'Figure':
  """Draws mean ranks on a line; bars join runs that cannot be told apart (Demsar, JMLR 7, 2006, figure 1).

  Args:
    metric: for the heading.
    values: {category: [value of each run]}, two categories or more.
    names: of the runs.

  Raises:
    ValueError: matplotlib is not installed; too few categories or runs.
  """
  ranks = paired.compare_ranks(list(values.values()))
  with extras.needed_for('Drawing a figure'):
    from matplotlib.figure import Figure
  order, k = np.argsort(ranks.average, kind='stable'), len(names)
  groups = cliques(ranks.average[order], ranks.critical_difference)
  lowest = -0.6 - 0.4 * len(groups) - 0.6 * ((k + 1) // 2)
  figure = Figure(figsize=(7, 0.6 + 0.35 * (2 - lowest)), layout='constrained')
  axis = figure.subplots()
  axis.set(xlim=(1 - 0.4 * (k - 1), k + 0.4 * (k - 1)), ylim=(lowest, 2))
  axis.set_axis_off()
  axis.set_title(
      f'Mean rank by {metric}, n = {len(values)} categories; 1 is best. Bars join what cannot be told apart '
      '(Nemenyi, 5 %)', fontsize=8)
  axis.plot([1, 1 + ranks.critical_difference], [1.2, 1.2], '|-', color='black')
  axis.text(1, 1.4, f'critical difference {ranks.critical_difference:.2f}', fontsize=8)
  axis.plot(range(1, k + 1), [0] * k, '|-', color='black', linewidth=1)
  for rank in range(1, k + 1):
    axis.text(rank, 0.3, f'{rank}', ha='center', fontsize=8)
  for place, i in enumerate(order):
    left = place < (k + 1) // 2  # names of the better half stand on the left
    rank, row = ranks.average[i], place if left else k - 1 - place
    y, x = -0.6 - 0.4 * len(groups) - 0.6 * row, 0.95 if left else k + 0.05
    axis.plot([rank, rank, x], [0, y, y], color='black', linewidth=0.8)
    axis.text(x, y, f' {names[i]} ({rank:.2f}) ', ha='right' if left else 'left', va='center', fontsize=8)
  for row, (first, last) in enumerate(groups):
    ends = ranks.average[order][[first, last]] + [-0.02, 0.02]
    axis.plot(ends, [-0.4 - 0.4 * row] * 2, color='tab:red', linewidth=3, solid_capstyle='butt')
  return figure


def per_image_figure(scores: Mapping[str, Sequence[Sequence[Score]]], names: Sequence[str]) -> 'Figure':
  """Draws the AUPIMO of every image: for each category a box and the images of each run.

  A box reaches from the first to the third quartile, with the median in it; whiskers reach the 5th and the
  95th percentile.

  Args:
    scores: {category: for each run the scores of the same images}.
    names: of the runs.

  Raises:
    ValueError: matplotlib is not installed; no image has an AUPIMO in all runs.
  """
  found = {}
  for category, own in scores.items():
    images = [[s.aupimo for s in of_image] for of_image in zip(*own, strict=True) if of_image[0].label]
    if images := [image for image in images if None not in image]:
      found[category] = np.array(images).T
  if not found:
    raise ValueError('No image has an AUPIMO in all runs: expected runs of data with masks.')
  with extras.needed_for('Drawing a figure'):
    from matplotlib.figure import Figure
  figure = Figure(figsize=(7, 1 + 0.35 * len(found) * len(names)), layout='constrained')
  axis = figure.subplots()
  rows = [(category, k) for category in found for k in range(len(names))][::-1]
  for place, (category, k) in enumerate(rows):
    values, colour = found[category][k], f'C{k % 10}'
    axis.boxplot(
        values, positions=[place], orientation='horizontal', widths=0.6, whis=(5, 95), showfliers=False,
        boxprops={'color': colour}, medianprops={'color': colour}, manage_ticks=False)
    # Spread over the row in the order of the images, so that many at 0 and at 1 can be seen.
    heights = place + np.linspace(-0.25, 0.25, values.size)
    axis.plot(values, heights, '.', color=colour, markersize=3, alpha=0.5)
  axis.set_yticks(range(len(rows)), [f'{category}, {names[k]}' for category, k in rows], fontsize=8)
  axis.set(xlim=(-0.02, 1.02), xlabel='AUPIMO of an image')
  return figure


def cliques(ranks: np.ndarray, difference: float) -> list[tuple[int, int]]:
  """Finds the longest stretches of ascending ranks that are within the critical difference.

  >>> cliques(np.array([1.0, 1.5, 2.2, 4.0]), 1.0)
  [(0, 1), (1, 2)]
  """
  ends = np.searchsorted(ranks, ranks + difference, 'right') - 1
  return [(i, int(end)) for i, end in enumerate(ends) if end > i and (i == 0 or end > ends[i - 1])]
