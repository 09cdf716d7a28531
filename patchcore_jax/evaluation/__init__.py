"""Labelled data -> a row of metrics for each category, scores of all images, and a report.

`evaluate` is the short way. `experiment.run` does the same of a record of all settings, and tells a listener
how it goes.
"""

import contextlib
import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from patchcore_jax.detectors import Detector, PatchCore
from patchcore_jax.evaluation.settings import Settings
from patchcore_jax.settings import BackboneSpec, DataSpec, MetricsSpec, Preprocessing, ReportSpec

__all__ = ['Settings', 'evaluate']


def evaluate(
    root: str | os.PathLike, *, detector: Detector | None = None, backbone: Any = 'auto',
    layout: str = 'folder', categories: Sequence[str] = (), good: Sequence[str] = (),
    ratios: Sequence[float] = (), protocol: str = 'paper', labelled_defects: float = 0.0,
    noise: float = 0.0, multi_class: bool = False, out: str | os.PathLike | None = None,
    preprocessing: Preprocessing | None = None, batch_size: int = 0, seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Mapping[str, Any]]:
  """Measures a detector on labelled data: fits it on the good training images of each category, and tests it.

  Args:
    root: the folder of a data set, or of one category, such as 'mvtec/screw'.
    detector: the method; `PatchCore()` by default.
    backbone: a name as `backbones.create` takes it, several joined by '+' for an ensemble, or a `Backbone`.
    layout: how the data set lies on disk, one of `data.layouts.LAYOUTS`; 'folder' is MVTec AD's.
    categories: names of categories; () for all.
    good: names of the folders of good parts; () for the usual ones, such as good, OK or normal.
    ratios: coreset ratios to score at, all from one fit; () for the detector's own.
    protocol: how it is measured, one of `settings.METRICS_PROTOCOLS` (docs/evaluation.md).
    labelled_defects: as of `settings.DataSpec`, for a method that learns from some.
    noise: as of `settings.DataSpec`, to measure how a method bears defects among its training images.
    multi_class: whether one model is fitted, on the training images of all categories.
    out: a folder for results.csv, config.json, scores/, banks/ and report.html, in which a run that was
      stopped goes on; None to write nothing.
    preprocessing: what is done to images; by default they are resized to 256 pixels and cropped to 224.
    batch_size: images that pass through the network at once; 0 for 8 on CPUs and 32 on accelerators.
    seed: the seed of everything that is random.
    progress: called with (stage, done, total); the stage begins with the category's name.

  Returns:
    A dict for each category and ratio, with the columns of results.csv (`report.results.columns`): the
    category, the ratio, every metric in `metrics.METRICS`, which is None where the data has no masks or the
    method makes no maps, the numbers of images, that of test images which are training images too
    (`num_leaked`), and times. Image AUROC, pixel AUROC and AUPRO lie in [0, 1].

  Warns:
    What the numbers may hide: odd masks, leaks, which folders were taken for what, what is not inspected.

  Raises:
    ImageError: a file that cannot be read.
    ValueError: no such data, or other bad settings; an `out` with results of other settings.

  >>> from patchcore_jax.builtin import synthetic
  >>> with tempfile.TemporaryDirectory() as root:  # doctest: +SKIP
  ...   synthetic.prepare(root, categories=['gear'])
  ...   rows = evaluate(f'{root}/gear', backbone='resnet18_slim.procedural')
  >>> rows[0]['category'], rows[0]['image_auroc'] > 0.8  # doctest: +SKIP
  ('gear', True)
  """
  from patchcore_jax.backbones import Backbone  # these import JAX
  from patchcore_jax.evaluation import experiment
  from patchcore_jax.evaluation.data import located

  networks = (backbone,) if isinstance(backbone, Backbone) else ()
  settings = Settings(
      located(DataSpec(layout, str(root), tuple(categories), tuple(good), batch_size=batch_size,
                       labelled_defects=labelled_defects, noise=noise, multi_class=multi_class)),
      detector or PatchCore(), tuple(ratios), preprocessing or Preprocessing(),
      BackboneSpec() if networks else BackboneSpec(backbone), metrics=MetricsSpec(protocol), seed=seed)
  listener = experiment.Listener(
      progress=lambda title: contextlib.nullcontext(
          lambda stage, done, total: progress and progress(f'{title}: {stage}', done, total)),
      notice=lambda line: warnings.warn(line, stacklevel=2))
  if out is not None:
    return experiment.run(settings, out, networks=networks, listener=listener)
  settings = dataclasses.replace(settings, report=ReportSpec(gallery=0))
  with tempfile.TemporaryDirectory() as workdir:
    return experiment.run(settings, workdir, networks=networks, listener=listener)
