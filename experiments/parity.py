"""Compares this package, piece by piece, with what the originals computed.

    python -m experiments.parity --reference=tests/testdata

The reference is a folder of arrays made by running the paper's released code ("PI") and anomalib
("AL"), in float32 and in float64, evaluation code of data sets (`parity_evaluation`), and later networks
(`parity_successors`) and methods (`parity_banks`, `parity_retrieval`); `tests/testdata/README.md` says how.
Prints a table and exits with 1 if anything is out of tolerance. What the folder does not hold is listed as
not compared.
"""

import functools
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from experiments import (
    cli,
    entries,
    parity_banks,
    parity_evaluation,
    parity_retrieval,
    parity_successors,
    reference,
)
from experiments.comparisons import Arrays, Row, compare, load, path_of
from patchcore_jax import backbones, embedding, metrics
from patchcore_jax.backbones import checkpoints, densenet, registry, resnet
from patchcore_jax.cli import terminal
from patchcore_jax.data import preprocess
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import PatchCore, patchcore, streaming
from patchcore_jax.search import coreset, neighbors
from patchcore_jax.settings import EmbeddingSpec, Preprocessing, ScoringSpec

cli.key_flags()

_PARTS = parity_evaluation, parity_successors, parity_banks, parity_retrieval

_REFERENCE = flags.DEFINE_string(
    'reference', 'tests/testdata', 'Folder with the reference arrays.')


def main(_) -> None:
  folder = Path(_REFERENCE.value)
  if not folder.is_dir():
    raise ValueError(f'No folder {folder}: expected one with reference arrays, as tests/testdata.')
  rows = []
  for check in CHECKS:
    for row in check(folder):
      rows.append(row)
      terminal.console.print(f'{"pass" if row.passed else "FAIL"}  {row.quantity}', style='dim')
  print_rows(rows)
  failed = [row.quantity for row in rows if not row.passed]
  terminal.console.print(f'{len(rows) - len(failed)} passed, {len(failed)} failed')
  if absent := [name for name in (*_FILES, *(file for part in _PARTS for file in part.FILES))
                if not path_of(folder, name).exists()]:
    terminal.console.print(f'not compared, because {folder} has no {", ".join(absent)}')
  if failed or not rows:
    sys.exit(1)


def print_rows(rows: list[Row]) -> None:
  """Prints the comparisons as a Markdown table, which docs/parity.md holds as it is."""
  terminal.console.print('\n| quantity | of | abs. diff. | rel. diff. | tolerance | why | |')
  terminal.console.print('|---|---|---|---|---|---|---|')
  for row in rows:
    sign = '' if row.limits == 'relative' else ' abs.'
    terminal.console.print(
        f'| {row.quantity} | {row.origin} | {row.absolute:.1e} | {row.relative:.1e} | '
        f'{row.tolerance:.0e}{sign} | {row.reason} | {"pass" if row.passed else "FAIL"} |', markup=False)


def preprocessing(folder: Path) -> Iterator[Row]:
  """Compares resize, crop and masks of made images of five sizes, and scaling of real crops."""
  arrays = load(folder, 'preprocessing.npz')
  real = load(folder, 'images_preprocessing.npz')
  for case in _prefixes(arrays):
    if case.startswith('synthetic'):
      width, height = map(int, case.partition('_')[2].split('x'))
      pixels = reference.image(width, height)
      mask = Image.fromarray(np.where(pixels[..., 0] > 128, 255, 0).astype(np.uint8))
      spec = Preprocessing()
      crop = np.asarray(preprocess.transform(Image.fromarray(pixels), spec))
      resized = np.asarray(preprocess.transform(mask, spec))
      for name, value in (('u8', crop), ('mask_u8', resized)):
        # By checksum where the pixels themselves are not at hand.
        same = zlib.crc32(np.ascontiguousarray(value)) == arrays[f'{case}/{name}_crc32']
        difference = 0.0 if same else np.inf
        if not same and f'{case}/{name}' in arrays:
          difference = float(np.abs(value.astype(int) - arrays[f'{case}/{name}']).max())
        yield Row(f'preprocessing {case} {"mask" if "mask" in name else "pixels"}', 'PI', difference,
                  difference / 255, 0, 'the same Pillow resize, bit for bit')
      counts = [np.sum(resized >= 255), np.sum(resized >= np.ceil(255 * 0.5))]
      difference = float(np.abs(counts - arrays[f'{case}/mask_counts'][[0, 3]]).max())
      yield Row(f'preprocessing {case} positive mask pixels', 'PI', difference,
                difference / counts[0], 0, 'counts')
    elif real:
      crop = real[f'{case}/u8']
    else:
      continue
    value = np.asarray(_normalized(crop)).transpose(2, 0, 1).reshape(-1)
    difference = np.abs(value[arrays[f'{case}/float_idx']] - arrays[f'{case}/float_f32']).max()
    yield Row(f'preprocessing {case} normalised', 'PI', difference,
              difference / arrays[f'{case}/float_stats'][1], 1e-6, 'two float32 roundings')


