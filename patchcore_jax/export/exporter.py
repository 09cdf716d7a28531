"""A bank -> a folder whose program answers with JAX alone: neither this package nor its other dependencies.

  program.jax        the network, the bank and all between, from uint8 pixels on (`jax.export`, StableHLO)
  description.json   inputs, outputs, thresholds, versions, checksum
  run.py, README.md  how it is used
  program.onnx       if asked for: the same for ONNX Runtime, one image at a time (`export_onnx`)

The program is what `patchcore.predict` runs (`patchcore.predict_fn`), so there is no second scorer; only how
a batch of any size is gone through is of this module. Nothing is written unless the program, read back from
its file, gives the scores of `patchcore.predict` on probe images.
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
import jax.numpy as jnp
import numpy as np
import PIL
from jax import export as jax_export
from jax import lax
from PIL import Image

import patchcore_jax
from patchcore_jax import inspection, parallel
from patchcore_jax.banks import provenance
from patchcore_jax.data import preprocess
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import patchcore
from patchcore_jax.export import onnx
from patchcore_jax.inspection import Inspector, calibration
from patchcore_jax.search import neighbors

Program = Callable[[Any], dict[str, Any]]

FORMAT = 1  # of the folder
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# Two programs of the same arithmetic differ in the order of sums: 1e-6 of an embedding's length, which weighs
# more in a small distance than in a large one. Seen: 3e-7. Another weight, bank row or pixel shows at 1e-2.
TOLERANCE = 1e-4
# Sizes are 32-bit offsets both in the file (flatbuffers) and in what is given to the compiler (protobuf).
_MOST_BYTES = 2**31 - 2**26
_PROGRAM, _ONNX = 'program.jax', 'program.onnx'
_DESCRIPTION, _SCRIPT, _README = 'description.json', 'run.py', 'README.md'


class ParityError(ValueError):
  """An exported program that does not give the scores of `patchcore.predict`."""


def program(
    inspector: Inspector, *, camera: tuple[int, int] | None = None, at_once: int = 8,
    shortlist: str = 'auto') -> Program:
  """The pure function that is exported; the network and the bank are in it.

  Args:
    inspector: from `inspection.load`.
    camera: (height, width) of camera frames; None for images of the network's size.
    at_once: so many images pass through the network together. Of a batch, those that are left over pass one
      by one.
    shortlist: see `neighbors.SearchSpec`; no influence on the result.

  Returns:
    A function of images [b, h, w, 3] uint8, where b may be symbolic, that returns a dict:
      image_score: [b] float32; larger is more anomalous.
      anomaly_map: [b, h, w] float32, at the size of the network's input.
      calibrated_score: [b] float32, see `calibration.calibrated_score`, and
      anomalous: [b] bool, whether image_score reaches the threshold; both only for a calibrated bank.

  Raises:
    ValueError: frames that do not become images of the size that the bank was made of, or `at_once` below 1.
  """
  if at_once < 1:
    raise ValueError(f'at_once={at_once}: expected at least 1 image.')
  fn = _program_of_parts(inspector, camera)
  parameters = inspector.backbone.variables, neighbors.prepare(inspector.bank.embeddings, shortlist)

  def run(images):
    # The barrier keeps the compiler from computing with these constants beforehand: for a WideResNet-50 and
    # 25,000 patches that takes four times the time and twice the memory, and gains nothing.
    constants = lax.optimization_barrier(jax.tree.map(jnp.asarray, parameters))
    return _in_parts(lambda part: fn(constants, part), images, at_once)

  return run


def program_in_one_pass(inspector: Inspector, *, camera: tuple[int, int] | None = None) -> Program:
  """`program` of a batch of known size, without loops: for converters to other runtimes."""
  fn = _program_of_parts(inspector, camera)
  parameters = inspector.backbone.variables, neighbors.in_one_pass(inspector.bank.embeddings)
  return lambda images: fn(parameters, images)


def write(
    path: str | os.PathLike, inspector: Inspector, *, camera: tuple[int, int] | None = None,
    platforms: Sequence[str] = ('cpu', 'cuda', 'tpu'), at_once: int = 8, onnx: bool = False,
    progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
  """Exports, compares, and writes the folder, which appears only when it is complete.

  Args:
    path: of the folder, which must not exist.
    inspector, camera, at_once: as of `program`.
    platforms: where the program is to run, some of `PLATFORMS`. This machine's must be among them, because
      the comparison runs here.
    onnx: also writes program.onnx, and compares it, in ONNX Runtime.
    progress: called with (stage, done, total); stages are 'build', 'check', 'build onnx', 'check onnx'.

  Returns:
    What description.json holds.

  Raises:
    ParityError: the program gives other scores than `patchcore.predict`.
    ValueError: `path` exists, bad arguments, a program that is too large for one file, or one that cannot be
      made for these platforms or for ONNX; `onnx` without the packages for it.
    OSError: the folder cannot be written.
  """
  path = Path(path).absolute()
  if path.exists():
    raise ValueError(f'{path} exists: an export is not overwritten. Remove it or choose another folder.')
  platforms = _checked(platforms)
  _check_bytes(inspector)
  if onnx:
    onnx.check_installed()
  height, width = camera or inspector.image_size
  progress = progress or (lambda stage, done, total: None)
  shortlist = 'float32' if 'cpu' in platforms else 'bfloat16'
  fn = program(inspector, camera=camera, at_once=at_once, shortlist=shortlist)
  exported = serialize(fn, (height, width, 3), platforms)
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


def serialize(fn: Program, shape: Sequence[int], platforms: Sequence[str]) -> bytearray:
  """`jax.export` of a program of images [b, *shape] uint8, b free.

  Raises:
    ValueError: it has operations that one of the platforms lacks.
  """
  (b,) = jax_export.symbolic_shape('b')
  # Else the file would tell the paths of this machine's source files.
  limit = jax.config.jax_traceback_in_locations_limit
  jax.config.update('jax_traceback_in_locations_limit', 0)
  try:
    return jax_export.export(jax.jit(fn), platforms=tuple(platforms))(
        jax.ShapeDtypeStruct((b, *shape), jnp.uint8)).serialize()
  except (NotImplementedError, ValueError) as e:
    raise ValueError(
        f'The program cannot be exported for {", ".join(platforms)}: {str(e).splitlines()[0]} If the '
        'backbone is your own, export for one platform.') from e
  finally:
    jax.config.update('jax_traceback_in_locations_limit', limit)


def probes(inspector: Inspector, count: int, camera: tuple[int, int] | None = None) -> np.ndarray:
  """Images [count, h, w, 3] uint8 to compare programs on: noise, one without any structure, gradients, and
  the bank's own training images where it has pictures of them."""
  height, width = camera or inspector.image_size
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:height, :width] / max(height, width)
  files = provenance.thumbnails(inspector.bank)
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
  """Compares a program with `patchcore.predict`.

  Args:
    call: the program.
    inspector: what it was made of.
    images: [n, h, w, 3] uint8, as the program takes them.
    sizes: of batches; of each the last images.
    camera: as of `program`.
    progress: called with (done, total).

  Returns:
    The largest difference of image scores and anomaly maps, relative to the score or the map's largest value
    (to a thousandth of the largest of all images, where that is more: the score of a patch that is in the
    bank is all rounding).

  Raises:
    ParityError: it is above `TOLERANCE`, or a calibrated score or decision does not follow from the score.
  """
  want = _predicted(inspector, images, camera)
  scores, maps = want.image_scores[0], want.anomaly_maps[0]
  largest = 0.0
  for done, size in enumerate(sizes):
    got = jax.device_get(call(images[-size:]))
    for name, expected in ('image_score', scores), ('anomaly_map', maps):
      each = np.abs(expected).reshape(len(images), -1).max(axis=1)
      scale = np.maximum(each, 1e-3 * each.max())[-size:]
      if got[name].shape != expected[-size:].shape:
        raise ParityError(f'{name} is {got[name].shape}, expected {expected[-size:].shape}.')
      error = np.abs(got[name] - expected[-size:]).reshape(size, -1).max(axis=1) / scale
      if not error.max() <= TOLERANCE:  # NaN is not
        raise ParityError(
            f'The exported program differs from patchcore.predict: {name} by {error.max():.1e} of its size, '
            f'tolerance {TOLERANCE:.0e}, on probe image {len(images) - size + int(error.argmax())} in a '
            f'batch of {size}. Nothing was written. If the backbone is your own, look for arithmetic that '
            'depends on the batch size or on state outside of its variables; else please report this.')
      largest = max(largest, float(error.max()))
    _check_calibrated(inspector.calibration, got)
    progress(done + 1, len(sizes))
  return largest


