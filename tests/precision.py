"""On a CPU every float32 product is exact enough; on a GPU or TPU only those that ask for it."""

import re
from typing import NamedTuple

import jax
from jax import export, lax


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
    if equation.primitive.name == 'pallas_call':
      continue  # a kernel names an algorithm, which no default changes
    if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
      yield equation
    for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
      if _is_jaxpr(value):
        yield from _products(getattr(value, 'jaxpr', value))


def _is_jaxpr(value):
  return hasattr(value, 'eqns') or hasattr(value, 'jaxpr')


class Operation(NamedTuple):
  """A product or convolution of a lowered program.

  Attributes:
    name: 'dot_general' or 'convolution'.
    operands, result: element types, as 'f32' or 'bf16'.
    precision: 'DEFAULT', 'HIGH' or 'HIGHEST', of both operands.
  """

  name: str
  operands: tuple[str, ...]
  result: str
  precision: str


def lowered(function, *args, platform: str) -> list[Operation]:
  """The products and convolutions of `function` as a device of another kind is given them: 'cuda', 'tpu'."""
  program = export.export(jax.jit(function), platforms=(platform,))(*args).mlir_module()
  found = []
  for line in program.splitlines():
    name = re.search(r'stablehlo\.(convolution|dot_general)\b', line)
    if name:
      *operands, result = re.findall(r'tensor<(?:\d+x)*(\w+)>', line.rpartition(' : ')[2])
      precisions = set(re.findall(r'\b(DEFAULT|HIGHEST|HIGH)\b', line)) or {'DEFAULT'}
      assert len(operands) == 2 and len(precisions) == 1, line
      found.append(Operation(name[1], tuple(operands), result, precisions.pop()))
  assert found, 'no product found: the test would say nothing'
  return found
