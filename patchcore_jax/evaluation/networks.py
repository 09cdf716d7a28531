"""The networks that settings name."""

import dataclasses
import functools
from collections.abc import Sequence

from patchcore_jax import backbones
from patchcore_jax.backbones import Backbone
from patchcore_jax.detectors import PatchCore
from patchcore_jax.evaluation.settings import Settings, network_names
from patchcore_jax.settings import BackboneSpec, embedding_for, weights_of_each

NO_NETWORK = 'none'  # what settings say of a method that takes none


def resolved(settings: Settings, networks: Sequence[Backbone] = ()) -> Settings:
  """Replaces what 'auto' leaves open by what it stands for on this machine now.

  A run that goes on later must not go on with another network, or another precision.

  Args:
    settings: may say 'auto' of the backbone, its precision, and the kind of embedding.
    networks: those to use, where they are at hand; () for those that the settings name.
  """
  detector = settings.detector
  if not detector.needs_network:
    if networks:
      raise ValueError(f'{detector.title} takes no networks, and {len(networks)} were given: expected none.')
    return dataclasses.replace(settings, backbone=BackboneSpec(NO_NETWORK))
  if networks:
    backbone = BackboneSpec(
        '+'.join(network.name for network in networks), layers=tuple(networks[0].layers),
        precision=networks[0].precision)
    own = any(network.source is None for network in networks)
  else:
    backbone, own = _named(settings.backbone), False
  if isinstance(detector, PatchCore) and detector.embedding.kind == backbones.AUTO:
    kinds = {'mean' if own else embedding_for(name) for name in network_names(backbone)}
    embedding = dataclasses.replace(detector.embedding, kind='mean' if 'mean' in kinds else 'adaptive')
    detector = dataclasses.replace(detector, embedding=embedding)
  return dataclasses.replace(settings, backbone=backbone, detector=detector)


def _named(backbone: BackboneSpec) -> BackboneSpec:
  """Replaces 'auto' in the name and the precision."""
  if backbone.name == backbones.AUTO:
    backbone = dataclasses.replace(backbone, name=backbones.best_available())
  precisions = {
      backbones.resolve_precision(backbone.precision, name) for name in network_names(backbone)}
  if len(precisions) == 1:  # not of an ensemble in which one brings its own
    backbone = dataclasses.replace(backbone, precision=precisions.pop())
  return backbone


def create(backbone: BackboneSpec, seed: int = 0) -> tuple[Backbone, ...]:
  """Creates the network, or several, whose names are joined by '+'.

  Args:
    backbone: the networks, or `NO_NETWORK` for none.
    seed: seed of random weights.

  Raises:
    ValueError: other numbers of networks and of files, besides what `backbones.create` raises.
  """
  if backbone.name == NO_NETWORK:
    return ()
  names = network_names(backbone)
  return tuple(
      _created(name, weights, backbone.layers, seed, backbone.precision)
      for name, weights in zip(names, weights_of_each(backbone.weights, len(names)), strict=True))


@functools.lru_cache(maxsize=4)
def _created(name, weights, layers, seed, precision):
  """Creates a backbone, and keeps it for sweeps that come back to it."""
  return backbones.create(name, weights=weights, layers=layers, seed=seed, precision=precision)
