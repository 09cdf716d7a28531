"""On a CPU every float32 product is exact enough; on a GPU or TPU only those that ask for it."""

import jax
from jax import lax


def assert_highest(function, *args):
  """Every product and convolution in `function` asks for the highest precision itself.

  That is what makes results independent of `jax_default_matmul_precision` (bfloat16 on a TPU, TF32 on
  a GPU), and it can be seen on any machine: in the program, not in the numbers.
  """
  found = list(_products(jax.make_jaxpr(function)(*args).jaxpr))
  assert found, 'no product found: the test would say nothing'
  for equation in found:
    precision = equation.params['precision']
    both = precision if isinstance(precision, tuple) else (precision,)
    assert all(p == lax.Precision.HIGHEST for p in both), equation


def _products(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
      yield equation
    for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
      if _is_jaxpr(value):
        yield from _products(getattr(value, 'jaxpr', value))


def _is_jaxpr(value):
  return hasattr(value, 'eqns') or hasattr(value, 'jaxpr')
