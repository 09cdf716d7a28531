"""The built-in data set with a network that needs no download: shows that everything runs.

    python -m experiments.mvtec --config=configs/demo.py --workdir=runs/demo

The network comes with the package: a slim ResNet-18 trained on drawn images only (docs/pretrained.md).
ImageNet weights, wide_resnet50_2.tv_in1k, are the better choice where they can be had.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.data.source = 'synthetic'
  config.data.root = 'runs/synthetic'
  config.data.num_workers = 0
  config.backbone.name = 'resnet18_slim.procedural'
  config.embedding.kind = 'mean'
  config.coreset.ratios = (0.02,)
  config.report.errors = True
  return config
