"""The record of a frozen network, and what is done with one: images in, feature maps out."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# (variables, images [b, h, w, 3] float32) -> {layer: [b, h', w', c] float32}
Apply = Callable[[Any, jax.Array], Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A frozen feature extractor.

  Attributes:
    apply: pure function (variables, images [b, h, w, 3] float32) -> {layer: [b, h', w', c] float32}.
    variables: pytree of arrays.
    layers: names of the layers used when none are asked for, shallow to deep.
    mean, std: three floats each; images reach `apply` as (rgb / 255 - mean) / std.
    name: what made it, for logs and for the description of a memory bank.
    precision: precision of its products, also for the description.
    source: the arguments name, weights and seed of `create` that make it again; None for a network that
      `create` did not make.
    elsewhere: `apply` as devices of another kind than this one compute it, or None where they compute the
      same: see `computed_elsewhere`.
  """

  apply: Apply
  variables: Any
  layers: tuple[str, ...]
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  name: str = ''
  precision: str = 'float32'
  source: tuple[str, str, int] | None = None
  elsewhere: Apply | None = None


def computed_elsewhere(backbone: Backbone) -> Backbone:
  """Returns the network as other kinds of devices compute it: what a bank made here must allow for there.

  For a GPU's or TPU's own arithmetic, that is the network in float32. For tensorfloat32 on a CPU,
  which computes it as float32, it is what a GPU makes of it. In float32 all devices compute the same, and for
  a network from a factory nothing else is known on a CPU: then this is the backbone itself.
  """
  return dataclasses.replace(backbone, apply=backbone.elsewhere or backbone.apply)


@functools.partial(jax.tree_util.register_dataclass, data_fields=['maps'], meta_fields=['image_size'])
@dataclasses.dataclass(frozen=True)
class FeatureMaps:
  """The maps that a network made of a batch of images, in their place: see `without_network`.

  Attributes:
    maps: {layer: [b, h', w', c] float32}.
    image_size: (height, width) of the images.
  """

  maps: dict[str, Any]
  image_size: tuple[int, int]

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """The shape of the images."""
    return len(self), *self.image_size, 3

  def __len__(self) -> int:
    return len(next(iter(self.maps.values())))


def without_network(backbone: Backbone) -> Backbone:
  """Returns the backbone for batches of `FeatureMaps` in place of images; for experiments that share them."""
  return dataclasses.replace(backbone, apply=_maps_as_they_are)


def _maps_as_they_are(variables, features):
  return features.maps


def normalize(
    images: jax.Array | FeatureMaps, mean: Sequence[float], std: Sequence[float]
) -> jax.Array | FeatureMaps:
  """Normalises uint8 [..., 3] to float32 (rgb / 255 - mean) / std, as PyTorch's ToTensor and Normalize do.

  `FeatureMaps` stay as they are.

  >>> normalize(jnp.full((1, 1, 3), 255, jnp.uint8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.25))
  Array([[[1., 1., 2.]]], dtype=float32)
  """
  if isinstance(images, FeatureMaps):
    return images
  scaled = images.astype(jnp.float32) / 255
  return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def fingerprint(variables: Any) -> str:
  """Computes 16 hexadecimal digits that change with any weight, to tell checkpoints of one name apart."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    leaf = np.asarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}'.encode())
    digest.update(np.ascontiguousarray(leaf).data)
  return digest.hexdigest()[:16]
