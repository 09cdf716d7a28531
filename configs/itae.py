"""ITAE of table S1: how well an image without its colour, and turned, is restored.

    python -m experiments.mvtec --config=configs/itae.py --config.data.root=PATH --workdir=runs/itae

`:reduced`, the default, sees images at 64 pixels with a U-Net 16 wide, for 600 steps of 32 by Adam. `:paper`
has a public implementation's width of 64 and its SGD for 125 epochs of about 250 images, at 224 pixels; the
paper's own size is not known, and its figures have not been reproduced in public.
`--config.itae.standardise=True` takes away how bright an image is.

Image AUROC in percent, published: mean 83.9, screw 100, transistor 84.3; on screw that is most likely
brightness. What was measured: docs/trained.md. Hardware: any; `:paper` wants a GPU (5,700 TFLOP a category).
"""

from configs import default


def get_config(setting: str = 'reduced'):
  return default.trained('itae', {
      'reduced': {},
      'paper': {'size': 224, 'width': 64, 'steps': 1000, 'learning_rate': 0.1, 'optimizer': 'sgd'},
  }, setting)
