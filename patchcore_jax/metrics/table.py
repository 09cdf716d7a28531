"""The table of all metrics: what results.csv, report.html and the printed tables show, one record a metric.

A new metric is a function in one of the modules beside this one and a record at the end of `METRICS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from patchcore_jax.metrics import ranking, regions, working_points

_IMAGES = ('labels', 'scores')
_PIXELS = ('pixels',)


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
      finite value in the unit of the scores, which is the only kind that changes with that unit: shares and
      counts depend on the order of scores alone.
    field: field of the function's result, where that is a record; '' where it is the value. Columns of the
      same function share one call.
    parameters: names of keyword arguments of `evaluate` that the function takes.
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
  parameters: tuple[str, ...] = ()
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
           'Heckler-Kram et al., "The MVTec AD 2 Dataset", 2025: AU-PRO up to a rate of 0.05'),
    Metric('pixel_ap', 'pixel AP', ranking.average_precision_of, _PIXELS,
           'scikit-learn, average_precision_score: steps in recall, not trapezoids', in_report=False),
    Metric('pixel_f1', 'best pixel F1', working_points.f1_optimal_of, _PIXELS,
           'Zou et al., "SPot-the-Difference", ECCV 2022: chosen on test labels, an upper bound', field='f1',
           in_report=False),
)}
