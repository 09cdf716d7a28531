"""The contract of a family of networks: one `Family` record in its file, one line of `registry.FAMILIES`."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from patchcore_jax.backbones.backbone import Apply


def _any_size(architecture: str) -> int:
  """Returns 1: the default of `Family.multiple`, for networks that take images of every size."""
  return 1


@dataclasses.dataclass(frozen=True)
class Family:
  """What makes the architectures of one family usable by name.

  All else is written once against these fields: weights from a file or at random, the choice of layers,
  precisions, the check of image sizes, and the layer 'colour' beside those of the network.

  Attributes:
    architectures: their names, without the '.', ':' and '+' that have meanings in the name of a backbone.
    layers: (architecture) -> the names of all its layers, shallow to deep.
    default_layers: (architecture) -> the layers used when none are asked for; 'colour' may be one of them.
    build: (architecture, layers, precision) -> the pure function (variables, images [b, h, w, 3] float32)
      -> {layer: [b, h', w', c] float32} with exactly these layers. A transformer's reshapes its tokens to
      maps; its class token is a map of one cell. It is the same object for the same arguments, because jit
      compiles every new one again.
    init: (architecture, seed) -> random variables of the whole network, a pytree of NumPy arrays.
    state_dict_shapes: (architecture) -> {key: shape} of a checkpoint, in the layout that is published; None
      stands for the shape of what has no use here and may be absent, such as a classifier.
    convert: (state_dict, architecture) -> variables of the whole network, like those of `init`. The keys and
      shapes are those of `state_dict_shapes`: `port.port` has made sure of that.
    truncate: (variables, layers) -> those variables that these layers need.
    multiple: (architecture) -> what the height and the width of images must be multiples of, in pixels: the
      patch size of a transformer. Images of another size are refused when the network is traced.
    precisions: the modes that `build` takes; 'float32' is one of them always.
    auto_precisions: {platform: the mode that 'auto' stands for there}; 'float32' on platforms not named.
    current_key: (key of a checkpoint) -> the key as `state_dict_shapes` spells it, where files of another
      spelling were published too.
  """

  architectures: Collection[str]
  layers: Callable[[str], tuple[str, ...]]
  default_layers: Callable[[str], tuple[str, ...]]
  build: Callable[[str, tuple[str, ...], str], Apply]
  init: Callable[[str, int], Any]
  state_dict_shapes: Callable[[str], Mapping[str, tuple[int, ...] | None]]
  convert: Callable[[Mapping[str, np.ndarray], str], Any]
  truncate: Callable[[Any, Sequence[str]], Any]
  multiple: Callable[[str], int] = _any_size
  precisions: tuple[str, ...] = ('float32',)
  auto_precisions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  current_key: Callable[[str], str] = str
