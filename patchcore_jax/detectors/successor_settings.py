"""The memory banks that came after PatchCore: their settings. It imports no JAX."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from patchcore_jax.detectors.base import Detector
from patchcore_jax.settings import embedding_of


@dataclasses.dataclass(frozen=True)
class AnomalyDINO(Detector):
  """AnomalyDINO (Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2",
  WACV 2025). It keeps every patch of a few images, and turns these.

  The defaults are those of the released code, but for the foreground, which it takes for some categories
  only: of MVTec AD capsule, hazelnut, pill, screw and toothbrush, of VisA all. That code turns images before
  they are resized; here they are turned as the network sees them.

  Attributes:
    rotations: copies of each good image, turned by equal parts of a circle; 1 for the image alone.
    distance: 'cosine', or 'euclidean' for features as they are.
    num_neighbors: k; a patch score is the mean cosine distance to its k nearest neighbours, or the root of
      the mean squared Euclidean distance.
    foreground: patches outside the object score 0: 'pca' finds it by the image's own features
      (`foreground.masks`), 'pca_raster' does as the released code, which lets masks grow along the rows only;
      'none' for all patches.
    top_share: an image's score is the mean of this share of its patch scores, the largest; 0 for the maximum.
    sigma: standard deviation of the Gaussian blur of the anomaly map, in pixels; 0 for none.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'anomaly_dino'
  title: ClassVar[str] = 'AnomalyDINO'
  module: ClassVar[str] = 'patchcore_jax.detectors.anomaly_dino'
  changes_images: ClassVar[bool] = True
  only_scoring: ClassVar[tuple[str, ...]] = ('num_neighbors', 'foreground', 'top_share', 'sigma')

  rotations: int = 8
  distance: str = 'cosine'
  num_neighbors: int = 1
  foreground: str = 'none'
  top_share: float = 0.01
  sigma: float = 4.0

  def __post_init__(self):
    if self.rotations < 1 or self.num_neighbors < 1:
      raise ValueError(
          f'anomaly_dino.rotations={self.rotations}, num_neighbors={self.num_neighbors}: expected at '
          'least 1.')
    if self.distance not in ('cosine', 'euclidean'):
      raise ValueError(f"anomaly_dino.distance={self.distance!r}: expected 'cosine' or 'euclidean'.")
    if self.foreground not in ('none', 'pca', 'pca_raster'):
      raise ValueError(
          f"anomaly_dino.foreground={self.foreground!r}: expected 'none', 'pca' or 'pca_raster'.")
    if not 0 <= self.top_share <= 1:
      raise ValueError(f'anomaly_dino.top_share={self.top_share}: expected 0 to 1.')
    if not 0 <= self.sigma < math.inf:
      raise ValueError(f'anomaly_dino.sigma={self.sigma}: expected 0 or more pixels.')


