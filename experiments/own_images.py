"""Fits a part as `patchcore fit` does by default, for several seeds, and tests the model.

Each fit is a process of its own, so that its peak of memory is its own. `experiments.benchmark
--subject=own_images` prints what is found.
"""

import concurrent.futures
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from patchcore_jax import disk_arrays, metrics
from patchcore_jax.builtin import synthetic
from patchcore_jax.evaluation.data import load_categories
from patchcore_jax.settings import DataSpec

_BATCH = 8  # images at a time of a test


class Found(NamedTuple):
  """What one fit and its test gave.

  Attributes:
    fit_seconds: from files to a model, thresholds included.
    peak_gb: the most memory of the process until the end of the fit.
    images_per_second: of the test, from files to findings, without compiling.
    image_auroc: of the test.
    alarms, num_good: good test images that alarm, and how many there are.
    found, num_defective: defective ones that do.
  """

  fit_seconds: float
  peak_gb: float
  images_per_second: float
  image_auroc: float
  alarms: int
  num_good: int
  found: int
  num_defective: int


def fit_and_test(
    root: str, category: str, network: str, seed: int, false_alarm_rate: float = 0.01, cache: str = 'off',
) -> Found:
  """Fits on the good training images of a category in MVTec's layout, and tests on its test images.

  Args:
    root: the folder of the category.
    category: its name.
    network: name of the backbone.
    seed: of all that is random.
    false_alarm_rate: of the thresholds.
    cache: folder of compiled programs, as --compilation_cache says it.

  Raises:
    ValueError: no such category, or no test images of both kinds.
  """
  from patchcore_jax import backbones, inspection  # a child of `measure` imports JAX only here
  from patchcore_jax.cli import terminal

  terminal.keep_compiled(cache)
  (part,) = load_categories(DataSpec(root=root, categories=(category,)))
  labels = np.array([example.label for example in part.test])
  if len(set(labels.tolist())) < 2:
    raise ValueError(f'{category}: expected good and defective images in its test folder.')
  backbone = backbones.create(network)
  began = time.perf_counter()
  inspector = inspection.fit(
      [example.image_path for example in part.train], backbone=backbone, false_alarm_rate=false_alarm_rate,
      seed=seed)
  fit_seconds, peak = time.perf_counter() - began, disk_arrays.peak_bytes()
  paths = [example.image_path for example in part.test]
  list(inspector.inspect(paths[:_BATCH], batch_size=_BATCH))  # compiles
  began = time.perf_counter()
  findings = list(inspector.inspect(paths, batch_size=_BATCH))
  seconds = time.perf_counter() - began
  alarm = np.array([finding.anomalous for finding in findings])
  return Found(
      fit_seconds, peak / 1e9, len(paths) / seconds,
      metrics.auroc(labels, [finding.score for finding in findings]), int(alarm[labels == 0].sum()),
      int((labels == 0).sum()), int(alarm[labels == 1].sum()), int((labels == 1).sum()))


def measure(
    root: str, category: str, networks: Sequence[str], seeds: int, *, cache: str = 'off',
    run: Callable[..., Found] | None = None) -> Iterator[str]:
  """Fits and tests for every network and seed, and yields a table of medians and ranges in Markdown.

  Args:
    root: folder in MVTec's layout; '' for the built-in data, which is drawn for the while.
    category: its name.
    networks: names of backbones.
    seeds: how many.
    cache: folder of compiled programs.
    run: called with the arguments of `fit_and_test`; None to do that in a process for each.
  """
  run = run or _in_a_process
  with tempfile.TemporaryDirectory() as drawn:
    if not root:
      root = str(synthetic.prepare(drawn, categories=(category,)))
    yield f'### Own images: {category}, {seeds} seeds, false-alarm rate 1 %; medians (ranges)\n'
    yield ('| network | fit, thresholds included | peak memory | images/s | image AUROC | good ones that '
           'alarm | defective ones found |\n|---|---|---|---|---|---|---|')
    for network in networks:
      yield row(network, [run(root, category, network, seed, cache=cache) for seed in range(seeds)])
    yield ''


def row(network: str, found: Sequence[Found]) -> str:
  """Writes a network's line of the table.

  >>> row('net', [Found(10, 1, 20, 0.95, 0, 60, 30, 40), Found(12, 1, 22, 0.97, 2, 60, 34, 40)])[:50]
  '| net | 11 (10 to 12) s | 1 (1 to 1) GB | 21 (20 t'
  """
  columns = {name: np.array([getattr(one, name) for one in found], float) for name in Found._fields}

  def cell(name, form='.3g', scale=1):
    values = scale * columns[name]
    return f'{np.median(values):{form}} ({values.min():{form}} to {values.max():{form}})'

  return (
      f'| {network} | {cell("fit_seconds")} s | {cell("peak_gb")} GB | {cell("images_per_second")} | '
      f'{cell("image_auroc", ".1f", 100)} | {cell("alarms", "g")} of {found[0].num_good} | '
      f'{cell("found", "g")} of {found[0].num_defective} |')


def _in_a_process(*args, **kwargs):
  """Runs `fit_and_test` in a process that is started afresh."""
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(fit_and_test, *args, **kwargs).result()