def networks(
    folder: Path, architectures: Collection[str] = (*resnet.ARCHITECTURES, *densenet.ARCHITECTURES),
) -> Iterator[Row]:
  """Compares the maps of every layer of the ResNets and of every block of the DenseNets, or of some."""
  arrays = load(folder, 'backbones.npz')
  real = load(folder, 'images_backbones.npz')
  names = sorted(
      {tuple(k.split('/')[:2]) for k in arrays if k.partition('/')[0] in architectures})
  for architecture, size in names:
    if size == 'synthetic':
      pixels = reference.image(224, 224)
    elif size in real:
      pixels = real[size]
    else:
      continue
    maps = _network(architecture)(_normalized(pixels)[None])
    stored = {layer: f'{architecture}/{size}/{layer}' for layer in resnet.LAYERS}
    origin = 'torchvision'
    if architecture in densenet.ARCHITECTURES:  # of these the blocks are stored, as the paper's code has them
      stored = {layer: f'{architecture}/{size}/features.{layer}' for layer in densenet.LAYERS[1:]}
      origin = 'timm'
    for layer, name in stored.items():
      value = np.asarray(maps[layer]).transpose(0, 3, 1, 2)
      yield _sampled_row(f'backbone {name}', origin, value, arrays, name, 1e-5,
                         'float32 sums, L2 of difference / L2 of map', norm=True)


def embeddings(folder: Path) -> Iterator[Row]:
  """Compares the paper's embedding for each patch size, layer set and target size."""
  arrays = load(folder, 'embedding.npz')
  for case in _prefixes(arrays):
    if f'{case}/layers' not in arrays:
      continue
    patch_size, pretrain_dim, target_dim = map(int, arrays[f'{case}/patchsize_pretrain_target'])
    maps = [
        reference.rng_for(f'embedding/{case}/{layer}').standard_normal(
            tuple(shape), dtype=np.float32).transpose(0, 2, 3, 1)
        for layer, shape in zip(arrays[f'{case}/layers'], arrays[f'{case}/feature_shapes'])]
    spec = EmbeddingSpec('adaptive', patch_size, pretrain_dim, target_dim)
    value = np.asarray(_embed_maps([jnp.asarray(m) for m in maps], spec)).reshape(-1, target_dim)
    yield _sampled_row(f'embedding {case}', 'PI', value, arrays, case, 3e-6,
                       "of the std: the original's own float32 error")


def selections(folder: Path) -> Iterator[Row]:
  """Replays greedy selections on clouds, with the originals' projections and starting points."""
  arrays = load(folder, 'coreset.npz')
  for cloud in _prefixes(arrays):
    for method, origin in (('pi_approx', 'PI'), ('anomalib', 'AL')):
      name = f'{cloud}/{method}'
      if f'{name}/indices' not in arrays:
        continue
      points = reference.cloud(cloud)
      if f'{name}/projection' in arrays:
        points = coreset.project(points, arrays[f'{name}/projection'].T)
      expected = arrays[f'{name}/indices']
      # When all points are covered the originals repeat an index; ours stay distinct.
      repeats = np.setdiff1d(np.arange(len(expected)), np.unique(expected, return_index=True)[1])
      distinct = int(repeats[0]) if repeats.size else len(expected)
      picks = _replay(points, expected, arrays.get(f'{name}/start_points'))
      different = int((picks[:distinct] != expected[:distinct]).sum())
      different += len(picks) - len(set(picks.tolist()))
      until = f' until covered ({distinct} of {len(expected)})' if repeats.size else ''
      yield Row(f'coreset {name}, picks that differ{until}', origin, different,
                different / len(expected), 0, 'same indices, same order')


