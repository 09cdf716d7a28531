"""Measures a detector category by category, and keeps what was measured in a folder, the workdir.

The workdir holds results.csv (a row per category and coreset ratio), config.json, banks/<category>/,
scores/<category>.csv and report.html. What was stopped goes on after its last finished category.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from patchcore_jax import atomic_files, extras, metrics, processes
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import provenance, store
from patchcore_jax.banks.model import Model, flat, to_json
from patchcore_jax.data import map_files, preprocess
from patchcore_jax.data.folder import Category
from patchcore_jax.detectors import DETECTORS, Run, Scores, find, streaming
from patchcore_jax.evaluation import checks, page, protocols
from patchcore_jax.evaluation.data import as_trained, load_categories, passed_by
from patchcore_jax.evaluation.images import Images
from patchcore_jax.evaluation.networks import create, resolved
from patchcore_jax.evaluation.protocols import PROTOCOLS, Rated, Scored, at_original_size, rate
from patchcore_jax.evaluation.settings import Settings, names_in
from patchcore_jax.report import per_image, results
from patchcore_jax.settings import (
    CoresetSpec,
    DataSpec,
    EmbeddingSpec,
    MetricsSpec,
    Preprocessing,
    ScoringSpec,
)

Progress = Callable[[str, int, int], None]
# Settings without influence on results: a run may go on with others.
_NO_INFLUENCE = (
    'fit.', 'search.', 'report.', 'calibration.', 'metrics.resamples', 'data.num_workers',
    'data.max_megapixels', 'published.', 'sweep')
_ONE_BANK = 'all_categories'  # the name of a bank of all of them


@contextlib.contextmanager
def _no_bar(title):
  """Gives a progress that tells nobody."""
  yield lambda stage, done, total: None


def _ignore(said):
  """Tells nobody."""


@dataclasses.dataclass(frozen=True)
class Listener:
  """Whom a run tells how it goes; nobody by default.

  Attributes:
    progress: called with a title, gives a context manager of a function (stage, done, total).
    say: called with a line.
    notice: called with a line that the user must know; each of several processes has notices of its own.
    say_which: called with the names of the networks, to say where they are not the best choice.
  """

  progress: Callable[[str], contextlib.AbstractContextManager[Progress]] = _no_bar
  say: Callable[[str], None] = _ignore
  notice: Callable[[str], None] = _ignore
  say_which: Callable[[Iterable[str]], None] = _ignore


def run(
    settings: Settings, workdir: str | os.PathLike, *, networks: Sequence[Backbone] = (),
    listener: Listener | None = None) -> list[results.Row]:
  """Fits and measures the detector on every category.

  Args:
    settings: what 'auto' leaves open is settled here.
    workdir: made if absent; one that holds results of the same settings is continued.
    networks: those to use in place of what the settings name, for networks from Python.
    listener: whom to tell.

  Returns:
    One row per category and ratio. Of several processes, the first measures, and the others return only what
    was measured in an earlier run.

  Raises:
    ValueError: bad settings, bad data, or a workdir that holds a run with other settings.
  """
  listener = listener or Listener()
  experiment = Experiment(resolved(settings, networks), workdir, listener)  # before anything long
  settings = experiment.settings
  with listener.progress('built-in data') as progress:
    categories = load_categories(settings.data, lambda done, total: progress('draw', done, total))
  networks = tuple(networks) or create(settings.backbone, settings.seed)
  for network in networks:
    listener.say(f'backbone {network.name}, layers {", ".join(network.layers)}')
    listener.say_which([network.name])
  listener.say(f'{len(categories)} categor{"y" if len(categories) == 1 else "ies"}; results in {workdir}')
  if line := passed_by(settings.data):
    listener.notice(f'{line}.')
  experiment.check(categories)
  experiment.claim()
  _check_same_everywhere(settings, experiment.still_to_do(categories))
  for category in as_trained(settings.data, categories):
    if experiment.has(category.name):
      listener.say(f'{category.name}: finished before')
      if missing := experiment.lacks(category.name):
        listener.notice(
            f'{category.name} was finished without {missing}, and is not measured again: take another folder '
            'for that.')
    else:
      experiment.evaluate(networks, Images(settings, category))
  if processes.is_first():
    page.write(workdir, settings, experiment.rows)
  return experiment.rows


class Experiment:
  """Settings and the workdir with the results so far.

  Attributes:
    settings: of the run.
    rows: of results.csv.
    notes: what the user must know of a category, by its name, in lines: see `check`.
  """

  def __init__(self, settings: Settings, workdir: str | os.PathLike, listener: Listener | None = None):
    """Reads the results so far.

    Raises:
      ValueError: a workdir with results of other settings.
    """
    self.settings, self._workdir, self._listener = settings, Path(workdir), listener or Listener()
    _check_same_settings(settings, self._workdir)
    self.rows = results.read_csv(self._workdir / 'results.csv')
    self.notes: dict[str, list[str]] = {}
    self._shared: tuple[Model, Images] | None = None

  def claim(self) -> None:
    """Makes the workdir and writes config.json."""
    if processes.is_first():
      _claim(self.settings, self._workdir)

  def has(self, category: str) -> bool:
    """Tells whether the rows of a category are there."""
    finished = {row['coreset_ratio'] for row in self.rows if row['category'] == category}
    return finished >= set(self.settings.ratios)

  def lacks(self, category: str) -> str:
    """Names the folders that the settings ask for and a finished category is not in; '' if it is in all."""
    wanted = {
        'intervals': bool(self.settings.metrics.resamples), 'regions': self.settings.report.regions,
        'maps': self.settings.report.maps}
    return ', '.join(
        name for name, is_wanted in wanted.items() if is_wanted
        and not list((self._workdir / name).glob('*' if name == 'maps' else f'{category}.csv')))

  def still_to_do(self, categories: Sequence[Category]) -> list[tuple[str, int, int, bool]]:
    """Lists categories without rows: how many images they have, and whether there is a bank."""
    return [(c.name, len(c.train), len(c.test), self._bank_of(c.name).exists())
            for c in categories if not self.has(c.name)]

  def _bank_of(self, category: str) -> Path:
    """Names the folder of the bank by which a category is tested."""
    return self._workdir / 'banks' / (_ONE_BANK if self.settings.data.multi_class else category)

  def check(self, categories: Sequence[Category]) -> None:
    """Looks at the images and masks of categories without rows, before anything long, and tells what is odd.

    Raises:
      ImageError: a mask that cannot be used, unless such files are to be skipped.
      ValueError: data that the protocol cannot measure, or maps to write without the package that does.
    """
    if self.settings.report.maps:
      with extras.needed_for('Writing anomaly maps as TIFF'):
        import tifffile  # noqa: F401, which is missed before anything long
    method, protocol, data = self.settings.method, self.settings.metrics.protocol, self.settings.data
    if method.of_a_set and (data.shots or data.noise or data.multi_class):
      raise ValueError(
          f'data.shots={data.shots}, data.noise={data.noise}, data.multi_class={data.multi_class}: '
          f'{method.title} takes no training images. Leave them out.')
    if method.of_a_set and PROTOCOLS[protocol].validation:
      raise ValueError(
          f'metrics.protocol={protocol} takes a threshold from validation images, and {method.title} makes '
          f'none: {method.host_step}. Take another protocol.')
    for category in categories:
      if not self.has(category.name):
        protocols.check(self.settings.metrics, category, self.settings.data.root)
        self.notes[category.name] = checks.notes(category, self.settings)
        self._tell(category.name, self.notes[category.name])

  def _tell(self, category: str, lines: Sequence[str]) -> None:
    """Tells what the user must know of a category; of several processes, the first does."""
    if processes.is_first():
      for line in lines:
        self._listener.notice(f'{category}: {line}.')

  def evaluate(self, backbones: Sequence[Backbone], images: Images) -> None:
    """Evaluates one category: fits (or restores), predicts, measures, and adds a row per ratio.

    Of several processes each predicts a part of the test images; the first puts them together and measures.
    """
    settings = self.settings
    model = self._known(images) or self._restored(backbones, images)
    told = [*checks.noise_notes(images), *checks.defect_notes(images), *checks.range_notes(images)]
    self._tell(images.name, told)
    with self._listener.progress(images.name) as progress:
      model = model or self._fitted(backbones, images, progress)
      if settings.data.multi_class:
        self._shared = model, images
      sizes = {ratio: settings.method.bank_size(model, ratio) for ratio in settings.ratios}
      score_fn = settings.method.score_fn_at(model, backbones, settings.ratios, search=settings.search)
      tested = _predicted(score_fn, model, images.name, images.test, progress, 'predict')
      validation = _predicted(score_fn, model, images.name, images.validation, progress, 'validation')
    for message in sorted({str(error) for error in images.skipped}):
      self._listener.notice(f'skipped: {message}')
    leaks = images.leaks(tested.read)
    self._tell(images.name, leaks.lines())
    scores_of_images, intervals = [], []
    for i, (ratio, size) in enumerate(sizes.items()):
      largest = ratio == max(sizes)
      rated = self._rated(images, tested, validation, i, in_full=largest)
      if rated is None:
        continue
      self.rows.append({
          'category': images.name, 'coreset_ratio': ratio, 'num_train': model.description.num_images,
          'num_test': len(tested.index),
          'num_skipped': model.description.num_skipped + len(images.test) - len(tested.index),
          'bank_size': size, **rated.values, 'fit_seconds': round(model.description.fit_seconds, 2),
          'ms_per_image': round(_ms_per_image(tested.times, images.batch_size), 2),
          results.LEAKED: len(leaks.pairs),
          **({results.NOISE: len(images.noise)} if images.noise else {}),
          **({results.DEFECTS: model.description.num_defects} if images.defects else {})})
      scores_of_images += per_image.scores(ratio, rated.examples, rated.scores.image, rated.per_image)
      intervals += [(ratio, *item) for item in rated.intervals.items()]
      if largest:
        found = _own_category(model, images, rated.scores) if settings.data.multi_class else []
        for line in found:
          self._listener.say(f'{images.name}: {line}.')
        notes = [*self.notes.get(images.name, ()), *told, *leaks.lines(), *rated.notes,
                 *rated.notes_of_metrics, *rated.summary(), *found]
        self._show(images, model, rated, tested.masks, notes)
    if not processes.is_first():
      return
    per_image.write_scores(self._workdir / 'scores' / f'{images.name}.csv', scores_of_images)
    if intervals:
      per_image.write_intervals(self._workdir / 'intervals' / f'{images.name}.csv', intervals)
    results.write_csv(self._workdir / 'results.csv', self.rows)
    page.write(self._workdir, settings, self.rows)

  def _rated(self, images: Images, tested, validation, i: int, *, in_full: bool) -> Rated | None:
    """Measures the scores of one ratio, which all processes join; None in all of them but the first.

    Args:
      images: of the category.
      tested, validation: what was predicted.
      i: position of the ratio.
      in_full: whether to write maps and make the table of regions, where the settings ask for them.
    """
    settings, scores = self.settings, tested.scores(i)
    validated = validation and validation.scores(i)
    if not processes.is_first():
      return None
    found = Scored(
        [images.test.examples[i] for i in tested.index], scores, scores.map, tested.masks,
        None if validated is None else validated.map)
    write_maps = in_full and settings.report.maps
    if scores.map is not None and (write_maps or PROTOCOLS[settings.metrics.protocol].original_size):
      good = [images.validation.examples[i] for i in validation.index] if validation else ()
      original = at_original_size(found, images.preprocessing, good)
      if write_maps:
        names = map_files.map_names(found.examples, settings.data.root)
        map_files.write_maps(self._workdir / 'maps', names, original.maps)
        if good:  # in full, as other tools expect them
          sizes = map_files.original_sizes(good)
          map_files.write_maps(
              self._workdir / 'maps', map_files.map_names(good, settings.data.root),
              map_files.OriginalMaps(found.validation, sizes, images.preprocessing))
      if PROTOCOLS[settings.metrics.protocol].original_size:
        found = original
    rated = rate(
        found, settings.metrics, settings.data.root, seed=settings.seed,
        regions=in_full and settings.report.regions)
    if in_full:
      self._tell(images.name, rated.notes)
      for line in rated.summary():
        self._listener.say(f'{images.name}: {line}.')
    return rated

  def _show(self, images: Images, model: Model, rated: Rated, masks, notes: Sequence[str]) -> None:
    """Writes what people look at, of the largest ratio, whose row is the last."""
    settings, scores = self.settings, rated.scores
    if settings.report.errors and masks is not None:
      self._write_errors(images, rated.examples, rated.labels, scores, masks, self.rows[-1]['coreset_ratio'])
    if rated.regions:
      per_image.write_regions(
          self._workdir / 'regions' / f'{images.name}.csv', rated.regions,
          [e.image_path for e in rated.examples])
    page.keep(self._workdir, page.category(
        images.name, rated.examples, scores, masks,
        thresholds=page.thresholds(model.description, self.rows[-1]),
        why=page.reasons(model, images, scores.evidence, images.preprocessing),
        preprocessing=images.preprocessing, most=settings.report.gallery, notes=notes))

  def _known(self, images: Images) -> Model | None:
    """Finds the model that all categories have, and tells `images` what is known of theirs."""
    if not self._shared:
      return None
    model, others = self._shared
    images.digests.update(others.digests)
    images.use(others.preprocessing)
    return model

  def _restored(self, backbones: Sequence[Backbone], images: Images) -> Model | None:
    """Restores the bank in the workdir, and has images read as it was made; None where there is none."""
    detector, path = self.settings.method, self._bank_of(images.name)
    if not detector.has_coreset or not path.exists():
      return None
    model = store.restore(path, expected={
        'detector': detector.name, 'settings': detector.fit_settings(), 'seed': self.settings.seed,
        'backbones': [streaming.network_fields(backbone) for backbone in backbones], 'shots': images.shots})
    kept, wanted = model.description.preprocessing, images.preprocessing
    if not self.settings.preprocessing.value_range:  # measured then; the training images may be gone
      wanted = dataclasses.replace(wanted, value_range=kept.value_range)
    if not kept.background:  # a bank from before there was one
      wanted = dataclasses.replace(wanted, background=())
    model.description.check(
        {'preprocessing': {k: v for k, v in vars(wanted).items() if not k.startswith('mask_')}}, path)
    if self.settings.data.multi_class:
      _check_same_images(model, images, path)
    images.use(wanted)
    return model

  def _fitted(self, backbones: Sequence[Backbone], images: Images, progress: Progress) -> Model:
    """Fits, and keeps the bank, or the network that was trained. Other models can be large, and are not."""
    detector, path = self.settings.method, self._bank_of(images.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    members = path.with_name(f'{path.name}.members')
    began = time.monotonic()
    model = detector.fit(images.test if detector.of_a_set else images.train, backbones, Run(
        progress=progress, notify=lambda plan: self._listener.say(f'{images.name}: {plan}'),
        seed=self.settings.seed, memory_gb=self.settings.fit.memory_gb, scratch=path.parent,
        checkpoints=members, several_processes=jax.process_count() > 1))
    model = model.with_description(shots=images.shots, fit_seconds=time.monotonic() - began)
    costly = detector.has_coreset or detector.trains
    if costly and processes.is_first():
      store.save(path, model)
      shutil.rmtree(members, ignore_errors=True)
    return model

  def _write_errors(self, images, examples, labels, scores, masks, ratio):
    """Writes the wrongly classified images, which are read once more: they were not kept."""
    if len(set(labels)) < 2:
      return  # no threshold
    threshold = metrics.f1_optimal(labels, scores.image).threshold
    wrong = np.flatnonzero((scores.image >= threshold) != labels)
    loaded = [preprocess.load(examples[i], images.preprocessing)[0] for i in wrong]
    per_image.write_errors(self._workdir / 'errors' / f'{images.name}.npz', per_image.Errors(
        np.stack(loaded) if loaded else np.zeros((0, *masks.shape[1:], 3), np.uint8), scores.map[wrong],
        masks[wrong], labels[wrong], np.array([examples[i].defect for i in wrong], str),
        np.array([examples[i].image_path for i in wrong], str), threshold, ratio))


class _Predicted(NamedTuple):
  """Scores of images, in the order of `index`; of several processes, each has predicted a part.

  Attributes:
    index: [n] positions among the examples, of all processes.
    read: the positions of those that this process has predicted.
    batches: scores of this process's batches, for each ratio.
    masks: [n, h, w], of all processes; None without any, or without maps.
    times: when this process had each batch.
  """

  index: np.ndarray
  read: np.ndarray
  batches: Sequence[Sequence[Scores]]
  masks: np.ndarray | None
  times: Sequence[float]

  def scores(self, i: int) -> Scores:
    """Joins those of the ratio at position i, of all processes."""
    return _of_all([batch[i] for batch in self.batches])


def _predicted(
    score_fn, model: Model, name: str, data, progress: Progress, stage: str) -> _Predicted | None:
  """Predicts this process's part of the images; None where there are none.

  Raises:
    ValueError: none could be read.
  """
  if not len(data):
    return None
  found, masks, times = [], [], [time.monotonic()]
  part = processes.part(len(data))
  batches = _keep_masks(data.part(range(part.start, part.stop)).batches(), masks)
  for prediction in streaming.predict(score_fn, batches, image_size=model.description.image_size):
    found.append(prediction)
    times.append(time.monotonic())
    progress(stage, sum(len(index) for index, _ in found), part.stop - part.start)
  if not found:
    raise ValueError(f'{name}: no {"test" if stage == "predict" else stage} image could be read.')
  indices, batches = zip(*found, strict=True)
  read = np.concatenate(indices) + np.int32(part.start)
  masks = processes.joined(np.concatenate(masks)) if masks and batches[0][0].map is not None else None
  return _Predicted(processes.joined(read), read, batches, masks, times)


def _of_all(scores: Sequence[Scores]) -> Scores:
  """Joins the scores of all batches of all processes."""
  return jax.tree.map(lambda *batches: processes.joined(np.concatenate(batches)), *scores)


def _ms_per_image(times, batch_size):
  """Computes ms per image of the median batch; the first, which compiles, counts only if alone."""
  seconds = np.diff(times)
  seconds = float(np.median(seconds[1:] if len(seconds) > 1 else seconds))
  return 1000 * seconds / (batch_size * jax.process_count())


def _keep_masks(batches, masks):
  """Passes batches on; their masks stay on the host, where the metrics are computed."""
  for batch in batches:
    if batch.mask is not None:
      masks.append(batch.mask[batch.valid])
    yield batch


def _check_same_images(model, images, path):
  """Raises ValueError for a bank of other categories: their folders were not there yet, or are gone."""
  before, now = set(model.description.images), {e.image_path for e in images.train.examples}
  if not before <= now or model.description.num_images + model.description.num_skipped != len(now):
    raise ValueError(
        f'{path} was made of {model.description.num_images} images ({model.description.category}), and there '
        f'are {len(now)} training images now. Use another folder, or the images of that run.')


def _own_category(model, images, scores):
  """Tells for how many images the nearest training patch is of their own category, in a line."""
  if 'nearest' not in scores.evidence or not model.description.images:
    return []
  of_file = {e.image_path: e.category for e in images.train.examples}
  nearest = [of_file.get(provenance.origin(model, int(row)).name) for row in scores.evidence['nearest']]
  return [f'the patch that decides is nearest to one of {images.name} in {nearest.count(images.name)} of '
          f'{len(nearest)} images']


def _check_same_everywhere(settings, work):
  """Raises ValueError where processes differ in what there is to do: they would wait for each other."""
  said = flat(settings.to_json()) | {'data.root': ''}
  if not processes.agree(json.dumps([said, work])):
    raise ValueError(
        'The processes differ in their settings, in the images they see, or in what is done already: '
        'expected the same command, data, and folder to write to on all machines.')


def _check_same_settings(settings, workdir):
  """Raises ValueError for a workdir that holds results of other settings."""
  path = workdir / 'config.json'
  if not (workdir / 'results.csv').exists() and not list(workdir.glob('banks/*')):
    return  # nothing yet that could be mixed
  if not path.exists():
    raise ValueError(f'{workdir} holds results but no config.json: use another folder.')
  before, now = (_comparable(sections) for sections in (json.loads(path.read_text()), settings.to_json()))
  # Settings that were not there yet were what is now their default.
  before = {name: _DEFAULTS[name] for name in now if name in _DEFAULTS} | before
  others = tuple(f'{name}.' for name in DETECTORS if name != now['detector'])  # methods that are not used
  differences = [
      f'{name} was {before.get(name)!r}, now {now.get(name)!r}'
      for name in sorted({*before, *now})
      if before.get(name) != now.get(name) and not name.startswith(_NO_INFLUENCE + others)]
  if differences:
    raise ValueError(
        f'{workdir} holds a run with other settings: {"; ".join(differences)}. Use another folder, '
        'or the settings of that run.')


def _comparable(sections: dict[str, Any]) -> dict[str, Any]:
  """Flattens what config.json holds. Older versions kept several names as one, 'a,b'."""
  fields = flat(sections)
  return fields | {
      name: list(names_in(fields[name])) for name in ('data.categories', 'backbone.layers') if name in fields}


_DEFAULTS = _comparable({
    'preprocess': to_json(Preprocessing()), 'data': to_json(DataSpec()), 'metrics': to_json(MetricsSpec()),
    'embedding': to_json(EmbeddingSpec()), 'coreset': to_json(CoresetSpec()),
    'scoring': to_json(ScoringSpec()), **{name: find(name)().settings() for name in DETECTORS}})


def _claim(settings, workdir):
  """Writes config.json."""
  with atomic_files.written(workdir / 'config.json') as aside:
    aside.write_text(json.dumps(settings.to_json(), indent=2) + '\n')
