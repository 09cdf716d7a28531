"""The command line itself: help, settings, slips, Ctrl-C. What the commands do is tested beside each."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
import typing

import click
import numpy as np
import pytest

import patchcore_jax
from patchcore_jax import cli, settings
from patchcore_jax.banks import store
from patchcore_jax.cli import evaluate, fit, options, terminal
from patchcore_jax.detectors import DETECTORS, PatchCore
from tests import command, conftest, plates


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  root, rng = tmp_path_factory.mktemp('plates') / 'good', np.random.default_rng(0)
  for i in range(6):
    plates._draw(root / f'{i}.png', rng)
  return root


def _alone(*arguments, **environment):
  """Runs the command in a process of its own."""
  return subprocess.run(
      [sys.executable, '-m', 'patchcore_jax', *map(str, arguments)], capture_output=True, text=True,
      cwd=conftest.ROOT, env=os.environ | environment)


class TestHelp:

  def test_it_lists_the_commands(self):
    told = command.done('--help')
    assert all(f'  {name} ' in told for name in cli.COMMANDS)
    assert command.done('-h') == told

  def test_without_arguments_it_is_shown(self):
    result = command.run()
    assert result.code == 0 and 'Commands:' in result.out

  @pytest.mark.parametrize('name', cli.COMMANDS)
  def test_each_explains_itself(self, name):
    told = command.done(name, '--help')
    assert f'patchcore {name}' in told and max(map(len, told.splitlines())) <= 110

  def test_common_options_come_first(self):
    told = command.done('fit', '--help')
    positions = [told.index(text) for text in ('--out', '--ratio', '--resize', '--coreset-method', '--debug')]
    assert positions == sorted(positions)

  def test_the_methods_are_listed(self):
    told = ' '.join(command.done('fit', '--help').split())
    assert all(name in told for name in DETECTORS if name != 'ensemble')

  @pytest.mark.parametrize('name', ['fit', 'evaluate'])
  def test_only_options_of_the_chosen_method_are_shown(self, name):
    told, of_padim = (
        ' '.join(command.done(name, *chosen, '--help').split()) for chosen in ([], ['--detector', 'padim']))
    assert '--coreset-method' in told and '--padim-num-dims' not in told and '--detector NAME --help' in told
    assert '--coreset-method' not in of_padim and '--padim-num-dims' in of_padim
    assert all('--memory-gb' in shown for shown in (told, of_padim))

  def test_version(self):
    assert patchcore_jax.__version__ in command.done('--version')

  def test_python_m_is_the_same(self):
    alone = _alone('--help', COLUMNS='80')
    assert alone.returncode == 0 and alone.stdout.split() == command.done('--help').split()
    assert _alone('fti').stderr == command.refused('fti')

  def test_shell_completion(self, monkeypatch):
    monkeypatch.setenv('_PATCHCORE_COMPLETE', 'bash_source')
    assert 'complete -o' in command.run().out
    monkeypatch.setenv('_PATCHCORE_COMPLETE', 'bash_complete')
    for words, expected in (('patchcore pre', 'predict'), ('patchcore fit --rat', '--ratio'),
                            ('patchcore bank sh', 'shrink')):
      monkeypatch.setenv('COMP_WORDS', words)
      monkeypatch.setenv('COMP_CWORD', str(len(words.split()) - 1))
      assert expected in command.run().out


# By section: the records whose fields are flags. Fields that are records have sections of their own.
_OF_ALL = {
    'preprocess': settings.Preprocessing, 'data': settings.DataSpec, 'backbone': settings.BackboneSpec,
    'embedding': settings.EmbeddingSpec, 'coreset': settings.CoresetSpec, 'scoring': settings.ScoringSpec,
    'search': settings.SearchSpec, 'fit': settings.FitSpec, 'patchcore': PatchCore,
    **{name: kind for name, kind in DETECTORS.items() if name not in ('patchcore', 'ensemble')}}
_COMMANDS = {
    'fit': (fit.command, _OF_ALL | {'calibration': settings.CalibrationSpec}),
    'evaluate': (evaluate.command, _OF_ALL | {
        'metrics': settings.MetricsSpec, 'report': settings.ReportSpec})}
_LEFT_OUT = {
    # There are no masks, and the images are an argument.
    'fit': {'preprocess': {'mask_resize', 'mask_threshold'},
            'data': {'source', 'root', 'categories', 'good', 'shots', 'draw', 'labelled_defects', 'noise',
                     'multi_class'}},
    # --layout and an argument; banks of a measurement keep no images.
    'evaluate': {'data': {'source', 'root'}, 'fit': {'keep_images'}}}
_OTHER_DEFAULTS = {
    ('backbone', 'name'): 'auto', ('embedding', 'kind'): 'auto', ('fit', 'data', 'on_error'): 'skip',
    ('fit', 'patchcore', 'ratio'): 0.0,  # a bank that is large enough; experiments have the paper's ratios
    # All of each image, which needs no numbers; experiments keep the paper's crop.
    ('fit', 'preprocess', 'resize'): (), ('fit', 'preprocess', 'crop'): ()}


def _fields():
  """Yields (command, section, field) of all settings."""
  for name, (_, records) in _COMMANDS.items():
    for section, record in records.items():
      hints = typing.get_type_hints(record)
      for field in dataclasses.fields(record):
        if not dataclasses.is_dataclass(hints[field.name]):
          yield name, section, field


class TestFlagsAreTheSettings:

  @pytest.mark.parametrize('name, section, field', list(_fields()), ids=lambda v: getattr(v, 'name', v))
  def test_each_field_is_a_flag_with_its_default_and_explanation(self, name, section, field):
    by_name = {p.name: p for p in _COMMANDS[name][0].params}
    flag = by_name.get(f'{section}__{field.name}')
    if field.name in _LEFT_OUT[name].get(section, ()):
      assert flag is None
      return
    assert flag is not None and flag.opts == [f'--{options.flag_of(section, field.name)}']
    expected = _OTHER_DEFAULTS.get((name, section, field.name), _OTHER_DEFAULTS.get(
        (section, field.name), field.default))
    assert flag.type.convert(flag.default, flag, None) == expected
    explained = options.explanations(_COMMANDS[name][1][section])[field.name]
    assert len(explained) > 10 and flag.help.lower() == explained.lower()

  @pytest.mark.parametrize('name', cli.COMMANDS)
  def test_no_flag_means_two_things(self, name):
    parameters = getattr(cli.command.get_command(None, name), 'params', [])
    flags = list(itertools.chain.from_iterable(
        (*p.opts, *p.secondary_opts) for p in parameters if isinstance(p, click.Option)))
    assert len(flags) == len(set(flags))


class TestConfigFile:

  def test_its_values_are_taken_and_flags_go_before_them(self, good, tmp_path):
    file, out = tmp_path / 'part.toml', tmp_path / 'bank'
    file.write_text(textwrap.dedent(f'''
        out = "{out}"
        backbone = "tests.small:backbone"
        embedding-kind = "mean"
        coreset_projection_dim = 16
        ratio = 0.3
        resize = [64]
        crop = 56
        keep-images = false
        false-alarm-rate = 0.2
        folds = 2
        seed = 3
    '''))
    command.done('fit', good, '--config', file, '--ratio=0.5', '--batch-size=4')
    bank = store.restore(out)
    assert bank.description.settings['ratio'] == 0.5  # not the file's
    assert bank.description.settings['coreset']['projection_dim'] == 16
    assert bank.description.preprocessing == settings.Preprocessing(resize=(64,), crop=(56,))
    assert bank.description.calibration.false_alarm_rate == 0.2
    assert 'thumbnails' not in ' '.join(bank.arrays)

  @pytest.mark.parametrize('text, words', [
      ('ration = 0.3', "no option 'ration'; did you mean 'ratio'"),
      ('[coreset]\nmethod = "x"', "no option 'coreset'"), ('ratio = ', 'Invalid value'),
      ('ratio = "abc"', 'expected a number'), ('ratio = [0.1, 0.2]', 'expected a number'),
      ('batch-size = 4.5', 'expected a whole number'), ('crop = [true]', 'expected a whole number'),
      ('keep-images = "perhaps"', 'perhaps'), ('folds = 1', 'folds=1')])
  def test_mistakes_in_it(self, good, tmp_path, text, words):
    file = tmp_path / 'part.toml'
    file.write_text(text)
    told = command.refused('fit', good, '--out', tmp_path / 'bank', '--config', file)
    assert words in told and not (tmp_path / 'bank').exists()
    assert (str(file) in told) == ('no option' in words or 'Invalid' in words)  # the others name the flag

  def test_without_a_file(self, good, tmp_path):
    told = command.refused('fit', good, '--out', tmp_path / 'bank', '--config', tmp_path / 'none.toml')
    assert 'none.toml' in told and 'No such file' in told

  def test_what_the_help_shows_can_be_written_in_it(self):
    """A flag's default, as TOML, is its default."""
    for parameter in fit.command.params:
      if isinstance(parameter, options.Option) and isinstance(parameter.type, options._Kind):
        value = parameter.type.convert(parameter.default, parameter, None)
        if value is not None:
          text = f'v = {list(value)!r}' if isinstance(value, tuple) else f'v = {value!r}'
          assert parameter.type.convert(tomllib.loads(text)['v'], parameter, None) == value

  def test_parentheses_of_the_explanations_can_be_typed(self):
    crop = next(p for p in cli.command.get_command(None, 'fit').params if p.name == 'preprocess__crop')
    for typed, meant in (('()', ()), ('none', ()), ('(256,)', (256,)), ('320, 480', (320, 480))):
      assert crop.type.convert(typed, crop, None) == meant


