"""Writes report.html of a workdir.

What a page shows of a category is kept in WORKDIR/report/<category>.json, so that a run which goes on later
makes the page of all categories.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchcore_jax import atomic_files, metrics
from patchcore_jax.banks import provenance
from patchcore_jax.banks.model import Description, Model, flat
from patchcore_jax.data import preprocess
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.detectors import Scores
from patchcore_jax.evaluation.images import Images
from patchcore_jax.evaluation.settings import Settings
from patchcore_jax.report import page, results
from patchcore_jax.settings import Preprocessing

# Around the metrics.
_WHICH = {'category': page.Column('Category'), 'coreset_ratio': page.Column('Coreset', 'percent')}
_SIZES_AND_TIMINGS = {
    'num_train': page.Column('Trained on', 'count'), 'num_test': page.Column('Tested on', 'count'),
    results.NOISE: page.Column('Noise among them', 'count'),
    results.DEFECTS: page.Column('Defects trained on', 'count'),
    'num_skipped': page.Column('Skipped', 'count'), results.LEAKED: page.Column('Trained on too', 'count'),
    'bank_size': page.Column('Bank', 'count'),
    'fit_seconds': page.Column('Fit s', 'number'), 'ms_per_image': page.Column('ms per image', 'number')}


def category(
    name: str, examples: Sequence[Example], scores: Scores, masks: np.ndarray | None, *,
    thresholds: Sequence[page.Threshold], why: Callable[[int], dict[str, Any]],
    preprocessing: Preprocessing, most: int, notes: Sequence[str] = ()) -> page.Category:
  """Makes what the page shows of a category. The images to show are read once more: they were not kept.

  Args:
    name: name of the category.
    examples, scores: n images, and their scores.
    masks: [n, h, w], or None.
    thresholds: the first one decides which images are errors.
    why: makes 'patch' and 'nearest' of the `page.Picture` of image i: see `reasons`.
    preprocessing: the images are shown as the network saw them.
    most: images to show.
    notes: what the reader must know of the category.
  """
  labels = np.array([e.label for e in examples])
  heat, low, high = heat_scale(labels, scores.map)
  pictures = []
  for i in page.telling(scores.image, labels, thresholds[0].value if thresholds else None, most):
    image, _ = preprocess.load(examples[i], preprocessing)
    pictures.append(page.picture(
        _short(examples[i].image_path, name), float(scores.image[i]), image,
        anomaly_map=None if scores.map is None else heat(scores.map[i]), low=low, high=high,
        mask=None if masks is None else masks[i], label=int(labels[i]),
        defect=examples[i].defect if labels[i] else '', **why(i)))
  return page.Category(
      name, scores.image.astype(float).tolist(), labels.tolist(), tuple(thresholds), tuple(pictures),
      tuple(notes))


def reasons(
    model: Model, images: Images, evidence: Mapping[str, np.ndarray], preprocessing: Preprocessing,
) -> Callable[[int], dict[str, Any]]:
  """Makes `why` of `category`, which knows nothing without a bank that names its training images.

  Args:
    model: the model, whose training images are read when they are first asked for.
    images: the images of the category.
    evidence: evidence of all test images, as in `Scores`.
    preprocessing: the images are shown as the network saw them.
  """
  if 'nearest' not in evidence or not model.description.images:
    return lambda i: {}
  grid = model.description.grid

  @functools.cache
  def read(name):
    example = images.train_example(name)
    try:
      return example and page.encode(preprocess.load(example, preprocessing)[0])
    except ImageError:  # a bank outlives its training images
      return None

  def why(i):
    origin = provenance.origin(model, int(evidence['nearest'][i]))
    image = read(origin.name)
    return {} if image is None else {
        'patch': page.grid_cell(*divmod(int(evidence['patch'][i]), grid[1]), grid),
        'nearest': page.Patch(
            _short(origin.name, images.name), image, page.grid_cell(origin.row, origin.column, grid))}

  return why


def thresholds(description: Description, row: results.Row) -> list[page.Threshold]:
  """Lists the model's own threshold, where it was calibrated, and that of the test images' labels."""
  found, calibration = [], description.calibration
  if calibration:
    found.append(page.Threshold(
        f'{100 * calibration.false_alarm_rate:g} % false alarms', calibration.image_threshold))
  if row['image_threshold'] is not None:
    found.append(page.Threshold('best F1', row['image_threshold'], needs_labels=True))
  return found


def heat_scale(
    labels: np.ndarray, maps: np.ndarray | None) -> tuple[Callable[[np.ndarray], np.ndarray], float, float]:
  """Chooses how maps are coloured on the page.

  Returns what is done to a map for the page, and the values that are then shown as nothing and as strongest:
  what pixels of good images hardly reach, and what most of the other images do.

  Distances are shown by their logarithm: among those of plain defects, one at the threshold is next to 0.
  """
  if maps is None:
    return np.asarray, 0.0, 1.0
  usual = maps[labels == 0] if (labels == 0).any() else maps
  low = float(np.quantile(usual[:, ::4, ::4], 0.99))
  high = float(np.quantile(maps.max((1, 2)), 0.95))
  if low <= 0:
    return np.asarray, low, max(high, low + 1e-9)
  start, end = float(np.log(low)), float(np.log(high))
  return lambda m: np.log(np.maximum(m, low)), start, max(end, start + 1e-3)


def keep(workdir: str | os.PathLike, shown: page.Category) -> None:
  """Writes the file of a category, in one step."""
  with atomic_files.written(Path(workdir) / 'report' / f'{shown.name}.json') as aside:
    aside.write_text(page.to_json(shown))


def write(workdir: str | os.PathLike, settings: Settings, rows: Sequence[results.Row]) -> None:
  """Writes WORKDIR/report.html, of the rows and of what was kept of their categories."""
  workdir = Path(workdir)
  kept = [workdir / 'report' / f'{name}.json' for name in dict.fromkeys(row['category'] for row in rows)]
  ratios = sorted({row['coreset_ratio'] for row in rows}, reverse=True)
  banks = settings.detector.has_coreset
  measured = [metric for metric in metrics.METRICS.values() if metric.in_report]
  columns = _WHICH | {m.name: page.Column(m.heading, m.kind) for m in measured} | _SIZES_AND_TIMINGS
  if not banks:
    del columns['coreset_ratio'], columns['bank_size']
  for name in ('num_skipped', results.LEAKED, results.DEFECTS, results.NOISE):
    if not any(row.get(name) for row in rows):
      del columns[name]
  for metric in measured:  # one that no category has is of another protocol
    if all(row.get(metric.name) is None for row in rows):
      del columns[metric.name]
  totals = [
      {'category': 'mean', 'coreset_ratio': ratio} | {
          name: results.mean([r for r in rows if r['coreset_ratio'] == ratio], name)
          for name in (*(m.name for m in measured if m.is_averaged), *results.TIMINGS)}
      for ratio in ratios]
  categories = [page.from_json(path.read_text()) for path in kept if path.exists()]
  notes = [f'{category.name}: {note}.' for category in categories for note in category.notes]
  if settings.backbone.weights == 'random' or settings.backbone.name.endswith('.random'):
    notes.append('The network has random weights: these numbers do not show what the method can do.')
  page.write(workdir / 'report.html', page.Page(
      f'{settings.detector.title} on {_data_name(settings.data)}', facts=_facts(settings, ratios),
      columns=tuple(columns.values()), rows=[[row.get(k) for k in columns] for row in rows],
      totals=[[row.get(k) for k in columns] for row in totals],
      categories=categories, notes=tuple(notes),
      settings=tuple(
          (k, _text(v)) for k, v in flat(settings.to_json()).items()
          if k != 'data.root')))  # of this machine; the page is passed on


def _facts(settings, ratios):
  """Lists the facts at the top of the page."""
  sizes = vars(settings.preprocessing)
  size = ' then '.join(f'{k} {_text(sizes[k])}' for k in ('resize', 'pad', 'crop') if sizes[k])
  facts = [('Backbone', settings.backbone.name), ('Images', size or 'as they are')]
  if settings.backbone.layers:
    facts.append(('Layers', _text(settings.backbone.layers)))
  if settings.detector.has_coreset:
    method = settings.detector.coreset.method
    facts += [('Coreset', ' and '.join(f'{100 * r:g} %' for r in ratios) + f', {method}'),
              ('Scores and images at', f'{100 * ratios[0]:g} %' if ratios else '–')]
  if settings.data.shots:
    facts.append(('Training images', f'{settings.data.shots}, draw {settings.data.draw}'))
  if settings.data.noise:
    facts.append(('Noise', f'{100 * settings.data.noise:g} %, draw {settings.data.draw}'))
  if settings.data.multi_class:
    facts.append(('Model', 'one for all categories'))
  return (*facts, ('Seed', str(settings.seed)))


def _data_name(data):
  """Names the data for the title."""
  return 'the built-in data' if data.source == 'synthetic' else Path(data.root).name or 'images'


def _short(path, name):
  """Cuts a path to what follows the category's folder.

  >>> _short('data/gear/test/good/000.png', 'gear')
  'test/good/000.png'
  """
  parts = Path(path).parts
  return '/'.join(parts[parts.index(name) + 1:]) if name in parts[:-1] else str(path)


def _text(value):
  """Writes a value, and the items of a list with commas."""
  return ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