@dataclasses.dataclass(frozen=True)
class RAD(Detector):
  """RAD (Zhang et al., arXiv 2601.22763, ICML 2026). It retrieves the good images that are like an image by
  their class tokens, and compares each patch with theirs at about the same place.

  The last of the network's layers is the class token, those before it are of patches; the paper's are
  blocks.3, blocks.6, blocks.9, blocks.11 and blocks.11.cls of DINOv3's ViT-B/16. The defaults are those of
  the released code for MVTec AD, where one bank holds the images of all categories, but for two: patches are
  kept as float16, which halves the bank and changes scores by some 1e-4, and the map by which images are
  scored, of 256 x 256 pixels, is enlarged to the images for what is shown and measured.

  A bank of many products is a fit on all their images, as with the pattern 'parts/*/good': the class token
  finds the product.

  Attributes:
    num_images: k, the training images with which an image is compared, those most like it; 0 for all.
      Published: 150 for MVTec AD, 900 for VisA and Real-IAD, 48 for 3D-ADAM.
    radius: how many rows and columns away from a patch another may lie; -1 for anywhere. Published: 1 for
      MVTec AD and 3D-ADAM, 2 for VisA, 0 for Real-IAD.
    weights: weights of the layers of patches; () for the plain mean.
    map_size: (height, width) of the map by which an image is scored, in pixels; () for that of the images.
    sigma: standard deviation of that map's blur of 5 x 5 pixels; 0 for none.
    blur_edges: what that blur finds beyond the edge: 'zeros' (the released code), or the map mirrored,
      'reflect' (anomalib).
    top_share: an image's score is the mean of this share of that map, the largest; 0 for the maximum.
    dtype: type of the patches that are kept, 'float16' or 'float32'.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'rad'
  title: ClassVar[str] = 'RAD'
  module: ClassVar[str] = 'patchcore_jax.detectors.rad'
  only_scoring: ClassVar[tuple[str, ...]] = (
      'num_images', 'radius', 'weights', 'map_size', 'sigma', 'blur_edges', 'top_share')

  num_images: int = 150
  radius: int = 1
  weights: tuple[float, ...] = ()
  map_size: tuple[int, ...] = (256, 256)
  sigma: float = 1.0
  blur_edges: str = 'zeros'
  top_share: float = 0.01
  dtype: str = 'float16'

  def __post_init__(self):
    if self.num_images < 0:
      raise ValueError(f'rad.num_images={self.num_images}: expected a number of images, or 0 for all.')
    if self.radius < -1:
      raise ValueError(f'rad.radius={self.radius}: expected a number of patches, or -1 for anywhere.')
    if self.weights and not (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf):
      raise ValueError(f'rad.weights={self.weights}: expected (), or a weight for each layer, one above 0.')
    if len(self.map_size) not in (0, 2) or any(side < 1 for side in self.map_size):
      raise ValueError(f'rad.map_size={self.map_size}: expected (), or (height, width) in pixels.')
    if not 0 <= self.sigma < math.inf:
      raise ValueError(f'rad.sigma={self.sigma}: expected 0 or more pixels.')
    if self.blur_edges not in ('zeros', 'reflect'):
      raise ValueError(f"rad.blur_edges={self.blur_edges!r}: expected 'zeros' or 'reflect'.")
    if not 0 <= self.top_share <= 1:
      raise ValueError(f'rad.top_share={self.top_share}: expected 0 to 1.')
    if self.dtype not in ('float16', 'float32'):
      raise ValueError(f"rad.dtype={self.dtype!r}: expected 'float16' or 'float32'.")

  def fewest_images(self, num_defects: int = 0) -> int:
    return max(1, self.num_images)


@dataclasses.dataclass(frozen=True)
class SoftPatch(Detector):
  """SoftPatch (Jiang et al., "SoftPatch: Unsupervised Anomaly Detection with Noisy Data", NeurIPS 2022), for
  training images among which are defects. Each patch is compared with those at its place in the other images;
  those that stand out most are left out of a PatchCore bank, and the others keep by how much they do, as a
  weight of what is scored against them.

  The defaults are those of the released code as it runs, where `num_neighbors` and `num_start_points` are not
  those of its command line, but for one: its first pick may be a patch taken for noise (`first_pick`). Its
  further variant 'lof_gpu' is the same factor from rounded distances, and is not another setting here.

  It takes all images for good ones when thresholds are made: with defects among them, these come out too
  high.

  Attributes:
    ratio: the share of all patches that the bank keeps, in (0, 1 - noise_share].
    embedding: how patches are embedded, as `EmbeddingSpec.kind` has it: 'adaptive', 'mean', or 'auto' to have
      it settled by the network.
    outlyingness: what weighs a patch against those at its place: the local outlier factor ('lof'), 1 + the
      distance to the nearest of them ('nearest'), or 1 + the Mahalanobis distance to their mean ('gaussian').
    num_neighbors: k of the local outlier factor, which takes k + 1 images at least.
    noise_share: the share of all patches that are taken for noise, in [0, 1): those above that quantile of
      the weights. Where no image is a defect, they are left out all the same.
    first_pick: the patch selected first is one that is not taken for noise ('inlier', the paper), or any,
      which is often noise ('any', the released code).
    projection_dim: dimensions of the random projections in which patches are weighed, and selected.
    num_start_points: random patches, of all, to which a selection starts with the mean distance.
    weighted: whether a score is multiplied by the weight of the nearest patch in the bank.
    sigma: standard deviation of the Gaussian blur of the anomaly map, in pixels; 0 for none.
    image_score: the largest patch score ('max'), or the mean of the largest ('top_share').
    top_share: the share of the patches that this mean is over, at least one patch; only for 'top_share'.
    foreground: 'pca' for parts that lie on a plain background, 'none' elsewhere, as `ScoringSpec.foreground`.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'soft_patch'
  title: ClassVar[str] = 'SoftPatch'
  module: ClassVar[str] = 'patchcore_jax.detectors.soft_patch'
  only_scoring: ClassVar[tuple[str, ...]] = ('weighted', 'sigma', 'image_score', 'top_share', 'foreground')

  ratio: float = 0.1
  embedding: str = 'auto'
  outlyingness: str = 'lof'
  num_neighbors: int = 5
  noise_share: float = 0.15
  first_pick: str = 'inlier'
  projection_dim: int = 128
  num_start_points: int = 128
  weighted: bool = True
  sigma: float = 4.0
  image_score: str = 'max'
  top_share: float = 0.01
  foreground: str = 'none'

  def __post_init__(self):
    if not 0 <= self.noise_share < 1:
      raise ValueError(f'soft_patch.noise_share={self.noise_share}: expected 0 or more, and less than 1.')
    if not 0 < self.ratio <= 1 - self.noise_share:
      raise ValueError(
          f'soft_patch.ratio={self.ratio}: expected more than 0, and at most {1 - self.noise_share:g}, what '
          f'is left beside noise_share={self.noise_share}.')
    for field, values in {
        'embedding': ('auto', 'adaptive', 'mean'), 'outlyingness': ('lof', 'nearest', 'gaussian'),
        'first_pick': ('inlier', 'any'), 'image_score': ('max', 'top_share'),
        'foreground': ('none', 'pca')}.items():
      if (value := getattr(self, field)) not in values:
        raise ValueError(f'soft_patch.{field}={value!r}: expected {" or ".join(map(repr, values))}.')
    if self.num_neighbors < 1 or self.projection_dim < 1 or self.num_start_points < 1:
      raise ValueError(
          f'soft_patch.num_neighbors={self.num_neighbors}, projection_dim={self.projection_dim}, '
          f'num_start_points={self.num_start_points}: expected at least 1.')
    if not 0 < self.top_share <= 1:
      raise ValueError(f'soft_patch.top_share={self.top_share}: expected more than 0, and at most 1.')
    if not 0 <= self.sigma < math.inf:
      raise ValueError(f'soft_patch.sigma={self.sigma}: expected 0 or more pixels.')

  def fewest_images(self, num_defects: int = 0) -> int:
    return self.num_neighbors + 1 if self.outlyingness == 'lof' else 2

  def resolved(self, backbones: Sequence[Any]) -> 'SoftPatch':
    """Settles the kind of the embedding, where it is 'auto', by the network."""
    return dataclasses.replace(self, embedding=embedding_of(self.embedding, backbones))


