"""Says where `experiments.predict` went."""

from experiments import moved

if __name__ == '__main__':
  moved.to('patchcore predict BANK IMAGES --out DIR')
