"""The house is parted: imports run one way, and settings can be read without JAX."""

import ast
import subprocess
import sys

from tests.conftest import ROOT

# A room may import from those before it, and from itself.
ROOMS = (
    'settings', 'extras', 'atomic_files', 'disk_arrays', 'parallel', 'processes', 'data', 'backbones',
    'search', 'embedding', 'scoring', 'metrics', 'banks', 'builtin', 'detectors', 'inspection', 'report',
    'export', 'serving', 'evaluation', 'cli', '__main__')


def _imports(path):
  """Rooms of the package that a file imports from."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      package, _, rest = node.module.partition('.')
      if package == 'patchcore_jax' and (rest or {a.name for a in node.names} != {'__version__'}):
        yield from [rest.split('.')[0]] if rest else [alias.name for alias in node.names]
      assert package not in ('experiments', 'configs', 'tests'), f'{path} imports from {node.module}'


def test_imports_run_one_way():
  package = ROOT / 'patchcore_jax'
  rooms = {p.stem if p.suffix else p.name for p in package.iterdir()} - {'__init__', '__pycache__'}
  assert rooms == set(ROOMS)
  wrong = [
      f'{path.relative_to(package)} imports {room}'
      for path in package.rglob('*.py')
      for own in [path.relative_to(package).parts[0].removesuffix('.py')] if own != '__init__'
      for room in _imports(path) if ROOMS.index(room) > ROOMS.index(own)]
  assert not wrong


def test_settings_need_no_jax():
  script = (
      'import sys, patchcore_jax.settings, patchcore_jax.detectors, patchcore_jax.banks.model\n'
      'print(sorted({"jax", "jaxlib", "flax", "orbax", "sklearn", "grain"} & set(sys.modules)))')
  found = subprocess.run(
      [sys.executable, '-c', script], check=True, capture_output=True, text=True, cwd=ROOT).stdout
  assert found.strip() == '[]'
