"""Scores, curves and pictures of a run -> report.html, one page that needs no network and no other file.

A `Page` is plain values: whoever runs something builds one and calls `write`. The template page.html,
page.css and page.js lie beside this file.
"""

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import contourpy
import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of a picture's width and height."""


class Patch(NamedTuple):
  """A normal patch, for comparison.

  Attributes:
    name: of the training image.
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
    score: of the image; its decision follows from the category's threshold.
    image: encoded: see `encode`.
    size: (height, width) of the encoded image.
    label: 0 good, 1 anomalous, None not known.
    defect: its kind, '' where none is known.
    heat: the anomaly map as a coloured layer with transparency, of the same shape, encoded; b'' for none.
    outline: of the mask; an SVG path over a square of 1000 x 1000; '' for none.
    region: the most anomalous region.
    patch: the most anomalous patch, and
    nearest: the normal patch that is most like it.
    facts: more to show of it, (name, value), as ('p-value', '0.02').
  """

  name: str
  score: float
  image: bytes
  size: tuple[int, int]
  label: int | None = None
  defect: str = ''
  heat: bytes = b''
  outline: str = ''
  region: Box | None = None
  patch: Box | None = None
  nearest: Patch | None = None
  facts: tuple[tuple[str, str], ...] = ()


class Threshold(NamedTuple):
  """Scores from `value` on are alarms.

  Attributes:
    name: as '5 % false alarms'.
    value: of an image score.
    needs_labels: whether it is known only where labels are: not on the line.
  """

  name: str
  value: float
  needs_labels: bool = False


class Category(NamedTuple):
  """Images of one kind of part.

  Attributes:
    name: of the part.
    scores: [n] of all images.
    labels: [n] 0 or 1, or None where they are not known.
    thresholds: the first is the one that decides.
    pictures: all images, or the most telling ones: see `telling`.
  """

  name: str
  scores: Sequence[float]
  labels: Sequence[int] | None = None
  thresholds: tuple[Threshold, ...] = ()
  pictures: tuple[Picture, ...] = ()


class Column(NamedTuple):
  """Of the table of results: its heading, and how values are written.

  Attributes:
    heading: short.
    kind: 'text', 'count', 'percent' (of a share in [0, 1]), or 'number' (4 significant digits).
  """

  heading: str
  kind: str = 'text'


class Page(NamedTuple):
  """A whole report.

  Attributes:
    title: of the page.
    facts: what was run, (name, value), at the top.
    columns, rows: the table of results; a value that is not defined is None or NaN.
    categories: with scores, curves and pictures.
    notes: sentences the reader must know, above everything.
    settings: (name, value), folded away.
  """

  title: str
  facts: tuple[tuple[str, str], ...] = ()
  columns: tuple[Column, ...] = ()
  rows: Sequence[Sequence[Any]] = ()
  categories: Sequence[Category] = ()
  notes: tuple[str, ...] = ()
  settings: tuple[tuple[str, str], ...] = ()


_THUMBNAIL = 256  # pixels of the longer side
_HEAT = 96  # maps are smooth
_COLORS = 'inferno'


def encode(image: np.ndarray | Image.Image, longest: int = _THUMBNAIL) -> bytes:
  """A small WebP file, for a page.

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
  return _webp(image.convert('RGB'))


def picture(
    name: str, score: float, image: np.ndarray | Image.Image, *,
    anomaly_map: np.ndarray | None = None, low: float = 0.0, high: float = 1.0,
    mask: np.ndarray | None = None, **fields: Any) -> Picture:
  """A `Picture` from arrays; a few milliseconds, about 10 kB.

  Args:
    name, score: of the image.
    image: [h, w, 3] uint8, or a Pillow image.
    anomaly_map: [h', w'] float of the same view in any resolution; NaN where nothing is known.
    low, high: values of the map that are shown as nothing, and as strongest.
    mask: [h', w'] bool of the same view in any resolution.
    **fields: the other fields of `Picture`.

  Raises:
    ValueError: high is not above low, a score or map values that are not finite.

  >>> small = picture('a.png', 0.7, np.zeros((6, 8, 3), np.uint8), anomaly_map=np.eye(3), label=1)
  >>> small.size, small.label, small.heat[8:12], small.outline
  ((6, 8), 1, b'WEBP', '')
  """
  if not math.isfinite(score):
    raise ValueError(f'{name}: expected a finite score, got {score}.')
  if not isinstance(image, Image.Image):
    image = Image.fromarray(np.asarray(image))
  width, height = _shrunk(image.size, _THUMBNAIL)
  return Picture(
      name, float(score), encode(image), (height, width),
      heat=b'' if anomaly_map is None else _encode_map(anomaly_map, low, high),
      outline='' if mask is None else outline(mask), **fields)


def outline(mask: np.ndarray) -> str:
  """The outline of a mask as an SVG path over a square of 1000 x 1000; '' for an empty one.

  Args:
    mask: [h, w] bool.

  >>> outline(np.array([[0, 0], [0, 1]], bool))
  'M750 500L500 750L500 1000L750 1000L1000 1000L1000 750L1000 500Z'
  """
  raise NotImplementedError


def telling(
    scores: Sequence[float], labels: Sequence[int] | None, threshold: float | None, most: int
) -> list[int]:
  """The images to show where not all can be: errors, then the highest-scoring and the borderline ones.

  Args:
    scores: [n].
    labels: [n] 0 or 1, or None: without them no error is known.
    threshold: scores from here on are alarms; None: no error and no borderline is known.
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
  """The most telling pictures. A long run that calls this now and then holds a bounded number.

  Labels are looked at where all pictures have one. See `telling`.
  """
  labels = [p.label for p in pictures]
  chosen = telling([p.score for p in pictures], None if None in labels else labels, threshold, most)
  return [pictures[i] for i in chosen]


def write(path: str | os.PathLike, page: Page) -> None:
  """Writes a page; replaces an older one in one step.

  Raises:
    ValueError: as `render`.
    OSError: the file cannot be written.
  """
  path = Path(path)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(render(page), encoding='utf-8')
  os.replace(temporary, path)
