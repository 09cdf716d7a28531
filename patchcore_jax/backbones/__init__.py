"""Frozen networks, which turn images into feature maps by layer.

`create` finds one by name. A network of your own is any `Backbone` record, for example from a function
`factory()` in `module.py`, named as 'module:factory'. A new family of networks is one file with one
`Family` record, and one line of `registry.FAMILIES`. `checkpoints` has the records of published weights.

Everything is imported when it is first used, so that those records can be read without JAX.
"""

import importlib

_PLACES = {
    **dict.fromkeys(('Backbone', 'FeatureMaps', 'computed_elsewhere', 'fingerprint', 'normalize',
                     'without_network'), 'backbone'),
    'Family': 'family',
    **dict.fromkeys(('AUTO', 'RANDOM', 'best_available', 'create', 'input_multiple', 'resolve_precision'),
                    'registry')}

__all__ = [
    'AUTO', 'RANDOM', 'Backbone', 'Family', 'FeatureMaps', 'best_available', 'checkpoints',
    'computed_elsewhere', 'create', 'fingerprint', 'input_multiple', 'normalize', 'resolve_precision',
    'without_network']


def __getattr__(name: str):
  if name in _PLACES:
    return getattr(importlib.import_module(f'{__name__}.{_PLACES[name]}'), name)
  if name == 'checkpoints':
    return importlib.import_module(f'{__name__}.checkpoints')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
