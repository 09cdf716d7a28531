"""The saturated per-region overlap (sPRO) of MVTec LOCO: defects that count as found when a part of them is.

Source: Bergmann, Batzner, Fauser, Sattlegger and Steger, "Beyond Dents and Scratches: Logical Constraints in
Unsupervised Anomaly Detection and Localization", IJCV 2022, section on sPRO. A defect is a channel: an image
file of its own, however many connected parts it has, and channels may overlap. Of a missing part nobody knows
where it should lie, so that its overlap is divided by a saturation area below its own, and goes up to 1.

Here every distinct score is a threshold, which has no parameter. MVTec's script approximates that: it inserts
thresholds until points of the curve are near each other, from 50 on, above 10 million pixels from a random
sample.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchcore_jax.metrics import checks, ranking
from patchcore_jax.metrics import curve as curves

LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)  # of the false positive rate; papers quote 0.05
GOOD, STRUCTURAL, LOGICAL = 'good', 'structural_anomalies', 'logical_anomalies'  # folders
_FIELDS = {
    'defect_name': str, 'pixel_value': int, 'saturation_threshold': (int, float), 'relative_saturation': bool}


class Defect(NamedTuple):
  """A kind of defect, as a data set's `defects_config.json` has it.

  Attributes:
    name: for people.
    pixel_value: 1 to 255, which marks it in the image files.
    saturation_threshold: a share of a channel's area in (0, 1], or a number of pixels.
    relative: whether it is a share.
  """

  name: str
  pixel_value: int
  saturation_threshold: float
  relative: bool

  def saturation_area(self, area: int) -> int:
    """Computes the number of pixels that have to be found of a channel of an area, at least 1.

    >>> Defect('part', 255, 0.5, True).saturation_area(7)
    3
    """
    # Cut off, as MVTec's script does it; where that leaves 0 of a small channel, it divides 0 by 0.
    return max(1, int(self.saturation_threshold * area)) if self.relative else min(
        self.saturation_threshold, area)


class SproAreas(NamedTuple):
  """Areas under a curve of sPRO over the false positive rate.

  Attributes:
    areas: one for each limit, in [0, 1]; None where they are not defined: no channels, or no normal pixel.
    limits: of the false positive rate, up to which and by which the area is taken.
    channels: the number of defects, which weigh the same.
    notes: what a reader must know, in sentences without a full stop.
  """

  areas: tuple[float | None, ...]
  limits: tuple[float, ...]
  channels: int
  notes: tuple[str, ...]


class Spro(NamedTuple):
  """sPRO by kinds of anomalies, each together with all good images, and the mean of both at each limit."""

  structural: SproAreas
  logical: SproAreas
  mean: tuple[float | None, ...]


class ByKind(NamedTuple):
  """A metric of structural and of logical anomalies, each beside all good images; None where not defined.

  Attributes:
    structural, logical: its values.
    mean: of both, which is not the value of all images at once.
    notes: what a reader must know, in sentences without a full stop.
  """

  structural: float | None
  logical: float | None
  mean: float | None
  notes: tuple[str, ...] = ()


def read_config(path: str | Path) -> dict[int, Defect]:
  """Reads a data set's `defects_config.json`.

  Returns:
    Defects by their pixel value.

  Raises:
    ValueError: no file, no JSON, or not a list of objects with `defect_name`, `pixel_value` (1 to 255, each
      once), `saturation_threshold` and `relative_saturation`; a relative threshold that is not a float in
      (0, 1], as in MVTec's script, or an absolute one that is not a whole number of pixels.

  >>> import tempfile
  >>> path = Path(tempfile.mkdtemp()) / 'defects_config.json'
  >>> entry = {'defect_name': 'scratch', 'pixel_value': 200, 'saturation_threshold': 30}
  >>> _ = path.write_text(json.dumps([entry | {'relative_saturation': False}]))
  >>> read_config(path)
  {200: Defect(name='scratch', pixel_value=200, saturation_threshold=30, relative=False)}
  """
  try:
    entries = json.loads(Path(path).read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    what = getattr(error, 'strerror', None) or error
    raise ValueError(f'{path}: expected a JSON file of defects, got: {what}.') from error
  if not isinstance(entries, list) or not entries:
    raise ValueError(f'{path}: expected a list of defects, got {str(entries)[:80]}.')
  config = {}
  for number, entry in enumerate(entries, 1):
    where = f'{path}, defect {number}: '
    if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
      raise ValueError(f'{where}expected {", ".join(_FIELDS)}, got {str(entry)[:80]}.')
    for name, kind in _FIELDS.items():
      if not isinstance(entry[name], kind) or isinstance(entry[name], bool) != (kind is bool):
        raise ValueError(f'{where}expected {name} of another type, got {entry[name]!r}.')
    defect = Defect(*(entry[name] for name in _FIELDS))
    threshold = defect.saturation_threshold
    if not 1 <= defect.pixel_value <= 255 or defect.pixel_value in config:
      raise ValueError(f'{where}expected a pixel_value of its own in 1 to 255, got {defect.pixel_value}.')
    if defect.relative and not (isinstance(threshold, float) and 0 < threshold <= 1):
      raise ValueError(f'{where}expected a relative threshold such as 0.5 or 1.0, got {threshold!r}.')
    if not defect.relative and not (isinstance(threshold, int) and threshold >= 1):
      raise ValueError(f'{where}expected an absolute threshold in whole pixels, got {threshold!r}.')
    config[defect.pixel_value] = defect
  return config


def spro(
    maps: Sequence, channels: Sequence, kinds: Sequence[str], config: Mapping[int, Defect], *,
    limits: Sequence[float] = LIMITS) -> Spro:
  """Computes sPRO of structural and of logical anomalies, and the mean of both, as papers on LOCO give it.

  Args:
    maps, channels, config, limits: as for `spro_areas`.
    kinds: [n] 'good', 'structural_anomalies' or 'logical_anomalies'.

  Raises:
    ValueError: as `spro_areas`; another number of kinds, or other ones; channels of a good image, or none of
      another.

  >>> maps, channel = np.array([[[3.0, 2.0, 0.0, 1.0]]] * 3), np.array([[200, 200, 0, 0]])
  >>> config = {200: Defect('scratch', 200, 1, False)}
  >>> spro(maps, [(), (channel,), (channel,)], [GOOD, STRUCTURAL, LOGICAL], config, limits=(1,)).mean
  (0.9166666666666666,)
  """
  kinds = list(map(str, kinds))
  if not kinds:
    raise ValueError('Expected at least one map, got none: nothing to rate.')
  if len(kinds) != len(maps) or not set(kinds) <= {GOOD, STRUCTURAL, LOGICAL}:
    raise ValueError(
        f'Expected {GOOD}, {STRUCTURAL} or {LOGICAL} for each of {len(maps)} maps, got {len(kinds)}, among '
        f'them {sorted(set(kinds))[:4]}.')
  found = []
  for kind in (STRUCTURAL, LOGICAL):
    positions = [i for i, own in enumerate(kinds) if own in (GOOD, kind)]
    found.append(_areas(_Images(maps, channels, config, positions, kinds), limits))
  return Spro(*found, tuple(map(_mean, *(areas.areas for areas in found))))


def spro_05(
    maps: Sequence, channels: Sequence, kinds: Sequence[str], config: Mapping[int, Defect]) -> ByKind:
  """Computes sPRO up to a false positive rate of 0.05, as papers on LOCO give it; arguments as for `spro`."""
  found = spro(maps, channels, kinds, config, limits=(0.05,))
  notes = tuple(dict.fromkeys((*found.structural.notes, *found.logical.notes)))
  return ByKind(found.structural.areas[0], found.logical.areas[0], found.mean[0], notes)


def spro_areas(
    maps: Sequence, channels: Sequence, config: Mapping[int, Defect], *, limits: Sequence[float] = LIMITS,
) -> SproAreas:
  """Computes areas under the curve of sPRO of all images together, up to limits of the false positive rate.

  At a threshold a channel has min(pixels found / saturation area, 1), sPRO is the mean over all channels of
  all images, and the false positive rate is the share of pixels in no channel that alarm. Every image is
  read twice.

  Args:
    maps: n maps [h, w] of scores, of any sizes, read one at a time.
    channels: n sequences of arrays [h, w], one for each defect, as its file has it: 0 and the pixel value of
      its kind. None of a good image.
    config: defects by pixel value.
    limits: in (0, 1].

  Raises:
    ValueError: as `checks.images`; limits out of range; a channel of another size than its map, without a
      defect, with several values, or with one that config lacks.

  >>> maps, channel = np.array([[[3.0, 2.0, 0.0, 1.0]]] * 2), np.array([[200, 200, 0, 0]])
  >>> config = {200: Defect('scratch', 200, 1, False)}
  >>> spro_areas(maps, [(), (channel,)], config, limits=(1,)).areas
  (0.9166666666666666,)
  """
  return _areas(_Images(maps, channels, config, range(len(maps))), limits)


def image_auroc(
    kinds: Sequence[str], scores: Sequence[float]) -> tuple[float | None, float | None, float | None]:
  """Computes the AUROC of good against structural and against logical images, and the mean of both.

  It is not that of all images at once. MVTec's script counts tied scores otherwise: [1, 1] against [1, 1] is
  0.75 there, and 0.5 here.

  Args:
    kinds: as for `spro`.
    scores: [n], the maximum of each map in MVTec's script.

  Raises:
    ValueError: as `auroc`.

  >>> image_auroc([GOOD, GOOD, STRUCTURAL, LOGICAL], [1, 3, 2, 4])[:3]
  (0.5, 1.0, 0.75)
  """
  kinds, scores, found = np.asarray(kinds), np.asarray(scores), []
  if kinds.shape != scores.shape or not len(kinds):
    raise ValueError(
        f'Expected a score for each of {len(kinds)} images, and at least one, got {len(scores)}.')
  for kind in (STRUCTURAL, LOGICAL):
    inside = (kinds == GOOD) | (kinds == kind)
    try:
      found.append(ranking.auroc(kinds[inside] == kind, scores[inside]) if inside.any() else None)
    except checks.NotDefined:
      found.append(None)
  return ByKind(*found, _mean(*found))


class _Images:
  """Some images of a data set: their maps, their channels, and masks of what lies in any channel.

  What was read last is kept, because the mask of an image and its channels are asked for one after another.
  """

  def __init__(self, maps, channels, config: Mapping[int, Defect], positions: Sequence[int], kinds=None):
    if len(maps) != len(channels):
      raise ValueError(f'Expected channels for each of {len(maps)} maps, got those of {len(channels)}.')
    self._maps, self._channels, self._config = maps, channels, config
    self.positions, self._kinds = positions, kinds
    self._last: tuple[int, list, tuple[int, ...]] | None = None

  def __len__(self):
    return len(self.positions)

  def __getitem__(self, i: int) -> np.ndarray:
    """Reads a map, and its channels."""
    position = self.positions[i]
    values = np.asarray(self._maps[position])
    # Here, where the position among all images is known.
    checks.flat(np.zeros(values.shape, bool), values, scores_name=f'image {position}, maps')
    channels = [_defect(np.asarray(channel), values.shape, self._config, f'image {position}')
                for channel in self._channels[position]]
    if self._kinds and (self._kinds[position] == GOOD) != (not channels):
      raise ValueError(
          f'image {position}: expected channels of anomalous images only, and of each of them, got '
          f'{len(channels)} of one that is {self._kinds[position]}.')
    self._last = i, channels, values.shape
    return values

  def of(self, i: int) -> list[tuple[Defect, np.ndarray]]:
    """Returns the channels of the map that was read last: their kinds, and where they are marked."""
    assert self._last and self._last[0] == i
    return self._last[1]

  def mask(self, i: int) -> np.ndarray:
    """Marks what lies in any channel of the map that was read last."""
    mask = np.zeros(self._last[2], bool)
    for _, inside in self.of(i):
      mask |= inside
    return mask


class _Masks:
  """The masks of images, which `checks.images` reads right after their maps."""

  def __init__(self, images: _Images):
    self._images = images

  def __len__(self):
    return len(self._images)

  def __getitem__(self, i: int) -> np.ndarray:
    return self._images.mask(i)


def _areas(images: _Images, limits: Iterable[float]) -> SproAreas:
  limits = tuple(limits)
  for limit in limits:
    curves.check_limit(limit)
  if not len(images):
    return SproAreas((None,) * len(limits), limits, 0, ())
  count, notes = 0, []

  def gains(i, values, mask):
    nonlocal count
    all_scores, all_gains = [], []
    for defect, inside in images.of(i):
      count, position = count + 1, images.positions[i]
      scores = np.sort(values[inside])[::-1]
      area = defect.saturation_area(scores.size)
      if not defect.relative and defect.saturation_threshold > scores.size:
        notes.append(f'image {position}: a defect {defect.name} has {scores.size} pixels, fewer than the '
                     f'{defect.saturation_threshold} at which it saturates')
      elif defect.relative and defect.saturation_threshold * scores.size < 1:
        notes.append(f'image {position}: a defect {defect.name} of {scores.size} pixels saturates at a share '
                     f'of {defect.saturation_threshold:g}, which is taken as 1 pixel')
      all_scores.append(scores)
      all_gains.append(np.where(np.arange(scores.size) < area, 1 / area, 0.0))  # the first to be found count
    return np.concatenate(all_scores), np.concatenate(all_gains)

  curve = curves.of_images(images, _Masks(images), gains, total=lambda: count)
  areas = tuple(curve.area(limit) if curve.anomalous and curve.good else None for limit in limits)
  return SproAreas(areas, limits, count, tuple(notes))


def _defect(channel, shape, config, where):
  """Looks up the kind of a channel, and where the channel is marked."""
  if channel.shape != shape:
    raise ValueError(f'{where}: expected channels of the size of its map, {shape}, got {channel.shape}.')
  inside = channel != 0
  values = np.unique(channel[inside])
  if values.size != 1 or values[0] not in config:
    raise ValueError(
        f'{where}: expected a channel of 0 and one of the values {sorted(config)}, got '
        f'{values[:4].tolist() or "0 only"}: compare with defects_config.json.')
  return config[int(values[0])], inside


def _mean(structural, logical):
  return None if structural is None or logical is None else (structural + logical) / 2
