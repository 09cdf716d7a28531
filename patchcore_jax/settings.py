"""Everything that can be set, with its default: records that import no JAX.

Each checks its values when it is made. The sections of a config are made from these records, so a default
stands here and nowhere else; those of the methods are in `detectors.settings`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What is done to an image before the network sees it; every size is (height, width) in pixels.

  Attributes:
    resize: (s,) resizes the side named by `resize_side` to s and keeps the aspect ratio; (h, w)
      resizes to exactly that; () leaves the size.
    resize_side: 'short' or 'long'; only read with resize=(s,).
    pad: (s,) or (h, w) pads smaller images to that size, centred, repeating the edge pixels; ()
      does not pad.
    crop: (s,) or (h, w) crops the centre; () does not crop.
    mask_resize: 'antialiased' (the paper's released code) resizes masks as images; 'nearest'
      (anomalib) takes the mask pixel at the upper left of each new pixel.
    mask_threshold: a mask pixel is positive where the resized mask (0 to 1) reaches this. 1.0 is
      what the released code does (it truncates to integers, which erodes the ground truth by a
      fraction of a pixel); 0.5 keeps the area. Without effect on 'nearest'.
    value_range: (low, high): the values that become black and white in files of more than 8 bits and of
      floats. () has a fit measure them over its training images; after a fit it says that none was such a
      file: one of 16 bits is then scaled from its full range, and floats are refused.
    bands: three numbers of bands, from 1, that are read as red, green and blue; () for none chosen: files
      with more than three are refused then.
    background: the colour (red, green, blue) that transparent pixels are laid on; () drops transparency and
      shows what is hidden, as banks until November 2026 do.

  Raises:
    ValueError: sizes that are not positive, more than two of them, a crop that no image resized like this
      can fill, or a range, bands or a colour that are none.

  >>> Preprocessing(resize=(256,), crop=(300,))  # doctest: +ELLIPSIS
  Traceback (most recent call last):
    ...
  ValueError: preprocess.crop=(300,) does not fit into images resized to (256,): ...
  """

  resize: tuple[int, ...] = (256,)
  resize_side: str = 'short'
  pad: tuple[int, ...] = ()
  crop: tuple[int, ...] = (224,)
  mask_resize: str = 'antialiased'
  mask_threshold: float = 1.0
  value_range: tuple[float, ...] = ()
  bands: tuple[int, ...] = ()
  background: tuple[int, ...] = (255, 255, 255)

  def __post_init__(self):
    low_high = self.value_range
    if low_high and not (len(low_high) == 2 and -math.inf < low_high[0] < low_high[1] < math.inf):
      raise ValueError(
          f'preprocess.value_range={low_high!r}: expected (), or (low, high), two numbers, the larger one '
          'last.')
    if self.bands and (len(self.bands) != 3 or any(not isinstance(b, int) or b < 1 for b in self.bands)):
      raise ValueError(
          f'preprocess.bands={self.bands!r}: expected (), or the numbers of three bands, from 1, for red, '
          'green and blue, such as (4, 2, 1).')
    colour = self.background
    if colour and (len(colour) != 3 or any(not isinstance(c, int) or not 0 <= c <= 255 for c in colour)):
      raise ValueError(
          f'preprocess.background={colour!r}: expected (), or red, green and blue from 0 to 255, such as '
          '(255, 255, 255).')
    for name in ('resize', 'pad', 'crop'):
      size = getattr(self, name)
      if len(size) > 2 or any(not isinstance(s, int) or s < 1 for s in size):
        raise ValueError(
            f'preprocess.{name}={size!r}: expected (), (pixels,) or (height, width), positive '
            'integers.')
    if self.resize_side not in ('short', 'long'):
      raise ValueError(f"preprocess.resize_side={self.resize_side!r}: expected 'short' or 'long'.")
    if self.mask_resize not in ('antialiased', 'nearest'):
      raise ValueError(
          f"preprocess.mask_resize={self.mask_resize!r}: expected 'antialiased' or 'nearest'.")
    if not 0 < self.mask_threshold <= 1:
      raise ValueError(f'preprocess.mask_threshold={self.mask_threshold}: expected 0 < t <= 1.')
    # Only what holds for every image is refused here; the rest is seen image by image.
    if self.crop and self.resize and not self.pad and self.resize_side == 'short':
      too_large = [c > s for c, s in zip(as_pair(self.crop), as_pair(self.resize), strict=True)]
      # With one side given, the other may be longer: a crop is impossible only if both exceed it.
      if all(too_large) if len(self.resize) == 1 else any(too_large):
        raise ValueError(
            f'preprocess.crop={self.crop} does not fit into images resized to {self.resize}: '
            'choose a smaller crop or a larger resize.')


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
  """The settings of how patches are embedded.

  Attributes:
    kind: 'adaptive' or 'mean'; or 'auto' for the first with ResNets, which the paper's is made for, and the
      second with other networks.
    patch_size: P, odd, in cells of each layer's own grid.
    pretrain_dim: values per layer; only for 'adaptive'.
    target_dim: size of the embedding; only for 'adaptive'.
    unit_length: divides each embedding by its norm: half a squared distance is then the cosine distance, by
      which methods on Vision Transformers compare.
    rotations: each training image is embedded at so many angles, spread evenly over the circle from 0 on, as
      AnomalyDINO does with few images of parts that lie in any orientation; 1 for images as they are.

  Raises:
    ValueError: an unknown kind, an even patch size, or numbers below 1.
  """

  kind: str = 'adaptive'
  patch_size: int = 3
  pretrain_dim: int = 1024
  target_dim: int = 1024
  unit_length: bool = False
  rotations: int = 1

  def __post_init__(self):
    if self.kind not in ('adaptive', 'mean', 'auto'):
      raise ValueError(f"embedding.kind={self.kind!r}: expected 'adaptive', 'mean' or 'auto'.")
    if self.patch_size < 1 or self.patch_size % 2 == 0:
      raise ValueError(
          f'embedding.patch_size={self.patch_size}: expected an odd number (1, 3, 5, ...), so that '
          'a patch has a centre.')
    if self.pretrain_dim < 1 or self.target_dim < 1 or self.rotations < 1:
      raise ValueError(
          f'embedding.pretrain_dim={self.pretrain_dim}, target_dim={self.target_dim}, '
          f'rotations={self.rotations}: expected positive numbers.')


