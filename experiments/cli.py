"""What the binaries share: flags, and absl's way of starting. `patchcore_jax.cli.terminal` has the rest."""

import os

from absl import app, flags, logging
from ml_collections import config_flags

from patchcore_jax.backbones import checkpoints
from patchcore_jax.cli import terminal

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, for example configs/demo.py. Each of its fields is a flag too, as in '
    '--config.data.root=PATH; configs/default.py explains them.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for results, banks and the config.')
BANK = flags.DEFINE_string('bank', None, 'A bank, the folder that `patchcore fit` makes.')
IMAGES = flags.DEFINE_string(
    'images', None, "A folder of images, a file, or a pattern such as 'parts/**/*.png'.")
ROOT = flags.DEFINE_string(
    'root', '', "Folder of categories in MVTec's layout; the built-in data without it.")
NETWORKS = flags.DEFINE_list(
    'networks', [checkpoints.BUILT_IN, checkpoints.OFFLINE], 'Names of pretrained weights.')
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
flags.disclaim_key_flags()  # `key_flags` is for the module that calls it


def key_flags(*names: str) -> None:
  """Declares flags of this module that --help of the calling one explains, besides its own."""
  for name in (*names, 'compilation_cache', 'debug'):
    flags.declare_key_flag(name)


def run(main, *, distributed: bool = False) -> None:
  """Runs `main(argv)` under absl. A mistake of the user is one line and exit code 1.

  Args:
    main: the binary.
    distributed: whether it can be one of several processes.
  """
  app.run(lambda argv: _guarded(main, argv, distributed), flags_parser=_parse_flags)


def _guarded(main, argv, distributed):
  """Runs `main(argv)`, and turns errors that a user can mend into one line."""
  if not flags.FLAGS['verbosity'].present:  # Orbax tells every step at the default level
    logging.set_verbosity(logging.WARNING)
  with terminal.readable_errors(flags.FLAGS.debug):
    if len(argv) > 1:
      raise ValueError(f'Unexpected arguments {argv[1:]}: fields are set as --config.data.root=PATH.')
    terminal.keep_compiled(_COMPILED.value)
    _join_processes(distributed)
    try:
      return main(argv)
    except KeyboardInterrupt as e:
      raise terminal.Interrupted('Start the same command again to go on.') from e


def _join_processes(distributed):
  """Joins the processes that the flags tell of, before anything else asks JAX."""
  told = [flags.FLAGS[name].value for name in terminal.DISTRIBUTED]
  if not distributed and told != [False, None, None, None]:
    raise ValueError(
        'This binary runs on one machine: leave out --distributed, --coordinator_address, --num_processes '
        'and --process_id. experiments.mvtec and patchcore fit take them.')
  terminal.join_processes(*told)


def _parse_flags(argv):
  """Parses the flags, and turns errors in the config into one line."""
  for arg in argv:
    if arg.startswith('--config='):
      path = arg.partition('=')[2].partition(':')[0]
      if not os.path.isfile(path):
        terminal.fail(f'No config file {path}: expected for example --config=configs/demo.py.')
  try:
    return app.parse_flags_with_usage(argv)
  # ml_collections raises these for fields that do not exist and values of another type.
  except (KeyError, AttributeError, TypeError, ValueError) as e:
    if '--debug' in argv:
      raise
    terminal.fail(f'in the config: {e.args[0] if isinstance(e, KeyError) and e.args else e}')
