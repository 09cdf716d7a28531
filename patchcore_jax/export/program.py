"""Makes a pure function from pixels to answers of a model, which `jax.export` can keep.

It is what prediction runs (`Detector.score_fn`), so there is no second scorer; this module adds only how a
batch of any size is gone through.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export
from jax import lax

from patchcore_jax import inspection
from patchcore_jax.banks import calibration
from patchcore_jax.data import camera_frames
from patchcore_jax.detectors import ScoreFn
from patchcore_jax.detectors.base import LOOP_FREE, PORTABLE
from patchcore_jax.inspection import Inspector
from patchcore_jax.settings import SearchSpec

Program = Callable[[Any], dict[str, Any]]

# Sizes are 32-bit offsets both in the file (flatbuffers) and in what is given to the compiler (protobuf).
_MOST_BYTES = 2**31 - 2**26


def program(
    inspector: Inspector, *, camera: tuple[int, int] | None = None, at_once: int = 8,
    shortlist: str = 'auto') -> Program:
  """Makes the pure function that is exported; the network and the bank are in it.

  Args:
    inspector: from `inspection.load`.
    camera: (height, width) of camera frames; None for images of the network's size.
    at_once: so many images pass through the network together. Of a batch, those that are left over pass one
      by one.
    shortlist: see `settings.SearchSpec`; no influence on the result.

  Returns:
    A function of images [b, h, w, 3] uint8, where b may be symbolic, that returns a dict:
      image_score: [b] float32; larger is more anomalous.
      anomaly_map: [b, h, w] float32, at the size of the network's input; only of a method that has maps.
      calibrated_score: [b] float32, see `calibration.calibrated_score`, and
      anomalous: [b] bool, whether image_score reaches the threshold; both only for a model with thresholds.

  Raises:
    ValueError: frames that do not become images of the size that the model was made of, `at_once` below 1,
      a method that cannot be one program, or a program that is too large for one file.
  """
  if at_once < 1:
    raise ValueError(f'at_once={at_once}: expected at least 1 image.')
  score_fn = _score_fn(inspector, PORTABLE, SearchSpec(shortlist))
  _check_bytes(score_fn)
  fn, parameters = _program_of_parts(inspector, score_fn, camera), score_fn.parameters

  def run(images):
    # The barrier keeps the compiler from computing with these constants beforehand: for a WideResNet-50 and
    # 25,000 patches that takes four times the time and twice the memory, and gains nothing.
    constants = lax.optimization_barrier(jax.tree.map(jnp.asarray, parameters))
    return _in_parts(lambda part: fn(constants, part), images, at_once)

  return run


def program_in_one_pass(inspector: Inspector, *, camera: tuple[int, int] | None = None) -> Program:
  """Makes `program` for a batch of known size, without loops: for converters to other runtimes."""
  score_fn = _score_fn(inspector, LOOP_FREE, SearchSpec())
  fn = _program_of_parts(inspector, score_fn, camera)
  return lambda images: fn(jax.tree.map(jnp.asarray, score_fn.parameters), images)


def serialize(fn: Program, shape: Sequence[int], platforms: Sequence[str]) -> bytearray:
  """Serializes a program of images [b, *shape] uint8, b free, by `jax.export`.

  Raises:
    ValueError: it has operations that one of the platforms lacks.
  """
  (b,) = jax_export.symbolic_shape('b')
  # Without this, the file would tell the paths of this machine's source files.
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


def _score_fn(inspector, program, search):
  """Makes the score function of a model, or raises ValueError if its method cannot be exported."""
  if inspector.detector.host_step:
    raise ValueError(f'{inspector.detector.title} cannot be exported: {inspector.detector.host_step}.')
  return inspector.detector.score_fn(inspector.model, inspector.backbones, search=search, program=program)


def _program_of_parts(inspector: Inspector, score_fn: ScoreFn, camera):
  """Makes the function (parameters, images) -> the dict of `program`."""
  prepare, found = _preparation(inspector, camera), inspector.calibration

  def run(parameters, images):
    scores = score_fn.fn(parameters, prepare(images))
    results = {'image_score': scores.image}
    if scores.map is not None:
      results['anomaly_map'] = scores.map
    if found:
      results['calibrated_score'] = calibration.calibrated_scores(found, scores.image, jnp)
      results['anomalous'] = scores.image >= jnp.float32(found.image_threshold)
    return results

  return run


def _preparation(inspector, camera):
  """Makes the function that preprocesses frames of a camera; without one, images stay as they are."""
  if camera is None:
    return lambda images: images
  fn = camera_frames.transform_fn(*camera, inspector.preprocessing)
  height, width, _ = jax.eval_shape(fn, jax.ShapeDtypeStruct((1, *camera, 3), jnp.uint8)).shape[1:]
  inspection.check_size(inspector, (height, width))
  return fn


def _in_parts(fn, images, at_once):
  """Runs `fn` on a batch of any size, known or not: `at_once` images at a time, the rest singly."""
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


def _check_bytes(score_fn):
  """Raises ValueError for a program that is too large for one file."""
  needed = sum(x.nbytes for x in jax.tree.leaves(score_fn.parameters))
  if needed > _MOST_BYTES:
    weights = sum(x.nbytes for x in jax.tree.leaves(score_fn.parameters[0]))
    raise ValueError(
        f'The program takes {needed / 1e9:.1f} GB: {weights / 1e9:.1f} GB of weights, and the rest is what '
        'was learnt, of which a bank is stored twice, once for the search. A file of jax.export holds at '
        f'most {_MOST_BYTES / 1e9:.1f} GB. Shrink the bank to a smaller ratio (patchcore bank '
        'shrink), or fit a smaller model.')
