"""Records where the patches of a bank come from: names of the training images, and pictures of them.

The pictures are JPEG files, one after another in one array, so that a bank remains one thing: it answers why
without the training images, which may lie on another machine or be gone.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from patchcore_jax.banks.model import Model

_FILES, _OFFSETS = 'thumbnails', 'thumbnail_offsets'
_QUALITY = 85  # of the JPEG files: about 15 kB for 224 x 224 pixels


class Origin(NamedTuple):
  """The place that a row of a bank comes from.

  Attributes:
    image: number of the training image.
    name: name of its file; '' if the model has none.
    row, column: place of the patch on the grid of patches.
  """

  image: int
  name: str
  row: int
  column: int


def origin(model: Model, row: int) -> Origin:
  """Tells where row `row` of a bank comes from."""
  rows, columns = model.description.grid
  image, patch = divmod(int(model.arrays['indices'][row]), rows * columns)
  names = model.description.images
  return Origin(image, names[image] if image < len(names) else '', *divmod(patch, columns))


def thumbnail(model: Model, image: int) -> np.ndarray | None:
  """Decodes the picture of training image number `image`.

  Returns:
    [h, w, 3] uint8, as the network saw it, but for JPEG's losses; None if the model has no pictures.
  """
  if not has_thumbnails(model):
    return None
  begin, end = np.asarray(model.arrays[_OFFSETS])[image:image + 2]
  file = np.asarray(model.arrays[_FILES])[begin:end].tobytes()
  return np.asarray(Image.open(io.BytesIO(file)).convert('RGB'))


def encode(image: np.ndarray) -> bytes:
  """Encodes an image [h, w, 3] uint8 as a JPEG file."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=_QUALITY)
  return file.getvalue()


def pack(files: Sequence[bytes]) -> dict[str, Any]:
  """Packs the pictures, by `encode`, of all training images into arrays of a model; {} for none."""
  if not files:
    return {}
  offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
  return {_FILES: np.frombuffer(b''.join(files), np.uint8), _OFFSETS: offsets}


def has_thumbnails(model: Model) -> bool:
  """Tells whether the model has pictures of its training images."""
  return _FILES in model.arrays


def thumbnails(model: Model) -> list[bytes]:
  """Unpacks the JPEG files that `pack` took; [] if the model has none."""
  if not has_thumbnails(model):
    return []
  data, offsets = np.asarray(model.arrays[_FILES]), np.asarray(model.arrays[_OFFSETS])
  return [data[a:b].tobytes() for a, b in zip(offsets, offsets[1:])]


def has_colour(images: np.ndarray) -> np.ndarray:
  """Tells which images [..., h, w, 3] have a pixel that is not gray: [...] bool.

  >>> has_colour(np.array([[[[7, 7, 7]]], [[[7, 7, 8]]]], np.uint8)).tolist()
  [False, True]
  """
  return (images != images[..., :1]).any((-3, -2, -1))


def colours(coloured: Sequence[bool]) -> str:
  """Says in a word, for a model's description, which of its images have colour; '' for none."""
  if not len(coloured):
    return ''
  return 'coloured' if all(coloured) else 'both' if any(coloured) else 'gray'


def colours_of_both(one: str, other: str) -> str:
  """Joins what two descriptions say.

  >>> colours_of_both('gray', 'coloured'), colours_of_both('gray', '')
  ('both', '')
  """
  return one if one == other else 'both' if one and other else ''


class Recorder:
  """Passes batches on, and keeps which images there were.

  Attributes:
    index: positions of the images in the list of examples, in the order of the batches.
    files: their pictures, if they are kept.
    coloured: which of them have colour; [] where features stand in for images.
  """

  def __init__(self, batches: Iterable, keep_images: bool):
    self._batches, self._keep_images = batches, keep_images
    self.index: list[int] = []
    self.files: list[bytes] = []
    self.coloured: list[bool] = []

  def __iter__(self):
    for batch in self._batches:
      self.index += batch.index[batch.valid].tolist()
      if isinstance(batch.image, np.ndarray):
        self.coloured += has_colour(batch.image[batch.valid]).tolist()
      if self._keep_images:
        self.files += map(encode, batch.image[batch.valid])
      yield batch
