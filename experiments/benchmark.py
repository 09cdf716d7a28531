"""Measures this package against the plain alternatives, side by side in one run.

    python -m experiments.benchmark --subject=coreset
    python -m experiments.benchmark --subject=neighbors --config=configs/wrn50.py \\
        --config.data.root=PATH --config.data.categories=screw
    python -m experiments.benchmark --subject=own_images --root=PATH --category=transistor

Subjects: coreset, neighbors, backbone, vit (at --size=518, which torch's side is made for), predict, fit,
memory, own_images, one_pass, metrics (experiments.metrics_speed), and intervals, which counts how often
intervals hold the truth (experiments.coverage). The others print a table: medians, the range, how many times
our median each takes, and the share of what the machine can do at all (the time in which it could do the
products, and read and write what must be, by the time taken). With --config, features of real images (of the
config's first category) are measured too. Everything runs on the device that JAX runs on: on a GPU torch's
side does so too. Alternatives that are not installed are named and left out: pip install torch faiss-cpu.
`experiments.gpu_check` is one command for a GPU.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import (
    alternatives,
    cli,
    coverage,
    entries,
    metrics_speed,
    one_pass,
    own_images,
    timing,
    wiring,
)
from experiments.timing import Entry, machine, median
from patchcore_jax import backbones, disk_arrays
from patchcore_jax.backbones import Backbone, checkpoints
from patchcore_jax.cli import terminal
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import PatchCore, Run, patchcore
from patchcore_jax.evaluation.data import load_categories
from patchcore_jax.evaluation.images import data_of
from patchcore_jax.evaluation.networks import create, resolved
from patchcore_jax.search import coreset
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec

cli.key_flags('config', 'root', 'networks')

_SUBJECT = flags.DEFINE_enum(
    'subject', None,
    ['coreset', 'neighbors', 'backbone', 'vit', 'predict', 'fit', 'memory', 'own_images', 'one_pass',
     'metrics', 'intervals'],
    'What to measure.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Runs of each, in turn.', lower_bound=1)
_SIZES = flags.DEFINE_list('sizes', ['10000', '30000', '100000', '300000', '1000000'], 'Points of coresets.')
_RATIO = flags.DEFINE_float(
    'ratio', 0.01, 'Of made coresets, and of `memory`, where 0 is for a bank of 10,000 patches.')
_CORESET_METHOD = flags.DEFINE_enum('coreset_method', 'greedy', ['greedy', 'merge_reduce'], 'Of `memory`.')
_WHOLE = flags.DEFINE_bool(
    'whole', False, 'coreset: run alternatives to the end. Else their first steps are measured, and '
    'scaled up: every step costs the same.')
_SIZE = flags.DEFINE_integer('size', 224, 'Pixels: height and width of images.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Images at a time.')
_TORCH_COMPILE = flags.DEFINE_bool('torch_compile', False, 'backbone, on a GPU: torch.compile too.')
_PICTURES = flags.DEFINE_enum(
    'pictures', 'clustered', ['clustered', 'waves'], 'Of `memory`: whose patches are of some kinds, as those '
    'of like parts are, or have little structure.')
_NUM_IMAGES = flags.DEFINE_integer('num_images', 7000, 'Of `memory`.')
_MEMORY_GB = flags.DEFINE_float('memory_gb', 6.0, 'Of `memory`: the most that the fit may take.')
_CATEGORY = flags.DEFINE_string('category', 'gear', 'Of `own_images` and `one_pass`, of --root.')
_SEEDS = flags.DEFINE_integer('seeds', 10, 'Fits of `own_images` and `one_pass` with each.', lower_bound=1)
_MAPS = flags.DEFINE_integer('maps', 160, 'Images of `metrics`.', lower_bound=4)
_MAP_SIZE = flags.DEFINE_integer(
    'map_size', 448, 'Pixels: height and width of maps of `metrics`.', lower_bound=28)
_LARGE_MAP_SIZE = flags.DEFINE_integer(
    'large_map_size', 2000, 'Of maps that `metrics` reads from files one by one; 0 for none.')
_ANOMALIB = flags.DEFINE_string('anomalib', None, '`metrics`: interpreter of an environment with anomalib.')
_OFFICIAL = flags.DEFINE_string('official', None, "`metrics`: folder of MVTec's script, mvtec_ad_evaluation.")
_SETS = flags.DEFINE_integer('sets', 5000, 'Simulated test sets of `intervals`.', lower_bound=1)

_FIRST_STEPS = 200  # of alternatives on a CPU; a GPU does more in the same time


def main(_) -> None:
  # They take memory.
  without = ('memory', 'own_images', 'one_pass', 'metrics', 'intervals')
  limits = None if _SUBJECT.value in without else timing.limits()
  for line in globals()['measure_' + _SUBJECT.value](limits):
    print(line, flush=True)
  print(machine(limits))


# Coreset.


def measure_coreset(limits: timing.Limits) -> Iterator[str]:
  """Measures greedy selections, and how their time grows with the number of points."""
  if cli.CONFIG.value:
    name, embeddings = _train_embeddings()
    points = np.asarray(coreset.random_projection(embeddings, 128, key=jax.random.key(0)))
    yield from _coreset_table(f'Coreset of {name}', points, 0.1, limits)
    return
  yield from _coreset_table('Coreset of made clusters', entries.clustered(250_880), 0.1, limits)
  yield f'### Growth at a ratio of {_RATIO.value:g}, made clusters\n'
  yield '| points | selected | median | range | against half as many |\n|---|---|---|---|---|'
  before = None
  for n in map(int, _SIZES.value):
    points, size = jnp.asarray(entries.clustered(n)), coreset.coreset_size(n, _RATIO.value)
    run = functools.partial(coreset.greedy_k_center, points, size, start=entries.start_of(n))
    values = timing.race({'': Entry(run)}, min(3, _REPEATS.value))['']
    middle, growth = median(values), ''
    if before:
      growth = f'{(middle / before[1]) ** (np.log(2) / np.log(n / before[0])):.2f}'
    yield (f'| {n} | {size} | {timing.duration(middle)} | {timing.duration(min(values))} to '
           f'{timing.duration(max(values))} | {growth} |')
    before = n, middle


def _coreset_table(title, points, ratio, limits):
  """Measures one selection and its alternatives, and yields a table."""
  n, dim = points.shape
  size = coreset.coreset_size(n, ratio)
  first = _FIRST_STEPS if entries.on_cpu() else 15 * _FIRST_STEPS
  steps, dense_steps = (
      size if _WHOLE.value else min(size, number) for number in (first, max(first, 5 * _FIRST_STEPS)))
  work, picks = entries.selection_entries(
      points, size, steps=steps, dense_steps=dense_steps, streamed=True,
      anomalib=not entries.on_cpu())
  yield from _not_installed('torch')
  seconds = timing.race(work, 1 if _WHOLE.value else _REPEATS.value)
  notes = entries.picks_notes(work, picks)
  rate = 4 * n * dim * size / median(seconds['our dense loop']) / 1e9
  notes['our dense loop'] += f'; reads {rate:.0f} GB/s'
  products = _products_of_lazy(jnp.asarray(points), size)
  notes['lazy'] = (
      f'{products / 1e9:.0f} GFLOP of products, {products / median(seconds["lazy"]) / 1e9:.0f} GFLOP/s')
  yield from timing.table(
      f'{title}: {size} of {n} points of {dim} values', work, seconds, notes, limits)


def _products_of_lazy(points, size):
  """Counts operations in the products of a selection: 2 d for each point and selected one compared."""
  compared, ages = 0, np.zeros(len(points), np.int64)

  def add(state):
    nonlocal compared, ages
    now = np.asarray(state.ages)
    compared += int((now - ages).sum())
    ages = now.astype(np.int64)

  coreset.greedy_k_center(points, size, start=entries.start_of(len(points)), checkpoint=add)
  return 2 * points.shape[1] * compared


def _not_installed(*modules):
  """Yields a line for each of the modules that is not installed."""
  for module in modules:
    if not alternatives.available(module):
      yield f'{module} is not installed.\n'


# Neighbours.


def measure_neighbors(limits: timing.Limits) -> Iterator[str]:
  """Measures searches for the nearest neighbours."""
  rng = np.random.default_rng(0)
  if cli.CONFIG.value:
    name, embeddings = _train_embeddings()
    order = rng.permutation(len(embeddings))
    bank, queries = embeddings[order[:25_000]], embeddings[order[25_000:31_272]]
    yield from _neighbors_table(name, queries, bank, limits)
    return
  queries, bank = entries.of_rank(6272, 25_000, 1024, 1024)
  yield from _neighbors_table('made, the same in every direction', queries, bank, limits)
  # A ViT-S/14's patches of one image of 448 px among those of 16 images, in 8 rotations each.
  queries, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in entries.of_rank(
      1024, 131_072, 384, 64))
  yield from _neighbors_table('made, of rank 64 and unit length', queries, bank, limits, plain=False)
  if not entries.on_cpu():
    queries, bank = entries.of_rank(50_176, 250_000, 1024, 64)
    yield from _neighbors_table('made, of rank 64', queries, bank, limits, plain=False)


def _neighbors_table(title, queries, bank, limits, plain=True):
  """Measures one search and its alternatives, and yields a table."""
  work, found, notes = entries.search_entries(queries, bank, plain=plain)
  yield from _not_installed('torch', 'faiss')
  seconds = timing.race(work, _REPEATS.value)
  for name, value in found.items():
    different = int((value != found['float32 shortlist']).sum())
    notes[name] = '; '.join(filter(None, [f'{different} indices differ', notes.get(name)]))
  yield from timing.table(
      f'Nearest neighbours: {len(queries)} queries in {len(bank)} x {bank.shape[1]}, {title}', work, seconds,
      notes, limits)


# Backbone, predict, fit.


def measure_backbone(limits: timing.Limits) -> Iterator[str]:
  """Measures networks on a batch of images."""
  images = entries.pictures(_BATCH.value, _SIZE.value)
  work, maps = entries.network_entries(images, timing.PRECISIONS, torch_compile=_TORCH_COMPILE.value)
  built_in = backbones.create(checkpoints.BUILT_IN)
  small = jax.jit(lambda v, x: built_in.apply(v, backbones.normalize(x, built_in.mean, built_in.std)))
  weights, pixels = jax.device_put((built_in.variables, images))
  work[f'{built_in.name} to {built_in.layers[-1]}'] = Entry(
      lambda: jax.block_until_ready(small(weights, pixels)), 1 / len(images))
  yield from _not_installed('torch')
  failures = {} if _TORCH_COMPILE.value else None  # it does not work everywhere
  seconds = timing.race(work, _REPEATS.value, failures)
  yield from (f'{name} failed: {error}\n' for name, error in (failures or {}).items())
  notes = entries.rate_notes(work, seconds, maps)
  yield from timing.table(
      f'{entries.network().name} to layer3, {_SIZE.value} px, one of {len(images)} images', work, seconds,
      notes, limits)


def measure_vit(limits: timing.Limits) -> Iterator[str]:
  """Measures a Vision Transformer, DINOv2's ViT-S/14, on a batch of images."""
  if _SIZE.value != 518:
    raise ValueError(f'--size={_SIZE.value}: expected 518, the size of the positions on torch\'s side.')
  images = entries.pictures(_BATCH.value, _SIZE.value)
  precisions = ('float32', 'bfloat16') if entries.on_cpu() else timing.PRECISIONS
  work, maps = entries.network_entries(
      images, precisions, architecture=entries.VIT_SMALL, torch_compile=_TORCH_COMPILE.value)
  yield from _not_installed('torch')
  seconds = timing.race(work, _REPEATS.value)
  yield from timing.table(
      f'{entries.VIT_SMALL}, {_SIZE.value} px, one of {len(images)} images', work, seconds,
      entries.rate_notes(work, seconds, maps), limits)


