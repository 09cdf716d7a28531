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

import json
import os
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import cli, methods, run_report, wiring
from experiments.images import Images
from patchcore_jax import atomic_files, metrics, parallel, processes
from patchcore_jax.banks import store
from patchcore_jax.data import preprocess
from patchcore_jax.report import per_image, results

cli.key_flags('config', 'workdir', *cli.OF_SEVERAL_PROCESSES)

# On results: a run may go on with others.
_NO_INFLUENCE = ('fit.', 'search.', 'report.', 'calibration.', 'data.num_workers')


def main(_) -> None:
  run(cli.CONFIG.value, cli.WORKDIR.value)


def run(config: ConfigDict, workdir: str | os.PathLike) -> list[results.Row]:
  """The whole experiment.

  Args:
    config: see `configs/default.py`.
    workdir: made if absent; one that holds results of the same config is continued.

  Returns:
    One row per category and ratio. Of several processes, the first measures, and the others return only what
    was measured in an earlier run.

  Raises:
    ValueError: bad config, bad data, or a workdir that holds a run with another config.
  """
  config = wiring.with_named_backbone(config)
  experiment = Experiment(config, workdir)  # before anything long
  published = _published(config)
  with cli.progress_bar('built-in data') as progress:
    categories = wiring.load_data(config, lambda done, total: progress('draw', done, total))
  backbones = wiring.create_backbones(config)
  for backbone in backbones:
    cli.console.print(f'backbone {backbone.name}, layers {", ".join(backbone.layers)}')
    cli.say_which(backbone.name)
  cli.console.print(f'{len(categories)} categories; results in {workdir}')
  experiment.claim()
  wiring.check_same_everywhere(config, _still_to_do(workdir, experiment, categories))
  method = methods.create(config, experiment.settings, backbones)
  for category in categories:
    if experiment.has(category.name):
      cli.console.print(f'{category.name}: finished before')
    else:
      experiment.evaluate(method, Images(config, experiment.settings, category))
  if processes.is_first():
    run_report.write(workdir, config, experiment.rows)
    results.print_table(experiment.rows, published=published)
    cli.console.print(f'Curves, scores and images: {Path(workdir) / "report.html"}')
  processes.wait()
  return experiment.rows


