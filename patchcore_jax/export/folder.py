"""Exports a model as a folder whose program needs JAX alone, not this package or its other dependencies.

  program.jax        the network, the model and all between, from uint8 pixels on (`jax.export`, StableHLO)
  description.json   inputs, outputs, thresholds, versions, checksum
  run.py, README.md  how it is used
  program.onnx       if asked for: the same for ONNX Runtime, one image at a time (`export.onnx`)

Nothing is written unless the program, read back from its file, gives the scores of `inspection.predict` on
probe images.
"""

import datetime
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL
from jax import export as jax_export
from PIL import Image

import patchcore_jax
from patchcore_jax import inspection, parallel
from patchcore_jax.banks import calibration, provenance
from patchcore_jax.banks.model import flat, to_json
from patchcore_jax.data import preprocess
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.export import onnx as onnx_file
from patchcore_jax.export import program as programs
from patchcore_jax.export.program import Program
from patchcore_jax.inspection import Inspector

FORMAT = 1  # of the folder that is written
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# Two programs of the same arithmetic differ in the order of sums: 1e-6 of an embedding's length, which weighs
# more in a small distance than in a large one. Seen: 3e-7. Another weight, bank row or pixel shows at 1e-2.
TOLERANCE = 1e-4
_PROGRAM, _ONNX = 'program.jax', 'program.onnx'
_DESCRIPTION, _SCRIPT, _README = 'description.json', 'run.py', 'README.md'


class ParityError(ValueError):
  """An exported program that does not give the scores of `inspection.predict`."""


