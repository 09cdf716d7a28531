"""`experiments.bank` is now `patchcore bank ACTION BANK ...`."""

from experiments import moved

if __name__ == '__main__':
  moved.to('patchcore bank ACTION BANK ...')
