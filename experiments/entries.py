"""Entries of races: the same piece of work by this package and by torch, on the device that JAX runs on.

`experiments.benchmark` and `experiments.gpu_check` share these. Modules that read images are imported where
they are used: without Grain the rest still runs.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import alternatives, timing
from experiments.timing import Entry
from patchcore_jax import backbones, parallel
from patchcore_jax.banks.model import Description, Model
from patchcore_jax.detectors import PatchCore, ScoreFn
from patchcore_jax.search import coreset, neighbors, search_bank

WIDE_RESNET, VIT_SMALL = 'wide_resnet50_2', 'vit_small_patch14_dinov2'
BANK_SIZE = 16_384  # patches of the banks that predictions are measured with

Entries = dict[str, Entry]


def on_cpu() -> bool:
  """Tells whether JAX runs on the CPU, where the alternatives are other ones."""
  return jax.default_backend() == 'cpu'


# Inputs.


def clustered(n: int, dim: int = 128) -> np.ndarray:
  """Makes [n, dim] float32 around 300 centres, tighter around some than around others."""
  rng = np.random.default_rng(0)
  centers = 3 * rng.standard_normal((300, dim), np.float32)
  which = rng.integers(300, size=n)
  width = np.exp(rng.standard_normal(300)).astype(np.float32) / 2
  return centers[which] + width[which, None] * rng.standard_normal((n, dim), np.float32)


def start_of(n: int) -> np.ndarray:
  """Names the ten points that selections of n points start from."""
  return np.arange(10) * 997 % n


def of_rank(num_queries: int, num_rows: int, dim: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """Makes (queries, bank), float32, normal, in a space of `rank` dimensions if that is below `dim`."""
  key = jax.random.key(0)

  @jax.jit
  def make():
    values = jax.random.normal(key, (num_queries + num_rows, min(rank, dim)))
    if rank < dim:
      axes = jax.random.normal(jax.random.fold_in(key, 1), (rank, dim)) / rank**0.5
      values = jnp.dot(values, axes, precision=jax.lax.Precision.HIGHEST)
    return values

  made = np.asarray(make())
  return made[:num_queries], made[num_queries:]


def pictures(n: int, size: int, seed: int = 0) -> np.ndarray:
  """Draws [n, size, size, 3] uint8: smooth shapes and a little noise, another for every seed."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:size, :size] / size
  phase = rng.uniform(0, 2 * np.pi, (n, 4, 3))
  waves = rng.uniform(2, 30, (n, 4, 2))
  angle = 2 * np.pi * (
      waves[:, :, 0, None, None] * y + waves[:, :, 1, None, None] * x).astype(np.float32)
  pattern = np.sin(angle[..., None] + phase[:, :, None, None]).astype(np.float32).sum(1)
  noise = rng.integers(0, 24, (n, size, size, 3))
  return np.clip(128 + 25 * pattern + noise - 12, 0, 255).astype(np.uint8)


def clustered_pictures(n: int, size: int, seed: int = 0) -> np.ndarray:
  """Draws [n, size, size, 3] uint8 whose cells of 8 x 8 pixels are of 300 kinds, some more alike than others.

  The kinds are the same for every seed: their cells have the structure of patches of like parts.
  """
  rng, cells = np.random.default_rng(0), size // 8
  kinds = rng.normal(128, 40, (300, 8, 8, 3)).astype(np.float32)
  width = 8 * np.exp(rng.standard_normal(300)).astype(np.float32) / 2
  rng = np.random.default_rng((1, seed))
  which = rng.integers(300, size=(n, cells, cells))
  values = rng.standard_normal((n, cells, cells, 8, 8, 3), np.float32)
  values *= width[which][..., None, None, None]
  values += kinds[which]
  return np.clip(values, 0, 255).astype(np.uint8).swapaxes(2, 3).reshape(n, 8 * cells, 8 * cells, 3)


@functools.cache
def network(precision: str = 'float32', architecture: str = WIDE_RESNET, layers: tuple[str, ...] = ()):
  """Makes a backbone with random weights."""
  return backbones.create(architecture, weights='random', layers=layers, precision=precision)


def network_flops(backbone: backbones.Backbone, size: int) -> float:
  """Counts operations of one image, by direct convolutions, as a GPU has them; 0 where JAX does not tell."""
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  traced = jax.jit(backbone.apply).trace(backbone.variables, image)
  return (traced.lower(lowering_platforms=('cuda',)).cost_analysis() or {}).get('flops', 0.0)