def _write_onnx(path, inspector, camera, at_once, progress):
  """Writes and compares the ONNX file; what description.json tells of it."""
  images = probes(inspector, at_once + 3, camera)
  onnx.convert(program_in_one_pass(inspector, camera=camera), (1, *images.shape[1:]), path)
  progress('build onnx', 1, 1)
  difference = check(
      onnx.runner(path), inspector, images, sizes=(len(images),), camera=camera,
      progress=lambda done, total: progress('check onnx', done, total))
  return {
      'program': path.name, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
      'bytes': path.stat().st_size, 'input': onnx.INPUT, 'batch': 1, 'largest_difference': difference,
      'versions': {name: metadata.version(name) for name in ('jax2onnx', 'onnxruntime')}}


def describe(
    inspector: Inspector, camera: tuple[int, int] | None, platforms: Sequence[str], at_once: int, *,
    digest: str, size: int, parity: dict[str, Any]) -> dict[str, Any]:
  """What a user of the program needs to know; JSON-able."""
  height, width = inspector.image_size
  c, bank = inspector.calibration, inspector.bank
  outputs = {
      'image_score': [['b'], 'float32', 'larger is more anomalous; in the unit of this bank'],
      'anomaly_map': [['b', height, width], 'float32', 'the same for each pixel that the network saw']}
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
      'preprocess': inspection.geometry(inspector.preprocessing),
      'thresholds': {
          'image_threshold': c.image_threshold, 'pixel_threshold': c.pixel_threshold,
          'false_alarm_rate': c.false_alarm_rate, 'guaranteed_rate': c.guaranteed_rate} if c else None,
      'bank': {
          'patches': len(bank.embeddings), 'images': bank.description.get('num_images'),
          'category': bank.description.get('category', ''), 'backbone': inspector.backbone.name},
      'parity': parity,
      'made': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'versions': {
          'patchcore_jax': patchcore_jax.__version__, 'jax': jax.__version__, 'pillow': PIL.__version__},
  }


