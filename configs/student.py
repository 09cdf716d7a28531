"""Uninformed students of table S3: networks that imitate a teacher, which describes patches, on good images.

    python -m experiments.mvtec --config=configs/student.py --config.data.root=PATH --workdir=runs/student

`:reduced`, the default, has a receptive field of 33 pixels, a quarter of the width, two students with a
descriptor for every 4th pixel of 128, and 800 steps of 4 images. `:paper` has a field of 65 pixels, three
students with a descriptor for every pixel of 256, and 100 epochs in steps of one image. In either the teacher
is distilled from `--config.backbone.name` on images drawn by program, once for all categories; the paper's is
from ResNet-18 on ImageNet.

AUPRO in percent, published: mean 85.7, screw 92.8, transistor 70.1. What was measured: docs/trained.md.
Hardware: any; `:paper` wants a GPU (97,000 TFLOP a category).
"""

from configs import default


def get_config(setting: str = 'reduced'):
  return default.trained('student', {
      'reduced': {},
      'paper': {
          'size': 256, 'batch_size': 1, 'steps': 24_000, 'learning_rate': 1e-4, 'field': 65, 'width': 128,
          'descriptor': 128, 'students': 3, 'dense': True, 'teacher_steps': 50_000},
  }, setting)
