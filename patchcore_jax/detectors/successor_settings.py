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