def end_to_end_paper(folder: Path) -> Iterator[Row]:
  """Compares scores and maps, from pixels on, with the paper's code: 6 training and 4 test images."""
  for category, train, test in _categories(folder):
    arrays = load(folder, f'scoring_{category}_pi.npz')
    spec = EmbeddingSpec('adaptive')
    label = f'{category} end to end'
    fitted, queries = (_embed(images, spec) for images in (train, test))
    for name, value in (('train_embedding', fitted), ('test_embedding', queries)):
      yield _sampled_row(f'{label} {name}', 'PI', value, arrays, name, 2e-5,
                         "of the std: the backbone's float32 error")
    yield _selection_row(f'{label} coreset', 'PI', fitted, arrays['projection'],
                         arrays['coreset_indices'], arrays['start_points'])
    bank = fitted[arrays['coreset_indices']]
    for k in (1, 5):
      scoring = ScoringSpec(num_neighbors=k)
      distances_sq, _ = _nearest(queries, bank, k)
      value = np.asarray(distances_sq).mean(-1)
      yield _closer_row(f'{label} patch scores, {k} neighbours', 'PI', value, arrays,
                        f'nn{k}/patch_scores')
      detector = PatchCore(embedding=spec, scoring=scoring)
      yield from _score_rows(label, 'PI', test, bank, detector, arrays, f'nn{k}', 'segmentation')


def end_to_end_anomalib(folder: Path) -> Iterator[Row]:
  """Compares scores and maps with anomalib, given the paper's coreset.

  With its own coreset it is compared where its pixels are at hand.
  """
  for category, train, test in _categories(folder):
    arrays = load(folder, f'scoring_{category}_anomalib.npz')
    spec = EmbeddingSpec('mean')
    runs = {'given': train}
    if category == 'synthetic':  # its resize leaves 256 px as they are; elsewhere it sees other pixels
      order = [list(arrays['train_paths']).index(p) for p in arrays['own/order_of_train_paths']]
      runs['own'] = train[order]
    for run, images in runs.items():
      label = f'{category} end to end, {run} coreset'
      fitted, queries = _embed(images, spec), _embed(test, spec)
      if run == 'own':
        yield _selection_row(f'{label}, selection', 'AL', fitted, arrays['own/projection'],
                             arrays['own/coreset_indices'], None)
      bank = fitted[arrays[f'{run}/coreset_indices']]
      distances_sq, _ = _nearest(queries, bank, 1)
      yield _closer_row(f'{label}, patch scores', 'AL', np.sqrt(np.asarray(distances_sq)[:, 0]),
                        arrays, f'{run}/nn9/patch_scores')
      for support in (9, 3, 1) if run == 'given' else (9,):
        # With one neighbour there is nothing to weigh with: the plain maximum.
        scoring = ScoringSpec(
            distance='root', image_score='reweighted' if support > 1 else 'max',
            support_neighbors=max(support, 2), upsampling='nearest', blur_edges='reflect')
        yield from _score_rows(
            f'{label}, {support} neighbours', 'AL', test, bank, PatchCore(embedding=spec, scoring=scoring),
            arrays, f'{run}/nn{support}', 'maps')


