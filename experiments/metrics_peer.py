"""Computes metrics of maps in a process of its own, and prints seconds, memory and values: metrics_speed's.

    PYTHON experiments/metrics_peer.py FOLDER --side=anomalib --what=four [--repeats=3] [--read_each_time]

FOLDER has I.map.npy and I.mask.npy for images I from 0 on (experiments.metrics_speed makes it). PYTHON is
one with NumPy and what the side needs: this package, anomalib, or, with --official=FOLDER, MVTec's evaluation
script, which imports SciPy and tifffile. The last line is JSON. Maps lie in memory before the clock starts,
unless they are read whenever they are asked for; memory is counted beyond what was in use then.
"""

import argparse
import contextlib
import functools
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_BATCH = 32  # images at a time in anomalib, its default


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder', type=Path)
  parser.add_argument('--side', choices=sorted(_SIDES), required=True)
  parser.add_argument('--what', required=True, help='a metric, or a group of them that the side has')
  parser.add_argument('--repeats', type=int, default=1)
  parser.add_argument('--read_each_time', action='store_true', help='keep no map in memory')
  parser.add_argument('--official', help="folder of MVTec's script")
  print(json.dumps(measured(parser.parse_args())))


def measured(args: argparse.Namespace) -> dict[str, Any]:
  """Computes what is asked for, some times over; the memory is that of the first time."""
  if args.official:
    sys.path.insert(0, args.official)
  compute = _SIDES[args.side](args.what)
  arrays = {name: Arrays(args.folder, name) for name in ('map', 'mask')}
  if not args.read_each_time:
    arrays = {name: array.together() for name, array in arrays.items()}
  seconds, before, peak = [], _peak(), None
  for _ in range(args.repeats):
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # scripts talk
      values = compute(arrays['map'], arrays['mask'])
    seconds.append(time.perf_counter() - began)
    peak = peak or _peak()
  return {'seconds': seconds, 'bytes': peak - before, 'bytes_in_all': peak, 'values': values}


def _peak():
  """Reads the most memory that the process has had so far, in bytes."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Arrays(Sequence):
  """The maps or masks of a folder, each read whenever it is asked for."""

  def __init__(self, folder: Path, name: str):
    self._paths = sorted(folder.glob(f'*.{name}.npy'), key=lambda path: int(path.name.split('.')[0]))

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int) -> np.ndarray:
    return np.load(self._paths[i])

  def together(self) -> np.ndarray:
    """Reads all into one array, one after another: the peak of memory is that of the array, not twice it."""
    first = self[0]
    array = np.empty((len(self), *first.shape), first.dtype)
    for i in range(len(self)):
      array[i] = self[i]
    return array


# Sides: each gives, for a name, a function of maps and masks that gives {metric: value}.


def ours(what: str) -> Callable[[Sequence, Sequence], dict[str, float | None]]:
  """Chooses what this package computes: a group, or a metric of its table that is of pixels."""
  from scipy import ndimage  # noqa: F401, before the clock starts

  from patchcore_jax import metrics
  from patchcore_jax.metrics import checks, curve, ranking, saturation, working_points

  def images(maps, masks):
    """Labels, and maxima as scores."""
    pairs = [(np.asarray(masks[i]).any(), np.asarray(maps[i]).max()) for i in range(len(maps))]
    return [np.array(column) for column in zip(*pairs)]

  def everything(maps, masks):
    labels, scores = images(maps, masks)
    good = np.flatnonzero(~labels)
    anomalous = np.where(np.arange(len(labels)) % 2, saturation.LOGICAL, saturation.STRUCTURAL)
    return metrics.evaluate(
        labels, scores, masks, maps, validation=Some(maps, good[:20]), channels=Channels(masks, labels),
        kinds=np.where(labels, anomalous, saturation.GOOD),
        config={1: saturation.Defect('made', 1, 0.5, True)})

  def ad(maps, masks):
    return metrics.evaluate(*images(maps, masks), masks, maps)

  def four(maps, masks):
    found = curve.of_regions(maps, masks)
    return {'pixel_auroc': ranking.auroc_of(found), 'pixel_ap': ranking.average_precision_of(found),
            'pixel_f1': working_points.f1_optimal_of(found).f1, 'aupro': found.area(0.3)}

  def official(maps, masks):
    return {'aupro': metrics.aupro(maps, masks), 'image_auroc': metrics.auroc(*images(maps, masks))}

  def single(maps, masks):
    metric = metrics.METRICS[what]
    pixels = metric.needs == ('pixels',)
    try:
      found = metric.function(*([curve.of_regions(maps, masks)] if pixels else [maps, masks]))
    except checks.NotDefined:  # maps that are small, for trying out
      return {what: None}
    return {what: getattr(found, metric.field) if metric.field else found}

  return {'all': everything, 'ad': ad, 'four': four, 'official': official}.get(what, single)


def anomalib(what: str) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
  """Chooses what anomalib computes of pixels: 'four', or one of them."""
  import torch
  from anomalib.metrics import aupr, aupro, auroc, f1_score

  classes = {'pixel_auroc': auroc._AUROC, 'pixel_ap': aupr._AUPR, 'pixel_f1': f1_score._F1Max,
             'aupro': functools.partial(aupro._AUPRO, fpr_limit=0.3)}
  if what != 'four':
    classes = {what: classes[what]}

  def compute(maps, masks):
    found = {name: made() for name, made in classes.items()}
    for at in range(0, len(maps), _BATCH):
      scores, truth = (torch.from_numpy(array[at:at + _BATCH]) for array in (maps, masks))
      for metric in found.values():
        metric.update(scores, truth.int())
    return {name: float(metric.compute()) for name, metric in found.items()}

  return compute


def official(what: str) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
  """Takes the functions of MVTec's script, as it calls them; the only 'what' is 'official'."""
  assert what == 'official'
  pro, roc, generic = map(importlib.import_module, ('pro_curve_util', 'roc_curve_util', 'generic_util'))

  def compute(maps, masks):
    maps, masks = list(maps), list(masks)
    x, y = pro.compute_pro(maps, masks)
    labels = [int(np.any(mask > 0)) for mask in masks]
    return {'aupro': float(generic.trapezoid(x, y, x_max=0.3) / 0.3),
            'image_auroc': float(generic.trapezoid(*roc.compute_classification_roc(maps, np.max, labels)))}

  return compute


_SIDES = {'ours': ours, 'anomalib': anomalib, 'official': official}


class Some(Sequence):
  """Some of a sequence's arrays."""

  def __init__(self, arrays: Sequence, positions: Sequence[int]):
    self._arrays, self._positions = arrays, positions

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, i: int) -> np.ndarray:
    return self._arrays[self._positions[i]]


class Channels(Sequence):
  """All of a mask as the one channel of an image, and none of a good image."""

  def __init__(self, masks: Sequence, labels: Sequence[bool]):
    self._masks, self._labels = masks, labels

  def __len__(self) -> int:
    return len(self._masks)

  def __getitem__(self, i: int) -> Sequence[np.ndarray]:
    return (self._masks[i].astype(np.uint8),) if self._labels[i] else ()


if __name__ == '__main__':
  main()
