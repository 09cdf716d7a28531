"""The table of all metrics: what results.csv, report.html and the printed tables show, one record a metric.

A new metric is a function in one of the modules beside this one and a record at the end of `METRICS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from patchcore_jax.metrics import (
    per_image_overlap,
    ranking,
    regions,
    saturation,
    segmentation,
    working_points,
)

_IMAGES = ('labels', 'scores')
_PIXELS = ('pixels',)
_MARKED = ('maps', 'masks', 'validation', 'labels')
_CHANNELS = ('maps', 'channels', 'kinds', 'config')
_KINDS = ('kinds', 'scores')
_AUPIMO = 'Bertoldo et al., "AUPIMO", BMVC 2024'
_AD_2 = 'Heckler-Kram et al., "The MVTec AD 2 Dataset", arXiv 2503.21622'
_LOCO = 'Bergmann et al., "Beyond Dents and Scratches", IJCV 2022'


@dataclasses.dataclass(frozen=True)
class Metric:
  """Describes one number that is measured of a category.

  Attributes:
    name: column of results.csv, and key in the result of `evaluate`.
    title: name for people, as it reads within a sentence.
    function: computes it from what it needs; raises `checks.NotDefined` where it is not defined.
    needs: names of arguments of `evaluate`, in the order in which the function takes them, or 'pixels' for
      the curve of all pixels (`curve.of_regions`), which metrics share. Where one is absent the metric is not
      defined.
    source: paper and section, or what else defines it.
    kind: 'percent' is a share in [0, 1], printed in percent; 'count' an integer from 0 on; 'number' any
      finite value in the unit of the scores.
    field: field of the function's result, where that is a record; '' where it is the value. Columns of the
      same function share one call.
    per_image: field of the same record that has a value for each image; '' where there is none.
    parameters: names of keyword arguments of `evaluate` that the function takes.
    of_order: whether a share or a count depends on the order of scores alone; else on their differences too.
    higher_is_better: None where neither higher nor lower is better.
    in_report: whether report.html has a column for it; results.csv always has.
    in_terminal: whether the table printed after a run has a column for it; there is room for few.
  """

  name: str
  title: str
  function: Callable[..., Any]
  needs: tuple[str, ...]
  source: str
  kind: Literal['percent', 'count', 'number'] = 'percent'
  field: str = ''
  per_image: str = ''
  parameters: tuple[str, ...] = ()
  of_order: bool = True
  higher_is_better: bool | None = True
  in_report: bool = True
  in_terminal: bool = False

  @property
  def heading(self) -> str:
    """The title as a heading, which begins with a capital letter."""
    return self.title[0].upper() + self.title[1:]

  @property
  def is_averaged(self) -> bool:
    """Whether a mean over categories says something.

    A mean of counts depends on how many images each category has; units of scores differ between them.
    """
    return self.kind == 'percent'

  def text(self, value: float | int | None) -> str:
    """Formats a value: shares in percent, numbers to 4 digits, a dash for what is not defined.

    >>> [METRICS['aupro'].text(0.9449), METRICS['false_positives'].text(3), METRICS['aupro'].text(None)]
    ['94.5', '3', '-']
    """
    if value is None:
      return '-'
    return {'percent': f'{100 * value:.1f}', 'count': f'{value:.0f}', 'number': f'{value:.4g}'}[self.kind]


# By name, in the order of the columns of results.csv.
METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric('image_auroc', 'image AUROC', ranking.auroc, _IMAGES,
           'Roth et al., CVPR 2022, section 4.1 and table S1', in_terminal=True),
    Metric('image_ap', 'image AP', ranking.average_precision, _IMAGES,
           'scikit-learn, average_precision_score: steps in recall, not trapezoids'),
    Metric('image_f1', 'best F1', working_points.f1_optimal, _IMAGES,
           'Roth et al., CVPR 2022, supplement, section C.4', field='f1'),
    Metric('image_threshold', 'threshold of the best F1', working_points.f1_optimal, _IMAGES,
           'Roth et al., CVPR 2022, supplement, section C.4', kind='number', field='threshold',
           higher_is_better=None, in_report=False),
    Metric('false_positives', 'false alarms', working_points.f1_optimal, _IMAGES,
           'Roth et al., CVPR 2022, supplement, section C.4 and figure S1', kind='count',
           field='false_positives', higher_is_better=False),
    Metric('false_negatives', 'missed', working_points.f1_optimal, _IMAGES,
           'Roth et al., CVPR 2022, supplement, section C.4 and figure S2', kind='count',
           field='false_negatives', higher_is_better=False),
    Metric('error_at_full_recall', 'error at full recall', working_points.error_at_full_recall, _IMAGES,
           'Roth et al., CVPR 2022, supplement, section B and figure S3', higher_is_better=False,
           in_report=False),
    Metric('pixel_auroc', 'pixel AUROC', ranking.auroc_of, _PIXELS,
           'Roth et al., CVPR 2022, section 4.1 and table S2', in_terminal=True),
    Metric('aupro', 'AUPRO', regions.aupro_of, _PIXELS,
           'Bergmann et al., IJCV 2021, section on PRO; Roth et al., CVPR 2022, table S3',
           parameters=('max_fpr',), in_terminal=True),
    Metric('aupro_05', 'AUPRO 0.05', regions.aupro_05_of, _PIXELS,
           f'{_AD_2}: AU-PRO up to a rate of 0.05'),
    Metric('pixel_ap', 'pixel AP', ranking.average_precision_of, _PIXELS,
           'scikit-learn, average_precision_score: steps in recall, not trapezoids', in_report=False),
    Metric('pixel_f1', 'best pixel F1', working_points.f1_optimal_of, _PIXELS,
           'Zou et al., "SPot-the-Difference", ECCV 2022: chosen on test labels, an upper bound', field='f1',
           in_report=False),
    Metric('full_recall_threshold', 'threshold at full recall', working_points.full_recall_threshold, _IMAGES,
           'Roth et al., CVPR 2022, supplement, section B', kind='number', higher_is_better=None,
           in_report=False),
    Metric('aupimo', 'AUPIMO', per_image_overlap.aupimo_interpolated, ('maps', 'masks'),
           f'{_AUPIMO}, integrated exactly between the bounds', field='mean', per_image='values',
           parameters=('bounds',)),
    Metric('aupimo_nearest', 'AUPIMO by the authors\' rule', per_image_overlap.aupimo, ('maps', 'masks'),
           f'{_AUPIMO}: 300,000 thresholds, between those nearest to the bounds', field='mean',
           parameters=('bounds',), of_order=False, in_report=False),
    Metric('seg_f1', 'SegF1', segmentation.beyond_validation, _MARKED,
           f'{_AD_2}: threshold of mean + 3 deviations of good validation pixels', field='seg_f1',
           of_order=False, in_terminal=True),
    Metric('class_f1', 'F1 of images with a marked pixel', segmentation.beyond_validation, _MARKED,
           f'{_AD_2}, whose rule for ClassF1 is not public', field='class_f1', of_order=False),
    Metric('seg_threshold', 'threshold of SegF1', segmentation.beyond_validation, _MARKED, _AD_2,
           kind='number', field='threshold', higher_is_better=None, in_report=False),
    Metric('spro_05', 'sPRO 0.05', saturation.spro_05, _CHANNELS,
           f'{_LOCO}: the mean of structural and logical anomalies', field='mean', in_terminal=True),
    Metric('spro_05_structural', 'sPRO 0.05, structural', saturation.spro_05, _CHANNELS, _LOCO,
           field='structural'),
    Metric('spro_05_logical', 'sPRO 0.05, logical', saturation.spro_05, _CHANNELS, _LOCO, field='logical'),
    Metric('image_auroc_mean', 'image AUROC, both kinds', saturation.image_auroc, _KINDS,
           f'{_LOCO}: the mean of structural and logical anomalies', field='mean', in_terminal=True),
    Metric('image_auroc_structural', 'image AUROC, structural', saturation.image_auroc, _KINDS, _LOCO,
           field='structural'),
    Metric('image_auroc_logical', 'image AUROC, logical', saturation.image_auroc, _KINDS, _LOCO,
           field='logical'),
)}
