"""`patchcore fit`: learns a part from images of good ones."""

import collections
import dataclasses
import datetime
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from patchcore_jax import atomic_files
from patchcore_jax.cli import arguments, interrupts, methods, options, terminal
from patchcore_jax.data import image_files, image_finding, passed_by
from patchcore_jax.settings import CalibrationSpec, DataSpec, FitSpec, Preprocessing, SearchSpec, check_number

_SHOWN = 5  # names in a message
_LONG = 2.0  # seconds that are worth an estimate
_GEOMETRY = ('resize', 'crop', 'pad', 'resize_side')
_READING = ('value_range', 'bands', 'background')


@click.command('fit', cls=options.Command)
@click.argument('good')
@options.option('--out', required=True, metavar='BANK', group='Common', show_default=False,
                help='The model, a folder that must not exist.')
@options.option('--defects', metavar='IMAGES', group='Common', show_default='none',
                help='Labelled defects, a folder or a pattern, for a method that learns from such: '
                'docs/trained.md.')
@methods.common(ratio=0.0)
@options.of_record('calibration', CalibrationSpec, group='Common', only=('false_alarm_rate',))
@arguments.accept
@options.of_record(
    'preprocess', Preprocessing, group='Images', only=(*_GEOMETRY, *_READING),
    defaults={'resize': (), 'crop': ()},
    shown={'resize': 'all of each image, its short side 224', 'crop': 'none', 'value_range': 'measured',
           'bands': 'none chosen'})
@options.of_record('data', DataSpec, group='Images',
                   only=('batch_size', 'num_workers', 'on_error', 'max_megapixels'),
                   defaults={'on_error': 'skip'})
@options.of_record('fit', FitSpec, group='Resources')
@options.of_record('calibration', CalibrationSpec, group='Resources', only=('folds',))
@options.of_record('search', SearchSpec, group='Resources')
@options.option('--seed', default=0, group='Resources', help='The seed of everything that is random.')
@methods.detailed
@options.several_machines
@options.common
def command(
    good: str, out: str, defects: str | None, accept: tuple[str, ...], seed: int, debug: bool,
    compilation_cache: str, **values: Any) -> None:
  """Learn what good parts look like, from a folder of images of them.

  GOOD is a folder, below which all images count, or which has a folder train/good or good (as OK or normal);
  or a file, or a pattern such as 'parts/*/good'. No defects are needed, and no masks. BANK is
  all that predict, serve, export and bank need; it has thresholds that hold the false-alarm rate. The whole
  of each image is inspected, unless --crop leaves something out.
  """
  with terminal.readable_errors(debug):
    run(good, out, defects, accept, seed, compilation_cache, values)


