"""Draws results as the figures of the paper's supplement, by matplotlib (extra [figures])."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchcore_jax import extras, metrics
from patchcore_jax.report import per_image, results, runs, tables
from patchcore_jax.report.runs import Measured

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_PER_CATEGORY = {
    'image_auroc': 'table_s1_image_auroc.csv', 'pixel_auroc': 'table_s2_pixel_auroc.csv',
    'aupro': 'table_s3_aupro.csv'}


def make(name: str, measured: Sequence[Measured], published: str | Path = tables.PUBLISHED) -> 'Figure':
  """Draws one figure.

  Args:
    name: 'S1' to 'S6'.
    measured: what `runs.find` found; what has no place in the figure is left out.
    published: folder with the published numbers.

  Raises:
    ValueError: no such figure, nothing measured that it could show, or matplotlib is not installed; the
      message says what to do.
  """
  if name not in FIGURES:
    raise ValueError(f'No figure {name!r}. There are: {", ".join(FIGURES)}.')
  return FIGURES[name](list(measured), Path(published))


# Galleries.


def _gallery(name: str, label: int, title: str, most: int = 64, columns: int = 8):
  """Makes the function that draws figure S1 or S2.

  Each error is a column of image, map and, for missed defects, mask.
  """

  def figure(measured: list[Measured], published: Path) -> 'Figure':
    folders = sorted({m.folder for m in measured if m.detector == 'patchcore' and not m.shots and
                      (m.folder / 'errors').is_dir()})
    if not folders:
      raise ValueError(
          f'Figure {name} shows wrongly classified images: run experiments.mvtec with '
          '--config.report.errors=True.')
    if len(folders) > 1:
      raise ValueError(
          f'Figure {name} shows one run. Pass one as --workdir: {", ".join(map(str, folders))}.')
    found, ratio = [], None
    for path in sorted((folders[0] / 'errors').glob('*.npz')):
      errors = per_image.read_errors(path)
      ratio = errors.coreset_ratio
      found += [(path.stem, errors, i) for i in np.flatnonzero(errors.label == label)]
    shown, panels = found[:most], 2 + label
    rows = max(1, -(-len(shown) // columns))
    result = _blank(1.3 * columns, 1.45 * panels * rows + 0.8)
    count = f'{len(found)}' if len(found) == len(shown) else f'first {len(shown)} of {len(found)}'
    result.suptitle(
        f'{title} at the F1-optimal threshold, PatchCore-{100 * (ratio or 0):g}: {count}', fontsize=10)
    axes = result.subplots(rows * panels, columns, squeeze=False)
    for axis in axes.flat:
      axis.set_axis_off()
    for at, (category, errors, i) in enumerate(shown):
      cells = axes[at // columns * panels:, at % columns]
      cells[0].set_title(f'{category}\n{errors.defect[i]}', fontsize=6)
      cells[0].imshow(errors.image[i])
      # A patch as anomalous as the threshold is 1; colours end at twice that.
      cells[1].imshow(errors.anomaly_map[i] / errors.threshold, vmin=0, vmax=2, cmap='inferno')
      if label:
        cells[2].imshow(errors.mask[i], cmap='gray', vmin=0, vmax=1)
    return result

  return figure


# Curves.


def _s3(measured: list[Measured], published: Path) -> 'Figure':
  """Draws figure S3: precision over recall, and ROC, with two working points of each category."""
  shown = [m for m in measured if not m.shots and m.coreset_method in ('', 'greedy')]
  _required(shown, 'S3', 'experiments.mvtec with configs/wrn50.py, experiments.sweep with '
            'configs/compared.py')
  result = _blank(8, 3.1 * len(shown))
  axes = result.subplots(len(shown), 2, squeeze=False)
  categories = sorted({c for m in shown for c in m.categories})
  from matplotlib import colormaps

  shades = colormaps['tab20'].colors  # each colour strong, then pale
  colors = dict(zip(categories, itertools.cycle((*shades[::2], *shades[1::2]))))
  for (left, right), m in zip(axes, shown, strict=True):
    error_f1, error_recall = [], []
    for category in m.categories:
      labels, scores = _labels_and_scores(m, category)
      precision, recall = metrics.precision_recall_curve(labels, scores)
      false, true = metrics.roc_curve(labels, scores)
      best = metrics.f1_optimal(labels, scores)
      alarm = scores >= best.threshold
      everything = scores >= scores[labels == 1].min()  # the highest threshold of full recall
      error_f1.append(np.mean(alarm != labels))
      error_recall.append(np.mean(everything != labels))
      left.plot(recall, precision, color=colors[category], label=category, linewidth=1)
      right.plot(false, true, color=colors[category], linewidth=1)
      left.plot(*_precision_recall(labels, alarm), 'o', color=colors[category], markersize=4)
      left.plot(*_precision_recall(labels, everything), 's', color=colors[category], markersize=4)
      right.plot(*_rates(labels, alarm), 'o', color=colors[category], markersize=4)
      right.plot(*_rates(labels, everything), 's', color=colors[category], markersize=4)
    left.set(xlabel='recall', ylabel='precision', ylim=(None, 1.02), title=(
        f'{m.method} ({m.setting})\nerror at best F1 (●) {100 * np.mean(error_f1):.1f} %, '
        f'at full recall (■) {100 * np.mean(error_recall):.1f} %'))
    right.set(xlabel='false positive rate', ylabel='true positive rate', title='ROC')
    left.title.set_fontsize(9)
    right.title.set_fontsize(9)
  axes[0, 0].legend(fontsize=6, loc='lower left')
  return result


def _labels_and_scores(m, category):
  chosen = [s for s in per_image.read_scores(m.folder / 'scores' / f'{category}.csv')
            if s.coreset_ratio == m.coreset_ratio]
  return np.array([s.label for s in chosen]), np.array([s.image_score for s in chosen])


def _precision_recall(labels, alarm):
  hits = (alarm & (labels == 1)).sum()
  return hits / (labels == 1).sum(), hits / alarm.sum()


def _rates(labels, alarm):
  return alarm[labels == 0].mean(), alarm[labels == 1].mean()


# Lines.


def _s4(measured: list[Measured], published: Path) -> 'Figure':
  """Draws figure S4: metrics over the size of images."""
  shown = _patchcore(m for m in measured if m.image_size)
  _required(shown, 'S4', 'experiments.sweep with configs/resolution.py')
  lines = {}
  for m in sorted(shown, key=lambda m: (m.patch_size, m.image_size)):
    lines.setdefault(f'neighbourhood {m.patch_size}', []).append((m.image_size, m))
  return _panels(lines, 'image size in pixels', published)


def _s5(measured: list[Measured], published: Path) -> 'Figure':
  """Draws figure S5: metrics over the neighbourhood, and for several choices of layers."""
  shown = _patchcore(measured)
  _required(shown, 'S5', 'experiments.sweep with configs/locality.py')
  by_layers = {}
  for m in shown:
    by_layers.setdefault(m.layers, []).append(m)
  widest = max(by_layers.values(), key=len)  # the layers for which the neighbourhood was varied
  sizes = [(m.patch_size, m) for m in sorted(widest, key=lambda m: m.patch_size)]
  common = [m for m in shown if m.patch_size == 3] or shown
  layers = [(', '.join(name.removeprefix('layer') for name in m.layers) or 'own', m)
            for m in sorted(common, key=lambda m: (len(m.layers), m.layers))]
  result = _blank(10, 6)
  upper, lower = result.subfigures(2, 1)
  _panels({'layers ' + (', '.join(widest[0].layers) or 'own'): sizes}, 'neighbourhood', published, upper)
  _panels({f'neighbourhood {common[0].patch_size}': layers}, 'layers', published, lower)
  return result


def _s6(measured: list[Measured], published: Path) -> 'Figure':
  """Draws figure S6: metrics over the share of patches kept, by each way to choose them."""
  shown = [m for m in measured if m.detector == 'patchcore' and not m.shots]
  _required(shown, 'S6', 'experiments.sweep with configs/subsampling.py')
  lines = {}
  for m in sorted(shown, key=lambda m: (m.coreset_method, m.coreset_ratio)):
    lines.setdefault(m.coreset_method, []).append((100 * m.coreset_ratio, m))
  return _panels(lines, 'percent of patches kept', published, log=True,
                 baselines=('PatchCore-25', 'PatchCore-10', 'PatchCore-1'))


def _patchcore(measured):
  """Keeps what was measured of PatchCore with a greedy coreset and all training images."""
  return [m for m in measured if m.detector == 'patchcore' and not m.shots and m.coreset_method == 'greedy']


def _panels(lines, xlabel, published, figure=None, *, log=False, baselines=('PatchCore-1',)):
  """Draws image AUROC, pixel AUROC and AUPRO side by side; each point is the mean over shared categories."""
  figure = figure or _blank(10, 3.2)
  categories = runs.common_categories([m for points in lines.values() for _, m in points])
  axes = figure.subplots(1, 3)
  for axis, (metric, heading) in zip(axes, tables.METRICS.items(), strict=True):
    for name, points in lines.items():
      means = [(x, runs.mean_over(m, metric, categories)) for x, m in points]
      means = [(x, 100 * value) for x, value in means if value is not None]
      if means:
        axis.plot(*zip(*means), 'o-', markersize=4, label=name)
    for name in baselines:
      value = _published_mean(published / _PER_CATEGORY[metric], name, categories)
      if value is None:
        continue
      if log:
        axis.plot(float(name.partition('-')[2]), value, 'k*', label='published' * (name == baselines[0]))
      else:
        axis.axhline(value, color='black', linestyle='--', linewidth=1, label=f'{name}, published')
    axis.set(xlabel=xlabel, title=f'{heading}, %')
    if any(isinstance(x, str) for points in lines.values() for x, _ in points):
      axis.tick_params('x', labelsize=6)
    if log:
      axis.set_xscale('log')
    axis.title.set_fontsize(9)
  axes[0].legend(fontsize=7)
  networks = dict.fromkeys(m.backbone for points in lines.values() for _, m in points)
  figure.suptitle(f'{", ".join(networks)}; mean of {", ".join(categories)}', fontsize=9)
  return figure


def _published_mean(path, method, categories):
  """Computes the mean that was published, in percent; None where a category was not published."""
  values = results.read_published(path, method)
  mean = results.mean([{method: values.get(c)} for c in categories], method)
  return None if mean is None else 100 * mean


def _blank(width, height):
  """Makes an empty figure of a size in inches."""
  with extras.needed_for('Drawing a figure'):
    from matplotlib.figure import Figure
  return Figure(figsize=(width, height), layout='constrained')


def _required(shown, name, command):
  """Raises ValueError where there is nothing to show; the message names the command to run."""
  if not shown:
    raise ValueError(f'Nothing was measured that figure {name} could show: run {command}.')


FIGURES: dict[str, Callable[[list[Measured], Path], 'Figure']] = {
    'S1': _gallery('S1', 0, 'False positives'), 'S2': _gallery('S2', 1, 'False negatives'),
    'S3': _s3, 'S4': _s4, 'S5': _s5, 'S6': _s6}
