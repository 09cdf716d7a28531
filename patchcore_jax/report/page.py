"""Writes report.html: scores, curves and pictures of a run in one page that needs no network or other file.

A `Page` is plain values: whoever runs something builds one and calls `write`. The template page.html,
page.css and page.js lie beside this file.
"""

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from patchcore_jax import atomic_files
from patchcore_jax.inspection import regions
from patchcore_jax.report import charts, overlay

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of a picture's width and height."""


class Patch(NamedTuple):
  """A normal patch, for comparison.

  Attributes:
    name: name of the training image.
    image: that image, encoded: see `encode`.
    box: where the patch lies in it.
  """

  name: str
  image: bytes
  box: Box


class Picture(NamedTuple):
  """An image of the gallery. `picture` makes one from arrays.

  Attributes:
    name: shown and searched for; a file name, or a path relative to the data.
    score: score of the image; its decision follows from the category's threshold.
    image: the image, encoded: see `encode`.
    size: (height, width) of the encoded image.
    label: 0 good, 1 anomalous, None not known.
    defect: kind of defect, '' where none is known.
    heat: the anomaly map of the same view in grey, encoded: black is shown as nothing, white as strongest;
      b'' for none.
    outline: outline of the mask, an SVG path over a square of 1000 x 1000; '' for none.
    regions: boxes of what stands out, the largest first.
    patch: the most anomalous patch.
    nearest: the normal patch that is most like it.
    facts: more to show beside the image, (name, value), such as ('p-value', '0.02').
    anomalous: the decision, where something else than the score makes it.
  """

  name: str
  score: float
  image: bytes
  size: tuple[int, int]
  label: int | None = None
  defect: str = ''
  heat: bytes = b''
  outline: str = ''
  regions: tuple[Box, ...] = ()
  patch: Box | None = None
  nearest: Patch | None = None
  facts: tuple[tuple[str, str], ...] = ()
  anomalous: bool | None = None


class Threshold(NamedTuple):
  """A threshold: scores from `value` on are anomalous.

  Attributes:
    name: what it stands for, such as '5 % false alarms'.
    value: the lowest image score that is anomalous.
    needs_labels: whether it is known only where labels are, and so not on the production line.
  """

  name: str
  value: float
  needs_labels: bool = False


class Category(NamedTuple):
  """Images of one kind of part.

  Attributes:
    name: name of the part.
    scores: [n] scores of all images.
    labels: [n] 0 or 1, or None where they are not known.
    thresholds: the first is the one that decides.
    pictures: all images, or the most telling ones: see `telling`.
    notes: sentences that the reader must know, for `Page.notes`.
  """

  name: str
  scores: Sequence[float]
  labels: Sequence[int] | None = None
  thresholds: tuple[Threshold, ...] = ()
  pictures: tuple[Picture, ...] = ()
  notes: tuple[str, ...] = ()


class Column(NamedTuple):
  """A column of the table of results: its heading, and how values are written.

  Attributes:
    heading: the heading; short.
    kind: 'text', 'count', 'percent' (a share in [0, 1]), or 'number' (4 significant digits).
  """

  heading: str
  kind: str = 'text'


class Page(NamedTuple):
  """A whole report.

  Attributes:
    title: title of the page.
    facts: what was run, (name, value), at the top.
    columns, rows, totals: the table of results; a value that is not defined is None or NaN. Totals stay
      below the rows, however those are sorted.
    categories: the categories, each shown with scores, curves and pictures.
    notes: sentences that the reader must know, above everything.
    settings: (name, value), folded away.
    pictures_first: whether the pictures come before the table.
  """

  title: str
  facts: tuple[tuple[str, str], ...] = ()
  columns: tuple[Column, ...] = ()
  rows: Sequence[Sequence[Any]] = ()
  totals: Sequence[Sequence[Any]] = ()
  categories: Sequence[Category] = ()
  notes: tuple[str, ...] = ()
  settings: tuple[tuple[str, str], ...] = ()
  pictures_first: bool = False


_THUMBNAIL = 256  # pixels of the longer side
_HEAT = 96  # maps are smooth
_MOST_OF_MAP = 1024
_OUTLINE = 256  # pixels of a mask whose outline is drawn


def encode(image: np.ndarray | Image.Image, longest: int = _THUMBNAIL) -> bytes:
  """Encodes an image as a small WebP file, for a page.

  Args:
    image: [h, w, 3] uint8, or a Pillow image.
    longest: pixels of the longer side; a smaller image keeps its size.

  >>> encode(np.zeros((300, 500, 3), np.uint8))[8:12]
  b'WEBP'
  """
  if not isinstance(image, Image.Image):
    image = Image.fromarray(np.asarray(image))
  if max(image.size) > longest:
    image = image.resize(_shrunk(image.size, longest), Image.Resampling.LANCZOS, reducing_gap=2)
  return _webp(image.convert('RGB'), quality=80)


