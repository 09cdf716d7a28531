"""What every binary shares: flags, errors as one readable line, progress bars."""

import contextlib
import hashlib
import os
import platform
import sys
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from patchcore_jax import backbones, processes
from patchcore_jax.backbones import checkpoints

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, for example configs/demo.py. Each of its fields is a flag too, as in '
    '--config.data.root=PATH; configs/default.py explains them.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for results, banks and the config.')
BANK = flags.DEFINE_string('bank', None, 'A bank, the folder that experiments.fit makes.')
IMAGES = flags.DEFINE_string(
    'images', None, "A folder of images, a file, or a pattern such as 'parts/**/*.png'.")
OUT = flags.DEFINE_string('out', None, 'Folder for what is made.')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Images at once.', lower_bound=1)
WEIGHTS = flags.DEFINE_string(
    'backbone_weights', '', "The file of the network's weights, where it lies elsewhere than at the fit.")
flags.DEFINE_bool('debug', False, 'Show the whole trace of an error.')
flags.DEFINE_bool(
    'distributed', False, 'This is one of several processes, on several machines: Slurm, Open MPI or the TPU '
    'pod tells which. Elsewhere the next three flags do.')
_COMPILED = flags.DEFINE_string(
    'compilation_cache', 'auto', 'Folder of compiled programs, which spares the next run compiling them: '
    "'auto' for one in the user's cache folder (or JAX_COMPILATION_CACHE_DIR), 'off' for none.")
flags.DEFINE_string('coordinator_address', None, 'Of the first process, as 10.0.0.1:1234.')
flags.DEFINE_integer('num_processes', None, 'Of all machines.', lower_bound=1)
flags.DEFINE_integer('process_id', None, 'From 0, which is the one at the address.', lower_bound=0)
_WORTH_KEEPING = 0.3  # seconds that compiling took; shorter ones would fill the disk with files
OF_SEVERAL_PROCESSES = ('distributed', 'coordinator_address', 'num_processes', 'process_id')
flags.disclaim_key_flags()  # `key_flags` is for the module that calls it

console = Console(highlight=False, soft_wrap=True)  # the first of several processes prints
notices = Console(highlight=False, soft_wrap=True)  # all of them print


def key_flags(*names: str) -> None:
  """Declares flags of this module that --help of the calling one explains, besides its own."""
  for name in (*names, 'compilation_cache', 'debug'):
    flags.declare_key_flag(name)


def run(main, *, arguments: bool = False, distributed: bool = False) -> None:
  """Runs `main(argv)` under absl. A mistake of the user is one line and exit code 1.

  Args:
    main: the binary.
    arguments: whether it takes any besides flags.
    distributed: whether it can be one of several processes.
  """
  app.run(lambda argv: _guarded(main, argv, arguments, distributed), flags_parser=_parse_flags)


@contextlib.contextmanager
def progress_bar(title: str):
  """Yields `update(stage, done, total)`: bars with time left, or lines where there is no terminal."""
  if not console.is_terminal:
    yield _plain_progress(title)
    return
  columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
             TimeRemainingColumn(elapsed_when_finished=True))
  with Progress(*columns, console=console) as bars:
    tasks = {}

    def update(stage, done, total):
      if stage not in tasks:
        tasks[stage] = bars.add_task(f'{title}: {stage}')
      bars.update(tasks[stage], completed=done, total=total)

    yield update


def _plain_progress(title, every_seconds=30.0):
  """Makes an `update` that prints a line when a stage ends, and now and then while it lasts."""
  began = said = time.monotonic()  # a stage begins where the one before ended

  def update(stage, done, total):
    nonlocal began, said
    now = time.monotonic()
    if done >= total:
      console.print(f'{title}: {stage} {done}/{total}, {now - began:.1f} s')
      began = said = now
    elif now - said >= every_seconds:
      left = (now - began) * (total - done) / done
      console.print(f'{title}: {stage} {done}/{total}, about {left:.0f} s left')
      said = now

  return update


def say_which(backbone_name: str) -> None:
  """Says so where a backbone is not the best choice."""
  if backbone_name.endswith(f'.{backbones.RANDOM}'):
    console.print('[bold]RANDOM WEIGHTS: these numbers do not show what PatchCore can do.[/bold]')
  if backbone_name == checkpoints.BUILT_IN:
    console.print(
        'It comes with this package and was trained on drawn images only. ImageNet weights are the '
        f'better choice where they can be had: --config.backbone.name={checkpoints.PREFERRED}')


