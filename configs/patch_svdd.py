"""PatchSVDD of tables S1 and S2: how far codes of patches are from those of the good images.

    python -m experiments.mvtec --config=configs/patch_svdd.py --config.data.root=PATH --workdir=runs/svdd

`:reduced`, the default, has half the channels, steps of 32 images (a pair of each kind and size of each) for
800 steps, and keeps 5 % of the codes. `:paper` has the authors' encoder of 0.402 M parameters, as many steps
of 64 as 300 epochs have, and keeps all codes. Which weight of the distance, and which epoch, gave the
published figures is not known.

In percent, published: image AUROC mean 92.1, screw 81.3, transistor 91.5; pixel AUROC mean 95.7, screw 95.7,
transistor 97.0. What was measured: docs/trained.md. Hardware: any; `:paper` wants a GPU (33,000 TFLOP a
category).
"""

from configs import default


def get_config(setting: str = 'reduced'):
  return default.trained('patch_svdd', {
      'reduced': {},
      'paper': {
          'width': 32, 'batch_size': 64, 'steps': 150_000, 'learning_rate': 1e-4, 'bank_ratio': 1.0},
  }, setting)