def picture(
    name: str, score: float, image: np.ndarray | Image.Image, *,
    anomaly_map: np.ndarray | None = None, low: float = 0.0, high: float = 1.0,
    mask: np.ndarray | None = None, seen: Box = (0.0, 0.0, 1.0, 1.0), **fields: Any) -> Picture:
  """Makes a `Picture` from arrays: about 10 kB, in a few milliseconds.

  Args:
    name, score: those of the image.
    image: [h, w, 3] uint8, or a Pillow image.
    anomaly_map: [h', w'] float of the same view in any resolution; NaN where nothing is known.
    low, high: values of the map that are shown as nothing, and as strongest.
    mask: [h', w'] bool of the same view in any resolution.
    seen: the part of the image that the network saw; the rest is darkened.
    **fields: the other fields of `Picture`.

  Raises:
    ValueError: high is not above low, or a score that is not finite.

  >>> small = picture('a.png', 0.7, np.zeros((6, 8, 3), np.uint8), anomaly_map=np.eye(3), label=1)
  >>> small.size, small.label, small.heat[8:12], small.outline
  ((6, 8), 1, b'WEBP', '')
  """
  if not math.isfinite(score):
    raise ValueError(f'{name}: expected a finite score, got {score}.')
  if not isinstance(image, Image.Image):
    image = Image.fromarray(np.asarray(image))
  width, height = _shrunk(image.size, _THUMBNAIL)
  if seen != (0, 0, 1, 1):
    image = overlay.darkened(image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2), seen)
  return Picture(
      name, float(score), encode(image), (height, width),
      heat=b'' if anomaly_map is None else _encode_map(anomaly_map, low, high),
      outline='' if mask is None else outline(mask), **fields)


def grid_cell(row: int, column: int, grid: tuple[int, int]) -> Box:
  """Computes where a patch lies: in cell (row, column) of a grid of (rows, columns).

  >>> grid_cell(1, 3, (2, 4))
  (0.75, 0.5, 1.0, 1.0)
  """
  rows, columns = grid
  return column / columns, row / rows, (column + 1) / columns, (row + 1) / rows


