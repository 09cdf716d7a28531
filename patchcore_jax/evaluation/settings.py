"""One record of everything that decides how a detector is measured. It imports no JAX."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from patchcore_jax.banks.model import to_json
from patchcore_jax.detectors import DETECTORS, Detector, Ensemble, PatchCore, find
from patchcore_jax.settings import (
    BackboneSpec,
    CalibrationSpec,
    DataSpec,
    FitSpec,
    MetricsSpec,
    Preprocessing,
    ReportSpec,
    SearchSpec,
    check_ratio,
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a run says: the data, the network, the method, and how it is measured.

  Once made, `ratios` is never empty: methods without a coreset have (1.0,).

  Attributes:
    data: which images.
    detector: the method, for each of several networks.
    ratios: coreset ratios to score at, all from one fit at the largest; () for the one of the detector.
    preprocessing: what is done to the images.
    backbone: the network; several, joined by '+' in its name, make an ensemble.
    search: how neighbours are found.
    fit: what the fit may use.
    calibration: kept for the record: the test images of labelled data make the thresholds here.
    metrics: what the metrics leave open.
    report: what the report shows.
    seed: the seed of everything that is random.
    more: what else config.json holds, by section, such as settings of methods that are not used here.

  Raises:
    ValueError: ratios out of range, or for a method without a coreset; a method that makes no ensembles;
      labelled defects for a method that learns from none, or none for one that does.
  """

  data: DataSpec
  detector: Detector = PatchCore()
  ratios: tuple[float, ...] = ()
  preprocessing: Preprocessing = Preprocessing()
  backbone: BackboneSpec = BackboneSpec()
  search: SearchSpec = SearchSpec()
  fit: FitSpec = FitSpec()
  calibration: CalibrationSpec = CalibrationSpec()
  metrics: MetricsSpec = MetricsSpec()
  report: ReportSpec = ReportSpec()
  seed: int = 0
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    ratios, detector = tuple(map(float, self.ratios)), self.detector
    if detector.has_coreset:
      ratios = ratios or (detector.ratio,)
      for ratio in ratios:
        check_ratio(ratio)
      if not detector.coreset.nested and len(ratios) > 1:
        raise ValueError(
            f"coreset.method='{detector.coreset.method}' makes another bank for every ratio: expected one, "
            f'got {ratios}.')
      object.__setattr__(self, 'detector', dataclasses.replace(detector, ratio=max(ratios)))
    elif ratios not in ((), (1.0,)):
      raise ValueError(f'ratios={ratios}: {detector.title} has no coreset. Leave them out.')
    object.__setattr__(self, 'ratios', ratios or (1.0,))
    if self.data.labelled_defects and not detector.uses_defects:
      raise ValueError(
          f'data.labelled_defects={self.data.labelled_defects}: {detector.title} with these settings learns '
          'from good images only. Leave it out.')
    if not self.data.labelled_defects:
      detector.check_defects(0)
    _ = self.method  # so that one that cannot be is refused now

  @property
  def method(self) -> Detector:
    """What is fitted: the detector, or the ensemble of it where there are several networks."""
    if len(network_names(self.backbone)) == 1:
      return self.detector
    further = self.ratios if self.detector.has_coreset else ()
    return Ensemble(self.detector, tuple(ratio for ratio in further if ratio != max(self.ratios)))

  def to_json(self) -> dict[str, Any]:
    """Converts all settings to what config.json holds: a dict of sections, sorted by name."""
    patchcore = self.detector if isinstance(self.detector, PatchCore) else PatchCore()
    unused = {name: find(name)() for name in DETECTORS if name not in ('patchcore', 'ensemble')}
    method = {
        'embedding': patchcore.embedding, 'scoring': patchcore.scoring,
        'coreset': vars(patchcore.coreset) | {'ratios': self.ratios}}
    if patchcore is not self.detector:
      unused, method = unused | method, {name_of(self.detector): self.detector}
    sections = {
        'seed': self.seed, 'detector': name_of(self.detector), 'data': self.data,
        'preprocess': self.preprocessing, 'backbone': self.backbone, 'search': self.search, 'fit': self.fit,
        'calibration': self.calibration, 'metrics': self.metrics, 'report': self.report}
    return _sorted(to_json({**unused, **self.more, **sections, **method}))


def name_of(detector: Detector) -> str:
  """Names a method as `detectors.find` takes it.

  >>> name_of(PatchCore(0.2))
  'patchcore'
  """
  record = type(detector)
  return record.name if record.name in DETECTORS else f'{record.__module__}:{record.__qualname__}'


def network_names(backbone: BackboneSpec) -> tuple[str, ...]:
  """Lists the names of the networks.

  >>> network_names(BackboneSpec('resnet18.tv_in1k + module:factory'))
  ('resnet18.tv_in1k', 'module:factory')
  """
  return tuple(name.strip() for name in backbone.name.split('+'))


def names_in(items: Sequence[str]) -> tuple[str, ...]:
  """Splits a list of names at commas too, as it comes from some command lines.

  >>> names_in(('screw, transistor', 'nut'))
  ('screw', 'transistor', 'nut')
  """
  return tuple(name.strip() for item in items for name in item.split(',') if name.strip())


def _sorted(value):
  """Sorts the keys of dicts, all the way down."""
  return {k: _sorted(value[k]) for k in sorted(value)} if isinstance(value, dict) else value
