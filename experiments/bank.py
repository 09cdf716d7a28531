"""Looks into a bank, and changes it.

    python -m experiments.bank info      --bank=BANK
    python -m experiments.bank append    --bank=BANK --images=FOLDER       what it does not cover yet is added
    python -m experiments.bank merge     --bank=BANK --other=BANK2         BANK covers what either did
    python -m experiments.bank drop      --bank=BANK --images=a.png,b.png  takes training images out
    python -m experiments.bank shrink    --bank=BANK --share=0.01          a smaller, faster bank
    python -m experiments.bank calibrate --bank=BANK --images=FOLDER       thresholds from images not in it

A change replaces BANK in one step, or with --out=NEW leaves it alone, and is recorded in the bank's history.
For drop, --images names training images as `info` lists them, or the last parts of their paths.
"""

from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli
from patchcore_jax import inspection, parallel
from patchcore_jax.banks import editing, provenance, store
from patchcore_jax.banks.model import Model, to_json
from patchcore_jax.data import folder
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.folder import Example
from patchcore_jax.detectors import Run, cross_fitting, patchcore
from patchcore_jax.inspection import Inspector, differences

cli.key_flags('bank', 'images', 'out', 'batch_size', 'backbone_weights')
_OTHER = flags.DEFINE_string('other', None, 'merge: the other bank.')
_RATIO = flags.DEFINE_float('share', None, 'shrink: share of all training patches to keep.')
_RATE = flags.DEFINE_float('false_alarm_rate', 0.01, 'calibrate: share of good images that may alarm.')

ACTIONS = ('info', 'append', 'merge', 'drop', 'shrink', 'calibrate')


def main(argv) -> None:
  if len(argv) != 2 or argv[1] not in ACTIONS:
    raise ValueError(f'Expected one of {", ".join(ACTIONS)}, got {" ".join(argv[1:]) or "nothing"}.')
  action = argv[1]
  for name, actions in (
      ('images', ('append', 'drop', 'calibrate')), ('other', ('merge',)), ('share', ('shrink',))):
    given = flags.FLAGS[name].value is not None
    if given != (action in actions):
      raise ValueError(f'--{name} is {"not for" if given else "missing for"} {action}.')
  if action == 'info':
    for line in info(store.restore(cli.BANK.value)):
      cli.console.print(line, markup=False)
    return
  if cli.OUT.value and Path(cli.OUT.value).exists():
    raise ValueError(f'{cli.OUT.value} exists: a model is not overwritten. Choose another --out.')
  bank = store.restore(cli.BANK.value)
  changed = {'append': _append, 'merge': _merge, 'drop': _drop, 'shrink': _shrink, 'calibrate': _calibrate}[
      action](bank)
  if cli.OUT.value:
    store.save(cli.OUT.value, changed)
  else:
    store.replace(cli.BANK.value, changed)
  what = changed.description.history[-1].what
  cli.console.print(f'{cli.OUT.value or cli.BANK.value}: {what}', markup=False)
  if bank.description.calibration and not changed.description.calibration:
    cli.console.print(
        'Its thresholds are gone, because scores are larger now. `experiments.bank calibrate` makes new ones '
        'from good images.')


