"""The protocols by which a category is measured: at which size, by which labels and scores of images.

What the metrics themselves are says `metrics.METRICS`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchcore_jax import metrics
from patchcore_jax.data import decoding, map_files
from patchcore_jax.data.folder import Category, Example
from patchcore_jax.detectors import Scores
from patchcore_jax.evaluation import uncertainty
from patchcore_jax.metrics import saturation, working_points
from patchcore_jax.metrics.intervals import Interval
from patchcore_jax.metrics.region_table import RegionTable
from patchcore_jax.settings import MetricsSpec, Preprocessing


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Describes one way to measure.

  Attributes:
    source: what defines it.
    original_size: whether maps are measured at the size of the original images; else as the network saw them.
    labels_of_masks: whether an image is anomalous if its mask marks a pixel; else if its folder says so.
    maximum: whether the score of an image is the maximum of its map; else that of the method.
    validation: whether good validation images set the threshold of SegF1.
    kinds: whether structural and logical anomalies are measured apart, by channels of masks.
  """

  source: str
  original_size: bool = True
  labels_of_masks: bool = False
  maximum: bool = False
  validation: bool = False
  kinds: bool = False


# By the names that `settings.MetricsSpec.protocol` takes.
PROTOCOLS = {
    'paper': Protocol('Roth et al., CVPR 2022, section 4.1', original_size=False),
    'original': Protocol('the same at the size of the original images'),
    'mvtec_official': Protocol(
        "MVTec AD's evaluation script; Bergmann et al., IJCV 2021", labels_of_masks=True, maximum=True),
    'mvtec_loco': Protocol("MVTec LOCO's; Bergmann et al., IJCV 2022", maximum=True, kinds=True),
    'mvtec_ad_2': Protocol('Heckler-Kram et al., arXiv 2503.21622', maximum=True, validation=True),
}


class Scored(NamedTuple):
  """What is measured of a category: n test images.

  Attributes:
    examples: the images.
    scores: those of the method, of which those of images count; None for maps alone.
    maps: n maps, at the size of the masks; None for a method that makes none.
    masks: n masks; None without any.
    validation: maps of good validation images; None without any.
    notes: lines about all of it.
  """

  examples: Sequence[Example]
  scores: Scores | None
  maps: Sequence | None
  masks: Sequence | None
  validation: Sequence | None = None
  notes: tuple[str, ...] = ()


class Rated(NamedTuple):
  """What a protocol measures of a category.

  Attributes:
    values: {metric: value}.
    examples: the images, with the labels that counted.
    scores: of the method, where there is one, with the scores of images that counted.
    per_image: {metric: [n] values, None where an image has none}.
    notes: lines that a user must know.
    notes_of_metrics: lines that a reader of single metrics must know.
    intervals: {metric: its interval}; {} where none are asked for.
    regions: the table of regions; None where none is asked for, or without masks.
  """

  values: dict[str, float | int | None]
  examples: Sequence[Example]
  scores: Scores
  per_image: dict[str, Sequence[float | None]]
  notes: tuple[str, ...]
  notes_of_metrics: tuple[str, ...]
  intervals: dict[str, Interval]
  regions: RegionTable | None

  @property
  def labels(self) -> np.ndarray:
    """The labels that counted, [n]."""
    return np.array([example.label for example in self.examples])

  def summary(self) -> list[str]:
    """Says in lines what the intervals and the table of regions hold."""
    told = []
    if self.intervals:
      texts = [f'{metrics.METRICS[name].title} {one.text()}' for name, one in self.intervals.items()]
      told.append(f'95 % intervals: {", ".join(texts)}')
    if self.regions:
      classes = [
          f'{c.half_found} of {c.regions} {_area(c.least, c.below)}'
          for c in metrics.by_area(self.regions.regions) if c.regions]
      good = f'{self.regions.false.in_good} marked in vain in {self.regions.false.good} good images'
      told.append(
          f'regions found by half or more at {self.regions.threshold:.4g}, the threshold of the best pixel '
          f'F1: {", ".join(classes)}; {good}')
    return told


