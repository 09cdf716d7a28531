"""The contract of a detector. It imports no JAX, so that settings can be read without it.

A detector is a frozen record of settings. `fit` makes a `Model` of good images: arrays by name, and a
description. `score_fn` makes a `ScoreFn` of the model: a pure function of parameters and images, for
`jax.jit`, and its parameters. Prediction, thresholds, evaluation, reports, the service and the export are
written once, against these.
"""

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from patchcore_jax.banks.model import Model, to_json
from patchcore_jax.settings import SearchSpec

LIVE, PORTABLE, LOOP_FREE = 'live', 'portable', 'loop_free'


class Scores(NamedTuple):
  """The answers of a detector for b images.

  Attributes:
    image: [b] float32; larger is more anomalous.
    map: [b, h, w] float32, the same for every pixel that the network saw; None where a detector has none.
    evidence: why, by name; a detector gives what it knows. 'background_share' [b] float32 is the share of the
      patches that are not scored, because they are taken for background. 'patch' [b] int32 is the most
      anomalous patch, row * columns + column on the grid, and 'nearest' [b] int32 the row of the bank that is
      nearest to it.
  """

  image: Any
  map: Any = None
  evidence: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class ScoreFn:
  """A pure function from parameters and images to scores, and the parameters.

  Attributes:
    fn: (parameters, images [b, h, w, 3] uint8) -> `Scores`, or a tuple of them; for `jax.jit`. It is the same
      object for the same settings, so that it is compiled once.
    parameters: a tuple of pytrees of arrays, on the host.
    sharded: which members of the tuple have a leading axis with one piece for each device; others are
      whole on every device. `fn` may then use the collectives of `parallel.AXIS`.
  """

  fn: Callable[[Any, Any], Any]
  parameters: tuple[Any, ...]
  sharded: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class HostScoreFn(ScoreFn):
  """A score function with a step on the host, which can be run here but not exported.

  Attributes:
    finish: what `fn` returned, as NumPy arrays without padding, -> `Scores`.
  """

  finish: Callable[[Any], Scores] | None = None


class CrossScores(NamedTuple):
  """Scores of n training images, each by a model of the others.

  Attributes:
    image: [n] float32.
    map_maxima: [n] float32, the largest value of each anomaly map; None where there are none.
  """

  image: np.ndarray
  map_maxima: np.ndarray | None


class Statistics(NamedTuple):
  """Mean and standard deviation, float64, of the scores of good images, by which ensembles normalise."""

  mean: float
  std: float


class Data(Protocol):
  """Images to fit on, read as often as wanted. `data.dataset` has those of files and of arrays.

  Attributes:
    examples: which images there are.
    preprocessing: what is done to them, or None where they come as they are.
  """

  examples: Sequence[Any]
  preprocessing: Any

  def batches(self, *, shuffle: int | None = None, augment: Callable | None = None) -> Iterator[Any]:
    """Yields every image once, in batches of one shape.

    Args:
      shuffle: the seed of the order; None for the order of the examples.
      augment: (generator, image [h, w, 3] uint8) -> such an image, called with a generator of its own for
        each image; None to leave images as they are.
    """

  def part(self, positions: Sequence[int]) -> 'Data':
    """Selects the examples at these positions, as data of their own."""


def _ignore(*_) -> None:
  """Ignores its arguments: the default of `Run.progress` and `Run.notify`."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a fit may use, and whom it tells. Only the seed has an influence on the result.

  Attributes:
    progress: called with (stage, done, total).
    notify: called with a line for the user, such as the plan of the memory.
    seed: the seed of everything that is random.
    memory_gb: the most that the process may take on the host, in 10^9 bytes.
    scratch: folder for temporary files; None for the system's.
    checkpoints: folder in which a fit that takes long keeps what it has, so that a killed one goes on; None
      to keep nothing.
    keep_images: whether the model keeps small pictures of the training images.
    several_processes: whether all processes of `jax.distributed` fit together, each with the same data.
  """

  progress: Callable[[str, int, int], None] = _ignore
  notify: Callable[[str], None] = _ignore
  seed: int = 0
  memory_gb: float = math.inf
  scratch: str | os.PathLike | None = None
  checkpoints: str | os.PathLike | None = None
  keep_images: bool = False
  several_processes: bool = False


