"""The methods whose network is trained on the good images: their settings. It imports no JAX."""

import dataclasses
from typing import ClassVar

from patchcore_jax.detectors.base import Detector


@dataclasses.dataclass(frozen=True)
class Trained(Detector):
  """What all of them have. The defaults of each are a setting that takes minutes on two cores.

  Such a method needs no pretrained network. Its `method` is a module with a function `method(detector)`,
  which makes a `detectors.trained.Method`.

  Attributes:
    size: side of the square that images are brought to before the network, in pixels.
    batch_size: images of a step.
    steps: steps of the training.
    learning_rate: Adam's.
    minutes: the most that the training may take: a step is measured, and fewer are made where they would take
      longer. 0 for all steps.
    held_out: share of the good images that are not trained on. The weights that are kept have the lowest loss
      on them, seen at twenty moments; with 0 they are those of the last step.
    standardise: brings every image to the same mean and deviation first, so that how bright it is tells
      nothing.

  Raises:
    ValueError: values out of range.
  """

  module: ClassVar[str] = 'patchcore_jax.detectors.trained'
  needs_network: ClassVar[bool] = False
  method: ClassVar[str] = ''

  size: int = 128
  batch_size: int = 32
  steps: int = 1000
  learning_rate: float = 5e-4
  minutes: float = 0.0
  held_out: float = 0.0
  standardise: bool = False

  @property
  def in_short(self) -> str:
    standardised = ', standardised' if self.standardise else ''
    return f'{self.size} px, {self.steps} steps of {self.batch_size}{standardised}'

  def __post_init__(self):
    for name, least in (('size', 16), ('batch_size', 2), ('steps', 1)):
      if getattr(self, name) < least:
        raise ValueError(f'{self.name}.{name}={getattr(self, name)}: expected at least {least}.')
    if not 0 < self.learning_rate <= 1:
      raise ValueError(f'{self.name}.learning_rate={self.learning_rate}: expected more than 0, at most 1.')
    if self.minutes < 0:
      raise ValueError(f'{self.name}.minutes={self.minutes}: expected 0 or more.')
    if not 0 <= self.held_out <= 0.5:
      raise ValueError(f'{self.name}.held_out={self.held_out}: expected 0 to 0.5.')

  def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is none of some choices."""
    if getattr(self, name) not in choices:
      raise ValueError(f'{self.name}.{name}={getattr(self, name)!r}: expected one of {", ".join(choices)}.')

  def _check_size(self, multiple: int) -> None:
    """Refuses a size that the network cannot halve often enough."""
    if self.size % multiple:
      raise ValueError(f'{self.name}.size={self.size}: expected a multiple of {multiple}.')


@dataclasses.dataclass(frozen=True)
class AESSIM(Trained):
  """AE-SSIM (Bergmann et al., "Improving Unsupervised Defect Segmentation by Applying Structural Similarity
  to Autoencoders", VISAPP 2019): an auto-encoder trained and read out by structural similarity.

  Attributes:
    latent: numbers that an image is squeezed into.
    crop: side of the pieces that are reconstructed, as for textures: at random places in training, and
      everywhere in scoring; 0 for the whole image.
    stride: pixels between two pieces in scoring.
    window: side of the windows whose similarity is compared, in pixels.
    constants: those of SSIM: 'squared', or 'as_written' in the paper, whose publications differ.
    flip: how images may be mirrored in training: 'none', 'horizontal' or 'both'.
    turn: by how many degrees to either side 30 % of them are turned.
  """

  name: ClassVar[str] = 'ae_ssim'
  title: ClassVar[str] = 'AE-SSIM'
  method: ClassVar[str] = 'patchcore_jax.detectors.ae_ssim'
  only_scoring: ClassVar[tuple[str, ...]] = ('stride',)

  latent: int = 100
  crop: int = 0
  stride: int = 30
  window: int = 11
  constants: str = 'squared'
  flip: str = 'none'
  turn: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    self._check_choice('flip', ('none', 'horizontal', 'both'))
    self._check_choice('constants', ('squared', 'as_written'))
    self._check_size(16)
    if self.latent < 1 or self.stride < 1 or self.window < 2 or not 0 <= self.turn <= 180:
      raise ValueError(
          f'ae_ssim.latent={self.latent}, stride={self.stride}, window={self.window}, turn={self.turn}: '
          'expected at least 1, 1 and 2, and 0 to 180 degrees.')
    if self.crop % 16 or not 0 <= self.crop <= self.size:
      raise ValueError(
          f'ae_ssim.crop={self.crop}: expected a multiple of 16, at most size={self.size}; or 0.')
    if self.window > (self.crop or self.size):
      raise ValueError(f'ae_ssim.window={self.window}: expected at most {self.crop or self.size} pixels.')