# Selection.


def selection_entries(
    points: np.ndarray, size: int, *, steps: int, dense_steps: int, streamed: bool = False,
    anomalib: bool = False,
) -> tuple[Entries, dict[str, np.ndarray]]:
  """Makes entries of greedy selections of `size` points.

  Args:
    points: [n, d] float32.
    size: how many are selected.
    steps: steps that the alternatives run; times are scaled up, because every step costs the same.
    dense_steps: likewise those of the package's own definition.
    streamed: whether there is an entry with the points on the host.
    anomalib: whether there is an entry with anomalib's loop, where torch is installed.

  Returns:
    The entries, ours first, and a dict into which they put their picks.
  """
  picks, entries = {}, {}
  on_device, start = jnp.asarray(points), start_of(len(points))

  def add(name, function, *args, part=size, **kwargs):
    def run():
      picks[name] = np.asarray(function(*args, **kwargs))
    each = points.nbytes if part < size or name == 'our dense loop' else 0.0  # a step reads all points
    entries[name] = Entry(run, size / part, traffic=each * size)

  add('lazy', coreset.greedy_k_center, on_device, size, start=start)
  if streamed:
    add('lazy, points on the host', coreset.greedy_k_center, points, size, start=start, stream=True)
  add('our dense loop', coreset.dense_greedy_k_center, on_device, dense_steps, start=start, part=dense_steps)
  if on_cpu():
    add('NumPy, a norm per step', alternatives.numpy_k_center, points, steps, start, part=steps)
  if alternatives.available('torch'):
    there = alternatives.torch_tensor(points)
    add('torch, a norm per step', alternatives.torch_k_center, there, steps, start, part=steps)
    if anomalib:
      add("torch, anomalib's loop", alternatives.torch_anomalib_k_center, there, steps, part=steps)
  return entries, picks


def picks_notes(entries: Entries, picks: dict[str, np.ndarray]) -> dict[str, str]:
  """Tells how many picks of each differ from ours, which are the first; anomalib's start elsewhere."""
  ours, *others = picks
  notes = {}
  for name in others:
    different = int((picks[name] != picks[ours][:len(picks[name])]).sum())
    notes[name] = f'{different} of {len(picks[name])} picks differ' if 'anomalib' not in name else ''
    if entries[name].scale > 1:
      notes[name] = '; '.join(filter(None, [notes[name], f'scaled up from {len(picks[name])} steps']))
  return notes


# Search.


def search_entries(
    queries: np.ndarray, bank: np.ndarray, *, plain: bool = True,
) -> tuple[Entries, dict[str, np.ndarray], dict[str, str]]:
  """Makes entries of searches for the nearest row of each query.

  Args:
    queries, bank: [q, d] and [m, d] float32, on the host.
    plain: whether there are entries that write the whole matrix of distances, or run on the host.

  Returns:
    The entries, ours first; a dict into which they put the indices; and notes on ours.
  """
  search = jax.jit(lambda queries, bank: neighbors.nearest_neighbors(queries, bank)[1][:, 0])
  on_device = jnp.asarray(queries)
  found, entries, notes = {}, {}, {}
  products = 2.0 * len(queries) * len(bank)

  def add(name, function, *args, prepare=None, flops=None):
    def run():
      found[name] = np.asarray(function(*args))
    entries[name] = Entry(run, prepare=prepare, flops=flops or {'float32': products * bank.shape[1]})

  for shortlist in ('float32', 'bfloat16'):
    began = time.perf_counter()
    prepared = jax.block_until_ready(jax.device_put(search_bank.prepare(bank, shortlist)))
    name, dim = f'{shortlist} shortlist', prepared.columns.shape[0]
    notes[name] = (
        f'{dim} of {bank.shape[1]} dimensions; prepared once in {time.perf_counter() - began:.2f} s')
    add(name, search, on_device, prepared, flops={shortlist: products * dim},
        prepare=functools.partial(_compile, search, on_device, prepared))
  if plain:
    add('one matrix in JAX', alternatives.jax_nearest, on_device, jnp.asarray(bank))
  if plain and on_cpu():
    add('NumPy', alternatives.numpy_nearest, queries, bank)
    add('scikit-learn, brute', alternatives.sklearn_nearest, queries, bank)
  if alternatives.available('torch'):
    there = [alternatives.torch_tensor(x) for x in (queries, bank)]
    if on_cpu():
      add('torch cdist, min', alternatives.torch_nearest, *there)
    else:
      for precision in ('float32', 'tensorfloat32'):
        for how in ('cdist', 'product'):
          add(f'torch {how}, min, {precision}', alternatives.torch_nearest, *there, how, precision,
              flops={precision: products * bank.shape[1]})
  if alternatives.available('faiss'):
    index = alternatives.faiss_index(bank)
    add('faiss flat', lambda: index.search(queries, 1)[1][:, 0])
  return entries, found, notes