# What is typed, and what the answer must hold; {good} is a folder of images, {new} nothing.
_SLIPS = {
    'fti {good}': "no command 'fti'; did you mean 'fit'",
    'frobnicate': 'There are fit, predict',
    'fit': "Missing argument 'GOOD'",
    'fit {good}': "Missing option '--out'",
    'fit {good} --out {new} --raito=0.1': "'--ratio'",
    'fit {good} --out {new} --ratio=abc': "expected a number, got 'abc'",
    'fit {good} --out {new} --crop=a,b': 'separated by commas',
    'fit {good} --out {new} --batch-size=2.5': 'expected a whole number',
    'fit {good} --out {new} --folds=1': 'folds=1',
    'fit {good} --out {new} --detector padmi': 'padim',
    'fit {good} --out {new} --detector padim --ratio=0.5': '--ratio is for --detector patchcore',
    'fit {good} --out {new} --spade-num-images=3': '--spade-num-images is for --detector spade',
    'fit {new} --out {new}': 'does not exist',
    'fit {good} --out {good}': 'is not overwritten',
    'fit {good} {good} --out {new}': '). Put a path with spaces, and a pattern, in quotes. See',
    'fit {good} --out {new} --false-alarm-rate=1': '1 % is 0.01',
    'predict {good} {good} --out {new}': '{good} is a folder, and no model: expected one that',
    'predict {new} {good} --out {new}': 'No model at',
    'predict {good}': "Missing argument 'IMAGES'",
    'serve {new}': 'No model at',
    'export {new} --out {new}': 'No model at',
    'bank': '',
    'bank explode {good}': "no command 'explode'. There are info",
    'bank info {new}': 'No model at',
    'bank append {new} {good}': 'No model at',
    'bank shrink {good}': "Missing option '--ratio'",
    'evaluate {new} --out {new}': '{new}',
    'evaluate {good} --out {new} --layout=visas': "'visa'"}


