"""A model: named arrays, and a typed record of how it was made and is to be used, which is kept as JSON.

This imports no JAX. `Description.from_json` also reads what versions until November 2026 wrote.
"""

import dataclasses
import datetime
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing, ScoringSpec

# What settings hold, by its name there.
_RECORDS = {'embedding': EmbeddingSpec, 'coreset': CoresetSpec, 'scoring': ScoringSpec}


class BankError(ValueError):
  """A model that cannot be restored, or was made in another way; the message names the difference."""


class Model(NamedTuple):
  """What a detector learnt. `banks.store` keeps it.

  It says which networks it was made with, and holds none.

  Attributes:
    arrays: NumPy arrays by name; the detector's `fit` says which.
    description: how the model was made, and how it is to be used.
  """

  arrays: dict[str, np.ndarray]
  description: 'Description'

  def recorded(self, what: str) -> 'Model':
    """Makes the same model with a line added to its history."""
    import patchcore_jax  # for its version; it imports nothing itself

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    event = Event(now, what, patchcore_jax.__version__)
    return self.with_description(history=(*self.description.history, event))

  def with_description(self, **changes) -> 'Model':
    """Makes the same model with other values in some fields of its description."""
    return self._replace(description=dataclasses.replace(self.description, **changes))


@dataclasses.dataclass(frozen=True)
class Source:
  """The arguments of `backbones.create` that make a network again."""

  name: str
  weights: str = ''
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Network:
  """The network that a model was made with.

  Attributes:
    name: what made it.
    layers: names of the layers that it gives, shallow to deep.
    mean, std: what its images are normalised by.
    precision: precision of its products.
    weights: fingerprint of its weights.
    source: how it is made again; None for a network from Python, which must be given again.
  """

  name: str
  layers: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  precision: str
  weights: str
  source: Source | None = None


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Scores of good images that a model had not seen, and the thresholds that follow.

  Attributes:
    false_alarm_rate: the share of good images that may be called anomalous, as asked for.
    guaranteed_rate: at most this share of good images is called anomalous; larger than what was asked for
      where there are too few images.
    image_scores: one for each image.
    map_maxima: the largest value of each image's anomaly map; () where the method has no maps.
    image_threshold: an image whose score reaches it is anomalous.
    pixel_threshold: pixels whose value reaches it are marked; as few good images have any as are called
      anomalous. None where the method has no maps.
    method: how the scores came about: 'cross' or 'held out'.
    image_allowance, pixel_allowance: how far a good image's score, and the largest value of its map, may be
      off on another kind of device. The thresholds have them in; the scores are as they were made.
  """

  false_alarm_rate: float
  guaranteed_rate: float
  image_scores: tuple[float, ...]
  map_maxima: tuple[float, ...]
  image_threshold: float
  pixel_threshold: float | None
  method: str
  image_allowance: float = 0.0
  pixel_allowance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Event:
  """A line of a model's history: when (ISO 8601), what, and by which version of this package."""

  when: str
  what: str
  version: str


