"""Greedy, random and k-means banks of 0.1 to 100 %: figure S6.

    python -m experiments.sweep --config=configs/subsampling.py --config.data.root=PATH --workdir=runs/fig_s6
    python -m experiments.figures --workdir=runs/fig_s6 --figure=S6

The figure has no numbers; the paper's text says that greedy selection retains performance down to 1 %
and random selection does not. Measured: not yet with the paper's weights and data. One fit serves all
ratios of 'greedy' and 'random'; k-means, which stands for the learned subsets of the paper, makes another
bank for each, and only up to 1 %: it is slow beyond. All points share one pass of the network. Hardware:
any. Time: most goes to 'identity', which searches all patches. On two categories with another network:
docs/results/README.md.
"""

from configs import default

RATIOS = '0.25,0.1,0.05,0.01,0.005,0.001'


def get_config():
  config = default.get_config()
  config.report.gallery = 0  # a page for each point, without images
  config.coreset.ratios = (0.1,)
  config.sweep = (
      f'coreset.method=greedy coreset.ratios={RATIOS}',
      f'coreset.method=random coreset.ratios={RATIOS}',
      'coreset.method=identity coreset.ratios=1.0',
      *(f'coreset.method=kmeans coreset.ratios={ratio}' for ratio in (0.01, 0.005, 0.001)))
  return config
