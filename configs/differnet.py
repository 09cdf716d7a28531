"""DifferNet of tables S1 and S5: the likelihood of pooled features, by a normalising flow.

    python -m experiments.mvtec --config=configs/differnet.py --config.data.root=PATH --workdir=runs/differnet

`:reduced`, the default, sees images at 224, 112 and 56 pixels, 8 views of each at cached angles, with a flow
256 wide, for 2,500 steps of 96 views. `:paper` has 448, 224 and 112 pixels, 16 cached views in place of ever
new ones, the flow's width of 2,048, as many views in all as 192 epochs have, and 64 views in scoring. The
paper's AlexNet is not at hand: the network is that of `--config.backbone.name`, whose features are brought to
one scale. With it, rows tell the network. `--config.differnet.turns=4 --config.differnet.angles=even` turns
by right angles only.

Image AUROC in percent, published: mean 94.9, screw 96.3, transistor 91.1; with 16 training images
(configs/low_shot.py) mean 87.3. What was measured: docs/trained.md. Hardware: any; `:paper` wants a GPU (254
TFLOP a category for the flow, and 64 x 3 passes of the network an image).
"""

from configs import default


def get_config(setting: str = 'reduced'):
  return default.trained('differnet', {
      'reduced': {},
      'paper': {'size': 448, 'batch_size': 6, 'turns': 16, 'test_turns': 64, 'hidden': 2048},
  }, setting)
