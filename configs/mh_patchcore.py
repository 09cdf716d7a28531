"""MH-PatchCore: the MVTec AD row of its preprint.

    python -m experiments.mvtec --config=configs/mh_patchcore.py --config.data.root=PATH --workdir=runs/mh

Mean over the 15 categories of MVTec AD, in percent:

| | image AUROC | pixel AUROC | image F1 | pixel F1 |
|---|---|---|---|---|
| published (arXiv 2605.27748, as its abstract and anomalib's README have it) | 98.9 | 97.8 | - | - |
| the released code, run again by anomalib's authors, whose own has the same | 98.78 | 97.77 | 97.90 | 61.09 |
| measured | not measured here: needs the weights and the data | | | |

The network has torchvision's second weights. Published for the peak memory of a fit: 2.78 GB, and 5.41 GB for
PatchCore. A bank depends on the order of the images and on blocks of 16 of them. Hardware: any. Time: two
passes through the network, and a product of 26 billion operations a block in float64; not measured.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.detector = 'mh_patchcore'
  config.backbone.name = 'wide_resnet50_2.tv2_in1k'
  return config
