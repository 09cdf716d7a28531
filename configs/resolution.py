"""PatchCore at 224 to 448 px with neighbourhoods of 3 to 9: figure S4.

    python -m experiments.sweep --config=configs/resolution.py --config.data.root=PATH --workdir=runs/fig_s4
    python -m experiments.figures --workdir=runs/fig_s4 --figure=S4

The figure has no numbers; its text says that detection saturates, and that segmentation gets better
with size. Measured: not yet with the paper's weights and data.

The images are enlarged to 8/7 of the size and cropped, as 256 to 224. The four neighbourhoods of a size
share one pass of the network. Reduced: `--only='crop=(224|288) '`. Hardware: any; at 448 a category has up
to 1.2 million patches, of which 1 % are selected in some 10 s on two CPU cores. On two categories with
another network: docs/results/README.md.
"""

from configs import default

SIZES = (224, 288, 360, 448)
NEIGHBORHOODS = (3, 5, 7, 9)


def get_config():
  config = default.get_config()
  config.report.gallery = 0  # a page for each point, without images
  config.coreset.ratios = (0.01,)
  config.data.batch_size = 8
  config.sweep = tuple(
      f'preprocess.resize={size * 8 // 7} preprocess.crop={size} embedding.patch_size={patch}'
      for size in SIZES for patch in NEIGHBORHOODS)
  return config
