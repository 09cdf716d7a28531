"""Fits and measures PatchCore on every category of a data set in MVTec layout.

    python -m experiments.mvtec --config=configs/demo.py --workdir=runs/demo
    python -m experiments.mvtec --config=configs/wrn50.py --config.data.root=PATH --workdir=runs/wrn50

Writes WORKDIR/results.csv (a row per category and coreset ratio), WORKDIR/config.json and
WORKDIR/banks/<category>/. A run that was stopped goes on after its last finished category when the
same command is given again.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import cli, wiring
from patchcore_jax import memory_bank, metrics, parallel
from patchcore_jax.backbones import Backbone
from patchcore_jax.data import folder
from patchcore_jax.detectors import patchcore
from patchcore_jax.report import results

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, for example configs/demo.py. Each of its fields is a flag too, as in '
    '--config.data.root=PATH; configs/default.py explains them.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for results, banks and the config.')


_NO_INFLUENCE = ('fit.', 'search.', 'data.num_workers')  # on results: a run may go on with others


def main(_) -> None:
  run(_CONFIG.value, _WORKDIR.value)


def run(config: ConfigDict, workdir: str | os.PathLike) -> list[results.Row]:
  """The whole experiment.

  Args:
    config: see `configs/default.py`.
    workdir: made if absent; one that holds results of the same config is continued.

  Returns:
    One row per category and ratio.

  Raises:
    ValueError: bad config, bad data, or a workdir that holds a run with another config.
  """
  workdir = Path(workdir)
  settings = wiring.settings(config)
  published = _published(config)
  _check_same_config(config, workdir)  # before anything long
  with cli.progress_bar('built-in data') as progress:
    categories = wiring.load_data(config, lambda done, total: progress('draw', done, total))
  backbone = wiring.create_backbone(config)
  cli.console.print(
      f'backbone {backbone.name}, layers {", ".join(backbone.layers)}; '
      f'{len(categories)} categories; results in {workdir}')
  if backbone.name.endswith('.random'):
    cli.console.print('[bold]RANDOM WEIGHTS: these numbers do not show what PatchCore can do.[/bold]')
  _claim(config, workdir)

  rows = results.read_csv(workdir / 'results.csv')
  finished = {(row['category'], row['coreset_ratio']) for row in rows}
  for category in categories:
    if all((category.name, ratio) in finished for ratio in settings.ratios):
      cli.console.print(f'{category.name}: finished before')
      continue
    rows += _evaluate(config, settings, backbone, category, workdir / 'banks' / category.name)
    results.write_csv(workdir / 'results.csv', rows)
  results.print_table(rows, published=published)
  return rows


def _evaluate(
    config: ConfigDict, settings: wiring.Settings, backbone: Backbone,
    category: folder.Category, bank_path: Path,
) -> list[results.Row]:
  """Fits (or restores), predicts and measures one category: a row per ratio."""
  skipped = []
  with cli.progress_bar(category.name) as progress:
    if bank_path.exists():
      bank = memory_bank.restore(bank_path, expected=_expected(settings, backbone))
    else:
      bank_path.parent.mkdir(exist_ok=True)
      bank = _fit(config, settings, backbone, category, skipped, bank_path.parent, progress)
      memory_bank.save(bank_path, bank)
    num_skipped = bank.description['num_skipped']
    sizes = bank.sizes(settings.ratios)

    test, masks, times = [], [], [time.monotonic()]
    batches = wiring.batches(
        config, category.test, settings.preprocessing, skipped, with_masks=category.has_masks)
    for prediction in patchcore.predict(
        backbone, bank, _keep_masks(batches, masks), embedding=settings.embedding,
        scoring_spec=settings.scoring, search=settings.search, sizes=sizes):
      test.append(prediction)
      times.append(time.monotonic())
      progress('predict', sum(len(p.index) for p in test), len(category.test))
  if not test:
    raise ValueError(f'{category.name}: no test image could be read.')
  num_test = sum(len(p.index) for p in test)
  num_skipped += len(category.test) - num_test
  for error in skipped:
    cli.console.print(f'skipped: {error}', markup=False)
  labels = np.array([category.test[i].label for p in test for i in p.index])
  masks = np.concatenate(masks) if category.has_masks else None
  batch_size = parallel.divisible_batch_size(config.data.batch_size)
  rows = []
  for i, (ratio, size) in enumerate(zip(settings.ratios, sizes, strict=True)):
    scores = np.concatenate([p.image_scores[i] for p in test])
    maps = np.concatenate([p.anomaly_maps[i] for p in test])
    measured = metrics.evaluate(labels, scores, masks, maps, **config.metrics)
    rows.append({
        'category': category.name, 'coreset_ratio': ratio,
        'num_train': bank.description['num_images'], 'num_test': num_test,
        'num_skipped': num_skipped, 'bank_size': size, **measured,
        'fit_seconds': round(bank.description['fit_seconds'], 2),
        'ms_per_image': round(_ms_per_image(times, batch_size), 2)})
  return rows


def _ms_per_image(times, batch_size):
  """Of a full batch, the median; the first, which compiles, counts only where there is no other."""
  seconds = np.diff(times)
  return 1000 * float(np.median(seconds[1:] if len(seconds) > 1 else seconds)) / batch_size


def _fit(config, settings, backbone, category, skipped, scratch, progress) -> memory_bank.MemoryBank:
  started = time.monotonic()
  bank = patchcore.fit(
      backbone, wiring.batches(config, category.train, settings.preprocessing, skipped),
      len(category.train), embedding=settings.embedding, coreset_spec=settings.coreset,
      memory_gb=config.fit.memory_gb, scratch=scratch,
      notify=lambda plan: cli.console.print(f'{category.name}: {plan}'), progress=progress)
  bank.description.update(
      _expected(settings, backbone), category=category.name, num_skipped=len(skipped),
      fit_seconds=time.monotonic() - started)
  return bank


def _expected(settings, backbone):
  """What a bank found in the workdir must have been made with."""
  preprocessing = vars(settings.preprocessing).copy()
  del preprocessing['mask_resize'], preprocessing['mask_threshold']  # no concern of a bank's
  return patchcore.describe(backbone, settings.embedding) | {
      'preprocess': preprocessing, 'coreset': vars(settings.coreset)}


def _keep_masks(batches, masks):
  """Passes batches on; their masks stay on the host, where the metrics are computed."""
  for batch in batches:
    if batch.mask is not None:
      masks.append(batch.mask[batch.valid])
    yield batch


def _published(config):
  return {
      (metric, float(ratio)): results.read_published(config.published[metric], method)
      for ratio, method in zip(config.published.ratios, config.published.methods, strict=True)
      for metric in ('image_auroc', 'pixel_auroc', 'aupro')}


def _check_same_config(config, workdir) -> None:
  path = workdir / 'config.json'
  if not (workdir / 'results.csv').exists() and not list(workdir.glob('banks/*')):
    return  # nothing yet that could be mixed
  if not path.exists():
    raise ValueError(f'{workdir} holds results but no config.json: use another --workdir.')
  before = memory_bank.flat(json.loads(path.read_text()))
  now = memory_bank.flat(wiring.to_json(config))
  differences = [
      f'{name} was {before.get(name)!r}, now {now.get(name)!r}'
      for name in sorted({*before, *now})
      if before.get(name) != now.get(name) and not name.startswith(_NO_INFLUENCE)]
  if differences:
    raise ValueError(
        f'{workdir} holds a run with other settings: {"; ".join(differences)}. Use another --workdir, '
        'or the settings of that run.')


def _claim(config, workdir) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  temporary = workdir / 'config.json.tmp'
  temporary.write_text(json.dumps(wiring.to_json(config), indent=2) + '\n')
  os.replace(temporary, workdir / 'config.json')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
