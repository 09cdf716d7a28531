"""`experiments.fit` is now `patchcore fit GOOD --out BANK`."""

from experiments import moved

if __name__ == '__main__':
  moved.to('patchcore fit GOOD --out BANK')
