"""Writes the findings of a prediction run as they come: rows, pictures and the report."""

import collections
import datetime
import errno
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from patchcore_jax import atomic_files, inspection
from patchcore_jax.banks import provenance
from patchcore_jax.data import placement
from patchcore_jax.data.image_files import shown
from patchcore_jax.inspection import Finding, Inspector, colours, image_sizes, regions
from patchcore_jax.report import overlay, page, predictions
from patchcore_jax.report.picture_names import PictureNames
from patchcore_jax.report.predictions import Answer

_GALLERY = 200  # images that the report shows, of 10 kB each
_SHOWN_REGIONS = 5  # whose areas the report lists
_REMEMBERED = 100_000  # the latest scores, which the report's histogram is of
# A name that the file system does not take is a matter of one image; a full disk is not.
_NAMES = (
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)


class Answers:
  """Takes findings in any order and from several threads (`draw`), and answers in order (`add`).

  What it holds does not grow with the number of images.

  Attributes:
    images, anomalous, failed: how many were scored so far, how many of them are anomalous, and how many files
      could not be scored.
    threshold: scores from here on are anomalous; None if none is known.
    limits: limits of the colours.
  """

  def __init__(
      self, inspector: Inspector, out: Path, root: Path, *, overlays: bool, maps: str, why: bool,
      limits: tuple[float, float] | None, threshold: float | None = None, masks: bool = False,
      min_area: float = 0,
      say: Callable[..., None] = lambda text, loud=False: None):
    """Begins the tables.

    Args:
      inspector: what makes the findings.
      out: folder to write to, which exists.
      root: folder that the images are named from.
      overlays, maps, why: which files are written; `maps` is a suffix or 'none'.
      limits: limits of the colours; None for those of each map.
      threshold: threshold of scores, in place of the model's.
      masks: whether the regions are drawn as masks.
      min_area: regions of fewer pixels were ignored in the findings.
      say: called as `say(line, loud=...)` for each answer; loud are those that a person must see.
    """
    self.images = self.anomalous = self.failed = 0
    self._inspector, self._out, self._root, self._say = inspector, out, root, say
    self._overlays, self._maps, self._why, self.limits = overlays, maps, why, limits
    self._masks, self._min_area, self._most_not_inspected = masks, min_area, 0.0
    calibration = inspector.calibration
    self._given_threshold = threshold is not None
    self.threshold = threshold if self._given_threshold or not calibration else calibration.image_threshold
    self._remarks = image_sizes.Remarks(inspector.model.description, say)
    self._thumbnails = provenance.thumbnails(inspector.model)
    self._pictures: list[page.Picture] = []
    self._scores = collections.deque(maxlen=_REMEMBERED)
    kinds = [(predictions.OVERLAYS, '.png')] * overlays + [(predictions.MASKS, '.png')] * masks
    kinds += [(predictions.MAPS, f'.{maps}')] * (maps != 'none') + [(predictions.WHY, '.png')] * why
    self._names = PictureNames(out, kinds)
    with atomic_files.writing_to(out):
      self._tables = predictions.Tables(out)

  def reserve(self, path: str) -> str:
    """Chooses what the files of an image are called, once for each, in their order."""
    return self._names.reserve(name_of(path, self._root))

  def draw(
      self, path: str, name: str, image: Image.Image, pixels: np.ndarray, finding: Finding
  ) -> tuple[Answer, page.Picture | None]:
    """Writes the files of one image.

    Args:
      path: path of the image.
      name: what they are called, from `reserve`.
      image: as it was decoded.
      pixels: [h, w, 3] uint8, as the network saw it.
      finding: what was found.

    Raises:
      OSError: the files cannot be written.
    """
    try:
      return self._draw(path, name, image, pixels, finding)
    except OSError as e:
      if e.errno not in _NAMES:
        raise atomic_files.cannot_write(self._out, e) from e
      return Answer(path, error=f'{path}: its pictures cannot be written, {e.strerror}.'), None

  def add(
      self, answer: Answer, picture: page.Picture | None = None, *, name: str = '', place: str = '') -> None:
    """Adds an answer to the tables, and says its line.

    Args:
      answer, picture: from `draw`.
      name: what its files are called.
      place: begins the line.
    """
    now = datetime.datetime.now().astimezone().isoformat(timespec='milliseconds')
    with atomic_files.writing_to(self._out):
      self._tables.add(answer._replace(time=now))
    self._names.release(name)
    self.failed += answer.error is not None
    self.images += answer.error is None
    anomalous = answer.finding is not None and answer.finding.anomalous
    self.anomalous += bool(anomalous)
    if answer.finding is not None:
      self._most_not_inspected = max(self._most_not_inspected, answer.finding.not_inspected)
    if picture is not None:
      self._scores.append(answer.finding.score)
      self._pictures.append(picture)
      if len(self._pictures) >= 2 * _GALLERY:
        self._pictures = page.keep(self._pictures, self.threshold, _GALLERY)
    self._say(place + line_of(answer), loud=bool(answer.error or anomalous))
    if answer.finding is not None:
      self._remarks.see(
          answer.finding.image_size, answer.finding.not_inspected, shown(answer.path),
          note=answer.finding.note)

  def report(self, facts: tuple[tuple[str, str], ...], notes: Sequence[str] = ()) -> Path:
    """Writes report.html, with `facts` at the top, and `notes` beside its own."""
    description, images = self._inspector.model.description, self.images
    thresholds, notes = (), list(map(shown, notes))
    if self.threshold is not None:
      thresholds = (page.Threshold(self._threshold_name(), self.threshold),)
    else:
      notes.append('The bank has no threshold: scores only, no decisions.')
    if self._most_not_inspected:
      share = f'{100 * self._most_not_inspected:.2g} %'
      notes.append(f'Up to {share} of an image is not inspected: it is dark in the pictures.')
    if self._min_area:
      notes.append(f'Regions of less than {self._min_area:g} pixels are ignored.')
    if self.failed:
      files = 'file' if self.failed == 1 else 'files'
      notes.append(f'{self.failed} {files} could not be scored: see the errors in {predictions.CSV}.')
    if images > _REMEMBERED:
      notes.append(f'The histogram is of the latest {_REMEMBERED} images.')
    category = page.Category(
        description.category or 'images', list(self._scores), None, thresholds,
        tuple(page.keep(self._pictures, self.threshold, _GALLERY)))
    columns = tuple(page.Column(*c) for c in (
        ('part',), ('images', 'count'), ('anomalous', 'count'), ('share', 'percent'), ('failed', 'count')))
    known = self.threshold is not None and images
    row = (category.name, images, self.anomalous if known else None,
           self.anomalous / images if known else None, self.failed)
    path = self._out / predictions.REPORT
    with atomic_files.writing_to(self._out):
      page.write(path, page.Page(
          f'Predictions: {category.name}', facts, columns, [row], categories=(category,),
          notes=tuple(notes), pictures_first=True))
    return path

  def _threshold_name(self):
    """Names the threshold by what it promises, or says that it was given."""
    if self._given_threshold:
      return 'given threshold'
    return f'at most {100 * self._inspector.calibration.guaranteed_rate:.2g} % of good images reach it'

  def _pixel_threshold(self):
    return self._inspector.calibration and self._inspector.calibration.pixel_threshold

  def _draw(self, path, name, image, pixels, finding):
    """Draws and writes the files of one image, and makes its row and its picture for the report."""
    place = placement.placement(image.height, image.width, self._inspector.preprocessing)
    whole_map = None if finding.map is None else placement.to_original(finding.map, place)
    answer = Answer(path, finding)
    nearest = finding.nearest
    file = self._thumbnails[nearest.image] if nearest is not None and self._thumbnails else b''
    low, high = self.limits or (colours.limits_of_map(whole_map) if whole_map is not None else (0.0, 1.0))
    if self._overlays and whole_map is not None:
      answer = answer._replace(overlay=predictions.file_for(predictions.OVERLAYS, name, '.png'))
      drawn = overlay.overlay(np.asarray(image), whole_map, low, high)
      if finding.anomalous is not False:  # a frame says: look here
        drawn = overlay.outlined(drawn, *_boxes(finding))
      predictions.write_png(self._out / answer.overlay, drawn)
    if self._maps != 'none' and whole_map is not None:
      answer = answer._replace(map=predictions.file_for(predictions.MAPS, name, f'.{self._maps}'))
      predictions.write_map(self._out / answer.map, whole_map)
    if self._masks and finding.map is not None and (level := self._pixel_threshold()) is not None:
      answer = answer._replace(mask=predictions.file_for(predictions.MASKS, name, '.png'))
      mask = regions.mask(finding.map, level, place, self._min_area)
      predictions.write_png(self._out / answer.mask, 255 * mask.astype(np.uint8))
    if self._why and finding.patch is not None:
      answer = answer._replace(why=predictions.file_for(predictions.WHY, name, '.png'))
      predictions.write_png(self._out / answer.why, self._comparison(path, pixels, finding, file))
    name = shown(name_of(path, self._root))
    return answer, picture_of(self._inspector, finding, name, image, whole_map, (low, high), file)

  def _comparison(self, path, pixels, finding, file):
    """Draws the most anomalous patch beside the nearest normal one, where there is a picture of that."""
    normal = np.asarray(Image.open(io.BytesIO(file)).convert('RGB')) if file else None
    nearest = finding.nearest.name if finding.nearest is not None else ''
    return overlay.comparison(
        pixels, inspection.cell(self._inspector, *finding.patch), normal,
        finding.nearest_box if file else None,
        (shown(name_of(path, self._root)), shown(f'nearest: {"/".join(Path(nearest).parts[-2:])}')))


