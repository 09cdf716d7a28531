"""Scores images with the program in this folder. Needs jax, flatbuffers, numpy and pillow, nothing else.

    python run.py IMAGE...                 prints a line for each image
    python run.py --maps=FOLDER IMAGE...   and writes its anomaly map, float32, as FOLDER/<number>_<name>.npy

Images are gray or RGB with 8 bits a value, or gray with more where the model was made of such files. What is
transparent gets the colour that it had when it was made. Other files - several pages, more bands, colours of
16 bits - are refused by name. Exit code: 0 if every image was scored, 2 if some could not be, 1 if none.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export
from PIL import Image, ImageOps

MOST_PIXELS = 250_000_000
FORMATS = ('PNG', 'JPEG', 'BMP', 'DIB', 'TIFF', 'WEBP', 'GIF', 'PPM')


def load(folder):
  """Loads the program and its description.

  The program takes images as `read` gives them, [b, h, w, 3] uint8.
  """
  try:
    description = json.loads((folder / 'description.json').read_text())
    data = (folder / description['program']).read_bytes()
  except (OSError, ValueError, KeyError) as e:
    raise SystemExit(f'error: {folder} is no complete export ({e}): copy it again.') from e
  if hashlib.sha256(data).hexdigest() != description['sha256']:
    raise SystemExit(
        f'error: {folder / description["program"]} was damaged or changed: copy the export again.')
  return jax.jit(export.deserialize(bytearray(data)).call), description


def read(path, description, most_pixels=MOST_PIXELS):
  """Reads one image as the program takes it.

  Returns:
    [h, w, 3] uint8, the share of its pixels whose value lies outside of the range that is black to white, and
    the share that a crop leaves out.

  Raises:
    ValueError: the file cannot be used; the message names it.
  """
  try:
    with Image.open(path, formats=FORMATS) as file:
      if file.width * file.height > most_pixels:
        raise _Refused(
            f'{path} is refused: it is {file.width} x {file.height} pixels, '
            f'{file.width * file.height / 1e6:.4g} megapixels; allowed are {most_pixels / 1e6:g}. Make it '
            'smaller, cut it into pieces, or raise the limit (--max-megapixels).')
      sizes = description['preprocess']
      if problem := _problem(file, path, sizes):
        raise _Refused(f'{path} {problem}')
      file.load()
      image, outside = _to_rgb(ImageOps.exif_transpose(file), sizes)
    if description['camera']:
      height, width = description['camera']
      if image.size != (width, height):
        raise _Refused(f'{path} is {image.width} x {image.height} pixels, expected {width} x {height}.')
      return np.asarray(image), outside, left_out(image, sizes)
    pixels = prepare(image, sizes)
  except _Refused:
    raise
  except Exception as e:  # what decoders raise on broken files is not known
    raise _Refused(f'{path} cannot be read: {e or type(e).__name__}') from e
  if list(pixels.shape) != description['input']['shape'][1:]:
    raise _Refused(f'{path} is {pixels.shape} after preparation, expected {description["input"]["shape"]}.')
  return pixels, outside, left_out(image, sizes)


class _Refused(ValueError):
  """A file that is not scored; the message says why."""


def _problem(file, path, sizes):
  """Says why a file is not read here; '' where it is."""
  if getattr(file, 'n_frames', 1) > 1:
    return f'has {file.n_frames} pages: write each as a file of its own.'
  bands, bits = len(file.getbands()), 8
  if file.format == 'TIFF':
    bands, bits = file.tag_v2.get(277, 1), max(file.tag_v2.get(258, (1,)))
    known = {0: 1, 1: 1, 3: 1, 5: 4}.get(file.tag_v2.get(262), 3)
    if bands > known and not any(kind in (1, 2, 999) for kind in file.tag_v2.get(338, ())[:1]) or (
        bands > known + 1):
      return f'has {bands} bands: write a file of one band or three.'
  elif file.format == 'PNG':
    with open(path, 'rb') as f:
      bits = f.read(25)[24]
  elif file.format == 'PPM' and file.mode == 'RGB' and isinstance(file.tile[0].args, tuple):
    bits = 16 if file.tile[0].args[1] > 255 else 8
  if bits > 8 and file.mode[0] not in 'IF':
    return f'has {bits} bits a colour: convert it to 8 bits, or to gray of {bits} bits.'
  if file.mode[0] in 'IF' and 'transparency' in file.info:
    return 'has transparency and more than 8 bits: convert it to 8 bits.'
  if file.mode[0] in 'IF' and not sizes['value_range'] and (file.mode == 'F' or bits > 16):
    return f'has {bits}-bit values, and the model was made of images without: convert it to 8 or 16 bits.'
  if sizes['bands'] and (file.mode[0] in 'IF1L' or max(sizes['bands']) > 3):
    wanted = ', '.join(map(str, sizes['bands']))
    return f'is to be read by its bands {wanted}, which it lacks, or which run.py cannot read.'
  return ''


def _to_rgb(image, sizes):
  """Converts an image to 8-bit RGB; returns it, and the share of it outside of the range of values."""
  if image.mode[0] in 'IF':
    values = np.asarray(image)
    if not sizes['value_range']:
      if values.min() < 0 or values.max() > 65535:
        raise ValueError('it holds values beyond 16 bits.')
      return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert('RGB'), 0.0
    low, high = sizes['value_range']
    outside = float(np.mean(~((values >= low) & (values <= high))))
    scaled = np.rint((np.clip(values, low, high).astype(np.float64) - low) * (255 / (high - low)))
    return Image.fromarray(np.nan_to_num(scaled, nan=0.0).astype(np.uint8)).convert('RGB'), outside
  if 'transparency' in image.info or image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa'):
    image = image.convert('LA' if image.mode == 'La' else 'RGBA').convert('RGBA')
    if sizes['background']:
      under = Image.new('RGBA', image.size, (*sizes['background'], 255))
      under.alpha_composite(image)
      image = under
  image = image.convert('RGB')
  if sizes['bands']:
    image = Image.merge('RGB', [image.getchannel(band - 1) for band in sizes['bands']])
  return image, 0.0


def prepare(image, sizes):
  """Resizes, pads and crops an image. All sizes are (height, width), or one number for both."""
  old, new = (image.height, image.width), _resized(image, sizes)
  pixels = np.asarray(image if new == old else image.resize(new[::-1], Image.Resampling.BILINEAR))
  missing = [max(p - n, 0) for p, n in zip(_pair(sizes['pad'] or [0]), new)]
  pixels = np.pad(pixels, [*((m // 2, m - m // 2) for m in missing), (0, 0)], 'edge')
  if sizes['crop']:
    height, width = _pair(sizes['crop'])
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    pixels = pixels[max(top, 0):top + height, max(left, 0):left + width]
  return pixels


def left_out(image, sizes):
  """Computes the share of an image that a crop leaves out."""
  seen, new = 1.0, _resized(image, sizes)
  for length, crop, pad in zip(new, _pair(sizes['crop'] or [0]), _pair(sizes['pad'] or [0])):
    missing = max(pad - length, 0)
    first = round((length + missing - crop) / 2) - missing // 2
    seen *= (min(first + crop, length) - max(first, 0)) / length if crop else 1
  return 1 - seen


def _resized(image, sizes):
  """Computes the (height, width) of an image after resizing."""
  old = image.height, image.width
  if len(sizes['resize']) != 1:
    return tuple(sizes['resize']) or old
  short, long, size = min(old), max(old), sizes['resize'][0]
  if sizes['resize_side'] == 'short':
    short, long = size, int(size * long / short)
  else:
    short, long = max(1, int(size * short / long)), size
  return (short, long) if old[0] <= old[1] else (long, short)


def _pair(size):
  """Converts a size that may be one number to (height, width)."""
  return tuple(size) if len(size) == 2 else (size[0], size[0])


def main():
  """Scores the images of the command line, and prints a line for each."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('images', nargs='+', type=Path)
  parser.add_argument('--maps', type=Path, help='folder for anomaly maps')
  parser.add_argument(
      '--max-megapixels', type=float, default=MOST_PIXELS / 1e6, help='images of more are refused')
  arguments = parser.parse_args()
  Image.MAX_IMAGE_PIXELS = None  # there is one limit, which `read` checks
  program, description = load(Path(__file__).parent)
  if arguments.maps and 'anomaly_map' not in description['outputs']:
    raise SystemExit('error: this program scores whole images and makes no maps: leave out --maps.')
  # Batches of one size, so that the program is compiled once.
  size, refused, scored, told = min(len(arguments.images), description['images_at_once']), 0, 0, set()
  for begin in range(0, len(arguments.images), size):
    good = []
    for number, path in enumerate(arguments.images[begin:begin + size], begin):
      try:
        good.append((number, path, *read(path, description, arguments.max_megapixels * 1e6)))
      except _Refused as e:
        refused += 1
        print(f'not scored: {_shown(e)}', file=sys.stderr, flush=True)
    if not good:
      continue
    batch = np.zeros((size, *description['input']['shape'][1:]), np.uint8)
    batch[:len(good)] = [pixels for _, _, pixels, *_ in good]
    results = jax.device_get(program(batch))
    for i, (number, path, _, outside, unseen) in enumerate(good):
      answer = f'{results["image_score"][i]:.6g}'
      if 'anomalous' in results:
        beyond = outside > description['outside_range'] + 1e-9
        answer += f' {results["calibrated_score"][i]:.3f}'
        answer += ' ANOMALOUS' if results['anomalous'][i] or beyond else ' good'
        answer += f' ({100 * outside:.2g} % outside of the value range)' if beyond else ''
      print(f'{answer} {_shown(path)}', flush=True)
      scored += 1
      share = f'{100 * unseen:.0f} % of {_shown(path)}'
      if unseen >= 0.005 and share.partition(' ')[0] not in told:  # once for each share
        told.add(share.partition(' ')[0])
        print(f'{share} is not inspected: a crop leaves it out.', file=sys.stderr, flush=True)
      if arguments.maps:
        arguments.maps.mkdir(parents=True, exist_ok=True)
        np.save(arguments.maps / f'{number}_{path.stem}.npy', results['anomaly_map'][i])
  if refused:
    sys.exit(2 if scored else 1)


def _shown(text):
  """Writes a text in one line, whatever characters it has."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


if __name__ == '__main__':
  try:
    main()
  except KeyboardInterrupt:
    raise SystemExit(130) from None
  except OSError as e:
    raise SystemExit(f'error: {e}') from e
