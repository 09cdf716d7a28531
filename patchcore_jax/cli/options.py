"""Settings records -> options of a command: a flag for each field, explained, with its default.

A few have short names; the others are called by their section and field, as --coreset-method. A TOML file
given by --config has the same names.
"""

import dataclasses
import difflib
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

# Flags that are called otherwise than by section and field.
_NAMES = {
    'data-batch-size': 'batch-size', 'data-num-workers': 'workers', 'data-on-error': 'on-error',
    'data-good': 'good', 'data-labelled-defects': 'labelled-defects', 'data-noise': 'noise',
    'data-multi-class': 'multi-class',
    'data-shots': 'shots', 'data-draw': 'draw', 'data-categories': 'categories', 'data-source': 'layout',
    'preprocess-resize': 'resize', 'preprocess-resize-side': 'resize-side', 'preprocess-pad': 'pad',
    'preprocess-crop': 'crop', 'preprocess-value-range': 'value-range', 'preprocess-bands': 'bands',
    'preprocess-background': 'background', 'data-max-megapixels': 'max-megapixels',
    'backbone-name': 'backbone', 'backbone-layers': 'layers', 'backbone-precision': 'precision',
    'fit-memory-gb': 'memory-gb', 'fit-keep-images': 'keep-images',
    'calibration-false-alarm-rate': 'false-alarm-rate', 'calibration-folds': 'folds',
    'patchcore-ratio': 'ratio', 'patchcore-ratios': 'ratios', 'report-gallery': 'gallery',
    'report-errors': 'keep-errors', 'report-maps': 'write-maps', 'metrics-protocol': 'protocol',
    'report-regions': 'regions', 'metrics-resamples': 'resamples',
    'metrics-max-fpr': 'max-fpr', 'metrics-connectivity': 'connectivity',
    'scoring-image-score': 'image-score', 'scoring-foreground': 'foreground',
    'embedding-rotations': 'rotations'}


class Command(click.Command):
  """A command whose help has its options in groups, common ones first; of methods, only the chosen one's."""

  def format_options(self, ctx, formatter):
    groups, of_others = {}, False
    chosen = {p.name: p.default for p in self.params} | ctx.params  # --help may come before --detector
    for parameter in self.get_params(ctx):
      method = getattr(parameter, 'method', '')
      if method and method != chosen['detector']:
        of_others = True
        continue
      record = parameter.get_help_record(ctx)
      if record is not None and isinstance(parameter, click.Option):
        groups.setdefault(getattr(parameter, 'group', 'Options'), []).append(record)
    for title, rows in groups.items():
      with formatter.section(title):
        formatter.write_dl(rows)
    if of_others:
      formatter.write_paragraph()
      formatter.write_text(
          f'The options of another method are shown by {ctx.command_path} --detector NAME --help.')


class Group(click.Group):
  """A command with subcommands, in the order of their definition; an unknown one gets a suggestion."""

  def list_commands(self, ctx):
    return list(self.commands)

  def resolve_command(self, ctx, args):
    known = self.list_commands(ctx)
    if args[0] not in known:
      near = difflib.get_close_matches(args[0], known, 1)
      raise click.UsageError(f'There is no command {args[0]!r}' + (
          f'; did you mean {near[0]!r}?' if near else f'. There are {", ".join(known)}.'), ctx)
    return super().resolve_command(ctx, args)


class Option(click.Option):
  """An option that belongs to a group of the help, and perhaps to one `method` that --detector chooses."""

  def __init__(self, *args, group: str = 'Options', method: str = '', **kwargs):
    super().__init__(*args, **kwargs)
    self.group, self.method = group, method


def option(*names: str, group: str = 'Options', **arguments) -> Callable:
  """Adds an option in a group of the help; arguments are those of `click.option`."""
  return click.option(*names, cls=Option, group=group, show_default=arguments.pop('show_default', True),
                      **arguments)


def of_record(
    section: str, record: type, *, group: str, method: str = '', only: Sequence[str] = (),
    without: Sequence[str] = (),
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
    shown: Mapping[str, str] = types.MappingProxyType({})) -> Callable:
  """Adds an option for each field of a settings record.

  Args:
    section: as config files call it; begins the flag's name.
    record: a dataclass whose docstring explains its attributes.
    group: title in the help.
    method: the one whose options they are, '' where all methods have them.
    only: the fields that count; () for all.
    without: fields that do not.
    defaults: other defaults than the record's.
    shown: what the help says of a default, where its value does not say it.
  """
  explained, hints = explanations(record), typing.get_type_hints(record)

  def decorate(function):
    for field in reversed(dataclasses.fields(record)):
      nested = dataclasses.is_dataclass(hints[field.name])
      if only and field.name not in only or field.name in without or nested:
        continue
      default = defaults.get(field.name, field.default)
      flag, kind = flag_of(section, field.name), _Kind(hints[field.name])
      names = (f'--{flag}/--no-{flag}',) if kind.kind is bool else (f'--{flag}',)
      function = option(
          *names, f'{section}__{field.name}', group=group, method=method,
          type=None if kind.kind is bool else kind,
          default=default if kind.kind is bool else kind.written(default),
          show_default=shown.get(field.name, True),
          help=explained[field.name][:1].upper() + explained[field.name][1:])(function)
    return function

  return decorate


def flag_of(section: str, field: str) -> str:
  """Names the flag of a field.

  >>> flag_of('coreset', 'projection_dim'), flag_of('backbone', 'name')
  ('coreset-projection-dim', 'backbone')
  """
  name = f'{section}-{field}'.replace('_', '-')
  return _NAMES.get(name, name)


