"""What the documents say can be done."""

import re
import subprocess
import sys
import time

import pytest

from configs import default
from patchcore_jax import cli
from patchcore_jax.banks.model import flat
from tests import conftest, documented


@pytest.mark.parametrize('path', documented.DOCUMENTS, ids=lambda p: p.name)
def test_named_files_fields_and_links_exist(path):
  text = path.read_text()
  for config in re.findall(r'--config=(\S+?\.py)', text):
    assert (conftest.ROOT / config).is_file(), config
  fields = flat(default.get_config().to_dict())
  for field in re.findall(r'--config\.([\w.]+)=', text):
    assert field in fields, field
  for module in re.findall(r'-m (experiments\.\w+)', text):
    assert (conftest.ROOT / module.replace('.', '/')).with_suffix('.py').is_file(), module
  if path.suffix == '.md':
    for link in re.findall(r'\]\((?!https?:)([^)#]+)\)', text):
      assert (path.parent / link).exists(), link


def test_first_two_commands_are_whole():
  block = re.search(r'```bash\n(.*?)```', (conftest.ROOT / 'README.md').read_text(), re.S)[1]
  run, test = [line for line in block.splitlines() if line and not line.startswith('#')]
  for command in (run, test):
    assert command.startswith('python3 -m venv .venv && .venv/bin/pip install -e ')
  assert test.endswith("'.[test]' && .venv/bin/python -m pytest -n 2 --dist loadfile")
  ci = (conftest.ROOT / '.ci' / 'run').read_text()
  assert "-e '.[test]'" in ci and '-m pytest -n 2 --dist loadfile\n' in ci


@pytest.mark.slow
def test_the_first_command_ends_within_four_minutes(tmp_path):
  text = (conftest.ROOT / 'README.md').read_text()
  arguments = re.search(r'\.venv/bin/python (-m experiments\.mvtec .*)', text)[1].split()
  arguments[-1] = f'--workdir={tmp_path / "run"}'
  arguments.append(f'--config.data.root={tmp_path / "drawn"}')
  start = time.monotonic()
  result = subprocess.run(
      [sys.executable, *arguments], cwd=conftest.ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert 'mean' in result.stdout and time.monotonic() - start < 240


def test_messages_of_the_troubleshooting_page_are_those_of_the_package():
  said = ' '.join(re.sub(r"'\s*\n\s*f?'|\"\s*\n\s*f?\"|'\s*\n\s*f?\"|\"\s*\n\s*f?'", '', path.read_text())
                  for path in (conftest.ROOT / 'patchcore_jax').rglob('*.py'))
  messages = re.findall(r'\*\*`(.+?)`\*\*', (conftest.ROOT / 'docs' / 'troubleshooting.md').read_text())
  assert len(messages) > 20
  for message in messages:
    for part in message.split('...'):
      assert part.strip() in said, message


def _options(command):
  """The options that a command knows, and whether it is one of the package's."""
  words = command.split()
  if words[0] == 'patchcore':
    known = cli.command
    for word in words[1:]:
      found = known.get_command(None, word) if hasattr(known, 'get_command') else None
      if found is None:
        break
      known = found
    return {name for p in known.params for name in (*p.opts, *p.secondary_opts)}
  return _flags(words[2].replace('.', '/'), 'experiments/cli', 'experiments/wiring')


def _flags(*modules):
  """The flags that modules define."""
  source = ''.join((conftest.ROOT / f'{module}.py').read_text() for module in modules)
  return {f'--{name}' for name in re.findall(r"(?:DEFINE_\w+|add_argument)\(\s*'(?:--)?(\w+)'", source)}


@pytest.mark.parametrize('path', documented.DOCUMENTS, ids=lambda p: p.name)
def test_commands_have_the_options_that_they_are_given(path):
  for command in documented.commands(path):
    for option in re.findall(r'(?<=\s)--[A-Za-z][\w.-]*', command):
      assert option.startswith('--config.') or option in _options(command) | {'--help'}, command


def test_each_command_is_run_by_a_test_or_listed_as_not_run():
  found = documented.found()
  unknown = [command for command, start in found.items() if start is None]
  assert len(found) > 80 and not unknown
  assert documented.TESTS.keys() | documented.NOT_RUN.keys() == set(found.values())
  for start, name in documented.TESTS.items():
    assert start.split()[-1].split('.')[-1] in (conftest.ROOT / f'tests/{name}.py').read_text(), start
