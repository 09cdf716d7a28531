"""The answer for one image, from the network to CSV, JSON, HTTP and the page."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from patchcore_jax import parallel
from patchcore_jax.banks import calibration, provenance
from patchcore_jax.banks.provenance import Origin
from patchcore_jax.data import placement, preprocess
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import Scores
from patchcore_jax.inspection import image_sizes, inputs, regions
from patchcore_jax.inspection.inspector import Inspector, check_size, predict
from patchcore_jax.inspection.regions import Region

Box = tuple[float, float, float, float]  # left, top, right, bottom; right and bottom exclusive
_ROUNDING = 1e-6  # shares of pixels are no exact floats


@dataclasses.dataclass(frozen=True)
class Finding:
  """What was found in one image. Boxes and points are in pixels of the original file, turned upright.

  What a method does not know is None: maps and places where it scores whole images only, the nearest patch
  where it has no bank, thresholds where there are none.

  Attributes:
    image_size: (width, height) of the original.
    score: larger is more anomalous; its unit is the model's own.
    threshold: scores from here on are anomalous.
    calibrated_score: 0 to 1, 0.5 at the threshold (`calibration.calibrated_score`).
    p_value: p-value of the hypothesis that the part is good (`calibration.p_value`).
    anomalous: whether the score reaches the threshold, or what `reason` says.
    box: box of the most anomalous region: of those above the pixel threshold, or else of what looks least
      normal.
    centroid: (x, y) of that region; whole numbers are centres of pixels.
    patch_box: box of the most anomalous patch.
    patch: (row, column) of that patch on the grid.
    nearest: where the patch of the bank comes from that is nearest to it.
    nearest_box: where that is, in pixels of the training image as the network saw it: resized and cropped.
    map: [h, w] float32 at the size of the network's input.
    regions: all regions above the pixel threshold, largest first; None where there is no such threshold.
    not_inspected: share of the image that the network does not see, in [0, 1].
    outside_range: share of the pixels whose value lies outside of the value range of the model, in [0, 1].
    reason: what decides besides the score; '' where nothing does.
    note: what is unusual about the image and decides nothing, such as another shape than that of the
      training images; '' where nothing is.
    path: the image's file; '' where it was an array.
  """

  image_size: tuple[int, int]
  score: float
  threshold: float | None = None
  calibrated_score: float | None = None
  p_value: float | None = None
  anomalous: bool | None = None
  box: tuple[int, int, int, int] | None = None
  centroid: tuple[float, float] | None = None
  patch_box: tuple[int, int, int, int] | None = None
  patch: tuple[int, int] | None = None
  nearest: Origin | None = None
  nearest_box: Box | None = None
  map: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
  regions: tuple[Region, ...] | None = None
  not_inspected: float = 0.0
  outside_range: float = 0.0
  reason: str = ''
  note: str = ''
  path: str = dataclasses.field(default='', kw_only=True)

  @property
  def why(self) -> str:
    """One sentence that says what is unusual, and compared with what."""
    if self.patch is None or self.patch_box is None:
      return f'The image as a whole scores {self.score:.4g}.'
    left, top, right, bottom = self.patch_box
    text = f'The patch at {left},{top}-{right},{bottom} is the least normal'
    if self.nearest is None:
      return f'{text}.'
    image = self.nearest.name or f'training image {self.nearest.image}'
    return f'{text}; the most similar normal one is in {image}, at row {self.nearest.row} and column ' \
           f'{self.nearest.column} of the grid.'

  @property
  def decision(self) -> str | None:
    """The decision, 'anomalous' or 'good'; None without a threshold."""
    return None if self.anomalous is None else 'anomalous' if self.anomalous else 'good'

  def to_json(self) -> dict[str, Any]:
    """Converts all but the map and the path to what JSON has.

    The name of the nearest training image is `nearest['image']`.

    >>> Finding((640, 480), 3.5, threshold=3.0, anomalous=True, box=(1, 2, 30, 40)).to_json()['decision']
    'anomalous'
    """
    names = [f.name for f in dataclasses.fields(self) if f.name not in ('map', 'path')]
    return {'decision': self.decision} | {name: _plain(getattr(self, name)) for name in names}


def _plain(value: Any) -> Any:
  """Converts records to dicts, and other tuples to lists, all the way down."""
  if isinstance(value, Origin):
    return {'image': value.name or None, 'number': value.image, 'row': value.row, 'column': value.column}
  if isinstance(value, Region):
    return {name: _plain(part) for name, part in value._asdict().items()}
  return [_plain(part) for part in value] if isinstance(value, tuple) else value


def find(
    inspector: Inspector, scores: Scores, i: int, original_size: tuple[int, int], *,
    pixels: np.ndarray | None = None, threshold: float | None = None, path: str = '', outside: float = 0.0,
    full_range: bool = False, min_area: float = 0) -> Finding:
  """Makes the `Finding` of image i of a batch.

  Args:
    scores: scores of the batch, NumPy arrays.
    original_size: (height, width) of the image before preprocessing.
    pixels: [h, w, 3] uint8, the image as the network saw it; None to say nothing of its colours.
    threshold: threshold of scores, in place of the model's.
    outside: share of the image's pixels that lie outside of the value range (`decoding.Decoded`). More than
      in any training image is anomalous, whatever the score.
    full_range: see `decoding.Decoded`; it becomes part of the note.
    min_area: regions of fewer pixels of the original are ignored. An image whose regions all are is good,
      whatever the score.
  """
  found, description = inspector.calibration, inspector.model.description
  score = float(scores.image[i])
  place = placement.placement(*original_size, inspector.preprocessing)
  if threshold is not None and found:
    found = dataclasses.replace(found, image_threshold=threshold)
  if threshold is None and found:
    threshold = found.image_threshold
  answer = Finding(
      original_size[::-1], score, threshold,
      calibration.calibrated_score(found, score) if found else None,
      calibration.p_value(found, score) if found else None,
      None if threshold is None else score >= threshold,
      not_inspected=preprocess.not_inspected(*original_size, inspector.preprocessing), outside_range=outside,
      note='; '.join(filter(None, (
          image_sizes.remark(original_size[::-1], description),
          '' if pixels is None else image_sizes.remark_on_colours(pixels, description),
          image_sizes.FULL_RANGE if full_range else '', _about_background(scores, i)))),
      path=path)
  if scores.map is not None:
    answer = _with_regions(answer, scores.map[i], found.pixel_threshold if found else None, place, min_area)
  usual = description.outside_range
  if threshold is not None and outside > usual + _ROUNDING:
    reason = (f'{_percent(outside)} of the pixels lie outside of the value range, of training images at most '
              f'{_percent(usual)}')
    answer = dataclasses.replace(answer, anomalous=True, reason=reason)
  if 'patch' in scores.evidence and description.grid:
    patch = divmod(int(scores.evidence['patch'][i]), description.grid[1])
    answer = dataclasses.replace(
        answer, patch=patch, patch_box=placement.box_to_original(cell(inspector, *patch), place))
  if 'nearest' in scores.evidence:
    origin = provenance.origin(inspector.model, int(scores.evidence['nearest'][i]))
    answer = dataclasses.replace(
        answer, nearest=origin, nearest_box=cell(inspector, origin.row, origin.column))
  return answer


def _about_background(scores, i) -> str:
  """Tells what share of an image is not scored, because a method takes it for background; '' for none."""
  share = scores.evidence['background_share'][i] if 'background_share' in scores.evidence else 0
  if not share:
    return ''
  return f'{_percent(share)} of the image is taken for background and not scored'


def _with_regions(answer, anomaly_map, pixel_threshold, place, min_area) -> Finding:
  """Adds the map and the regions to a finding, and decides on regions that are too small to count."""
  all_regions, kept = [], None
  if pixel_threshold is not None:
    all_regions = regions.above(anomaly_map, pixel_threshold, place)
    kept = tuple(region for region in all_regions if region.area >= min_area)
  if kept:
    most = max(kept, key=lambda region: region.maximum)
    box, centroid = most.box, most.centroid
  else:
    peak = regions.most_anomalous(anomaly_map)
    box = placement.box_to_original(peak.box, place)
    centroid = placement.point_to_original(peak.centroid, place)
  answer = dataclasses.replace(answer, map=anomaly_map, regions=kept, box=box, centroid=centroid)
  if not (answer.anomalous and all_regions) or kept:
    return answer
  return dataclasses.replace(
      answer, anomalous=False, reason=f'no region has {min_area:g} pixels, the largest of '
      f'{len(all_regions)} has {all_regions[0].area}')


def _percent(share: float) -> str:
  return f'{100 * share:.3g} %'


def check_knows_regions(inspector: Inspector) -> None:
  """Raises ValueError for a model without a pixel threshold, whose findings have no regions."""
  if inspector.calibration is None or inspector.calibration.pixel_threshold is None:
    raise ValueError(
        'The model has no pixel threshold, and so no regions to draw as masks or to ignore as too small: '
        'expected one that is fitted or calibrated with a false alarm rate, by a method with maps.')


def cell(inspector: Inspector, row: int, column: int) -> Box:
  """Computes the box of a patch in pixels of the network's input."""
  grid = inspector.model.description.grid
  assert grid, 'only methods with patches have a grid, and ask'
  (height, width), (rows, columns) = inspector.image_size, grid
  return (column * width / columns, row * height / rows,
          (column + 1) * width / columns, (row + 1) * height / rows)


