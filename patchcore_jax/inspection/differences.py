"""How far scores are off where another kind of device computes the network: the allowances of thresholds."""

from collections.abc import Sequence

import numpy as np

from patchcore_jax import backbones
from patchcore_jax.backbones import Backbone
from patchcore_jax.banks.model import Model
from patchcore_jax.detectors import CrossScores, Data, Detector
from patchcore_jax.detectors.cross_fitting import score_maxima
from patchcore_jax.settings import SearchSpec

SAMPLE = 32  # images that tell how far scores are off elsewhere


def sample_of(model: Model, needed: int, seed: int = 0) -> tuple[np.ndarray, Model]:
  """Draws some of a bank's training images, and takes their patches out of the bank.

  The images are then as good as new to it.

  Args:
    needed: patches that scores need; where the others are too few for that, the bank stays whole.

  Returns:
    The positions of at most 32 images and of at most half of them, ascending, and a bank of the patches of
    the others. A model without patches stays as it is.
  """
  n = model.description.num_images
  sample = np.sort(np.random.default_rng(seed).permutation(n)[:min(SAMPLE, n // 2)])
  if 'indices' not in model.arrays:
    return sample, model
  indices = np.asarray(model.arrays['indices'])
  others = ~np.isin(indices // (model.description.num_patches // n), sample)
  if others.sum() < needed:
    return sample, model
  rows = {'embeddings': np.asarray(model.arrays['embeddings'])[others], 'indices': indices[others]}
  return sample, model._replace(arrays=model.arrays | rows)


def score_differences(
    detector: Detector, model: Model, data: Data, networks: Sequence[Backbone],
    search: SearchSpec | None = None) -> CrossScores:
  """Measures how far scores of good images are off where another kind of device computes the network.

  Args:
    model: a model without patches of these images.
    data: good images, which are read twice.
    networks: networks with `elsewhere`; where none has it, nothing is computed.

  Returns:
    The differences of the images' scores and of the largest values of their maps; [0] where nothing differs.
  """
  if all(network.elsewhere is None for network in networks):
    return CrossScores(np.zeros(0, np.float32), np.zeros(0, np.float32))
  here, there = (
      score_maxima(detector, model, data, found, search)
      for found in (networks, tuple(map(backbones.computed_elsewhere, networks))))
  return CrossScores(*(None if a is None else np.abs(b - a) for a, b in zip(here, there, strict=True)))
