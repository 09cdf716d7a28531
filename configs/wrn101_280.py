"""PatchCore-1 with WideResNet101 at 280 px, layers 2 and 3, and 1 to 3: table S4.

    python -m experiments.sweep --config=configs/wrn101_280.py --config.data.root=PATH --workdir=runs/s4
    python -m experiments.tables --workdir=runs/s4 --table=S4

Mean over the 15 categories, in percent:

| layers | | image AUROC | pixel AUROC | AUPRO |
|---|---|---|---|---|
| 2, 3 | published | 99.4 | 98.2 | 94.4 |
| 1, 2, 3 | published | 99.2 | 98.4 | 95.0 |
| both | measured | not measured yet: needs the weights and the full data set |

Both banks come from one pass of the network over the images. Hardware: any; with layer1 the fit works
on 4,900 patches an image, 20 MB of embeddings each, which `fit.memory_gb` keeps on disk where they are
too many. Time: not measured. On two categories with another network: docs/results/README.md.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.backbone.name = 'wide_resnet101_2.tv_in1k'
  config.preprocess.resize = (320,)
  config.preprocess.crop = (280,)
  config.coreset.ratios = (0.01,)
  config.data.batch_size = 8
  config.sweep = (
      'backbone.layers=layer2,layer3',
      'backbone.layers=layer1,layer2,layer3')
  return config
