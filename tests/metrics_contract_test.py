"""What holds for every metric of the table, and for one that a user adds with a function and a line."""

import dataclasses
import io
import re

import numpy as np
import pytest
from rich.console import Console

from configs import demo
from experiments import wiring
from patchcore_jax import metrics
from patchcore_jax.evaluation import page as run_page
from patchcore_jax.metrics import checks, curve, saturation, segmentation
from patchcore_jax.report import results, runs

MAX_FPR, CONNECTIVITY, BOUNDS = 0.2, 4, (0.02, 0.2)  # not the defaults: they must arrive
# Not defined for good images that all have one score, or scores with too few differences.
NEEDS_SPREAD = ('aupimo', 'aupimo_nearest')


def purity_of_highest(labels, scores):
  """Computes the share of anomalous images among those of the highest score."""
  positive, scores = checks.of_both_classes(labels, scores)
  return float(positive[scores == scores.max()].mean())


TOY = metrics.Metric('purity', 'purity of the highest', purity_of_highest, ('labels', 'scores'), 'this test',
                     in_terminal=True)

ALL = (*metrics.METRICS.values(), TOY)


@pytest.fixture(autouse=True)
def with_toy(monkeypatch):
  monkeypatch.setitem(metrics.METRICS, TOY.name, TOY)


@pytest.fixture(params=ALL, ids=lambda metric: metric.name)
def metric(request):
  return request.param


