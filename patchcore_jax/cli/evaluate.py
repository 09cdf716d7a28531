"""`patchcore evaluate`: fits and measures a method on labelled data."""

import dataclasses
import difflib
from typing import Any

import click

from patchcore_jax.cli import interrupts, methods, options, terminal
from patchcore_jax.data.layouts import LAYOUTS
from patchcore_jax.detectors import Ensemble
from patchcore_jax.evaluation.settings import Settings
from patchcore_jax.settings import (
    BackboneSpec,
    DataSpec,
    FitSpec,
    MetricsSpec,
    Preprocessing,
    ReportSpec,
    SearchSpec,
)

# What --maps takes, beside the options of metrics.
_OF_MAPS = ('data', 'out', 'layout', 'maps', 'data__categories', 'data__good', 'report__regions',
            'seed', 'debug', 'compilation_cache')
_LAYOUTS = (*LAYOUTS, 'tfds')
_CONTINUES = 'Start the same command again to go on.'


def _layout(ctx, parameter, name):
  """Checks --layout."""
  if name in _LAYOUTS:
    return name
  near = difflib.get_close_matches(name, _LAYOUTS, 1)
  meant = f' Did you mean {near[0]!r}?' if near else ''
  raise click.BadParameter(f'expected one of {", ".join(_LAYOUTS)}, got {name!r}.{meant}')


@click.command('evaluate', cls=options.Command)
@click.argument('data')
@options.option('--out', required=True, metavar='DIR', group='Common', show_default=False,
                help='Folder for the results. A run in it that was stopped goes on.')
@options.option('--layout', default='folder', group='Common', metavar='NAME', callback=_layout,
                help=f"How the data lies on disk: {', '.join(_LAYOUTS)}; 'folder' is MVTec AD's.")
@options.of_record('data', DataSpec, group='Common', only=('categories',))
@options.option('--maps', default='', metavar='DIR', group='Common', show_default='fit a method',
                help='Anomaly maps to measure in the place of a method: a TIFF for each test image, at its '
                'size, laid out as the data (docs/anomaly_maps.md).')
@methods.common()
@options.of_record('patchcore', Settings, group='Common', only=('ratios',))
@options.of_record('preprocess', Preprocessing, group='Images')
@options.of_record('data', DataSpec, group='Images', without=('source', 'root', 'categories'))
@options.of_record('metrics', MetricsSpec, group='Results')
@options.of_record('report', ReportSpec, group='Results')
@options.of_record('fit', FitSpec, group='Resources', without=('keep_images',))
@options.of_record('search', SearchSpec, group='Resources')
@options.option('--seed', default=0, group='Resources', help='The seed of everything that is random.')
@methods.detailed
@options.several_machines
@options.common
def command(
    data: str, out: str, layout: str, maps: str, seed: int, debug: bool, compilation_cache: str,
    **values: Any) -> None:
  """Fit a method on the good training images of labelled data, and measure it on the test images.

  DATA is the folder of a data set, or of one category, such as mvtec/screw. DIR then holds results.csv (a row
  for each category and ratio), config.json, banks/, scores/ and report.html. Of --maps there are results.csv
  and scores/ only.
  """
  with terminal.readable_errors(debug):
    if maps:
      _measure_maps(maps, data, out, layout, seed, values)
      return
    settings = _settings(data, layout, seed, values)
    run(settings, out, compilation_cache, *(values[name] for name in terminal.DISTRIBUTED))


def run(settings: Settings, out: str, compilation_cache: str, *distributed: Any) -> list[dict[str, Any]]:
  """Measures, prints the table, and says where the report is.

  Args:
    settings: of the run.
    out: its workdir.
    compilation_cache: see `terminal.keep_compiled`.
    distributed: see `terminal.join_processes`.

  Returns:
    The rows of results.csv.
  """
  with interrupts.ends_at_once(f'error: interrupted. {_CONTINUES}'):
    terminal.keep_compiled(compilation_cache)
    terminal.join_processes(*distributed)
    from patchcore_jax import processes
    from patchcore_jax.evaluation import experiment
    from patchcore_jax.report import results

  try:
    rows = experiment.run(settings, out, listener=terminal.listener())
  except KeyboardInterrupt as e:
    raise terminal.Interrupted(_CONTINUES) from e
  if processes.is_first():
    results.print_table(rows)
    terminal.say(f'Curves, scores and images: {out}/report.html')
  processes.wait()
  return rows


def _measure_maps(
    maps: str, data: str, out: str, layout: str, seed: int, values: dict[str, Any]) -> None:
  """Measures maps of a folder, and prints the table; options of a method are refused."""
  from click.core import ParameterSource

  from patchcore_jax.evaluation import of_maps
  from patchcore_jax.evaluation.data import located
  from patchcore_jax.report import results

  context = click.get_current_context()
  needless = [
      parameter.opts[0] for parameter in context.command.params
      if parameter.name not in _OF_MAPS and not parameter.name.startswith('metrics__')
      and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE]
  if needless:
    raise ValueError(f'{", ".join(needless)}: --maps measures maps that are there. Leave it out.')
  spec = options.record(MetricsSpec, 'metrics', values)
  if context.get_parameter_source('metrics__protocol') is not ParameterSource.COMMANDLINE:
    spec = dataclasses.replace(spec, protocol='original')
  rows = of_maps.run(
      maps, located(options.record(DataSpec, 'data', values, source=layout, root=data)), spec, out,
      regions=values['report__regions'], seed=seed, say=terminal.say, notice=terminal.notice)
  results.print_table(rows)


def _settings(data: str, layout: str, seed: int, values: dict[str, Any]) -> Settings:
  """Makes the record of all settings; what is wrong with the data is said here, before JAX is imported."""
  from patchcore_jax.evaluation.data import located

  detector = methods.detector_of(values)
  return Settings(
      located(options.record(DataSpec, 'data', values, source=layout, root=data)),
      detector.member if isinstance(detector, Ensemble) else detector, values['patchcore__ratios'],
      options.record(Preprocessing, 'preprocess', values), options.record(BackboneSpec, 'backbone', values),
      options.record(SearchSpec, 'search', values), options.record(FitSpec, 'fit', values),
      metrics=options.record(MetricsSpec, 'metrics', values),
      report=options.record(ReportSpec, 'report', values), seed=seed)
