"""Scores a folder of images with a model, and writes what was found: rows, pictures and a report.

    summary = run(Options('banks/part', 'new/', 'runs/part'))

Images are read and answers drawn by threads while the device scores. The answers about a folder appear all at
once; with `watch` they are added as images arrive.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from patchcore_jax import atomic_files, inspection
from patchcore_jax.banks import provenance
from patchcore_jax.data import (
  arrivals,
  decoding,
  decoding_memory,
  image_files,
  image_finding,
  passed_by,
  preprocess,
)
from patchcore_jax.data.image_files import shown
from patchcore_jax.inspection import Inspector, colours
from patchcore_jax.inspection.inspector import Scorer
from patchcore_jax.report import predictions
from patchcore_jax.report.answers import Answers
from patchcore_jax.report.predictions import Answer
from patchcore_jax.settings import DataSpec, max_pixels

MAPS = ('npy', 'tif', 'none')
STARTS_ANEW = 'The same command starts anew.'
Say = Callable[..., None]  # say(text, loud=False)
_NAMED = 10  # images in a message
_KEPT_PIXELS = 25_000_000  # images of more are not kept between reading and drawing
_REPORT_SECONDS = 10.0  # between two reports while images arrive


def _silent(text: str, *, loud: bool = False) -> None:
  """Says nothing."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What a run is asked for.

  Attributes:
    bank: folder of the bank.
    images: a folder, a file or a pattern.
    out: folder to write to.
    batch_size: images that go through the network at once; 0 for 8, or 1 with `watch`, where each is answered
      as it comes.
    overlays: whether heatmaps are drawn.
    maps: 'npy', 'tif' or 'none'.
    masks: whether the regions above the pixel threshold are written as masks.
    why: whether the most anomalous patch is drawn beside the nearest normal one.
    threshold: threshold of scores, in place of the bank's.
    min_area: regions of fewer pixels are ignored.
    scale: values of the map where colour begins and where it is red; () for those of the bank.
    watch: whether images are awaited.
    watch_seconds: for how long; 0 until stopped.
    weights: see `inspection.load`.
    max_megapixels: as of `settings.DataSpec`.

  Raises:
    ValueError: values out of range.
  """

  bank: str
  images: str
  out: str
  batch_size: int = 0
  overlays: bool = True
  maps: str = 'npy'
  masks: bool = False
  why: bool = False
  threshold: float | None = None
  min_area: float = 0.0
  scale: tuple[float, ...] = ()
  watch: bool = False
  watch_seconds: float = 0.0
  weights: str = ''
  max_megapixels: float = DataSpec.max_megapixels

  def __post_init__(self):
    max_pixels(self.max_megapixels)  # says what is wrong with it
    for name in ('bank', 'images', 'out'):
      if not getattr(self, name):
        raise ValueError(f'{name} is empty: expected a path.')
    if self.batch_size < 0 or not 0 <= self.watch_seconds < math.inf:
      raise ValueError(
          f'batch_size={self.batch_size}, watch_seconds={self.watch_seconds}: expected 0 or more.')
    if self.watch_seconds and not self.watch:
      raise ValueError(
          f'watch_seconds={self.watch_seconds}: expected 0 for a run that does not watch. Set watch too.')
    if self.maps not in MAPS:
      raise ValueError(f'maps={self.maps}: expected one of {", ".join(MAPS)}.')
    if not 0 <= self.min_area < math.inf:
      raise ValueError(f'min_area={self.min_area}: expected a number of pixels, 0 or more.')
    if self.threshold is not None and not math.isfinite(self.threshold):
      raise ValueError(f'threshold={self.threshold}: expected a number.')
    if self.scale and not (len(self.scale) == 2 and -math.inf < self.scale[0] < self.scale[1] < math.inf):
      raise ValueError(
          f'scale={",".join(map(str, self.scale))}: expected two numbers, the larger one last, as 1.5,6.')


class Unanswered(RuntimeError):
  """Images were taken and have no answer, neither a finding nor an error: a mistake of the program."""


class Summary(NamedTuple):
  """The outcome of a run: images that were scored, those of them that are anomalous, files that could not be
  scored, seconds of work without waiting for images to arrive, and whether it was stopped before all were
  done.
  """

  images: int
  anomalous: int
  failed: int
  seconds: float
  stopped: bool


class Loaded(NamedTuple):
  """An image file, its (height, width), upright, and how its values were read (`decoding.Decoded`).

  `image` is None where it is so large that it is decoded again when it is drawn; `error` says why there is
  nothing else.
  """

  path: str
  size: tuple[int, int] | None = None
  image: Image.Image | None = None
  pixels: np.ndarray | None = None
  outside: float = 0.0
  full_range: bool = False
  error: str | None = None


class Prepared(NamedTuple):
  """All that a run needs: the model, ready to score, the images that are there, and the folders that cannot
  be looked into.
  """

  inspector: Inspector
  score: Scorer
  paths: list[str]
  denied: list[str]


def prepare(options: Options, *, say: Say = _silent) -> Prepared:
  """Looks for the images, loads the model, and compiles it. Nothing is written.

  Raises:
    ValueError: no bank, no images, or a folder that is not to be written to.
    OSError: the folder cannot be written to.
  """
  paths, denied = [], []
  if options.watch:
    arrivals.arriving(options.images, stop=threading.Event())  # says what is wrong with the folder
  else:
    paths, denied = _listed(options)
    for line in (*passed_by.origins(options.images, paths), *_passed_by(options)):
      say(line)
  # It is tried now rather than after the long work.
  with atomic_files.writing_to(options.out), predictions.claimed(options.out):
    predictions.discard(predictions.unfinished(options.out))
  began = time.monotonic()
  inspector = inspection.load(options.bank, weights=options.weights)
  if options.threshold is None and not inspector.calibration:
    say('the bank has no threshold: scores only, no decisions; --threshold sets one')
  score = inspection.scorer(inspector, _batch_size(options))
  found = score.compile(_batch_size(options))
  if found.map is None and (options.maps != 'none' or options.overlays):
    say(f'{inspector.detector.title} scores whole images: there are no heatmaps, maps and boxes')
  if options.masks or options.min_area:
    inspection.check_knows_regions(inspector)
  if options.why and 'patch' not in found.evidence:
    say(f'{inspector.detector.title} does not tell why: there are no pictures of --why')
  elif options.why and not provenance.has_thumbnails(inspector.model):
    say('the bank holds no pictures of its training images: --why shows the patches of new images only')
  say(f'{options.bank}: {inspector.about()}; loaded and compiled in {time.monotonic() - began:.1f} s')
  return Prepared(inspector, score, paths, denied)


def run(options: Options, prepared: Prepared | None = None, *, say: Say = _silent,
        stop: threading.Event | None = None) -> Summary:
  """Scores the images, and writes the answers.

  Args:
    options: what is asked for.
    prepared: what `prepare` made of the options; None to have it done now.
    say: called as `say(line, loud=...)` with what a person at a terminal is told; loud is what stands out.
    stop: ends the run when set. Ctrl-C sets it, and a second one interrupts.

  Raises:
    ValueError: what `prepare` raises.
    OSError: the answers cannot be written. What was done until then is kept in a folder inside of `out`,
      as it is when the run is stopped.
    KeyboardInterrupt: a second Ctrl-C; the message says what is left of the run.
    Unanswered: an image has no answer.
  """
  out, stop = Path(options.out), stop or threading.Event()
  inspector, score, paths, denied = prepared or prepare(options, say=say)
  with _stopping(stop), contextlib.ExitStack() as stack:
    with atomic_files.writing_to(out):
      stack.enter_context(predictions.claimed(out))
      unfinished = predictions.unfinished(out)
      place = predictions.publish(unfinished) if options.watch else unfinished
    writer = Answers(
        inspector, place, image_files.root_of(options.images), overlays=options.overlays, maps=options.maps,
        why=options.why, limits=options.scale or colours.limits(inspector, options.threshold),
        threshold=options.threshold, say=say, masks=options.masks, min_area=options.min_area)
    for folder_name in denied:
      writer.add(Answer(folder_name, error=f'Cannot read the folder {folder_name}: permission denied.'))
    if options.watch:
      say(f'waiting for images in {options.images}; Ctrl-C ends it')
      paths = _arriving(options, stop, writer, say)
    try:
      summary = _predict(inspector, score, paths, writer, options, stop)
      if summary.stopped:
        done = summary.images + summary.failed
        say(f'stopped: {done} of {len(paths)} images are done, in {place}. {STARTS_ANEW}')
        return summary
      passed_by = _passed_by(options)
      _report(writer, options, inspector, _speed(summary), passed_by)
      if not options.watch:
        with atomic_files.writing_to(out):
          predictions.publish(unfinished)
    except OSError as e:
      raise OSError(f'{e} What was done until then lies in {place}.') from e
    except Unanswered as e:
      raise Unanswered(f'{e} It lies in {place}.') from e
    except KeyboardInterrupt as e:
      raise KeyboardInterrupt(f'What was done until then lies in {place}. {STARTS_ANEW}') from e
  known = f', {summary.anomalous} anomalous' if writer.threshold is not None else ''
  failed = f'; {summary.failed} could not be scored' if summary.failed else ''
  images = f'{summary.images} image{"" if summary.images == 1 else "s"}'
  say(f'{images} in {summary.seconds:.1f} s, {_speed(summary) or "none"}{known}{failed}')
  for line in passed_by:  # what was said at the beginning is far up by now
    say(line)
  say(f'see {out / predictions.REPORT} and {out / predictions.CSV}')
  return summary


def read(path: str, inspector: Inspector, max_pixels: int | None = None) -> Loaded:
  """Decodes and preprocesses an image. What is wrong with the file is part of the answer."""
  try:
    with decoding_memory.one_at_a_time():
      image, outside, full_range = decoding.decode(path, inspector.preprocessing, max_pixels=max_pixels)
      pixels, size = np.asarray(preprocess.transform(image, inspector.preprocessing)), image.size[::-1]
      if size[0] * size[1] > _KEPT_PIXELS:
        image = None  # before the next large one has its turn
    inspection.check_size(inspector, pixels.shape[:2])
  except (ValueError, MemoryError) as e:
    message = str(e) or 'it does not fit into memory.'
    return Loaded(path, error=message if path in message else f'{path}: {message}')
  return Loaded(path, size, image, pixels, outside, full_range)


def read_ahead(
    paths: Iterable[str | None], read_one: Callable[[str], Any], pool: concurrent.futures.Executor,
    ahead: int) -> Iterator[Any]:
  """Yields read_one(path) in order, while `ahead` more are being read.

  At a None among the paths, all that is being read is yielded, and then a None.
  """
  pending = collections.deque()
  for path in paths:
    if path is not None:
      pending.append(pool.submit(read_one, path))
    while len(pending) > (ahead if path is not None else 0):
      yield pending.popleft().result()
    if path is None:
      yield None
  while pending:
    yield pending.popleft().result()


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  """Groups items into lists of `size`. A None ends a list early, even an empty one.

  >>> list(batched([1, 2, 3, None, None, 4], 2))
  [[1, 2], [3], [], [4]]
  """
  batch = []
  for item in items:
    if item is not None:
      batch.append(item)
    if item is None or len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch


def _listed(options):
  """Lists the images, and the folders that cannot be looked into."""
  paths = list(_outside(options.out, image_finding.find_images(options.images)))
  if not paths:
    raise ValueError(f'{options.images}: there are only pictures that an earlier run wrote to {options.out}.')
  return paths, image_files.listed(options.images).denied


def _arriving(options, stop, writer, say):
  """Yields the images that arrive, each page of a file; a None where there are no more for now."""
  for path in _outside(options.out, arrivals.arriving(
      options.images, stop=stop, seconds=options.watch_seconds or math.inf, notify=say)):
    try:
      yield from [None] if path is None else image_finding.pages_of(path)
    except ValueError as e:
      writer.add(Answer(path, error=str(e)))


def _passed_by(options):
  """Tells in lines what is no image to score."""
  try:
    return passed_by.passed_by(options.images, options.out)
  except OSError:
    return []  # a share that went away after its images were scored


def _outside(out, paths):
  """Drops paths of pictures that an earlier run wrote to `out`; a None passes."""
  return (p for p in paths if p is None or not predictions.is_of_a_run(p, out))


def _batch_size(options):
  """Chooses how many images go through the network at once."""
  return options.batch_size or (1 if options.watch else 8)


def _report(writer, options, inspector, speed, passed_by=()):
  """Writes the report of what was added so far, and of what was passed by."""
  writer.report((
      ('bank', options.bank), ('images', options.images), ('model', inspector.about()),
      *([('colours', 'from {:.4g} to {:.4g}'.format(*writer.limits))] if writer.limits else []),
      ('speed', speed)), [f'{line[:1].upper()}{line[1:]}.' for line in passed_by])


def _speed(summary):
  """Writes the images a second; '' where no time has passed."""
  return f'{summary.images / summary.seconds:.1f} images/s' if summary.seconds else ''


def _predict(inspector, score, paths, writer, options, stop) -> Summary:
  """Scores the images: while a batch is scored, the next is read, and the one before is drawn."""
  clock, drawing, most = _Clock(), [], max_pixels(options.max_megapixels)
  reported, when, unanswered = 0, time.monotonic(), collections.Counter()
  total = 0 if options.watch else len(paths) + writer.failed  # those folders are counted already

  def summary():
    done = writer.images + writer.failed
    return Summary(writer.images, writer.anomalous, writer.failed, clock.worked(),
                   stopped=done < total and stop.is_set())

  def finish():
    while drawing:
      name, job = drawing.pop(0)
      answer, picture = job.result()
      done = writer.images + writer.failed + 1
      writer.add(answer, picture, name=name, place=f'[{done}/{total}] ' if total else '')
      unanswered[answer.path] -= 1
      if not unanswered[answer.path]:
        del unanswered[answer.path]

  def begin(loaded, scores, i):
    name = '' if loaded.error else writer.reserve(loaded.path)
    return name, pool.submit(draw, loaded, name, scores, i)

  def draw(loaded, name, scores, i):
    if loaded.error:
      return Answer(loaded.path, error=loaded.error), None
    with decoding_memory.one_at_a_time(math.prod(loaded.size)):
      finding = inspection.find(
          inspector, scores, i, loaded.size, pixels=loaded.pixels, threshold=options.threshold,
          outside=loaded.outside, full_range=loaded.full_range, min_area=options.min_area)
      image = loaded.image
      if image is None:
        try:
          image = decoding.decode(loaded.path, inspector.preprocessing, max_pixels=most).image
        except ValueError as e:  # it is gone, or another by now
          return Answer(loaded.path, error=str(e)), None
        if image.size[::-1] != loaded.size:
          return Answer(loaded.path, error=f'{loaded.path} was changed while it was inspected.'), None
      return writer.draw(loaded.path, name, image, loaded.pixels, finding)

  threads = max(2, min(8, os.cpu_count() or 1))
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  try:
    # Originals are large: no more of them wait than threads can read at a time.
    items = read_ahead(
        clock.waiting_for(_counted(paths, unanswered)), lambda path: read(path, inspector, most), pool,
        threads)
    for batch in batched(items, _batch_size(options)):
      good = [loaded for loaded in batch if not loaded.error]
      scores = score(np.stack([loaded.pixels for loaded in good])) if good else None
      position = iter(range(len(good)))
      jobs = [begin(loaded, scores, 0 if loaded.error else next(position)) for loaded in batch]
      finish()
      drawing.extend(jobs)
      done = writer.images + writer.failed
      if options.watch or not done:  # somebody waits for these, or for the first answers of all
        finish()
      if options.watch:
        done = writer.images + writer.failed
        if done > reported and time.monotonic() - when >= _REPORT_SECONDS:
          _report(writer, options, inspector, _speed(summary()))
          reported, when = done, time.monotonic()
      if stop.is_set() and not options.watch:  # of what has arrived, all is answered
        break
    finish()
  finally:
    pool.shutdown(cancel_futures=True)
  result = summary()
  if not result.stopped and (lost := list(unanswered.elements())):
    raise Unanswered(
        f'{len(lost)} images have no answer: {", ".join(map(shown, lost[:_NAMED]))}. Expected one for each: '
        'this is a mistake of the program, and what it found cannot be relied on.')
  return result


def _counted(paths: Iterable[str | None], counter: collections.Counter) -> Iterator[str | None]:
  """Passes paths on, and counts each."""
  for path in paths:
    if path is not None:
      counter[path] += 1
    yield path


class _Clock:
  """A clock that tells work from waiting."""

  def __init__(self):
    self._began, self._waited = time.monotonic(), 0.0

  def waiting_for(self, items):
    """Yields the items, and counts the time until each comes as waiting."""
    items = iter(items)
    while True:
      began = time.monotonic()
      item = next(items, self)
      self._waited += time.monotonic() - began
      if item is self:
        return
      yield item

  def worked(self):
    """Computes the seconds so far without those of waiting."""
    return time.monotonic() - self._began - self._waited


@contextlib.contextmanager
def _stopping(stop: threading.Event):
  """Has Ctrl-C, or a service manager's request, set `stop` in a block; a second Ctrl-C interrupts at once."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def handle(number, frame):
    stop.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)

  before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
