"""The backbone of the package: a slim ResNet-18, trained on procedural images.

    python -m experiments.pretrain --config=configs/pretrain.py --workdir=runs/pretrain

Its result lies in the package as `resnet18_slim.procedural`. Hardware and time: 2 cores of a shared AMD EPYC,
44 minutes beside other work. What it reaches, and what else was tried: docs/pretrained.md.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.architecture = 'resnet18_slim'
  config.objective = 'info_nce'  # or 'vicreg'
  config.layers = ('layer1', 'layer2', 'layer3')  # that have a head and a loss
  config.gray_free = True  # the first convolution cannot see how bright an image is
  config.batch_size = 32  # images of a step, each seen twice
  config.steps = 4500
  config.warmup = 150
  config.learning_rate = 2e-3
  config.weight_decay = 1e-4
  config.head_width = 256
  config.head_features = 64

  config.objective_args = ConfigDict()
  config.objective_args.info_nce = ConfigDict({'temperature': 0.1})
  config.objective_args.vicreg = ConfigDict({'invariance': 25.0, 'variance': 25.0, 'covariance': 1.0})

  config.views = ConfigDict()  # patchcore_jax.builtin.views.ViewSpec explains them
  config.views.size = 64
  config.views.zoom = (0.7, 1.4)
  config.views.turn = 10.0
  config.views.shift = 0.25
  config.views.points = 5
  config.views.gain = 0.3
  config.views.channel_gain = 0.05
  config.views.bias = 0.12
  config.views.gray = 0.3
  config.views.slope = 0.1
  config.views.blur = 0.15
  config.views.noise = 0.04

  config.pool = ConfigDict()
  config.pool.size = 6000  # images that a step chooses from
  config.pool.image_size = 128
  config.pool.fresh = 4  # new ones for every step
  config.pool.num_workers = 2  # processes that draw; 0 for none

  config.report_every = 50  # steps between two lines
  config.save_every = 200  # steps between two checkpoints
  return config
