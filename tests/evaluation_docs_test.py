"""docs/evaluation.md names every metric, protocol and rule as the code has them, and its commands parse."""

import doctest
import re
import shlex

import pytest

from experiments import compare
from patchcore_jax import metrics
from patchcore_jax.cli.evaluate import command as evaluate
from patchcore_jax.evaluation.protocols import PROTOCOLS
from patchcore_jax.metrics import thresholds
from tests.conftest import ROOT

PATH = ROOT / 'docs/evaluation.md'
TEXT = PATH.read_text(encoding='utf-8')
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r'```bash\n(.*?)```', TEXT, re.S) for line in block.splitlines()]


def table(*head):
  """Reads the table whose head begins so: {column: cell} of each row."""
  lines = TEXT.splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith(f'| {" | ".join(head)} |'))
  rows = []
  for line in lines[start:]:
    if not line.startswith('|'):
      break
    rows.append([cell.strip() for cell in line.strip('|').split('|')])
  head, ruler, *body = rows
  assert set(''.join(ruler)) == {'-'} and all(len(row) == len(head) for row in rows)
  return [dict(zip(head, row, strict=True)) for row in body]


def test_every_metric_has_a_row_under_its_title():
  rows = table('metric', 'column')
  assert [row['column'] for row in rows] == [f'`{name}`' for name in metrics.METRICS]
  assert [row['metric'] for row in rows] == [metric.title for metric in metrics.METRICS.values()]
  assert all(row['definition'] and row['source'] for row in rows)


def test_protocols_are_described_as_they_are():
  rows = {row['protocol'].strip('`'): row for row in table('protocol', 'size of maps')}
  assert tuple(rows) == tuple(PROTOCOLS)
  for name, protocol in PROTOCOLS.items():
    row = rows[name]
    assert row['size of maps'].startswith(
        'the original image' if protocol.original_size else "the network's input"), name
    assert row['anomalous is'] == ('by mask' if protocol.labels_of_masks else 'by folder'), name
    assert row['score of an image'].startswith(
        'maximum of the map' if protocol.maximum else "the method's"), name
    assert ('sPRO' in row['limits of AU-PRO']) == protocol.kinds, name


def test_rules_of_thresholds_are_all_there():
  assert [row['rule'].strip('`') for row in table('rule', 'threshold')] == list(thresholds.RULES)


def test_options_are_those_of_the_command():
  known = {name for parameter in evaluate.params for name in parameter.opts}
  others = {'--config', '--out', '--rule', '--subject'}  # of other commands
  assert set(re.findall(r'--[a-z][a-z-]+', TEXT)) <= known | others
  for name in re.findall(r'metrics\.protocol=(\w+)', TEXT):
    assert name in PROTOCOLS


@pytest.mark.parametrize('words', COMMANDS, ids=' '.join)
def test_commands_parse(words, capsys):
  if words[:2] == ['patchcore', 'evaluate']:
    with evaluate.make_context('evaluate', words[2:]) as context:
      assert context.params['metrics__protocol'] in PROTOCOLS
    return
  assert words[:3] == ['python', '-m', 'experiments.compare']
  with pytest.raises(SystemExit):
    compare.main(words[3:])
  assert 'runs/a is no finished run' in capsys.readouterr().err  # and no slip in the options


def test_examples_run():
  assert doctest.testfile(str(PATH), module_relative=False).attempted > 5
  assert not doctest.testfile(str(PATH), module_relative=False).failed
