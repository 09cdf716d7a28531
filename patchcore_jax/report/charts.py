"""Computes from scores where the bars and lines of a page's charts lie; its template draws them as SVG.

Everything is in units of the drawing, with 0, 0 at the upper left of the field that is plotted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from patchcore_jax import metrics

WIDTH, HEIGHT = 280, 180  # size of the field
_BINS = 40


class Bar(NamedTuple):
  """A bar of a histogram; kind is 'good', 'anomalous' or 'unlabelled'."""

  kind: str
  x: float
  y: float
  width: float
  height: float
  text: str


def histogram(scores: np.ndarray, labels: np.ndarray | None, thresholds: Sequence[Any]) -> dict[str, Any]:
  """Lays out a histogram: good images as bars upwards, anomalous ones downwards.

  So they are told apart without colour.

  Args:
    scores: [n] float, n > 0.
    labels: [n] 0 or 1, or None.
    thresholds: records with value, name and needs_labels.

  Returns:
    bars: `Bar`s.
    base: y of the line on which the bars stand.
    ticks: (x, text) of the axis.
    logarithmic: whether the axis is, as where all scores are positive and the highest is a multiple of the
      lowest.
    counts: (y, text): 0 at the base, and how many images the highest bars stand for.
    lines: (x, text, needs_labels) of the thresholds.
    groups: (kind, number of images, lowest score, highest score), of each kind that there is.

  >>> chart = histogram(np.array([1.0, 3.0]), np.array([0, 1]), ())
  >>> [bar.kind for bar in chart['bars']], chart['base'], chart['groups']
  (['good', 'anomalous'], 90.0, [('good', 1, 1.0, 1.0), ('anomalous', 1, 3.0, 3.0)])
  """
  values = np.array([*scores, *(t.value for t in thresholds)], float)
  # Distances of good images lie close together, those of defects spread over a multiple.
  logarithmic = bool(values.min() > 0 and values.max() > 4 * values.min())
  scale, unscale = (np.log10, lambda v: 10**v) if logarithmic else (np.asarray, np.asarray)
  low, high = scale(values.min()), scale(values.max())
  margin = 0.03 * (high - low) or 0.1 * abs(high) or 1.0
  low, high = low - margin, high + margin
  edges = unscale(np.linspace(low, high, _BINS + 1))
  groups = {'unlabelled': scores} if labels is None else {
      'good': scores[labels == 0], 'anomalous': scores[labels == 1]}
  groups = {kind: part for kind, part in groups.items() if len(part)}
  binned = {kind: np.histogram(part, edges)[0] for kind, part in groups.items()}
  down = max((int(c.max()) for kind, c in binned.items() if kind == 'anomalous'), default=0)
  up = max((int(c.max()) for kind, c in binned.items() if kind != 'anomalous'), default=0)
  unit, step = HEIGHT / (up + down), WIDTH / _BINS
  bars = [
      Bar(kind, i * step + 0.5, unit * up if kind == 'anomalous' else unit * (up - n), step - 1, unit * n,
          f'{n} {kind}, scores {edges[i]:.3g} to {edges[i + 1]:.3g}')
      for kind, count in binned.items() for i, n in enumerate(map(int, count)) if n]

  def x(value):
    return float((scale(value) - low) / (high - low) * WIDTH)

  ticks = _round_numbers(edges[0], edges[-1]) if logarithmic else _ticks(low, high)
  counts = [(unit * up, '0')]
  counts += [(y, str(count)) for y, count in ((0.0, up), (float(HEIGHT), down)) if count]
  return {
      'bars': bars, 'base': unit * up, 'counts': counts, 'logarithmic': logarithmic,
      'ticks': [(x(t), f'{t:.6g}') for t in ticks],
      'lines': [(x(t.value), f'{t.name}: {t.value:.4g}', t.needs_labels) for t in thresholds],
      'groups': [(kind, len(part), float(part.min()), float(part.max())) for kind, part in groups.items()]}


def curves(scores: np.ndarray, labels: np.ndarray, thresholds: Sequence[Any]) -> list[dict[str, Any]]:
  """Lays out the curves: ROC, and precision over recall.

  Args:
    scores: [n] float.
    labels: [n] 0 or 1, of both classes.
    thresholds: records with value, name and needs_labels.

  Returns:
    For each curve its name, its area, the names of its axes, an SVG path, and for each threshold the point
    (x, y, text, needs_labels) where it works. Where no image is called anomalous the precision is not
    defined, and there is no point.
  """
  false, true = metrics.roc_curve(labels, scores)
  precision, recall = metrics.precision_recall_curve(labels, scores)
  roc, pr = [], []
  for t in thresholds:
    called = scores >= t.value
    rates = called[labels == 0].mean(), called[labels == 1].mean()
    text = f'{t.name}: {t.value:.4g}'
    roc.append((
        *_at(*rates), f'{text}. Called anomalous: {100 * rates[0]:.1f} % of the good images, '
        f'{100 * rates[1]:.1f} % of the anomalous ones', t.needs_labels))
    if called.any():
      share = labels[called].mean()
      pr.append((
          *_at(rates[1], share), f'{text}. Of those called anomalous {100 * share:.1f} % are, '
          f'{100 * rates[1]:.1f} % of all that are', t.needs_labels))
  return [
      {'name': 'ROC', 'measure': 'AUROC', 'area': metrics.auroc(labels, scores),
       'x': 'Called anomalous among good', 'y': 'Found among anomalous', 'path': _path(false, true),
       'points': roc},
      {'name': 'Precision and recall', 'measure': 'average precision',
       'area': metrics.average_precision(labels, scores), 'x': 'Found among anomalous (recall)',
       'y': 'Right among called anomalous (precision)', 'path': _path(recall, precision), 'points': pr}]


def _at(x, y):
  """Converts shares in [0, 1] to a point of the drawing."""
  return round(float(x) * WIDTH, 1), round((1 - float(y)) * HEIGHT, 1)


def _path(x, y):
  """Writes a line as an SVG path, without points that fall on the one before."""
  points = [f'{a:g} {b:g}' for a, b in map(_at, x, y)]
  return 'M' + 'L'.join(p for i, p in enumerate(points) if not i or p != points[i - 1])


def _ticks(low, high, about=5):
  """Chooses round numbers between low and high.

  >>> [round(float(t), 6) for t in _ticks(0.02, 0.31)]
  [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
  """
  rough = (high - low) / about
  power = 10.0 ** np.floor(np.log10(rough))
  step = power * next(s for s in (1, 2, 5, 10) if s * power >= rough * 0.8)
  return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0  # no minus zero


def _round_numbers(low, high):
  """Chooses round numbers on a logarithmic axis.

  >>> [round(float(t), 6) for t in _round_numbers(0.03, 0.7)]
  [0.05, 0.1, 0.2, 0.5]
  """
  powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
  steps = (1, 2, 5) if len(powers) < 5 else (1,)
  found = np.outer(10.0**powers[::-(len(powers) // -8)], steps).ravel()
  return found[(found >= low) & (found <= high)]