class Detector:
  """Settings of a method; subclasses are frozen dataclasses.

  A method of this package names the module with its `fit` and `score_fn`, which is imported when it is first
  used; one of your own may override the two here instead.

  Attributes:
    name: its name in configs, files and on the command line.
    title: its name in reports and tables.
    module: the module with the functions `fit(detector, data, backbones, run)` and
      `score_fn(detector, model, backbones, search, program)`.
    has_coreset: whether a model keeps patches in the order of their selection, so that its first rows are the
      model of a smaller coreset ratio. Such a method has a setting `ratio`, and its module `score_fn_at`,
      `bank_size` and `statistics_at`.
    needs_network: whether it takes pretrained networks; without, it is given none.
    trains: whether a fit trains a network, on the images themselves: it takes minutes and can be gone on
      with, its model is worth keeping, and maps that a network made cannot stand in for the images.
    changes_images: whether the network sees images turned, in windows or in other ways, so that maps of whole
      images cannot stand in for them.
    uses_defects: whether it learns from labelled defects beside the good images, which all others refuse.
    only_scoring: settings that may differ from those of the fit.
    host_step: why scoring cannot be one compiled function, in one line; '' where it can. Such a method gives
      a `HostScoreFn`, and is neither exported nor a member of ensembles.
    of_a_set: whether it scores the very images that it was fitted on, unlabelled, by each other. Such a
      method has a `host_step`, an evaluation fits it on the test images, and it has no thresholds.
  """

  name: ClassVar[str]
  title: ClassVar[str]
  module: ClassVar[str] = ''
  has_coreset: ClassVar[bool] = False
  needs_network: ClassVar[bool] = True
  trains: ClassVar[bool] = False
  changes_images: ClassVar[bool] = False
  uses_defects: ClassVar[bool] = False
  only_scoring: ClassVar[tuple[str, ...]] = ()
  host_step: ClassVar[str] = ''
  of_a_set: ClassVar[bool] = False

  @property
  def row(self) -> str:
    """Its name in the tables of the paper, where settings decide about that."""
    return self.title

  @property
  def in_short(self) -> str:
    """The settings by which results differ most, in a few words; '' where the name says enough."""
    return ''

  def fit(self, data: Data, backbones: Sequence[Any], run: Run | None = None) -> Model:
    """Learns what good images look like.

    Args:
      data: good images of one size, and labelled defects where the method uses such.
      backbones: as many networks as the method needs; () where it needs none.
      run: what the fit may use.

    Raises:
      ValueError: no images, or another mistake that the message explains.
    """
    self.check_defects(sum(example.label != 0 for example in data.examples))
    return self._code().fit(self.resolved(backbones), data, tuple(backbones), run or Run())

  def score_fn(
      self, model: Model, backbones: Sequence[Any], *, search: SearchSpec | None = None,
      program: str = LIVE) -> ScoreFn:
    """Makes the function that scores images, with its parameters.

    Args:
      model: what `fit` made.
      backbones: the networks of the fit.
      search: how neighbours are found; no influence on the result.
      program: 'live' runs in this process; 'portable' is for programs that are kept, and calls nothing that
        is tied to one device or version; 'loop_free' has no loops besides, for converters to other runtimes.

    Raises:
      BankError: the model was made with other settings or networks.
      ValueError: settings that the model cannot be used with.
    """
    importlib.import_module('patchcore_jax.detectors.streaming').check(self, model, backbones)
    return self._code().score_fn(
        self.resolved(backbones), model, tuple(backbones), search or SearchSpec(), program)

  def score_fn_at(
      self, model: Model, backbones: Sequence[Any], ratios: Sequence[float], *,
      search: SearchSpec | None = None) -> ScoreFn:
    """Makes a score function whose result is a tuple, the `Scores` at each coreset ratio, in one pass.

    Args:
      ratios: in any order, none larger than the model's; of a method without a coreset it is (1.0,).
    """
    if not self.has_coreset:
      streaming = importlib.import_module('patchcore_jax.detectors.streaming')
      return streaming.in_tuple(self.score_fn(model, backbones, search=search))
    return self._code().score_fn_at(self, model, tuple(backbones), ratios, search=search)

  def bank_size(self, model: Model, ratio: float) -> int | None:
    """Counts the patches that a coreset ratio keeps; None for a method without a coreset."""
    return self._code().bank_size(model, ratio) if self.has_coreset else None

  def fit_and_cross_score(
      self, data: Data, backbones: Sequence[Any], run: Run | None = None, *, folds: int,
      search: SearchSpec | None = None) -> tuple[Model, CrossScores]:
    """Fits a model, and scores the good training images as if they were new, for thresholds.

    The good images are parted at random into `folds` parts of like size; each is scored by a model of the
    others. A method that can do this faster than with as many fits has a `fit_and_cross_score` of its own.

    Args:
      folds: how many parts, at least 2; where there are fewer images, each is a part of its own.
      search: see `score_fn`.

    Returns:
      The model of all images, and the scores in the order of the good images that could be read.

    Raises:
      ValueError: fewer than two folds, a method without thresholds, or folds that leave fewer images to fit
        on than it takes, which is seen before the first fit.
    """
    if folds < 2:
      raise ValueError(f'folds={folds}: expected at least 2.')
    if self.of_a_set:
      raise ValueError(
          f'{self.title} has no thresholds: {self.host_step}. Fit it without (--folds 0, or '
          'false_alarm_rate=None in Python).')
    defects = sum(example.label != 0 for example in data.examples)
    self.check_defects(defects)
    self._check_folds(len(data.examples) - defects, defects, folds)
    code = self._code()
    if not hasattr(code, 'fit_and_cross_score'):
      code = importlib.import_module('patchcore_jax.detectors.cross_fitting')
    return code.fit_and_cross_score(
        self.resolved(backbones), data, tuple(backbones), run or Run(), folds=folds,
        search=search or SearchSpec())

  def statistics(
      self, model: Model, data: Data, backbones: Sequence[Any], run: Run | None = None, *,
      search: SearchSpec | None = None) -> Statistics:
    """Measures how the scores of good images spread, by which an ensemble normalises its members.

    A method that knows this without further fits has a `statistics` of its own.

    Args:
      model: a model that was fitted on `data`.
    """
    code = self._code()
    if not hasattr(code, 'statistics'):
      code = importlib.import_module('patchcore_jax.detectors.cross_fitting')
    return code.statistics(
        self.resolved(backbones), model, data, tuple(backbones), run or Run(), search=search or SearchSpec())

  def statistics_at(
      self, model: Model, data: Data, backbones: Sequence[Any], run: Run, ratios: Sequence[float],
  ) -> list[Statistics]:
    """Measures the same at each coreset ratio; without a coreset, once."""
    if not self.has_coreset:
      return [self.statistics(model, data, backbones, run)]
    return self._code().statistics_at(self, model, data, tuple(backbones), run, ratios, search=SearchSpec())

  def fewest_images(self, num_defects: int = 0) -> int:
    """Counts the good images that a fit takes at least, beside so many labelled defects."""
    return 1

  def _check_folds(self, num_images, num_defects, folds):
    """Raises ValueError where the whole can be fitted, but not what the largest of its folds leaves."""
    fewest, folds = self.fewest_images(num_defects), max(1, min(folds, num_images))
    left = num_images - math.ceil(num_images / folds)
    if 1 < fewest <= num_images and left < fewest:  # of one image the methods have more to say
      raise ValueError(
          f'{num_images} good images in {folds} folds leave {left} to fit on, and {self.title} with these '
          f'settings takes at least {fewest}: expected more folds (--folds), more images, or no thresholds '
          '(--folds 0).')

  def check_defects(self, number: int) -> None:
    """Refuses labelled defects where the method takes all images for good, and none where it needs some.

    Args:
      number: how many there are.
    """
    if number and not self.uses_defects:
      raise ValueError(
          f'{number} of the training images are labelled as defects, of which {self.title} with these '
          'settings does not learn: expected good images only.')
    if self.uses_defects and not number:
      raise ValueError(
          f'{self.title} with these settings learns from labelled defects too, and there are none: expected '
          'some, by defects= or --defects of a fit, or data.labelled_defects of an evaluation.')

  def resolved(self, backbones: Sequence[Any]) -> 'Detector':
    """Settles what the settings leave to the networks; most methods leave nothing."""
    return self

  def settings(self) -> dict[str, Any]:
    """Converts the fields to a dict, as JSON has them."""
    return to_json(self)

  def fit_settings(self) -> dict[str, Any]:
    """Picks the settings that a model depends on: all but `only_scoring`."""
    return {k: v for k, v in self.settings().items() if k not in self.only_scoring}

  def _code(self):
    """Imports the module of the method; returns None for one that overrides `fit` and `score_fn`."""
    return importlib.import_module(self.module) if self.module else None

