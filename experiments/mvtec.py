"""Fits and measures a detector on every category of a data set.

    python -m experiments.mvtec --config=configs/demo.py --workdir=runs/demo
    python -m experiments.mvtec --config=configs/wrn50.py --config.data.root=PATH --workdir=runs/wrn50

Writes results.csv (a row per category and coreset ratio), config.json, banks/<category>/,
scores/<category>.csv and report.html, a page with tables, curves and images, to WORKDIR. A run that was
stopped goes on after its last finished category when the same command is given again.

On several machines, which see the same data and the same WORKDIR, each runs the command with --distributed
(under Slurm, Open MPI or on a TPU pod), or with the address of the first one, as in

    --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0    # 1 on the second

Each reads its share of the images and keeps their embeddings; the results are those of one machine.
"""

import os
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments import cli, wiring
from patchcore_jax import processes
from patchcore_jax.cli import terminal
from patchcore_jax.evaluation import experiment
from patchcore_jax.report import results

cli.key_flags('config', 'workdir', *terminal.DISTRIBUTED)


def main(_) -> None:
  run(cli.CONFIG.value, cli.WORKDIR.value)


def run(config: ConfigDict, workdir: str | os.PathLike) -> list[results.Row]:
  """Fits and measures the detector on every category, and prints the table beside published numbers.

  Args:
    config: see `configs/default.py`.
    workdir: made if absent; one that holds results of the same config is continued.

  Returns:
    What `experiment.run` returns.

  Raises:
    ValueError: bad config, bad data, or a workdir that holds a run with another config.
  """
  settings, published = wiring.settings(config), _published(config)
  rows = experiment.run(settings, workdir, listener=terminal.listener())
  if processes.is_first():
    results.print_table(rows, published=published)
    terminal.say(f'Curves, scores and images: {Path(workdir) / "report.html"}')
  processes.wait()
  return rows


def _published(config):
  """Reads the published numbers that the config names."""
  return {
      (metric, float(ratio)): results.read_published(config.published[metric], method)
      for ratio, method in zip(config.published.ratios, config.published.methods, strict=True)
      for metric in ('image_auroc', 'pixel_auroc', 'aupro')}


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main, distributed=True)
