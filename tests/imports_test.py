"""The house is parted: imports run one way, and settings can be read without JAX."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

# A room may import from those before it, and from itself.
ROOMS = (
    'settings', 'extras', 'atomic_files', 'disk_arrays', 'parallel', 'processes', 'data', 'backbones',
    'search', 'outliers', 'whitening', 'embedding', 'rotation', 'foreground', 'windows', 'morphology',
    'scoring', 'metrics', 'banks', 'learned', 'builtin', 'detectors', 'inspection', 'report', 'export',
    'serving', 'evaluation', 'cli', '__main__')

# Seconds to import, for what few commands do.
RARE = 'sklearn scipy.ndimage grain matplotlib optax tensorflow_datasets starlette torch'


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
  rooms = {p.stem for p in package.iterdir() if p.suffix in ('', '.py')} - {'__init__', '__pycache__'}
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


@pytest.mark.parametrize('statement, without', [
    ('import patchcore_jax', 'numpy jax click'),
    ('from patchcore_jax.cli import main; main(["--help"])', 'numpy jax'),
    ('from patchcore_jax.cli import main; main(["ft"])', 'numpy jax'),
    ('from patchcore_jax import inspection, metrics', RARE),
    ('from patchcore_jax.report import prediction_run', RARE),
    ('from patchcore_jax.evaluation import experiment', RARE),
])
def test_nothing_is_imported_before_it_is_needed(statement, without):
  script = f"""
import atexit, sys
atexit.register(lambda: print(sorted({set(without.split())} & set(sys.modules))))
{statement}
"""
  found = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
  assert 'Traceback' not in found.stderr
  assert found.stdout.splitlines()[-1] == '[]'


def test_binaries_can_be_imported_together_and_change_nothing():
  names = sorted(path.stem for path in (ROOT / 'experiments').glob('*.py'))
  script = f"""
import importlib, os
import threadpoolctl  # scikit-learn's, which sets a variable of its own
before = dict(os.environ)
for name in {names}:
  importlib.import_module('experiments.' + name)  # two binaries with a flag of one name end this
print(sorted(set(os.environ.items()) ^ set(before.items())))
"""
  found = subprocess.run(
      [sys.executable, '-c', script], check=True, capture_output=True, text=True, cwd=ROOT).stdout
  assert found.splitlines()[-1] == '[]'


def test_the_base_install_is_light():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  todo, asked, found = [(text, '') for text in project['dependencies']], set(), {}
  while todo:
    text, extra = asking = todo.pop()
    requirement = Requirement(text)
    if asking in asked or requirement.marker and not requirement.marker.evaluate({'extra': extra}):
      continue
    asked.add(asking)
    distribution = importlib.metadata.distribution(requirement.name)
    found[canonicalize_name(distribution.name)] = distribution
    todo += [(text, extra) for text in distribution.requires or () for extra in ('', *requirement.extras)]
  files = (file.locate() for distribution in found.values() for file in distribution.files)
  assert len(found) + 1 <= 60
  assert sum(path.stat().st_size for path in files if path.exists()) < 900e6
