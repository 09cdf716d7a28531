"""Says where `experiments.serve` went."""

from experiments import moved

if __name__ == '__main__':
  moved.to('patchcore serve BANK')
