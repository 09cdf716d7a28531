"""The built-in demo data set: four parts on a line, drawn by program, in the MVTec layout.

    woven_fabric    texture, 300 x 300   hole, snag, stain, wrong_yarn
    wood_veneer     texture, 300 x 300   crack, scratch, stain, worm_holes
    gear            object, 300 x 300    broken_tooth, dent, rust, scratch, wrong_hole; grey files
    circuit_board   object, 320 x 280    misplaced_part, missing_part, scratch, solder_bridge,
                                         wrong_part

Each category has 60 good images to train on and 40 to test with, of which 15 or 16 are good. Good
parts differ in pose, light, grain, material and tolerances. Defects of a kind run from hardly
visible (index 0) to plain. Masks are exact: the pixels that the defect changed, see `draw`.

It is there so that a first run, the tests and a demonstration need no download. It is no benchmark:
numbers on it say that the software works, not how well a method does on real parts.

`synthetic_scene` has the lamp and the camera, `synthetic_parts` and `synthetic_board` the parts.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import itertools
import json
import multiprocessing
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from patchcore_jax.builtin import synthetic_board, synthetic_parts, synthetic_scene

VERSION = 1  # version of the drawings; raise it whenever a pixel of any image changes
MARKER = 'synthetic.json'  # lies in every category folder that is complete
VISIBLE = 6  # a change of more than this many of 255 levels, before grain, belongs to the mask
FAINTEST = 0.45  # severity of the hardest image of each kind; below it even people miss some
MIN_MASK = 12  # pixels; a flaw that shows less (hidden under another part, say) is drawn anew
NUM_TRAIN = 60
NUM_TEST = 40


class Subject(NamedTuple):
  """How a category is drawn.

  Attributes:
    part: a function `(rng, flaw, size) -> Surface`.
    size: height and width of the images in pixels.
    defects: the kinds of defect.
    num_each: test images of each kind; the rest of the `NUM_TEST` are good.
    mode: Pillow mode of the files, 'RGB' or 'L'.
  """

  part: Callable[..., synthetic_scene.Surface]
  size: tuple[int, int]
  defects: tuple[str, ...]
  num_each: int
  mode: str = 'RGB'


SUBJECTS = {
    'woven_fabric': Subject(
        synthetic_parts.woven_fabric, (300, 300), ('hole', 'snag', 'stain', 'wrong_yarn'), 6),
    'wood_veneer': Subject(
        synthetic_parts.wood_veneer, (300, 300), ('crack', 'scratch', 'stain', 'worm_holes'), 6),
    'gear': Subject(
        synthetic_parts.gear, (300, 300),
        ('broken_tooth', 'dent', 'rust', 'scratch', 'wrong_hole'), 5, 'L'),
    'circuit_board': Subject(
        synthetic_board.circuit_board, (280, 320),
        ('misplaced_part', 'missing_part', 'scratch', 'solder_bridge', 'wrong_part'), 5),
}
CATEGORIES: tuple[str, ...] = tuple(SUBJECTS)


def images_of(category: str) -> list[tuple[str, str, int]]:
  """Lists the images of a category: (split, defect, index), good ones first.

  Raises:
    ValueError: unknown category.

  >>> len(images_of('gear')), images_of('gear')[0], images_of('gear')[-1]
  (100, ('train', 'good', 0), ('test', 'wrong_hole', 4))
  """
  subject = _subject(category)
  num_good = NUM_TEST - subject.num_each * len(subject.defects)
  return ([('train', 'good', n) for n in range(NUM_TRAIN)]
          + [('test', 'good', n) for n in range(num_good)]
          + [('test', defect, n) for defect in subject.defects for n in range(subject.num_each)])


def draw(
    category: str, split: str, defect: str, index: int, *, seed: int = 0, flawless: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws one image and its mask; the same arguments give the same pixels.

  The part is drawn twice with the same dice, with and without the flaw. The mask is where the two
  pictures differ by more than `VISIBLE` levels in any channel before the sensor's grain, with gaps
  of up to four pixels closed. Outside the mask the defect has therefore changed next to nothing.

  Args:
    category: one of `CATEGORIES`.
    split: 'train' or 'test'.
    defect: 'good', or a kind of defect that the category has (split 'test' only).
    index: number of the image, from 0. Within a kind of defect the severity rises from index 0 to
      the last that `images_of` names, and starts again after it.
    seed: another number gives another data set.
    flawless: leave the flaw out of the picture (the mask still shows where it would have been).

  Returns:
    image `[h, w, 3]` uint8 (three equal channels for grey categories), and mask `[h, w]` uint8,
    255 on the defect and 0 elsewhere; all 0 for 'good', never all 0 otherwise.

  Raises:
    ValueError: unknown category, split or defect, or a negative index.

  >>> image, mask = draw('circuit_board', 'test', 'missing_part', 0)
  >>> image.shape, image.dtype, mask.shape, sorted(set(mask.ravel().tolist()))
  ((280, 320, 3), dtype('uint8'), (280, 320), [0, 255])
  """
  subject = _subject(category)
  allowed = {'train': ('good',), 'test': ('good', *subject.defects)}
  if defect not in allowed.get(split, ()):
    raise ValueError(
        f'{category} has no {split!r} images of {defect!r}. Choose from '
        f'{", ".join(f"{s}/{d}" for s, names in allowed.items() for d in names)}.')
  if index < 0:
    raise ValueError(f'The index of an image counts from 0, but is {index}.')
  name = f'{seed}/{category}/{split}/{defect}/{index}'

  def picture(kind, attempt=0):
    rng = _dice(f'{name}/part')
    camera = synthetic_scene.Camera.placed(rng)
    severity = FAINTEST + (1 - FAINTEST) * (index % subject.num_each) / (subject.num_each - 1)
    flaw = synthetic_scene.Flaw(kind, severity, _dice(f'{name}/flaw/{attempt}'))
    return synthetic_scene.photograph(subject.part(rng, flaw, subject.size), camera)

  shown = clean = picture('good')
  mask = np.zeros(subject.size, np.uint8)
  if defect != 'good':
    for attempt in itertools.count():
      flawed = picture(defect, attempt)
      changed = (np.abs(flawed - clean).max(axis=2) > VISIBLE).astype(np.uint8) * 255
      if np.count_nonzero(changed) >= MIN_MASK:
        break
    closed = Image.fromarray(changed).filter(ImageFilter.MaxFilter(5))
    mask = np.asarray(closed.filter(ImageFilter.MinFilter(5)))
    shown = clean if flawless else flawed
  image = synthetic_scene.grain(_dice(f'{name}/grain'), shown)
  return np.repeat(image, 3 // image.shape[2], axis=2), mask


def prepare(
    root: str | os.PathLike, *, categories: Sequence[str] = CATEGORIES, num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
  """Writes the data set below `root`, category by category, in the MVTec layout.

      ROOT/<category>/train/good/000.png
      ROOT/<category>/test/good/000.png
      ROOT/<category>/test/<defect>/000.png
      ROOT/<category>/ground_truth/<defect>/000_mask.png
      ROOT/<category>/synthetic.json               says that the category is complete

  A category that is already there is left alone. A category appears at once and complete, so a run
  that is killed leaves at most a folder `.drawing-*`, which nobody reads and which may be deleted;
  and several processes may prepare the same root at the same time.

  Args:
    root: folder to write to; made if missing.
    categories: names of the categories to draw.
    num_workers: processes that draw; 0 draws in this one. They are started afresh ('spawn', since a
      process that runs JAX must not be forked), so a script that asks for them needs the usual
      `if __name__ == '__main__':`.
    progress: called as `progress(done, total)` after every image; counts what had to be drawn.

  Returns:
    `root` as a path.

  Raises:
    ValueError: unknown category, negative `num_workers`, or a folder in the way: one of a
      category's name that this function did not write, or wrote in another version. Nothing is
      deleted.
  """
  root = Path(root)
  if num_workers < 0:
    raise ValueError(f'num_workers must be 0 (draw in this process) or more, but is {num_workers}.')
  todo = {c: images_of(c) for c in categories}
  todo = {c: images for c, images in todo.items() if not _is_complete(root / c)}
  if not todo:
    return root
  root.mkdir(parents=True, exist_ok=True)
  done, total = 0, sum(map(len, todo.values()))
  # The drawing folder has the categories one level deeper than `root`, so that even a leftover of a
  # killed run cannot pass for a category.
  with tempfile.TemporaryDirectory(prefix='.drawing-', dir=root) as drawing, _mapper(
      min(num_workers, total)) as mapper:
    for category, images in todo.items():
      folder = Path(drawing, category)
      for _ in mapper(_write, [(folder, category, *image) for image in images]):
        done += 1
        if progress is not None:
          progress(done, total)
      (folder / MARKER).write_text(json.dumps({'drawn_by': __name__, 'version': VERSION}) + '\n')
      try:
        folder.rename(root / category)
      except OSError:
        if not _is_complete(root / category):  # else another process was quicker: as good
          raise
  return root


def _subject(category):
  """Finds the subject of this name; raises a ValueError that lists the names."""
  if category not in SUBJECTS:
    raise ValueError(
        f'Unknown category {category!r}. The built-in data set has {", ".join(CATEGORIES)}.')
  return SUBJECTS[category]


def _dice(name):
  """Makes a random generator that depends on nothing but the name."""
  return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _is_complete(folder):
  """Tells whether this version has drawn the category in `folder`; False if nothing is there."""
  if not folder.exists():
    return False
  remedy = 'Delete or move that folder, or choose another root.'
  try:
    version = json.loads((folder / MARKER).read_text())['version']
  except (OSError, ValueError, KeyError, TypeError):
    raise ValueError(
        f'{folder} is in the way: expected a category of the built-in data set, but its {MARKER} '
        f'is missing or unreadable, so it seems to be something else. {remedy}') from None
  if version != VERSION:
    raise ValueError(
        f'{folder} was drawn by version {version} of the built-in data set, but this is version '
        f'{VERSION}. {remedy}')
  return True


@contextlib.contextmanager
def _mapper(num_workers):
  """Gives a `map`: that of a pool of processes, or the ordinary one for 0 workers."""
  if num_workers == 0:
    yield map
    return
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(
      num_workers, mp_context=spawn, initializer=_keep_freed_memory) as pool:
    try:
      yield functools.partial(pool.map, chunksize=4)
    except BaseException:  # Ctrl-C included: do not draw the rest of the category first
      pool.shutdown(wait=True, cancel_futures=True)
      raise


def _keep_freed_memory():
  """Has glibc keep what is freed: else the kernel clears each map of some megabytes, 14 % of the time."""
  trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
  with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(trim_threshold, 2**29)
    mallopt(mmap_threshold, 2**25)


def _write(task):
  """Draws one image and writes its file, or files."""
  folder, category, split, defect, index = task
  image, mask = draw(category, split, defect, index)
  if SUBJECTS[category].mode == 'L':
    image = image[:, :, 0]
  _save(image, folder / split / defect / f'{index:03d}.png')
  if defect != 'good':
    _save(mask, folder / 'ground_truth' / defect / f'{index:03d}_mask.png')


def _save(pixels, path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, compress_level=1)  # grain hardly compresses; 6 is slow
