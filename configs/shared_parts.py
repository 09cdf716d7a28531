"""Which parts of later methods help PatchCore, and with which network: docs/shared_parts.md.

    python -m experiments.sweep --config=configs/shared_parts.py --workdir=runs/parts
    python -m experiments.compare 'runs/parts/POINT' 'runs/parts/ANOTHER POINT'

All training images: PatchCore as it is, and with one part each. Ten percent of defects among the training
images (SoftPatch's protocol), which PatchCore takes for good and SoftPatch weighs. And 1, 2, 4 and 8 images,
five draws of each, as they are and turned eight times (to compare with equal banks:
--only='shots=.*rotations=1' --config.coreset.ratios=0.8). No published number: the mixtures are nobody's.
Measured: docs/shared_parts.md. Another network: --config.backbone.name=NAME. Hardware: any; a quarter of
an hour a network on two CPU cores.
"""

from configs import demo

PARTS = (
    '', 'embedding.unit_length=True', 'scoring.image_score=top_share', 'scoring.foreground=pca',
    'scoring.distance=root scoring.image_score=reweighted')
SHOTS = (1, 2, 4, 8)
DRAWS = range(5)


def get_config():
  config = demo.get_config()
  config.preprocess.resize = (224,)
  config.preprocess.crop = ()
  config.backbone.name = 'efficientnet_lite0.imagenet'
  config.coreset.ratios = (0.1,)
  config.report.gallery = 0
  config.report.errors = False
  config.sweep = (
      *(f'data.noise=0.0 {part}'.strip() for part in PARTS),
      *(f'data.noise=0.1 {method}' for method in ('detector=patchcore', 'detector=soft_patch')),
      *(f'data.shots={shots} data.draw={draw} {part}'
        for shots in SHOTS for draw in DRAWS for part in (
            'embedding.rotations=1', 'embedding.rotations=8', 'scoring.foreground=pca')))
  return config
