"""The commands of the documents, and which tests run such ones.

`python -m tests.documented` lists those that no test runs.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from tests import conftest

DOCUMENTS = sorted(
    [conftest.ROOT / 'README.md', conftest.ROOT / 'CONTRIBUTING.md',
     *(conftest.ROOT / 'docs').glob('*.md'), *(conftest.ROOT / 'configs').rglob('*.py')])

# How a command begins -> the test that runs such a one, with images and banks of its own.
TESTS = {
    'patchcore backbones fetch': 'backbones_command_test',
    'patchcore backbones licence': 'backbones_command_test',
    'patchcore backbones list': 'backbones_command_test',
    'patchcore bank append': 'upkeep_test',
    'patchcore bank calibrate': 'upkeep_test',
    'patchcore bank drop': 'fit_test',
    'patchcore bank info': 'fit_test',
    'patchcore bank shrink': 'fit_test',
    'patchcore demo': 'wheel_test',
    'patchcore evaluate': 'evaluate_test',
    'patchcore export': 'export_test',
    'patchcore fit': 'fit_test',
    'patchcore predict': 'predict_test',
    'patchcore serve': 'serve_test',
    'patchcore submission': 'submission_test',
    'python -m experiments.compare': 'compare_test',
    'python -m experiments.figures': 'report_test',
    'python -m experiments.gpu_check': 'gpu_check_test',
    'python -m experiments.mvtec': 'end_to_end_test',
    'python -m experiments.parity': 'parity_test',
    'python -m experiments.precision': 'precision_test',
    'python -m experiments.prepare': 'prepare_test',
    'python -m experiments.pretrain': 'pretraining_test',
    'python -m experiments.sweep': 'sweep_test',
    'python -m experiments.tables': 'report_test',
    'python -m experiments.thresholds': 'thresholds_study_test',
}
# Those that no test runs, and why.
NOT_RUN = {
    'patchcore bank ...': 'stands for all of them',
    'python -m experiments.benchmark': 'measures for minutes; its parts: timing_test, one_pass_study_test',
    'python -m experiments.beside_anomalib': 'needs anomalib; its parts: beside_anomalib_test',
    'python -m experiments.load': 'puts a service under load for minutes',
}


def commands(path: Path) -> Iterator[str]:
  """Finds each `patchcore ...` and `python -m experiments...` of a page: in blocks to the end of the line."""

  text = path.read_text().replace('\\\n', ' ')
  blocks = re.findall(r'```bash\n(.*?)```', text, re.S)
  lines = [line.split('  #')[0] for block in blocks for line in block.splitlines()]
  spans = re.findall(r'`([^`]+)`', re.sub(r'```.*?```', '', text, flags=re.S))
  for line in (*lines, *(' '.join(span.split()) for span in spans)):
    if found := re.search(r'(?:^|\s)(patchcore [a-z]|python -m experiments\.)', line):
      yield line[found.start(1):].split('&&')[0]


def found() -> dict[str, str | None]:
  """Maps each command of the documents to the beginning by which it is known here; None where it is not."""
  known = sorted([*TESTS, *NOT_RUN], key=len, reverse=True)
  return {command: next((start for start in known if command.startswith(start)), None)
          for path in DOCUMENTS for command in commands(path)}


if __name__ == '__main__':
  for command, start in found().items():
    if start not in TESTS:
      print(f'{" ".join(command.split())}\n    not run: {NOT_RUN.get(start, "unknown")}')