def made(seed=0, levels=8, n=12, size=10):
  """A category whose scores are multiples of 1 / levels: ties, and the same in every floating type."""
  rng = np.random.default_rng(seed)
  masks = np.zeros((n, size, size), bool)
  for mask in masks[n // 2:]:
    top, left = rng.integers(0, size - 3, 2)
    mask[top:top + 3, left:left + 2] = mask[top + 3, left + 2] = True  # which touch at a corner
  maps = np.round((rng.random(masks.shape) + 0.4 * masks) * levels) / levels
  labels = masks.any((1, 2))
  scores = np.round((rng.random(n) + 0.4 * labels) * levels) / levels
  anomalies = np.where(np.arange(n) % 2, saturation.LOGICAL, saturation.STRUCTURAL)
  kinds = np.where(labels, anomalies, saturation.GOOD)
  return {
      'labels': labels, 'scores': scores, 'masks': masks, 'maps': maps,
      'validation': 0.05 * rng.random((4, size, size)), 'kinds': kinds,
      'channels': np.where(masks, 7, 0)[:, None]}


EVALUATED = {}


def evaluate(arrays):
  """Measures all metrics of the table, once for the same arrays, which each metric has tests of."""
  key = tuple((name, None if array is None else (array.dtype.str, array.shape, array.tobytes()))
              for name, array in arrays.items())
  if key not in EVALUATED:
    EVALUATED[key] = metrics.evaluate(
        **of_kinds(arrays), max_fpr=MAX_FPR, connectivity=CONNECTIVITY, bounds=BOUNDS)
  return dict(EVALUATED[key])


def of_kinds(arrays):
  """Has channels of anomalous images only, as their folders have."""
  channels = [channels if kind != saturation.GOOD else ()
              for kind, channels in zip(arrays['kinds'], arrays['channels'])]
  return arrays | {'channels': channels, 'config': {7: saturation.Defect('hole', 7, 0.5, True)}}


def call(metric, arrays):
  inputs = of_kinds(arrays)
  if 'pixels' in metric.needs:
    inputs['pixels'] = curve.of_regions(arrays['maps'], arrays['masks'], connectivity=CONNECTIVITY)
  settings = {'max_fpr': MAX_FPR, 'bounds': BOUNDS}
  return metric.function(*(inputs[n] for n in metric.needs), **{n: settings[n] for n in metric.parameters})


def rescored(arrays, function):
  return arrays | {name: function(arrays[name]) for name in ('scores', 'maps')}


def reordered(arrays, order):
  """The images in another order; those of validation are others."""
  return {name: array if name == 'validation' else array[order] for name, array in arrays.items()}


def separated(sign):
  """Every anomalous image and pixel above every good one, or below."""
  arrays = made()
  return arrays | {'scores': sign * 1.0 * arrays['labels'], 'maps': sign * 1.0 * arrays['masks']}


def assert_in_range(metric, value, spread=True):
  if value is None and metric.name in NEEDS_SPREAD and not spread:
    return
  if metric.kind == 'count':
    assert type(value) is int and value >= 0
  else:
    assert type(value) is float and np.isfinite(value)  # plain, as JSON wants it
    assert metric.kind == 'number' or 0 <= value <= 1


class TestRecords:

  def test_say_what_they_are(self, metric):
    assert metric.name.isidentifier() and metrics.METRICS[metric.name] is metric
    assert metric.title and metric.source and metric.function.__doc__
    assert metric.kind in ('percent', 'count', 'number')
    assert set(metric.needs) <= {*made(), 'pixels', 'config'}
    with pytest.raises(dataclasses.FrozenInstanceError):
      metric.name = 'other'

  def test_names_and_titles_are_unique(self):
    for key in ('name', 'title'):
      assert len({getattr(m, key) for m in metrics.METRICS.values()}) == len(metrics.METRICS)


class TestValues:

  @pytest.mark.parametrize('levels', [1, 8, 1000])
  def test_range(self, metric, levels):
    for seed in range(10):
      assert_in_range(metric, evaluate(made(seed, levels))[metric.name], spread=levels > 8)
    for sign in (-1, 0, 1):
      assert_in_range(metric, evaluate(separated(sign))[metric.name], spread=False)

  def test_evaluate_gives_what_the_function_gives(self, metric):
    value = call(metric, made(levels=1000))
    value = getattr(value, metric.field) if metric.field else value
    assert evaluate(made(levels=1000))[metric.name] == value
    assert list(evaluate(made())) == list(metrics.METRICS)

  # AUPIMO by the authors' rule is not: its bounds are where the nearest thresholds lie.
  @pytest.mark.parametrize('metric', [
      m for m in ALL if m.higher_is_better is not None and m.name != 'aupimo_nearest'], ids=lambda m: m.name)
  def test_is_best_for_perfect_scores(self, metric):
    arrays = made(levels=1000)
    perfect, inverted = (
        evaluate(arrays | {'scores': arrays['scores'] + sign * 9 * arrays['labels'],
                           'maps': arrays['maps'] / 20 + sign * 9 * arrays['masks']})[metric.name]
        for sign in (1, -1))
    assert perfect == metric.higher_is_better  # all right is 1, nothing wrong is 0
    assert perfect > inverted if metric.higher_is_better else perfect <= inverted

  @pytest.mark.parametrize('levels', [1, 8, 1000])
  def test_order_of_images_changes_nothing(self, metric, levels):
    arrays = made(levels=levels)
    expected = evaluate(arrays)[metric.name]
    for seed in range(3):
      order = np.random.default_rng(seed).permutation(len(arrays['labels']))
      value = evaluate(reordered(arrays, order))[metric.name]
      # Means over regions are float64 sums, and their order differs.
      assert value is expected is None or value == pytest.approx(expected, rel=0, abs=1e-12)

  @pytest.mark.parametrize(
      'metric', [m for m in ALL if m.of_order and m.kind != 'number'], ids=lambda m: m.name)
  @pytest.mark.parametrize('transform', [np.exp, np.cbrt, lambda s: 4 * s - 7])
  def test_only_the_order_of_scores_counts(self, metric, transform):
    assert evaluate(rescored(made(), transform))[metric.name] == evaluate(made())[metric.name]

  def test_scores_that_are_all_equal(self, metric):
    constant = rescored(made(), np.zeros_like)
    value = evaluate(constant)[metric.name]
    assert_in_range(metric, value, spread=False)
    assert evaluate(reordered(constant, slice(None, None, -1)))[metric.name] == value

  @pytest.mark.parametrize('dtype', [np.float16, np.float32, np.int32, np.uint8])
  def test_type_of_numbers_changes_nothing(self, metric, dtype):
    whole = rescored(made(), lambda s: 8 * s)  # integers; unsigned ones must not wrap around
    assert evaluate(rescored(whole, lambda s: s.astype(dtype)))[metric.name] == evaluate(whole)[metric.name]
    as_numbers = whole | {name: whole[name].astype(np.uint8) for name in ('labels', 'masks')}
    assert evaluate(as_numbers)[metric.name] == evaluate(whole)[metric.name]

  def test_input_is_left_as_it_was(self, metric):
    arrays = made(levels=1000)
    for array in arrays.values():
      array.setflags(write=False)
    call(metric, arrays)


class TestWithoutAValue:

  @pytest.mark.parametrize('only', [0, 1])
  def test_one_class(self, metric, only):
    arrays = made()
    arrays |= {name: np.full_like(arrays[name], only) for name in ('labels', 'masks')}
    arrays['kinds'][:] = saturation.STRUCTURAL if only else saturation.GOOD
    arrays['channels'] = np.where(arrays['masks'], 7, 0)[:, None]
    if only and metric.function is segmentation.beyond_validation:
      return  # F1 needs no good ones
    assert evaluate(arrays)[metric.name] is None
    try:
      assert getattr(call(metric, arrays), metric.field) is None
    except checks.NotDefined as e:
      assert 'Expected' in str(e) or 'expected' in str(e)

  def test_without_masks(self, metric):
    value = evaluate(made() | {'masks': None})[metric.name]
    assert (value is None) == bool({'masks', 'pixels', 'maps'} & set(metric.needs))

  @pytest.mark.parametrize('names, damage, words', [
      (('scores', 'maps'), lambda a: np.full_like(a, np.nan), 'expected finite values'),
      (('scores', 'maps'), lambda a: np.full_like(a, np.inf), 'expected finite values'),
      (('labels', 'masks'), lambda a: 255 * a.astype(int), 'expected 0 .* and 1'),
      (('scores', 'maps'), lambda a: a[:-1], 'differ in shape|for each of|same length'),
      (('labels', 'scores', 'masks', 'maps', 'kinds', 'channels'), lambda a: a[:0], 'at least one')])
  def test_bad_input_is_refused(self, metric, names, damage, words):
    bad = made()
    bad |= {name: damage(bad[name]) for name in names}
    with pytest.raises(ValueError, match=words):
      evaluate(bad)
    if set(names) & {*metric.needs, *(('masks', 'maps') if 'pixels' in metric.needs else ())}:
      with pytest.raises(ValueError, match=words):
        call(metric, bad)


class TestWhereItIsShown:

  def _row(self, **changes):
    fields = {'category': 'nut', 'coreset_ratio': 0.1} | dict.fromkeys(results.COUNTS, 1)
    # Scores of few levels leave AUPIMO undefined, and the report a column out that is empty everywhere.
    return fields | evaluate(made(levels=1000)) | dict.fromkeys(results.TIMINGS, 0.5) | changes

  def test_text(self, metric):
    assert metric.text(None) == '-'
    assert metric.text(1) == {'percent': '100.0', 'count': '1', 'number': '1'}[metric.kind]
    assert metric.is_averaged == (metric.kind == 'percent')

  def test_results_csv(self, metric, tmp_path):
    rows = [self._row(), self._row(category='bolt', **{metric.name: None})]
    results.write_csv(tmp_path / 'results.csv', rows)
    assert metric.name in (tmp_path / 'results.csv').read_text().splitlines()[0].split(',')
    read = results.read_csv(tmp_path / 'results.csv')
    assert read == rows and type(read[0][metric.name]) is type(rows[0][metric.name])

  def test_report(self, metric, tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(run_page.page, 'write', lambda path, page: pages.append(page))
    run_page.write(tmp_path, wiring.settings(demo.get_config()), [self._row(), self._row(category='bolt')])
    (page,) = pages
    headings = [column.heading for column in page.columns]
    assert (metric.heading in headings) == metric.in_report
    if metric.in_report:
      at, value = headings.index(metric.heading), self._row()[metric.name]
      assert page.columns[at].kind == metric.kind
      assert [row[at] for row in page.rows] == [value, value]
      assert page.totals[0][at] == (pytest.approx(value) if metric.is_averaged else None)

  @pytest.mark.parametrize('in_terminal', [False, True])
  def test_printed_table(self, metric, in_terminal, monkeypatch):
    monkeypatch.setitem(
        metrics.METRICS, metric.name, dataclasses.replace(metric, in_terminal=in_terminal))
    out = io.StringIO()
    results.print_table([self._row(**{metric.name: 0.125})], console=Console(file=out, width=200))
    lines = [[cell.strip() for cell in re.split('[┃│]', line)] for line in out.getvalue().splitlines()]
    headings, row, mean = (next(line for line in lines if k in line) for k in ('category', 'nut', 'mean'))
    assert (metric.title in headings) == in_terminal
    if in_terminal:
      at = headings.index(metric.title)
      assert row[at] == metric.text(0.125)
      assert mean[at] == (row[at] if metric.is_averaged else '')

  def test_runs(self, metric, tmp_path):
    config = demo.get_config()
    results.write_csv(tmp_path / 'results.csv', [self._row()])
    (tmp_path / 'config.json').write_text(config.to_json_best_effort())
    (measured,) = runs.find(tmp_path)
    assert measured.values[metric.name] == {'nut': self._row()[metric.name]}
