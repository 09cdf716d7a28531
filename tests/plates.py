"""A small data set of striped plates, and settings with which a run on it takes seconds."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from configs import wrn50

TIMINGS = ('fit_seconds', 'ms_per_image')


def draw(root: Path) -> None:
  """Two categories: 6 training images, 4 good ones and 4 defective ones to test."""
  rng = np.random.default_rng(0)
  for category in ('bolt', 'nut'):
    folder = root / category
    for i in range(6):
      _draw(folder / f'train/good/{i:03}.png', rng)
    for i in range(4):
      _draw(folder / f'test/good/{i:03}.png', rng)
      defect = ('spot', 'hole')[i % 2]
      mask = _draw(folder / f'test/{defect}/{i:03}.png', rng, defect)
      (folder / 'ground_truth' / defect).mkdir(parents=True, exist_ok=True)
      Image.fromarray(mask).save(folder / f'ground_truth/{defect}/{i:03}_mask.png')


def _draw(path, rng, defect=None):
  """A striped plate of 72 x 60 pixels; the defect is a bright square. Returns its mask."""
  x = np.arange(72)[None, :, None] + rng.integers(0, 8)
  pixels = 120 + 40 * np.sin(x / 3) + rng.normal(0, 4, (60, 72, 3))
  mask = np.zeros((60, 72), np.uint8)
  if defect:
    top, left = rng.integers(14, 38, 2)
    mask[top:top + 9, left:left + 9] = 255
    pixels[mask > 0] += {'spot': 90, 'hole': -90}[defect]
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
  return mask


def fields(data, overrides):
  """Names of fields are written with __ in place of the dot."""
  return {
      'data.root': str(data), 'data.batch_size': 4, 'data.num_workers': 0, 'preprocess.resize': (64,),
      'preprocess.crop': (56,), 'backbone.name': 'resnet18', 'backbone.weights': 'random',
      'backbone.layers': ('layer1', 'layer2'), 'embedding.kind': 'mean',
      'coreset.ratios': (0.2, 0.05), 'coreset.projection_dim': 16,
  } | {k.replace('__', '.'): v for k, v in overrides.items()}


def config(data, **overrides):
  result = wrn50.get_config()
  result.update_from_flattened_dict(fields(data, overrides))
  return result


def results(workdir):
  with open(workdir / 'results.csv', newline='') as f:
    rows = list(csv.DictReader(f))
  return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]
