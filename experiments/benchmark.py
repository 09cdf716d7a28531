"""Measures this package against the plain alternatives, side by side in one run.

    python -m experiments.benchmark --subject=coreset
    python -m experiments.benchmark --subject=neighbors --config=configs/wrn50.py \\
        --config.data.root=PATH --config.data.categories=screw

Subjects: coreset, neighbors, backbone, predict, fit, memory. Prints a Markdown table: medians, the
range, and how many times our median each takes. With --config, features of real images (of the
config's first category) are measured too. Alternatives that are not installed are named and left
out: pip install torch faiss-cpu.
"""

import datetime
import functools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from experiments import alternatives, cli, wiring
from patchcore_jax import backbones, coreset, neighbors, parallel, spool
from patchcore_jax.backbones import Backbone, checkpoints, resnet
from patchcore_jax.data.pipeline import Batch
from patchcore_jax.detectors import patchcore
from patchcore_jax.detectors.patchcore import CoresetSpec
from patchcore_jax.embedding import EmbeddingSpec
from patchcore_jax.memory_bank import MemoryBank
from patchcore_jax.scoring import ScoringSpec

cli.key_flags('config')

_SUBJECT = flags.DEFINE_enum(
    'subject', None, ['coreset', 'neighbors', 'backbone', 'predict', 'fit', 'memory'], 'What to measure.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Runs of each, in turn.', lower_bound=1)
_SIZES = flags.DEFINE_list('sizes', ['10000', '30000', '100000', '300000', '1000000'], 'Points of coresets.')
_RATIO = flags.DEFINE_float('ratio', 0.01, 'Of made coresets, and of `memory`.')
_WHOLE = flags.DEFINE_bool(
    'whole', False, 'coreset: run alternatives to the end. Else their first steps are measured, and '
    'scaled up: every step costs the same.')
_SIZE = flags.DEFINE_integer('size', 224, 'Pixels: height and width of images.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Images at a time.')
_NUM_IMAGES = flags.DEFINE_integer('num_images', 7000, 'Of `memory`.')
_MEMORY_GB = flags.DEFINE_float('memory_gb', 6.0, 'Of `memory`: the most that the fit may take.')

_FIRST_STEPS = 200


class Entry(NamedTuple):
  """One line of a race.

  Attributes:
    run: () -> result; it returns when the result is there.
    scale: by which its time is multiplied, where only a part is run.
  """

  run: Callable[[], Any]
  scale: float = 1.0


def main(_) -> None:
  for line in globals()['measure_' + _SUBJECT.value]():
    print(line, flush=True)
  print(machine())  # at the end: it takes memory


def machine() -> str:
  """Date, machine, and what it can do: the limits to see the figures against."""
  device = jax.devices()[0]
  size = 4096 if device.platform == 'cpu' else 8192
  a = jnp.ones((size, size))
  product = jax.jit(functools.partial(
      jnp.dot, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32))
  rates = []
  for dtype in (jnp.float32, jnp.bfloat16):
    x = a.astype(dtype)
    seconds = _median(race({'': Entry(lambda x=x: product(x, x).block_until_ready())}, 3)[''])
    rates.append(2 * size**3 / seconds / 1e9)
  x, add = [jnp.ones(2**27)], jax.jit(lambda x: x + 1, donate_argnums=0)
  seconds = _median(race({'': Entry(lambda: x.append(add(x.pop()).block_until_ready()))}, 5)[''])
  return (
      f'{datetime.date.today()}, {_processor() if device.platform == "cpu" else device.device_kind} '
      f'({jax.device_count()} device, {os.cpu_count()} cores), Python {platform.python_version()}, '
      f'JAX {jax.__version__}. Products {rates[0]:.0f} GFLOP/s in float32, {rates[1]:.0f} in bfloat16; '
      f'memory {2 * x[0].nbytes / seconds / 1e9:.0f} GB/s.\n')


