"""PatchCore, PaDiM and SPADE with 1 to 50 training images, DifferNet with 16: table S5.

    python -m experiments.sweep --config=configs/low_shot.py --config.data.root=PATH --workdir=runs/s5
    python -m experiments.tables --workdir=runs/s5 --table=S5

Mean over the 15 categories of the image AUROC, in percent:

| shots | | 1 | 2 | 5 | 10 | 16 | 20 | 50 |
|---|---|---|---|---|---|---|---|---|
| PatchCore-10 | published | 83.4 | 86.4 | 90.8 | 93.6 | 95.4 | 95.8 | 97.5 |
| PatchCore-25 | published | 84.1 | 87.2 | 91.0 | 93.8 | 95.5 | 95.9 | 97.7 |
| PaDiM | published | 76.1 | 78.9 | 81.0 | 83.2 | 85.5 | 86.5 | 90.1 |
| SPADE | published | 71.6 | 73.4 | 75.2 | 77.5 | 78.9 | 79.6 | 81.1 |
| DifferNet | published | - | - | - | - | 87.3 | - | - |
| all | measured | not measured yet: needs the weights and the full data set |

Five draws of each; the paper does not say how many it has. Draws are nested: that of 5 images holds that
of 2. All but DifferNet, which turns images and trains its flow for as many epochs as on all of them (192),
use the feature maps of one pass over the images. SPADE compares with all the images it has.
Reduced: `--only='draw=[012] '` for three draws, `--only='shots=(1|10) '` for two columns. Hardware: any.
Time: seconds a point and category beside one pass of the network. On two categories with another
network, two draws (`--set='backbone.layers='`): docs/results/README.md.
"""

from configs import default

SHOTS = (1, 2, 5, 10, 16, 20, 50)
DRAWS = range(5)


def get_config():
  config = default.get_config()
  config.report.gallery = 0  # a page for each point, without images
  config.coreset.ratios = (0.25, 0.10)
  config.sweep = tuple(
      f'data.shots={shots} data.draw={draw} {method}'
      for shots in SHOTS for draw in DRAWS for method in (
          'detector=patchcore backbone.layers=layer2,layer3',
          'detector=padim backbone.layers=layer1,layer2,layer3',
          f'detector=spade backbone.layers=layer1,layer2,layer3,layer4 spade.num_images={shots}')) + tuple(
              f'data.shots=16 data.draw={draw} detector=differnet differnet.steps=256 '
              'preprocess.resize=224,224 preprocess.crop=' for draw in DRAWS)
  return config
