r"""Studies how thresholds made of good images alone behave: false alarms, defects found, and spread.

    python -m experiments.thresholds --workdir=runs/thresholds
    python -m experiments.thresholds --workdir=runs/thresholds --root=PATH --parts=screw,transistor

Without --root the built-in parts are drawn, as many images as asked for; with it, folders in MVTec's layout
are read, and their good images of training and test are one pool. All images of a part are embedded once.
Then, for every number of training images, bank size and random split of the good images: a bank is selected,
the training images are scored in several partitions into folds as `patchcore fit` scores them, and the good
images left over and the defective ones are scored against the bank. These scores are rows of
WORKDIR/scores.csv; what it has already is not computed again, and --minutes parts a long study. The tables
compare ways to make a threshold of the same scores (`WAYS`).

Images are small, and maps with a finer grid than --grid are thinned, because it takes some thousand
selections; a bank of 800 at 64 patches an image is the share that one of 10,000 is at 784, as of a fit at 224
pixels. Splits share a pool, so the spread between them is somewhat too small where they take much of it.
"""

import concurrent.futures
import csv
import functools
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from PIL import Image
from scipy import stats

from experiments import cli
from patchcore_jax import backbones
from patchcore_jax.banks import calibration
from patchcore_jax.builtin import synthetic
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import PatchCore, patchcore
from patchcore_jax.evaluation.data import load_categories
from patchcore_jax.inspection import inputs
from patchcore_jax.search import coreset
from patchcore_jax.settings import DataSpec, Preprocessing

cli.key_flags('workdir', 'root', 'networks')

_PARTS = flags.DEFINE_list('parts', [], 'Names of categories; all without it.')
_NUMBERS = flags.DEFINE_list('numbers', ['20', '50', '100', '200'], 'Training images.')
_BANKS = flags.DEFINE_list('banks', ['800'], 'Patches of banks; at most a quarter of all is kept.')
_SPLITS = flags.DEFINE_integer('splits', 8, 'Random splits of the good images.', lower_bound=2)
_PARTITIONS = flags.DEFINE_integer('partitions', 3, 'Partitions into folds, of each split.', lower_bound=1)
_FOLDS = flags.DEFINE_integer('folds', 5, 'Folds of each partition.', lower_bound=2)
_SIZE = flags.DEFINE_integer('image_size', 128, 'Pixels: height and width of images.')
_GRID = flags.DEFINE_integer('grid', 8, 'Rows and columns of patches that are kept, at most.')
_NUM_GOOD = flags.DEFINE_integer('num_good', 400, 'Good images of each built-in part.')
_NUM_DEFECTIVE = flags.DEFINE_integer('num_defective', 60, 'Defective images of each built-in part.')
_MINUTES = flags.DEFINE_float(
    'minutes', 0, 'Ends after about so long; the same command goes on. 0 for no end.')

RATES = (0.01, 0.02, 0.05)
_FIRST = 256  # rows of a bank that give every patch an upper bound of its distance
_FAR = 4  # patches of each image that are searched for in all of the bank, before others are ruled out
_CHUNK = 2048


class Key(NamedTuple):
  """Tells one piece of work from another."""

  data: str
  network: str
  size: int
  grid: int
  bank: int
  num: int
  folds: int
  split: int


class Row(NamedTuple):
  """What one piece of work found.

  Attributes:
    key: which.
    cross: [partitions, num] scores of the training images, each against a bank of other folds.
    good: scores of good images that were left over.
    defective: scores of defective ones.
  """

  key: Key
  cross: np.ndarray
  good: np.ndarray
  defective: np.ndarray


class Outcome(NamedTuple):
  """How a way to make thresholds does: shares and relative spreads, in one.

  Attributes:
    alarms: the share of the good images left over that alarm.
    found: the share of the defective images that do.
    spread: the standard deviation of the threshold over splits, by its mean.
    between: the same over partitions of the same images; 0 where they are combined.
  """

  alarms: float
  found: float
  spread: float
  between: float


# Ways to make a threshold.


