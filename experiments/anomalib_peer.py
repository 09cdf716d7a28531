"""Fits and tests anomalib's PatchCore, and prints how long each took: the other side of beside_anomalib.

    PYTHON experiments/anomalib_peer.py FOLDER --ratio=0.01 [--resize=256] [--crop=224] [--batch=32]

PYTHON is that of an environment with anomalib and torch; nothing of this package is imported. FOLDER has
train/good, test/good and test/KIND. The last line is JSON: seconds of the fit and of the test, image AUROC,
versions. What the comparison is not about is off: metrics, pictures, validation (which would test half of
the test images once more), loggers. Anomaly maps are made, and the engine writes its checkpoint.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path


def main() -> None:
  os.environ['HF_HUB_OFFLINE'] = '1'
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder', type=Path)
  parser.add_argument('--ratio', type=float, required=True, help='of the coreset')
  parser.add_argument('--resize', type=int, default=256, help='height and width in pixels')
  parser.add_argument('--crop', type=int, default=224, help='height and width of the centre that is seen')
  parser.add_argument('--batch', type=int, default=32, help='images at a time')
  parser.add_argument('--workers', type=int, default=0, help='processes that read images; 0 for none')
  print(json.dumps(measure(parser.parse_args())))


def measure(args: argparse.Namespace) -> dict[str, float | str]:
  """Fits and tests. Weights are random: they decide about scores, not about time."""
  import anomalib
  import torch
  from anomalib.data import Folder
  from anomalib.engine import Engine
  from anomalib.models import Patchcore

  torch.manual_seed(0)
  kinds = sorted(path.name for path in (args.folder / 'test').iterdir() if path.name != 'good')
  data = Folder(
      name='part', root=args.folder, normal_dir='train/good', normal_test_dir='test/good',
      abnormal_dir=[f'test/{kind}' for kind in kinds], train_batch_size=args.batch,
      eval_batch_size=args.batch, num_workers=args.workers, val_split_mode='none')
  model = Patchcore(
      backbone='wide_resnet50_2', layers=('layer2', 'layer3'), pre_trained=False,
      coreset_sampling_ratio=args.ratio, evaluator=False, visualizer=False,
      pre_processor=Patchcore.configure_pre_processor((args.resize,) * 2, (args.crop,) * 2))
  with tempfile.TemporaryDirectory() as results:
    engine = Engine(
        default_root_dir=results, accelerator='cpu', devices=1, limit_val_batches=0,
        enable_progress_bar=False)
    began = time.perf_counter()
    engine.fit(model, datamodule=data)
    fitted = time.perf_counter()
    predictions = engine.predict(model, datamodule=data)
    ended = time.perf_counter()
  scores = torch.cat([batch.pred_score.flatten() for batch in predictions])
  labels = torch.cat([batch.gt_label.flatten() for batch in predictions]).bool()
  return {
      'fit': fitted - began, 'test': ended - fitted, 'num_train': len(data.train_data),
      'num_test': len(scores), 'bank_size': len(model.model.memory_bank),
      'image_auroc': _auroc(scores[~labels], scores[labels]),
      'versions': f'anomalib {anomalib.__version__}, torch {torch.__version__}, '
                  f'{torch.get_num_threads()} threads, Python {platform.python_version()}'}


def _auroc(good, anomalous):
  """Computes how often an anomalous image scores higher than a good one; a tie is half of that."""
  difference = anomalous[:, None] - good[None]
  return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


if __name__ == '__main__':
  main()