def run(
    good: str, out: str, defects: str | None, accept: tuple[str, ...], seed: int, compilation_cache: str,
    values: dict[str, Any]) -> None:
  """Looks at the images, fits, makes thresholds and saves.

  Raises:
    NotAccepted: images whose size is far from that of the rest.
    ValueError: bad settings, no images, or `out` exists.
  """
  if Path(out).exists():
    raise ValueError(f'{out} exists: a model is not overwritten. Remove it or choose another --out.')
  detector = methods.detector_of(values)
  preprocessing, whole = _preprocessing(values)
  data_spec = options.record(DataSpec, 'data', values)
  fit_spec = options.record(FitSpec, 'fit', values)
  calibrate = options.record(CalibrationSpec, 'calibration', values)
  taken = image_files.training_folder(good)
  paths = image_finding.find_images(taken)  # before JAX, which takes a second to import
  if len(paths) == 1:
    from patchcore_jax.data import image_contents

    image_contents.contents(paths[0])  # which says so where it is no image
  check_number(len(paths), calibrate.folds)
  detector.check_defects(0 if defects is None else len(image_finding.find_images(defects)))
  with interrupts.ends_at_once(f'error: interrupted. {interrupts.NOTHING_WRITTEN}'):
    terminal.keep_compiled(compilation_cache)
    terminal.join_processes(*(values[name] for name in terminal.DISTRIBUTED))
    import jax

    from patchcore_jax import inspection, processes
    from patchcore_jax.data import survey
    from patchcore_jax.detectors import Run
    from patchcore_jax.inspection import acceptance, fitting, image_sizes, inputs

    labelled = inputs.find_defects(defects, paths)
    everything = [*paths, *labelled]
    found = survey.survey(everything)
    for line in (*passed_by.origins(taken, paths), *passed_by.left_out(good, paths), *report(found),
                 *found.reading(preprocessing)):
      terminal.say(line)
    if labelled:
      terminal.say(f'{len(labelled)} of them are labelled defects, of {defects}')
    found.check_bands(preprocessing)
    sizes = image_sizes.of_files(everything)
    check_number(len(sizes.keys() - labelled), calibrate.folds, len(paths))
    acceptance.settle(image_sizes.odd(sizes), accept, sizes)
    networks = methods.networks_of(values, seed)
  for network in networks:
    terminal.say(
        f'backbone {network.name}, layers {", ".join(network.layers)}, precision {network.precision}')
  terminal.say_which(network.name for network in networks)
  grid = image_sizes.on_one_grid(
      sizes.values(), None if whole else preprocessing, fitting.input_multiple(networks))
  preprocessing = dataclasses.replace(preprocessing, resize=grid.resize, crop=grid.crop)
  for line in image_sizes.at_fit(sizes, preprocessing):
    terminal.say(line)
  skipped, name = [], inputs.name_of(good)
  data = inputs.training_data(
      taken, preprocessing, data_spec.batch_size, paths=paths, defects=labelled,
      num_workers=data_spec.num_workers, original_size=image_sizes.usual(sizes.values()),
      max_pixels=data_spec.max_pixels, on_error=skipped.append if data_spec.on_error == 'skip' else None)
  data = data.measured()
  if line := survey.range_line(data.preprocessing, data.outside_range, found.deep):
    terminal.say(line)
  same = {name: value for name, value in values.items() if name not in terminal.DISTRIBUTED}
  if not processes.agree(repr([same, seed, [Path(path).name for path in everything]])):
    raise ValueError(
        'The processes differ in their settings or in the images they see: expected the same command and '
        'data on all machines.')
  tells_time = detector.has_coreset or detector.trains
  unfinished = f'{out}.unfinished' if detector.trains else None
  what = detector.title if detector.trains else 'bank'
  scratch = Path(out).absolute().parent
  atomic_files.check_place(out)  # before the long work
  scratch.mkdir(parents=True, exist_ok=True)
  try:
    with interrupts.never_lost(), terminal.progress_bar(name) as progress:
      inspector = inspection.fit_data(
          detector, data, networks, Run(
              progress=progress if tells_time else _with_estimate(progress, calibrate.folds),
              notify=lambda plan: terminal.say(f'{what}: {plan}'), seed=seed,
              memory_gb=fit_spec.memory_gb, scratch=scratch, keep_images=fit_spec.keep_images,
              checkpoints=unfinished,
              several_processes=jax.process_count() > 1),
          calibrate=calibrate, search=options.record(SearchSpec, 'search', values), source=f' of {taken}')
  except KeyboardInterrupt as e:
    kept = unfinished and Path(unfinished).exists()
    raise terminal.Interrupted(interrupts.TRAINING_KEPT if kept else interrupts.NOTHING_WRITTEN) from e
  finally:  # also where none can be read
    for message in sorted({str(error) for error in skipped}):
      terminal.notice(f'skipped: {message}')
  if skipped:
    used = inspector.model.description
    terminal.say(
        f'{used.num_images + used.num_defects} of {len(everything)} images were used, {len(skipped)} could '
        'not be read')
  if inspector.model.description.colours == 'both':
    terminal.say(
        'Some training images are gray, and some have colours: each kind is compared with both. If the '
        'camera sends one kind, fit on that alone')
  if inspector.calibration:
    for line in verdict(inspector.calibration, inspector.model.description.images):
      terminal.say(line)
  if processes.is_first():
    inspector.save(out)
    if unfinished:
      shutil.rmtree(unfinished, ignore_errors=True)
  processes.wait()
  terminal.say(f'{inspector.about()}: {out}. Next: patchcore predict {out} IMAGES --out DIR')


def _preprocessing(values: dict[str, Any]) -> tuple[Preprocessing, bool]:
  """Makes the preprocessing of the options, and tells whether they leave all of its geometry open."""
  context = click.get_current_context()
  given = {name for name in _GEOMETRY if context.get_parameter_source(f'preprocess__{name}')
           is not click.core.ParameterSource.DEFAULT}
  others = {} if 'resize' in given else {'resize': Preprocessing().resize}
  return options.record(Preprocessing, 'preprocess', values, **others), not given


