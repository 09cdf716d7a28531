"""The table of what is read says what the code does."""

import re

import pytest

from patchcore_jax.data import image_contents, image_files
from patchcore_jax.evaluation import mask_checks
from patchcore_jax.settings import DataSpec, Preprocessing
from tests import command
from tests.conftest import ROOT

TEXT = (ROOT / 'docs/what_is_read.md').read_text(encoding='utf-8')


def test_names_and_formats():
  row = next(line for line in TEXT.splitlines() if line.startswith('| names | `.png`'))
  assert tuple(re.findall(r'`(\.\w+)`', row.split('|')[2])) == image_files.IMAGE_SUFFIXES
  row = next(line for line in TEXT.splitlines() if line.startswith('| content |')).upper()
  # A DIB is a BMP without its head.
  assert all(name in row for name in image_contents.FORMATS if name != 'DIB')


def test_limits_and_defaults():
  assert f'up to {DataSpec.max_megapixels:g} megapixels' in TEXT
  assert Preprocessing.background == (255, 255, 255) and "`--background` (white)" in TEXT


@pytest.mark.parametrize('flag', sorted(set(re.findall(r'`(--[a-z-]+)', TEXT))))
def test_flags_exist(flag):
  commands = ('fit', 'predict', 'evaluate', 'serve')
  assert any(flag in command.done(name, '--help') for name in commands)


@pytest.mark.parametrize('name', ['i.O.', 'OK', 'Normal', 'pass', 'defect-free'])
def test_names_of_good_parts(name):
  assert image_files.is_good(name) and name.lower() in TEXT.lower()


def test_kinds_of_odd_masks():
  row = next(line for line in TEXT.splitlines() if line.startswith('| odd ones |'))
  assert row.count(';') + 1 == len(mask_checks.ORDER)
