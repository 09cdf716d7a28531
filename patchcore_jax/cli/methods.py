"""Options that choose a method and its networks, for the commands that fit."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import click

from patchcore_jax import detectors
from patchcore_jax.cli import options
from patchcore_jax.detectors import DETECTORS, Detector, Ensemble, PatchCore
from patchcore_jax.evaluation.settings import network_names
from patchcore_jax.settings import BackboneSpec, CoresetSpec, EmbeddingSpec, ScoringSpec, weights_of_each

_SECTIONS = {'embedding': EmbeddingSpec, 'coreset': CoresetSpec, 'scoring': ScoringSpec}
_OTHERS = tuple(name for name in DETECTORS if name not in ('patchcore', 'ensemble'))


def common(**defaults: Any) -> Callable:
  """Makes a decorator that adds --detector, --ratio and --backbone, which most users look for first.

  Args:
    **defaults: in place of those of `PatchCore`.
  """
  names = ', '.join(name for name in DETECTORS if name != 'ensemble')

  def decorated(function):
    for decorate in (
        options.of_record(
            'backbone', BackboneSpec, group='Common', only=('name',), defaults={'name': 'auto'}),
        options.of_record('patchcore', PatchCore, group='Common', only=('ratio',), defaults=defaults),
        options.option('--detector', default='patchcore', group='Common', metavar='NAME', is_eager=True,
                       help=f"The method: {names}; or 'module:Record' for one of your own.")):
      function = decorate(function)
    return function

  return decorated


def detailed(function: Callable) -> Callable:
  """Adds the other options of the network and of every method, in groups of their own."""
  for name in reversed(_OTHERS):
    kind = detectors.find(name)
    function = options.of_record(name, kind, group=kind.title, method=name)(function)
  for section, kind in reversed(_SECTIONS.items()):
    defaults = {'kind': 'auto'} if section == 'embedding' else {}
    function = options.of_record(
        section, kind, group=PatchCore.title, method=PatchCore.name, defaults=defaults)(function)
  return options.of_record('backbone', BackboneSpec, group='Network', without=('name',))(function)


def detector_of(values: Mapping[str, Any]) -> Detector:
  """Makes the method with its settings; an ensemble of it where --backbone names several networks.

  Args:
    values: those of all options of the command.

  Raises:
    click.UsageError: a setting of another method, which would have no effect.
    ValueError: an unknown method, or values out of range.
  """
  name = values['detector']
  kind = detectors.find(name)
  sections = ('patchcore', *_SECTIONS) if kind is PatchCore else (name,)
  _refuse_others(sections)
  if kind is PatchCore:
    specs = {section: options.record(spec, section, values) for section, spec in _SECTIONS.items()}
    detector = PatchCore(values['patchcore__ratio'], **specs)
  else:
    detector = options.record(kind, name, values)
  if not detector.needs_network:
    _refuse_backbone(name)
    return detector
  if '+' not in values['backbone__name']:
    return detector
  if kind is PatchCore and not detector.ratio:  # the banks of an ensemble are of one ratio
    detector = dataclasses.replace(detector, ratio=PatchCore.ratio)
  return Ensemble(detector)


def _refuse_backbone(name):
  """Refuses options of a network that were given for a method that takes none."""
  context = click.get_current_context()
  for parameter in context.command.params:
    given = context.get_parameter_source(parameter.name) is not click.core.ParameterSource.DEFAULT
    if (parameter.name or '').startswith('backbone__') and given:
      raise click.UsageError(
          f'{parameter.opts[0]} has no effect: {name} takes no pretrained network.', context)


def _refuse_others(sections):
  """Refuses options that were given but belong to another method."""
  context = click.get_current_context()
  for parameter in context.command.params:
    section, _, field = (parameter.name or '').partition('__')
    of_a_method = section in ('patchcore', *_SECTIONS, *_OTHERS)
    given = context.get_parameter_source(parameter.name) is not click.core.ParameterSource.DEFAULT
    if field and of_a_method and section not in sections and given:
      owner = section if section in _OTHERS else 'patchcore'
      raise click.UsageError(
          f'{parameter.opts[0]} is for --detector {owner}, and the method is {context.params["detector"]}.',
          context)


def networks_of(values: Mapping[str, Any], seed: int) -> tuple:
  """Makes the networks that --backbone names, joined by '+' where there are several.

  Raises:
    ValueError: other numbers of networks and of files, besides what `backbones.create` raises.
  """
  from patchcore_jax import backbones

  spec = options.record(BackboneSpec, 'backbone', values)
  if not detectors.find(values['detector']).needs_network:
    return ()
  if spec.name == backbones.AUTO and not spec.weights:  # `terminal.say_which` says what a log would
    spec = dataclasses.replace(spec, name=backbones.checkpoints.best_installed())
  names = network_names(spec)
  return tuple(
      backbones.create(name, weights=weights, layers=spec.layers, seed=seed, precision=spec.precision)
      for name, weights in zip(names, weights_of_each(spec.weights, len(names)), strict=True))
