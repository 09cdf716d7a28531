"""PatchCore with five networks, 10 % and 1 %: table S6.

    python -m experiments.sweep --config=configs/backbones.py --config.data.root=PATH --workdir=runs/s6
    python -m experiments.tables --workdir=runs/s6 --table=S6

Mean over the 15 categories, image AUROC / pixel AUROC / AUPRO in percent:

| | | 10 % | 1 % |
|---|---|---|---|
| ResNet50 | published | 99.0 / 98.1 / 93.3 | 98.7 / 97.8 / 93.3 |
| WideResNet50 | published | 98.9 / 98.1 / 93.5 | 99.0 / 98.0 / 93.1 |
| ResNet101 | published | 98.6 / 97.9 / 92.5 | 98.7 / 97.8 / 92.2 |
| WideResNet101 | published | 99.1 / 98.2 / 93.4 | 99.0 / 98.1 / 93.0 |
| ResNeXt101 | published | 98.9 / 98.0 / 92.8 | 98.7 / 97.8 / 92.6 |
| all | measured | not measured yet: needs the weights and the full data set |

Hardware: any. Time: expected an hour a network on two CPU cores; not measured. One line of it on two
categories with another network: docs/results/README.md.
"""

from configs import default

NAMES = ('resnet50', 'wide_resnet50_2', 'resnet101', 'wide_resnet101_2', 'resnext101_32x8d')


def get_config():
  config = default.get_config()
  config.coreset.ratios = (0.10, 0.01)
  config.sweep = tuple(f'backbone.name={name}.tv_in1k' for name in NAMES)
  return config
