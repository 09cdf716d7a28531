"""What `experiments.precision` compares, on a data set of seconds."""

import csv

import numpy as np
import pytest

from experiments import precision, wiring
from patchcore_jax import backbones
from tests import plates


@pytest.fixture(scope='module')
def rows(pristine, tmp_path_factory):
  config = plates.config(
      pristine, data__categories=('bolt',), backbone__name='resnet18_slim.procedural', backbone__weights='',
      coreset__ratios=(0.2,))
  workdir = tmp_path_factory.mktemp('precision')
  found = precision.run(config, workdir)
  assert precision.run(config, workdir) == list(csv.DictReader((workdir / 'precision.csv').open()))
  return found


def test_a_row_for_every_precision_and_selection(rows):
  assert [(r['precision'], r['selection']) for r in rows] == [
      ('float32', 'its own'), ('float32', 'another seed'),
      ('tensorfloat32', "float32's"), ('tensorfloat32', 'its own'),
      ('bfloat16', "float32's"), ('bfloat16', 'its own')]
  assert {(r['network'], r['category'], float(r['coreset_ratio'])) for r in rows} == {
      ('resnet18_slim.procedural', 'bolt', 0.2)}


def test_the_defects_are_so_plain_that_nothing_changes(rows):
  assert float(rows[0]['image_auroc']) == 1
  for row in rows[2:]:
    assert abs(float(row['image_auroc'])) == 0 and abs(float(row['aupro'])) < 0.02


def test_scores_are_off_by_the_precision(rows):
  for i, (least, most) in ((2, (1e-6, 1e-2)), (4, (1e-5, 0.1))):
    assert least < float(rows[i]['scores_off']) <= float(rows[i]['most_off']) < most
  assert float(rows[2]['scores_off']) < float(rows[4]['scores_off'])


def test_networks_from_a_factory(pristine):
  settings = wiring.settings(plates.config(
      pristine, backbone__name='tests.small:backbone', backbone__weights='', backbone__layers=()))
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 24, 3), np.uint8)
  maps = {}
  for name in ('float32', 'tensorfloat32', 'bfloat16'):
    network = precision.network(settings, name)
    maps[name] = network.apply(
        network.variables, backbones.normalize(images, network.mean, network.std))['a']
  # It asks for the highest precision of its products, and a GPU would grant that.
  np.testing.assert_allclose(maps['tensorfloat32'], maps['float32'], rtol=0, atol=1e-6)
  assert 1e-3 < np.abs(maps['bfloat16'] - maps['float32']).max() < 0.1