def _compile(jitted, *args):
  """Compiles a function for some arguments, so that its next call finds the program."""
  jitted.lower(*args).compile()


# Network.


def network_entries(
    images: np.ndarray, precisions: tuple[str, ...], *, architecture: str = WIDE_RESNET,
    torch_compile: bool = False,
) -> tuple[Entries, dict[str, Any]]:
  """Makes entries of networks, a ResNet's up to layer3; the times are those of one image.

  Args:
    images: [b, h, w, 3] uint8.
    precisions: those of ours and, on a GPU, of torch's.
    architecture: that of ours; torch's is a ViT-S/14 for `VIT_SMALL`, else WideResNet-50-2.
    torch_compile: whether there are entries with torch.compile.

  Returns:
    The entries, and our maps by precision, on the device.
  """
  entries, maps, b = {}, {}, len(images)
  flops = network_flops(network(architecture=architecture), images.shape[1])
  pixels = jax.device_put(images)
  for precision in precisions:
    ours = network(precision, architecture)
    run = jax.jit(lambda v, x, n=ours: n.apply(v, backbones.normalize(x, n.mean, n.std)))
    variables = jax.device_put(ours.variables)

    def keep(precision=precision, run=run, variables=variables):
      maps[precision] = jax.block_until_ready(run(variables, pixels))

    entries[f'JAX {precision}'] = Entry(
        keep, 1 / b, {precision: flops}, prepare=functools.partial(_compile, run, variables, pixels))
  if alternatives.available('torch'):
    make = alternatives.torch_vit_small if architecture == VIT_SMALL else alternatives.torch_wide_resnet
    entries |= _torch_network_entries(make, images, precisions, flops, torch_compile)
  return entries, maps


def rate_notes(
    entries: Entries, seconds: dict[str, list[float]], maps: dict[str, Any] | None = None,
) -> dict[str, str]:
  """Tells images and operations a second, and how far our maps are from those of the first precision."""
  notes = {}
  for name, values in seconds.items():
    notes[name] = f'{1 / timing.median(values):,.1f} images/s'
    if flops := sum(entries[name].flops.values()):
      notes[name] += f', {flops / timing.median(values) / 1e9:,.0f} GFLOP/s'
  exact, *others = (maps or {'': {}}).items()
  for precision, values in others:
    off = ', '.join(f'{layer} off by {_relative(values[layer], x):.1e}' for layer, x in exact[1].items())
    notes[f'JAX {precision}'] += f'; from {exact[0]}: {off}'
  return notes


def _relative(a, b):
  """Computes the norm of a difference, relative to that of the second array."""
  a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _torch_network_entries(make, images, precisions, flops, torch_compile):
  """Makes the entries of `network_entries` that are of torch."""
  torch, b = alternatives.torch_on_all_cores(), len(images)
  x = alternatives.torch_tensor(images).permute(0, 3, 1, 2).float().contiguous()
  if on_cpu():
    plain, last = make(), alternatives.torch_network(make=make)
    return {'torch': Entry(lambda: plain(x), 1 / b, {'float32': flops}),
            'torch, channels last': Entry(lambda: last(x), 1 / b, {'float32': flops})}
  x = (x / 255).to(memory_format=torch.channels_last)
  entries = {}

  def add(name, precision, **how):
    forward = alternatives.torch_network(precision, make=make, **how)

    def run():
      forward(x)
      alternatives.torch_wait()
    entries[name] = Entry(run, 1 / b, {precision: flops})

  for precision in precisions:
    add(f'torch {precision}', precision)
    if torch_compile:
      add(f'torch {precision}, torch.compile', precision, compiled=True)
  if 'bfloat16' in precisions:
    add('torch bfloat16, weights too', 'bfloat16', whole=True)
  return entries


