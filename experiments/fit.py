"""Learns a part from a folder of good images: one bank, with thresholds.

    python -m experiments.fit --config=configs/own.py --config.data.root=FOLDER --out=BANK

FOLDER holds images of good parts; nothing else is needed, no defects and no masks. A pattern such as
'parts/**/*.png' takes images from several folders. The bank, a folder, is all that experiments.predict,
experiments.serve and experiments.export need. Several machines fit together as those of experiments.mvtec do.
"""

import collections
import datetime
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import cli, wiring
from experiments.images import drawn
from patchcore_jax import processes
from patchcore_jax.banks import calibration, store
from patchcore_jax.banks.model import Calibration, Model
from patchcore_jax.data import folder, survey
from patchcore_jax.data.folder import Example
from patchcore_jax.detectors import Run
from patchcore_jax.inspection import differences
from patchcore_jax.settings import ScoringSpec

cli.key_flags('config', 'out', *cli.OF_SEVERAL_PROCESSES)
_SHOWN = 5  # names in a message
_LONG = 2.0  # seconds that are worth an estimate


def main(_) -> None:
  run(cli.CONFIG.value, cli.OUT.value)


def run(config: ConfigDict, out: str) -> Model:
  """Looks at the images, fits a model, calibrates it, and saves it.

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
  backbones = wiring.create_backbones(config)
  for backbone in backbones:
    cli.console.print(
        f'backbone {backbone.name}, layers {", ".join(backbone.layers)}, precision {backbone.precision}')
    cli.say_which(backbone.name)
  wiring.check_same_everywhere(config, [Path(path).name for path in paths])
  skipped, began = [], time.monotonic()
  data = wiring.data_of(settings, examples, skipped)
  Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
  with cli.progress_bar(name) as progress:
    run = Run(
        progress=_with_estimate(progress, data.batch_size, settings.calibration.folds),
        notify=lambda plan: cli.console.print(f'bank: {plan}'), seed=config.seed,
        memory_gb=settings.fit.memory_gb, scratch=Path(out).absolute().parent,
        keep_images=settings.fit.keep_images, several_processes=jax.process_count() > 1)
    if settings.calibration.folds:
      model, scores = settings.detector.fit_and_cross_score(
          data, backbones, run, folds=settings.calibration.folds, search=settings.search)
    else:
      model, scores = settings.detector.fit(data, backbones, run), None
  for message in sorted({str(error) for error in skipped}):
    cli.notices.print(f'skipped: {message}', markup=False)
  model = model.with_description(fit_seconds=time.monotonic() - began)
  if scores:
    found = calibration.calibrate(
        scores.image, scores.map_maxima, false_alarm_rate=settings.calibration.false_alarm_rate,
        method='cross', allowances=_allowances(settings, backbones, model, data, config.seed))
    model = model.with_description(calibration=found)
    for line in verdict(found, model.description.images):
      cli.console.print(line, markup=False)
  model = model.recorded(f'fitted on {model.description.num_images} images of {config.data.root}')
  if processes.is_first():
    store.save(out, model)
  processes.wait()
  rows = model.arrays.get('embeddings')
  what = settings.detector.title if rows is None else f'{len(rows)} patches'
  cli.console.print(
      f'{what} in {out}. Next: python -m experiments.predict --bank={out} --images=FOLDER --out=DIR',
      markup=False)
  return model


def report(found: survey.Survey) -> list[str]:
  """Tells in lines what a survey found.

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


