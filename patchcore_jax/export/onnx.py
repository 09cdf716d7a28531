"""Converts an exported program to an ONNX file, by jax2onnx (extra `onnx`).

jax2onnx translates what JAX traced, operation by operation. Where it knows no translation, or one that ONNX
Runtime refuses, the program is put in other words here, with the same result:
  - what depends on the platform is settled beforehand (`lax.platform_dependent` has no counterpart);
  - a maximum over windows is the maximum of shifted images (its MaxPool has four axes, ONNX Runtime's three);
  - convolutions have their axes in one order.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from patchcore_jax import extras

INPUT = 'images'


def check_installed() -> None:
  """Raises ValueError where jax2onnx or onnxruntime is missing."""
  with extras.needed_for('An ONNX file'):
    import jax2onnx  # noqa: F401
    import onnxruntime  # noqa: F401


def convert(fn: Any, shape: Sequence[int], path: str | os.PathLike) -> None:
  """Writes a program as one ONNX file.

  Args:
    fn: a function of images [b, h, w, 3] uint8 that returns a dict of arrays, without loops.
    shape: shape of the images, b included.
    path: the file.

  Raises:
    ValueError: an operation that cannot be translated.
  """
  import jax2onnx
  images = jax.ShapeDtypeStruct(tuple(shape), jnp.uint8)
  closed, results = jax.make_jaxpr(fn, return_shape=True)(images)
  names = sorted(results)  # as JAX flattens a dict
  noisy = logging.getLogger('onnx_ir')
  level = noisy.level
  noisy.setLevel(logging.ERROR)  # it tells of each annotation that it leaves out
  try:
    jax2onnx.to_onnx(
        lambda x: tuple(_settled(closed.jaxpr, closed.consts, x)), [images], model_name='patchcore',
        return_mode='file', output_path=os.fspath(path), export_mode='web',  # one file, whatever its size
        input_names=[INPUT], output_names=names)
  except (NotImplementedError, ValueError, TypeError, RuntimeError, KeyError) as e:
    raise ValueError(
        f'jax2onnx cannot translate the program: {type(e).__name__}: {str(e).splitlines()[0]}') from e
  finally:
    noisy.setLevel(level)


def runner(path: str | os.PathLike) -> Any:
  """Opens the file in ONNX Runtime, on the CPU: a function of any number of images, one after the other.

  Raises:
    ValueError: ONNX Runtime does not take the file.
  """
  import onnxruntime
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # errors
  try:
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=['CPUExecutionProvider'])
  except Exception as e:  # its errors have no common class of their own
    raise ValueError(
        f'ONNX Runtime does not take what jax2onnx made of the program: {str(e).splitlines()[0]} Write it '
        'without --onnx.') from e
  names = [output.name for output in session.get_outputs()]

  def run(images):
    results = [session.run(names, {INPUT: np.asarray(image)[None]}) for image in images]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*results))}

  return run


def _settled(jaxpr, consts, *args):
  """Evaluates a jaxpr as if on a platform without a branch of its own; the results are traced as usual."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
  for eqn in jaxpr.eqns:
    values = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
    env.update(zip(eqn.outvars, _evaluated(eqn, values)))
  return [v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]


def _evaluated(eqn, values):
  """Evaluates one equation, in operations that can be translated."""
  name, params = eqn.primitive.name, eqn.params
  if name == 'platform_index':
    return [np.int32(next(i for i, names in enumerate(params['platforms']) if names is None))]
  if name == 'empty2':  # where a gradient is gathered: whatever stands there is overwritten
    return [jnp.zeros((), params['dtype'])]
  if name == 'clamp' and not any(isinstance(v, jax.core.Tracer) for v in values):
    low, x, high = values
    return [np.int32(np.clip(x, low, high))]
  if name == 'cond' and not isinstance(values[0], jax.core.Tracer):
    branch = params['branches'][int(values[0])]
    return _settled(branch.jaxpr, branch.consts, *values[1:])
  if name in ('jit', 'pjit', 'closed_call', 'custom_jvp_call'):
    inner = params['call_jaxpr' if 'call_jaxpr' in params else 'jaxpr']
    return _settled(inner.jaxpr, inner.consts, *values)
  if name == 'reduce_window_max' and values[0].ndim > 3 and _undilated(params):
    return [_shifted_maximum(values[0], params, eqn.outvars[0].aval.shape)]
  if name == 'conv_general_dilated' and params['batch_group_count'] == 1:
    return [_usual_convolution(*values, params)]
  results = eqn.primitive.bind(*values, **params)
  return results if eqn.primitive.multiple_results else [results]


def _usual_convolution(images, kernel, params):
  """Convolves with the axes in the usual order, which those of a gradient are not in."""
  given = params['dimension_numbers']
  usual = lax.ConvDimensionNumbers(*3 * (tuple(range(images.ndim)),))
  found = lax.conv_general_dilated_p.bind(
      jnp.transpose(images, given.lhs_spec), jnp.transpose(kernel, given.rhs_spec),
      **params | {'dimension_numbers': usual})
  return jnp.transpose(found, np.argsort(given.out_spec))


def _undilated(params):
  """Tells whether a reduction over windows has no dilation."""
  return all(d == 1 for d in (*params['base_dilation'], *params['window_dilation']))


def _shifted_maximum(x, params, shape):
  """Computes the maximum over windows as the maximum of shifted images."""
  x = jnp.pad(x, params['padding'], constant_values=-np.inf)
  strides, result = params['window_strides'], None
  for offset in np.ndindex(*params['window_dimensions']):
    part = x[tuple(slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, shape, strides))]
    result = part if result is None else jnp.maximum(result, part)
  return result