def at_original_size(
    tested: Scored, preprocessing: Preprocessing, validation: Sequence[Example] = ()) -> Scored:
  """Lays the maps of a run over the original images, and reads masks as they are on disk.

  Args:
    tested: with maps at the size of the network's input.
    preprocessing: what the images went through.
    validation: the good validation images, one for each of their maps.

  Raises:
    ImageError: an image whose header cannot be read.
    ValueError: an anomalous image without a mask, where others have one.
  """
  sizes = map_files.original_sizes(tested.examples)
  maps = map_files.OriginalMaps(tested.maps, sizes, preprocessing)
  masks = None if tested.masks is None else map_files.OriginalMasks(tested.examples, sizes)
  found = tested._replace(maps=maps, masks=masks, notes=(*tested.notes, *maps.notes))
  if tested.validation is not None:
    sizes = map_files.original_sizes(validation)
    found = found._replace(validation=map_files.SeenMaps(tested.validation, sizes, preprocessing))
  return found


def check(spec: MetricsSpec, category: Category, root: str) -> None:
  """Raises ValueError for data that the protocol of the settings cannot measure, before anything long.

  Args:
    spec: the settings of metrics.
    category: what is to be measured.
    root: folder of the data set.
  """
  protocol = PROTOCOLS[spec.protocol]
  if protocol.validation and not category.validation:
    raise ValueError(
        f'metrics.protocol={spec.protocol} needs good images in validation/good: {category.name} has none.')
  if protocol.kinds and category.has_masks:
    saturation.read_config(_config(root, category.name))


def rate(
    tested: Scored, spec: MetricsSpec, root: str, *, regions: bool = False, seed: int = 0) -> Rated:
  """Measures a category by the protocol of the settings.

  Args:
    tested: with maps of the size that the protocol asks for.
    spec: the settings of metrics.
    root: folder of the data set, above the category.
    regions: whether the table of regions is made.
    seed: of resamples.

  Raises:
    ValueError: what the metrics raise and `check` does; a method without maps; kinds of anomalies that are
      not those of MVTec LOCO.
  """
  protocol, examples = PROTOCOLS[spec.protocol], tested.examples
  labels, scores = np.array([e.label for e in examples]), tested.scores and tested.scores.image
  if tested.maps is None and protocol.original_size:
    raise ValueError(f'metrics.protocol={spec.protocol} is of anomaly maps, and this method makes none.')
  if protocol.maximum or scores is None:
    scores = np.array([np.max(tested.maps[i]) for i in range(len(examples))])
  further, notes = {}, list(tested.notes)
  if protocol.labels_of_masks and tested.masks is not None:
    marked = np.array([np.asarray(tested.masks[i]).any() for i in range(len(examples))]).astype(int)
    if empty := np.count_nonzero(marked < labels):
      notes.append(f'images of anomalous folders that count as good, as their masks mark nothing: {empty}')
    labels = marked
  if protocol.validation:
    further['validation'] = tested.validation
  if protocol.kinds and tested.masks is not None:
    further = {
        'kinds': [e.defect for e in examples], 'channels': Channels(examples),
        'config': saturation.read_config(_config(root, examples[0].category))}
  found = metrics.measure(labels, scores, tested.masks, tested.maps, **spec.of_regions, **further)
  intervals, table = {}, None
  if spec.resamples:
    intervals = uncertainty.intervals(
        labels, scores, found, maps=tested.maps, masks=tested.masks, kinds=further.get('kinds'),
        resamples=spec.resamples, seed=seed, **spec.of_regions)
  if regions and found.values['pixel_f1'] is not None:
    best = working_points.f1_optimal_of(found.curve).threshold
    table = metrics.tabulate_regions(
        tested.maps, tested.masks, threshold=best, connectivity=spec.connectivity, curve=found.curve)
  examples = [e._replace(label=int(label)) for e, label in zip(examples, labels, strict=True)]
  of_all = tested.scores._replace(image=scores) if tested.scores else Scores(scores, None)
  return Rated(found.values, examples, of_all, found.per_image, tuple(notes), found.notes, intervals, table)


def _config(root, category):
  """Names the file that says how defects of MVTec LOCO saturate."""
  return Path(root) / category / 'defects_config.json'


class Channels(Sequence):
  """The channels of images: item i has an array [h, w] for each mask file of image i, read when asked for."""

  def __init__(self, examples: Sequence[Example]):
    self._examples = examples

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
    example = self._examples[index]
    return tuple(decoding.mask_values(path, example.read) for path in example.mask_paths)


def _area(least, below):
  """Names a class of areas.

  >>> _area(0, 10), _area(1000, None)
  ('below 10 pixels', 'from 1000 pixels on')
  """
  if below is None:
    return f'from {least} pixels on'
  return f'of {least} to {below - 1} pixels' if least else f'below {below} pixels'
