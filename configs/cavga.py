"""CAVGA of tables S1 and S2: an auto-encoder whose attention is trained to cover all of a good image.

    python -m experiments.mvtec --config=configs/cavga.py --config.data.root=PATH --workdir=runs/cavga
    python -m experiments.mvtec --config=configs/cavga.py:weak --config.data.root=PATH --workdir=runs/weak

`:reduced`, the default, is CAVGA-R_u with a narrow trunk at 128 pixels, for 400 steps of 16. `:weak` is
CAVGA-R_w in the same size: as many labelled defects as 2 % of the training images are drawn from the test
images, and taken away from them. `:paper` has ResNet-18's width at 256 pixels; its optimiser and length are
not known, nor are its pretrained networks at hand.

In percent, published as CAVGA-Rw: image AUROC mean 90, screw 81, transistor 99 (whole numbers, most likely
accuracies); pixel AUROC mean 89. What was measured, with three seeds on the built-in data: docs/trained.md.
Hardware: any; `:paper` wants a GPU (more than 10,000 TFLOP a category).
"""

from configs import default


def get_config(setting: str = 'reduced'):
  config = default.trained('cavga', {
      'reduced': {},
      'weak': {'weak': True},
      'paper': {
          'size': 256, 'widths': (64, 64, 128, 256, 512), 'latent': 128, 'steps': 2_000,
          'learning_rate': 1e-4,
          'adversarial_weight': 1.0},
  }, setting)
  if setting == 'weak':
    config.data.labelled_defects = 0.02
  return config
