"""Gray images for a model of coloured ones, and coloured for gray: told at every door."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import patchcore_jax as pc
from patchcore_jax.inspection import image_sizes
from tests import command, small
from tests.serve_test import ask, running


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Makes ten coloured parts, the same in gray, and both together."""
  root = tmp_path_factory.mktemp('parts')
  for name in ('coloured', 'gray', 'both'):
    (root / name).mkdir()
  for i, pixels in enumerate(small.images(10)):
    image = Image.fromarray(pixels)
    image.save(root / f'coloured/{i}.png')
    # Three bands that are the same: as gray as one.
    image.convert('L').convert('RGB' if i % 2 else 'L').save(root / f'gray/{i}.png')
    shutil.copy(root / f'{"gray" if i < 3 else "coloured"}/{i}.png', root / f'both/{i}.png')
  return root


@pytest.fixture(scope='module')
def banks(folder):
  """Fits a bank of each folder, and keeps what was printed."""
  said = {}
  for name in ('coloured', 'gray', 'both'):
    said[name] = command.done(
        'fit', folder / name, '--out', folder / f'bank_{name}', '--backbone', 'tests.small:backbone',
        '--ratio', 0.5, '--resize', '32,24')
  return said


def test_a_model_knows_which_its_images_are(folder, banks):
  for name, said in banks.items():
    assert pc.load(folder / f'bank_{name}').model.description.colours == name
    assert ('Some training images are gray, and some have colours' in said) == (name == 'both')


@pytest.mark.parametrize('of, to, note', [
    ('gray', 'coloured', image_sizes.GRAY), ('coloured', 'gray', image_sizes.COLOURED),
    ('gray', 'gray', ''), ('coloured', 'coloured', ''), ('gray', 'both', ''), ('coloured', 'both', '')])
def test_the_other_kind_is_told(folder, banks, of, to, note):
  inspector = pc.load(folder / f'bank_{to}')
  assert {finding.note for finding in inspector.inspect(folder / of)} == {note}
  out = folder / f'run_{of}_{to}'
  said = command.run('predict', folder / f'bank_{to}', folder / of, '--out', out)
  assert said.code == 0
  notes = [json.loads(line)['note'] for line in (out / 'predictions.jsonl').read_text().splitlines()]
  assert notes == [note] * 10
  for text in (image_sizes.GRAY, image_sizes.COLOURED):
    assert (said.out + said.err).count(text) == (text == note)  # once, not for each


def test_the_service_tells_it(folder, banks):
  body = io.BytesIO()
  Image.open(folder / 'gray/0.png').save(body, 'PNG')
  with running(pc.load(folder / 'bank_coloured')) as address:
    assert ask(address, body=body.getvalue())[2]['note'] == image_sizes.GRAY


def test_an_evaluation_tells_it(folder, tmp_path):
  for part, kind in (('train/good', 'coloured'), ('test/good', 'coloured'), ('test/spot', 'gray')):
    shutil.copytree(folder / kind, tmp_path / 'data/part' / part)
  for i in range(0, 10):  # gray files of three bands cannot be told by their headers
    image = tmp_path / f'data/part/test/spot/{i}.png'
    Image.open(image).convert('L').save(image)
  said = command.done(
      'evaluate', tmp_path / 'data', '--out', tmp_path / 'run', '--backbone', 'tests.small:backbone',
      '--ratio', 0.5, '--resize', '32,24', '--crop', 'none')
  assert '10 of 20 test images are gray files, and all training images have colours' in said


def test_append_says_when_kinds_are_mixed(folder, banks):
  said = command.done(
      'bank', 'append', folder / 'bank_coloured', folder / 'gray', '--out', folder / 'mixed',
      '--accept', 'all')
  assert 'All images of the bank were coloured, and now there are gray and coloured ones' in said


def test_banks_that_were_changed_know_it_too(folder, banks):
  coloured, gray = (pc.load(folder / f'bank_{name}') for name in ('coloured', 'gray'))
  assert coloured.append(folder / 'gray', accept='all').model.description.colours == 'both'
  assert gray.append(folder / 'gray', accept='all').model.description.colours == 'gray'
  assert pc.fit(small.images(6), backbone='tests.small:backbone').model.description.colours == 'coloured'
  assert not np.ptp(np.asarray(Image.open(folder / 'gray/1.png')), axis=-1).any()