def outline(mask: np.ndarray) -> str:
  """Traces the outline of a mask: an SVG path over a square of 1000 x 1000, '' for an empty mask.

  Args:
    mask: [h, w] bool.

  It follows the edge of the mask to half a pixel. Where a mask has more than 256 pixels a side, pixels are
  joined.

  >>> mask = np.zeros((10, 10), bool)
  >>> mask[1, 2:8] = True  # the second row, so y from 100 to 200
  >>> outline(mask)
  'M200 150L250 100L750 100L800 150L750 200L250 200Z'
  """
  mask = np.asarray(mask, bool)
  for axis in (0, 1):
    length = mask.shape[axis]
    if length > _OUTLINE:
      mask = np.logical_or.reduceat(mask, np.arange(_OUTLINE) * length // _OUTLINE, axis)
  parts = []
  for line in regions.outlines(mask, tolerance=0.3):
    points = [f'{x:.0f} {y:.0f}' for x, y in 1000 * np.clip(line / mask.shape[::-1], 0, 1)]
    parts.append(f'M{"L".join(points)}Z')
  return ''.join(parts)


def telling(
    scores: Sequence[float], labels: Sequence[int] | None, threshold: float | None, most: int
) -> list[int]:
  """Chooses the images to show where not all can be: errors, then high-scoring and borderline ones.

  Args:
    scores: [n] image scores.
    labels: [n] 0 or 1, or None: without them no error is known.
    threshold: scores from here on are anomalous; None where it is not known, and so no error is.
    most: how many to keep.

  Returns:
    Indices, at most `most`, ascending. Errors come first, those farthest from the threshold before
    others; then the highest scores and the scores nearest to the threshold, in turns.

  >>> telling([0.1, 0.2, 0.9, 0.4, 0.8], [1, 0, 1, 0, 1], 0.45, 3)
  [0, 2, 3]
  """
  scores = np.asarray(scores, float)
  order: list[int] = []
  highest = list(np.argsort(-scores, kind='stable'))
  borderline = []
  if threshold is not None:
    distance = np.abs(scores - threshold)
    borderline = list(np.argsort(distance, kind='stable'))
    if labels is not None:
      wrong = (scores >= threshold) != np.asarray(labels, bool)
      order += [int(i) for i in np.argsort(-distance, kind='stable') if wrong[i]]
  for i in range(scores.size):
    order += [int(part[i]) for part in (highest, borderline) if i < len(part)]
  return sorted(list(dict.fromkeys(order))[:most])


def keep(pictures: Sequence[Picture], threshold: float | None, most: int) -> list[Picture]:
  """Keeps the most telling pictures, so that a long run that calls this now and then holds a bounded number.

  Labels count where all pictures have one. See `telling`. Those that something else than the score decides
  come first.
  """
  first = [i for i, p in enumerate(pictures) if p.anomalous is not None]
  first = sorted(first, key=lambda i: not pictures[i].anomalous)[:most]
  others = [i for i, p in enumerate(pictures) if p.anomalous is None]
  labels = [pictures[i].label for i in others]
  scores = [pictures[i].score for i in others]
  chosen = telling(scores, None if None in labels else labels, threshold, most - len(first))
  return [pictures[i] for i in sorted(first + [others[i] for i in chosen])]


def write(path: str | os.PathLike, page: Page) -> None:
  """Writes a page; replaces an older one in one step.

  Raises:
    ValueError: what `render` raises.
    OSError: the file cannot be written.
  """
  text = render(page)
  with atomic_files.written(path) as aside:
    aside.write_text(text, encoding='utf-8')


def render(page: Page) -> str:
  """Renders the page as HTML.

  Raises:
    ValueError: labels or pictures that do not fit their category, scores that are not finite, an unknown
      kind of column, rows of another length than the columns, or images that are not WebP, JPEG or PNG.
  """
  for row in (*page.rows, *page.totals):
    if len(row) != len(page.columns):
      raise ValueError(f'Expected {len(page.columns)} values in a row of the table, got {row!r}.')
  style, script = _source('page.css'), _source('page.js')
  return _TEMPLATES.get_template('page.html').render(
      page=page,
      rows=[[_cell(c, v) for c, v in zip(page.columns, row)] for row in page.rows],
      totals=[[_cell(c, v) for c, v in zip(page.columns, row)] for row in page.totals],
      sections=[_section(c) for c in page.categories], data=_data(page.categories),
      pictures=sum(len(c.pictures) for c in page.categories),
      style=style, script=script, style_hash=_hash(style), script_hash=_hash(script))


def to_json(category: Category) -> str:
  """Writes a category as text, so that a page can be made again later."""
  return json.dumps(_plain(category), allow_nan=False)


def from_json(text: str) -> Category:
  """Reads what `to_json` wrote.

  >>> category = Category('a', [0.5], thresholds=(Threshold('t', 0.4),))
  >>> from_json(to_json(category)) == category
  True
  """
  values = json.loads(text)
  pictures = []
  for p in values.pop('pictures'):
    nearest = p.pop('nearest')
    if nearest:
      nearest = Patch(nearest['name'], base64.b64decode(nearest['image']), tuple(nearest['box']))
    older = p.pop('region', None)  # there was one of them
    places = {'patch': p['patch'] and tuple(p['patch']),
              'regions': tuple(map(tuple, p.get('regions', [older] if older else ())))}
    pictures.append(Picture(**p | places | {
        'image': base64.b64decode(p['image']), 'heat': base64.b64decode(p['heat']), 'size': tuple(p['size']),
        'facts': tuple(map(tuple, p['facts'])), 'nearest': nearest}))
  thresholds = tuple(Threshold(**t) for t in values.pop('thresholds'))
  notes = tuple(values.pop('notes', ()))
  return Category(**values, thresholds=thresholds, pictures=tuple(pictures), notes=notes)


def _plain(value):
  """Converts a value to what JSON can hold."""
  if isinstance(value, bytes):
    return base64.b64encode(value).decode()
  if hasattr(value, '_asdict'):
    return {k: _plain(v) for k, v in value._asdict().items()}
  if isinstance(value, np.ndarray):
    return value.tolist()
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value.item() if isinstance(value, np.generic) else value


# Images.


def _shrunk(size, longest):
  """Computes the size whose longer side is at most `longest`."""
  scale = min(1, longest / max(size))
  return tuple(max(1, round(s * scale)) for s in size)


def _webp(image, quality):
  buffer = io.BytesIO()
  image.save(buffer, 'WEBP', quality=quality, method=2)  # 4, the default, takes three times as long
  return buffer.getvalue()


def _encode_map(anomaly_map, low, high):
  if not high > low:
    raise ValueError(f'Expected low < high, got {low} and {high}.')
  step = max(1, max(np.shape(anomaly_map)) // _MOST_OF_MAP)  # of a large map, which is smooth, some pixels do
  anomaly_map = np.asarray(anomaly_map[::step, ::step], np.float32)
  grey = np.nan_to_num(np.clip((anomaly_map - low) / (high - low), 0, 1))
  image = Image.fromarray(grey)
  image = image.resize(_shrunk(image.size, _HEAT), Image.Resampling.BOX)
  return _webp(Image.fromarray((255 * np.asarray(image)).round().astype(np.uint8)), quality=80)


_TYPES = {b'RIFF': 'image/webp', b'\xff\xd8\xff': 'image/jpeg', b'\x89PNG': 'image/png'}


def _uri(image):
  """Writes an encoded image as a data URI."""
  for start, kind in _TYPES.items():
    if image.startswith(start):
      return f'data:{kind};base64,{base64.b64encode(image).decode()}'
  raise ValueError(f'Expected a WebP, JPEG or PNG file, got {len(image)} bytes that begin {image[:8]!r}.')


# What the script reads.


def _data(categories):
  """Collects what the script reads, with every image once: many pictures share a nearest training image."""
  images: dict[bytes, int] = {}

  def stored(image):
    return images.setdefault(image, len(images)) if image else None

  pictures = []
  for at, category in enumerate(categories):
    for p in category.pictures:
      pictures.append({
          'category': at, 'name': p.name, 'score': p.score, 'label': p.label, 'defect': p.defect,
          'image': stored(p.image), 'heat': stored(p.heat), 'size': p.size, 'outline': p.outline,
          'regions': p.regions, 'patch': p.patch, 'facts': p.facts, 'anomalous': p.anomalous,
          'nearest': p.nearest and {
              'name': p.nearest.name, 'image': stored(p.nearest.image), 'box': p.nearest.box}})
  return {
      'categories': [
          {'name': c.name, 'thresholds': [t._asdict() for t in c.thresholds]} for c in categories],
      'pictures': pictures, 'images': [_uri(image) for image in images]}


# The table.


def _cell(column, value):
  """Formats a value of the table: its text, and the key by which it is sorted."""
  if value is None or value != value:
    return {'text': '–', 'key': ''}
  if column.kind == 'text':
    return {'text': str(value), 'key': str(value)}
  if column.kind not in _FORMATS:
    raise ValueError(f'Column kind {column.kind!r}: expected text, {", ".join(_FORMATS)}.')
  return {'text': _FORMATS[column.kind](value), 'key': repr(float(value))}


_FORMATS = {
    'count': lambda v: f'{v:,.0f}'.replace(',', '\N{NARROW NO-BREAK SPACE}'),
    'percent': lambda v: f'{100 * v:.1f}', 'number': lambda v: f'{v:.4g}'}


# Scores and curves.


def _section(category):
  """Prepares the section of one category: its charts, and what is left out of its pictures."""
  scores = np.asarray(category.scores, float)
  if not np.isfinite(scores).all():
    raise ValueError(f'{category.name}: expected finite scores, got {scores[~np.isfinite(scores)][:3]}.')
  labels = None if category.labels is None else np.asarray(category.labels, int)
  if labels is not None and labels.shape != scores.shape:
    raise ValueError(f'{category.name}: {scores.size} scores and {labels.size} labels.')
  both = labels is not None and 0 < labels.sum() < labels.size
  return {
      'name': category.name, 'selection': _selection(category, scores, labels),
      'histogram': charts.histogram(scores, labels, category.thresholds) if scores.size else None,
      'curves': charts.curves(scores, labels, category.thresholds) if both else []}


def _selection(category, scores, labels):
  """Counts the pictures shown and left out; None where none is left out."""
  shown = len(category.pictures)
  if not 0 < shown < scores.size:
    return None
  result = {'shown': shown, 'all': scores.size, 'errors': None}
  if labels is not None and category.thresholds:
    threshold = category.thresholds[0].value
    result['errors'] = int(((scores >= threshold) != labels).sum())
    result['shown_errors'] = sum((p.score >= threshold) != bool(p.label) for p in category.pictures)
  return result


# The template.


def _source(name):
  return (Path(__file__).parent / name).read_text(encoding='utf-8')


def _hash(source):
  """Hashes a script or style for the content security policy: nothing else on the page may run."""
  return 'sha256-' + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FunctionLoader(_source), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True)
_TEMPLATES.policies['json.dumps_kwargs'] = {'allow_nan': False, 'separators': (',', ':')}