@dataclasses.dataclass(frozen=True)
class CoresetSpec:
  """The settings of how patches are selected.

  Attributes:
    method: 'greedy', the paper's k-center selection; 'random', that many at random; 'identity', all of
      them, in order, with ratio 1; 'kmeans', the centres of as many clusters (scikit-learn's mini-batch
      k-means), which unlike the others are no patches; 'thinning', patches where they lie apart, by density
      (SuperADD); 'merge_reduce', greedy selection in one pass, block by block, in memory that does not grow
      with the number of images: they are read once more for thresholds, in at most 10 folds. A prefix of
      centres, or of what thinning leaves, is no bank.
    projection: a greedy selection runs in a random projection, 'dense' (the paper's released code) or
      'sparse' (anomalib); the bank holds the full embeddings.
    projection_dim: dimensions of the projection; 0 for as many as the Johnson-Lindenstrauss bound asks for.
    start: 'mean' starts from the mean distance to `num_start_points` random points (the released
      code), 'point' from one random point that is itself the first selected (anomalib); for greedy ones.
    num_start_points: how many points those are; only for 'mean'.
    rounds: of 'thinning'; each looks at that share of all patches.
    thinning_neighbors: the most neighbours of a patch that 'thinning' counts, the patch itself among them.

  Raises:
    ValueError: values out of range.
  """

  method: str = 'greedy'
  projection: str = 'dense'
  projection_dim: int = 128
  start: str = 'mean'
  num_start_points: int = 10
  rounds: int = 100
  thinning_neighbors: int = 100

  @property
  def nested(self) -> bool:
    """Whether the first rows of a bank are the bank of a smaller ratio."""
    return self.method not in ('kmeans', 'thinning')

  def __post_init__(self):
    if self.method not in ('greedy', 'random', 'identity', 'kmeans', 'thinning', 'merge_reduce'):
      raise ValueError(
          f"coreset.method={self.method!r}: expected 'greedy', 'random', 'identity', 'kmeans', 'thinning' or "
          "'merge_reduce'.")
    if self.rounds < 1 or self.thinning_neighbors < 1:
      raise ValueError(
          f'coreset.rounds={self.rounds}, thinning_neighbors={self.thinning_neighbors}: expected at least 1.')
    if self.projection not in ('dense', 'sparse'):
      raise ValueError(f"coreset.projection={self.projection!r}: expected 'dense' or 'sparse'.")
    if self.start not in ('mean', 'point'):
      raise ValueError(f"coreset.start={self.start!r}: expected 'mean' or 'point'.")
    if self.projection_dim < 0 or self.num_start_points < 1:
      raise ValueError(
          f'coreset.projection_dim={self.projection_dim}, num_start_points={self.num_start_points}: '
          'expected at least 0 and 1.')