# Prediction.


def score_fn(
    backbone: backbones.Backbone, rows: np.ndarray, image_size: tuple[int, int],
    detector: PatchCore | None = None) -> ScoreFn:
  """Makes the function that scores images of that (height, width) against a bank of `rows` [m, d] float32."""
  from patchcore_jax.detectors import streaming
  detector = (detector or PatchCore()).resolved((backbone,))
  arrays = {'embeddings': rows, 'indices': np.arange(len(rows), dtype=np.int32)}
  return detector.score_fn(Model(arrays, Description(
      detector.name, detector.settings(), (streaming.identity(backbone),), image_size, num_images=0)),
      (backbone,))


def prediction_entries(
    images: np.ndarray, rows: np.ndarray, precisions: tuple[str, ...], *, architecture: str = WIDE_RESNET,
    stream: int = 0,
) -> tuple[Entries, dict[str, Any]]:
  """Makes entries of predictions from pixels to scores and maps, all on the host; times are of one image.

  Args:
    images: [b, h, w, 3] uint8.
    rows: [m, 1024] float32, the bank.
    precisions: those of ours and, on a GPU, of torch's network.
    architecture: that of ours; torch's is a ViT-S/14 for `VIT_SMALL`, else WideResNet-50-2.
    stream: how many batches further entries run one after the other, as `streaming.predict` does; or 0.

  Returns:
    The entries, and by precision a function without arguments that predicts one batch and leaves the
    results on the device.
  """
  from patchcore_jax.detectors import streaming
  entries, runs, b = {}, {}, len(images)
  size = images.shape[1]
  flops = network_flops(network(architecture=architecture), size)
  search = 2.0 * (size // 8) ** 2 * len(rows) * rows.shape[1]
  for precision in precisions:
    scored = score_fn(network(precision, architecture), rows, (size, size))
    fn, parameters = scored.fn, streaming.place(scored)
    run = functools.partial(parallel.data_parallel(fn), parameters, images)
    work = _sum({precision: flops}, {'float32' if on_cpu() else 'bfloat16': search})
    runs[precision] = run
    name = f'JAX {precision}'
    prepare = functools.partial(parallel.working_bytes, fn, parameters, images)
    entries[name] = Entry(lambda run=run: parallel.gather(run()), 1 / b, work, prepare=prepare)
    if stream:
      entries[f'{name}, {stream} batches in a row'] = Entry(
          functools.partial(_predict_all, fn, parameters, images, stream), 1 / (b * stream), work)
  if alternatives.available('torch'):
    entries |= _torch_prediction_entries(images, rows, precisions, flops, search)
  return entries, runs


def _predict_all(fn, parameters, images, number):
  """Scores a batch so many times in a row, as `streaming.predict` does."""
  from patchcore_jax.data.pipeline import Batch
  from patchcore_jax.detectors import streaming
  batch = Batch(images, None, np.arange(len(images), dtype=np.int32))
  for _ in streaming.stream(fn, parameters, [batch] * number):
    pass


def _torch_prediction_entries(images, rows, precisions, flops, search):
  """Makes the entries of `prediction_entries` that are of torch."""
  entries, b = {}, len(images)
  if on_cpu():
    if not alternatives.available('scipy'):
      return {}
    work, searches = {'float32': flops + search}, {'torch, cdist': alternatives.torch_search}
    if alternatives.available('faiss'):
      searches['torch, faiss flat'] = alternatives.faiss_search
    for name, searched in searches.items():
      entries[name] = Entry(functools.partial(
          alternatives.torch_predict, alternatives.torch_wide_resnet(), searched(rows), images), 1 / b, work)
    return entries
  bank = alternatives.torch_tensor(rows)
  for precision in precisions:
    entries[f'torch {precision}'] = Entry(functools.partial(
        alternatives.torch_predict_on_device, alternatives.torch_network(precision), bank, images,
        precision), 1 / b, _sum({precision: flops}, {'tensorfloat32': search}))
  return entries


def _sum(*flops):
  """Adds up numbers of operations, by precision."""
  together = {}
  for part in flops:
    for precision, value in part.items():
      together[precision] = together.get(precision, 0.0) + value
  return together
