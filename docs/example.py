"""The library without the binary: fit on good images, score new ones, draw what was found.

    python docs/example.py            writes docs/picture.png from the built-in data set
"""

from pathlib import Path

import numpy as np
from PIL import Image

from patchcore_jax import backbones
from patchcore_jax.builtin import synthetic
from patchcore_jax.data import folder, pipeline, preprocess
from patchcore_jax.detectors import patchcore
from patchcore_jax.embedding import EmbeddingSpec
from patchcore_jax.report import overlay
from patchcore_jax.scoring import ScoringSpec

DEFECTS = {'wood_veneer': 'crack', 'woven_fabric': 'hole', 'circuit_board': 'missing_part'}


def row(root: Path, category: str, defect: str, backbone: backbones.Backbone) -> np.ndarray:
  """A good part, a defect, and the heatmap of the defect, side by side."""
  data = folder.MVTEC.load_category(root, category)
  spec, embedding = preprocess.Preprocessing(resize=(256,), crop=(256,)), EmbeddingSpec('mean')
  good = pipeline.batches(data.train, spec, batch_size=20)
  bank = patchcore.fit(backbone, good, len(data.train), embedding=embedding,
                       coreset_spec=patchcore.CoresetSpec(ratio=0.02))

  images = next(pipeline.batches(data.test, spec, batch_size=len(data.test)))
  (prediction,) = patchcore.predict(backbone, bank, [images], embedding=embedding,
                                    scoring_spec=ScoringSpec())
  labels = np.array([e.label for e in data.test])
  maps = prediction.anomaly_maps[0]
  shown = max(i for i, e in enumerate(data.test) if e.defect == defect)  # the plainest
  first_good = int(np.argmin(labels))
  drawn = overlay.overlay(images.image[shown], maps[shown], np.quantile(maps[labels == 0], 0.99),
                          maps[shown].max())
  return np.concatenate([images.image[first_good], images.image[shown], drawn], axis=1)


if __name__ == '__main__':
  root = synthetic.prepare('runs/synthetic', categories=tuple(DEFECTS), num_workers=2)
  backbone = backbones.create('resnet18_slim.procedural')  # comes with the package
  rows = [row(root, category, defect, backbone) for category, defect in DEFECTS.items()]
  Image.fromarray(np.concatenate(rows)).save('docs/picture.png')