def normal_tail(scores: np.ndarray, rate: float) -> float:
  """Fits the upper half of a normal distribution to the logarithms, and takes the threshold from it.

  The deviation is that of the n / 2 scores above the median, so Student's t has as many degrees of freedom.

  >>> scores = np.exp(stats.norm.ppf((np.arange(2000) + 0.5) / 2000))
  >>> round(math.log(normal_tail(scores, 0.01)), 1)
  2.3
  """
  logs, middle, above = _above(scores)
  deviation = math.sqrt(np.mean(np.square(above - middle)))
  return math.exp(middle + deviation * stats.t.ppf(1 - rate, len(above)) * math.sqrt(1 + 1 / len(logs)))


def pareto_tail(scores: np.ndarray, rate: float) -> float:
  """Fits an exponential tail to the logarithms above the median (Hill's estimate).

  >>> round(pareto_tail(np.exp(stats.expon.ppf((np.arange(2000) + 0.5) / 2000)), 0.01), 0)
  100.0
  """
  _, middle, above = _above(scores)
  return math.exp(middle + np.mean(above - middle) * math.log(0.5 / rate))


def generalised_pareto_tail(scores: np.ndarray, rate: float) -> float:
  """Fits a generalised Pareto tail to the scores above the median, by probability-weighted moments.

  These are Hosking and Wallis' (1987), which unlike the likelihood have an answer for ten scores.

  >>> round(generalised_pareto_tail(stats.expon.ppf((np.arange(2000) + 0.5) / 2000), 0.01), 1)
  4.6
  """
  values = np.sort(np.asarray(scores, np.float64))
  middle = float(np.median(values))
  above = values[values > middle] - middle
  if len(above) < 2 or above.max() <= 0:
    return float(values.max())
  order = (np.arange(len(above)) + 0.65) / len(above)
  first, second = above.mean(), np.mean(above * (1 - order))
  shape = 2 - first / (first - 2 * second)
  scale = 2 * first * second / (first - 2 * second)
  ratio = 0.5 / rate
  reach = scale * math.log(ratio) if abs(shape) < 1e-6 else scale / shape * (ratio**shape - 1)
  return float(middle + reach)


def _above(scores):
  """Computes logarithms, their median, and those above it."""
  logs = np.log(np.maximum(np.asarray(scores, np.float64), 1e-30))
  middle = float(np.median(logs))
  above = logs[logs > middle]
  return logs, middle, above if len(above) else np.array([middle])


def _rank(scores, rate):
  """Makes the threshold that the package makes."""
  return calibration.threshold(scores, rate)[0]


def _each(cross, rate):
  """Makes a threshold of each partition."""
  return [_rank(scores, rate) for scores in cross]


def _mean_of_scores(cross, rate):
  """Makes one threshold of each image's mean over the partitions."""
  return [_rank(cross.mean(axis=0), rate)]


def _median_of_thresholds(cross, rate):
  """Makes the thresholds of all partitions, and takes the median."""
  return [float(np.median(_each(cross, rate)))]


def _where_few(tail, cross, rate):
  """Makes thresholds of a fitted tail, where the scores are too few for one of their own."""
  few = cross.shape[1] < round(1 / rate) - 1
  return [tail(scores, rate) if few else _rank(scores, rate) for scores in cross]


WAYS: dict[str, Callable[[np.ndarray, float], list[float]]] = {
    'one partition': _each,
    'mean of scores': _mean_of_scores,
    'median of thresholds': _median_of_thresholds,
    'normal tail': functools.partial(_where_few, normal_tail),
    'Pareto tail': functools.partial(_where_few, pareto_tail),
    'generalised Pareto tail': functools.partial(_where_few, generalised_pareto_tail),
}


def outcome(rows: Sequence[Row], way: str, rate: float) -> Outcome:
  """Measures a way on the splits of one piece of work.

  Where a way gives a threshold for each partition, every one of them is an outcome.

  >>> rows = [Row(None, np.array([[1., 2., 3.]]), np.array([1., 4.]), np.array([5.])) for _ in range(2)]
  >>> outcome(rows, 'one partition', 0.25)
  Outcome(alarms=0.5, found=1.0, spread=0.0, between=0.0)
  """
  limits = np.array([WAYS[way](row.cross, rate) for row in rows])  # [splits, outcomes]

  def share(field):
    return float(np.mean([
        [(getattr(row, field) >= limit).mean() for limit in own]
        for row, own in zip(rows, limits, strict=True)]))

  return Outcome(
      share('good'), share('defective'), float((limits.std(axis=0) / limits.mean(axis=0)).mean()),
      float((limits.std(axis=1) / limits.mean(axis=1)).mean()))


