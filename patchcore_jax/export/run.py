"""Scores images with the program in this folder. Needs jax, flatbuffers, numpy and pillow, nothing else.

    python run.py IMAGE...                 prints a line for each image
    python run.py --maps=FOLDER IMAGE...   and writes its anomaly map, float32, as FOLDER/<number>_<name>.npy
"""

import argparse
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from jax import export
from PIL import Image, ImageOps


def load(folder):
  """Loads the program and its description.

  The program takes images as `read` gives them, [b, h, w, 3] uint8.
  """
  description = json.loads((folder / 'description.json').read_text())
  data = (folder / description['program']).read_bytes()
  if hashlib.sha256(data).hexdigest() != description['sha256']:
    raise SystemExit(f'{folder / description["program"]} was damaged or changed: copy the export again.')
  return jax.jit(export.deserialize(bytearray(data)).call), description


def read(path, description):
  """Reads one image as the program takes it, [h, w, 3] uint8."""
  image = ImageOps.exif_transpose(Image.open(path))
  if image.mode[0] in 'IF':
    raise SystemExit(f'{path} has more than 8 bits a channel: convert it to 8 bits first.')
  image = image.convert('RGB')
  if description['camera']:
    height, width = description['camera']
    if image.size != (width, height):
      raise SystemExit(f'{path} is {image.width} x {image.height} pixels, expected {width} x {height}.')
    return np.asarray(image)
  pixels = prepare(image, description['preprocess'])
  if list(pixels.shape) != description['input']['shape'][1:]:
    raise SystemExit(f'{path} is {pixels.shape} after preparation, expected {description["input"]["shape"]}.')
  return pixels


def prepare(image, sizes):
  """Resizes, pads and crops an image. All sizes are (height, width), or one number for both."""
  old = image.height, image.width
  if len(sizes['resize']) == 1:
    short, long, size = min(old), max(old), sizes['resize'][0]
    if sizes['resize_side'] == 'short':
      short, long = size, int(size * long / short)
    else:
      short, long = max(1, int(size * short / long)), size
    new = (short, long) if old[0] <= old[1] else (long, short)
  else:
    new = tuple(sizes['resize']) or old
  pixels = np.asarray(image if new == old else image.resize(new[::-1], Image.Resampling.BILINEAR))
  missing = [max(p - n, 0) for p, n in zip(_pair(sizes['pad'] or [0]), new)]
  pixels = np.pad(pixels, [*((m // 2, m - m // 2) for m in missing), (0, 0)], 'edge')
  if sizes['crop']:
    height, width = _pair(sizes['crop'])
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    pixels = pixels[max(top, 0):top + height, max(left, 0):left + width]
  return pixels


def _pair(size):
  """Converts a size that may be one number to (height, width)."""
  return tuple(size) if len(size) == 2 else (size[0], size[0])


def main():
  """Scores the images of the command line, and prints a line for each."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('images', nargs='+', type=Path)
  parser.add_argument('--maps', type=Path, help='folder for anomaly maps')
  arguments = parser.parse_args()
  program, description = load(Path(__file__).parent)
  if arguments.maps and 'anomaly_map' not in description['outputs']:
    raise SystemExit('This program scores whole images and makes no maps: leave out --maps.')
  # Batches of one size, so that the program is compiled once.
  size = min(len(arguments.images), description['images_at_once'])
  for begin in range(0, len(arguments.images), size):
    paths = arguments.images[begin:begin + size]
    batch = np.zeros((size, *description['input']['shape'][1:]), np.uint8)
    batch[:len(paths)] = [read(path, description) for path in paths]
    results = jax.device_get(program(batch))
    for i, path in enumerate(paths):
      answer = f'{results["image_score"][i]:.6g}'
      if 'anomalous' in results:
        answer += f' {results["calibrated_score"][i]:.3f}'
        answer += ' ANOMALOUS' if results['anomalous'][i] else ' good'
      print(f'{answer} {path}', flush=True)
      if arguments.maps:
        arguments.maps.mkdir(parents=True, exist_ok=True)
        np.save(arguments.maps / f'{begin + i}_{path.stem}.npy', results['anomaly_map'][i])


if __name__ == '__main__':
  main()
