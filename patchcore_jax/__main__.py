"""`python -m patchcore_jax` is the command `patchcore`."""

from patchcore_jax.cli import main

if __name__ == '__main__':
  main()
