"""PatchCore with neighbourhoods of 1 to 9, and with other layers: figure S5.

    python -m experiments.sweep --config=configs/locality.py --config.data.root=PATH --workdir=runs/fig_s5
    python -m experiments.figures --workdir=runs/fig_s5 --figure=S5

The figure has no numbers; the paper's text says that 3 is best, and layers 2 and 3 nearly so. Measured:
not yet with the paper's weights and data. All points share one pass of the network. Reduced:
`--only='layers=layer2,layer3$'` has the neighbourhoods alone. Hardware: any. Time: one pass of the network,
and seconds a point and category beside it. On two categories with another network, whose layers have other
names: docs/results/README.md.
"""

from configs import default

NEIGHBORHOODS = (1, 3, 5, 7, 9)
LAYERS = ('layer1', 'layer2', 'layer3', 'layer1,layer2', 'layer2,layer3', 'layer1,layer2,layer3')


def get_config():
  config = default.get_config()
  config.report.gallery = 0  # a page for each point, without images
  config.coreset.ratios = (0.01,)
  config.data.batch_size = 8
  config.sweep = (
      *(f'embedding.patch_size={size} backbone.layers=layer2,layer3' for size in NEIGHBORHOODS),
      *(f'embedding.patch_size=3 backbone.layers={layers}'
        for layers in LAYERS if layers != 'layer2,layer3'))
  return config
