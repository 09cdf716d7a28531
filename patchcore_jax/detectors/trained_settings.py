"""The methods whose network is trained on the good images: their settings. It imports no JAX."""

import dataclasses
import itertools
import math
from typing import ClassVar

from patchcore_jax.detectors.base import Detector


@dataclasses.dataclass(frozen=True)
class Trained(Detector):
  """What all of them have. The defaults of each are a setting that takes minutes on two cores.

  Most need no pretrained network. The `method` of each is a module with a function `method`, which makes a
  `detectors.trained.Method`.

  Attributes:
    size: side of the square that images are brought to before the network, in pixels.
    batch_size: images of a step.
    steps: steps of the training; with 0 the network stays as it starts, for comparison.
    learning_rate: that of the optimiser, Adam.
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
  trains: ClassVar[bool] = True
  least_batch: ClassVar[int] = 2  # such as batch norm takes
  method: ClassVar[str] = ''

  size: int = 128
  batch_size: int = 32
  steps: int = 1000
  learning_rate: float = 5e-4
  minutes: float = 0.0
  held_out: float = 0.0
  standardise: bool = False

  def fewest_images(self, num_defects: int = 0) -> int:
    return next(
        n for n in itertools.count(1)
        if n - round(self.held_out * n) + num_defects >= self.batch_size)

  @property
  def in_short(self) -> str:
    standardised = ', standardised' if self.standardise else ''
    trained = f'{self.steps} steps of {self.batch_size}' if self.steps else 'untrained'
    if self.steps and self.minutes:
      trained = f'at most {trained} and {self.minutes:g} minutes'
    return f'{self.size} px, {trained}{standardised}'

  def __post_init__(self):
    for name, least in (('size', 16), ('batch_size', self.least_batch), ('steps', 0)):
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

  def _check_counts(self, *names: str) -> None:
    """Refuses fields that are less than 1."""
    for name in names:
      if getattr(self, name) < 1:
        raise ValueError(f'{self.name}.{name}={getattr(self, name)}: expected at least 1.')

  def _check_size(self, multiple: int) -> None:
    """Refuses a size that the network cannot halve often enough."""
    if self.size % multiple:
      raise ValueError(f'{self.name}.size={self.size}: expected a multiple of {multiple}.')

  def _check_power_of_two(self) -> None:
    """Refuses a size that the network cannot halve down to 4 pixels."""
    if self.size & (self.size - 1):
      raise ValueError(f'{self.name}.size={self.size}: expected a power of two.')


@dataclasses.dataclass(frozen=True)
class Autoencoder(Trained):
  """What the methods have that share AE-SSIM's network, and restore whole images or pieces.

  Attributes:
    latent: numbers that an image is squeezed into.
    crop: side of the pieces that are restored, as for textures: at random places in training, and everywhere
      in scoring; 0 for the whole image.
    stride: pixels between two pieces in scoring.
    flip: how images may be mirrored in training: 'none', 'horizontal' or 'both'.
    turn: by how many degrees to either side 30 % of them are turned.
  """

  latent: int = 100
  crop: int = 0
  stride: int = 30
  flip: str = 'none'
  turn: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    self._check_choice('flip', ('none', 'horizontal', 'both'))
    self._check_size(16)
    if self.latent < 1 or self.stride < 1 or not 0 <= self.turn <= 180:
      raise ValueError(
          f'{self.name}.latent={self.latent}, stride={self.stride}, turn={self.turn}: expected at least '
          '1 and 1, and 0 to 180 degrees.')
    if self.crop % 16 or not 0 <= self.crop <= self.size:
      raise ValueError(
          f'{self.name}.crop={self.crop}: expected a multiple of 16, at most size={self.size}; or 0.')


@dataclasses.dataclass(frozen=True)
class AESSIM(Autoencoder):
  """AE-SSIM (Bergmann et al., "Improving Unsupervised Defect Segmentation by Applying Structural Similarity
  to Autoencoders", VISAPP 2019): an auto-encoder trained and read out by structural similarity.

  Attributes:
    window: side of the windows whose similarity is compared, in pixels.
    constants: those of SSIM: 'squared', or 'as_written' in the paper, whose publications differ.
  """

  name: ClassVar[str] = 'ae_ssim'
  title: ClassVar[str] = 'AE-SSIM'
  method: ClassVar[str] = 'patchcore_jax.detectors.ae_ssim'
  only_scoring: ClassVar[tuple[str, ...]] = ('stride',)

  window: int = 11
  constants: str = 'squared'

  def __post_init__(self):
    super().__post_init__()
    self._check_choice('constants', ('squared', 'as_written'))
    if not 2 <= self.window <= (self.crop or self.size):
      raise ValueError(
          f'ae_ssim.window={self.window}: expected 2 to {self.crop or self.size} pixels.')


@dataclasses.dataclass(frozen=True)
class CAVGA(Trained):
  """CAVGA (Venkataramanan et al., "Attention Guided Anomaly Localization in Images", ECCV 2020): an
  auto-encoder against a discriminator, whose attention is trained to cover all of a good image. What it does
  not cover is anomalous.

  The paper's weights of losses are 1, but for 0.01 of the attention and 0.001 of the classifier. Its encoder
  is ResNet-18, as with widths (64, 64, 128, 256, 512), and its networks start from trained weights.

  Attributes:
    weak: whether a classifier learns from some labelled defects too, and the attention is the one for its
      class of good images (CAVGA-R_w); otherwise it is from good images alone (CAVGA-R_u).
    widths: channels of the encoder's stages, each of which halves the size. The discriminator has five
      layers, of 1, 2, 4, 8 and 8 times the first.
    latent: channels of the map of codes.
    attention: how an attention map is brought to the range from 0 to 1: 'sigmoid' as in the paper, or
      'minmax' by its least and largest value.
    reconstruction: how restored images are compared: 'bce' (binary cross-entropy) or 'l2'.
    kl_weight: the weight of the codes' divergence from N(0, I), which is taken per value of an image.
    adversarial_weight: the weight of the discriminator's verdict on restored images. With the paper's 1 it
      counts far more than what is restored, where that is a mean over pixels as here.
    attention_weight: the weight of what the attention does not cover.
    classifier_weight: the weight of the classifier's error, in the weak form.
    beta: Adam's decay of its mean of gradients.
    image_score: an image's score is its 'reconstruction' error, the largest value of its 'map', or the
      probability of a defect by the 'classifier' of the weak form.
  """

  name: ClassVar[str] = 'cavga'
  title: ClassVar[str] = 'CAVGA'
  method: ClassVar[str] = 'patchcore_jax.detectors.cavga'
  only_scoring: ClassVar[tuple[str, ...]] = ('image_score',)

  batch_size: int = 16
  steps: int = 400
  learning_rate: float = 1e-3
  weak: bool = False
  widths: tuple[int, ...] = (16, 32, 64, 128)
  latent: int = 32
  attention: str = 'sigmoid'
  reconstruction: str = 'bce'
  kl_weight: float = 1.0
  adversarial_weight: float = 0.01
  attention_weight: float = 0.01
  classifier_weight: float = 0.001
  beta: float = 0.5
  image_score: str = 'reconstruction'

  @property
  def row(self) -> str:
    return 'CAVGA-Rw' if self.weak else 'CAVGA-Ru'

  @property
  def uses_defects(self) -> bool:  # type: ignore[override]  # a constant of all methods but this
    return self.weak

  def __post_init__(self):
    super().__post_init__()
    self._check_choice('attention', ('sigmoid', 'minmax'))
    self._check_choice('reconstruction', ('bce', 'l2'))
    self._check_choice('image_score', ('reconstruction', 'map', 'classifier'))
    if self.image_score == 'classifier' and not self.weak:
      raise ValueError("cavga.image_score='classifier': expected weak=True, which trains one.")
    if self.image_score == 'map' and self.attention == 'minmax':
      raise ValueError("cavga.image_score='map': every map has the maximum 1 with attention='minmax'.")
    if not self.widths or min(*self.widths, self.latent) < 1:
      raise ValueError(f'cavga.widths={self.widths}, latent={self.latent}: expected at least 1 of each.')
    self._check_size(2 ** max(5, len(self.widths)))
    weights = {name: getattr(self, name) for name in vars(self) if name.endswith('_weight')}
    for name, value in weights.items():
      if not 0 <= value < math.inf:
        raise ValueError(f'cavga.{name}={value}: expected 0 or more.')
    if not 0 <= self.beta < 1:
      raise ValueError(f'cavga.beta={self.beta}: expected 0 or more, and less than 1.')


@dataclasses.dataclass(frozen=True)
class GammaVAE(Autoencoder):
  """gamma-VAE + grad (Dehaene et al., "Iterative energy-based projection on a normal data manifold for
  anomaly localization", ICLR 2020): an image is moved until a variational auto-encoder restores it.

  The energy of an image is the squared error of its restoration, and how far it has been moved.

  Attributes:
    variance_rate: how many times as fast as the weights the variance of restored values is learned (the
      paper's gamma); 0 to take the best for each batch, which is the mean squared error.
    map: 'projection' for how far each pixel was moved; 'residual' for its distance from the restored one.
    moves: steps of an image down its energy, at most.
    rate: of these steps; for an image whose energy would rise it is halved.
    closeness: weight of the distance from the image as it came, among its energy.
    through_network: whether gradients take account of how restorations change with the image.
  """

  name: ClassVar[str] = 'gamma_vae'
  title: ClassVar[str] = 'gamma-VAE + grad'
  method: ClassVar[str] = 'patchcore_jax.detectors.gamma_vae'
  only_scoring: ClassVar[tuple[str, ...]] = ('map', 'moves', 'rate', 'closeness', 'through_network')

  steps: int = 800
  variance_rate: float = 0.0
  map: str = 'projection'
  moves: int = 50
  rate: float = 0.5
  closeness: float = 0.05
  through_network: bool = True

  @property
  def row(self) -> str:
    return 'γ-VAE + grad.' if self.map == 'projection' else 'γ-VAE'

  def __post_init__(self):
    super().__post_init__()
    self._check_choice('map', ('projection', 'residual'))
    if self.moves < 1 or not self.rate > 0:
      raise ValueError(
          f'gamma_vae.moves={self.moves}, rate={self.rate}: expected at least 1, and more than 0.')
    if self.variance_rate < 0 or self.closeness < 0:
      raise ValueError(
          f'gamma_vae.variance_rate={self.variance_rate}, closeness={self.closeness}: expected 0 or more.')


@dataclasses.dataclass(frozen=True)
class ExplainedVAE(Trained):
  """Visually explained VAE (Liu et al., "Towards Visually Explaining Variational Autoencoders", CVPR 2020):
  how much each place of a layer counts for the code of a variational auto-encoder.

  Attributes:
    latent: numbers of a code.
    width: channels of the first stage; each of the three others has twice as many. ResNet-18 has 64.
    deviation: standard deviation of the values of an image, from -1 to 1, about the restored ones. The
      larger, the less they count beside the divergence of codes from a normal distribution.
    layer: the stage, 1 to 4, at whose end attention is computed.
    inference: 'mean_sum' for the attention of the sum of a code; 'per_latent' for the mean of what is
      positive in the attention of each of its numbers.
    flip: how images may be mirrored in training: 'none', 'horizontal' or 'both'.
    turn: by how many degrees to either side they are turned.
  """

  name: ClassVar[str] = 'explained_vae'
  title: ClassVar[str] = 'Visually explained VAE'
  method: ClassVar[str] = 'patchcore_jax.detectors.explained_vae'
  only_scoring: ClassVar[tuple[str, ...]] = ('layer', 'inference')

  steps: int = 300
  learning_rate: float = 1e-3
  latent: int = 32
  width: int = 16
  deviation: float = 0.1
  layer: int = 2
  inference: str = 'mean_sum'
  flip: str = 'horizontal'
  turn: float = 90.0

  @property
  def row(self) -> str:
    return 'vis. expl. VAE'

  def __post_init__(self):
    super().__post_init__()
    self._check_choice('inference', ('mean_sum', 'per_latent'))
    self._check_choice('flip', ('none', 'horizontal', 'both'))
    self._check_size(32)
    if self.latent < 1 or self.width < 1 or not self.deviation > 0:
      raise ValueError(
          f'explained_vae.latent={self.latent}, width={self.width}, deviation={self.deviation}: expected at '
          'least 1 and 1, and more than 0.')
    if not 1 <= self.layer <= 4 or not 0 <= self.turn <= 180:
      raise ValueError(
          f'explained_vae.layer={self.layer}, turn={self.turn}: expected 1 to 4, and 0 to 180 degrees.')


@dataclasses.dataclass(frozen=True)
class GANomaly(Trained):
  """GANomaly (Akcay et al., "GANomaly: Semi-Supervised Anomaly Detection via Adversarial Training", ACCV
  2018): an image scores how far its code is from that of its reconstruction.

  Attributes:
    filters: channels of the first layer, which every further one doubles.
    latent: numbers that an image is squeezed into.
    adversarial_weight: of the distance between the discriminator's features, in the generator's loss.
    contextual_weight: of the distance between images and reconstructions there.
    latent_weight: of the distance between the codes there.
    distance: of the codes, for the score: 'squared', as the authors' code has it, or 'absolute'.
    bn: how batch norms are used in scoring: with 'running' statistics of the training, or 'batch1', with
      those of each image alone, near to what the authors' code does.
    maps: whether there are anomaly maps, the differences to reconstructions; the paper has none.
  """

  name: ClassVar[str] = 'ganomaly'
  title: ClassVar[str] = 'GANomaly'
  method: ClassVar[str] = 'patchcore_jax.detectors.ganomaly'
  only_scoring: ClassVar[tuple[str, ...]] = ('distance', 'bn', 'maps')

  size: int = 64
  steps: int = 600
  learning_rate: float = 2e-4
  filters: int = 32
  latent: int = 100
  adversarial_weight: float = 1.0
  contextual_weight: float = 50.0
  latent_weight: float = 1.0
  distance: str = 'squared'
  bn: str = 'running'
  maps: bool = False

  def __post_init__(self):
    super().__post_init__()
    self._check_power_of_two()
    self._check_choice('distance', ('squared', 'absolute'))
    self._check_choice('bn', ('running', 'batch1'))
    if self.filters < 1 or self.latent < 1:
      raise ValueError(f'ganomaly.filters={self.filters}, latent={self.latent}: expected at least 1.')
    for name in ('adversarial_weight', 'contextual_weight', 'latent_weight'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(f'ganomaly.{name}={getattr(self, name)}: expected 0 or more.')


@dataclasses.dataclass(frozen=True)
class DSEBM(Trained):
  """DSEBM (Zhai et al., "Deep Structured Energy Based Models for Anomaly Detection", ICML 2016): an energy
  whose gradient is trained to take noise from images.

  Its maps are the squares of the gradient, whatever the score. How bright an image is counts much in the
  energy: see `standardise`.

  Attributes:
    filters: channels of the first layer, which every further one doubles.
    hidden: features whose sum lowers the energy.
    activation: of these features: 'relu', or 'softplus' as in the paper.
    noise: standard deviation of the noise in training, where images have values from -1 to 1.
    score: an image's is its 'energy' (DSEBM-e), or its 'reconstruction' error, the squared norm of the
      energy's gradient (DSEBM-r).
  """

  name: ClassVar[str] = 'dsebm'
  title: ClassVar[str] = 'DSEBM'
  method: ClassVar[str] = 'patchcore_jax.detectors.dsebm'
  only_scoring: ClassVar[tuple[str, ...]] = ('score',)

  size: int = 32
  learning_rate: float = 1e-3
  filters: int = 64
  hidden: int = 256
  activation: str = 'relu'
  noise: float = 0.5
  score: str = 'energy'

  def __post_init__(self):
    super().__post_init__()
    self._check_power_of_two()
    self._check_choice('activation', ('relu', 'softplus'))
    self._check_choice('score', ('energy', 'reconstruction'))
    if self.filters < 1 or self.hidden < 1:
      raise ValueError(f'dsebm.filters={self.filters}, hidden={self.hidden}: expected at least 1.')
    if not 0 < self.noise < math.inf:
      raise ValueError(f'dsebm.noise={self.noise}: expected more than 0.')


@dataclasses.dataclass(frozen=True)
class DifferNet(Trained):
  """DifferNet (Rudolph et al., "Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing
  Flows", WACV 2021): the likelihood of pooled features, by a normalising flow. It makes no maps.

  The features are those of any network's layers, at three scales, of images that are turned. The paper's
  network is AlexNet.

  Attributes:
    turns: views of each training image, turned by as many angles; they pass through the network once, and a
      step sees all views of its images.
    angles: of these views: 'any' for some of each image's own; 'even' for those of scoring, so that with 4
      views there are quarter turns, and none with 1, as where it is a defect that a part is turned.
    test_turns: views of an image that is scored, at angles that part the circle evenly.
    blocks: of the flow.
    hidden: width of its layers; the paper's is 2048.
  """

  name: ClassVar[str] = 'differnet'
  title: ClassVar[str] = 'DifferNet'
  method: ClassVar[str] = 'patchcore_jax.detectors.differnet'
  needs_network: ClassVar[bool] = True
  only_scoring: ClassVar[tuple[str, ...]] = ('test_turns',)

  size: int = 224
  batch_size: int = 12
  steps: int = 2500
  learning_rate: float = 2e-4
  turns: int = 8
  angles: str = 'any'
  test_turns: int = 8
  blocks: int = 8
  hidden: int = 256

  def __post_init__(self):
    super().__post_init__()
    self._check_size(4)
    self._check_choice('angles', ('any', 'even'))
    self._check_counts('turns', 'test_turns', 'blocks', 'hidden')


@dataclasses.dataclass(frozen=True)
class PatchSVDD(Trained):
  """PatchSVDD (Yi and Yoon, "Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation", ACCV
  2020): how far patches of 64 and of 32 pixels are from those of the good images, by codes that are alike for
  patches that nearly coincide, and tell where patches lie beside each other.

  A step has a pair of patches of either kind and size of each of its images.

  Attributes:
    width: channels of the encoder's first layer; the authors' is 32.
    code: numbers of a code.
    closeness: weight of the distance between the codes of patches that nearly coincide, in the loss. Where it
      is too large, all codes become the same.
    bank_ratio: share of all codes that are kept, those that greedy k-center selects; the authors keep all.
  """

  name: ClassVar[str] = 'patch_svdd'
  title: ClassVar[str] = 'PatchSVDD'
  module: ClassVar[str] = 'patchcore_jax.detectors.patch_svdd'
  method: ClassVar[str] = 'patchcore_jax.detectors.patch_svdd'

  size: int = 256
  steps: int = 800
  width: int = 16
  code: int = 64
  closeness: float = 1e-3
  bank_ratio: float = 0.05

  def __post_init__(self):
    super().__post_init__()
    self._check_size(16)
    self._check_counts('width', 'code')
    if self.size < 64:
      raise ValueError(f'patch_svdd.size={self.size}: expected at least 64, as large patches have.')
    if not 0 <= self.closeness < math.inf or not 0 < self.bank_ratio <= 1:
      raise ValueError(
          f'patch_svdd.closeness={self.closeness}, bank_ratio={self.bank_ratio}: expected 0 or more, and '
          'more than 0, at most 1.')


@dataclasses.dataclass(frozen=True)
class Student(Trained):
  """Uninformed students (Bergmann et al., "Uninformed Students: Student-Teacher Anomaly Detection with
  Discriminative Latent Embeddings", CVPR 2020): a small network that describes patches, the teacher, is
  imitated by others on good images. They fail, and disagree, on anything else.

  The teacher learns to describe patches as a pretrained network does, any one, on images drawn by program in
  place of the paper's ImageNet. It is distilled once for all fits of a process with the same network and
  seed.

  Attributes:
    field: what a descriptor sees, 17, 33 or 65 pixels across.
    width: channels of the first layer; the paper's is 128.
    descriptor: numbers that describe a patch; the paper's are 128.
    students: how many; the paper's are 3.
    dense: whether there is a descriptor for every pixel, as in the paper; else for every 4th with a field of
      33, and for every 8th with 65, which takes 5 to 9 times less.
    teacher_steps: steps of 64 patches; with 0 the teacher stays as it starts, for comparison.
    compactness: what must not be correlated in the teacher's descriptors: 'dimensions' over patches, as in
      the paper, or 'samples', as public implementations have it.
  """

  name: ClassVar[str] = 'student'
  title: ClassVar[str] = 'Student'
  method: ClassVar[str] = 'patchcore_jax.detectors.student'
  needs_network: ClassVar[bool] = True
  least_batch: ClassVar[int] = 1

  batch_size: int = 4
  steps: int = 800
  learning_rate: float = 4e-4
  held_out: float = 0.1
  field: int = 33
  width: int = 32
  descriptor: int = 32
  students: int = 2
  dense: bool = False
  teacher_steps: int = 2000
  compactness: str = 'dimensions'

  def __post_init__(self):
    super().__post_init__()
    if self.field not in (17, 33, 65):
      raise ValueError(f'student.field={self.field}: expected 17, 33 or 65.')
    self._check_choice('compactness', ('dimensions', 'samples'))
    self._check_counts('width', 'descriptor', 'students')
    self._check_size(8)
    if self.size < (least := 8 * (self.field // 16 + 1)):  # as borders are mirrored
      raise ValueError(
          f'student.size={self.size}: expected at least {least} for a field of {self.field} pixels.')
    if self.teacher_steps < 0:
      raise ValueError(f'student.teacher_steps={self.teacher_steps}: expected 0 or more.')


@dataclasses.dataclass(frozen=True)
class GeoTrans(Trained):
  """GeoTrans (Golan and El-Yaniv, "Deep Anomaly Detection Using Geometric Transformations", NeurIPS 2018): a
  network tells which of 72 transformations was applied to an image. It makes no maps.

  An image scores how unlike its answers are to those for the good images, of which a Dirichlet distribution
  is fitted for each transformation. With textures that look the same when they are turned it cannot work.

  Attributes:
    at_once: transformations of each image of a step, of the 72.
    depth: of the wide residual network, 6 n + 4; the authors have 10 at 32 pixels, and 16 at 64.
    width: its channels, times 16, 32 and 64; the authors have 4 and 8.
    score: 'dirichlet' as in the paper, or 'simple', by the mean probability of what was applied.
  """

  name: ClassVar[str] = 'geotrans'
  title: ClassVar[str] = 'GeoTrans'
  method: ClassVar[str] = 'patchcore_jax.detectors.geotrans'
  only_scoring: ClassVar[tuple[str, ...]] = ('score',)

  size: int = 32
  batch_size: int = 16
  steps: int = 500
  learning_rate: float = 1e-3
  at_once: int = 8
  depth: int = 10
  width: int = 2
  score: str = 'dirichlet'

  def __post_init__(self):
    super().__post_init__()
    self._check_size(16 if self.size == 16 else 32)
    self._check_choice('score', ('dirichlet', 'simple'))
    self._check_counts('width')
    if not 1 <= self.at_once <= 72:
      raise ValueError(f'geotrans.at_once={self.at_once}: expected 1 to 72.')
    if self.depth < 10 or (self.depth - 4) % 6:
      raise ValueError(f'geotrans.depth={self.depth}: expected 6 n + 4, at least 10.')


@dataclasses.dataclass(frozen=True)
class ITAE(Trained):
  """ITAE (Ye et al., "Attribute Restoration Framework for Anomaly Detection", 2019): colour and orientation
  are taken from an image, and a network restores it.

  An image scores its mean error, for each of four quarter turns in units of that of the good images; of those
  that are held out, where there are any. Where good images are gray, colour is nothing to be restored, and
  the network learns little.

  Attributes:
    width: channels of the first level of the network; the public implementation's is 64.
    flip: how images may be mirrored in training: 'none', 'horizontal' or 'both'.
    optimizer: 'adam', or the published 'sgd' with a rate that is halved at every tenth of the steps, which is
      slow where these are few.
  """

  name: ClassVar[str] = 'itae'
  title: ClassVar[str] = 'ITAE'
  method: ClassVar[str] = 'patchcore_jax.detectors.itae'

  size: int = 64
  steps: int = 600
  learning_rate: float = 1e-3
  width: int = 16
  flip: str = 'horizontal'
  optimizer: str = 'adam'

  def __post_init__(self):
    super().__post_init__()
    self._check_size(16)
    self._check_choice('flip', ('none', 'horizontal', 'both'))
    self._check_choice('optimizer', ('adam', 'sgd'))
    self._check_counts('width')
    if self.minutes and self.optimizer == 'sgd':
      raise ValueError(
          f"itae.minutes={self.minutes}: with optimizer='sgd' the rate follows the number of steps; expected "
          '0, and fewer steps.')
