"""SuperADD on MVTec AD 2, for which it was made.

    python -m experiments.mvtec --config=configs/super_add.py --config.data.root=PATH --workdir=runs/super_add

| | |
|---|---|
| published | none found |
| measured | not measured here: needs the weights and the data |

The network is DINOv3 ViT-H+/16, whose licence is shown before the first download. The authors scale both
sides by 0.625, which differs by category: here the short side has 1024 pixels. Hardware: any. Time: not
measured. Memory: for each image of 1530 x 1280 px 156 MB on disk, and 2 GB for the bank.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.detector = 'super_add'
  config.data.source = 'mvtec_ad_2'
  config.backbone.name = 'vit_huge_plus_patch16_dinov3.lvd1689m'
  config.backbone.layers = ('blocks.7.raw', 'blocks.15.raw', 'blocks.23.raw', 'blocks.31.raw')
  config.preprocess.resize = (1024,)
  config.preprocess.crop = ()
  config.metrics.protocol = 'mvtec_ad_2'
  return config