def stated(num: int, rate: float) -> float:
  """Computes the rate that n exchangeable scores can vouch for, of which CV+ proves about the double.

  >>> stated(50, 0.02), stated(50, 0.01) == 1 / 51
  (0.02, True)
  """
  return max(rate, 1 / (num + 1))


# Scores.


def image_scores(images: np.ndarray, bank: np.ndarray) -> np.ndarray:
  """Scores images as `patchcore.score_embeddings` does, by their largest squared distance, and makes no maps.

  The bank's first rows bound every patch from above. The farthest patches are searched for in all of it, and
  then only those whose bound is larger: the result is exact.

  Args:
    images: [b, p, d] patches.
    bank: [m, d], in order of selection, which makes the bounds tight.

  >>> image_scores(np.float32([[[0, 1], [3, 0]], [[1, 0], [1, 1]]]), np.float32([[0, 0], [0, 1]])).tolist()
  [9.0, 1.0]
  """
  b, p, dim = images.shape
  queries, rows = images.reshape(-1, dim), np.arange(b)[:, None]
  bounds = _least_distances(queries, bank[:_FIRST]).reshape(b, p)
  if len(bank) <= _FIRST:
    return bounds.max(axis=1)
  far = np.argsort(-bounds, axis=1)[:, :_FAR]
  best = _least_distances(queries[(rows * p + far).ravel()], bank).reshape(far.shape).max(axis=1)
  open_ = bounds > best[:, None]
  open_[rows, far] = False
  left = np.flatnonzero(open_)
  np.maximum.at(best, left // p, _least_distances(queries[left], bank))
  return best


def _least_distances(queries, bank):
  """Computes the squared distance of each query to the nearest row."""
  norms, columns = np.square(bank).sum(axis=1), np.ascontiguousarray(bank.T)
  found = np.empty(len(queries), np.float32)
  for i in range(0, len(queries), _CHUNK):
    part = queries[i:i + _CHUNK]
    products = part @ columns
    products *= -2
    products += norms
    found[i:i + _CHUNK] = products.min(axis=1) + np.square(part).sum(axis=1)
  return np.maximum(found, 0)


def select(points: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
  """Selects greedily from projected points [n, d]: positions, in order."""
  start = rng.choice(len(points), min(10, len(points)), replace=False)
  return coreset.greedy_k_center(points, size, start=start)


def measure(key: Key, good: np.ndarray, defective: np.ndarray, projected: np.ndarray, partitions: int) -> Row:
  """Selects banks and scores, for one split.

  Args:
    key: its bank, num, folds and split count.
    good, defective: [n, p, d] patches of all images.
    projected: [n, p, e] those of the good images, in which banks are selected.
    partitions: how often the training images are parted into folds.

  Raises:
    ValueError: fewer good images than `key.num` and one left over.
  """
  if len(good) <= key.num:
    raise ValueError(f'--numbers={key.num}: {key.data} has {len(good)} good images; some must be left over.')
  rng = np.random.default_rng([key.split, key.num])
  order = rng.permutation(len(good))
  train, rest = order[:key.num], order[key.num:]
  patches = good.shape[1]
  ratio = min(key.bank / (key.num * patches), 0.25)

  def bank_of(images):
    points = projected[images].reshape(len(images) * patches, -1)
    picks = select(points, coreset.coreset_size(len(points), ratio), rng)
    return good[images].reshape(len(points), -1)[picks]

  bank = bank_of(train)
  cross = np.zeros((partitions, key.num), np.float32)
  for scores in cross:
    fold_of = rng.permutation(np.arange(key.num) % key.folds)
    for fold in range(key.folds):
      scores[fold_of == fold] = image_scores(good[train[fold_of == fold]], bank_of(train[fold_of != fold]))
  return Row(key, cross, image_scores(good[rest], bank), image_scores(defective, bank))


# Images and their patches.


def drawn(category: str, num_good: int, num_defective: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws good and defective images of a built-in part: [n, size, size, 3] and [m, size, size, 3] uint8."""
  subject = synthetic.SUBJECTS[category]
  tasks = [('train', 'good', i) for i in range(num_good)]
  kinds = itertools.cycle(subject.defects)
  tasks += [('test', next(kinds), i // len(subject.defects)) for i in range(num_defective)]
  draw = functools.partial(_drawn, category, size)
  if len(tasks) < 50:  # processes take some seconds to start
    images = list(map(draw, tasks))
  else:
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
      images = list(pool.map(draw, tasks, chunksize=8))
  return np.stack(images[:num_good]), np.stack(images[num_good:])


def _drawn(category, size, task):
  """Draws one image and makes it smaller."""
  image, _ = synthetic.draw(category, *task)
  return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def embedded(network: str, datas: Sequence, grid: int) -> list[np.ndarray]:
  """Embeds data by a network: [n, p, d] float16 of each, of a grid that is thinned to at most `grid`."""
  backbone = backbones.create(network)
  spec = PatchCore().resolved((backbone,)).embedding
  found = []
  for data in datas:
    values, _ = patchcore.embed(backbone, data, embedding=spec)
    step = max(1, math.ceil(max(values.shape[1:3]) / grid))
    values = values[:, ::step, ::step]
    found.append(values.reshape(len(values), -1, values.shape[-1]).astype(np.float16))
  return found


def _patches(workdir, name, network):
  """Reads or makes the patches of a data set's good and defective images."""
  numbers = '' if cli.ROOT.value else f'.{_NUM_GOOD.value}.{_NUM_DEFECTIVE.value}'
  path = workdir / f'{name}.{network.replace(":", ".")}.{_SIZE.value}.{_GRID.value}{numbers}.npz'
  if not path.exists():
    good, defective = embedded(network, _images(workdir, name, numbers), _GRID.value)
    partial = path.with_suffix('.partial.npz')
    np.savez(partial, good=good, defective=defective)
    partial.replace(path)
  with np.load(path) as found:
    return found['good'].astype(np.float32), found['defective'].astype(np.float32)


def _images(workdir, name, numbers):
  """Makes the data of the good and of the defective images."""
  if cli.ROOT.value:
    (category,) = load_categories(DataSpec(root=cli.ROOT.value, categories=(name,)))
    preprocessing = Preprocessing(resize=(_SIZE.value, _SIZE.value), crop=())
    examples = [*category.train, *category.test]
    paths = [[e.image_path for e in examples if e.label == label] for label in (0, 1)]
    return [inputs.training_data([], preprocessing, 32, paths=own) for own in paths]
  path = workdir / f'{name}.{_SIZE.value}{numbers}.npz'
  if not path.exists():
    good, defective = drawn(name, _NUM_GOOD.value, _NUM_DEFECTIVE.value, _SIZE.value)
    partial = path.with_suffix('.partial.npz')
    np.savez(partial, good=good, defective=defective)
    partial.replace(path)
  with np.load(path) as found:
    return [ArrayData(found[part], 20) for part in ('good', 'defective')]


# Rows.


def read(path: Path) -> list[Row]:
  """Reads the rows of a file that `append` wrote; none where it is not there."""
  if not path.exists():
    return []
  with path.open() as f:
    return [_row(row) for row in csv.DictReader(f) if row['defective']]  # a line that was cut short is not


def _row(row):
  """Makes a `Row` of a line."""
  types = Key.__annotations__
  key = Key(**{name: types[name](row[name]) for name in Key._fields})

  def numbers(text):
    return np.array(text.split(), np.float32)

  return Row(key, np.stack([numbers(text) for text in row['cross'].split(';')]), numbers(row['good']),
             numbers(row['defective']))


def append(path: Path, row: Row) -> None:
  """Adds a row to a file, which begins with the names of the columns."""
  new = not path.exists()

  def text(values):
    return ' '.join(f'{value:.7g}' for value in values)

  with path.open('a', newline='') as f:
    writer = csv.writer(f)
    if new:
      writer.writerow([*Key._fields, 'cross', 'good', 'defective'])
    writer.writerow([*row.key, ';'.join(map(text, row.cross)), text(row.good), text(row.defective)])


# Tables.


def tables(rows: Sequence[Row]) -> Iterator[str]:
  """Yields two tables in Markdown: over all data sets and networks, and of each."""
  groups = {}
  for row in rows:
    groups.setdefault(row.key._replace(split=0), []).append(row)
  groups = {key: own for key, own in sorted(groups.items()) if len(own) > 1}
  found = {(key, way, rate): outcome(own, way, rate)
           for key, own in groups.items() for way in WAYS for rate in RATES}
  titles = ' | '.join(f'{100 * rate:g} %' for rate in RATES)
  yield ('Mean over data sets and networks (the worst of them): good images that alarm, in percent; '
         'defective ones found; relative spread of the threshold over splits, and over partitions of the '
         'same images.\n')
  yield f'| n | bank | way | {titles} |\n|---|---|---|{"---|" * len(RATES)}'
  for num, bank in sorted({(key.num, key.bank) for key in groups}):
    keys = [key for key in groups if (key.num, key.bank) == (num, bank)]
    for way in WAYS:
      cells = []
      for rate in RATES:
        own = [found[key, way, rate] for key in keys]
        alarms, defects, spread, between = (100 * np.mean(values) for values in zip(*own, strict=True))
        cells.append(f'{alarms:.1f} ({100 * max(o.alarms for o in own):.1f}); {defects:.0f}; {spread:.1f}, '
                     f'{between:.1f}')
      yield f'| {num} | {bank} | {way} | {" | ".join(cells)} |'
  yield f'\n| data | network | bank | n | way | splits | {titles} |'
  yield f'|---|---|---|---|---|---|{"---|" * len(RATES)}'
  for key, own in groups.items():
    for way in WAYS:
      cells = []
      for rate in RATES:
        o = found[key, way, rate]
        over = ' (!)' if o.alarms > 2 * stated(key.num, rate) else ''
        cells.append(f'{100 * o.alarms:.1f}{over}; {100 * o.found:.0f}; {100 * o.spread:.1f}')
      yield (f'| {key.data} | {key.network} | {key.bank} | {key.num} | {way} | {len(own)} | '
             f'{" | ".join(cells)} |')
  yield '\n(!) more than twice the stated rate, the larger of that asked for and 1 / (n + 1).'


def main(_) -> None:
  workdir, began = Path(cli.WORKDIR.value), time.monotonic()
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'scores.csv'
  done = {row.key for row in read(path) if len(row.cross) >= _PARTITIONS.value}
  for key in _keys():
    if key in done:
      continue
    if _MINUTES.value and time.monotonic() - began > 60 * _MINUTES.value:
      print('Not done: the same command goes on.\n')
      break
    good, defective, projected = _loaded(workdir, key.data, key.network)
    append(path, measure(key, good, defective, projected, _PARTITIONS.value))
    print(f'{time.monotonic() - began:.0f} s', *key, flush=True)
  rows = {row.key: row for row in read(path)}.values()  # the last of a key counts
  for line in tables(list(rows)):
    print(line)


def _keys():
  """Yields the pieces of work, split by split, so that what is there after some is whole."""
  if cli.ROOT.value:
    names = _PARTS.value or [c.name for c in load_categories(DataSpec(root=cli.ROOT.value))]
  else:
    names = _PARTS.value or synthetic.CATEGORIES
  for split in range(_SPLITS.value):
    for name, network, num, bank in itertools.product(
        names, cli.NETWORKS.value, _NUMBERS.value, _BANKS.value):
      yield Key(name, network, _SIZE.value, _GRID.value, int(bank), int(num), _FOLDS.value, split)


@functools.lru_cache(maxsize=1)
def _loaded(workdir, name, network):
  """Reads patches, and projects those of good images."""
  good, defective = _patches(workdir, name, network)
  points = coreset.random_projection(good.reshape(-1, good.shape[-1]), 128, key=jax.random.key(0))
  return good, defective, np.asarray(points).reshape(*good.shape[:2], -1)


if __name__ == '__main__':
  flags.mark_flag_as_required('workdir')
  cli.run(main)
