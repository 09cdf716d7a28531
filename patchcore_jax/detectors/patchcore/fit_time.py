"""Estimates how long a fit takes, by stage, before the long work begins.

The constants are of selections from embeddings of two built-in and two real parts by two networks. They are
for CPUs; on accelerators nothing is told.
"""

import dataclasses
import math
import time

import jax

from patchcore_jax.detectors.base import Run
from patchcore_jax.search import coreset, slots

# The share of all pairs of points and selected ones that the lazy selection compares, fitted to embeddings of
# two built-in parts by two networks (16,384 to 188,160 points: 0.42 to 0.65). Real parts have 0.40 to 0.68.
_SHARE, _SHARE_BY_RATIO = 0.47, 0.33
# Its rounds: some that lower the floor, and some that fill windows.
_ROUNDS, _PICKS_OF_ROUND = 28, 2500
# How much longer a selection takes whose points travel from the host to the device.
_STREAMED = 1.4
# How much longer two selections take at the same time than one after another, on two cores.
_AT_ONCE = 0.72
_LONG = 4.0  # seconds that are worth a line
# How many times longer a product takes with all that a selection does to its result than by itself.
_AND_COMPARED = 2.2


@dataclasses.dataclass(frozen=True)
class Work:
  """What a fit has to do.

  Attributes:
    num_images: images of all processes.
    patches: patches of an image, at all angles.
    dim, points_dim: values of an embedding, and of a point in which the selection runs.
    num_selected: patches of the bank.
    folds: parts of the images that are scored against banks of the others; 0 for no thresholds.
    batch_size: images that are scored at once.
    method: by which the bank is chosen; nothing is known of others than 'greedy' and 'thinning'.
    rounds: of a thinning.
    stream: whether the points stay on the host while they are compared.
    num_devices: devices over which the points are split.
    folds_at_once: of how many folds banks are selected at the same time.
    angles: at how many each image is embedded; scored is it at one.
  """

  num_images: int
  patches: int
  dim: int
  points_dim: int
  num_selected: int
  folds: int = 0
  batch_size: int = 32
  method: str = 'greedy'
  rounds: int = 100
  stream: bool = False
  num_devices: int = 1
  folds_at_once: int = 1
  angles: int = 1


@dataclasses.dataclass(frozen=True)
class Rates:
  """How fast a machine is, in seconds. The defaults are of two cores of an Intel Xeon with AMX.

  Attributes:
    image: an image, through decoding and the network.
    product: one value of a point and one of a selected point, multiplied, added and compared.
    compile_selection, compile_search: compiling their programs, and those of a batch's maps.
  """

  image: float = 0.015
  product: float = 1.25e-11
  compile_selection: float = 3.4
  compile_search: float = 2.5


# A selection has these parts: a pick, a point in a round, a round, a point in all rounds (it is looked at
# three or four times), and a value that the dense loop compares, or that is copied.
_STEP, _VISIT, _ROUND, _POINT, _DENSE, _COPY = 90e-6, 7e-8, 1e-3, 3.2e-6, 2e-10, 1.3e-8
# A search has these: a query and a row compared, for all their values and for each; and a row made ready.
_PAIR, _PAIR_VALUE, _ROW = 1.5e-9, 0.6, 4e-5
# A thinning has a pair of points compared, and each of their values.
_THIN, _THIN_VALUE = 8e-9, 2.8e-11


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
  if work.method == 'greedy':
    selection = (
        work.points_dim * num_points * (rates.product * work.dim + _COPY) / work.num_devices
        + selection_seconds(num_points, work.num_selected, work, rates))
  elif work.method == 'thinning':
    selection = _thinning_seconds(num_points, work)
  if work.folds and work.num_images > 1:
    thresholds = _threshold_seconds(work, rates)
  return FitTime(left * rates.image, selection, thresholds)


def _threshold_seconds(work, rates):
  """Estimates the selections and searches of all folds, which share their programs."""
  folds = min(work.folds, work.num_images)
  seconds = rates.compile_search
  pair = _PAIR + _PAIR_VALUE * rates.product * work.dim
  for fold in range(folds):
    scored = len(range(fold, work.num_images, folds))
    selected = max(1, (work.num_images - scored) * work.num_selected // work.num_images)
    queries = math.ceil(scored / work.batch_size) * work.batch_size * (work.patches // work.angles)
    seconds += queries * selected * pair / work.num_devices + selected * _ROW
    if work.method == 'greedy':
      seconds += selection_seconds(work.num_images * work.patches, selected, work, rates, compiled=True)
    elif work.method == 'thinning':
      seconds += _thinning_seconds((work.num_images - scored) * work.patches, work)
  return seconds * (_AT_ONCE if work.folds_at_once > 1 else 1)


def _thinning_seconds(num_points, work):
  """Estimates a thinning: in each round a part of the points is compared with itself, in float64."""
  return num_points * num_points / work.rounds * (_THIN + _THIN_VALUE * work.dim)


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
  if values < coreset.DENSE_BELOW and not work.stream and work.num_devices == 1:
    return values * _DENSE + (0 if compiled else 0.2 * rates.compile_selection)
  share = min(1.0, _SHARE + _SHARE_BY_RATIO * num_selected / num_points)
  rounds = _ROUNDS + num_selected / _PICKS_OF_ROUND
  seconds = num_selected * _STEP + rounds * _ROUND
  seconds += (share * values * rates.product + num_points * (_POINT + rounds * _VISIT)) / work.num_devices
  return seconds * (_STREAMED if work.stream else 1) + (0 if compiled else rates.compile_selection)


class Teller:
  """Passes progress on, and tells once, after a few batches, how long the fit will take.

  Args:
    run: whom to tell.
    work: what the fit has to do.
  """

  def __init__(self, run: Run, work: Work):
    self._run, self._work = run, work
    self._times, self._told = [], run.notify is Run.notify or jax.default_backend() != 'cpu'

  def __call__(self, stage: str, done: int, total: int) -> None:
    """Is called as `Run.progress` is, by the embedding."""
    self._run.progress(stage, done, total)
    if self._told or stage != 'embed':
      return
    self._times.append((time.monotonic(), done))
    if len(self._times) == 3 or done >= total:
      self._told = True
      (first, before), (last, after) = self._times[0], self._times[-1]
      # The first batch compiles. Where there is no other, nothing is left either.
      rates = Rates(
          image=(last - first) / max(1, after - before), product=_AND_COMPARED * slots.product_seconds())
      left = estimate(self._work, rates, images_left=total - done)
      if left.total >= _LONG:
        self._run.notify(str(left))
