"""Finds images of a test that are in its training too, by what the network sees: whatever their names, and
whatever they were saved as.

Images are compared where they pass by anyway. None is read twice for it, and equal ones are found whose files
differ: saved anew, or under another format without loss.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchcore_jax import processes
from patchcore_jax.data import image_files
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.folder import Example
from patchcore_jax.data.pipeline import Batch


@dataclasses.dataclass(frozen=True)
class DigestedData(FileData):
  """Image files, of which every image that passes by leaves a digest.

  Attributes:
    digests: of the images so far, by the paths of their files; parts of the data fill the same.
  """

  digests: dict[str, bytes] = dataclasses.field(default_factory=dict)

  def batches(self, **arguments) -> Iterator[Batch]:
    """Yields the images in batches, as `FileData` does."""
    for batch in FileData.batches(self, **arguments):
      if arguments.get('augment') is None:  # augmented pixels are not those of the file
        for image, position in zip(batch.image, batch.index, strict=True):
          if position >= 0 and (path := self.examples[position].image_path) not in self.digests:
            self.digests[path] = hashlib.sha256(np.ascontiguousarray(image)).digest()
      yield batch


class Leaks(NamedTuple):
  """What training and test have in common.

  Attributes:
    pairs: (test image, training image) that are equal, one pair for each such test image.
    tested: number of test images.
    contradictions: (good test image, anomalous test image) that are equal.
  """

  pairs: tuple[tuple[str, str], ...]
  tested: int
  contradictions: tuple[tuple[str, str], ...]

  def lines(self) -> list[str]:
    """Says it, in a line each."""
    lines = []
    if self.pairs:
      test, train = self.pairs[0]
      lines.append(
          f'{len(self.pairs)} of {self.tested} test images are training images: {_by_folder(self.pairs)}; '
          f'{_short(test)} is {_short(train)}. The numbers are too good: take them out of one of the two')
    if self.contradictions:
      good, bad = self.contradictions[0]
      lines.append(
          f'{_count(len(self.contradictions), "test image")} both good and anomalous: {_short(good)} is '
          f'{_short(bad)}. Take them out of one of the two')
    return [image_files.shown(line) for line in lines]


def find(train: Mapping[str, bytes], test: Sequence[tuple[Example, bytes]]) -> Leaks:
  """Compares the digests of training and test images.

  Args:
    train: digest of each training image, by the path of its file.
    test: the test images, with theirs.

  >>> image = Example('test/0.png', (), 0, 'nut', 'good')
  >>> find({'train/7.png': b'a'}, [(image, b'a'), (image._replace(image_path='test/1.png'), b'b')]).pairs
  (('test/0.png', 'train/7.png'),)
  """
  names = {digest: path for path, digest in sorted(train.items(), reverse=True)}
  good = {digest: e.image_path for e, digest in reversed(test) if not e.label}
  return Leaks(
      tuple((e.image_path, names[digest]) for e, digest in test if digest in names), len(test),
      tuple((good[digest], e.image_path) for e, digest in test if e.label and digest in good))


def gathered(data: DigestedData, positions: Sequence[int] | None = None) -> list[tuple[int, bytes]]:
  """Gathers the digests of data that each of several processes has read a part of.

  Args:
    data: the data, all of it in each process.
    positions: those that this process has read; None for all of which it has a digest.

  Returns:
    Positions and digests, in the order of the processes.
  """
  if positions is None:
    positions = [i for i, e in enumerate(data.examples) if e.image_path in data.digests]
  digests = processes.joined_files([data.digests[data.examples[i].image_path] for i in positions])
  return list(zip(processes.joined(np.array(positions, np.int32)).tolist(), digests, strict=True))


def read(data: DigestedData) -> None:
  """Reads the images, unless some have passed by; of several processes, each reads its part.

  A bank that is used again outlives its training images: those that cannot be read are left out.
  """
  if not processes.counts(sum(e.image_path in data.digests for e in data.examples)).any():
    part = processes.part(len(data))
    data = dataclasses.replace(data.part(range(part.start, part.stop)), on_error=lambda error: None)
    for _ in data.batches():
      pass


def _count(n: int, word: str) -> str:
  """Counts things that are."""
  return f'{n} {word} is' if n == 1 else f'{n} {word}s are'


def _by_folder(pairs) -> str:
  """Counts the test images of each folder."""
  counts = collections.Counter('/'.join(Path(test).parts[-3:-1]) for test, _ in pairs)
  return ', '.join(f'{n} in {name}' for name, n in counts.items())


def _short(path: str) -> str:
  """Cuts a path to its last three parts."""
  return '/'.join(Path(path).parts[-3:])
