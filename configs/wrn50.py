"""PatchCore with WideResNet50 at 224 px on MVTec AD: tables S1, S2 and S3 of the paper's supplement.

    python -m experiments.mvtec --config=configs/wrn50.py --config.data.root=PATH --workdir=runs/wrn50

Mean over the 15 categories, in percent:

| coreset | | image AUROC | pixel AUROC | AUPRO |
|---|---|---|---|---|
| 25 % | published | 99.1 | 98.1 | 93.4 |
| 10 % | published | 99.0 | 98.1 | 93.5 |
| 1 %  | published | 99.0 | 98.0 | 93.1 |
| all  | measured  | not measured yet: needs the weights and the full data set |

Hardware: any, with 8 GB of memory. Time: expected an hour for all categories on two CPU cores, of which
the network has 4 minutes (41 ms an image, measured); docs/benchmarks.md has the parts. Not measured yet
on a GPU.

On two categories with another network: docs/results/README.md.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.published.ratios = (0.25, 0.10, 0.01)
  config.published.methods = ('PatchCore-25', 'PatchCore-10', 'PatchCore-1')
  config.report.errors = True
  return config
