"""Makes a submission to the server of MVTec AD 2, whose private test images have no labels.

    write(Options(data, out='patchcore', banks=banks_of('runs/ad2')))   # patchcore/ and patchcore.json
    assert not submission_check.check('patchcore')
    submission_check.pack('patchcore')                                  # patchcore.tar.gz

How the server treats maps of another size than the image's, and how it scores images, is not public. No
submission made here has been sent to it: what it would answer is not known.
"""

import ast
import concurrent.futures
import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchcore_jax import atomic_files, extras
from patchcore_jax.data import image_contents, image_files, map_files, placement
from patchcore_jax.data.folder import Example
from patchcore_jax.evaluation.half_scores import HalfScores
from patchcore_jax.evaluation.submission_check import (
    COUNTS,
    MAPS,
    MARKS,
    SPLITS,
    Progress,
    silent,
    some,
    stems,
)
from patchcore_jax.metrics import thresholds
from patchcore_jax.settings import DataSpec, max_pixels

_ABOVE = ('maximum', 'quantile', 'scaled_quantile')  # rules by which pixels at the threshold are not marked


@dataclasses.dataclass(frozen=True)
class Rule:
  """How the threshold of pixels follows from good validation images: one of `metrics.thresholds.RULES`.

  Attributes:
    name: its name.
    arguments: the rule's own keywords; others have their defaults.

  Raises:
    ValueError: an unknown rule or keyword, one that is needed and missing, or a word in place of a number.

  >>> Rule.parse('quantile,share=0.99')
  Rule(name='quantile', arguments={'share': 0.99})
  """

  name: str = 'k_sigma'
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.name not in thresholds.RULES:
      raise ValueError(f'There is no rule {self.name!r}: expected one of {", ".join(thresholds.RULES)}.')
    known = dict(inspect.signature(thresholds.RULES[self.name]).parameters)
    del known['maps']
    needed = {name for name, parameter in known.items() if parameter.default is parameter.empty}
    if not needed <= self.arguments.keys() <= known.keys():
      raise ValueError(
          f'The rule {self.name} takes {", ".join(known) or "nothing"}, needs {", ".join(needed) or "none"}, '
          f'and got {", ".join(self.arguments) or "nothing"}: expected a form such as quantile,share=0.99.')
    for name, value in self.arguments.items():
      if not isinstance(value, str if isinstance(known[name].default, str) else int | float):
        what = 'a word' if isinstance(value, int | float) else 'a number'
        raise ValueError(f'The rule {self.name} does not take {name}={value!r}: expected {what}.')

  @classmethod
  def parse(cls, text: str) -> 'Rule':
    """Makes a rule of its name and keywords, as 'k_sigma,k=4'."""
    name, *rest = text.split(',')
    pairs = (part.partition('=') for part in rest)
    return cls(name.strip(), {key.strip(): _value(value) for key, _, value in pairs})

  def threshold(self, maps: Sequence[np.ndarray]) -> float:
    """Computes the threshold from the maps of good images."""
    return thresholds.RULES[self.name](maps, **self.arguments)

  def marks(self, anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """Marks the anomalous pixels of a map: those from the threshold on, or above it, as the rule means it."""
    # In float64, which rounds neither side.
    threshold = np.float64(threshold)
    return anomaly_map > threshold if self.name in _ABOVE else anomaly_map >= threshold


@dataclasses.dataclass(frozen=True)
class Options:
  """What a submission is made of.

  Attributes:
    data: folder of the data set, as published.
    out: folder to write, whose name is that of the submission. One that was stopped goes on.
    banks: a bank for each object.
    rule: how thresholds are made.
    scores: how scores become float16, 'ranks' or 'linear': see `HalfScores`.
    batch_size: images that pass through the network at once; 0 for 8 on CPUs and 32 on accelerators.
    weights: see `inspection.load`.
    max_megapixels: as of `settings.DataSpec`.

  Raises:
    ValueError: values out of range.
  """

  data: str
  out: str
  banks: Mapping[str, str]
  rule: Rule = Rule()
  scores: str = 'ranks'
  batch_size: int = 0
  weights: str = ''
  max_megapixels: float = DataSpec.max_megapixels

  def __post_init__(self):
    HalfScores(0, 0, self.scores)  # this and the next say what is wrong
    max_pixels(self.max_megapixels)
    if self.batch_size < 0:
      raise ValueError(f'batch_size={self.batch_size}: expected 0 or more.')


def banks_of(run: str | os.PathLike, counts: Mapping[str, int] | None = None) -> dict[str, str]:
  """Finds the banks of the objects in a run's folder: in `banks` there, or in itself."""
  inner = Path(run) / 'banks'
  folder = inner if inner.is_dir() else Path(run)
  names = COUNTS if counts is None else counts
  return {name: str(folder / name) for name in names if (folder / name).is_dir()}


def check_complete(options: Options, counts: Mapping[str, int] | None = None) -> None:
  """Raises ValueError, which names all, for banks and images that are missing, or images too many.

  Args:
    options: what the submission is to be made of.
    counts: as of `write`.
  """
  counts = COUNTS if counts is None else counts
  data, problems = Path(options.data), []
  banks = {name for name, path in options.banks.items() if os.path.isdir(path)}
  if without := [name for name in counts if name not in banks]:
    problems.append(f'no bank of {", ".join(without)}')
  if unknown := sorted(options.banks.keys() - counts.keys()):
    problems.append(f'banks of {", ".join(unknown)}, which are no objects')
  for name, count in counts.items():
    if not _images(data / name / 'validation' / 'good'):
      problems.append(f'no image in {data / name}/validation/good')
    for split in SPLITS:
      folder, expected = data / name / split, {f'{stem}.png' for stem in stems(split, count)}
      there = set(_images(folder))
      if missing := sorted(expected - there):
        problems.append(f'{len(missing)} of {count} images missing in {folder} ({some(missing)})')
      if others := sorted(there - expected):
        problems.append(f'{len(others)} too many in {folder} ({some(others)})')
  if problems:
    raise ValueError(
        f'Expected {len(counts)} objects, each with a bank, good images to validate and all private ones: '
        f'{"; ".join(problems)}.')


def write(
    options: Options, *, counts: Mapping[str, int] | None = None, say: Callable[[str], None] = silent,
    progress: Progress = silent) -> dict[str, Any]:
  """Scores the private images of all objects, and writes maps and marks at the images' original size.

  The threshold, and the smallest and largest score by which scores become float16, come from validation/good
  alone, from the pixels that the network saw; others are never marked, and have the lowest score. One batch
  of maps is held at a time, and those of the validation images, at the network's size. An object appears
  whole, and when the same is called again, finished ones are left alone.

  Args:
    options: what it is made of.
    counts: how many images each object has in either split; None for `COUNTS`.
    say: called with a line.
    progress: called with ('<object>: <split>', done, total).

  Returns:
    What <out>.json holds. 'objects' has for each its bank, the threshold, how scores became float16, and
    counts of images and pixels.

  Raises:
    BankError: a folder that is no bank, or a damaged one.
    ValueError: banks or images that are missing, all of them named; a method without maps; an `out` that
      holds something else, or a submission with other settings; no package tifffile (extra [tiff]).
    ImageError: a file that cannot be read.
    OSError: a file cannot be written.
  """
  counts = COUNTS if counts is None else counts
  out = Path(os.path.abspath(options.out))
  check_complete(options, counts)
  with extras.needed_for('A submission'):  # this, and a folder that is no bank, is said before anything long
    import tifffile  # noqa: F401
  from patchcore_jax.banks import store

  record = _begun(options, out, counts)
  for name in counts.keys() - record['objects'].keys():
    store.restore(options.banks[name])
  _keep(record, out)
  work = out.with_name(f'{out.name}.unfinished')
  for name, count in counts.items():
    if name in record['objects']:
      say(f'{name}: finished before')
      continue
    for folder in (work, out / MAPS / name, out / MARKS / name):  # what a killed run left
      shutil.rmtree(folder, ignore_errors=True)
    try:
      about = _write_object(options, name, count, work, say, progress)
      for kind in (MAPS, MARKS):
        (out / kind).mkdir(parents=True, exist_ok=True)
        (work / kind).rename(out / kind / name)
    finally:
      shutil.rmtree(work, ignore_errors=True)
    record['objects'][name] = about
    _keep(record, out)
  return record


def record_path(out: str | os.PathLike) -> Path:
  """Names the file beside a submission that says how it was made: nothing else may lie in its folder."""
  out = Path(os.path.abspath(out))
  return out.with_name(f'{out.name}.json')


def _value(text: str) -> Any:
  """Reads a number, or else a word."""
  try:
    return ast.literal_eval(text.strip())
  except (SyntaxError, ValueError):
    return text.strip()


def _images(folder: Path) -> list[str]:
  """Lists the names of the images in a folder, which may be missing."""
  return [path.name for path in image_files.images_in(folder)] if folder.is_dir() else []


def _begun(options: Options, out: Path, counts: Mapping[str, int]) -> dict[str, Any]:
  """Reads what was finished before, or begins anew; raises ValueError where something else lies there."""
  path, settings = record_path(out), {
      'rule': options.rule.name, 'arguments': dict(options.rule.arguments), 'scores': options.scores,
      # A bank that was changed is another.
      'banks': {name: [os.path.abspath(options.banks[name]), os.stat(options.banks[name]).st_mtime_ns]
                for name in counts}}
  if path.exists():
    record = json.loads(path.read_text())
    if 'objects' not in record:
      raise ValueError(f'{path} is not of a submission: choose another name.')
    if not record['objects']:  # nothing is finished that could be mixed
      return {'settings': settings, 'objects': {}}
    if differ := [k for k, value in settings.items() if record['settings'].get(k) != value]:
      raise ValueError(
          f'{out} was begun with other settings ({", ".join(differ)}): remove it and {path}, or choose '
          'another name.')
    return record
  if out.exists():
    raise ValueError(f'{out} exists, and was not begun here: choose another name.')
  return {'settings': settings, 'objects': {}}


def _keep(record: Mapping[str, Any], out: Path) -> None:
  """Writes the file beside the submission."""
  with atomic_files.written(record_path(out)) as aside:
    aside.write_text(json.dumps(record, indent=2) + '\n')


def _write_object(
    options: Options, name: str, count: int, work: Path, say: Callable[[str], None], progress: Progress,
) -> dict[str, Any]:
  """Writes the maps and marks of one object, and returns what there is to know about them."""
  from patchcore_jax import inspection  # JAX, which what is missing need not wait for
  from patchcore_jax.report import prediction_run, predictions

  folder, rule = Path(options.data) / name, options.rule
  inspector = inspection.load(options.banks[name], weights=options.weights)
  good = [str(folder / 'validation' / 'good' / image) for image in _images(folder / 'validation' / 'good')]
  maps = [found for _, found in _scored(inspector, good, options, f'{name}: validation', progress)]
  sizes = [image_contents.contents(path).size[::-1] for path in good]
  threshold = rule.threshold(map_files.SeenMaps(maps, sizes, inspector.preprocessing))
  halfs = HalfScores(min(float(m.min()) for m in maps), max(float(m.max()) for m in maps), options.scores)
  about = {
      'bank': options.banks[name], 'validation_images': len(good), 'threshold': threshold,
      'threshold_as_half': float(halfs(np.array([threshold]))[0]), 'scores': dataclasses.asdict(halfs)}

  def written(scored):
    path, anomaly_map = scored
    laid = placement.to_original(anomaly_map, _placed(path, inspector))
    marks = rule.marks(laid, threshold)  # before rounding; NaN, which was not seen, is none
    place = f'{Path(path).parent.name}/{Path(path).stem}'
    map_files.write_map(work / MAPS / f'{place}.tiff', halfs(laid))
    predictions.write_png(work / MARKS / f'{place}.png', np.where(marks, np.uint8(255), np.uint8(0)))
    return int(marks.sum()), int(np.isnan(laid).sum()), laid.size

  threads = max(2, min(8, os.cpu_count() or 1))
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for split in SPLITS:
      paths = [str(folder / split / f'{stem}.png') for stem in stems(split, count)]
      scored = _scored(inspector, paths, options, f'{name}: {split}', progress)
      marked, unseen, sizes = zip(*prediction_run.read_ahead(scored, written, pool, threads))
      about[split] = {
          'images': len(sizes), 'images_with_marks': sum(n > 0 for n in marked),
          'marked_pixels': sum(marked), 'unseen_pixels': sum(unseen), 'pixels': sum(sizes)}
      cropped = f'; the network did not see {100 * sum(unseen) / sum(sizes):.1f} % of the pixels'
      say(f'{name}: {split}: {about[split]["images_with_marks"]} of {len(sizes)} images have marks, by the '
          f'threshold {threshold:.4g}{cropped if any(unseen) else ""}')
  return about


def _scored(
    inspector: Any, paths: Sequence[str], options: Options, stage: str, progress: Progress,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields image files with their maps [h, w] at the network's size, a batch at a time.

  Raises:
    ValueError: a method without maps.
  """
  from patchcore_jax import inspection, parallel
  from patchcore_jax.data.dataset import FileData

  data = FileData(
      [Example(path, (), 0, '', 'good') for path in paths], inspector.preprocessing,
      parallel.divisible_batch_size(options.batch_size), max_pixels=max_pixels(options.max_megapixels))
  done = 0
  for index, scores in inspection.predict(inspector, data.batches()):
    if scores.map is None:
      raise ValueError(f'{inspector.detector.title} makes no anomaly maps: choose a method that does.')
    yield from ((paths[i], np.asarray(found)) for i, found in zip(index, scores.map))
    done += len(index)
    progress(stage, done, len(paths))


def _placed(path: str, inspector: Any) -> placement.Placement:
  """Finds where the network's input lies in an image, whose header is read."""
  width, height = image_contents.contents(path).size
  return placement.placement(height, width, inspector.preprocessing)
