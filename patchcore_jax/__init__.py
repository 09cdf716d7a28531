"""PatchCore industrial anomaly detection in JAX: pure functions over arrays and pytrees."""

import importlib

__version__ = '0.1.0'

# Modules by the short names that others rely on; imported when they are asked for.
_MODULES = {
    'coreset': 'search.coreset', 'neighbors': 'search.neighbors', 'metrics': 'metrics'}


def __getattr__(name: str):
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return importlib.import_module(f'{__name__}.{_MODULES[name]}')