def findings(
    inspector: Inspector, images: Any, batch_size: int, *, min_area: float = 0, max_pixels: int | None = None,
    on_error: Callable[[ImageError], Any] | None = None) -> Iterator[Finding]:
  """Yields what is found in each image, in order; the next images are read while some are scored.

  Args:
    images: as of `inputs.opened`.
    batch_size: images that pass through the network at once.
    min_area: regions of fewer pixels are ignored (`find`).
    max_pixels: as of `decoding.decode`.
    on_error: as of `inputs.opened`; it is told of images of another size too.

  Raises:
    ImageError: a file cannot be read, or an image of a size that the model does not take.
    ValueError: something else than images.
  """
  size, known = parallel.divisible_batch_size(batch_size), {}

  def prepared(decoded):
    """Keeps of an image what the network sees of it; the original may be large."""
    pixels = np.asarray(preprocess.transform(decoded.image, inspector.preprocessing))
    return pixels, decoded.image.size[::-1], decoded._replace(image=None)

  def batches():
    waiting = []
    for number, (path, (pixels, original, decoded)) in enumerate(inputs.opened(
        images, inspector.preprocessing, max_pixels=max_pixels, then=prepared, on_error=on_error)):
      try:
        check_size(inspector, pixels.shape[:2])
      except ImageError as e:
        if on_error is None:
          raise
        on_error(ImageError(f'{path or "an array"}: {e}'))
        continue
      known[number] = path, original, pixels, decoded
      waiting.append((number, pixels))
      if len(waiting) == size:
        yield _batch(waiting, size)
        waiting = []
    if waiting:
      yield _batch(waiting, size)

  for index, scores in predict(inspector, batches()):
    for i, number in enumerate(index):
      path, original, pixels, decoded = known.pop(int(number))
      yield find(
          inspector, scores, i, original, pixels=pixels, path=path, outside=decoded.outside,
          full_range=decoded.full_range, min_area=min_area)


def _batch(images, size) -> Batch:
  """Makes a batch of (number, pixels), padded to its size."""
  numbers, pixels = zip(*images, strict=True)
  missing = size - len(numbers)
  return Batch(
      np.pad(np.stack(pixels), [(0, missing), (0, 0), (0, 0), (0, 0)]), None,
      np.pad(np.array(numbers, np.int32), (0, missing), constant_values=-1))
