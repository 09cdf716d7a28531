"""What anomalib 2.7.0 does.

    python -m experiments.mvtec --config=configs/parity/anomalib.py --config.data.root=PATH --workdir=DIR

`docs/parity.md` shows each point as measured. Published (means of its README's table, WideResNet-50):
image AUROC 98.0, pixel AUROC 98.0. Measured: not yet, needs the weights.

Left out on purpose: its scores are clamped to [0, 1] before AUROC, and its threshold is tuned on the
test set. Not reproduced: it resizes float tensors, this package 8-bit images as Pillow does (up to 0.9
gray levels apart).
"""

from configs import default


def get_config():
  config = default.get_config()
  config.preprocess.resize = (256, 256)  # does not keep the aspect ratio
  config.preprocess.crop = (224,)
  config.preprocess.mask_resize = 'nearest'
  config.backbone.name = 'wide_resnet50_2.racm_in1k'
  config.backbone.precision = 'float32'
  config.embedding.kind = 'mean'
  config.coreset.ratios = (0.10,)
  config.coreset.projection = 'sparse'
  config.coreset.projection_dim = 0
  config.coreset.start = 'point'
  config.scoring.num_neighbors = 1
  config.scoring.distance = 'root'
  config.scoring.image_score = 'reweighted'
  config.scoring.support_neighbors = 9
  config.scoring.upsampling = 'nearest'
  config.scoring.blur_edges = 'reflect'
  config.metrics.connectivity = 8
  return config
