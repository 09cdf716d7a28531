"""Frozen networks, which turn images into feature maps by layer.

`create` finds one by name. A network of your own is any `Backbone` record, for example from a function
`factory()` in `module.py`, named as 'module:factory'. A new family of networks is one file with one
`Family` record, and one line of `registry.FAMILIES`.
"""

from patchcore_jax.backbones.backbone import (
    Backbone,
    FeatureMaps,
    computed_elsewhere,
    fingerprint,
    normalize,
    without_network,
)
from patchcore_jax.backbones.family import Family
from patchcore_jax.backbones.registry import (
    AUTO,
    RANDOM,
    best_available,
    create,
    resolve_precision,
)

__all__ = [
    'AUTO', 'RANDOM', 'Backbone', 'Family', 'FeatureMaps', 'best_available', 'computed_elsewhere', 'create',
    'fingerprint', 'normalize', 'resolve_precision', 'without_network']