def _processor():
  try:
    with open('/proc/cpuinfo') as f:
      return next(line.partition(':')[2].strip() for line in f if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def race(entries: dict[str, Entry], repeats: int) -> dict[str, list[float]]:
  """Seconds of each, run in turn; before that all run once, which compiles."""
  for entry in entries.values():
    entry.run()
  seconds = {name: [] for name in entries}
  for _ in range(repeats):
    for name, entry in entries.items():
      began = time.perf_counter()
      entry.run()
      seconds[name].append((time.perf_counter() - began) * entry.scale)
  return seconds


def table(title: str, seconds: dict[str, list[float]], notes: dict[str, str]) -> Iterator[str]:
  """Markdown; the first entry is ours, to which the others are compared."""
  ours = _median(next(iter(seconds.values())))
  yield f'### {title}\n'
  yield '| what | median | range | times ours | |'
  yield '|---|---|---|---|---|'
  for name, values in seconds.items():
    middle = _median(values)
    yield (f'| {name} | {_seconds(middle)} | {_seconds(min(values))} to {_seconds(max(values))} | '
           f'{middle / ours:.2f} | {notes.get(name, "")} |')
  yield ''


def _median(values):
  return float(np.median(values))


def _seconds(value):
  return f'{value:.3g} s' if value >= 0.1 else f'{1000 * value:.3g} ms'


# Coreset.


def measure_coreset() -> Iterator[str]:
  if cli.CONFIG.value:
    name, embeddings = _train_embeddings()
    points = np.asarray(coreset.random_projection(embeddings, 128, key=jax.random.key(0)))
    yield from _coreset_table(f'Coreset of {name}', points, 0.1)
    return
  yield from _coreset_table('Coreset of made clusters', clustered(250_880), 0.1)
  yield f'### Growth at a ratio of {_RATIO.value:g}, made clusters\n'
  yield '| points | selected | median | range | against half as many |\n|---|---|---|---|---|'
  before = None
  for n in map(int, _SIZES.value):
    points, size = jnp.asarray(clustered(n)), coreset.coreset_size(n, _RATIO.value)
    values = race({'': Entry(lambda p=points, s=size: _greedy(p, s))}, min(3, _REPEATS.value))['']
    middle, growth = _median(values), ''
    if before:
      growth = f'{(middle / before[1]) ** (np.log(2) / np.log(n / before[0])):.2f}'
    yield (f'| {n} | {size} | {_seconds(middle)} | {_seconds(min(values))} to {_seconds(max(values))} | '
           f'{growth} |')
    before = n, middle


def clustered(n: int, dim: int = 128) -> np.ndarray:
  """[n, dim] float32 around 300 centres, tighter around some than around others."""
  rng = np.random.default_rng(0)
  centers = 3 * rng.standard_normal((300, dim), np.float32)
  which = rng.integers(300, size=n)
  width = np.exp(rng.standard_normal(300)).astype(np.float32) / 2
  return centers[which] + width[which, None] * rng.standard_normal((n, dim), np.float32)


_START = np.arange(10) * 997


def _greedy(points, size):
  return coreset.greedy_k_center(points, size, start=_START)


def _coreset_table(title, points, ratio):
  n, dim = points.shape
  size = coreset.coreset_size(n, ratio)
  steps = size if _WHOLE.value else min(size, 5 * _FIRST_STEPS)
  few = min(size, _FIRST_STEPS)
  on_device = jnp.asarray(points)
  picks = {}

  def kept(name, function, *args, **kwargs):
    picks[name] = np.asarray(function(*args, **kwargs))

  entries = {
      'lazy': Entry(lambda: kept('lazy', _greedy, on_device, size)),
      'lazy, points on the host': Entry(lambda: kept(
          'lazy, points on the host', coreset.greedy_k_center, points, size, start=_START, stream=True)),
      'our dense loop': Entry(lambda: kept(
          'our dense loop', coreset.dense_greedy_k_center, on_device, steps, start=_START), size / steps),
      'NumPy, a norm per step': Entry(lambda: kept(
          'NumPy, a norm per step', alternatives.numpy_k_center, points, few, _START), size / few)}
  if alternatives.available('torch'):
    entries['torch, a norm per step'] = Entry(lambda: kept(
        'torch, a norm per step', alternatives.torch_k_center, points, few, _START), size / few)
  else:
    yield 'torch is not installed.\n'
  seconds = race(entries, 1 if _WHOLE.value else _REPEATS.value)
  notes = {}
  for name, value in picks.items():
    different = int((value != picks['lazy'][:len(value)]).sum())
    notes[name] = f'{different} of {len(value)} picks differ'
    if entries[name].scale > 1:
      notes[name] += '; scaled up from these'
  rate = 4 * n * dim * size / _median(seconds['our dense loop']) / 1e9
  notes['our dense loop'] += f'; reads {rate:.0f} GB/s'
  products = _products_of_lazy(on_device, size)
  notes['lazy'] = (
      f'{products / 1e9:.0f} GFLOP of products, {products / _median(seconds["lazy"]) / 1e9:.0f} GFLOP/s')
  yield from table(f'{title}: {size} of {n} points of {dim} values', seconds, notes)


def _products_of_lazy(points, size):
  """Operations in the products of a selection: 2 d for each point and selected one compared."""
  compared, ages, rounds = 0, np.zeros(len(points), np.int64), 0

  def add(state):
    nonlocal compared, ages, rounds
    now = np.asarray(state.ages)
    compared += int((now - ages).sum())
    ages, rounds = now.astype(np.int64), rounds + 1

  coreset.greedy_k_center(points, size, start=_START, checkpoint=add)
  return 2 * points.shape[1] * compared


# Neighbours.


def measure_neighbors() -> Iterator[str]:
  rng = np.random.default_rng(0)
  if cli.CONFIG.value:
    name, embeddings = _train_embeddings()
    order = rng.permutation(len(embeddings))
    bank, queries = embeddings[order[:25_000]], embeddings[order[25_000:31_272]]
    yield from _neighbors_table(name, queries, bank)
  else:
    made = rng.standard_normal((31_272, 1024), np.float32)
    yield from _neighbors_table('made, the same in every direction', made[25_000:], made[:25_000])


def _neighbors_table(title, queries, bank):
  search = jax.jit(neighbors.nearest_neighbors)
  on_device, whole = jnp.asarray(queries), jnp.asarray(bank)
  found, entries, notes = {}, {}, {}

  def add(name, function, *args):
    def run():
      found[name] = np.asarray(function(*args))
    entries[name] = Entry(run)

  for shortlist in ('float32', 'bfloat16'):
    began = time.perf_counter()
    prepared = jax.block_until_ready(jax.device_put(neighbors.prepare(bank, shortlist)))
    name = f'{shortlist} shortlist'
    notes[name] = (
        f'{prepared.columns.shape[0]} of {bank.shape[1]} dimensions; '
        f'prepared once in {time.perf_counter() - began:.2f} s')
    add(name, lambda p: search(on_device, p)[1][:, 0], prepared)
  add('one matrix in JAX', alternatives.jax_nearest, on_device, whole)
  add('NumPy', alternatives.numpy_nearest, queries, bank)
  add('scikit-learn, brute', alternatives.sklearn_nearest, queries, bank)
  if alternatives.available('torch'):
    add('torch cdist, min', alternatives.torch_nearest, queries, bank)
  else:
    yield 'torch is not installed.\n'
  if alternatives.available('faiss'):
    index = alternatives.faiss_index(bank)
    add('faiss flat', lambda: index.search(queries, 1)[1][:, 0])
  else:
    yield 'faiss is not installed.\n'
  seconds = race(entries, _REPEATS.value)
  for name, value in found.items():
    different = int((value != found['float32 shortlist']).sum())
    notes[name] = '; '.join(filter(None, [f'{different} indices differ', notes.get(name)]))
  yield from table(
      f'Nearest neighbours: {len(queries)} queries in {len(bank)} x {bank.shape[1]}, {title}', seconds, notes)


# Backbone, predict, fit.


def measure_backbone() -> Iterator[str]:
  images = _images(_BATCH.value)
  backbone = _wide_resnet()
  entries, maps, flops = {}, {}, None
  for precision in resnet.PRECISIONS:
    network = _wide_resnet(precision)
    run = jax.jit(lambda v, x, b=network: b.apply(v, backbones.normalize(x, b.mean, b.std)))
    variables = jax.device_put(network.variables)
    flops = flops or run.lower(variables, images).compile().cost_analysis()['flops']
    maps[f'JAX {precision}'] = jax.device_get(run(variables, images))
    entries[f'JAX {precision}'] = Entry(
        lambda run=run, v=variables: jax.block_until_ready(run(v, images)), 1 / len(images))
  built_in = backbones.create(checkpoints.BUILT_IN)
  small = jax.jit(lambda v, x: built_in.apply(v, backbones.normalize(x, built_in.mean, built_in.std)))
  weights = jax.device_put(built_in.variables)
  entries[f'{built_in.name} to {built_in.layers[-1]}'] = Entry(
      lambda: jax.block_until_ready(small(weights, images)), 1 / len(images))
  if alternatives.available('torch'):
    network, torch = alternatives.torch_wide_resnet(), alternatives.torch_on_all_cores()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()
    entries['torch'] = Entry(lambda: network(x), 1 / len(images))
    last = x.to(memory_format=torch.channels_last)
    other = alternatives.torch_wide_resnet().to(memory_format=torch.channels_last)
    entries['torch, channels last'] = Entry(lambda: other(last), 1 / len(images))
  else:
    yield 'torch is not installed.\n'
  seconds = race(entries, _REPEATS.value)
  notes = {
      name: f'{1 / _median(values):.1f} images/s' + (
          '' if built_in.name in name else f', {flops / len(images) / _median(values) / 1e9:.0f} GFLOP/s')
      for name, values in seconds.items()}
  exact, *others = maps.items()
  for name, values in others:
    notes[name] += ''.join(
        f'; {layer} off by {np.linalg.norm(values[layer] - x) / np.linalg.norm(x):.1e}'
        for layer, x in exact[1].items())
  yield from table(
      f'{backbone.name} to layer3, {_SIZE.value} px, one of {len(images)} images', seconds, notes)


def measure_predict() -> Iterator[str]:
  """From pixels to scores and maps, against a bank of 16,384 patches of the network's own features."""
  backbone, images, spec = _wide_resnet(), _images(_BATCH.value), EmbeddingSpec()
  batch = Batch(images, None, np.arange(len(images), dtype=np.int32))
  per_image = (_SIZE.value // 8) ** 2
  enough = -(-16_384 // (per_image * len(images)))
  train = [Batch(_images(len(images), seed=i + 1), None, batch.index) for i in range(enough)]
  embeddings = patchcore.embed(backbone, train, enough * len(images), embedding=spec)
  rows = np.random.default_rng(0).permutation(embeddings.reshape(-1, embeddings.shape[-1]))[:16_384]
  description = patchcore.describe(backbone, spec) | {'image_size': images.shape[1:3]}
  for title, values in (
      ('its own features', rows),
      ('made rows, the same in every direction', np.random.default_rng(1).standard_normal(
          rows.shape, np.float32) * rows.std())):
    bank = MemoryBank(values, np.arange(len(values), dtype=np.int32), description)
    fn = patchcore._predict_fn(patchcore._embed_fn_of(backbone, spec), ScoringSpec(), (len(values),))
    parameters = jax.device_put((backbone.variables, neighbors.prepare(bank.embeddings)))
    run = parallel.data_parallel(fn)
    entries = {'JAX': Entry(lambda run=run, p=parameters: jax.device_get(run(p, images)), 1 / len(images))}
    searches = {'torch, cdist': alternatives.torch_search}
    if alternatives.available('faiss'):
      searches['torch, faiss flat'] = alternatives.faiss_search
    if alternatives.available('torch', 'scipy'):
      for name, search in searches.items():
        entries[name] = Entry(functools.partial(
            alternatives.torch_predict, alternatives.torch_wide_resnet(), search(values), images),
            1 / len(images))
    else:
      yield 'torch is not installed.\n'
    seconds = race(entries, _REPEATS.value)
    notes = {name: f'{1 / _median(values):.1f} images/s' for name, values in seconds.items()}
    yield from table(
        f'predict: {backbone.name}, {_SIZE.value} px, one of {len(images)} images, bank of '
        f'{len(values)} ({title})', seconds, notes)


def measure_fit() -> Iterator[str]:
  """From pixels to a bank of 10 %, 64 images."""
  backbone, spec, number = _wide_resnet(), EmbeddingSpec(), 64
  batches = [
      Batch(_images(_BATCH.value, seed=i), None, np.arange(_BATCH.value, dtype=np.int32))
      for i in range(number // _BATCH.value)]
  number = len(batches) * _BATCH.value
  entries = {'JAX': Entry(lambda: patchcore.fit(
      backbone, batches, number, embedding=spec, coreset_spec=CoresetSpec(ratio=0.1)))}
  if alternatives.available('torch'):
    network = alternatives.torch_wide_resnet()
    entries['torch, a norm per step'] = Entry(lambda: _torch_fit(network, batches))
  else:
    yield 'torch is not installed.\n'
  seconds = race(entries, max(1, _REPEATS.value // 2))
  notes = {name: f'{number / _median(values):.1f} images/s' for name, values in seconds.items()}
  yield from table(f'fit: {backbone.name}, {_SIZE.value} px, {number} images, 10 %', seconds, notes)


def _torch_fit(network, batches):
  torch = alternatives.torch_on_all_cores()
  embeddings = torch.cat([alternatives.torch_embed(network, b.image) for b in batches])
  points = embeddings @ torch.rand(embeddings.shape[1], 128)
  picks = alternatives.torch_k_center(points.numpy(), len(points) // 10, _START)
  return embeddings[torch.from_numpy(picks)]


# Memory.


def measure_memory() -> Iterator[str]:
  """A fit of many images whose features are made: what it takes is what the fit itself takes."""
  plans, stages, began = [], {}, time.perf_counter()

  def progress(stage, done, total):
    if done == total:
      stages[stage] = time.perf_counter()
    print(f'\r{stage} {done}/{total} ', end='', file=sys.stderr, flush=True)

  with tempfile.TemporaryDirectory(dir='.') as scratch:
    bank = patchcore.fit(
        _made_backbone(), _many_batches(), _NUM_IMAGES.value, embedding=EmbeddingSpec('mean', 1),
        coreset_spec=CoresetSpec(ratio=_RATIO.value), memory_gb=_MEMORY_GB.value, scratch=scratch,
        notify=plans.append, progress=progress)
  (plan,) = plans
  print(file=sys.stderr)
  yield (f'### Memory: a fit of {_NUM_IMAGES.value} images at {_SIZE.value} px, '
         f'fit.memory_gb={_MEMORY_GB.value:g}\n')
  yield '| what | |\n|---|---|'
  yield f'| said before | {plan} |'
  yield f'| peak of the process | {spool.peak_bytes() / 1e9:.2f} GB |'
  yield f'| embeddings alone | {4 * plan.num_patches * bank.embeddings.shape[1] / 1e9:.1f} GB |'
  for stage, until in stages.items():
    yield f'| {stage} | {until - began:.0f} s |'
    began = until
  yield ''


def _made_backbone():
  """1024 values for each 8 x 8 pixels: random products of its pixels, so that they have some structure."""
  weights = np.random.default_rng(0).standard_normal((192, 1024), np.float32) / 14

  def apply(variables, images):
    b, height, width, _ = images.shape
    cells = images.reshape(b, height // 8, 8, width // 8, 8, 3).swapaxes(2, 3)
    products = jnp.dot(cells.reshape(b, height // 8, width // 8, 192), variables)
    return {'features': jnp.tanh(products)}

  return Backbone(apply, jnp.asarray(weights), ('features',), (0.5,) * 3, (0.25,) * 3, 'made')


def _many_batches():
  for begin in range(0, _NUM_IMAGES.value, _BATCH.value):
    images = _images(_BATCH.value, seed=begin)
    index = np.arange(begin, begin + _BATCH.value, dtype=np.int32)
    yield Batch(images, None, np.where(index < _NUM_IMAGES.value, index, -1).astype(np.int32))


# Inputs.


def _images(n, seed=0):
  """[n, size, size, 3] uint8: smooth shapes and a little noise, another for every seed."""
  rng, size = np.random.default_rng(seed), _SIZE.value
  y, x = np.mgrid[:size, :size] / size
  phase = rng.uniform(0, 2 * np.pi, (n, 4, 3))
  waves = rng.uniform(2, 30, (n, 4, 2))
  angle = 2 * np.pi * (
      waves[:, :, 0, None, None] * y + waves[:, :, 1, None, None] * x).astype(np.float32)
  pattern = np.sin(angle[..., None] + phase[:, :, None, None]).astype(np.float32).sum(1)
  noise = rng.integers(0, 24, (n, size, size, 3))
  return np.clip(128 + 25 * pattern + noise - 12, 0, 255).astype(np.uint8)


@functools.cache
def _wide_resnet(precision='float32'):
  return backbones.create('wide_resnet50_2', weights='random', precision=precision)


def _train_embeddings():
  """(name, [n, d]) of the training images of the config's first category."""
  config = cli.CONFIG.value
  settings, (category, *_) = wiring.settings(config), wiring.load_data(config, lambda *_: None)
  backbone, *_ = wiring.create_backbones(config)
  with cli.progress_bar(category.name) as progress:
    embeddings = patchcore.embed(
        backbone, wiring.batches(config, category.train, settings.preprocessing, []),
        len(category.train), embedding=settings.embedding, progress=progress)
  return f'{category.name}, {backbone.name}', embeddings.reshape(-1, embeddings.shape[-1])


if __name__ == '__main__':
  flags.mark_flag_as_required('subject')
  cli.run(main)
