"""Compares banks of one pass (`coreset.method='merge_reduce'`) with those selected from all patches.

`experiments.benchmark --subject=one_pass` prints what is found.
"""

import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from patchcore_jax import backbones, metrics
from patchcore_jax.builtin import synthetic
from patchcore_jax.detectors import PatchCore, patchcore
from patchcore_jax.detectors.patchcore import fit_plan, one_pass
from patchcore_jax.evaluation.data import load_categories
from patchcore_jax.inspection import inputs
from patchcore_jax.search import coreset, merge_reduce
from patchcore_jax.settings import DataSpec, Preprocessing

# How many images a block has: all, as many as a fit takes, and one, which makes as many levels as can be.
WHOLE, USUAL, ONE = 'all at once', 'in one pass', 'in one pass, an image at a time'


class Found(NamedTuple):
  """What a bank is worth: the largest distance of a training patch to it, and the image AUROC of the test."""

  radius: float
  bound: float
  image_auroc: float


def compare(
    train: np.ndarray, test: np.ndarray, labels: np.ndarray, size: int, seed: int) -> dict[str, Found]:
  """Selects a bank in each way, and tests it.

  Args:
    train: [n, rows, columns, d] float32, embeddings of good images.
    test: [m, rows, columns, d], those of test images.
    labels: [m], 1 for a defective one.
    size: patches of the bank.
    seed: of all that is random.
  """
  n, patches = len(train), int(np.prod(train.shape[1:3]))
  values = train.reshape(n * patches, -1)
  project, key = jax.random.split(jax.random.key(seed))
  points = np.asarray(coreset.random_projection(values, 128, key=project))
  part_of = np.random.default_rng(seed).permutation(np.arange(n) % one_pass.PARTS)

  def block(images):
    rows = (images[:, None] * patches + np.arange(patches)).ravel()
    return merge_reduce.Part(points[rows], rows, values[rows])

  def bank(way):
    reducer = merge_reduce.Reducer(key)
    if way == WHOLE:
      return reducer.reduce([block(np.arange(n))], size)
    each, roots = 1 if way == ONE else fit_plan.images_in_block(n, patches, size, one_pass.PARTS), []
    for part in range(one_pass.PARTS):
      tree, images = merge_reduce.Tree(size, reducer), np.flatnonzero(part_of == part)
      for i in range(0, len(images), each):
        tree.add(block(images[i:i + each]))
      roots.append(tree.root())
    return reducer.reduce([root for root in roots if root], size)

  found = {}
  for way in (WHOLE, USUAL, ONE):
    selected = bank(way)
    scores = patchcore.score_embeddings(
        test, selected.values, Preprocessing().crop, scoring_spec=PatchCore().scoring).image
    found[way] = Found(
        merge_reduce.covering_radius(points, selected.points), selected.bound, metrics.auroc(labels, scores))
  return found


def measure(
    root: str, category: str, networks: Sequence[str], sizes: Sequence[int], seeds: int) -> Iterator[str]:
  """Compares for every network and size of the bank, and yields a table of means in Markdown.

  Args:
    root: folder in MVTec's layout; '' for the built-in data, which is drawn for the while.
    category: its name.
    networks: names of backbones.
    sizes: patches of banks; at most a quarter of all.
    seeds: how many.
  """
  with tempfile.TemporaryDirectory() as drawn:
    if not root:
      root = str(synthetic.prepare(drawn, categories=(category,)))
    (part,) = load_categories(DataSpec(root=root, categories=(category,)))
    yield f'### In one pass: {category}, {len(part.train)} training images; means of {seeds} seeds\n'
    yield '| network | patches of the bank | selected | covering radius | proven | image AUROC |'
    yield '|---|---|---|---|---|---|'
    for network in networks:
      backbone = backbones.create(network)
      spec = PatchCore().resolved((backbone,)).embedding
      train, test = (
          patchcore.embed(
              backbone, inputs.training_data([], Preprocessing(), 8, paths=[e.image_path for e in examples]),
              embedding=spec)[0] for examples in (part.train, part.test))
      labels = np.array([example.label for example in part.test])
      for size in sizes:
        size = min(size, train[..., 0].size // 4)
        runs = [compare(train, test, labels, size, seed) for seed in range(seeds)]
        for way in runs[0]:
          radius, bound, auroc = np.mean([run[way] for run in runs], axis=0)
          yield f'| {network} | {size} | {way} | {radius:.4g} | {bound:.4g} | {100 * auroc:.1f} |'
  yield ''
