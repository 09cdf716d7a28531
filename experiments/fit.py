"""Learns a part from a folder of good images: one bank, with thresholds.

    python -m experiments.fit --config=configs/own.py --config.data.root=FOLDER --out=BANK

FOLDER holds images of good parts; nothing else is needed, no defects and no masks. A pattern such as
'parts/**/*.png' takes images from several folders. The bank, a folder, is all that experiments.predict,
experiments.serve and experiments.export need. Several machines fit together as those of experiments.mvtec do.
"""

import collections
import datetime
import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import cli, wiring
from experiments.images import drawn
from patchcore_jax import inspection, processes
from patchcore_jax.banks import provenance, store
from patchcore_jax.banks.store import MemoryBank
from patchcore_jax.data import folder, survey
from patchcore_jax.data.folder import Example
from patchcore_jax.detectors import patchcore
from patchcore_jax.inspection import calibration

cli.key_flags('config', 'out', *cli.OF_SEVERAL_PROCESSES)
_SHOWN = 5  # names in a message
_LONG = 2.0  # seconds that are worth an estimate


def main(_) -> None:
  run(cli.CONFIG.value, cli.OUT.value)


def run(config: ConfigDict, out: str) -> MemoryBank:
  """Looks at the images, fits, calibrates, saves.

  Args:
    config: see `configs/default.py`; `data.source` is 'images'.
    out: the bank, which must not exist.

  Raises:
    ValueError: bad config, no images, or `out` exists.
  """
  _check(config, out)
  config = wiring.with_named_backbone(config)
  settings = wiring.settings(config)
  paths = folder.find_images(config.data.root)
  name = _name(config.data.root)
  for line in report(survey.survey(paths)):
    cli.console.print(line, markup=False)
  examples = [Example(path, (), 0, name, 'good') for path in paths]
  examples = drawn(examples, config.data.shots, config.seed, config.data.draw)
  (backbone,) = wiring.create_backbones(config)
  cli.console.print(
      f'backbone {backbone.name}, layers {", ".join(backbone.layers)}, precision {backbone.precision}')
  cli.say_which(backbone.name)
  wiring.check_same_everywhere(config, [Path(path).name for path in paths])
  skipped, began = [], time.monotonic()
  part = processes.part(len(examples))
  recorder = provenance.Recorder(
      wiring.batches(config, examples[part], settings.preprocessing, skipped), config.fit.keep_images)
  arguments = {
      'embedding': settings.embedding, 'coreset_spec': settings.coreset, 'joint': True,
      'memory_gb': config.fit.memory_gb, 'scratch': Path(out).absolute().parent,
      'notify': lambda plan: cli.console.print(f'bank: {plan}')}
  Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
  with cli.progress_bar(name) as progress:
    arguments['progress'] = _with_estimate(
        progress, config.data.batch_size, config.calibration.folds)
    if config.calibration.folds:
      bank, scores = patchcore.fit_and_cross_score(
          backbone, recorder, part.stop - part.start, scoring_spec=settings.scoring,
          folds=config.calibration.folds, search=settings.search, **arguments)
    else:
      bank, scores = patchcore.fit(backbone, recorder, part.stop - part.start, **arguments), None
  for message in sorted({str(error) for error in skipped}):
    cli.notices.print(f'skipped: {message}', markup=False)
  names = [examples[i].image_path for i in processes.joined(np.array(recorder.index, np.int32) + part.start)]
  bank.extras.update(provenance.pack(processes.joined_files(recorder.files)))
  bank.description.update(
      inspection.described(
          preprocessing=settings.preprocessing, scoring=settings.scoring,
          source={'name': config.backbone.name, 'weights': config.backbone.weights, 'seed': config.seed}),
      category=name, images=names, num_skipped=len(examples) - len(names),
      fit_seconds=time.monotonic() - began)
  if scores:
    found = calibration.calibrate(
        scores.image_scores, scores.map_maxima, false_alarm_rate=config.calibration.false_alarm_rate,
        method='cross', allowances=_allowances(config, settings, backbone, bank, names))
    bank.description['calibration'] = calibration.to_json(found)
    for line in verdict(found, names):
      cli.console.print(line, markup=False)
  provenance.record(bank.description, f'fitted on {len(names)} images of {config.data.root}')
  if processes.is_first():
    store.save(out, bank)
  processes.wait()
  cli.console.print(
      f'{len(bank.embeddings)} patches in {out}. Next: python -m experiments.predict --bank={out} '
      '--images=FOLDER --out=DIR', markup=False)
  return bank


def report(found: survey.Survey) -> list[str]:
  """Lines that tell what a survey found.

  >>> report(survey.Survey({(700, 500): 2}, {'RGB': 2}, [], [['a.png', 'b.png']], []))
  ['2 images: 2 of 700 x 500 pixels; 2 RGB', 'equal files, which count twice: a.png, b.png']
  """
  sizes = ', '.join(f'{n} of {w} x {h} pixels' for (w, h), n in list(found.sizes.items())[:_SHOWN])
  more = f' and {len(found.sizes) - _SHOWN} other sizes' if len(found.sizes) > _SHOWN else ''
  modes = ', '.join(f'{n} {mode}' for mode, n in found.modes.items())
  lines = [f'{sum(found.modes.values())} images: {sizes}{more}; {modes}']
  reasons = collections.defaultdict(list)
  for path, why in found.odd:
    reasons[why].append(path)
  lines += [f'odd, look at {"them" if len(paths) > 1 else "it"}: {_some(paths)} ({why})'
            for why, paths in reasons.items()]
  lines += [f'equal files, which count twice: {_some(group)}' for group in found.duplicates]
  return lines


