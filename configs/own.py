"""A folder of good images -> a bank with thresholds, for experiments.predict and experiments.serve.

    python -m experiments.fit --config=configs/own.py --config.data.root=FOLDER --out=BANK

The backbone is the better of two that this machine can have: WideResNet-50 with ImageNet weights where they
are cached or can be fetched, else the one that comes with the package. No number of the paper is claimed.
Measured: docs/own_images.md.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.data.source = 'images'
  config.data.num_workers = 0
  config.data.on_error = 'skip'
  config.backbone.name = 'auto'
  config.embedding.kind = 'auto'
  config.coreset.ratios = (0.1,)
  return config