@dataclasses.dataclass(frozen=True)
class ScoringSpec:
  """The settings of how distances become scores.

  Attributes:
    num_neighbors: k; a patch score is the mean distance to its k nearest neighbours.
    distance: 'squared' (the paper's released code) or 'root'.
    image_score: 'max' (the released code: the largest patch score), 'reweighted' (the paper's
      equation 7), 'reweighted_squared' (MH-PatchCore: the same with squared distances in the weight), or
      'top_share' (AnomalyDINO: the mean of the largest patch scores).
    top_share: the share of the patches that this mean is over, at least one patch; only for 'top_share'.
    support_neighbors: neighbours of the nearest bank patch that equation 7 looks at, itself
      included; only for 'reweighted' and 'reweighted_squared'.
    upsampling: from patches to pixels, 'bilinear' (the released code) or 'nearest' (anomalib).
    sigma: standard deviation of the Gaussian blur of the anomaly map, in pixels; 0 for none.
    blur_edges: how the blur continues the map, in numpy.pad's words: 'symmetric' repeats the edge
      pixel (the released code, through SciPy), 'reflect' does not (anomalib).
    foreground: 'pca' for parts that lie on a plain background: patches that an image's own features tell from
      the object score 0, whatever is on them (`foreground.objects`); 'none' scores all.

  Raises:
    ValueError: values out of range.
  """

  num_neighbors: int = 1
  distance: str = 'squared'
  image_score: str = 'max'
  top_share: float = 0.01
  support_neighbors: int = 9
  upsampling: str = 'bilinear'
  sigma: float = 4.0
  blur_edges: str = 'symmetric'
  foreground: str = 'none'

  def __post_init__(self):
    for field, values in {
        'distance': ('squared', 'root'),
        'image_score': ('max', 'reweighted', 'reweighted_squared', 'top_share'),
        'upsampling': ('bilinear', 'nearest'), 'blur_edges': ('symmetric', 'reflect'),
        'foreground': ('none', 'pca')}.items():
      if (value := getattr(self, field)) not in values:
        raise ValueError(f'scoring.{field}={value!r}: expected {" or ".join(map(repr, values))}.')
    if not 0 < self.top_share <= 1:
      raise ValueError(f'scoring.top_share={self.top_share}: expected more than 0, and at most 1.')
    if self.num_neighbors < 1 or self.support_neighbors < 2:
      raise ValueError(
          f'scoring.num_neighbors={self.num_neighbors}, support_neighbors={self.support_neighbors}: '
          'expected at least 1 and 2.')
    if self.sigma < 0:
      raise ValueError(f'scoring.sigma={self.sigma}: expected 0 or more pixels.')


