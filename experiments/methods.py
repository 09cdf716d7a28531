"""config.detector -> a method: fits (or restores) a model, predicts with it. For the binaries."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.images import Images
from experiments.wiring import Settings
from patchcore_jax import inspection, processes
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks import provenance, store
from patchcore_jax.banks.store import MemoryBank
from patchcore_jax.detectors import ensemble, mahalanobis_ad, ocsvm, padim, patchcore, spade
from patchcore_jax.detectors.base import Prediction, Progress


def create(config: ConfigDict, settings: Settings, backbones: tuple[Backbone, ...]):
  """The method that the config names: `PatchCore`, `Ensemble` of them, or `Other`.

  Raises:
    ValueError: an unknown name, or several backbones for a detector that takes one.
  """
  if config.detector == 'patchcore':
    names = config.backbone.name.split('+')
    members = tuple(
        PatchCore(config, settings, backbone, name.strip())
        for backbone, name in zip(backbones, names, strict=True))
    return members[0] if len(members) == 1 else Ensemble(members)
  if len(backbones) > 1:
    raise ValueError(f"Several backbones make an ensemble of detector='patchcore', not {config.detector!r}.")
  (backbone,), seed = backbones, config.seed
  fields = dict(config[config.detector])
  if config.detector == 'padim':
    return Other(padim, padim.Spec(**fields, seed=seed), backbone, scratch=True)
  if config.detector == 'spade':
    return Other(spade, spade.Spec(**fields), backbone, scratch=True, search=settings.search)
  module = {'mahalanobis_ad': mahalanobis_ad, 'ocsvm': ocsvm}[config.detector]
  return Other(module, module.Spec(**fields), backbone)


class PatchCore:
  """PatchCore with one backbone; its bank is kept at `path` and found there again."""

  def __init__(self, config: ConfigDict, settings: Settings, backbone: Backbone, name: str):
    self.backbone, self._settings, self._memory_gb = backbone, settings, config.fit.memory_gb
    self._source = {'name': name, 'weights': config.backbone.weights, 'seed': config.seed}

  def obtain(
      self, path: Path, images: Images, notify: Callable[[Any], None], progress: Progress
  ) -> MemoryBank:
    """The bank at `path`, or a new one, which is then there."""
    settings = self._settings
    expected = patchcore.describe(self.backbone, settings.embedding) | {
        'preprocess': inspection.geometry(settings.preprocessing), 'coreset': vars(settings.coreset),
        'shots': images.shots}
    if path.exists():
      return store.restore(path, expected=expected)
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    part = processes.part(images.num_train)
    recorder = provenance.Recorder(images.train(part), keep_images=False)
    bank = patchcore.fit(
        self.backbone, recorder, part.stop - part.start, embedding=settings.embedding,
        coreset_spec=settings.coreset, joint=True, memory_gb=self._memory_gb, scratch=path.parent,
        notify=notify, progress=progress)
    index = processes.joined(np.array(recorder.index, np.int32) + part.start)
    bank.description.update(
        expected, scoring=vars(settings.scoring), source=self._source, device=jax.default_backend(),
        images=images.train_names(index), category=images.name,
        num_skipped=images.num_train - bank.description['num_images'],
        fit_seconds=time.monotonic() - began)
    if processes.is_first():
      store.save(path, bank)
    return bank

  def sizes(self, bank: MemoryBank) -> dict[float, int]:
    """Ratio -> number of patches."""
    return dict(zip(self._settings.ratios, bank.sizes(self._settings.ratios), strict=True))

  def describe(self, bank: MemoryBank) -> dict[str, Any]:
    return bank.description

  def predict(self, bank: MemoryBank, batches) -> Iterator[Prediction]:
    return patchcore.predict(
        self.backbone, bank, batches, sizes=tuple(self.sizes(bank).values()), **self.scoring())

  def scoring(self) -> dict[str, Any]:
    """Arguments that scores depend on."""
    settings = self._settings
    return {'embedding': settings.embedding, 'scoring_spec': settings.scoring, 'search': settings.search}


class Ensemble:
  """PatchCore with several backbones; scores are normalised on the training images."""

  def __init__(self, members: tuple[PatchCore, ...]):
    self._members = members

  def obtain(self, path, images, notify, progress):
    """[(bank, statistics)] of the members, whose banks are at path/0, path/1, ..."""
    model = []
    for i, member in enumerate(self._members):
      bank = member.obtain(path / str(i), images, notify, progress)
      model.append((bank, ensemble.statistics(
          member.backbone, bank, images.train(), sizes=tuple(member.sizes(bank).values()),
          progress=progress, **member.scoring())))
    return model

  def sizes(self, model):
    banks = [member.sizes(bank) for member, (bank, _) in zip(self._members, model)]
    return {ratio: sum(sizes[ratio] for sizes in banks) for ratio in banks[0]}

  def describe(self, model):
    descriptions = [bank.description for bank, _ in model]
    return descriptions[0] | {'fit_seconds': sum(d['fit_seconds'] for d in descriptions)}

  def predict(self, model, batches):
    """The members take turns, batch by batch: each is read once, and kept until all had it."""
    copies = itertools.tee(batches, len(model))
    members = [
        member.predict(bank, copy) for member, (bank, _), copy in zip(self._members, model, copies)]
    return ensemble.combine(members, [statistics for _, statistics in model])


@dataclasses.dataclass(frozen=True)
class Other:
  """A detector without a bank. Its model is not kept: it can take gigabytes, and is quickly made."""

  module: ModuleType
  spec: Any
  backbone: Backbone
  scratch: bool = False
  search: Any = None

  def obtain(self, path, images, notify, progress):
    began = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = {'scratch': str(path.parent)} if self.scratch else {}
    model = self.module.fit(
        self.backbone, images.train(), images.num_train, spec=self.spec, progress=progress, **scratch)
    model.description.update(
        num_skipped=images.num_train - model.description['num_images'],
        fit_seconds=time.monotonic() - began)
    return model

  def sizes(self, model):
    return {1.0: None}

  def describe(self, model):
    return model.description

  def predict(self, model, batches):
    search = {'search': self.search} if self.search else {}
    return self.module.predict(self.backbone, model, batches, spec=self.spec, **search)