def write(
    path: str | os.PathLike, inspector: Inspector, *, camera: tuple[int, int] | None = None,
    platforms: Sequence[str] = ('cpu', 'cuda', 'tpu'), at_once: int = 8, onnx: bool = False,
    progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
  """Exports a model, checks the program, and writes the folder, which appears only when it is complete.

  Args:
    path: the folder, which must not exist.
    inspector, camera, at_once: see `program.program`.
    platforms: where the program is to run, some of `PLATFORMS`. This machine's must be among them, because
      the comparison runs here.
    onnx: also writes program.onnx, and compares it, in ONNX Runtime.
    progress: called with (stage, done, total); stages are 'build', 'check', 'build onnx', 'check onnx'.

  Returns:
    What description.json holds.

  Raises:
    ParityError: the program gives other scores than `inspection.predict`.
    ValueError: `path` exists, bad arguments, a method that cannot be exported, a program that is too large
      for one file, or that cannot be made for these platforms or for ONNX; `onnx` without its packages.
    OSError: the folder cannot be written.
  """
  path = Path(path).absolute()
  if path.exists():
    raise ValueError(f'{path} exists: an export is not overwritten. Remove it or choose another folder.')
  platforms = _checked(platforms)
  if onnx:
    onnx_file.check_installed()
  height, width = camera or inspector.image_size
  progress = progress or (lambda stage, done, total: None)
  shortlist = 'float32' if 'cpu' in platforms else 'bfloat16'
  fn = programs.program(inspector, camera=camera, at_once=at_once, shortlist=shortlist)
  exported = programs.serialize(fn, (height, width, 3), platforms)
  progress('build', 1, 1)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Removed on the way out, whatever happens, unless it was renamed by then.
  with tempfile.TemporaryDirectory(
      prefix=f'.{path.name}-', dir=path.parent, ignore_cleanup_errors=True) as folder:
    made = Path(folder) / 'export'
    made.mkdir()
    (made / _PROGRAM).write_bytes(exported)
    del exported
    call = jax.jit(jax_export.deserialize(bytearray((made / _PROGRAM).read_bytes())).call)
    # One image, and a batch that is gone through in both ways.
    difference = check(
        call, inspector, probes(inspector, at_once + 3, camera), sizes=(1, at_once + 3), camera=camera,
        progress=lambda done, total: progress('check', done, total))
    description = describe(
        inspector, camera, platforms, at_once, size=(made / _PROGRAM).stat().st_size,
        has_map='anomaly_map' in jax.eval_shape(
            call, jax.ShapeDtypeStruct((1, height, width, 3), np.uint8)),
        digest=hashlib.sha256((made / _PROGRAM).read_bytes()).hexdigest(),
        parity={
            'platform': jax_export.default_export_platform(), 'largest_difference': difference,
            'tolerance': TOLERANCE})
    if onnx:
      description['onnx'] = _write_onnx(made / _ONNX, inspector, camera, at_once, progress)
    (made / _DESCRIPTION).write_text(json.dumps(description, indent=2) + '\n')
    (made / _README).write_text(_readme(description))
    shutil.copyfile(Path(__file__).with_name('run.py'), made / _SCRIPT)
    made.rename(path)
  return description


def probes(inspector: Inspector, count: int, camera: tuple[int, int] | None = None) -> np.ndarray:
  """Makes images [count, h, w, 3] uint8 to compare programs on.

  They are noise, one without any structure, gradients, and the model's own training images where it has
  pictures of them.
  """
  height, width = camera or inspector.image_size
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:height, :width] / max(height, width)
  files = provenance.thumbnails(inspector.model)
  images = []
  for i in range(count):
    if i == 1:
      image = np.full((height, width, 3), 127.0)
    elif i >= 3 and files:
      file = Image.open(io.BytesIO(files[(i - 3) * len(files) // max(count - 3, 1)])).convert('RGB')
      image = np.asarray(file.resize((width, height)))
    elif i % 2:
      phase = rng.uniform(0, 2 * math.pi, 3) + 20 * (rng.normal() * x + rng.normal() * y)[..., None]
      image = 128 + 100 * np.sin(phase)
    else:
      image = rng.normal(128, 20 * (i + 1), (height, width, 3))
    images.append(np.clip(image, 0, 255).astype(np.uint8))
  return np.stack(images)


def check(
    call: Program, inspector: Inspector, images: np.ndarray, *, sizes: Sequence[int],
    camera: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None) -> float:
  """Compares a program with `inspection.predict`.

  Args:
    call: the program.
    inspector: what it was made of.
    images: [n, h, w, 3] uint8, as the program takes them.
    sizes: sizes of batches; a batch of b holds the last b images.
    camera: see `program.program`.
    progress: called with (done, total).

  Returns:
    The largest difference of image scores and anomaly maps, relative to the score or the map's largest value
    (to a thousandth of the largest of all images, where that is more: the score of a patch that is in the
    bank is all rounding).

  Raises:
    ParityError: it is above `TOLERANCE`, or a calibrated score or decision does not follow from the score.
  """
  want = _predicted(inspector, images, camera)
  compared = {'image_score': want.image} | ({} if want.map is None else {'anomaly_map': want.map})
  largest = 0.0
  for done, size in enumerate(sizes):
    got = jax.device_get(call(images[-size:]))
    for name, expected in compared.items():
      each = np.abs(expected).reshape(len(images), -1).max(axis=1)
      scale = np.maximum(each, 1e-3 * each.max())[-size:]
      if got[name].shape != expected[-size:].shape:
        raise ParityError(f'{name} is {got[name].shape}, expected {expected[-size:].shape}.')
      error = np.abs(got[name] - expected[-size:]).reshape(size, -1).max(axis=1) / scale
      if not error.max() <= TOLERANCE:  # NaN is not
        raise ParityError(
            f'The exported program differs from inspection.predict: {name} by {error.max():.1e} of its size, '
            f'tolerance {TOLERANCE:.0e}, on probe image {len(images) - size + int(error.argmax())} in a '
            f'batch of {size}. Nothing was written. If the backbone is your own, look for arithmetic that '
            'depends on the batch size or on state outside of its variables; else please report this.')
      largest = max(largest, float(error.max()))
    _check_calibrated(inspector.calibration, got)
    progress(done + 1, len(sizes))
  return largest


def _write_onnx(path, inspector, camera, at_once, progress):
  """Writes and compares the ONNX file, and returns what description.json tells of it."""
  images = probes(inspector, at_once + 3, camera)
  onnx_file.convert(programs.program_in_one_pass(inspector, camera=camera), (1, *images.shape[1:]), path)
  progress('build onnx', 1, 1)
  difference = check(
      onnx_file.runner(path), inspector, images, sizes=(len(images),), camera=camera,
      progress=lambda done, total: progress('check onnx', done, total))
  return {
      'program': path.name, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
      'bytes': path.stat().st_size, 'input': onnx_file.INPUT, 'batch': 1, 'largest_difference': difference,
      'versions': {name: metadata.version(name) for name in ('jax2onnx', 'onnxruntime')}}


def describe(
    inspector: Inspector, camera: tuple[int, int] | None, platforms: Sequence[str], at_once: int, *,
    has_map: bool, digest: str, size: int, parity: dict[str, Any]) -> dict[str, Any]:
  """Describes what a user of the program needs to know, as JSON has it."""
  height, width = inspector.image_size
  c, model = inspector.calibration, inspector.model
  outputs = {
      'image_score': [['b'], 'float32', 'larger is more anomalous; in the unit of this model']}
  foreground = any(
      name.split('.')[-1] == 'foreground' and value != 'none'
      for name, value in flat(model.description.settings).items())
  if has_map:
    outputs['anomaly_map'] = [
        ['b', height, width], 'float32', 'the same for each pixel that the network saw' + (
            '; about 0 where it is taken for background, whatever is there' * foreground)]
  if c:
    outputs |= {
        'calibrated_score': [['b'], 'float32', '0 to 1, and 0.5 at the threshold; not a probability'],
        'anomalous': [['b'], 'bool', 'image_score >= image_threshold']}
  return {
      'format': FORMAT,
      'program': _PROGRAM,
      'sha256': digest,
      'bytes': size,
      'platforms': list(platforms),
      'images_at_once': at_once,
      'input': {
          'shape': ['b', *(camera or inspector.image_size), 3], 'dtype': 'uint8',
          'meaning': 'RGB frames of the camera, as they come' if camera else
                     'RGB images after resizing, padding and cropping as "preprocess" says'},
      'outputs': {
          k: {'shape': shape, 'dtype': dtype, 'meaning': meaning}
          for k, (shape, dtype, meaning) in outputs.items()},
      'camera': list(camera) if camera else None,
      'preprocess': {
          k: v for k, v in to_json(inspector.preprocessing).items() if not k.startswith('mask_')},
      'outside_range': model.description.outside_range,
      'thresholds': {
          'image_threshold': c.image_threshold, 'pixel_threshold': c.pixel_threshold,
          'false_alarm_rate': c.false_alarm_rate, 'guaranteed_rate': c.guaranteed_rate} if c else None,
      'bank': {
          'patches': len(model.arrays.get('embeddings', ())), 'images': model.description.num_images,
          'category': model.description.category, 'detector': inspector.detector.name,
          'backbone': ' + '.join(backbone.name for backbone in inspector.backbones)},
      'parity': parity,
      'made': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'versions': {
          'patchcore_jax': patchcore_jax.__version__, 'jax': jax.__version__, 'pillow': PIL.__version__},
  }


def _checked(platforms):
  """Checks names of platforms, and drops those named twice."""
  platforms = tuple(dict.fromkeys(platforms))
  if not platforms or (unknown := [p for p in platforms if p not in PLATFORMS]):
    raise ValueError(
        f'Platforms {", ".join(unknown) if platforms else "()"}: expected some of {", ".join(PLATFORMS)}.')
  here = jax_export.default_export_platform()
  if here not in platforms:
    raise ValueError(
        f'This machine computes on {here}, where the program is compared with the package before it is '
        f'written: expected {here} among the platforms {", ".join(platforms)}.')
  return platforms


def _predicted(inspector, images, camera):
  """Scores images by `inspection.predict`; frames of a camera are first preprocessed, through Pillow."""
  if camera:
    images = np.stack([
        np.asarray(preprocess.transform(Image.fromarray(image), inspector.preprocessing))
        for image in images])
  n = len(images)
  padded = np.zeros((parallel.divisible_batch_size(n), *images.shape[1:]), np.uint8)
  padded[:n] = images
  index = np.where(np.arange(len(padded)) < n, np.arange(len(padded)), -1).astype(np.int32)
  ((_, scores),) = inspection.predict(inspector, [Batch(padded, None, index)])
  return scores


def _check_calibrated(c, got):
  """Raises ParityError where calibrated scores or decisions do not follow from the scores."""
  if c is None:
    return
  scores = got['image_score']
  for name, want in (
      ('calibrated_score', calibration.calibrated_scores(c, scores.astype(np.float64))),
      ('anomalous', scores >= c.image_threshold)):
    if not np.abs(got[name].astype(np.float64) - want).max() <= TOLERANCE:
      raise ParityError(f'{name} of the exported program is {got[name]}, expected {want} of scores {scores}.')


def _of_files(description):
  """Says how files become uint8, where that is more than reading them."""
  sizes, lines = description['preprocess'], ''
  if sizes['value_range']:
    lines += ('Files of more than 8 bits: values from {:.6g} to {:.6g} become 0 to 255. '
              'An image is anomalous, too, if more than the share `outside_range` of its pixels lies '
              'outside.\n').format(*sizes['value_range'])
  if sizes['bands']:
    lines += 'Of the bands of a file, {}, {} and {} become red, green and blue.\n'.format(*sizes['bands'])
  return lines and f'{lines}\n'


def _readme(description):
  """Writes the text of README.md."""
  batch, *size = description['input']['shape']
  outputs = '\n'.join(
      f'| `{name}` | {" x ".join(map(str, o["shape"]))} | {o["dtype"]} | {o["meaning"]} |'
      for name, o in description['outputs'].items())
  return f"""# Exported inspection program

`{_PROGRAM}` scores images of parts: the network, what was learnt and all arithmetic are in it. It takes
{batch} x {' x '.join(map(str, size))} uint8, any number {batch} of images: {description['input']['meaning']}.

    pip install jax=={description['versions']['jax']} flatbuffers numpy pillow
    python {_SCRIPT} IMAGE...

| output | shape | type | meaning |
|---|---|---|---|
{outputs}

{_of_files(description)}From Python:

    from jax import export
    program = export.deserialize(bytearray(open('{_PROGRAM}', 'rb').read())).call
    results = program(images)

Every batch size is compiled when it is first seen; `jax.jit(program)` keeps what was compiled. `{_SCRIPT}`
shows how images are read. `{_DESCRIPTION}` has thresholds, versions and the checksum. Made for
{', '.join(description['platforms'])} with JAX {description['versions']['jax']}. Later versions of JAX read it
for about half a year; pin the version, or export again.
"""