class Experiment:
  """A config and the workdir with its results so far.

  Attributes:
    settings: what the config says, checked.
    rows: of results.csv.
  """

  def __init__(self, config: ConfigDict, workdir: str | os.PathLike):
    """Raises ValueError for a bad config, or a workdir with results of another."""
    self._config, self._workdir = config, Path(workdir)
    self.settings = wiring.settings(config)
    _check_same_config(config, self._workdir)
    self.rows = results.read_csv(self._workdir / 'results.csv')

  def claim(self) -> None:
    """Makes the workdir and writes config.json."""
    if processes.is_first():
      _claim(self._config, self._workdir)

  def has(self, category: str) -> bool:
    """Whether its rows are there."""
    finished = {row['coreset_ratio'] for row in self.rows if row['category'] == category}
    return finished >= set(self.settings.ratios if self._config.detector == 'patchcore' else (1.0,))

  def evaluate(self, method, images: Images) -> None:
    """Fits (or restores), predicts and measures one category: adds a row per ratio.

    Of several processes each predicts a part of the test images; the first puts them together and measures.
    """
    config = self._config
    with cli.progress_bar(images.name) as progress:
      model = method.obtain(
          self._workdir / 'banks' / images.name, images,
          lambda plan: cli.console.print(f'{images.name}: {plan}'), progress)
      description, sizes = method.describe(model), method.sizes(model)
      test, masks, times = [], [], [time.monotonic()]
      part = processes.part(len(images.test_examples))
      for prediction in method.predict(model, _keep_masks(images.test(part), masks)):
        test.append(prediction)
        times.append(time.monotonic())
        progress('predict', sum(len(p.index) for p in test), part.stop - part.start)
    if not test:
      raise ValueError(f'{images.name}: no test image could be read.')
    for message in sorted({str(error) for error in images.skipped}):
      cli.notices.print(f'skipped: {message}', markup=False)
    index = processes.joined(np.concatenate([p.index for p in test]) + np.int32(part.start))
    masks = masks if test[0].anomaly_maps is not None else []
    masks = processes.joined(np.concatenate(masks)) if masks else None
    examples = [images.test_examples[i] for i in index]
    labels = np.array([e.label for e in examples])
    scores_of_images = []
    for i, (ratio, size) in enumerate(sizes.items()):
      scores, maps, patches, nearest = _of_all(test, i)
      if not processes.is_first():
        continue
      measured = metrics.evaluate(labels, scores, masks, maps, **config.metrics)
      self.rows.append({
          'category': images.name, 'coreset_ratio': ratio, 'num_train': description['num_images'],
          'num_test': len(index),
          'num_skipped': description['num_skipped'] + len(images.test_examples) - len(index),
          'bank_size': size, **measured, 'fit_seconds': round(description['fit_seconds'], 2),
          'ms_per_image': round(_ms_per_image(times, config), 2)})
      scores_of_images += [
          per_image.Score(e.image_path, e.defect, e.label, ratio, float(score))
          for e, score in zip(examples, scores, strict=True)]
      if config.report.errors and ratio == max(sizes) and masks is not None:
        self._write_errors(images.name, examples, labels, scores, masks, maps, ratio)
      if ratio == max(sizes):
        shown = run_report.category(
            images.name, examples, scores, masks, maps,
            thresholds=run_report.thresholds(description, self.rows[-1]),
            why=run_report.reasons(model, images, patches, nearest, self.settings.preprocessing),
            preprocessing=self.settings.preprocessing, most=config.report.gallery)
    if not processes.is_first():
      return
    per_image.write_scores(self._workdir / 'scores' / f'{images.name}.csv', scores_of_images)
    run_report.keep(self._workdir, shown)
    results.write_csv(self._workdir / 'results.csv', self.rows)
    run_report.write(self._workdir, config, self.rows)

  def _write_errors(self, category, examples, labels, scores, masks, maps, ratio):
    """The images are read once more: they were not kept."""
    if len(set(labels)) < 2:
      return  # no threshold
    threshold = metrics.f1_optimal(labels, scores).threshold
    wrong = np.flatnonzero((scores >= threshold) != labels)
    loaded = [preprocess.load(examples[i], self.settings.preprocessing)[0] for i in wrong]
    per_image.write_errors(self._workdir / 'errors' / f'{category}.npz', per_image.Errors(
        np.stack(loaded) if loaded else np.zeros((0, *maps.shape[1:], 3), np.uint8), maps[wrong],
        masks[wrong], labels[wrong], np.array([examples[i].defect for i in wrong], str),
        np.array([examples[i].image_path for i in wrong], str), threshold, ratio))


def _of_all(predictions, i):
  """Of all batches of all processes, at bank size i: scores [n], maps [n, h, w], patches and nearest [n]."""
  fields = zip(*(p[1:] for p in predictions))
  return [None if batches[0] is None else processes.joined(np.concatenate([b[i] for b in batches]))
          for batches in fields]


def _still_to_do(workdir, experiment, categories):
  """Categories, how many images they have, and whether there is a bank."""
  return [(c.name, len(c.train), len(c.test), (Path(workdir) / 'banks' / c.name).exists())
          for c in categories if not experiment.has(c.name)]


def _ms_per_image(times, config):
  """Of a full batch, the median; the first, which compiles, counts only where there is no other."""
  seconds = np.diff(times)
  batch_size = parallel.divisible_batch_size(config.data.batch_size)
  seconds = float(np.median(seconds[1:] if len(seconds) > 1 else seconds))
  return 1000 * seconds / (batch_size * jax.process_count())


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
  before = store.flat(json.loads(path.read_text()))
  now = store.flat(wiring.to_json(config))
  differences = [
      f'{name} was {before.get(name)!r}, now {now.get(name)!r}'
      for name in sorted({*before, *now})
      if before.get(name) != now.get(name) and not name.startswith(_NO_INFLUENCE)]
  if differences:
    raise ValueError(
        f'{workdir} holds a run with other settings: {"; ".join(differences)}. Use another --workdir, '
        'or the settings of that run.')


def _claim(config, workdir) -> None:
  with atomic_files.written(workdir / 'config.json') as aside:
    aside.write_text(json.dumps(wiring.to_json(config), indent=2) + '\n')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main, distributed=True)
