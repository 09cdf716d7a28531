r"""Runs every point of a config's sweep; what the points have in common is done once.

    python -m experiments.sweep --config=configs/resolution.py --config.data.root=PATH \
        --workdir=runs/resolution
    python -m experiments.sweep --config=configs/low_shot.py --only='shots=(1|5) .*detector=padim' ...
    python -m experiments.sweep --config=configs/low_shot.py --set='backbone.layers=' ...

A point of `config.sweep` is written as on the command line, without '--config.': fields and values,
separated by spaces. Its results are those of `experiments.mvtec` with these settings, in a folder of
WORKDIR with that name. Category by category, images are read and pass through the network once for all
points that agree on both; the feature maps lie in WORKDIR's disk in the meantime. Methods that train a
network see the images themselves. A sweep that was stopped goes on when the same command is given again.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments import cli, wiring
from patchcore_jax import backbones
from patchcore_jax.cli import terminal
from patchcore_jax.data.folder import Category
from patchcore_jax.evaluation import Settings
from patchcore_jax.evaluation.data import as_trained, load_categories, passed_by
from patchcore_jax.evaluation.experiment import Experiment
from patchcore_jax.evaluation.images import Features, Images
from patchcore_jax.evaluation.networks import create, resolved

cli.key_flags('config', 'workdir')

_ONLY = flags.DEFINE_string('only', '', 'Regular expression: run only the points in which it is found.')
_SET = flags.DEFINE_string(
    'set', '', "Fields to set in every point, over what it says itself: 'backbone.layers=' gives a network "
    'whose layers have other names its own in every point.')


def main(_) -> None:
  run(cli.CONFIG.value, cli.WORKDIR.value, only=_ONLY.value, over=_SET.value)


def run(config: ConfigDict, workdir: str | os.PathLike, *, only: str = '', over: str = '') -> None:
  """Runs the points of a sweep; `only` and `over` are what the flags --only and --set say.

  Raises:
    ValueError: a config without a sweep, a point that cannot be read, or as `mvtec.run`.
  """
  workdir = Path(workdir)
  names = [name for name in config.sweep if re.search(only, name)]
  if not names:
    raise ValueError(
        f'No point to run: config.sweep has {len(config.sweep)}, of which none matches --only={only!r}.')
  points = {name: resolved(wiring.settings(at_point(config, f'{name} {over}'))) for name in names}
  experiments = {
      name: Experiment(point, workdir / folder_name(name), terminal.listener())
      for name, point in points.items()}
  for experiment in experiments.values():
    experiment.claim()
  with terminal.progress_bar('built-in data') as progress:
    data = wiring.settings(config).data
    categories = load_categories(data, lambda done, total: progress('draw', done, total))
  groups = {}
  for name, experiment in experiments.items():
    groups.setdefault(_shared_settings(experiment.settings), []).append(name)
  terminal.say(
      f'{len(names)} points, {len(groups)} of other images or networks; {len(categories)} categories; '
      f'results in {workdir}')
  if line := passed_by(data):
    terminal.notice(f'{line}.')
  for group in groups.values():  # whose points share images: these are looked at once
    for category in categories:
      todo = [experiments[name] for name in group if not experiments[name].has(category.name)]
      for first in todo[:1]:
        first.check([category])
      for other in todo[1:]:
        other.notes[category.name] = todo[0].notes[category.name]
  for i, category in enumerate(categories):
    for group in groups.values():
      todo = [name for name in group if not experiments[name].has(category.name)]
      trained = as_trained(experiments[group[0]].settings.data, categories)[i]
      _run_group({name: experiments[name] for name in todo}, trained, workdir)


def _run_group(experiments: dict[str, Experiment], category: Category, workdir: Path) -> None:
  """Runs points that share images and a network, for one category."""
  features = None
  sharing = {name: e.settings for name, e in experiments.items() if not (
      e.settings.detector.trains or e.settings.detector.changes_images)}
  for name, experiment in experiments.items():
    terminal.say(f'{category.name} {name}')
    settings = experiment.settings
    images, networks = Images(settings, category), create(settings.backbone, settings.seed)
    if len(networks) == 1 and name in sharing and len(sharing) > 1:
      if features is None:
        features = _features(list(sharing.values()), category, workdir)
      images, networks = images.with_features(features), tuple(map(backbones.without_network, networks))
    experiment.evaluate(networks, images)


def _features(points: Sequence[Settings], category: Category, workdir: Path) -> Features:
  """Extracts the maps of all layers that any of the points needs."""
  first, *_ = points
  needed = {layer for p in points for network in create(p.backbone, p.seed) for layer in network.layers}
  (network,) = create(dataclasses.replace(first.backbone, layers=tuple(sorted(needed))), first.seed)
  everything = dataclasses.replace(first, data=dataclasses.replace(first.data, shots=0, noise=0.0))
  with terminal.progress_bar(category.name) as progress:
    return Features(network, Images(everything, category), workdir, progress)


def at_point(config: ConfigDict, point: str) -> ConfigDict:
  """Makes the config of a point: with its fields set, and no sweep.

  Raises:
    ValueError: a field that does not exist, or a value of another type.

  >>> config = ConfigDict({'sweep': (), 'data': {'shots': 0, 'names': ('a',)}})
  >>> point = at_point(config, 'data.shots=5 data.names=b,c')
  >>> point.data.shots, point.data.names
  (5, ('b', 'c'))
  """
  result = config.copy_and_resolve_references()
  result.sweep = ()
  for setting in point.split():
    field, equals, text = setting.partition('=')
    if not equals:
      raise ValueError(f'config.sweep: expected field=value, got {setting!r} in {point!r}.')
    try:
      before = result
      for part in field.split('.'):
        before = before[part]
      result.update_from_flattened_dict({field: _parsed(text, before)})
    except (KeyError, AttributeError, TypeError, ValueError) as e:
      raise ValueError(
          f'config.sweep: cannot set {setting!r} of the point {point!r} '
          f'({type(e).__name__}: {" ".join(str(e).split())}).') from e
  return result


def folder_name(point: str) -> str:
  """Names a point's folder.

  >>> folder_name('backbone.name=module:create data.shots=5')
  'backbone.name=module-create,data.shots=5'
  """
  return ','.join(re.sub(r'[^\w.,=+-]', '-', part) for part in point.split())


def _parsed(text, before):
  """Parses text to a value of the type that the field has."""
  if isinstance(before, tuple):
    items = [item for item in text.split(',') if item]
    number = _number if not before or not isinstance(before[0], str) else str
    return tuple(number(item) for item in items)
  if isinstance(before, bool):
    return {'True': True, 'False': False}[text]
  return type(before)(text) if before is not None else _number(text)


def _number(text):
  """Parses text to an int or a float where it is one."""
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text


def _shared_settings(point: Settings) -> tuple:
  """Picks what decides about feature maps, but for the layers."""
  network = dataclasses.replace(point.backbone, layers=())
  return network, point.preprocessing, point.seed, point.data.multi_class


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
