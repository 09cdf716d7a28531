"""The methods of this package: a record of settings for each, and the table of all. It imports no JAX.

What a method does is in the module that its record names.
"""

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from patchcore_jax.banks.model import Model, from_json, to_json
from patchcore_jax.detectors.base import Detector
from patchcore_jax.detectors.successor_settings import (
    RAD,
    AnomalyDINO,
    MHPatchCore,
    MuSc,
    SoftPatch,
    SuperADD,
)
from patchcore_jax.detectors.trained_settings import (
    AESSIM,
    CAVGA,
    DSEBM,
    ITAE,
    DifferNet,
    ExplainedVAE,
    GammaVAE,
    GANomaly,
    GeoTrans,
    PatchSVDD,
    Student,
)
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, ScoringSpec, check_ratio, embedding_of

# What is enough, by the built-in data: docs/own_images.md.
_ENOUGH, _LARGEST_SHARE = 10_000, 0.25


@dataclasses.dataclass(frozen=True)
class PatchCore(Detector):
  """PatchCore (Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022).

  Attributes:
    ratio: the share of all patches, of images at all angles, that the bank keeps, in (0, 1]; in a fit with
      one network, not in an evaluation, also 0 for a bank that is large enough whatever the number of images:
      10,000 patches, or a quarter of all where that is less.
    embedding: how patches are embedded.
    coreset: how they are selected.
    scoring: how distances become scores.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'patchcore'
  title: ClassVar[str] = 'PatchCore'
  module: ClassVar[str] = 'patchcore_jax.detectors.patchcore'
  has_coreset: ClassVar[bool] = True
  only_scoring: ClassVar[tuple[str, ...]] = ('scoring',)

  ratio: float = 0.1
  embedding: EmbeddingSpec = EmbeddingSpec('auto')
  coreset: CoresetSpec = CoresetSpec()
  scoring: ScoringSpec = ScoringSpec()

  def __post_init__(self):
    if self.ratio:
      check_ratio(self.ratio)
    if self.coreset.method == 'merge_reduce' and self.embedding.rotations > 1:
      raise ValueError(
          f"coreset.method='merge_reduce' is for many images, and embedding.rotations="
          f'{self.embedding.rotations} for few: expected another method, or 1.')
    if self.coreset.method == 'identity' and self.ratio != 1:
      raise ValueError(f"coreset.method='identity' keeps all patches: expected ratio 1, got {self.ratio}.")

  @property
  def changes_images(self) -> bool:  # type: ignore[override]  # a constant of all methods but this
    """Whether the network sees training images turned."""
    return self.embedding.rotations > 1

  def of_size(self, num_patches: int) -> 'PatchCore':
    """Settles the ratio, where it is 0, by the number of all patches.

    >>> PatchCore(ratio=0).of_size(1_000_000).ratio
    0.01
    """
    return self if self.ratio else dataclasses.replace(self, ratio=min(_ENOUGH / num_patches, _LARGEST_SHARE))

  def resolved(self, backbones: Sequence[Any]) -> 'PatchCore':
    """Settles the kind of the embedding, where it is 'auto', by the network."""
    kind = embedding_of(self.embedding.kind, backbones)
    return dataclasses.replace(self, embedding=dataclasses.replace(self.embedding, kind=kind))


@dataclasses.dataclass(frozen=True)
class SPADE(Detector):
  """SPADE (Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences", 2020).

  The defaults are the paper's for MVTec AD (section 3.5). None concerns the fit, which keeps everything.

  Attributes:
    num_images: K, the training images nearest to an image, with which it is compared.
    num_neighbors: kappa, the pixels of those images nearest to a pixel.
    distance: 'squared', as the paper's equations 2 and 3 have it, or 'root'.
    sigma: standard deviation of the Gaussian blur of the anomaly map, in pixels; 0 for none.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'spade'
  title: ClassVar[str] = 'SPADE'
  module: ClassVar[str] = 'patchcore_jax.detectors.spade'
  only_scoring: ClassVar[tuple[str, ...]] = ('num_images', 'num_neighbors', 'distance', 'sigma')
  host_step: ClassVar[str] = (
      'it gathers the training images nearest to an image on the host, between two programs')

  num_images: int = 50
  num_neighbors: int = 1
  distance: str = 'squared'
  sigma: float = 4.0

  def __post_init__(self):
    if self.num_images < 1 or self.num_neighbors < 1:
      raise ValueError(
          f'spade.num_images={self.num_images}, num_neighbors={self.num_neighbors}: expected at least 1.')
    if self.distance not in ('squared', 'root'):
      raise ValueError(f"spade.distance={self.distance!r}: expected 'squared' or 'root'.")
    if not 0 <= self.sigma < math.inf:
      raise ValueError(f'spade.sigma={self.sigma}: expected 0 or more pixels.')

  def fewest_images(self, num_defects: int = 0) -> int:
    return self.num_images


@dataclasses.dataclass(frozen=True)
class PaDiM(Detector):
  """PaDiM (Defard et al., "PaDiM: a Patch Distribution Modeling Framework", ICPR workshops 2020).

  The defaults are the paper's for WideResNet-50.

  Attributes:
    num_dims: channels chosen at random (section III-A); the paper's are 550 for WideResNet-50, 100 for
      ResNet-18. 0 for all.
    epsilon: added to the diagonal of every covariance (section III-B).
    sigma: standard deviation of the Gaussian blur of the anomaly map, in pixels; 0 for none.
    image_score: an image's score is the largest Mahalanobis distance of its positions ('position', as
      section III-C has it) or the largest value of the blurred map ('map', as public implementations
      have it, which is often better).

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'padim'
  title: ClassVar[str] = 'PaDiM'
  module: ClassVar[str] = 'patchcore_jax.detectors.padim'
  only_scoring: ClassVar[tuple[str, ...]] = ('sigma', 'image_score')

  num_dims: int = 550
  epsilon: float = 0.01
  sigma: float = 4.0
  image_score: str = 'position'

  def __post_init__(self):
    if self.image_score not in ('position', 'map'):
      raise ValueError(f"padim.image_score={self.image_score!r}: expected 'position' or 'map'.")
    if self.num_dims < 0:
      raise ValueError(f'padim.num_dims={self.num_dims}: expected 0 or more.')
    if not 0 < self.epsilon < math.inf:
      raise ValueError(f'padim.epsilon={self.epsilon}: expected more than 0.')
    if not 0 <= self.sigma < math.inf:
      raise ValueError(f'padim.sigma={self.sigma}: expected 0 or more pixels.')


@dataclasses.dataclass(frozen=True)
class MahalanobisAD(Detector):
  """MahalanobisAD (Rippel et al., "Modeling the Distribution of Normal Data in Pre-Trained Deep Features
  for Anomaly Detection", ICPR 2020). It scores images, and makes no maps.

  Attributes:
    shrinkage: None, as in the paper, for the share that Ledoit and Wolf (2004) estimate for each
      level; else a share in (0, 1]. The covariance is (1 - share) S + share trace(S) / d I, where S is
      the empirical one.

  Raises:
    ValueError: a value out of range.
  """

  name: ClassVar[str] = 'mahalanobis_ad'
  title: ClassVar[str] = 'MahalanobisAD'
  module: ClassVar[str] = 'patchcore_jax.detectors.mahalanobis_ad'

  shrinkage: float | None = None

  def __post_init__(self):
    if self.shrinkage is not None and not 0 < self.shrinkage <= 1:
      raise ValueError(
          f'mahalanobis_ad.shrinkage={self.shrinkage}: expected None (Ledoit and Wolf) or '
          '0 < shrinkage <= 1.')


@dataclasses.dataclass(frozen=True)
class OCSVM(Detector):
  """A one-class SVM (Schölkopf et al., "Estimating the Support of a High-Dimensional Distribution", Neural
  Computation 13, 2001) of pooled features, the usual plain baseline. It makes no maps.

  Attributes:
    nu: largest share of training images outside the boundary, and smallest share of support vectors
      (the paper's nu-property), in (0, 1].
    gamma: that of the RBF kernel exp(-gamma |x - y|^2); 0 for 1 / (dimensions * variance of all values),
      scikit-learn's 'scale'.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'ocsvm'
  title: ClassVar[str] = 'OCSVM'
  module: ClassVar[str] = 'patchcore_jax.detectors.ocsvm'

  nu: float = 0.1
  gamma: float = 0.0

  def __post_init__(self):
    if not 0 < self.nu <= 1:
      raise ValueError(f'ocsvm.nu={self.nu}: expected 0 < nu <= 1.')
    if not 0 <= self.gamma < math.inf:
      raise ValueError(f'ocsvm.gamma={self.gamma}: expected more than 0, or 0 to scale by the data.')


@dataclasses.dataclass(frozen=True)
class PixelStatistics(Detector):
  """A plain number of an image's gray values as its score: a control, beside which others are read.

  Attributes:
    statistic: the mean gray value ('brightness'), the standard deviation ('deviation'), half the sum of
      squares where values are from -1 to 1 ('half_norm'), the distance of the mean gray value from that of
      the good images ('brightness_distance'), the squared distance to their mean ('mean_image') or to the
      nearest of them ('nearest_image').
    size: side of the square that images are brought to first, in pixels; 0 for none.
    standardise: brings every image to a mean of 0 and a deviation of 1 first.

  Raises:
    ValueError: values out of range, or a statistic that is the same for all standardised images.
  """

  name: ClassVar[str] = 'pixel_statistics'
  title: ClassVar[str] = 'Pixel statistics'
  module: ClassVar[str] = 'patchcore_jax.detectors.pixel_statistics'
  needs_network: ClassVar[bool] = False
  only_scoring: ClassVar[tuple[str, ...]] = ('statistic',)

  statistic: str = 'nearest_image'
  size: int = 32
  standardise: bool = False

  @property
  def row(self) -> str:
    return f'control: {self.statistic.replace("_", " ")}'

  @property
  def in_short(self) -> str:
    return f'{self.size or "all"} px{", standardised" if self.standardise else ""}'

  def __post_init__(self):
    of_images, of_values = ('mean_image', 'nearest_image'), (
        'brightness', 'deviation', 'half_norm', 'brightness_distance')
    if self.statistic not in of_images + of_values:
      raise ValueError(
          f'pixel_statistics.statistic={self.statistic!r}: expected one of '
          f'{", ".join(of_values + of_images)}.')
    if self.size < 0:
      raise ValueError(f'pixel_statistics.size={self.size}: expected 0 or more pixels.')
    if self.standardise and self.statistic in of_values:
      raise ValueError(
          f'pixel_statistics.statistic={self.statistic!r} is the same for all standardised images: expected '
          f'{" or ".join(of_images)}, or standardise=False.')


@dataclasses.dataclass(frozen=True)
class Ensemble(Detector):
  """The same method with several networks, as in tables S1 to S3 of the PatchCore paper's supplement.

  Attributes:
    member: the method.
    ratios: further coreset ratios at which it can be scored, besides that of the member.

  Raises:
    ValueError: a method that cannot be a member.
  """

  name: ClassVar[str] = 'ensemble'
  title: ClassVar[str] = 'Ensemble'
  module: ClassVar[str] = 'patchcore_jax.detectors.ensemble'

  member: Detector = PatchCore()
  ratios: tuple[float, ...] = ()

  def __post_init__(self):
    if not self.member.needs_network:
      raise ValueError(f'{self.member.title} has no ensembles: it takes no networks.')
    if self.member.host_step:
      raise ValueError(f'{self.member.title} has no ensembles: {self.member.host_step}.')
    if self.ratios and not self.has_coreset:
      raise ValueError(f'ratios={self.ratios}: {self.member.title} has no coreset. Leave them empty.')
    if self.has_coreset and not self.member.ratio:
      raise ValueError('ratio=0 leaves the size of each bank open: expected one for an ensemble.')

  @property
  def has_coreset(self) -> bool:  # type: ignore[override]  # a constant of all methods but this
    """Whether the members have one."""
    return self.member.has_coreset

  def settings(self) -> dict[str, Any]:
    return {
        'member': {'detector': self.member.name, 'settings': self.member.settings()},
        'ratios': to_json(self.ratios)}

  @classmethod
  def of_settings(cls, settings: Mapping[str, Any]) -> 'Ensemble':
    """Makes the ensemble from what `settings` gave."""
    member = settings['member']
    return cls(of_settings(member['detector'], member['settings']), tuple(settings['ratios']))


# A method is one line here: its record, or 'module:Record' of one elsewhere.
DETECTORS: dict[str, Any] = {
    'patchcore': PatchCore,
    'spade': SPADE,
    'padim': PaDiM,
    'mahalanobis_ad': MahalanobisAD,
    'ocsvm': OCSVM,
    'anomaly_dino': AnomalyDINO,
    'rad': RAD,
    'musc': MuSc,
    'super_add': SuperADD,
    'soft_patch': SoftPatch,
    'mh_patchcore': MHPatchCore,
    'ae_ssim': AESSIM,
    'ganomaly': GANomaly,
    'dsebm': DSEBM,
    'pixel_statistics': PixelStatistics,
    'cavga': CAVGA,
    'gamma_vae': GammaVAE,
    'explained_vae': ExplainedVAE,
    'differnet': DifferNet,
    'patch_svdd': PatchSVDD,
    'student': Student,
    'geotrans': GeoTrans,
    'itae': ITAE,
    'ensemble': Ensemble,
}


def find(name: str) -> type[Detector]:
  """Finds the record of a method: one of `DETECTORS`, or 'module:Record' for one of your own.

  Raises:
    ValueError: there is none.

  >>> find('padim')().num_dims
  550
  """
  record = DETECTORS.get(name, name if ':' in name else None)
  if record is None:
    raise ValueError(
        f"detector={name!r}: expected one of {', '.join(DETECTORS)}, or 'module:Record' for one of your own.")
  if not isinstance(record, str):
    return record
  module, _, attribute = record.partition(':')
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ModuleNotFoundError, AttributeError) as e:
    raise ValueError(
        f'detector={name!r}: {e}. Expected a module on PYTHONPATH, and the name of a Detector in it.') from e


def of_settings(name: str, settings: Mapping[str, Any]) -> Detector:
  """Makes the method with these settings, as `Detector.settings` gave them."""
  record = find(name)
  return record.of_settings(settings) if hasattr(record, 'of_settings') else from_json(record, settings)


def of_model(model: Model) -> Detector:
  """Makes the method that made a model, with its settings."""
  return of_settings(model.description.detector, model.description.settings)
