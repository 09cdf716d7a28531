"""Findings of a prediction run -> rows, pictures and the report, as they come."""

import collections
import contextlib
import errno
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from experiments import cli
from patchcore_jax import scoring
from patchcore_jax.banks import provenance
from patchcore_jax.data import placement
from patchcore_jax.inspection import Finding, Inspector
from patchcore_jax.report import overlay, page, predictions
from patchcore_jax.report.predictions import Answer
from patchcore_jax.search import neighbors

_GALLERY = 200  # images that the report shows, of 10 kB each
_REMEMBERED = 100_000  # the latest scores, which the report's histogram is of
_SAMPLE = 256  # rows of a bank that tell how far apart they lie
# A name that the file system does not take is a matter of one image; a full disk is not.
_NAMES = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ, errno.EINVAL)


class Answers:
  """Takes findings in any order and from several threads (`draw`), and answers in order (`add`).

  What it holds does not grow with the number of images.

  Attributes:
    images, anomalous, failed: how many were scored so far, how many of them are anomalous, and how many files
      could not be scored.
    threshold: scores from here on are anomalous; None if none is known.
    limits: of the colours.
  """

  def __init__(
      self, inspector: Inspector, out: Path, root: Path, *, overlays: bool, maps: str, why: bool,
      limits: tuple[float, float], threshold: float | None = None):
    """Begins the tables.

    Args:
      inspector: that makes the findings.
      out: folder to write to, which exists.
      root: folder that the images are named from.
      overlays, maps, why: which files are written; `maps` is a suffix or 'none'.
      limits: of the colours.
      threshold: of scores, for a bank without calibration.
    """
    self.images = self.anomalous = self.failed = 0
    self._inspector, self._out, self._root = inspector, out, root
    self._overlays, self._maps, self._why, self.limits = overlays, maps, why, limits
    calibration = inspector.calibration
    self.threshold = calibration.image_threshold if calibration else threshold
    self._thumbnails = provenance.thumbnails(inspector.bank)
    self._pictures: list[page.Picture] = []
    self._scores = collections.deque(maxlen=_REMEMBERED)
    with writing_to(out):
      self._tables = predictions.Tables(out)

  def draw(
      self, path: str, image: Image.Image, pixels: np.ndarray, finding: Finding
  ) -> tuple[Answer, page.Picture | None]:
    """Writes the files of one image.

    Args:
      path: of the image.
      image: as it was decoded.
      pixels: [h, w, 3] uint8, as the network saw it.
      finding: what was found.

    Raises:
      OSError: the files cannot be written.
    """
    try:
      return self._draw(path, image, pixels, finding)
    except OSError as e:
      if e.errno not in _NAMES:
        raise _cannot_write(self._out, e) from e
      return Answer(path, error=f'{path}: its pictures cannot be written, {e.strerror}.'), None

  def add(self, answer: Answer, picture: page.Picture | None = None, place: str = '') -> None:
    """Adds a row, and says it.

    Args:
      answer, picture: from `draw`.
      place: begins the line.
    """
    with writing_to(self._out):
      self._tables.add(answer)
    self.failed += answer.error is not None
    self.images += answer.error is None
    self.anomalous += answer.decision == 'anomalous'
    if picture is not None:
      self._scores.append(answer.score)
      self._pictures.append(picture)
      if len(self._pictures) >= 2 * _GALLERY:
        self._pictures = page.keep(self._pictures, self.threshold, _GALLERY)
    loud = answer.error or answer.decision == 'anomalous'
    cli.console.print(place + line_of(answer), style='bold red' if loud else None, markup=False)

  def report(self, facts: tuple[tuple[str, str], ...]) -> Path:
    """Writes report.html, with `facts` at the top."""
    description, images = self._inspector.bank.description, self.images
    thresholds, notes = (), []
    if self.threshold is not None:
      thresholds = (page.Threshold(_threshold_name(self._inspector.calibration), self.threshold),)
    else:
      notes.append('The bank has no threshold: scores only, no decisions.')
    if self.failed:
      notes.append(f'{self.failed} files could not be scored: see the errors in {predictions.CSV}.')
    if images > _REMEMBERED:
      notes.append(f'The histogram is of the latest {_REMEMBERED} images.')
    category = page.Category(
        description.get('category') or 'images', list(self._scores), None, thresholds,
        tuple(page.keep(self._pictures, self.threshold, _GALLERY)))
    columns = tuple(page.Column(*c) for c in (
        ('part',), ('images', 'count'), ('anomalous', 'count'), ('share', 'percent'), ('failed', 'count')))
    known = self.threshold is not None and images
    row = (category.name, images, self.anomalous if known else None,
           self.anomalous / images if known else None, self.failed)
    path = self._out / predictions.REPORT
    with writing_to(self._out):
      page.write(path, page.Page(
          f'Predictions: {category.name}', facts, columns, [row], categories=(category,),
          notes=tuple(notes)))
    return path

  def _draw(self, path, image, pixels, finding):
    height, width = image.height, image.width
    place = placement.placement(height, width, self._inspector.preprocessing)
    whole_map = placement.to_original(finding.anomaly_map, place)
    patch = self._on_grid(*finding.patch)
    origin = provenance.origin(self._inspector.bank, finding.nearest)
    nearest_box = self._on_grid(origin.row, origin.column)
    anomalous = finding.anomalous
    if anomalous is None and self.threshold is not None:
      anomalous = finding.score >= self.threshold
    answer = Answer(
        path, width, height, finding.score, finding.calibrated_score, finding.p_value,
        {True: 'anomalous', False: 'good', None: None}[anomalous], finding.box, finding.centroid,
        placement.box_to_original(patch, place), origin.name or None, nearest_box)
    name = name_of(path, self._root)
    if self._overlays:
      answer = answer._replace(overlay=predictions.file_for(predictions.OVERLAYS, name, '.png'))
      drawn = overlay.overlay(np.asarray(image), whole_map, *self.limits)
      if anomalous is not False:  # a frame says: look here
        drawn = overlay.outlined(drawn, finding.box)
      predictions.write_png(self._out / answer.overlay, drawn)
    if self._maps != 'none':
      answer = answer._replace(map=predictions.file_for(predictions.MAPS, name, f'.{self._maps}'))
      predictions.write_map(self._out / answer.map, whole_map)
    file = self._thumbnails[origin.image] if self._thumbnails else b''
    if self._why:
      answer = answer._replace(why=predictions.file_for(predictions.WHY, name, '.png'))
      normal = np.asarray(Image.open(io.BytesIO(file)).convert('RGB')) if file else None
      captions = name, f'nearest: {"/".join(Path(origin.name).parts[-2:])}'
      predictions.write_png(self._out / answer.why, overlay.comparison(
          pixels, patch, normal, nearest_box if file else None, captions))
    facts = () if finding.p_value is None else (
        ('calibrated score', f'{finding.calibrated_score:.3f}'), ('p-value', f'{finding.p_value:.3g}'))
    picture = page.picture(
        shown(name), finding.score, image, anomaly_map=whole_map, low=self.limits[0],
        high=self.limits[1], region=_fractions(answer.box, width, height),
        patch=_fractions(answer.patch, width, height), facts=facts,
        nearest=page.Patch(
            shown(origin.name), file, _fractions(nearest_box, *pixels.shape[1::-1])) if file else None)
    return answer, picture

  def _on_grid(self, row, column):
    """Box of a patch in pixels of the network's input."""
    height, width = self._inspector.image_size
    rows, columns = self._inspector.bank.description['grid']
    return (column * width / columns, row * height / rows,
            (column + 1) * width / columns, (row + 1) * height / rows)