@dataclasses.dataclass(frozen=True)
class Description:
  """The record of how a model was made, and how it is to be used.

  Attributes:
    detector: name of the method.
    settings: settings of the method, as JSON has them.
    backbones: the networks.
    image_size: (height, width) of the images after preprocessing.
    num_images: number of good images that it was fitted on.
    grid: (rows, columns) of the patches of an image; None for methods without.
    images: files of the good training images, in their order; () where they were arrays.
    num_skipped: training images that could not be read.
    category: what the images show.
    seed: seed of the fit.
    shots: names of the training images, where they are a draw from all; else ().
    preprocessing: what is done to images; None for a model of arrays, which takes images as they come.
    calibration: thresholds; None for a model without.
    device: where it was made: 'cpu', 'gpu' or 'tpu'.
    versions: versions of the packages that made it.
    fit_seconds: seconds that the fit took; None if nobody measured.
    history: what happened to it.
    covering_radius: how near a patch must be to one of the bank to count as covered, where rows were added.
    ordered: whether the rows of the bank are in the order of one selection.
    members: the models of an ensemble.
    original_size: (width, height) that most training images have, upright, before preprocessing; None where
      nobody looked.
    outside_range: the largest share of a training image's pixels that lie outside of the value range.
    num_defects: number of labelled defects that it was fitted on, beside the good images.
    colours: 'gray' where all training images are, 'coloured' where none is, else 'both'; '' where nobody
      looked.
  """

  detector: str
  settings: dict[str, Any]
  backbones: tuple[Network, ...]
  image_size: tuple[int, int]
  num_images: int
  grid: tuple[int, int] | None = None
  images: tuple[str, ...] = ()
  num_skipped: int = 0
  category: str = ''
  seed: int = 0
  shots: tuple[str, ...] = ()
  preprocessing: Preprocessing | None = None
  calibration: Calibration | None = None
  device: str = ''
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  fit_seconds: float | None = None
  history: tuple[Event, ...] = ()
  covering_radius: float | None = None
  ordered: bool = True
  members: tuple['Description', ...] = ()
  original_size: tuple[int, int] | None = None
  outside_range: float = 0.0
  num_defects: int = 0
  colours: str = ''

  @property
  def num_patches(self) -> int:
    """The number of patches of all training images."""
    return self.num_images * self.grid[0] * self.grid[1]

  @property
  def num_candidates(self) -> int:
    """The number of patches that a bank is selected from: those of all training images at all angles."""
    embedding = self.settings.get('embedding')
    return self.num_patches * (embedding.get('rotations', 1) if isinstance(embedding, Mapping) else 1)

  def check(self, expected: Mapping[str, Any], name: Any = '') -> None:
    """Compares the description with what the model is about to be used with.

    Args:
      expected: fields that it must have, as JSON has them; of those that are records, some of their fields.
      name: the model's name, for the message.

    Raises:
      BankError: some differ; the message names each.

    >>> d = Description('padim', {}, (), (8, 8), 5)
    >>> d.check({'image_size': (8, 9)})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    patchcore_jax.banks.model.BankError: ... image_size: the model has [8, 8], asked for is [8, 9]. ...
    """
    check(to_json(self), expected, name)

  def to_json(self) -> dict[str, Any]:
    """Converts the description to dicts and lists, as JSON has them."""
    return to_json(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> 'Description':
    """Reads what `to_json` made, here or in an older version.

    Raises:
      BankError: values that are no description.
    """
    values = _of_format_2(values) if 'backbone' in values else values
    try:
      return from_json(cls, _of_today(values))
    except (KeyError, TypeError, ValueError) as e:
      raise BankError(f'The description of the model cannot be read ({type(e).__name__}: {e}).') from e


def check(have: Mapping[str, Any], expected: Mapping[str, Any], name: Any = '') -> None:
  """Compares any description, as JSON has it, as `Description.check` does."""
  have, expected = flat(have), flat(to_json(expected))
  differences = [
      f'{field}: the model has {have.get(field)!r}, asked for is {value!r}'
      for field, value in expected.items() if have.get(field) != value]
  if differences:
    raise BankError(
        f'The model{f" {name}" if name else ""} was made in another way. {"; ".join(differences)}. Use the '
        'same settings, or fit again.')


def to_json(value: Any) -> Any:
  """Converts records to dicts and tuples to lists, all the way down.

  >>> to_json({'source': Source('resnet50.tv_in1k'), 'size': (8, 9)})
  {'source': {'name': 'resnet50.tv_in1k', 'weights': '', 'seed': 0}, 'size': [8, 9]}
  """
  if dataclasses.is_dataclass(value):
    return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {k: to_json(v) for k, v in value.items()}
  return [to_json(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_json(kind: Any, value: Any) -> Any:
  """Converts back what `to_json` made of a value of type `kind`.

  Fields that an older version lacked have their defaults.

  >>> from_json(Source, {'name': 'a', 'seed': 3})
  Source(name='a', weights='', seed=3)
  """
  if dataclasses.is_dataclass(kind):
    hints = typing.get_type_hints(kind)
    return kind(**{k: from_json(hints[k], v) for k, v in value.items()})
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    (kind,) = (a for a in arguments if a is not type(None))
    return None if value is None else from_json(kind, value)
  if origin is tuple:
    return tuple(from_json(arguments[0], v) for v in value)
  return value


def flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Flattens nested dicts, and lists of them, to one level, keys joined by dots; for comparing two.

  >>> flat({'a': {'b': [1, 2]}, 'c': None, 'd': [{'e': 3}]})
  {'a.b': [1, 2], 'c': None, 'd.0.e': 3}
  """
  if isinstance(tree, Mapping):
    items = tree.items()
  elif isinstance(tree, (list, tuple)) and any(isinstance(v, Mapping) for v in tree):
    items = enumerate(tree)
  else:
    return {prefix: tree}
  leaves = {}
  for key, value in items:
    leaves |= flat(value, f'{prefix}.{key}' if prefix else str(key))
  return leaves


def _of_today(old: Mapping[str, Any]) -> Mapping[str, Any]:
  """Fills in what an older version did not write: it dropped transparency, else did as defaults of today."""
  changes = {}
  if old.get('settings'):
    changes['settings'] = _with_newer_settings(old['settings'])
  if old.get('preprocessing') and 'background' not in old['preprocessing']:
    changes['preprocessing'] = {**old['preprocessing'], 'background': []}
  if old.get('members'):
    changes['members'] = [_of_today(member) for member in old['members']]
  return {**old, **changes}


def _with_newer_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Adds settings that came later to the records of a method, or to those of an ensemble's members."""
  return {
      name: {**to_json(_RECORDS[name]()), **value} if name in _RECORDS and isinstance(value, Mapping)
      else _with_newer_settings(value) if isinstance(value, Mapping) else value
      for name, value in settings.items()}


def _of_format_2(old: Mapping[str, Any]) -> dict[str, Any]:
  """Converts a description of an older version: that of a PatchCore bank, in a dict without types."""
  new = {k: old[k] for k in (
      'image_size', 'num_images', 'grid', 'images', 'num_skipped', 'category', 'shots', 'calibration',
      'device', 'versions', 'fit_seconds', 'history', 'covering_radius', 'ordered') if old.get(k) is not None}
  coreset = dict(old.get('coreset', {}))
  if 'preprocess' in old:
    new['preprocessing'] = old['preprocess']
  new |= {
      'detector': 'patchcore',
      'seed': coreset.pop('seed', 0),
      'settings': {
          'ratio': coreset.pop('ratio', 1.0), 'embedding': old['embedding'], 'coreset': coreset,
          'scoring': old.get('scoring', {})},
      'backbones': [dict(old['backbone']) | {'source': old.get('source')}]}
  if coreset.get('method') == 'identity':
    new['settings']['ratio'] = 1.0
  return new
