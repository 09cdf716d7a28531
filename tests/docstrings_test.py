"""What can be said of all docstrings of the package."""

import ast
import re

import pytest

from tests import conftest

_FILES = sorted((conftest.ROOT / 'patchcore_jax').rglob('*.py'))
_FRAGMENT = re.compile(r'(Of|That|Those|These|Where|When|Whose|Which|With|By|For|In|From)\b')


@pytest.mark.parametrize('path', _FILES, ids=lambda p: str(p.relative_to(conftest.ROOT)))
def test_each_public_name_has_a_sentence(path):
  tree = ast.parse(path.read_text())
  assert ast.get_docstring(tree) or not tree.body, 'the module has none'
  inner = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
           for node in ast.walk(function) if node is not function}
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
      continue
    name, text = getattr(node, 'name', 'the module'), ast.get_docstring(node)
    assert not (text and _FRAGMENT.match(text)), f'{name} opens as a fragment: {text.splitlines()[0]}'
    if name[0] != '_' and node not in inner and isinstance(node, ast.FunctionDef | ast.ClassDef):
      assert text or _is_known(node, tree), f'{name} has no docstring'


@pytest.mark.parametrize('path', _FILES, ids=lambda p: str(p.relative_to(conftest.ROOT)))
def test_no_comment_opens_as_a_fragment(path):
  opened = re.findall(r'^ *# (?:Of|That|Those)\b.*', path.read_text(), re.MULTILINE)
  assert not opened


def _is_known(node, tree):
  """Whether it is a method, which may be told where its class or the one above it is."""
  return any(node in other.body for other in ast.walk(tree) if isinstance(other, ast.ClassDef))
