"""Estimates how long a fit takes, by stage, before the long work begins. `fit_rates` measures the rates."""

import dataclasses
import math

# The share of all pairs of points and selected ones that the lazy selection compares, fitted to embeddings of
# two built-in parts by two networks (16,384 to 188,160 points: 0.42 to 0.65). Real parts have 0.40 to 0.68.
_SHARE, _SHARE_BY_RATIO = 0.47, 0.33
# Its rounds: some that lower the floor, and some that fill windows.
_ROUNDS, _PICKS_OF_ROUND = 28, 2500
# How much longer a selection takes whose points travel from the host to the device.
_STREAMED = 1.4
_DENSE_BELOW = 1e10  # as in `coreset`
# Programs of a thresholds' batch beside that of the search: the maps.
_COMPILE_SCORES = 1.5


@dataclasses.dataclass(frozen=True)
class Work:
  """What a fit has to do.

  Attributes:
    num_images: images of all processes.
    patches: patches of an image.
    dim, points_dim: values of an embedding, and of a point in which the selection runs.
    num_selected: patches of the bank.
    folds: parts of the images that are scored against banks of the others; 0 for no thresholds.
    batch_size: images that are scored at once.
    greedy: whether the bank is selected greedily; else choosing it takes no time.
    stream: whether the points stay on the host while they are compared.
    num_devices: devices over which the points are split.
  """

  num_images: int
  patches: int
  dim: int
  points_dim: int
  num_selected: int
  folds: int = 0
  batch_size: int = 32
  greedy: bool = True
  stream: bool = False
  num_devices: int = 1


@dataclasses.dataclass(frozen=True)
class Rates:
  """How fast a machine is, in seconds. The defaults are of two cores of an Intel Xeon with AMX.

  Attributes:
    image: an image, through decoding and the network.
    product: one value of a point and one of a selected point, multiplied and added, where many are.
    other: what else a selection does, as a multiple of what it took where the constants below were measured.
    structure: the share of all pairs that a selection compares, as a multiple of the usual one.
    pair: a query and a row of the bank, compared in a search.
    row: a row of the bank, made ready for a search.
    compile_selection, compile_search: compiling their programs, for one shape.
  """

  image: float = 0.015
  product: float = 2.8e-11
  other: float = 1.0
  structure: float = 1.0
  pair: float = 4e-9
  row: float = 4e-5
  compile_selection: float = 1.7
  compile_search: float = 1.0


# Of `Rates.other`: a pick, a point in a round, a round, a point at the start, and a value of all compared by
# the dense loop, or copied.
_STEP, _VISIT, _ROUND, _START, _DENSE, _COPY = 125e-6, 2e-7, 1e-3, 1.1e-6, 2e-10, 1.3e-8


@dataclasses.dataclass(frozen=True)
class FitTime:
  """Seconds of the stages of a fit that are still to come."""

  embedding: float
  selection: float
  thresholds: float

  @property
  def total(self) -> float:
    return self.embedding + self.selection + self.thresholds

  def __str__(self) -> str:
    """Writes the estimate as one line for the user.

    >>> print(FitTime(5.2, 10.4, 34.9))
    about 50 s from here: embedding 5, selection 10, thresholds 35
    >>> print(FitTime(90, 500, 0))
    about 10 min from here: embedding 2, selection 8
    """
    size, unit = next(
        (size, unit) for size, unit, most in ((1, 's', 300), (60, 'min', 7200), (3600, 'h', math.inf))
        if self.total < most)
    stages = ', '.join(
        f'{name} {value / size:.0f}' if value / size >= 0.5 else f'{name} under 1'
        for name, value in vars(self).items() if value)
    return f'about {max(1, self.total / size):.0f} {unit} from here: {stages}'


def estimate(work: Work, rates: Rates, *, images_left: int | None = None) -> FitTime:
  """Estimates the seconds that a fit takes, compiling included.

  Args:
    images_left: images that have not passed through the network; None for all.

  >>> estimate(Work(213, 784, 1024, 128, 10_000, folds=5), Rates()).thresholds > 10
  True
  """
  left = work.num_images if images_left is None else images_left
  num_points = work.num_images * work.patches
  selection = thresholds = 0.0
  if work.greedy:
    selection = (
        work.points_dim * num_points * (rates.product * work.dim + _COPY * rates.other) / work.num_devices
        + selection_seconds(num_points, work.num_selected, work, rates))
  if work.folds and work.num_images > 1:
    thresholds = _threshold_seconds(work, rates)
  return FitTime(left * rates.image, selection, thresholds)


def _threshold_seconds(work, rates):
  """Estimates the selections and searches of all folds. Folds of one size share their programs."""
  folds = min(work.folds, work.num_images)
  seconds, sizes = 0.0, set()
  for fold in range(folds):
    scored = len(range(fold, work.num_images, folds))
    num_points = (work.num_images - scored) * work.patches
    selected = max(1, num_points * work.num_selected // (work.num_images * work.patches))
    queries = math.ceil(scored / work.batch_size) * work.batch_size * work.patches
    seconds += queries * selected * rates.pair / work.num_devices + selected * rates.row
    seconds += num_points * work.points_dim * _COPY * rates.other
    if work.greedy:
      seconds += selection_seconds(num_points, selected, work, rates, compiled=scored in sizes)
    if scored not in sizes:
      seconds += _COMPILE_SCORES * rates.compile_search
    sizes.add(scored)
  return seconds


def selection_seconds(
    num_points: int, num_selected: int, work: Work, rates: Rates, *, compiled: bool = False) -> float:
  """Estimates the seconds of one greedy selection.

  Its products are the larger part where there are many points: about half of all pairs. Besides, each pick
  reads a window, and each round sorts and passes over all points.

  >>> work = Work(213, 784, 1024, 128, 10_000)
  >>> selection_seconds(160_000, 10_000, work, Rates()) < selection_seconds(640_000, 10_000, work, Rates())
  True
  """
  values = num_points * num_selected * work.points_dim
  if values < _DENSE_BELOW and not work.stream and work.num_devices == 1:
    return values * _DENSE * rates.other + (0 if compiled else 0.3 * rates.compile_selection)
  share = min(1.0, rates.structure * (_SHARE + _SHARE_BY_RATIO * num_selected / num_points))
  rounds = _ROUNDS + num_selected / _PICKS_OF_ROUND
  products = share * num_points * num_selected * work.points_dim * rates.product / work.num_devices
  others = _START * num_points / work.num_devices + others_seconds(num_points, num_selected, rounds, work)
  return ((products + others * rates.other) * (_STREAMED if work.stream else 1)
          + (0 if compiled else rates.compile_selection))


def others_seconds(num_points: int, num_selected: int, rounds: float, work: Work) -> float:
  """Computes what a lazy selection took besides products, where the defaults of `Rates` were measured."""
  return num_selected * _STEP + rounds * (_ROUND + _VISIT * num_points / work.num_devices)
