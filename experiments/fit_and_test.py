"""Fits and tests on one category, and prints how long each took: our side of beside_anomalib.

    python -m experiments.fit_and_test --config=configs/parity/anomalib.py --config.data.root=PATH

The last line is JSON: seconds of the fit and of the test, image AUROC, versions. The fit ends with a saved
bank, the test with image scores and anomaly maps; no thresholds, no metrics of pixels, no report, for which
there is `experiments.mvtec`. Of several coreset ratios the largest is tested.
"""

import json
import platform
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import cli, wiring
from patchcore_jax import metrics
from patchcore_jax.banks import store
from patchcore_jax.detectors import Run, streaming
from patchcore_jax.evaluation.data import load_categories, located
from patchcore_jax.evaluation.images import Images
from patchcore_jax.evaluation.networks import create, resolved

cli.key_flags('config')


def main(_) -> None:
  print(json.dumps(measure(cli.CONFIG.value)))


def measure(config: ConfigDict) -> dict[str, float | str]:
  """Fits and tests.

  Raises:
    ValueError: a bad config, or several categories.
  """
  settings = resolved(wiring.settings(config))
  categories = load_categories(located(settings.data))
  if len(categories) != 1:
    raise ValueError(
        f'{len(categories)} categories: expected one. Name it with --config.data.categories=NAME.')
  images, networks = Images(settings, categories[0]), create(settings.backbone, settings.seed)
  with tempfile.TemporaryDirectory() as scratch:
    began = time.perf_counter()
    model = settings.method.fit(images.train, networks, Run(
        seed=settings.seed, memory_gb=settings.fit.memory_gb, scratch=scratch,
        keep_images=settings.fit.keep_images))
    store.save(Path(scratch) / 'bank', model)
    fitted = time.perf_counter()
    score_fn = settings.method.score_fn(model, networks, search=settings.search)
    index, scores = zip(*streaming.predict(
        score_fn, images.test.batches(), image_size=model.description.image_size), strict=True)
    ended = time.perf_counter()
  labels = [images.test.examples[i].label for i in np.concatenate(index)]
  return {
      'fit': fitted - began, 'test': ended - fitted, 'num_train': model.description.num_images,
      'num_test': len(labels),
      'bank_size': settings.method.bank_size(model, max(settings.ratios)) if settings.ratios else 0,
      'image_auroc': metrics.auroc(labels, np.concatenate([s.image for s in scores])),
      'versions': f'JAX {jax.__version__}, Python {platform.python_version()}'}


if __name__ == '__main__':
  flags.mark_flags_as_required(['config'])
  cli.run(main)