def info(model: Model) -> list[str]:
  """Lists what there is to know about a model, in lines."""
  d, rows = model.description, model.arrays.get('embeddings')
  size = ' x '.join(map(str, reversed(d.image_size)))
  nbytes = sum(array.nbytes for array in model.arrays.values())
  if rows is None:
    lines = [f'{d.detector}, {nbytes / 1e6:.1f} MB, from {d.num_images} images']
  else:
    lines = [
        f'{len(rows)} patches of {rows.shape[1]} values, {rows.nbytes / 1e6:.1f} MB, from {d.num_patches} '
        f'patches of {d.num_images} images']
  lines += [
      f'backbone {network.name}, layers {", ".join(network.layers)}, weights {network.weights}, precision '
      f'{network.precision}, made on {d.device or "an unknown device"}' for network in d.backbones]
  how = to_json(d.preprocessing) if d.preprocessing else 'no preprocessing: images come as they are'
  lines.append(f'images of {size} pixels (width x height) after {how}')
  if found := d.calibration:
    pixels = '' if found.pixel_threshold is None else f', {found.pixel_threshold:.4g} for pixels'
    lines.append(
        f'threshold {found.image_threshold:.4g} for images{pixels}, from {len(found.image_scores)} images '
        f'({found.method}): at most {100 * found.guaranteed_rate:.2g} % of good images alarm')
  else:
    lines.append('no thresholds')
  lines += [f'{event.when} {event.what}' for event in d.history]
  if 'indices' in model.arrays:
    image = np.asarray(model.arrays['indices']) // (d.num_patches // d.num_images)
    counts = np.bincount(image, minlength=d.num_images)
    lines += [f'  {count:6} patches of {name}' for count, name in zip(counts, d.images)]
  else:
    lines += [f'  {name}' for name in d.images]
  return lines

def _append(bank):
  """Adds the images of --images to a bank."""
  editing.check_is_bank(bank)
  inspector = inspection.of_model(bank, weights=cli.WEIGHTS.value, path=cli.BANK.value)
  (backbone,), (data, skipped) = inspector.backbones, _data(inspector)
  with cli.progress_bar('images') as progress:
    embeddings, read = patchcore.embed(
        backbone, data, embedding=inspector.detector.embedding,
        run=Run(progress=progress, keep_images=provenance.has_thumbnails(bank)))
  _say_skipped(skipped)
  scores = ((), ())
  if bank.description.calibration:
    scores = patchcore.score_embeddings(
        embeddings, bank.arrays['embeddings'], inspector.image_size,
        scoring_spec=inspector.detector.scoring, batch_size=data.batch_size)
  return editing.append(
      bank, embeddings, [data.examples[i].image_path for i in read.index], files=read.files,
      image_scores=scores[0], map_maxima=scores[1])


def _merge(bank):
  """Merges a bank with that of --other."""
  return editing.merge(bank, store.restore(_OTHER.value))


def _drop(bank):
  """Takes the training images that --images names out of a bank."""
  return editing.drop(bank, [name.strip() for name in cli.IMAGES.value.split(',') if name.strip()])


def _shrink(bank):
  """Shrinks a bank to --share."""
  return editing.shrink(bank, _RATIO.value)


def _calibrate(model):
  """Makes the thresholds of a model from the images of --images."""
  inspector = inspection.of_model(model, weights=cli.WEIGHTS.value, path=cli.BANK.value)
  data, skipped = _data(inspector)
  known = {Path(name).name for name in model.description.images}
  if again := sorted(known & {Path(e.image_path).name for e in data.examples}):
    cli.console.print(
        f'{len(again)} images have the name of a training image ({again[0]}): if they are the same, their '
        'scores are too small, and so will be the thresholds.', markup=False)
  detector, networks = inspector.detector, inspector.backbones
  scores = cross_fitting.score_maxima(detector, model, data, networks, inspector.search)
  _say_skipped(skipped)
  sample = data.part(range(min(len(data), differences.SAMPLE)))
  off = differences.score_differences(detector, model, sample, networks, inspector.search)
  return editing.calibrate(
      model, *scores, false_alarm_rate=_RATE.value,
      allowances=tuple(0.0 if values is None else float(values.max(initial=0)) for values in off))


def _data(inspector: Inspector) -> tuple[FileData, list]:
  """Makes the data of the images of --images, and a list that takes the errors of unreadable ones."""
  skipped = []
  examples = [Example(path, (), 0, '', 'good') for path in folder.find_images(cli.IMAGES.value)]
  return FileData(
      examples, inspector.preprocessing, parallel.divisible_batch_size(cli.BATCH_SIZE.value),
      on_error=skipped.append), skipped


def _say_skipped(skipped):
  """Prints the errors of images that could not be read."""
  for message in sorted({str(error) for error in skipped}):
    cli.console.print(f'skipped: {message}', markup=False)


if __name__ == '__main__':
  flags.mark_flags_as_required(['bank'])
  cli.run(main, arguments=True)
