"""The memory banks that came after PatchCore: their settings. It imports no JAX."""

import dataclasses
import math
from typing import ClassVar

from patchcore_jax.detectors.base import Detector


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
