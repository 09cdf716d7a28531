"""Says where `experiments.export` went."""

from experiments import moved

if __name__ == '__main__':
  moved.to('patchcore export BANK --out FOLDER')
