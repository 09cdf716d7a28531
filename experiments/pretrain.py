"""Trains the backbone that comes with the package, on images that it draws itself.

    python -m experiments.pretrain --config=configs/pretrain.py --workdir=runs/pretrain

Writes to WORKDIR: config.json, checkpoints/<step>, log.csv (a line every `report_every` steps) and, with
every checkpoint, backbone.safetensors, which is used as `--config.backbone.name=resnet18_slim
--config.backbone.weights=FILE`. A run that was stopped goes on, exactly, when the same command is given
again. On several devices each takes its share of every batch.
"""

import csv
import json
import math
import os
import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import cli
from patchcore_jax import atomic_files
from patchcore_jax.banks.model import BankError, to_json
from patchcore_jax.builtin import pool, procedural, training, views
from patchcore_jax.cli import terminal
from patchcore_jax.learned import loop

cli.key_flags('config', 'workdir')

_TO_SCALE = 64  # images on which the exported layers are brought to one scale


def main(_) -> None:
  run(cli.CONFIG.value, cli.WORKDIR.value)


def recipe(config: ConfigDict) -> training.Recipe:
  """Reads what the config says about training itself.

  Raises:
    ValueError: a value out of range, or an unknown name.
  """
  fields = {
      name: config[name] for name in (
          'architecture', 'objective', 'gray_free', 'batch_size', 'steps', 'warmup', 'learning_rate',
          'weight_decay', 'head_width', 'head_features')}
  arguments = config.objective_args.get(config.objective, {})
  seen = {k: tuple(v) if isinstance(v, (tuple, list)) else v for k, v in config.views.items()}
  return training.Recipe(
      layers=tuple(config.layers), objective_args=tuple(arguments.items()),
      views=views.ViewSpec(**seen), **fields)


def run(config: ConfigDict, workdir: str | os.PathLike, *, until: int | None = None) -> list[float]:
  """Trains from the last checkpoint in `workdir`, or from the start, to the end.

  Args:
    config: see `configs/pretrain.py`.
    workdir: made if absent.
    until: stop, with a checkpoint, at this step of the schedule.

  Returns:
    The loss of every step that this call made.

  Raises:
    ValueError: bad config, or a workdir that holds a run with another config.
  """
  workdir, spec = Path(workdir), recipe(config)
  task = training.task(spec)
  checkpoints = loop.Checkpoints(workdir / 'checkpoints', _settings(config))
  try:
    step, state = checkpoints.restore(loop.init(task, config.seed))
  except BankError as e:
    raise ValueError(f'{workdir} cannot be continued: use another --workdir, or the settings of the run '
                     f'that lies there. ({e})') from e
  end = spec.steps if until is None else min(until, spec.steps)
  log = _Log(workdir, step, config)
  terminal.console.print(
      f'{spec.architecture}, {spec.objective}, steps {step} to {end} of {spec.steps}; results in {workdir}')
  images = pool.Pool(
      config.seed, config.pool.size, image_size=config.pool.image_size, fresh=config.pool.fresh,
      num_workers=config.pool.num_workers)
  losses, pending = [], []
  try:
    if step < end:
      with terminal.progress_bar('pool') as progress:
        images.batch(step, spec.batch_size, lambda done, total: progress('draw', done, total))
    began = time.monotonic()  # the first rate has the compilation in it
    for done in loop.run(
        task, images, state, batch_size=spec.batch_size, seed=config.seed, first=step, last=end,
        every=math.gcd(config.report_every, config.save_every)):
      step, state = done.step, done.state
      losses += [report['loss'] for report in done.reports]
      pending += done.reports
      if step % config.report_every == 0 or step == end:
        now = time.monotonic()
        log.write(step, spec.steps, pending, len(pending) * spec.batch_size / (now - began))
        began, pending = now, []
      if step % config.save_every == 0 and step < end:
        _keep(workdir, spec, checkpoints, step, state, config)
    _keep(workdir, spec, checkpoints, step, state, config)
  finally:
    images.close()
  return losses


def _keep(workdir, spec, checkpoints, step, state, config):
  """Writes a checkpoint, and the backbone as it is now."""
  checkpoints.save(step, state)
  unseen = np.stack([
      procedural.draw(config.seed + 1, i, config.pool.image_size) for i in range(_TO_SCALE)])
  training.export(workdir / 'backbone.safetensors', spec, state, unseen)


def _settings(config):
  """Picks the settings that decide about the result; a run may go on with others of the rest."""
  settings = to_json(config.to_dict())
  del settings['report_every'], settings['save_every'], settings['pool']['num_workers']
  return settings


class _Log:
  """The log of a run, in config.json and log.csv of a workdir and on the console."""

  def __init__(self, workdir, step, config):
    """Writes config.json, and drops lines of log.csv behind `step`: those steps are made again."""
    with atomic_files.written(workdir / 'config.json') as aside:
      aside.write_text(json.dumps(to_json(config.to_dict()), indent=2) + '\n')
    self._path, self._rows = workdir / 'log.csv', []
    if self._path.exists():
      with self._path.open(newline='') as f:
        self._rows = [row for row in csv.DictReader(f) if int(row['step']) <= step]

  def write(self, step, steps, values, rate):
    """Adds a line with the means of what the steps reported."""
    mean = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
    told = ', '.join(f'{k} {v:.4f}' for k, v in mean.items())
    terminal.console.print(f'step {step}/{steps}: {told}; {rate:.0f} images/s')
    self._rows.append({'step': step, **{k: f'{v:.6f}' for k, v in mean.items()},
                       'images_per_second': f'{rate:.1f}'})
    with atomic_files.written(self._path) as aside, aside.open('w', newline='') as f:
      writer = csv.DictWriter(f, self._rows[-1])
      writer.writeheader()
      writer.writerows(self._rows)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