def measures(folder: Path) -> Iterator[Row]:
  """Compares AUROC, AP, F1 and AUPRO on made maps."""
  arrays = load(folder, 'metrics.npz')
  for case in _prefixes(arrays):
    if f'{case}/maps' not in arrays:
      continue
    get = {k.partition('/')[2]: v for k, v in arrays.items() if k.startswith(f'{case}/')}
    labels, scores, masks, maps = (get[k] for k in ('labels', 'scores', 'masks', 'maps'))
    anomalous = masks.any(axis=(1, 2))
    best, best_pixel = metrics.f1_optimal(labels, scores), metrics.f1_optimal(masks, maps)
    values = {
        'image_auroc': metrics.auroc(labels, scores), 'pixel_auroc': metrics.auroc(masks, maps),
        'anomaly_pixel_auroc': metrics.auroc(masks[anomalous], maps[anomalous]),
        'image_ap': metrics.average_precision(labels, scores),
        'pixel_ap': metrics.average_precision(masks, maps),
        'image_f1': best.f1, 'image_f1_threshold': best.threshold,
        'pixel_f1': best_pixel.f1, 'pixel_f1_threshold': best_pixel.threshold}
    for name, value in values.items():
      yield compare(f'metric {case} {name}', 'scikit-learn', value, get[name], 1e-9,
                    'the same sums in float64')
    for limit in ('0.01', '0.05', '0.3', '1.0'):
      for connectivity in (8, 4):
        value = metrics.aupro(maps, masks, max_fpr=float(limit), connectivity=connectivity)
        yield compare(
            f'metric {case} AUPRO {limit}, {connectivity}-connected', 'definition', value,
            get[f'aupro{connectivity}_{limit}'], 1e-9, 'interpolated at the limit, float64')
        if connectivity == 8:
          yield compare(f'metric {case} AUPRO {limit}', 'AL', value,
                        get[f'anomalib_aupro_{limit}'], 1e-4, 'theirs is float32')


CHECKS: tuple[Callable[[Path], Iterator[Row]], ...] = (
    preprocessing, networks, embeddings, selections, end_to_end_paper, end_to_end_anomalib, measures,
    *(check for part in _PARTS for check in part.CHECKS))
_FILES = (
    'preprocessing.npz', 'images_preprocessing.npz', 'backbones.npz', 'images_backbones.npz',
    'embedding.npz', 'coreset.npz', 'metrics.npz', 'scoring_synthetic_pi.npz',
    'scoring_synthetic_anomalib.npz', 'scoring_transistor_pi.npz', 'scoring_transistor_anomalib.npz',
    'images_scoring_transistor.npz')


def _prefixes(arrays: Arrays) -> list[str]:
  """Lists the cases: what the arrays' names begin with."""
  return sorted({k.partition('/')[0] for k in arrays if '/' in k})


def _categories(folder):
  """Yields (name, training images, test images) of the end-to-end runs at hand, uint8 [n, 224, 224, 3]."""
  if arrays := load(folder, 'scoring_synthetic_pi.npz'):
    crop = Preprocessing()

    def made(paths):
      return np.stack([
          np.asarray(preprocess.transform(Image.fromarray(reference.part(str(p))[0]), crop))
          for p in paths])

    yield 'synthetic', made(arrays['train_paths']), made(arrays['test_paths'])
  if (folder / 'scoring_transistor_pi.npz').exists() and (
      images := load(folder, 'images_scoring_transistor.npz')):
    yield 'transistor', images['train_u8'], images['test_u8']


def _normalized(pixels):
  """Normalises pixels by ImageNet's mean and standard deviation."""
  return backbones.normalize(jnp.asarray(pixels), checkpoints.IMAGENET_MEAN, checkpoints.IMAGENET_STD)


@functools.lru_cache(maxsize=1)
def _network(architecture):
  """Makes the function of images that gives all layers of a network with reference weights."""
  family = registry.find_family(architecture)
  apply = family.build(architecture, family.layers(architecture), 'float32')
  return jax.jit(functools.partial(apply, reference.variables(architecture)))


_embed_maps = jax.jit(embedding.patch_embeddings, static_argnums=1)
_nearest = jax.jit(
    lambda queries, bank, k: neighbors.nearest_neighbors(queries, bank, k=k), static_argnums=2)


