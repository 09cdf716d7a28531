"""The benchmark of own images: fits as `patchcore fit` does, tests, and tells medians and ranges."""

import numpy as np
import pytest
from PIL import Image

from experiments import own_images
from experiments.own_images import Found


def _write(folder, n, spot=False, seed=0):
  folder.mkdir(parents=True)
  rng = np.random.default_rng(seed)
  for i in range(n):
    pixels = rng.integers(100, 120, (64, 64, 3)).astype(np.uint8)
    if spot:
      pixels[20:40, 20:40] = (255, 0, 0)
    Image.fromarray(pixels).save(folder / f'{i}.png')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('own')
  _write(root / 'plate/train/good', 6)
  _write(root / 'plate/test/good', 3, seed=1)
  _write(root / 'plate/test/spot', 2, spot=True, seed=2)
  return root


def test_a_part_is_fitted_and_tested(root):
  found = own_images.fit_and_test(str(root), 'plate', 'resnet18_slim.procedural', 0)
  assert (found.num_good, found.num_defective, found.found, found.image_auroc) == (3, 2, 2, 1)
  assert 0 < found.fit_seconds < 300 and found.peak_gb > 0.1 and found.images_per_second > 0


def test_a_test_takes_both_kinds(root, tmp_path):
  _write(tmp_path / 'nut/train/good', 2)
  _write(tmp_path / 'nut/test/good', 1)
  with pytest.raises(ValueError, match='good and defective'):
    own_images.fit_and_test(str(tmp_path), 'nut', 'resnet18_slim.procedural', 0)


def test_every_network_and_seed_is_run_and_medians_are_told():
  asked = []

  def run(root, category, network, seed, *, cache):
    asked.append((root, category, network, seed))
    return Found(10.0 + seed, 1.5, 20, 0.9 + 0.01 * seed, seed, 60, 30 + seed, 40)

  lines = list(own_images.measure('data', 'nut', ('a', 'b'), 3, run=run))
  assert asked == [('data', 'nut', network, seed) for network in 'ab' for seed in range(3)]
  assert lines[3] == (
      '| b | 11 (10 to 12) s | 1.5 (1.5 to 1.5) GB | 20 (20 to 20) | 91.0 (90.0 to 92.0) | '
      '1 (0 to 2) of 60 | 31 (30 to 32) of 40 |')


def test_without_a_folder_the_built_in_part_is_drawn(monkeypatch):
  drawn = []
  monkeypatch.setattr(
      own_images.synthetic, 'prepare', lambda root, categories: drawn.append(categories) or root)
  list(own_images.measure('', 'gear', (), 1))
  assert drawn == [('gear',)]