def _program_of_parts(inspector, camera):
  """((variables, bank), images) -> the dict of `program`."""
  prepare = _preparation(inspector, camera)
  fn = patchcore.predict_fn(
      inspector.backbone, inspector.bank, embedding=inspector.embedding, scoring_spec=inspector.scoring)
  c = inspector.calibration

  def run(parameters, images):
    scores, maps, *_ = fn(parameters, prepare(images))
    results = {'image_score': scores[:, 0], 'anomaly_map': maps[:, 0]}
    if c:
      results['calibrated_score'] = calibration.calibrated_scores(c, scores[:, 0], jnp)
      results['anomalous'] = scores[:, 0] >= jnp.float32(c.image_threshold)
    return results

  return run


def _preparation(inspector, camera):
  if camera is None:
    return lambda images: images
  fn = camera.transform_fn(*camera, inspector.preprocessing)
  height, width, _ = jax.eval_shape(fn, jax.ShapeDtypeStruct((1, *camera, 3), jnp.uint8)).shape[1:]
  inspection.check_size(inspector, (height, width))
  return fn


def _in_parts(fn, images, at_once):
  """`fn` of a batch of any size, even one that is not known: `at_once` images at a time, the rest singly."""
  shapes = jax.eval_shape(fn, jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype))
  results = jax.tree.map(lambda x: jnp.zeros((images.shape[0], *x.shape[1:]), x.dtype), shapes)

  def loop(results, begin, count, size):
    def step(i, results):
      at = begin + i * size + jnp.arange(size)
      found = fn(images.at[at].get(mode='promise_in_bounds'))
      return jax.tree.map(
          lambda all_, some: all_.at[at].set(some, mode='promise_in_bounds', unique_indices=True),
          results, found)

    return lax.fori_loop(0, count, step, results)

  b = jnp.asarray(images.shape[0])
  results = loop(results, 0, b // at_once, at_once)
  begin = b // at_once * at_once
  return loop(results, begin, b - begin, 1)


def _checked(platforms):
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


def _check_bytes(inspector):
  """What the file holds twice is a bank whose reduced copy is as large as itself."""
  patches, dim = inspector.bank.embeddings.shape
  weights = sum(x.nbytes for x in jax.tree.leaves(inspector.backbone.variables))
  needed = weights + 2 * 4 * patches * dim
  if needed > _MOST_BYTES:
    raise ValueError(
        f'The program takes up to {needed / 1e9:.1f} GB: {weights / 1e9:.1f} GB of weights, and a bank of '
        f'{patches} patches of {dim} values, which is stored twice, once for the search. A file of '
        f'jax.export holds at most {_MOST_BYTES / 1e9:.1f} GB. Shrink the bank to a smaller ratio '
        f'(python -m experiments.bank shrink): {max(0, _MOST_BYTES - weights) // (8 * dim)} patches fit.')


def _predicted(inspector, images, camera):
  """`patchcore.predict` of images or, through Pillow, of frames."""
  if camera:
    images = np.stack([
        np.asarray(preprocess.transform(Image.fromarray(image), inspector.preprocessing))
        for image in images])
  n = len(images)
  padded = np.zeros((parallel.divisible_batch_size(n), *images.shape[1:]), np.uint8)
  padded[:n] = images
  index = np.where(np.arange(len(padded)) < n, np.arange(len(padded)), -1).astype(np.int32)
  (prediction,) = inspection.predict(inspector, [Batch(padded, None, index)])
  return prediction


def _check_calibrated(c, got):
  if c is None:
    return
  scores = got['image_score']
  for name, want in (
      ('calibrated_score', calibration.calibrated_scores(c, scores.astype(np.float64))),
      ('anomalous', scores >= c.image_threshold)):
    if not np.abs(got[name].astype(np.float64) - want).max() <= TOLERANCE:
      raise ParityError(f'{name} of the exported program is {got[name]}, expected {want} of scores {scores}.')


def _readme(description):
  batch, *size = description['input']['shape']
  outputs = '\n'.join(
      f'| `{name}` | {" x ".join(map(str, o["shape"]))} | {o["dtype"]} | {o["meaning"]} |'
      for name, o in description['outputs'].items())
  return f"""# Exported inspection program

`{_PROGRAM}` scores images of parts: the network, the memory bank and all arithmetic are in it. It takes
{batch} x {' x '.join(map(str, size))} uint8, any number {batch} of images: {description['input']['meaning']}.

    pip install jax=={description['versions']['jax']} flatbuffers numpy pillow
    python {_SCRIPT} IMAGE...

| output | shape | type | meaning |
|---|---|---|---|
{outputs}

From Python:

    from jax import export
    program = export.deserialize(bytearray(open('{_PROGRAM}', 'rb').read())).call
    results = program(images)

Every batch size is compiled when it is first seen; `jax.jit(program)` keeps what was compiled. `{_SCRIPT}`
shows how images are read. `{_DESCRIPTION}` has thresholds, versions and the checksum. Made for
{', '.join(description['platforms'])} with JAX {description['versions']['jax']}. Later versions of JAX read it
for about half a year; pin the version, or export again.
"""