@functools.cache
def _wide_resnet():
  """Makes a WideResNet-50-2 with reference weights."""
  layers = resnet.DEFAULT_LAYERS
  variables = resnet.truncate(reference.variables('wide_resnet50_2'), layers)
  return backbones.Backbone(
      resnet.apply_fn('wide_resnet50_2', layers), variables, layers, checkpoints.IMAGENET_MEAN,
      checkpoints.IMAGENET_STD, 'reference')


def _embed(images, spec):
  """Embeds images [n, h, w, 3] uint8: [patches, d]."""
  value, _ = patchcore.embed(_wide_resnet(), ArrayData(images, len(images)), embedding=spec)
  return value.reshape(-1, value.shape[-1])


def _replay(points, expected, start):
  """Selects from the original's starting points; without any, from its first pick."""
  return np.asarray(coreset.greedy_k_center(
      points, len(expected), start=expected[:1] if start is None else start,
      select_start=start is None))


def _selection_row(quantity, origin, embeddings, projection, expected, start):
  """Counts picks that differ from the original's, and measures the largest loss of one against the best."""
  picks = _replay(coreset.project(embeddings, projection.T), expected, start)
  points = embeddings.astype(np.float64) @ projection.T.astype(np.float64)

  def to(index):
    return np.linalg.norm(points - points[index], axis=1)

  nearest = to(picks[0]) if start is None else np.mean([to(s) for s in start], axis=0)
  loss = 0.0
  for pick in picks[1:] if start is None else picks:
    loss = max(loss, 1 - nearest[pick] / nearest.max())
    nearest = np.minimum(nearest, to(pick))
  return Row(f'{quantity}, picks that differ; loss of a pick against the best', origin,
             int((picks != expected).sum()), loss, 1e-4, 'float32 near-ties; 0 where all gaps are larger')


def _sampled_row(quantity, origin, value, arrays, name, tolerance, reason, norm=False):
  """Compares values at the stored positions with the float64 run, by the std or, with `norm`, by L2."""
  if value.shape != tuple(arrays[f'{name}/shape']):
    return Row(f'{quantity}: shape {value.shape}', origin, np.inf, np.inf, tolerance, reason)
  truth = arrays[f'{name}/f64']
  difference = value.reshape(-1)[arrays[f'{name}/idx']] - truth
  absolute = float(np.abs(difference).max())
  relative = (np.linalg.norm(difference) / np.linalg.norm(truth) if norm
              else absolute / arrays[f'{name}/stats_f64'][1])
  return Row(quantity, origin, absolute, float(relative), tolerance, reason)


def _closer_row(quantity, origin, value, arrays, name):
  """Compares values with the float64 run, relative to how far the original's own float32 is from it."""
  truth = arrays[f'{name}_f64'].ravel()
  theirs = np.abs(arrays[f'{name}_f32'].ravel() - truth).max()
  ours = np.abs(value.ravel() - truth).max()
  return Row(quantity, origin, float(ours), float(ours / theirs), 1.0,
             f"of the original's own float32 error, {theirs:.1e}")


def _score_rows(label, origin, images, bank, detector, arrays, name, maps_name):
  """Compares image scores and maps against the rows of a bank."""
  score_fn = entries.score_fn(_wide_resnet(), bank, images.shape[1:3], detector)
  ((_, value),) = streaming.predict(score_fn, ArrayData(images, len(images)).batches())
  truth = arrays[f'{name}/image_scores_f64']
  difference = np.abs(value.image - truth)
  yield Row(f'{label}, image scores {name}', origin, float(difference.max()),
            float((difference / truth).max()), 1e-4, 'of the score, float32')
  if f'{name}/{maps_name}/idx' in arrays:
    truth = arrays[f'{name}/{maps_name}/f64']
    sampled = value.map.reshape(-1)[arrays[f'{name}/{maps_name}/idx']]
    difference = float(np.abs(sampled - truth).max())
    yield Row(f'{label}, maps {name}', origin, difference, difference / float(np.ptp(truth)), 1e-3,
              "of the map's range")


if __name__ == '__main__':
  cli.run(main)
