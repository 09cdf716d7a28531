"""The built-in data set with a network that needs no download: shows that everything runs.

    python -m experiments.mvtec --config=configs/demo.py --workdir=runs/demo

The network is a ResNet-18 with random weights until the package has a trained one of its own: the
numbers say that the programme works, not how good PatchCore is.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.data.source = 'synthetic'
  config.data.root = 'runs/synthetic'
  config.data.num_workers = 0
  config.backbone.name = 'resnet18'
  config.backbone.weights = 'random'
  config.embedding.kind = 'mean'
  config.coreset.ratios = (0.10, 0.01)
  config.report.errors = True
  return config
