"""RAD with a bank for each category, as anomalib has it; the paper's row is of one bank for all of them.

    python -m experiments.mvtec --config=configs/rad.py --config.data.root=PATH --workdir=runs/rad

Mean over the 15 categories of MVTec AD, in percent:

| good images | | pixel AUROC |
|---|---|---|
| all, one bank for all categories | published (arXiv 2601.22763, abstract) | 98.5 |
| one of each category | published (the same) | 96.7 |
| all, a bank for each category | measured | not measured here: needs the weights and the data |
| one, `--config.data.shots=1` | measured | not measured here, as above |

The network is DINOv3 ViT-B/16, whose licence is shown before the first download. An image is compared with
all of its category, at most 391, where the paper retrieves 150 of all categories; one bank of all is a fit on
the pattern 'PATH/*/train/good', which this program does not measure. Masks are compared at 448 px, the
published ones at 256 px. Hardware: any. Time: not measured. Memory: 4.8 MB for each good image, on the host
and on the device.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.detector = 'rad'
  config.rad.num_images = 0
  config.backbone.name = 'vit_base_patch16_dinov3.lvd1689m'
  config.backbone.layers = ('blocks.3', 'blocks.6', 'blocks.9', 'blocks.11', 'blocks.11.cls')
  config.preprocess.resize = (512, 512)
  config.preprocess.crop = (448,)
  return config
