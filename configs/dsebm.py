"""DSEBM of table S1: an energy whose slope leads from noisy images to clean ones.

    python -m experiments.mvtec --config=configs/dsebm.py --config.data.root=PATH --workdir=runs/dsebm

`:reduced`, the default, is as a public implementation has it, with steps of 32 images for 1,000 steps.
`:paper` has that implementation's steps of 128 for 200 epochs of about 300 images. The paper's own form has
softplus features (`--config.dsebm.activation=softplus`). `--config.dsebm.score=reconstruction` is DSEBM-r.

Image AUROC in percent, published: mean 70.9, screw 99.9, transistor 74.1. On screw that is brightness,
which is a term of the energy: with `--config.dsebm.standardise=True` it is gone. What was measured:
docs/trained.md. Hardware: any.
"""

from configs import default


def get_config(setting: str = 'reduced'):
  return default.trained('dsebm', {
      'reduced': {},
      'paper': {'batch_size': 128, 'steps': 500},
  }, setting)