class TestSlips:

  def test_the_answer_is_one_line_that_helps(self, good, tmp_path):
    for typed, words in _SLIPS.items():
      arguments = typed.format(good=good, new=tmp_path / 'new').split()
      if words:
        assert words.format(good=good, new=tmp_path / 'new') in command.refused(*arguments), typed
      assert not (tmp_path / 'new').exists(), typed

  def test_an_error_of_the_system_is_said_in_words(self, capsys):
    for error in (PermissionError(13, 'Permission denied', 'parts'), ValueError('parts: Permission denied.')):
      with pytest.raises(SystemExit), terminal.readable_errors():
        raise error
      said = capsys.readouterr().err
      assert said.startswith('error: parts: Permission denied.') and said.count('\n') == 1

  def test_none_of_them_waits_for_an_import_of_jax(self, good, tmp_path):
    slips = [typed.format(good=good, new=tmp_path / 'new').split() for typed in _SLIPS]
    slips += [['--help'], ['--version'], *([name, '--help'] for name in cli.COMMANDS)]
    script = textwrap.dedent(f'''
        import sys
        from patchcore_jax import cli
        for slip in {slips!r}:
          try:
            cli.main(slip)
          except SystemExit:
            pass
          slow = [m for m in ('jax', 'flax', 'orbax', 'sklearn', 'scipy') if m in sys.modules]
          assert not slow, (slip, slow)
    ''')
    result = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, cwd=conftest.ROOT)
    assert result.returncode == 0, result.stderr.splitlines()[-1]

  @pytest.mark.parametrize('arguments', [['--help'], ['fti'], ['fit', 'nowhere', '--out=bank']])
  def test_it_comes_within_a_second(self, arguments):
    times = []
    for _ in range(3):
      began = time.monotonic()
      _alone(*arguments)
      times.append(time.monotonic() - began)
    assert min(times) < 1, times  # the others wait for what else the machine does


