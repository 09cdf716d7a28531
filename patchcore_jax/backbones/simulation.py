"""Networks as another kind of device computes them, on any: to see what its rounding does to scores.

A program is evaluated operation by operation, with values rounded on the way. The sums themselves are float32
on both kinds of device, in another order. What is in loops is not rounded.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

_PRODUCTS = ('conv_general_dilated', 'dot_general')
# Operations that are calls of others, and the parameter that holds those.
_CALLS = {'jit': 'jaxpr', 'pjit': 'jaxpr', 'closed_call': 'call_jaxpr', 'custom_jvp_call': 'call_jaxpr',
          'custom_vjp_call': 'call_jaxpr', 'remat2': 'jaxpr', 'checkpoint': 'jaxpr'}


@functools.cache
def on_gpu(apply: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array], Any]:
  """Wraps `apply` to round operands of float32 products and convolutions as GPUs do: to tensorfloat32.

  That has 11 significant bits; operands for which the highest precision is asked are not rounded. Where a
  program has branches for kinds of device, CUDA's is taken. The function is cached, because jit recompiles
  for every new function object.

  >>> third = jnp.full((1, 1), 1 / 3)
  >>> def apply(variables, images):
  ...   return images @ variables, jnp.dot(images, variables, precision='highest')
  >>> rounded, exact = on_gpu(apply)(third, jnp.ones((1, 1)))
  >>> float(rounded[0, 0]), float(exact[0, 0])
  (0.333251953125, 0.3333333432674408)
  """

  def operands(operation, values):
    asked = operation.params.get('precision')
    highest = asked is not None and set(asked) == {lax.Precision.HIGHEST}
    if operation.primitive.name not in _PRODUCTS or highest:
      return values
    return [_rounded(x, 10) for x in values]

  return _evaluating(apply, operands, lambda results: results)


@functools.cache
def in_bfloat16(apply: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array], Any]:
  """Wraps `apply` to round its arguments and every operation's results to bfloat16's 8 significant bits."""

  def operands(operation, values):
    return [_rounded(x, 7) for x in values]

  return _evaluating(apply, operands, lambda results: [_rounded(x, 7) for x in results])


@functools.cache
def in_highest_precision(apply: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array], Any]:
  """Wraps `apply` to compute float32 products as CPUs do, wherever it leaves the precision to JAX.

  The function is cached, because jit recompiles for every new function object.
  """

  def highest(variables, images):
    with jax.default_matmul_precision('highest'):
      return apply(variables, images)

  return highest


def _rounded(x, mantissa_bits):
  return lax.reduce_precision(x, 8, mantissa_bits) if jnp.result_type(x) == jnp.float32 else x


def _evaluating(apply, operands, results):
  """Wraps `apply`: `operands` changes what enters each operation, `results` what comes out."""

  def simulated(variables, images):
    program, shape = jax.make_jaxpr(apply, return_shape=True)(variables, images)
    values = _evaluate(program.jaxpr, program.consts, jax.tree.leaves((variables, images)), operands, results)
    return jax.tree.unflatten(jax.tree.structure(shape), values)

  return simulated


def _evaluate(jaxpr, consts, arguments, operands, results):
  """Evaluates a program operation by operation."""
  known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
  for operation in jaxpr.eqns:
    values = [v.val if isinstance(v, Literal) else known[v] for v in operation.invars]
    name, parameters = operation.primitive.name, operation.params
    if name == 'platform_index':
      found = [_branch(parameters['platforms'])]
    elif name in _CALLS:
      found = _inner(parameters[_CALLS[name]], values, operands, results)
    elif name == 'cond' and isinstance(values[0], int):
      found = _inner(parameters['branches'][values[0]], values[1:], operands, results)
    else:
      found = operation.primitive.bind(*operands(operation, values), **parameters)
      found = results(found if operation.primitive.multiple_results else [found])
    known.update(zip(operation.outvars, found, strict=True))
  return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]


def _inner(program, *rest):
  """Evaluates a part of a program, with its constants if it has any."""
  return _evaluate(getattr(program, 'jaxpr', program), getattr(program, 'consts', ()), *rest)


def _branch(platforms):
  """Finds the position of CUDA's branch of `lax.platform_dependent`, or of the default, which is None."""
  return next(i for i, names in enumerate(platforms) if names is None or 'cuda' in names)
