"""What `experiments.gpu_check` writes: a report that grows, the figures, and the table of what must show."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

REPORT, MEASURED, KERNELS = 'gpu_check.md', 'measured.json', 'kernels.md'


def measured(folder: Path) -> dict:
  """Reads what was measured so far: figures by name, and under 'begun' the parts that were begun."""
  path = folder / MEASURED
  return json.loads(path.read_text()) if path.exists() else {}


def keep(folder: Path, figures: Mapping[str, Any]) -> None:
  """Adds figures to those measured, all or none."""
  part = folder / f'.{MEASURED}'
  part.write_text(json.dumps(measured(folder) | figures, indent=1))
  part.replace(folder / MEASURED)


def say(folder: Path, *lines: str) -> None:
  """Prints lines, and adds them to the report."""
  with open(folder / REPORT, 'a') as f:
    for line in lines:
      print(line, flush=True)
      f.write(line + '\n')


class Goal(NamedTuple):
  """A row of the table of what must show (issue 18).

  Attributes:
    work, then, torch_then, to_reach: as the issue says them.
    name: `NAME/ours` and `NAME/torch` are its figures.
    unit: 's', where less is better, or 'images/s'.
    factor: factor by which ours must be better than torch's of the same run, or 0.
    at_most: figure that ours must not exceed, for figures without torch's, or 0.
  """

  work: str
  then: str
  torch_then: str
  to_reach: str
  name: str
  unit: str = 's'
  factor: float = 0.0
  at_most: float = 0.0


GOALS = (
    Goal('coreset 250,880 x 128 -> 25,088', '1.47 s', '5.14 s', "20 times torch's norm-a-step loop",
         'selection', factor=20),
    Goal('coreset 1,000,000 x 128 -> 100,000', '9.7 s', '-', '6 times less', 'selection_large',
         at_most=9.7 / 6),
    Goal('WRN-50 to layer3, 224, batch 64, tf32', '9,506', '6,519', "1.7 times torch's",
         'network_224_tensorfloat32', 'images/s', 1.7),
    Goal('the same, bf16', '3,022', '10,759', "1.5 times torch's", 'network_224_bfloat16', 'images/s', 1.5),
    Goal('WRN-50 to layer3, 448, batch 16, tf32', '2,343', '1,461', "1.7 times torch's",
         'network_448_tensorfloat32', 'images/s', 1.7),
    Goal('the same, bf16', '608', '2,678', "1.5 times torch's", 'network_448_bfloat16', 'images/s', 1.5),
    Goal('search 50,176 x 250,000 x 1024, rank 64, exact', '104 ms', '586 ms', 'a third of 104 ms', 'search',
         at_most=0.104 / 3),
    Goal('predict 224, batch 64, bank 16,384, tf32', '1,804', '1,850', "2.4 times torch's",
         'predict_224_tensorfloat32', 'images/s', 2.4),
    Goal('the same, bf16', '1,267', '2,084', "2.4 times torch's", 'predict_224_bfloat16', 'images/s', 2.4),
    Goal('the same, bf16, 8 batches in a row', '-', '2,084', "2.4 times torch's",
         'predict_224_bfloat16_row', 'images/s', 2.4),
    Goal('predict 448, batch 16, bank 16,384, tf32', '314 (float32)', '450', "2.4 times torch's",
         'predict_448_tensorfloat32', 'images/s', 2.4),
    Goal('the same, bf16', '-', '516', "2.4 times torch's", 'predict_448_bfloat16', 'images/s', 2.4),
    Goal('the same, bf16, 8 batches in a row', '-', '516', "2.4 times torch's",
         'predict_448_bfloat16_row', 'images/s', 2.4),
    Goal('launches of one batch of prediction', '5,210', '-', 'at most 300', 'launches', '', at_most=300),
    Goal('a resolution sweep of one category, to 768 px', 'not run', '-',
         "ends within the card's memory, time told before", 'resolution', at_most=float('inf')),
    Goal('`mvtec --config=configs/demo.py`, second time', 'not done in 105 s', '-', '30 s', 'demo',
         at_most=30),
)


def table(figures: Mapping) -> Iterator[str]:
  """Yields what must show, as Markdown, from the figures of a run."""
  yield '## What must show\n'
  yield f'{figures.get("machine", "No machine was reached.")}\n'
  yield '| work | ours then | PyTorch there | to reach | ours now | torch beside it | ratio | reached? |'
  yield '|---|---|---|---|---|---|---|---|'
  for goal in GOALS:
    ours, torch = (figures.get(f'{goal.name}/{side}') for side in ('ours', 'torch'))
    ratio = None
    if ours and torch:
      ratio = ours / torch if goal.unit == 'images/s' else torch / ours
    yield '| ' + ' | '.join((
        goal.work, goal.then, goal.torch_then, goal.to_reach, _figure(ours, goal.unit),
        _figure(torch, goal.unit), f'{ratio:.2f}' if ratio else '-',
        _reached(goal, ours, ratio, figures))) + ' |'
  yield ''


def _figure(value, unit):
  """Writes a figure in its unit; '-' for none."""
  if value is None:
    return '-'
  if unit == 's':
    return f'{value:.3g} s' if value >= 0.2 else f'{1000 * value:.3g} ms'
  return f'{value:,.0f}'


def _reached(goal, ours, ratio, figures):
  """Tells whether a goal is reached."""
  if ours is None:
    return 'not measured'
  if figures.get('small'):
    return 'only tried out'
  if goal.factor and ratio is None:
    return 'no torch'
  good = ratio >= goal.factor if goal.factor else ours <= goal.at_most
  return ('yes' if good else 'no') + figures.get(f'{goal.name}/but', '')
