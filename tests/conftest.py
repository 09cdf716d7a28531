"""Fixtures. Reference arrays of the originals lie beside the project, in ../shared, and may be absent."""

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
