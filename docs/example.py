"""Uses the library without a binary: fits on good images, scores new ones, draws what was found.

    python docs/example.py            writes docs/picture.png from the built-in data set
"""

from pathlib import Path

import numpy as np
from PIL import Image

from patchcore_jax import backbones
from patchcore_jax.builtin import synthetic
from patchcore_jax.data import folder
from patchcore_jax.data.dataset import FileData
from patchcore_jax.detectors import PatchCore, streaming
from patchcore_jax.report import overlay
from patchcore_jax.settings import EmbeddingSpec, Preprocessing

DEFECTS = {'wood_veneer': 'crack', 'woven_fabric': 'hole', 'circuit_board': 'missing_part'}


def row(root: Path, category: str, defect: str, backbone: backbones.Backbone) -> np.ndarray:
  """Draws a good part, a defect, and the heatmap of the defect, side by side."""
  data, size = folder.MVTEC.load_category(root, category), Preprocessing(resize=(256,), crop=(256,))
  detector = PatchCore(ratio=0.02, embedding=EmbeddingSpec('mean'))
  model = detector.fit(FileData(data.train, size, batch_size=20), [backbone])

  (images,) = FileData(data.test, size, batch_size=len(data.test)).batches()
  ((_, scores),) = streaming.predict(detector.score_fn(model, [backbone]), [images])
  labels, maps = np.array([e.label for e in data.test]), scores.map
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