# A network whose every batch takes about half a second, and which says when it is first used.
_SLOW = '''
import dataclasses, os, pathlib
import jax, jax.numpy as jnp
from tests import small

def backbone():
  def apply(variables, images):
    maps = small.apply(variables, images)
    if 'BEGUN' not in os.environ:
      return maps
    pathlib.Path(os.environ['BEGUN']).touch()
    start = jnp.full((400, 400), images[0, 0, 0, 0])
    end = jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ x), start)
    return {k: v + 1e-20 * end[0, 0] for k, v in maps.items()}

  return dataclasses.replace(small.backbone(), apply=apply)
'''


def test_ctrl_c_leaves_nothing_and_says_so(good, tmp_path):
  (tmp_path / 'slow.py').write_text(_SLOW)
  work = tmp_path / 'work'
  work.mkdir()
  begun, out = tmp_path / 'begun', work / 'bank'
  arguments = [sys.executable, '-m', 'patchcore_jax', 'fit', str(good), '--out', str(out),
               *command.flags(backbone='slow:backbone', batch_size=1, folds=2)]
  environment = os.environ | {'PYTHONPATH': f'{tmp_path}{os.pathsep}{conftest.ROOT}'}
  process = subprocess.Popen(
      arguments, cwd=conftest.ROOT, env=environment | {'BEGUN': str(begun)}, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True)
  try:
    deadline = time.monotonic() + 120
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
      time.sleep(0.05)
    time.sleep(0.5)  # for the compiler
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 130, told
  assert told.startswith('error: interrupted.') and told.count('\n') == 1
  assert 'Nothing was written; the same command starts anew.' in told and list(work.iterdir()) == []
  again = subprocess.run(arguments, cwd=conftest.ROOT, env=environment, capture_output=True, text=True)
  assert again.returncode == 0 and store.restore(out).description.num_images == 6, again.stderr


@pytest.mark.parametrize('name', ['fit', 'bank', 'predict', 'serve', 'export'])
def test_binaries_that_are_gone_say_where_they_went(name):
  result = subprocess.run(
      [sys.executable, '-m', f'experiments.{name}', '--config=configs/own.py'], capture_output=True,
      text=True, cwd=conftest.ROOT)
  assert result.returncode == 2 and f'patchcore {name} ' in result.stderr and result.stderr.count('\n') == 1


def test_the_demo_is_that_of_the_config():
  from configs import demo as config
  from patchcore_jax.cli import demo
  assert config.get_config().coreset.ratios == demo._RATIOS
  assert config.get_config().backbone.name == demo._BACKBONE
