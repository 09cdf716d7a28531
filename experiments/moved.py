"""Says where a binary went that became a subcommand of `patchcore`."""

import sys


def to(command: str) -> None:
  """Names the command on the standard error, and ends the process with code 2."""
  print(f'error: this is now: {command}    (patchcore {command.split()[1]} --help)', file=sys.stderr)
  sys.exit(2)