def _boxes(finding):
  """Lists the boxes to draw: of all regions, or of the place that looks least normal."""
  return [region.box for region in finding.regions or ()] or ([finding.box] if finding.box else [])


def _facts(finding) -> tuple[tuple[str, str], ...]:
  """Lists what the page tells of an image beside its score."""
  facts = []
  if finding.p_value is not None:
    facts += [('calibrated score', f'{finding.calibrated_score:.3f}'), ('p-value', f'{finding.p_value:.3g}')]
  if finding.regions:
    areas = ', '.join(str(region.area) for region in finding.regions[:_SHOWN_REGIONS])
    more = ', ...' if len(finding.regions) > _SHOWN_REGIONS else ''
    facts.append(('regions', f'{len(finding.regions)}, of {areas}{more} pixels'))
  if finding.not_inspected:
    facts.append(('not inspected', f'{100 * finding.not_inspected:.2g} %'))
  if finding.reason:
    facts.append(('decided by', finding.reason))
  if finding.note:
    facts.append(('note', finding.note))
  return tuple(facts)


def picture_of(
    inspector: Inspector, finding: Finding, name: str, image: Image.Image, whole_map: np.ndarray | None,
    limits: tuple[float, float], nearest: bytes) -> page.Picture:
  """Makes the picture of a finding for a page.

  Args:
    inspector: what made the finding.
    name: what the image is called.
    image: as it was decoded.
    whole_map: the map of all of the image, NaN where the network saw nothing; None for none.
    limits: values of the map where colour begins, and where it is strongest.
    nearest: the training image that has the nearest patch, encoded; b'' for none.
  """
  place = placement.placement(image.height, image.width, inspector.preprocessing)
  (width, height), (rows, columns) = finding.image_size, inspector.image_size
  normal = None if not nearest else page.Patch(
      shown(finding.nearest.name), nearest, _fractions(finding.nearest_box, columns, rows))
  return page.picture(
      name, finding.score, image, anomaly_map=whole_map, low=limits[0], high=limits[1],
      facts=_facts(finding),
      seen=_fractions(placement.box_to_original((0, 0, *place.size[::-1]), place), width, height),
      anomalous=finding.anomalous if finding.reason else None,
      regions=tuple(_fractions(box, width, height) for box in _boxes(finding)),
      patch=_fractions(finding.patch_box, width, height), nearest=normal)


