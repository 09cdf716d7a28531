"""Pretrained checkpoints as records: architecture.tag, where it lies, its licence, its normalisation.

One lies in this package, `BUILT_IN`, trained on drawn images (docs/pretrained.md); the others are
downloaded. `PREFERRED` is the better choice wherever it can be had.

Facts and their sources: `third_party/checkpoints.md`. A tag is always explicit, because other tags of
one architecture give other numbers: the paper used torchvision's first weights ('tv_in1k');
anomalib's `wide_resnet50_2` is 'racm_in1k'.
"""

import dataclasses
import importlib.resources
import os

import huggingface_hub

BUILT_IN = 'resnet18_slim.procedural'
PREFERRED = 'wide_resnet50_2.tv_in1k'
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DownloadError(ValueError):
  """A checkpoint that is neither cached nor can be fetched; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """One set of pretrained weights.

  Attributes:
    name: 'architecture.tag', as timm writes it.
    licence: SPDX identifier.
    origin: the project that trained it.
    torch_file: the file of the same weights under https://download.pytorch.org/models/, whose name
      ends in the first 8 digits of its SHA-256; '' if there is none.
    mean, std: normalisation of the training images.
    packaged: path of its file inside this package; '' for one that is downloaded.
  """

  name: str
  licence: str
  origin: str
  torch_file: str = ''
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  packaged: str = ''

  @property
  def repo_id(self) -> str:
    """The repository on the Hugging Face Hub."""
    return f'timm/{self.name}'

  @property
  def filename(self) -> str:
    """The file in that repository."""
    return 'model.safetensors'

  @property
  def url(self) -> str:
    """The address of the file, for fetching it by hand."""
    return f'https://huggingface.co/{self.repo_id}/resolve/main/{self.filename}'


def _torchvision(name: str, torch_file: str) -> Checkpoint:
  """Makes the record of one of torchvision's first weights."""
  return Checkpoint(
      f'{name}.tv_in1k', 'BSD-3-Clause', 'https://github.com/pytorch/vision', torch_file)


CHECKPOINTS = {c.name: c for c in (
    _torchvision('resnet18', 'resnet18-5c106cde.pth'),
    _torchvision('resnet34', 'resnet34-333f7ec4.pth'),
    _torchvision('resnet50', 'resnet50-19c8e357.pth'),
    _torchvision('resnet101', 'resnet101-5d3b4d8f.pth'),
    _torchvision('resnet152', 'resnet152-b121ed2d.pth'),
    _torchvision('wide_resnet50_2', 'wide_resnet50_2-95faca4d.pth'),
    _torchvision('wide_resnet101_2', 'wide_resnet101_2-32ee1156.pth'),
    _torchvision('resnext50_32x4d', 'resnext50_32x4d-7cdf4587.pth'),
    _torchvision('resnext101_32x8d', 'resnext101_32x8d-8ba56ff5.pth'),
    Checkpoint('wide_resnet50_2.racm_in1k', 'Apache-2.0',
               'https://github.com/huggingface/pytorch-image-models'),
    Checkpoint(BUILT_IN, 'Apache-2.0', 'this package, experiments/pretrain.py',
               packaged=f'weights/{BUILT_IN}.safetensors'),
)}


def find(name: str) -> Checkpoint:
  """Finds the record called `name`.

  Raises:
    ValueError: no such record; the message lists the tags of the architecture.

  >>> find('wide_resnet50_2.tv_in1k').repo_id
  'timm/wide_resnet50_2.tv_in1k'
  """
  if name in CHECKPOINTS:
    return CHECKPOINTS[name]
  architecture = name.partition('.')[0]
  known = [n for n in CHECKPOINTS if n.partition('.')[0] == architecture] or list(CHECKPOINTS)
  raise ValueError(
      f'No checkpoint {name!r}. There are: {", ".join(known)}. A file of your own is given as '
      'backbone.weights=PATH.')


def fetch(
    checkpoint: Checkpoint, *, cache_dir: str | os.PathLike | None = None, endpoint: str | None = None
) -> str:
  """Finds the checkpoint's file: in this package, or downloaded on first use. Returns its path.

  The hub's client keeps the cache, resumes broken downloads and checks sizes.

  Args:
    checkpoint: what to fetch.
    cache_dir: a folder in place of the hub's usual cache.
    endpoint: the address of a mirror in place of the public hub.

  Raises:
    DownloadError: not in the cache, and the hub cannot be reached or does not have it.
  """
  if checkpoint.packaged:
    return str(importlib.resources.files(__package__) / checkpoint.packaged)
  try:
    return huggingface_hub.hf_hub_download(
        checkpoint.repo_id, checkpoint.filename, cache_dir=cache_dir, endpoint=endpoint)
  # The client's exceptions have no common base that is stable over its versions.
  except Exception as e:
    torch_file = (
        f' (or {checkpoint.torch_file}, the same weights as torchvision published them)'
        if checkpoint.torch_file else '')
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise DownloadError(
        f'The weights {checkpoint.name} are not on this machine and cannot be downloaded ({reason}). '
        f'Fetch {checkpoint.url}{torch_file} where there is a network, copy it here and pass its path '
        'as --config.backbone.weights=PATH.') from e
