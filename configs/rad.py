"""RAD with one bank for all categories, from which an image retrieves those that it is compared with.

    python -m experiments.mvtec --config=configs/rad.py --config.data.root=PATH --workdir=runs/rad

Mean over the 15 categories of MVTec AD, in percent:

| good images | | pixel AUROC |
|---|---|---|
| all, one bank for all categories | published (arXiv 2601.22763, abstract) | 98.5 |
| | measured | not measured here: needs the weights and the data |
| one of each category | published (the same) | 96.7 |
| | measured by `--config.data.shots=1 --config.rad.num_images=0` | not measured here, as above |
| all, a bank for each category | measured by `configs/rad.py:each` | not measured here, as above |

The network is DINOv3 ViT-B/16, whose licence is shown before the first download. An image is compared with
the 150 most like it of all categories; with `:each`, as anomalib has it, with all of its own, at most 391.
Masks are compared at 448 px, the published ones at 256 px. Hardware: any. Time: not measured. Memory: 4.8 MB
for each good image, on the host and on the device.
"""

from configs import default


def get_config(setting: str = 'paper'):
  if setting not in ('paper', 'each'):
    raise ValueError(f'configs/rad.py:{setting}: expected one of paper, each.')
  config = default.get_config()
  config.detector = 'rad'
  config.data.multi_class = setting == 'paper'
  config.rad.num_images = 150 if setting == 'paper' else 0
  config.backbone.name = 'vit_base_patch16_dinov3.lvd1689m'
  config.backbone.layers = ('blocks.3', 'blocks.6', 'blocks.9', 'blocks.11', 'blocks.11.cls')
  config.preprocess.resize = (512, 512)
  config.preprocess.crop = (448,)
  return config
