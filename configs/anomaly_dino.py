"""AnomalyDINO with one good image: the 1-shot row of its paper.

    python -m experiments.mvtec --config=configs/anomaly_dino.py --config.data.root=PATH --workdir=runs/dino

Mean over the 15 categories of MVTec AD, in percent:

| shots | | image AUROC |
|---|---|---|
| 1 | published (arXiv 2405.14529v2, abstract) | 96.6 |
| 1 | measured | not measured here: needs the weights and the data |

The network is DINOv2 ViT-S/14 without registers, with positions as Meta's own code has them. The published
number differs in that the background of capsule, hazelnut, pill, screw and toothbrush is masked (here by
`--config.data.categories=NAMES --config.anomaly_dino.foreground=pca_raster`),
images are turned before they are resized, the filter is bicubic, no square is cropped, and the first image of
each category is taken instead of one at random. Hardware: any. Time: not measured.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.detector = 'anomaly_dino'
  config.data.shots = 1
  config.backbone.name = 'vit_small_patch14_dinov2_meta.lvd142m'
  config.preprocess.resize = (448,)
  config.preprocess.crop = (448,)
  return config
