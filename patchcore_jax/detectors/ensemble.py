"""The same method with several networks (tables S1 to S3 of the paper's supplement).

Members differ in the unit of their scores. The paper's released code brings them to a common one by the
smallest and the largest score of the test set, so that the score of an image depends on the others
tested. Here each is normalised by statistics of the training images alone, before anything is tested:
0 is the mean patch of a good image, 1 a standard deviation. Only the deviation decides how members weigh
against each other; the mean adds the same to all images.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from patchcore_jax import processes
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import store
from patchcore_jax.banks.model import Model, to_json
from patchcore_jax.detectors import streaming
from patchcore_jax.detectors.base import Data, Run, ScoreFn, Scores
from patchcore_jax.detectors.settings import Ensemble, of_model
from patchcore_jax.settings import SearchSpec


def fit(detector: Ensemble, data: Data, backbones: Sequence[Backbone], run: Run) -> Model:
  """Fits one member after another (`Detector.fit`). Pictures of the training images are not kept.

  With `run.checkpoints`, a member that is fitted is kept there, and found again by a fit that goes on.

  Returns:
    A model of the arrays of member i, each with 'i.' before its name, and
      mean, std [members, 1 + number of further ratios] float64 of their scores.

  Raises:
    ValueError: fewer than two networks, or members whose scores are all the same.
  """
  if len(backbones) < 2:
    raise ValueError(
        f'An ensemble of {len(backbones)} networks: expected two or more, joined by + in backbone.name.')
  models, spread = [], []
  for i, backbone in enumerate(backbones):
    own = dataclasses.replace(run, checkpoints=None, keep_images=False)
    model = _fitted(detector, data, backbone, own, run.checkpoints and Path(run.checkpoints) / str(i))
    models.append(model)
    spread.append(detector.member.statistics_at(model, data, (backbone,), own, _ratios(detector)))
  arrays = {f'{i}.{name}': array for i, model in enumerate(models) for name, array in model.arrays.items()}
  mean, std = np.moveaxis(np.array(spread, np.float64), 2, 0)
  if not (std > 0).all():
    raise ValueError('All patches of the training images score the same: scores have no scale.')
  first = models[0].description
  description = dataclasses.replace(
      first, detector=detector.name, settings=detector.settings(),
      backbones=tuple(network for model in models for network in model.description.backbones),
      members=tuple(model.description for model in models))
  return Model(arrays | {'mean': mean, 'std': std}, description)


def members(model: Model) -> list[Model]:
  """Takes the models of the members out of the model of an ensemble."""
  return [
      Model({k.partition('.')[2]: v for k, v in model.arrays.items() if k.partition('.')[0] == str(i)}, d)
      for i, d in enumerate(model.description.members)]


def score_fn(
    detector: Ensemble, model: Model, backbones: Sequence[Backbone], search: SearchSpec, program: str,
) -> ScoreFn:
  """Makes the score function (`Detector.score_fn`).

  It returns the mean over members of their normalised scores and maps, (score - mean) / std.
  """
  parts = [
      detector.member.score_fn(member, (backbone,), search=search, program=program)
      for member, backbone in zip(members(model), backbones, strict=True)]
  return _combined(parts, model, [0], several=False)


def score_fn_at(
    detector: Ensemble, model: Model, backbones: Sequence[Backbone], ratios: Sequence[float], *,
    search: SearchSpec | None = None) -> ScoreFn:
  """Makes the function that scores at several ratios in one pass, for an ensemble of PatchCore.

  See `patchcore.score_fn_at`.

  Args:
    ratios: some of the member's own and those that the ensemble was told of, in any order.

  Raises:
    BankError: the model was made with other settings or networks.
    ValueError: another ratio, or a method that has none.
  """
  streaming.check(detector, model, backbones)
  known = _ratios(detector)
  if unknown := [ratio for ratio in ratios if ratio not in known]:
    raise ValueError(
        f'Ratios {unknown}: the statistics of this ensemble are of {list(known)}. Use one of these, or fit '
        'with others in Ensemble.ratios.')
  places = [known.index(ratio) for ratio in ratios]
  parts = [
      detector.member.score_fn_at(member, (backbone,), ratios, search=search)
      for member, backbone in zip(members(model), backbones, strict=True)]
  return _combined(parts, model, places, several=True)


def bank_size(model: Model, ratio: float) -> int:
  """Counts the patches that the banks of all members hold at a coreset ratio."""
  return sum(of_model(member).bank_size(member, ratio) for member in members(model))


def _ratios(detector) -> tuple[float, ...]:
  """Lists the coreset ratios that the ensemble has statistics for; () without a coreset."""
  return (detector.member.ratio, *detector.ratios) if detector.has_coreset else ()


def _fitted(detector, data, backbone, run, checkpoint):
  """Restores the member that an earlier run kept, or fits a new one, which is then kept."""
  if checkpoint and checkpoint.exists():
    return store.restore(checkpoint, expected={
        'detector': detector.member.name, 'settings': detector.member.fit_settings(), 'seed': run.seed,
        'backbones': [streaming.network_fields(backbone)], 'preprocessing': to_json(data.preprocessing)})
  model = detector.member.fit(data, (backbone,), run)
  if checkpoint and processes.is_first():
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    store.save(checkpoint, model)
  return model


def _combined(parts, model, places, several):
  """Combines the `ScoreFn`s of the members. With `several`, the function returns a tuple, as theirs do."""
  mean, std = (model.arrays[name][:, places] for name in ('mean', 'std'))
  fn = _combined_fn(tuple(part.fn for part in parts), tuple(len(part.parameters) for part in parts), several)
  parameters = tuple(p for part in parts for p in part.parameters)
  sharded = tuple(s for part in parts for s in (part.sharded or (False,) * len(part.parameters)))
  return ScoreFn(fn, (*parameters, np.stack([mean, std]).astype(np.float32)), (*sharded, False))


@functools.lru_cache(maxsize=16)
def _combined_fn(fns, counts, several):
  """Makes the combined function (parameters, images) -> `Scores`.

  The parameters are those of all members, then means and deviations [2, members, ratios].

  Args:
    fns: the members' functions.
    counts: how many of the parameters belong to each.
    several: whether the functions return a tuple, the `Scores` of each ratio, as this one then does.
  """

  def score(parameters, images):
    *parameters, spread = parameters
    results, begin = [], 0
    for fn, count in zip(fns, counts, strict=True):
      found = fn(tuple(parameters[begin:begin + count]), images)
      results.append(found if several else (found,))
      begin += count
    means = tuple(_mean(scores, spread[..., i]) for i, scores in enumerate(zip(*results, strict=True)))
    return means if several else means[0]

  return score


def _mean(results, spread):
  """Averages the members' `Scores`, each normalised by its (mean, std).

  Of the shares of the images that members leave out, the largest is told.
  """
  def of(values):
    if any(v is None for v in values):
      return None
    return sum((v - mean) / std for v, mean, std in zip(values, *spread, strict=True)) / len(values)

  shares = [r.evidence['background_share'] for r in results if 'background_share' in r.evidence]
  return Scores(
      of([r.image for r in results]), of([r.map for r in results]),
      {'background_share': functools.reduce(jnp.maximum, shares)} if shares else {})