def verdict(found: calibration.Calibration, names: list[str]) -> list[str]:
  """Lines that tell the thresholds, what they guarantee, and which training images are unlike the others."""
  n, rate = len(found.image_scores), found.false_alarm_rate
  lines = [
      f'threshold {found.image_threshold:.4g} for images, {found.pixel_threshold:.4g} for pixels, from '
      f'{n} good images: at most {100 * found.guaranteed_rate:.2g} % of good images alarm']
  if found.guaranteed_rate > rate:
    lines.append(
        f'{100 * rate:g} % were asked for, which takes {-(-1 // rate) - 1:.0f} images; {n} can vouch for '
        f'{100 * found.guaranteed_rate:.2g} %. Give more good images for a smaller rate.')
  if found.image_allowance or found.pixel_allowance:
    lines.append(
        f'on another kind of device scores are off by up to {found.image_allowance:.2g}, which is '
        f'{100 * found.image_allowance / found.image_threshold:.2g} % of the threshold, and in it already')
  if found.allows_much:
    lines.append(
        'That is more than a tenth of the way from a usual good image to the threshold. If the bank is for '
        'another kind of device, fit it there, or with --config.backbone.precision=float32.')
  odd = calibration.suspicious(found.image_scores)
  if odd:
    lines.append(
        f'{len(odd)} training image{"s look" if len(odd) > 1 else " looks"} unlike the others; perhaps not '
        'good, or of a rare kind. Look, remove what is defective, and fit again:')
    lines += [f'  {names[i]} (score {found.image_scores[i]:.4g})' for i in odd]
  return lines


def _allowances(config, settings, backbone, bank, names):
  """How much further the thresholds are for devices that compute the network otherwise: (images, pixels)."""
  if backbone.elsewhere is None:
    return 0.0, 0.0
  sample, others = inspection.sample_of(bank, settings.scoring, config.seed)
  own = sample[processes.part(len(sample))]
  found = inspection.score_differences(
      backbone, others, lambda: wiring.batches(
          config, [Example(names[i], (), 0, '', 'good') for i in own], settings.preprocessing, []),
      embedding=settings.embedding, scoring=settings.scoring, search=settings.search)
  return tuple(float(processes.joined(values).max(initial=0)) for values in found)


def _check(config, out):
  if not out:
    raise ValueError('--out is not set: expected the folder of the bank that is to be made.')
  if Path(out).exists():
    raise ValueError(f'{out} exists: a bank is not overwritten. Remove it or choose another --out.')
  if config.data.source != 'images' or config.detector != 'patchcore':
    raise ValueError(
        f'data.source={config.data.source!r}, detector={config.detector!r}: experiments.fit makes PatchCore '
        "banks from plain images. Start from configs/own.py, or set data.source to 'images'; for a data set "
        'with a test split use experiments.mvtec.')
  if '+' in config.backbone.name:
    raise ValueError(f'backbone.name={config.backbone.name!r}: a bank is of one backbone.')
  if len(config.coreset.ratios) != 1:
    raise ValueError(f'coreset.ratios={tuple(config.coreset.ratios)}: a bank has one ratio, such as 0.1.')


def _name(root):
  """What the images show, for messages: the folder's name."""
  parts = [p for p in Path(root).absolute().parts if not any(c in p for c in '*?[')]
  meaningful = [p for p in parts if p not in ('train', 'good')]
  return (meaningful or parts)[-1]


def _some(paths):
  more = f' and {len(paths) - _SHOWN} more' if len(paths) > _SHOWN else ''
  return ', '.join(paths[:_SHOWN]) + more


def _with_estimate(progress, batch_size, folds):
  """Tells how long the network will take, by the second batch, because the first compiles; and then the
  thresholds, for which as many banks are selected again, each from most of the images.
  """
  batches, selecting = [], time.monotonic()

  def update(stage, done, total):
    nonlocal selecting
    progress(stage, done, total)
    now = time.monotonic()
    if stage == 'embed' and len(batches) < 2:
      batches.append(now)
      if len(batches) == 2 and done < total:
        _say_time((total - done) * (batches[1] - batches[0]) / batch_size, 'for the network; selection and '
                  'thresholds come after')
    if stage in ('embed', 'project'):
      selecting = now
    if stage == 'coreset' and done == total and folds:
      # Of n points it takes about n^1.5 as long.
      _say_time(folds * (1 - 1 / folds) ** 1.5 * (now - selecting), 'or more for the thresholds')

  return update


def _say_time(seconds, what):
  if seconds >= _LONG:
    cli.console.print(f'about {datetime.timedelta(seconds=round(seconds))} {what}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'out'])
  cli.run(main, distributed=True)
