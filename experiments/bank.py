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

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli
from patchcore_jax import inspection, parallel
from patchcore_jax.banks import editing, provenance, store
from patchcore_jax.banks.store import MemoryBank
from patchcore_jax.data import folder, pipeline
from patchcore_jax.data.folder import Example
from patchcore_jax.detectors import patchcore
from patchcore_jax.inspection import Inspector

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
    raise ValueError(f'{cli.OUT.value} exists: a bank is not overwritten. Choose another --out.')
  bank = store.restore(cli.BANK.value)
  changed = {'append': _append, 'merge': _merge, 'drop': _drop, 'shrink': _shrink, 'calibrate': _calibrate}[
      action](bank)
  if cli.OUT.value:
    store.save(cli.OUT.value, changed)
  else:
    store.replace(cli.BANK.value, changed)
  what = changed.description['history'][-1]['what']
  cli.console.print(f'{cli.OUT.value or cli.BANK.value}: {what}', markup=False)
  if bank.description.get('calibration') and not changed.description.get('calibration'):
    cli.console.print(
        'Its thresholds are gone, because scores are larger now. `experiments.bank calibrate` makes new ones '
        'from good images.')


def info(bank: MemoryBank) -> list[str]:
  """What there is to know about a bank, in lines."""
  d, found = bank.description, bank.description.get('calibration')
  size = ' x '.join(map(str, reversed(d['image_size'])))
  lines = [
      f'{len(bank.embeddings)} patches of {bank.embeddings.shape[1]} values, '
      f'{bank.embeddings.nbytes / 1e6:.1f} MB, from {d["num_patches"]} patches of {d["num_images"]} images',
      f'backbone {d["backbone"]["name"]}, layers {", ".join(d["backbone"]["layers"])}, weights '
      f'{d["backbone"]["weights"]}, precision {d["backbone"]["precision"]}, made on '
      f'{d.get("device", "an unknown device")}',
      f'images of {size} pixels (width x height) after {d.get("preprocess", "unknown preprocessing")}']
  if found:
    lines.append(
        f'threshold {found["image_threshold"]:.4g} for images, {found["pixel_threshold"]:.4g} for pixels, '
        f'from {len(found["image_scores"])} images ({found["method"]}): at most '
        f'{100 * found["guaranteed_rate"]:.2g} % of good images alarm')
  else:
    lines.append('no thresholds')
  lines += [f'{entry["when"]} {entry["what"]}' for entry in d.get('history', ())]
  counts = np.bincount(
      np.asarray(bank.indices) // np.prod(d['grid']), minlength=d['num_images'])
  lines += [f'  {count:6} patches of {name}' for count, name in zip(counts, d.get('images', ()))]
  return lines


def _append(bank):
  inspector = inspection.of_bank(bank, weights=cli.WEIGHTS.value, path=cli.BANK.value)
  embeddings, names, files = _embedded(inspector, provenance.has_thumbnails(bank))
  scores = ((), ())
  if bank.description.get('calibration'):
    scores = patchcore.score_embeddings(
        embeddings, bank.embeddings, inspector.image_size, scoring_spec=inspector.scoring,
        batch_size=parallel.divisible_batch_size(cli.BATCH_SIZE.value))
  return editing.append(
      bank, embeddings, names, files=files, image_scores=scores[0], map_maxima=scores[1])


def _merge(bank):
  return editing.merge(bank, store.restore(_OTHER.value))


def _drop(bank):
  return editing.drop(bank, [name.strip() for name in cli.IMAGES.value.split(',') if name.strip()])


def _shrink(bank):
  return editing.shrink(bank, _RATIO.value)


def _calibrate(bank):
  inspector = inspection.of_bank(bank, weights=cli.WEIGHTS.value, path=cli.BANK.value)
  embeddings, names, _ = _embedded(inspector, False)
  known = {Path(name).name for name in bank.description.get('images', ())}
  if again := sorted(known & {Path(name).name for name in names}):
    cli.console.print(
        f'{len(again)} images have the name of a training image ({again[0]}): if they are the same, their '
        'scores are too small, and so will be the thresholds.', markup=False)
  scores = patchcore.score_embeddings(
      embeddings, bank.embeddings, inspector.image_size, scoring_spec=inspector.scoring,
      batch_size=parallel.divisible_batch_size(cli.BATCH_SIZE.value))
  found = inspection.score_differences(
      inspector.backbone, bank, lambda: _batches(inspector, _examples()[:inspection.SAMPLE], []),
      embedding=inspector.embedding, scoring=inspector.scoring, search=inspector.search)
  return editing.calibrate(
      bank, *scores, false_alarm_rate=_RATE.value,
      allowances=tuple(float(values.max(initial=0)) for values in found))


def _embedded(inspector: Inspector, keep_images: bool) -> tuple[np.ndarray, list[str], list[bytes]]:
  """(embeddings, names, pictures) of --images; unreadable files are told and left out."""
  examples, skipped = _examples(), []
  recorder = provenance.Recorder(_batches(inspector, examples, skipped), keep_images)
  with cli.progress_bar('images') as progress:
    embeddings = patchcore.embed(
        inspector.backbone, recorder, len(examples), embedding=inspector.embedding, progress=progress)
  for message in sorted({str(error) for error in skipped}):
    cli.console.print(f'skipped: {message}', markup=False)
  return embeddings, [examples[i].image_path for i in recorder.index], recorder.files


def _examples() -> list[Example]:
  return [Example(path, (), 0, '', 'good') for path in folder.find_images(cli.IMAGES.value)]


def _batches(inspector: Inspector, examples: list[Example], skipped: list) -> Iterator[pipeline.Batch]:
  for batch in pipeline.batches(
      examples, inspector.preprocessing, batch_size=parallel.divisible_batch_size(cli.BATCH_SIZE.value),
      on_error=skipped.append):
    inspection.check_size(inspector, batch.image.shape[1:3])
    yield batch


if __name__ == '__main__':
  flags.mark_flags_as_required(['bank'])
  cli.run(main, arguments=True)
