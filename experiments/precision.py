r"""Measures what the precisions of a network change in results: a table of the differences.

    python -m experiments.precision --config=configs/demo.py --workdir=runs/precision
    python -m experiments.precision --config=configs/wrn50.py --config.data.root=PATH --workdir=runs/precision

For every category, coreset ratio and precision: image AUROC, pixel AUROC and AUPRO, less those in float32,
with the patches that float32 selects, and with those that the precision selects itself. Tiny differences of
features select other patches, which changes results as another seed does; so there is a row for that too. The
last columns are about a bank made in the precision and served in float32: how far the scores of good images
are off there. Rows are added to WORKDIR/precision.csv; what it has already is not done again.

On a CPU the precisions of a GPU are simulated (`backbones.simulation`).
"""

import csv
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import cli, wiring
from patchcore_jax import backbones, metrics
from patchcore_jax.backbones import Backbone, resnet, simulation
from patchcore_jax.cli import terminal
from patchcore_jax.data.folder import Category
from patchcore_jax.detectors import PatchCore, Run, patchcore, streaming
from patchcore_jax.evaluation import Settings
from patchcore_jax.evaluation.data import load_categories
from patchcore_jax.evaluation.images import Features, Images
from patchcore_jax.evaluation.networks import create, resolved

cli.key_flags('config', 'workdir')

METRICS = ('image_auroc', 'pixel_auroc', 'aupro')
COLUMNS = (
    'network', 'category', 'coreset_ratio', 'precision', 'selection', *METRICS, 'scores_off', 'most_off')
FLOAT32 = 'float32'


def main(_) -> None:
  run(cli.CONFIG.value, Path(cli.WORKDIR.value))


def run(config: ConfigDict, workdir: Path) -> list[dict[str, Any]]:
  """Measures one network, and returns the rows, which are in WORKDIR/precision.csv too.

  Raises:
    ValueError: bad config, or another method than PatchCore with one network.
  """
  settings = resolved(wiring.settings(config))
  if not isinstance(settings.method, PatchCore):
    raise ValueError(
        f'{settings.method.title}: precisions are compared of PatchCore with one network. Set '
        "config.detector='patchcore' and one config.backbone.name.")
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'precision.csv'
  rows = list(csv.DictReader(path.open())) if path.exists() else []
  with terminal.progress_bar('built-in data') as progress:
    categories = load_categories(settings.data, lambda done, total: progress('draw', done, total))
  networks = {p: network(settings, p) for p in resnet.PRECISIONS}
  name = networks[FLOAT32].name
  for category in categories:
    if any(r['network'] == name and r['category'] == category.name for r in rows):
      terminal.console.print(f'{name}, {category.name}: measured before')
      continue
    with terminal.progress_bar(category.name) as progress:
      rows += [{'network': name, 'category': category.name} | row
               for row in compare(networks, category, settings, workdir, progress)]
    with path.open('w', newline='') as file:
      writer = csv.DictWriter(file, COLUMNS, restval='')
      writer.writeheader()
      writer.writerows(rows)
  for line in table(rows):
    terminal.console.print(line, markup=False)
  return rows


def network(settings: Settings, precision: str) -> Backbone:
  """Makes the network as an accelerator computes it in a precision, simulated if this is a CPU."""
  own = ':' in settings.backbone.name
  spec = dataclasses.replace(settings.backbone, precision=FLOAT32 if own else precision)
  (backbone,) = create(spec, settings.seed)
  apply = backbone.apply
  if precision == 'tensorfloat32' and jax.default_backend() == 'cpu':
    apply = simulation.on_gpu(apply)
  elif own and precision == FLOAT32:
    apply = simulation.in_highest_precision(apply)
  elif own and precision == 'bfloat16':
    apply = simulation.in_bfloat16(apply) if jax.default_backend() == 'cpu' else _all_in_bfloat16(apply)
  return dataclasses.replace(backbone, apply=apply)


def compare(
    networks: dict[str, Backbone], category: Category, settings: Settings, scratch: Path,
    progress: Callable[[str, int, int], None]) -> Iterator[dict[str, Any]]:
  """Yields the rows of one category, without its name. The images pass through each network once."""
  detector, seed, files = settings.detector, settings.seed, Images(settings, category)
  # One record for all: only the feature maps tell the precisions apart.
  without = (backbones.without_network(networks[FLOAT32]),)

  def computed(backbone):
    return files.with_features(Features(backbone, files, scratch, progress))

  def fit(images, seed=seed):
    return detector.fit(images.train, without, Run(progress=progress, seed=seed))

  def predict(images, model):
    """Scores the test images: returns the scores [n] of each ratio, and the metrics of each."""
    score_fn = patchcore.score_fn_at(detector, model, without, settings.ratios, search=settings.search)
    _, batches = zip(*streaming.predict(score_fn, images.test.batches()))
    found = [jax.tree.map(lambda *x: np.concatenate(x), *scores) for scores in zip(*batches)]
    measured = [metrics.evaluate(labels, s.image, masks, s.map, **settings.metrics.of_regions) for s in found]
    return [s.image for s in found], [np.array([m[name] for name in METRICS]) for m in measured]

  exact = computed(networks[FLOAT32])
  labels = np.array([e.label for e in category.test])
  masks = np.concatenate([b.mask[b.valid] for b in exact.test.batches()])
  reference = fit(exact)
  _, before = predict(exact, reference)
  for ratio, values in zip(settings.ratios, before):
    yield _row(ratio, FLOAT32, 'its own', values)
  _, seeded = predict(exact, fit(exact, seed + 1))
  for ratio, values, other in zip(settings.ratios, before, seeded):
    yield _row(ratio, FLOAT32, 'another seed', other - values)
  for precision, backbone in networks.items():
    if precision == FLOAT32:
      continue
    images = computed(backbone)
    everything, _ = patchcore.embed(*without, images.train, embedding=detector.embedding)
    rows = everything.reshape(-1, everything.shape[-1])[reference.arrays['indices']]
    del everything
    same_patches = reference._replace(arrays=reference.arrays | {'embeddings': rows})
    for model, selection in ((same_patches, "float32's"), (fit(images), 'its own')):
      here, measured = predict(images, model)
      there, _ = predict(exact, model)
      for i, ratio in enumerate(settings.ratios):
        off = np.abs(there[i] / here[i] - 1)[labels == 0]
        yield _row(ratio, precision, selection, measured[i] - before[i]) | {
            'scores_off': f'{np.median(off):.1e}', 'most_off': f'{off.max():.1e}'}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Yields the rows as Markdown."""
  yield '| ' + ' | '.join(c.replace('_', ' ') for c in COLUMNS) + ' |'
  yield '|---' * len(COLUMNS) + '|'
  for row in rows:
    yield '| ' + ' | '.join(str(row.get(c, '')) for c in COLUMNS) + ' |'


def _row(ratio, precision, selection, values):
  """Makes a row of the table; but for float32's own, its values are differences."""
  form = '.4f' if (precision, selection) == (FLOAT32, 'its own') else '+.5f'
  return {'coreset_ratio': ratio, 'precision': precision, 'selection': selection} | {
      m: format(v, form) for m, v in zip(METRICS, values)}


def _all_in_bfloat16(apply: Callable) -> Callable:
  """Makes a network compute with weights and images in bfloat16, and return float32."""
  def rounded(variables, images):
    variables, images = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (variables, images))
    return jax.tree.map(lambda x: x.astype(jnp.float32), apply(variables, images))
  return rounded


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
