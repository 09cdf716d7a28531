"""PatchCore at 224 to 448 px with neighbourhoods of 3 to 9: figure S4; and at 448 to 768 px.

    python -m experiments.sweep --config=configs/resolution.py --config.data.root=PATH --workdir=runs/fig_s4
    python -m experiments.figures --workdir=runs/fig_s4 --figure=S4

The figure has no numbers; its text says that detection saturates, and that segmentation gets better
with size. Measured: not yet with the paper's weights and data.

The images are enlarged to 8/7 of the size and cropped, as 256 to 224. The four neighbourhoods of a size
share one pass of the network. Reduced: `--only='crop=(224|288) '`. Hardware: any; at 448 a category has up
to 1.2 million patches, of which 1 % are selected in some 10 s on two CPU cores. On two categories with
another network: docs/results/README.md.

    python -m experiments.sweep --config=configs/resolution.py:large --config.data.root=PATH \\
        --workdir=runs/large

goes on where the figure ends: 448, 640 and 768 px, layers 1 to 3, banks of 10 %. A category of 320 images
then has up to 11.8 million patches (48 GB) and a bank of 1.2 million; the fit says before how much of the
device's and the host's memory it takes. Hardware: one GPU of 80 GB and up; with less, embeddings go to the
host, and from there to the disk (fit.memory_gb). Measured on an H200 as far as docs/benchmarks.md says;
the paper has no numbers for it.
"""

from configs import default

SIZES, NEIGHBORHOODS = (224, 288, 360, 448), (3, 5, 7, 9)
LARGE_SIZES = (448, 640, 768)


def get_config(which: str = 'figure'):
  if which not in ('figure', 'large'):
    raise ValueError(f'configs/resolution.py:{which}: expected nothing or large behind the colon.')
  config = default.get_config()
  config.report.gallery = 0  # a page for each point, without images
  config.coreset.ratios = (0.01,) if which == 'figure' else (0.1,)
  config.data.batch_size = 8
  if which == 'large':
    config.backbone.layers = ('layer1', 'layer2', 'layer3')
    config.fit.memory_gb = 64.0
  config.sweep = tuple(
      f'preprocess.resize={size * 8 // 7} preprocess.crop={size}{more}'
      for size, more in (
          [(size, '') for size in LARGE_SIZES] if which == 'large' else
          [(size, f' embedding.patch_size={patch}') for size in SIZES for patch in NEIGHBORHOODS]))
  return config
