"""SPADE, PaDiM, MahalanobisAD and OC-SVM with the networks and images of configs/wrn50.py: the compared
methods of tables S1 to S3, and with configs/wrn50.py the curves of figure S3.

    python -m experiments.sweep --config=configs/compared.py --config.data.root=PATH --workdir=runs/s1/rest
    python -m experiments.mvtec --config=configs/wrn50.py --config.data.root=PATH --workdir=runs/s1/patchcore
    python -m experiments.tables --workdir=runs/s1 --table=S1

Mean over the 15 categories, in percent (MahalanobisAD and OC-SVM were published with other networks):

| | | image AUROC | pixel AUROC | AUPRO |
|---|---|---|---|---|
| SPADE | published | 85.5 | 96.0 | 91.7 |
| PaDiM | published | 95.3 | 97.5 | 92.1 |
| MahalanobisAD | published | 95.8 | - | - |
| OC-SVM | published | 71.9 | - | - |
| all | measured | not measured yet: needs the weights and the full data set |

Each has the layers of its own paper. Hardware: any; SPADE and PaDiM keep up to 7 and 2 GB on disk, and
SPADE needs as much memory. Time: SPADE does 1.8e12 operations an image, 12 s expected on two CPU cores, the
others some milliseconds beside the network's 93. Reduced: `--only=padim`. On two categories with
another network (`--set='backbone.layers='`): docs/results/README.md.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.report.gallery = 0  # a page for each point, without images
  config.sweep = (
      'detector=spade backbone.layers=layer1,layer2,layer3,layer4',
      'detector=padim backbone.layers=layer1,layer2,layer3',
      'detector=mahalanobis_ad backbone.layers=layer1,layer2,layer3,layer4',
      'detector=ocsvm backbone.layers=layer4')
  return config
