"""The library without the binary: fit on good images, score new ones, draw what was found.

    python docs/example.py            writes docs/picture.png from the built-in data set
"""

from pathlib import Path

import numpy as np
from PIL import Image

from patchcore_jax import backbones
from patchcore_jax.data import folder, pipeline, preprocess, synthetic
from patchcore_jax.detectors import patchcore
from patchcore_jax.embedding import EmbeddingSpec
from patchcore_jax.scoring import ScoringSpec

DEFECTS = {'wood_veneer': 'crack', 'woven_fabric': 'hole', 'circuit_board': 'missing_part'}


def heatmap(image: np.ndarray, anomaly_map: np.ndarray, low: float, high: float) -> np.ndarray:
  """Image [h, w, 3] uint8 with the map [h, w] laid over it, from clear (low) to red (high)."""
  heat = np.clip((anomaly_map - low) / (high - low), 0, 1)[..., None]
  colour = np.concatenate([np.ones_like(heat), 0.8 - 0.8 * heat, np.zeros_like(heat)], axis=-1)
  alpha = 0.75 * np.minimum(2 * heat, 1)
  return (image * (1 - alpha) + 255 * colour * alpha).astype(np.uint8)


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
  drawn = heatmap(images.image[shown], maps[shown], np.quantile(maps[labels == 0], 0.99),
                  maps[shown].max())
  return np.concatenate([images.image[first_good], images.image[shown], drawn], axis=1)


if __name__ == '__main__':
  root = synthetic.prepare('runs/synthetic', categories=tuple(DEFECTS), num_workers=2)
  backbone = backbones.create('resnet18_slim.procedural')  # comes with the package
  rows = [row(root, category, defect, backbone) for category, defect in DEFECTS.items()]
  Image.fromarray(np.concatenate(rows)).save('docs/picture.png')