def report(found: Any) -> list[str]:
  """Tells in lines what a survey of image files found.

  >>> from patchcore_jax.data import survey
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
  if found.unreadable:
    lines.append(
        f'cannot be read: {len(found.unreadable)} more ({_some([path for path, _ in found.unreadable])})')
  return lines


def promise(found: Any) -> list[str]:
  """Tells in lines the thresholds of a `Calibration`, and what they guarantee, also where more was asked for.

  >>> from patchcore_jax.banks import calibration
  >>> for line in promise(calibration.calibrate([1, 2, 3], None, false_alarm_rate=0.1)):
  ...   print(line)
  threshold 3 for images, from 3 good images: at most 25 % of good images are called anomalous
  10 % were asked for, which takes 9 images; 3 can vouch for 25 %. Give more good images for a smaller rate.
  """
  n, rate = len(found.image_scores), found.false_alarm_rate
  pixels = '' if found.pixel_threshold is None else f', {found.pixel_threshold:.4g} for pixels'
  lines = [
      f'threshold {found.image_threshold:.4g} for images{pixels}, from {n} good images: at most '
      f'{100 * found.guaranteed_rate:.2g} % of good images are called anomalous']
  if found.guaranteed_rate > rate:
    lines.append(
        f'{100 * rate:g} % were asked for, which takes {-(-1 // rate) - 1:.0f} images; {n} can vouch for '
        f'{100 * found.guaranteed_rate:.2g} %. Give more good images for a smaller rate.')
  return lines


def verdict(found: Any, names: Sequence[str]) -> list[str]:
  """Tells in lines the thresholds, what they guarantee, and which training images are unlike the others.

  Args:
    found: the `Calibration` of the model.
    names: files of the training images; () where they have none.
  """
  from patchcore_jax.banks import calibration

  lines = promise(found)
  if found.image_allowance or found.pixel_allowance:
    share = 100 * found.image_allowance / max(abs(found.image_threshold), 1e-30)
    lines.append(
        f'on another kind of device scores are off by up to {found.image_allowance:.2g}, which is '
        f'{share:.2g} % of the threshold, and in it already')
  if calibration.allows_much(found):
    lines.append(
        'That is more than a tenth of the way from a usual good image to the threshold. If the bank is for '
        'another kind of device, fit it there, or with --precision float32.')
  odd = calibration.suspicious(found.image_scores)
  if odd:
    rest = [score for i, score in enumerate(found.image_scores) if i not in odd]
    without = calibration.threshold(rest, found.false_alarm_rate)[0] + found.image_allowance
    high = '' if without >= found.image_threshold else (
        f' Without {"them" if len(odd) > 1 else "it"} the threshold would be {without:.4g}: the higher one '
        'lets defects pass.')
    lines.append(
        f'{len(odd)} training image{"s look" if len(odd) > 1 else " looks"} unlike the others; perhaps not '
        f'good, or of a rare kind.{high} Look, remove what is defective, and fit again:')
    lines += [f'  {names[i] if names else i} (score {found.image_scores[i]:.4g})' for i in odd]
  return lines


def _some(paths):
  """Lists the first of some paths, and says how many more there are."""
  more = f' and {len(paths) - _SHOWN} more' if len(paths) > _SHOWN else ''
  return ', '.join(paths[:_SHOWN]) + more


def _with_estimate(progress, folds):
  """Makes `progress` tell, by the second batch, how long a method takes that has no estimate of its own.

  The first batch compiles. For thresholds all images pass through the network once more for each fold: some
  are learnt from, and the others scored.
  """
  batches = []

  def update(stage, done, total):
    progress(stage, done, total)
    if stage != 'embed' or len(batches) > 1:
      return
    batches.append((time.monotonic(), done))
    if len(batches) == 2:
      (first, before), (second, after) = batches
      image = (second - first) / max(1, after - before)
      seconds = (total - done) * image + folds * total * image
      if seconds >= _LONG:
        terminal.say(
            f'about {datetime.timedelta(seconds=round(seconds))} from here, or more: '
            f'network {(total - done) * image:.0f} s' + (
                f', thresholds {folds * total * image:.0f} s' if folds else ''))

  return update
