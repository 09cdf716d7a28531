"""Fixtures. Reference arrays of the originals lie beside the project, in ../shared, and may be absent."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'


def _folder(path):
  if not path.is_dir():
    pytest.skip(f'REFERENCE DATA ABSENT: {path}; this check did not run')
  return path


@pytest.fixture(scope='session')
def golden():
  """Folder of reference arrays made by running the PyTorch originals."""
  return _folder(SHARED / 'golden')


@pytest.fixture(scope='session')
def realdata():
  """Folder of real MVTec AD categories and a real pretrained backbone."""
  return _folder(SHARED / 'realdata')


@pytest.fixture(scope='session')
def golden_module(golden):
  """Imports recipe.py or inputs.py from the golden folder."""

  def load(name):
    spec = importlib.util.spec_from_file_location(f'golden_{name}', golden / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

  return load