@dataclasses.dataclass(frozen=True)
class SearchSpec:
  """The settings of the search for neighbours. They decide about time and memory, never about the result.

  Attributes:
    shortlist: precision of the products that find candidates: 'float32', 'bfloat16', or 'auto', which
      is bfloat16 where that is faster: on accelerators, and on CPUs where a short measurement says so
      (those with AMX). It has no influence on the result.
    bank: 'replicated' on every device, which is faster, or 'sharded' over them, when it is too large.

  Raises:
    ValueError: another value.
  """

  shortlist: str = 'auto'
  bank: str = 'replicated'

  def __post_init__(self):
    if self.shortlist not in ('auto', 'float32', 'bfloat16'):
      raise ValueError(
          f"search.shortlist={self.shortlist!r}: expected 'auto', 'float32' or 'bfloat16'.")
    if self.bank not in ('replicated', 'sharded'):
      raise ValueError(f"search.bank={self.bank!r}: expected 'replicated' or 'sharded'.")


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The settings of which images are read, and how.

  Attributes:
    source: 'folder' (MVTec's layout), 'images' (good parts only, no labels), 'synthetic' (the built-in data,
      drawn into `root` where it is absent), 'tfds' (what experiments.prepare makes), or a data set as
      published: 'visa', 'btad', 'mvtec_loco', 'mvtec_ad_2', 'kolektor_sdd2' or 'mpdd'.
    root: the folder of the data.
    categories: names of categories; () for all.
    good: names of the folders of good parts, for data in folders; () for the usual ones, such as good, OK or
      normal.
    shots: training images to fit on, drawn at random; 0 for all.
    draw: the number of the draw.
    labelled_defects: for methods that learn from some, as a share of the number of training images: so many
      defects, at least one, are drawn from the test images, and are none of those any more. The paper of
      CAVGA has 0.02.
    noise: to measure how a method bears defects among its training images, as a share of their number: so
      many anomalous test images, rounded down, are drawn, join them as if they were good, and are no test
      images any more (SoftPatch's protocol, which has 0.1).
    multi_class: whether one model, of the training images of all categories, is tested on each of them, as
      methods for many products are measured; else each category has its own.
    batch_size: images that pass through the network at once; 0 for 8 on CPUs and 32 on accelerators.
    num_workers: processes that decode images, by Grain (extra [workers]); 0 for threads.
    on_error: 'raise', or 'skip' to leave unreadable images out, and count them.
    max_megapixels: images of more pixels, in millions, are refused before they are decoded. Decoding takes 4
      to 20 bytes a pixel; of images that are large, one is decoded at a time.

  Raises:
    ValueError: values out of range.
  """

  source: str = 'folder'
  root: str = ''
  categories: tuple[str, ...] = ()
  good: tuple[str, ...] = ()
  shots: int = 0
  draw: int = 0
  labelled_defects: float = 0.0
  noise: float = 0.0
  multi_class: bool = False
  batch_size: int = 0
  num_workers: int = 0
  on_error: str = 'raise'
  max_megapixels: float = 250.0

  @property
  def max_pixels(self) -> int:
    """The most pixels of an image."""
    return round(self.max_megapixels * 1e6)

  def __post_init__(self):
    if not 0 < self.max_megapixels < math.inf:
      raise ValueError(f'data.max_megapixels={self.max_megapixels}: expected more than 0.')
    if self.shots < 0 or self.draw < 0:
      raise ValueError(f'data.shots={self.shots}, data.draw={self.draw}: expected at least 0.')
    if not 0 <= self.labelled_defects <= 1:
      raise ValueError(f'data.labelled_defects={self.labelled_defects}: expected 0 to 1.')
    if not 0 <= self.noise <= 1:
      raise ValueError(f'data.noise={self.noise}: expected 0 to 1.')
    if self.multi_class and (self.noise or self.labelled_defects):
      raise ValueError(
          f'data.noise={self.noise}, data.labelled_defects={self.labelled_defects}: what is taken from the '
          'test images of one category would be in the model of all. Leave it out, or data.multi_class.')
    if self.on_error not in ('raise', 'skip'):
      raise ValueError(f"data.on_error={self.on_error!r}: expected 'raise' or 'skip'.")
    if self.batch_size < 0 or self.num_workers < 0:
      raise ValueError(
          f'data.batch_size={self.batch_size}, data.num_workers={self.num_workers}: expected at least 0 '
          'of each.')


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
  """The settings of the network that embeds the images.

  Attributes:
    name: architecture.tag or module:factory; several, joined by '+', make an ensemble; 'auto' for the best
      that is on this machine: the paper's, else EfficientNet-Lite0, else the one that comes with the package.
    weights: '' for the tag's checkpoint, a file, or 'random'; for an ensemble a file for each network, in
      their order, joined by '+'.
    layers: names of its layers; () for the backbone's own, layer2 and layer3 for ResNets.
    precision: 'float32', 'tensorfloat32' or 'bfloat16'; 'auto' for the fastest that is good enough
      (docs/precision.md).
  """

  name: str = 'wide_resnet50_2.tv_in1k'
  weights: str = ''
  layers: tuple[str, ...] = ()
  precision: str = 'auto'


@dataclasses.dataclass(frozen=True)
class FitSpec:
  """The settings of what a fit may use, and what it keeps.

  Attributes:
    memory_gb: the most that the process takes on the host, in 10^9 bytes; what exceeds it lies on disk
      until the model is made.
    keep_images: whether small pictures of the training images are kept in the model, to show why.

  Raises:
    ValueError: values out of range.
  """

  memory_gb: float = 8.0
  keep_images: bool = True

  def __post_init__(self):
    if not self.memory_gb > 0:
      raise ValueError(f'fit.memory_gb={self.memory_gb}: expected more than 0.')


@dataclasses.dataclass(frozen=True)
class CalibrationSpec:
  """The settings of how thresholds are made of good images alone.

  Attributes:
    false_alarm_rate: the share of good images that may be called anomalous.
    folds: parts of the training images, each scored by a model of the others; 0 for no thresholds.

  Raises:
    ValueError: values out of range.
  """

  false_alarm_rate: float = 0.01
  folds: int = 5

  def __post_init__(self):
    if not 0 < self.false_alarm_rate < 1:
      raise ValueError(
          f'calibration.false_alarm_rate={self.false_alarm_rate}: expected a share between 0 and 1; 1 % is '
          '0.01.')
    if self.folds < 0 or self.folds == 1:
      raise ValueError(f'calibration.folds={self.folds}: expected at least 2, or 0 for none.')


# The official ones begin with the name of their author.
METRICS_PROTOCOLS = ('paper', 'original', 'mvtec_official', 'mvtec_loco', 'mvtec_ad_2')


@dataclasses.dataclass(frozen=True)
class MetricsSpec:
  """The settings that the metrics leave open.

  Attributes:
    protocol: at which size, by which labels and scores of images is measured: 'paper' as the network sees
      images, 'original' the same at their original size, and by the official protocols 'mvtec_official',
      'mvtec_loco' and 'mvtec_ad_2' (`evaluation.protocols`, docs/evaluation.md).
    max_fpr: the limit of AUPRO, in (0, 1].
    connectivity: that of AUPRO's regions, 8 or 4.
    resamples: of the test images, for 95 % intervals of all metrics, which are written to the folder
      intervals; 0 for none, else at least 1,000. 10,000 take about 10 s for 160 images of 448 px.

  Raises:
    ValueError: values out of range, or that an official protocol does not allow.
  """

  protocol: str = 'paper'
  max_fpr: float = 0.3
  connectivity: int = 8
  resamples: int = 0

  @property
  def of_regions(self) -> dict[str, float | int]:
    """The arguments of `metrics.evaluate` that are settings."""
    return {'max_fpr': self.max_fpr, 'connectivity': self.connectivity}

  def __post_init__(self):
    if self.protocol not in METRICS_PROTOCOLS:
      raise ValueError(
          f'metrics.protocol={self.protocol!r}: expected one of {", ".join(METRICS_PROTOCOLS)}.')
    if self.protocol.startswith('mvtec') and (self.max_fpr, self.connectivity) != (0.3, 8):
      raise ValueError(
          f'metrics.protocol={self.protocol} has max_fpr=0.3 and connectivity=8, got {self.max_fpr} and '
          f"{self.connectivity}: leave them out, or take the protocol 'original'.")
    if not 0 < self.max_fpr <= 1:
      raise ValueError(f'metrics.max_fpr={self.max_fpr}: expected 0 < max_fpr <= 1.')
    if self.resamples < 0 or 0 < self.resamples < 1000:
      raise ValueError(f'metrics.resamples={self.resamples}: expected at least 1,000, or 0 for no intervals.')
    if self.connectivity not in (4, 8):
      raise ValueError(f'metrics.connectivity={self.connectivity}: expected 4 or 8.')


@dataclasses.dataclass(frozen=True)
class ReportSpec:
  """The settings of what a report shows.

  Attributes:
    errors: whether wrongly classified images are kept, for figures S1 and S2.
    gallery: images of each category in report.html, errors first, then the highest-scoring and borderline
      ones; 60 take 1 to 2 MB. 0 for none.
    maps: whether anomaly maps are written as TIFF, at the size of the original images, to the folder maps
      (docs/anomaly_maps.md).
    regions: whether a table of every defect's region, and of how well it is found, is written to the folder
      regions, at the threshold of the best F1 of pixels.

  Raises:
    ValueError: values out of range.
  """

  errors: bool = False
  gallery: int = 60
  maps: bool = False
  regions: bool = False

  def __post_init__(self):
    if self.gallery < 0:
      raise ValueError(f'report.gallery={self.gallery}: expected at least 0.')


def max_pixels(max_megapixels: float | None) -> int:
  """Returns the most pixels of an image; None stands for the default of `DataSpec.max_megapixels`.

  Raises:
    ValueError: not more than 0.
  """
  return (DataSpec() if max_megapixels is None else DataSpec(max_megapixels=max_megapixels)).max_pixels


def embedding_of(kind: str, backbones: Sequence[Any]) -> str:
  """Settles a kind of embedding, where it is 'auto', by the network: `embedding_for`."""
  if kind != 'auto':
    return kind
  (backbone,) = backbones
  return embedding_for(backbone.source[0] if backbone.source else ':')


def weights_of_each(weights: str, number: int) -> tuple[str, ...]:
  """Lists the weights of each of several networks: what is said once is for all, unless it is a file.

  Raises:
    ValueError: another number of files than of networks.

  >>> weights_of_each('a.pth+b.pth', 2), weights_of_each('random', 2)
  (('a.pth', 'b.pth'), ('random', 'random'))
  """
  if number == 1 or weights in ('', 'random'):
    return (weights,) * number
  files = tuple(file.strip() for file in weights.split('+'))
  if len(files) != number:
    raise ValueError(
        f'weights {weights!r}: {len(files)} for {number} networks. Expected a file for each, in their order, '
        "joined by '+'.")
  return files


def embedding_for(backbone: str) -> str:
  """Names the kind of embedding for a network: the paper's is made for usual ResNets and DenseNets.

  Others keep all channels of all layers, which finds more in the built-in data (docs/pretrained.md).

  Args:
    backbone: its name; with a colon, one of the user's own.

  >>> embedding_for('resnet50.tv_in1k'), embedding_for('module:factory')
  ('adaptive', 'mean')
  """
  own = ':' in backbone or backbone.startswith(('resnet18_slim', 'efficientnet_lite', 'vit_'))
  return 'mean' if own else 'adaptive'


def check_ratio(ratio: float) -> None:
  """Raises ValueError for a ratio outside (0, 1]."""
  if not 0 < ratio <= 1:
    raise ValueError(f'coreset ratio {ratio}: expected 0 < ratio <= 1.')


def check_number(number: int, folds: int, given: int | None = None) -> None:
  """Raises ValueError where there is one image and thresholds are wanted, and says what one image allows.

  Args:
    number: images that can be read, as far as is known.
    folds: as of `CalibrationSpec`.
    given: images that there are, where some cannot be read.
  """
  if number == 1 and folds:
    among = f' of {given} can be read' if given and given > 1 else ''
    raise ValueError(
        f'One image{among}: thresholds take at least 2, each scored by a model of the others. Give more '
        'good images. One allows a model without thresholds (--folds 0, or false_alarm_rate=None in Python), '
        'which gives scores and heatmaps, and no decisions until --threshold of predict, or patchcore bank '
        'calibrate with other good images, sets one.')


def as_pair(size: tuple[int, ...]) -> tuple[int, int]:
  """Converts a size that may be one number for both to (height, width)."""
  return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])
