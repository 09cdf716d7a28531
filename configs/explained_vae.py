"""vis. expl. VAE of table S2: the attention of a variational auto-encoder's code.

    python -m experiments.mvtec --config=configs/explained_vae.py --config.data.root=PATH --workdir=runs/vae

`:reduced`, the default, has a quarter of ResNet-18's width, sees images at 128 pixels, and takes 300 steps
of 32. `:paper` has ResNet-18's width at 256 pixels, and 200 epochs of about 300 images in steps of 128. How
the parts of its loss are weighed was not published.

Pixel AUROC in percent, published: mean 86, screw 97, transistor 93. What was measured: docs/trained.md.
Hardware: any; `:paper` wants a GPU (2,600 TFLOP a category).
"""

from configs import default


def get_config(setting: str = 'reduced'):
  return default.trained('explained_vae', {
      'reduced': {},
      'paper': {'size': 256, 'width': 64, 'batch_size': 128, 'steps': 500, 'learning_rate': 1e-4},
  }, setting)