def verdict(found: Calibration, names: Sequence[str]) -> list[str]:
  """Tells in lines the thresholds, what they guarantee, and which training images are unlike the others."""
  n, rate = len(found.image_scores), found.false_alarm_rate
  lines = [
      f'threshold {found.image_threshold:.4g} for images{_for_pixels(found)}, from {n} good images: at most '
      f'{100 * found.guaranteed_rate:.2g} % of good images alarm']
  if found.guaranteed_rate > rate:
    lines.append(
        f'{100 * rate:g} % were asked for, which takes {-(-1 // rate) - 1:.0f} images; {n} can vouch for '
        f'{100 * found.guaranteed_rate:.2g} %. Give more good images for a smaller rate.')
  if found.image_allowance or found.pixel_allowance:
    share = found.image_allowance / abs(found.image_threshold)
    lines.append(
        f'on another kind of device scores are off by up to {found.image_allowance:.2g}, which is '
        f'{100 * share:.2g} % of the threshold, and in it already')
  if calibration.allows_much(found):
    lines.append(
        'That is more than a tenth of the way from a usual good image to the threshold. If the bank is for '
        'another kind of device, fit it there, or with --config.backbone.precision=float32.')
  odd = calibration.suspicious(found.image_scores)
  if odd:
    lines.append(
        f'{len(odd)} training image{"s look" if len(odd) > 1 else " looks"} unlike the others; perhaps not '
        'good, or of a rare kind. Look, remove what is defective, and fit again:')
    lines += [f'  {names[i] if names else i} (score {found.image_scores[i]:.4g})' for i in odd]
  return lines


def _for_pixels(found: Calibration) -> str:
  """Tells the pixels' threshold, where there is one."""
  return '' if found.pixel_threshold is None else f', {found.pixel_threshold:.4g} for pixels'


def _allowances(settings, backbones, model, data, seed):
  """Measures the allowances for devices that compute the network otherwise: (images, pixels)."""
  if all(backbone.elsewhere is None for backbone in backbones):
    return 0.0, 0.0
  scoring = getattr(settings.detector, 'scoring', ScoringSpec())
  sample, others = differences.sample_of(
      model, max(scoring.num_neighbors, scoring.support_neighbors), seed)
  positions = {example.image_path: i for i, example in enumerate(data.examples)}
  own = [positions[model.description.images[i]] for i in sample[processes.part(len(sample))]]
  found = differences.score_differences(
      settings.detector, others, data.part(own), backbones, settings.search)
  return tuple(
      0.0 if values is None else float(processes.joined(values).max(initial=0)) for values in found)


def _check(config, out):
  """Raises ValueError for a config that is not for this binary, or an `out` that cannot be made."""
  if not out:
    raise ValueError('--out is not set: expected the folder of the bank that is to be made.')
  if Path(out).exists():
    raise ValueError(f'{out} exists: a model is not overwritten. Remove it or choose another --out.')
  if config.data.source != 'images':
    raise ValueError(
        f"data.source={config.data.source!r}: experiments.fit takes plain images. Start from configs/own.py "
        "or set data.source to 'images'; for a data set with a test split use experiments.mvtec.")
  if config.detector == 'patchcore' and len(config.coreset.ratios) != 1:
    raise ValueError(f'coreset.ratios={tuple(config.coreset.ratios)}: a bank has one ratio, such as 0.1.')


def _name(root):
  """Names what the images show, for messages, by the folder's name."""
  parts = [p for p in Path(root).absolute().parts if not any(c in p for c in '*?[')]
  meaningful = [p for p in parts if p not in ('train', 'good')]
  return (meaningful or parts)[-1]


def _some(paths):
  """Lists the first few paths, and counts the rest."""
  more = f' and {len(paths) - _SHOWN} more' if len(paths) > _SHOWN else ''
  return ', '.join(paths[:_SHOWN]) + more


def _with_estimate(progress, batch_size, folds):
  """Makes a progress that also tells how long the network and then the thresholds will take.

  The time of the network follows from the second batch, because the first compiles. For the thresholds as
  many banks as there are folds are selected again, each from most of the images.
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
  """Prints a time that is worth telling."""
  if seconds >= _LONG:
    cli.console.print(f'about {datetime.timedelta(seconds=round(seconds))} {what}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'out'])
  cli.run(main, distributed=True)
