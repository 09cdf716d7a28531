"""GeoTrans of table S1: how well a network tells which of 72 transformations was applied to an image.

    python -m experiments.mvtec --config=configs/geotrans.py --config.data.root=PATH --workdir=runs/geotrans

`:reduced`, the default, has a wide residual network of depth 10 and width 2 at 32 pixels, and 500 steps of
128 transformed images, which are about three epochs of all. `:paper` has the authors' width of 4; `:larger`
what they have for 64 pixels. Whose setting the published row is of is not known.
`--config.geotrans.standardise=True` takes away how bright an image is.

Image AUROC in percent, published: mean 67.2, screw 50.0, transistor 86.9. Where parts look the same when they
are turned, less than 50 is no mistake. What was measured: docs/trained.md. Hardware: any; `:larger` wants a
GPU (2,570 TFLOP a category).
"""

from configs import default


def get_config(setting: str = 'reduced'):
  return default.trained('geotrans', {
      'reduced': {},
      'paper': {'width': 4},
      'larger': {'size': 64, 'depth': 16, 'width': 8},
  }, setting)