def record(kind: type, section: str, values: Mapping[str, Any], **more) -> Any:
  """Makes the settings record of a section from the values of all options."""
  known = {f.name for f in dataclasses.fields(kind)} - more.keys()
  given = {k: values[f'{section}__{k}'] for k in known if f'{section}__{k}' in values}
  return kind(**given, **more)


def explanations(record: type) -> dict[str, str]:
  """Finds what the docstring of a settings record, or of what it is derived from, says of each attribute.

  >>> from patchcore_jax.settings import MetricsSpec
  >>> explanations(MetricsSpec)['connectivity']
  "that of AUPRO's regions, 8 or 4."
  """
  found, names = {}, []
  for base in reversed(record.__bases__):
    found |= explanations(base) if dataclasses.is_dataclass(base) else {}
  block = re.search(r'\nAttributes:\n(.*?)(?=\n\n\S|\Z)', inspect.getdoc(record), re.DOTALL)
  for line in block[1].splitlines() if block else ():
    if match := re.match(r'  (\w+(?:, \w+)*): (.*)', line):
      names = match[1].split(', ')
      found |= dict.fromkeys(names, match[2])
    elif line.startswith('    '):
      found |= {name: f'{found[name]} {line.strip()}' for name in names}
  return found


class _Kind(click.ParamType):
  """Values of one type; several in a tuple are separated by commas, and '' or 'none' is none.

  A tuple may have its parentheses, as the records' explanations write it: '()', '(256,)'.
  """

  def __init__(self, hint):
    self.several = typing.get_origin(hint) is tuple
    arguments = [a for a in typing.get_args(hint) if a not in (type(None), Ellipsis)]
    self.optional = type(None) in typing.get_args(hint)
    self.kind = arguments[0] if arguments else hint
    self.name = {int: 'integer', float: 'number', str: 'text'}.get(self.kind, 'value')
    if self.several:
      self.name += ',...'

  def convert(self, value, param, ctx):
    if value is None or isinstance(value, tuple):
      return value
    if not isinstance(value, str):  # from a TOML file: read as on the command line
      value = ','.join(map(str, value)) if isinstance(value, list) else str(value)
    if self.several and value.startswith('(') and value.endswith(')'):
      value = value[1:-1]
    if value in ('', 'none') and (self.several or self.optional):
      return () if self.several else None
    try:
      if self.several:
        return tuple(self.kind(part.strip()) for part in value.split(',') if part.strip())
      return self.kind(value)
    except ValueError:
      what = {int: 'a whole number', float: 'a number'}.get(self.kind, 'a value')
      several = ', or several separated by commas' if self.several else ''
      self.fail(f'expected {what}{several}, got {value!r}.')

  def written(self, value) -> str:
    """Writes a value as it is given on the command line."""
    return ','.join(map(str, value)) if isinstance(value, tuple) else '' if value is None else str(value)


def config_file(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
  """Takes defaults of the options from a TOML file, for the eager option --config.

  Raises:
    click.BadParameter: a file that cannot be read, or a name that is no option.
  """
  if path is None:
    return
  try:
    with open(path, 'rb') as f:
      values = tomllib.load(f)
  except (OSError, tomllib.TOMLDecodeError) as e:
    raise click.BadParameter(f'{path}: {getattr(e, "strerror", None) or e}.') from e
  names = {
      name.removeprefix('--'): p.name for p in ctx.command.params if isinstance(p, click.Option)
      for name in p.opts}
  defaults = {}
  for key, value in values.items():
    flag = key.replace('_', '-')
    if flag not in names:
      near = difflib.get_close_matches(flag, names, 1)
      raise click.BadParameter(
          f'{path}: there is no option {key!r}' + (f'; did you mean {near[0]!r}?' if near else '.'))
    defaults[names[flag]] = value
  ctx.default_map = {**(ctx.default_map or {}), **defaults}


def several_machines(function: Callable) -> Callable:
  """Adds the options of a command that can be one of several processes (`terminal.join_processes`)."""
  for decorate in (
      option('--process-id', type=click.IntRange(min=0), group='Several machines', show_default=False,
             help='The number of this process, from 0, which is the one at the address.'),
      option('--num-processes', type=click.IntRange(min=1), group='Several machines', show_default=False,
             help='The number of processes on all machines.'),
      option('--coordinator-address', group='Several machines', show_default=False, metavar='HOST:PORT',
             help='The address of the first process, such as 10.0.0.1:1234.'),
      option('--distributed', is_flag=True, group='Several machines', show_default=False,
             help='This is one of several processes, of which Slurm, Open MPI or the TPU pod tells; '
             'elsewhere the next three options do.')):
    function = decorate(function)
  return function


def common(function: Callable) -> Callable:
  """Adds the options that every command has."""
  for decorate in (
      click.option('--debug', is_flag=True, help='Show the whole trace of an error.', cls=Option,
                   group='General'),
      option('--compilation-cache', default='auto', group='General', metavar='FOLDER',
             help="Folder of compiled programs, which spares the next run compiling them: 'auto' is one in "
             "the user's cache folder, 'off' keeps none."),
      option('--config', 'config', is_eager=True, expose_value=False, callback=config_file, metavar='FILE',
             show_default=False, group='General', help='TOML file with these options, by their names.')):
    function = decorate(function)
  return function
