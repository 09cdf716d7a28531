"""The command `patchcore` in this process, and the settings with which it fits plates in seconds."""

import contextlib
import io
from typing import NamedTuple

from patchcore_jax import cli

# As `plates.fields` for config files.
SMALL = {
    'batch_size': 4, 'resize': 64, 'crop': 56, 'backbone': 'tests.small:backbone', 'embedding_kind': 'mean',
    'ratio': 0.2, 'coreset_projection_dim': 16}


class Result(NamedTuple):
  """What a command ended with, and what it said."""

  code: int
  out: str
  err: str


def run(*arguments) -> Result:
  """Runs `patchcore ARGUMENTS`. Errors that are bugs pass through."""
  streams = [io.TextIOWrapper(io.BytesIO(), 'utf-8') for _ in range(2)]  # click writes bytes too
  with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
    try:
      cli.main([str(argument) for argument in arguments])
      code = 0
    except SystemExit as e:
      code = e.code
  for stream in streams:
    stream.flush()
  return Result(code, *(stream.buffer.getvalue().decode() for stream in streams))


def done(*arguments) -> str:
  """Returns what a command that succeeds says."""
  result = run(*arguments)
  assert result.code == 0, result.err
  return result.out


def refused(*arguments) -> str:
  """Returns the one line in which a command that fails says why."""
  result = run(*arguments)
  assert result.code in (1, 2) and result.err.startswith('error: ') and result.err.count('\n') == 1, result
  return result.err


def flags(**values) -> list[str]:
  """Writes values as flags, those of `SMALL` first; '-' in names is written '_', and None drops a flag."""
  return [f'--{name.replace("_", "-")}={value}' for name, value in (SMALL | values).items()
          if value is not None]