def line_of(answer: Answer) -> str:
  """Writes an answer as one line for people.

  >>> line_of(Answer('a.png', Finding((64, 48), 3.21678, p_value=0.02, anomalous=False, box=(1, 2, 30, 40))))
  'a.png  score 3.217  p 0.02  good  most anomalous at 1,2-30,40'
  >>> line_of(Answer('a.png', error='a.png is no image.'))
  'not scored: a.png is no image.'
  """
  if answer.error:
    return shown(f'not scored: {answer.error}')
  found = answer.finding
  words = [answer.path, f'score {found.score:.4g}']
  if found.p_value is not None:
    words.append(f'p {found.p_value:.2g}')
  if found.decision:
    words.append(found.decision.upper() if found.anomalous else found.decision)
  if found.box:
    left, top, right, bottom = found.box
    words.append(f'most anomalous at {left},{top}-{right},{bottom}')
  if len(found.regions or ()) > 1:
    words.append(f'{len(found.regions)} regions')
  if found.reason:
    words.append(f'({found.reason})')
  return shown('  '.join(words))


def name_of(path: str, root: Path) -> str:
  """Names an image, relative to the folder that all lie in.

  >>> name_of('parts/left/001.png', Path('parts'))
  'left/001.png'
  """
  parts = Path(os.path.relpath(path, root)).parts
  return Path(*('up' if part == os.pardir else part for part in parts)).as_posix()


def _fractions(box, width, height):
  """Converts a box to fractions of a width and a height."""
  if box is None:
    return None
  left, top, right, bottom = box
  return left / width, top / height, right / width, bottom / height
