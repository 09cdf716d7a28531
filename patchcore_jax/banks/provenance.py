"""Where the patches of a bank come from: names of the training images, and pictures of them.

The pictures are JPEG files, one after another in one array, so that a bank remains one thing: it answers why
without the training images, which may lie on another machine or be gone.
"""

import datetime
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import patchcore_jax
from patchcore_jax.banks.store import MemoryBank

_FILES, _OFFSETS = 'thumbnails', 'thumbnail_offsets'
_QUALITY = 85  # of JPEG: about 15 kB for 224 x 224 pixels


class Origin(NamedTuple):
  """Where a row of a bank comes from.

  Attributes:
    image: number of the training image.
    name: of its file; '' if the bank has none.
    row, column: of the patch, on the grid of patches.
  """

  image: int
  name: str
  row: int
  column: int


def origin(bank: MemoryBank, row: int) -> Origin:
  """Where row `row` of the bank comes from."""
  rows, columns = bank.description['grid']
  image, patch = divmod(int(bank.indices[row]), rows * columns)
  names = bank.description.get('images', ())
  return Origin(image, names[image] if image < len(names) else '', *divmod(patch, columns))


def thumbnail(bank: MemoryBank, image: int) -> np.ndarray | None:
  """[h, w, 3] uint8 of training image number `image`, as the network saw it, but for JPEG's losses; None if
  the bank has no pictures.
  """
  if not has_thumbnails(bank):
    return None
  begin, end = np.asarray(bank.extras[_OFFSETS])[image:image + 2]
  file = np.asarray(bank.extras[_FILES])[begin:end].tobytes()
  return np.asarray(Image.open(io.BytesIO(file)).convert('RGB'))


def encode(image: np.ndarray) -> bytes:
  """The JPEG file of an image [h, w, 3] uint8."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=_QUALITY)
  return file.getvalue()


def pack(files: Sequence[bytes]) -> dict[str, Any]:
  """`MemoryBank.extras` with the pictures, by `encode`, of all training images; {} for none."""
  if not files:
    return {}
  offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
  return {_FILES: np.frombuffer(b''.join(files), np.uint8), _OFFSETS: offsets}


def has_thumbnails(bank: MemoryBank) -> bool:
  """Whether the bank has pictures of its training images."""
  return _FILES in bank.extras


def thumbnails(bank: MemoryBank) -> list[bytes]:
  """The JPEG files that `pack` took; [] if the bank has none."""
  if not has_thumbnails(bank):
    return []
  data, offsets = np.asarray(bank.extras[_FILES]), np.asarray(bank.extras[_OFFSETS])
  return [data[a:b].tobytes() for a, b in zip(offsets, offsets[1:])]


def record(description: dict[str, Any], what: str) -> None:
  """Adds a line to the history of a bank, which its description tells."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  history = description.get('history', [])
  description['history'] = [*history, {'when': now, 'what': what, 'version': patchcore_jax.__version__}]


class Recorder:
  """Passes batches on, and keeps which images there were.

  Attributes:
    index: positions of the images in the list of examples, in the order of the batches.
    files: their pictures, if they are kept.
  """

  def __init__(self, batches: Iterable, keep_images: bool):
    self._batches, self._keep_images = batches, keep_images
    self.index: list[int] = []
    self.files: list[bytes] = []

  def __iter__(self):
    for batch in self._batches:
      self.index += batch.index[batch.valid].tolist()
      if self._keep_images:
        self.files += map(encode, batch.image[batch.valid])
      yield batch