def measure_predict(limits: timing.Limits) -> Iterator[str]:
  """Measures predictions from pixels to scores and maps.

  One bank is of 16,384 patches of the network's own features, another of as many made rows.
  """
  images = entries.pictures(_BATCH.value, _SIZE.value)
  precisions, stream = (('float32',), 0) if entries.on_cpu() else (('tensorfloat32', 'bfloat16'), 8)
  rows = _own_features(images)
  made = np.random.default_rng(1).standard_normal(rows.shape, np.float32) * rows.std()
  for title, values in (('its own features', rows), ('made rows, the same in every direction', made)):
    work, batches = entries.prediction_entries(images, values, precisions, stream=stream)
    yield from _not_installed('torch')
    seconds = timing.race(work, _REPEATS.value)
    notes = entries.rate_notes(work, seconds)
    for precision, batch in batches.items():
      notes[f'JAX {precision}'] += f'; launches of a batch: {timing.profile(batch)}'
    yield from timing.table(
        f'predict: {entries.network().name}, {_SIZE.value} px, one of {len(images)} images, bank of '
        f'{len(values)} ({title})', work, seconds, notes, limits)


def _own_features(images):
  """Makes a bank's rows: patches of other images, as the network embeds them."""
  n = len(images)
  enough = -(-entries.BANK_SIZE // ((_SIZE.value // 8) ** 2 * n))
  train = np.concatenate([entries.pictures(n, _SIZE.value, seed=i + 1) for i in range(enough)])
  embeddings, _ = patchcore.embed(entries.network(), ArrayData(train, n), embedding=EmbeddingSpec())
  rows = embeddings.reshape(-1, embeddings.shape[-1])
  return rows[np.random.default_rng(0).permutation(len(rows))[:entries.BANK_SIZE]]


def measure_fit(limits: timing.Limits) -> Iterator[str]:
  """Measures fits, from the pixels of 64 images to a bank of 10 %."""
  precision = 'float32' if entries.on_cpu() else 'tensorfloat32'
  backbone, n = entries.network(precision), _BATCH.value
  data = ArrayData(np.concatenate([entries.pictures(n, _SIZE.value, seed=i) for i in range(64 // n)]), n)
  work = {'JAX': Entry(lambda: PatchCore(0.1).fit(data, (backbone,)))}
  yield from _not_installed('torch')
  if alternatives.available('torch'):
    network = alternatives.torch_network(precision)
    work['torch, a norm per step'] = Entry(lambda: _torch_fit(network, data))
  seconds = timing.race(work, max(1, _REPEATS.value // 2))
  notes = {name: f'{len(data) / median(values):.1f} images/s' for name, values in seconds.items()}
  yield from timing.table(
      f'fit: {backbone.name}, {_SIZE.value} px, {len(data)} images, 10 %', work, seconds, notes, limits)


def _torch_fit(network, data):
  """Fits in torch, from pixels to a bank of 10 %."""
  torch = alternatives.torch_on_all_cores()
  embeddings = torch.cat([alternatives.torch_embed(network, b.image) for b in data.batches()])
  points = embeddings @ torch.rand(embeddings.shape[1], 128, device=embeddings.device)
  picks = alternatives.torch_k_center(points, len(points) // 10, entries.start_of(len(points)))
  return embeddings[alternatives.torch_tensor(picks)].cpu()


# Memory.


def measure_memory(_) -> Iterator[str]:
  """Measures what a fit of many images takes; their features are made, so that all of it is the fit's."""
  plans, stages, began = [], {}, time.perf_counter()
  detector = PatchCore(_RATIO.value, EmbeddingSpec('mean', 1), CoresetSpec(_CORESET_METHOD.value))

  def progress(stage, done, total):
    if done == total:
      stages[stage] = time.perf_counter()
    print(f'\r{stage} {done}/{total} ', end='', file=sys.stderr, flush=True)

  with tempfile.TemporaryDirectory(dir='.') as scratch:
    model = detector.fit(
        ArrayData(_Pictures(), _BATCH.value), (_made_backbone(),), Run(
            progress=progress, notify=plans.append, memory_gb=_MEMORY_GB.value, scratch=scratch))
  (plan, *told), dim = plans, model.arrays['embeddings'].shape[1]
  print(file=sys.stderr)
  yield (f'### Memory: a fit of {_NUM_IMAGES.value} images at {_SIZE.value} px ({_PICTURES.value}), '
         f'coreset.method={_CORESET_METHOD.value}, fit.memory_gb={_MEMORY_GB.value:g}\n')
  yield '| what | |\n|---|---|'
  yield f'| said before | {plan} |'
  yield from (f'| said later | {line} |' for line in told)
  yield f'| peak of the process | {disk_arrays.peak_bytes() / 1e9:.2f} GB |'
  yield f'| embeddings alone | {4 * model.description.num_patches * dim / 1e9:.1f} GB |'
  for stage, until in stages.items():
    yield f'| {stage} | {until - began:.0f} s |'
    began = until
  yield ''


def _made_backbone():
  """Makes a backbone of 1024 values for each 8 x 8 pixels.

  They are random products of the pixels, so that they have some structure.
  """
  weights = np.random.default_rng(0).standard_normal((192, 1024), np.float32) / 14

  def apply(variables, images):
    b, height, width, _ = images.shape
    cells = images.reshape(b, height // 8, 8, width // 8, 8, 3).swapaxes(2, 3)
    products = jnp.dot(cells.reshape(b, height // 8, width // 8, 192), variables)
    return {'features': jnp.tanh(products)}

  return Backbone(apply, jnp.asarray(weights), ('features',), (0.5,) * 3, (0.25,) * 3, 'made')


class _Pictures:
  """Stands for an array of many images, or some of them, which are drawn when they are read."""

  def __init__(self, positions=None):
    self._positions = np.arange(_NUM_IMAGES.value) if positions is None else positions
    self.shape = (len(self._positions), _SIZE.value, _SIZE.value, 3)

  def __len__(self):
    return self.shape[0]

  def __getitem__(self, positions):
    return _Pictures(self._positions[positions])

  def __array__(self, dtype=None, copy=None):
    draw = entries.clustered_pictures if _PICTURES.value == 'clustered' else entries.pictures
    return draw(len(self), _SIZE.value, seed=int(self._positions[0])).astype(dtype or np.uint8)


# Own images.


def measure_own_images(_) -> Iterator[str]:
  """Measures fits of a part by the defaults of `patchcore fit`, and what the models find."""
  yield from own_images.measure(
      cli.ROOT.value, _CATEGORY.value, cli.NETWORKS.value, _SEEDS.value,
      cache=flags.FLAGS.compilation_cache)


def measure_one_pass(_) -> Iterator[str]:
  """Measures how far banks of one pass are from those selected from all patches."""
  yield from one_pass.measure(
      cli.ROOT.value, _CATEGORY.value, cli.NETWORKS.value, (10_000, 2_000), _SEEDS.value)


# Metrics.


def measure_metrics(_) -> Iterator[str]:
  """Measures the time and memory of metrics of maps, beside anomalib and MVTec's script."""
  yield from metrics_speed.measure(
      _MAPS.value, _MAP_SIZE.value, _LARGE_MAP_SIZE.value, _REPEATS.value, anomalib=_ANOMALIB.value,
      official=_OFFICIAL.value)


# Intervals.


def measure_intervals(_) -> Iterator[str]:
  """Measures how often intervals of AUROC hold the truth."""
  yield from coverage.table(_SETS.value)


# Inputs.


def _train_embeddings():
  """Embeds the training images of the config's first category: (name, [n, d])."""
  settings = resolved(wiring.settings(cli.CONFIG.value))
  category, *_ = load_categories(settings.data)
  backbone, *_ = create(settings.backbone, settings.seed)
  with terminal.progress_bar(category.name) as progress:
    embeddings, _ = patchcore.embed(
        backbone, data_of(settings, category.train, []),
        embedding=settings.detector.embedding, run=Run(progress=progress))
  return f'{category.name}, {backbone.name}', embeddings.reshape(-1, embeddings.shape[-1])


if __name__ == '__main__':
  flags.mark_flag_as_required('subject')
  cli.run(main)