def keep_compiled(folder: str) -> None:
  """Has JAX keep the programs that it compiles, for this and later processes.

  A damaged entry is compiled anew. Programs for a CPU are for one kind of it, so each kind has a folder of
  its own. Where the user's cache folder cannot be written to, nothing is kept.

  Args:
    folder: as the flag has it.

  Raises:
    ValueError: a folder that was named cannot be made.
  """
  if folder == 'off' or folder == 'auto' and jax.config.jax_compilation_cache_dir:
    return
  named = folder != 'auto'
  if not named:
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(base, 'patchcore_jax', 'compiled', f'jax-{jax.__version__}-{_kind_of_cpu()}')
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError as e:
    if named:
      raise ValueError(
          f"--compilation_cache={folder}: {e.strerror or e}. Name another folder, or 'off' for none.") from e
    return
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', _WORTH_KEEPING)


def _kind_of_cpu():
  """Names the kind of this CPU by a digest of what it can do."""
  try:
    with open('/proc/cpuinfo') as f:
      abilities = next((line for line in f if line.startswith(('flags', 'Features'))), '')
  except OSError:
    abilities = ''
  return hashlib.sha256((platform.machine() + platform.processor() + abilities).encode()).hexdigest()[:8]


def _join_processes(distributed):
  """Joins the processes that the flags tell of, before anything else asks JAX."""
  wanted, *named = (flags.FLAGS[name].value for name in OF_SEVERAL_PROCESSES)
  if not wanted and named == [None, None, None]:
    return
  if not distributed:
    raise ValueError(
        'This binary runs on one machine: leave out --distributed, --coordinator_address, --num_processes '
        'and --process_id. experiments.mvtec and experiments.fit take them.')
  if not wanted and None in named:
    raise ValueError('Expected --coordinator_address, --num_processes and --process_id together.')
  try:
    jax.distributed.initialize(*named)
  except ValueError as e:
    raise ValueError(
        f'Nothing tells which process this is ({e}) Outside of Slurm, Open MPI and TPU pods give '
        '--coordinator_address, --num_processes and --process_id.') from e
  console.quiet = not processes.is_first()


def _guarded(main, argv, arguments, distributed):
  """Runs `main(argv)`, and turns errors that a user can mend into one line."""
  if not flags.FLAGS['verbosity'].present:  # Orbax tells every step at the default level
    logging.set_verbosity(logging.WARNING)
  if len(argv) > 1 and not arguments:
    _fail(f'Unexpected arguments {argv[1:]}: fields are set as --config.data.root=PATH.')
  try:
    keep_compiled(_COMPILED.value)
    _join_processes(distributed)
    return main(argv)
  except KeyboardInterrupt:
    _fail('interrupted. Start the same command again to go on.', code=130)
  except (ValueError, OSError) as e:
    if flags.FLAGS.debug:
      raise
    _fail(str(e) or type(e).__name__)
  except jax.errors.JaxRuntimeError as e:
    if flags.FLAGS.debug or 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    _fail(f'out of memory: lower --config.data.batch_size. ({str(e).splitlines()[0]})')


def _parse_flags(argv):
  """Parses the flags, and turns errors in the config into one line."""
  for arg in argv:
    if arg.startswith('--config='):
      path = arg.partition('=')[2].partition(':')[0]
      if not os.path.isfile(path):
        _fail(f'No config file {path}: expected for example --config=configs/demo.py.')
  try:
    return app.parse_flags_with_usage(argv)
  # ml_collections raises these for fields that do not exist and values of another type.
  except (KeyError, AttributeError, TypeError, ValueError) as e:
    if '--debug' in argv:
      raise
    message = str(e.args[0] if isinstance(e, KeyError) and e.args else e)
    _fail('in the config: ' + ' '.join(message.split()))


def _fail(message, code=1):
  """Prints an error and ends the process."""
  several = jax.distributed.is_initialized()
  who = f'process {jax.process_index()}: ' if several else ''
  if several and 'closed by peer' in message:
    message = f'another process ended, and has said why. ({message})'
  print(f'error: {who}{message}', file=sys.stderr, flush=True)
  if several:
    os._exit(code)  # an orderly exit would wait for the others, and they for this one
  sys.exit(code)