def limits_of(
    inspector: Inspector, threshold: float | None = None) -> tuple[float, float]:
  """Where colours begin and end: the same for all images of a bank, so that pictures compare.

  They follow from the bank's pixel threshold (`overlay.limits`). A bank without one: from `threshold` if
  given, or from the bank's own spread, the median distance of its patches to the nearest others, which good
  patches seldom exceed.
  """
  if inspector.calibration:
    level = inspector.calibration.pixel_threshold
  else:
    level = threshold or _spread(inspector)
  return overlay.limits(max(level, 1e-6))  # of images that are all the same it is 0


def line_of(answer: Answer) -> str:
  """One line for people.

  >>> line_of(Answer('a.png', score=3.21678, p_value=0.02, decision='good', box=(1, 2, 30, 40)))
  'a.png  score 3.217  p 0.02  good  most anomalous at 1,2-30,40'
  >>> line_of(Answer('a.png', error='a.png is no image.'))
  'not scored: a.png is no image.'
  """
  if answer.error:
    return shown(f'not scored: {answer.error}')
  words = [answer.path, f'score {answer.score:.4g}']
  if answer.p_value is not None:
    words.append(f'p {answer.p_value:.2g}')
  if answer.decision:
    words.append(answer.decision.upper() if answer.decision == 'anomalous' else answer.decision)
  left, top, right, bottom = answer.box
  return shown('  '.join([*words, f'most anomalous at {left},{top}-{right},{bottom}']))


def name_of(path: str, root: Path) -> str:
  """The image's name, relative to the folder that all lie in.

  >>> name_of('parts/left/001.png', Path('parts'))
  'left/001.png'
  """
  parts = Path(os.path.relpath(path, root)).parts
  return Path(*('up' if part == os.pardir else part for part in parts)).as_posix()


def shown(text: str) -> str:
  """Text that a terminal can show: names of files may hold bytes that are no UTF-8."""
  return text.encode('utf-8', 'backslashreplace').decode()


@contextlib.contextmanager
def writing_to(out: Path):
  """OSErrors within say where nothing could be written, and what to do."""
  try:
    yield
  except OSError as e:
    raise _cannot_write(out, e) from e


def _cannot_write(out, error):
  return OSError(
      f'Cannot write to {out}: {error.strerror or error}. Make room or change its permissions, or choose '
      'another --out.')


def _fractions(box, width, height):
  left, top, right, bottom = box
  return left / width, top / height, right / width, bottom / height


def _threshold_name(calibration):
  """What the threshold promises, or that it is one's own."""
  if calibration is None or math.isnan(calibration.guaranteed_rate):
    return 'given threshold'
  return f'{100 * calibration.guaranteed_rate:.2g} % false alarms'


def _spread(inspector):
  rows = np.asarray(inspector.bank.embeddings)
  if len(rows) < 2:
    return 0.0
  sample = rows[np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int)]
  k = min(inspector.scoring.num_neighbors, len(rows) - 1)
  distances_sq, _ = neighbors.nearest_neighbors(sample, rows, k=k + 1)
  return float(np.median(scoring.patch_scores(distances_sq[:, 1:], inspector.scoring)))