@dataclasses.dataclass(frozen=True)
class MHPatchCore(Detector):
  """MH-PatchCore (Ferrari et al., arXiv 2605.27748): PatchCore with a covariance, in memory that does not
  grow with the number of images. Patches are brought to their principal components, whitened, and selected
  block by block; distances are Mahalanobis distances.

  The defaults are those of the released code, whose network is wide_resnet50_2.tv2_in1k. Three things differ,
  by rounding alone if a block has at least as many patches as each has values: the principal components are
  those of all patches, where that code cuts off what a smaller first block lacks; the covariance of what is
  projected follows from them, without a pass of its own over the images; whitened patches are float32.

  A bank depends on the order of the images and on the sizes of blocks; the number of images that pass through
  the network at once has no influence.

  Attributes:
    embedding: how patches are embedded, as `EmbeddingSpec.kind` has it: 'adaptive', 'mean', or 'auto' to have
      it settled by the network.
    variance: the share of the variance that the principal components keep, in (0, 1].
    shrinkage: the share of the identity in the covariance, in [0, 1].
    bank_patches: the most patches that the bank keeps.
    block_images: images whose patches are a block.
    block_patches: the most patches that are kept of a block, and of two such that are merged.
    support_neighbors: neighbours that equation 7 of PatchCore looks at for an image's score, with squared
      distances; 1 for the largest patch score as it is.
    sigma: standard deviation of the Gaussian blur of the anomaly map, in pixels; 0 for none.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'mh_patchcore'
  title: ClassVar[str] = 'MH-PatchCore'
  module: ClassVar[str] = 'patchcore_jax.detectors.mh_patchcore'
  only_scoring: ClassVar[tuple[str, ...]] = ('support_neighbors', 'sigma')

  embedding: str = 'auto'
  variance: float = 0.99
  shrinkage: float = 0.07
  bank_patches: int = 1000
  block_images: int = 16
  block_patches: int = 256
  support_neighbors: int = 9
  sigma: float = 4.0

  def __post_init__(self):
    if self.embedding not in ('auto', 'adaptive', 'mean'):
      raise ValueError(
          f"mh_patchcore.embedding={self.embedding!r}: expected 'auto', 'adaptive' or 'mean'.")
    if not 0 < self.variance <= 1:
      raise ValueError(f'mh_patchcore.variance={self.variance}: expected more than 0, and at most 1.')
    if not 0 <= self.shrinkage <= 1:
      raise ValueError(f'mh_patchcore.shrinkage={self.shrinkage}: expected 0 to 1.')
    for field in ('bank_patches', 'block_images', 'block_patches', 'support_neighbors'):
      if getattr(self, field) < 1:
        raise ValueError(f'mh_patchcore.{field}={getattr(self, field)}: expected at least 1.')
    if not 0 <= self.sigma < math.inf:
      raise ValueError(f'mh_patchcore.sigma={self.sigma}: expected 0 or more pixels.')

  def resolved(self, backbones: Sequence[Any]) -> 'MHPatchCore':
    """Settles the kind of the embedding, where it is 'auto', by the network."""
    return dataclasses.replace(self, embedding=embedding_of(self.embedding, backbones))


@dataclasses.dataclass(frozen=True)
class MuSc(Detector):
  """MuSc (Li et al., "MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring
  of the Unlabeled Images", ICLR 2024). It needs no good images: those of a set score each other.

  A fit is given the images that are to be scored, good and bad without labels, and finds their scores; the
  model knows these images again, and no others. It has no thresholds, which come from good images, no export,
  and no service.

  The last of the network's layers is the class token, those before it are of patches; the paper's for DINOv2
  are blocks.5, blocks.11, blocks.17, blocks.23 and blocks.23.cls of ViT-L/14, or 2, 5, 8, 11 of ViT-B/14. The
  defaults are those of the released code for MVTec AD, whose network of the main tables is CLIP's, which is
  not here, and which computes it in half precision.

  Attributes:
    degrees: r, for each of which patches are averaged over r x r neighbours before they are compared.
    share: the share of the other images by which a patch is scored, those nearest to it.
    neighborhoods: an image's score is averaged over the k images most like it by their class tokens, itself
      among them, for each of these k, and lies between 0 and 1; () for the largest value of its map.
      Published: (1, 2, 3) for MVTec AD and BTAD, (1, 8, 9) for VisA.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'musc'
  title: ClassVar[str] = 'MuSc'
  module: ClassVar[str] = 'patchcore_jax.detectors.musc'
  only_scoring: ClassVar[tuple[str, ...]] = ('neighborhoods',)
  of_a_set: ClassVar[bool] = True
  host_step: ClassVar[str] = 'it scores the images of one set by each other, and none alone'

  degrees: tuple[int, ...] = (1, 3, 5)
  share: float = 0.3
  neighborhoods: tuple[int, ...] = (1, 2, 3)

  def __post_init__(self):
    if not self.degrees or any(degree < 1 or degree % 2 == 0 for degree in self.degrees):
      raise ValueError(f'musc.degrees={self.degrees}: expected odd numbers, such as (1, 3, 5).')
    if not 0 < self.share <= 1:
      raise ValueError(f'musc.share={self.share}: expected more than 0, and at most 1.')
    if any(k < 1 for k in self.neighborhoods):
      raise ValueError(f'musc.neighborhoods={self.neighborhoods}: expected numbers from 1, or () for none.')

  def check_defects(self, number: int) -> None:
    """Takes every image: labels are not looked at."""


@dataclasses.dataclass(frozen=True)
class SuperADD(Detector):
  """SuperADD (Roming et al., arXiv 2605.14808), made for MVTec AD 2. Large images pass through the network in
  windows, each layer has a bank of its own, and dense places of a bank are thinned.

  The paper's layers are blocks.7.raw, blocks.15.raw, blocks.23.raw and blocks.31.raw of DINOv3's ViT-H+/16,
  of images whose sides are 0.625 of the original's. The defaults are those of the released code, which
  defines no image scores; those here are anomalib's. Five things differ: pixels beyond the last whole patch
  are seen, in a patch that repeats the edge, where that code leaves them out; images become brighter or
  darker as the network sees them, rounded to whole gray values, where that code changes them before they are
  resized, by other draws; the seed is that of the run; every eighth image is counted among those that can be
  read; the closing lines are those of `morphology.line_elements`.

  Thresholds are those of the contract, by images that a model has not seen. The paper's own threshold and its
  binary maps, with gaps closed and holes filled, are had by `superadd.binary_maps`.

  Attributes:
    window: side of the windows in pixels, a multiple of the network's patch; 0 for one image as it is.
    overlap: half of what neighbouring windows share at least, in pixels.
    brightness: images for the bank are multiplied by factors of 1 plus or minus at most this.
    held_out: every so manyth image, from the first, makes no part of the bank, but the threshold of the
      paper; 0 for none.
    bank_rows: the most vectors of a layer's bank.
    rounds: of its thinning.
    thinning_neighbors: the most neighbours of a vector that are counted there, itself among them.
    top_share: an image's score is the mean of this share of its map, the largest; 0 for the maximum.
    sigma: standard deviation of the Gaussian blur of the anomaly map, in pixels; 0 for none; anomalib has 4.
    map_scale: the size of binary maps, as a share of the images' as the network sees them.
    quantile, factor: the paper's threshold is this quantile of the maps of images held out, times the factor.
    radius: half the length of the lines along which gaps of binary maps are closed, in their pixels.
    lower: no pixel of at most this share of the threshold is marked.

  Raises:
    ValueError: values out of range.
  """

  name: ClassVar[str] = 'super_add'
  title: ClassVar[str] = 'SuperADD'
  module: ClassVar[str] = 'patchcore_jax.detectors.superadd'
  changes_images: ClassVar[bool] = True
  only_scoring: ClassVar[tuple[str, ...]] = ('top_share', 'sigma', 'radius', 'lower')

  window: int = 640
  overlap: int = 128
  brightness: float = 0.2
  held_out: int = 8
  bank_rows: int = 100_000
  rounds: int = 100
  thinning_neighbors: int = 100
  top_share: float = 0.001
  sigma: float = 0.0
  map_scale: float = 0.4
  quantile: float = 0.95
  factor: float = 1.421
  radius: int = 26
  lower: float = 0.8

  def __post_init__(self):
    if self.window < 0 or self.overlap < 0 or self.window and 2 * self.overlap >= self.window:
      raise ValueError(
          f'super_add.window={self.window}, overlap={self.overlap}: expected an overlap of less than half of '
          'the window, or a window of 0 for none.')
    if self.held_out < 0 or self.held_out == 1:
      raise ValueError(f'super_add.held_out={self.held_out}: expected at least 2, or 0 for none.')
    if min(self.bank_rows, self.rounds, self.thinning_neighbors, self.radius) < 1:
      raise ValueError(
          f'super_add.bank_rows={self.bank_rows}, rounds={self.rounds}, thinning_neighbors='
          f'{self.thinning_neighbors}, radius={self.radius}: expected at least 1.')
    for field, low, high in (
        ('brightness', 0, 1), ('top_share', 0, 1), ('quantile', 0, 1), ('lower', 0, 1), ('map_scale', 0, 1),
        ('factor', 0, math.inf), ('sigma', 0, math.inf)):
      if not low <= getattr(self, field) <= high or field == 'map_scale' and not self.map_scale:
        raise ValueError(f'super_add.{field}={getattr(self, field)}: expected {low} to {high}.')
