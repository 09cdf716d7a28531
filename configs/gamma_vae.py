"""γ-VAE + grad. of table S2: images are moved until a variational auto-encoder restores them as they are.

    python -m experiments.mvtec --config=configs/gamma_vae.py --config.data.root=PATH --workdir=runs/gamma_vae

`:reduced`, the default, sees whole images at 128 pixels for 800 steps of 32, and moves a test image 50
times at the most. `:paper` has the network and the course of AE-SSIM at 128 pixels: 10,000 changed images
for 200 epochs in steps of 128, Adam at 1e-4, 100 moves; for textures `--config.gamma_vae.size=256
--config.gamma_vae.crop=128`. `--config.gamma_vae.map=residual` gives the plain residual of the same
network, above which the method claims to be.

Pixel AUROC in percent, published: mean 88.8, screw 97.2, transistor 93.1. What was measured:
docs/trained.md. Hardware: any; `:paper` wants a GPU (1,560 TFLOP a category).
"""

from configs import default


def get_config(setting: str = 'reduced'):
  return default.trained('gamma_vae', {
      'reduced': {},
      'paper': {'batch_size': 128, 'steps': 15_600, 'learning_rate': 1e-4, 'moves': 100},
  }, setting)
