"""Banks live on: later good images are added, banks united, images taken out, banks made smaller.

Every function takes banks and gives a new one, with a line in its history; nothing is written. What happens
to the thresholds is said at each.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jax.numpy as jnp
import numpy as np

from patchcore_jax.banks import provenance, store
from patchcore_jax.banks.store import MemoryBank
from patchcore_jax.inspection import calibration
from patchcore_jax.search import coreset, k_center, neighbors

_ORDERED = 'ordered'  # in the description: False where rows are no longer in the order of one selection
_RADIUS = 'covering_radius'
_LAST = 0.02  # share of the rows, the last selected, that tell how densely the bank covers
_BLOCK = 1024
# Two banks with other entries cannot be one.
_ALIKE = ('backbone', 'embedding', 'preprocess', 'scoring', 'grid', 'image_size')


def covering_radius(bank: MemoryBank) -> float:
  """How near a patch must be to one of the bank to count as covered.

  Greedy selection takes the patch that is farthest from all before it: when it stops, all others are nearer
  than the last one was. This is the median distance of the last 2 % to their nearest neighbours.
  """
  if known := bank.description.get(_RADIUS):
    return known
  last = max(1, int(_LAST * len(bank.embeddings)))
  k = min(2, len(bank.embeddings))  # the nearest is the row itself
  distances_sq, _ = neighbors.nearest_neighbors(bank.embeddings[-last:], bank.embeddings, k=k)
  return float(np.median(np.sqrt(np.asarray(distances_sq)[:, k - 1])))


def append(
    bank: MemoryBank,
    embeddings: np.ndarray,
    names: Sequence[str],
    *,
    files: Sequence[bytes] = (),
    image_scores: Sequence[float] = (),
    map_maxima: Sequence[float] = (),
) -> MemoryBank:
  """Adds patches of further good images, as far as the bank does not cover them yet.

  Args:
    bank: its rows stay, in front.
    embeddings: [n, rows, columns, d] of the new images.
    names: [n] of their files.
    files: [n] their pictures (`provenance.encode`), if the bank has pictures.
    image_scores, map_maxima: [n], of the new images against `bank`, if it has thresholds. They had not been
      seen by it, so they count for the thresholds beside the scores that are there.

  Returns:
    The bank with at most the share of new patches with which it was selected: the farthest first, as greedy
    selection would, down to `covering_radius`.

  Raises:
    ValueError: embeddings of another grid or size, or lists that differ in length.
  """
  n, *grid, dim = embeddings.shape
  if grid != list(bank.description['grid']) or dim != bank.embeddings.shape[1]:
    raise ValueError(
        f'Embeddings {embeddings.shape}: expected [n, {", ".join(map(str, bank.description["grid"]))}, '
        f'{bank.embeddings.shape[1]}], as the bank has them.')
  with_thresholds = bank.description.get('calibration')
  for what, values, needed in (
      ('names', names, True), ('files', files, provenance.has_thumbnails(bank)),
      ('image_scores', image_scores, with_thresholds), ('map_maxima', map_maxima, with_thresholds)):
    if len(values) != (n if needed else 0):
      raise ValueError(f'{what}: expected {n if needed else 0} for this bank, got {len(values)}.')
  points = embeddings.reshape(-1, dim)
  most = coreset.coreset_size(len(points), bank.description['coreset']['ratio'])
  radius = covering_radius(bank)
  chosen = _uncovered(points, bank.embeddings, radius, most)
  first = bank.description['num_images'] * grid[0] * grid[1]
  return _extended(
      bank, points[chosen], first + chosen, radius,
      names=names, files=files, image_scores=image_scores, map_maxima=map_maxima,
      what=f'appended {n} images, {len(chosen)} patches')


def merge(bank: MemoryBank, other: MemoryBank) -> MemoryBank:
  """One bank that covers what either does.

  Args:
    bank: its rows stay, in front; its covering radius and false-alarm rate hold.
    other: made in the same way; its rows are added where `bank` does not cover them. Where only one of the
      two has thresholds the result has none; else they are made of the scores of both: each image was scored
      against a bank without it, and a larger bank gives smaller scores, so the thresholds err towards fewer
      alarms. Pictures are kept if both have them.

  Raises:
    BankError: they were made in different ways.
  """
  store.check(bank.description, {k: other.description[k] for k in _ALIKE if k in other.description})
  radius = covering_radius(bank)
  chosen = _uncovered(np.asarray(other.embeddings), bank.embeddings, radius, len(other.embeddings))
  rows, columns = bank.description['grid']
  first = bank.description['num_images'] * rows * columns
  found = other.description.get('calibration') or {'image_scores': (), 'map_maxima': ()}
  result = _extended(
      bank, np.asarray(other.embeddings)[chosen], first + np.asarray(other.indices)[chosen], radius,
      names=other.description.get('images', ()), files=provenance.thumbnails(other),
      image_scores=found['image_scores'], map_maxima=found['map_maxima'], allowances=_allowances(found),
      num_images=other.description['num_images'],
      what=f'merged with a bank of {len(other.embeddings)} patches, {len(chosen)} of them added')
  if not other.description.get('calibration'):
    result.description.pop('calibration', None)
  if not (provenance.has_thumbnails(bank) and provenance.has_thumbnails(other)):
    result.extras.clear()
  return result


def drop(bank: MemoryBank, names: Sequence[str]) -> MemoryBank:
  """Takes the patches of some training images out, as of one that was not good after all.

  What only they covered is covered no more. Their scores leave the thresholds; the scores of the others stay,
  though they were made with these patches in the bank.

  Args:
    bank: that knows its images.
    names: as the bank has them, or their last parts if that is clear.

  Raises:
    ValueError: an image that the bank does not have, a part that several have, or nothing left.
  """
  images = bank.description.get('images', ())
  gone = sorted({_position(name, images) for name in names})
  rows, columns = bank.description['grid']
  patches = rows * columns
  image = np.asarray(bank.indices) // patches
  keep = ~np.isin(image, gone)
  if not keep.any():
    raise ValueError(f'These {len(gone)} images are all that the bank has: nothing would be left.')
  renumbered = np.cumsum(~np.isin(np.arange(len(images)), gone)) - 1

  def remaining(values):
    return [v for i, v in enumerate(values) if i not in gone]

  description = bank.description | {
      'images': remaining(images), 'num_images': len(images) - len(gone),
      'num_patches': bank.description['num_patches'] - len(gone) * patches}
  if found := description.get('calibration'):
    description['calibration'] = _recalibrated(
        found, remaining(found['image_scores']), remaining(found['map_maxima']))
  provenance.record(
      description, f'dropped {", ".join(images[i] for i in gone)}: {int((~keep).sum())} patches')
  indices = renumbered[image[keep]] * patches + np.asarray(bank.indices)[keep] % patches
  return MemoryBank(
      np.asarray(bank.embeddings)[keep], indices.astype(np.int32), description,
      provenance.pack(remaining(provenance.thumbnails(bank))))


def shrink(bank: MemoryBank, ratio: float) -> MemoryBank:
  """The bank of a smaller ratio.

  The first rows of a greedy selection are that bank; where rows were added since, they are selected anew. A
  smaller bank gives larger scores, so the thresholds are gone: `calibrate` with good images makes new ones.

  Args:
    ratio: of the training patches, in (0, 1].

  Raises:
    ValueError: a ratio that is not smaller.
  """
  size = coreset.coreset_size(bank.description['num_patches'], ratio)
  if size >= len(bank.embeddings):
    raise ValueError(
        f'Ratio {ratio} keeps {size} of {bank.description["num_patches"]} patches, and the bank holds '
        f'{len(bank.embeddings)}: expected a smaller one.')
  if bank.description.get(_ORDERED, True) and bank.description['coreset']['method'] == 'greedy':
    chosen = np.arange(size)
  else:
    chosen = coreset.greedy_k_center(
        np.asarray(bank.embeddings), size, start=np.arange(min(10, len(bank.embeddings))))
  description = bank.description | {
      'coreset': bank.description['coreset'] | {'ratio': ratio}, _ORDERED: True}
  description.pop('calibration', None)
  description.pop(_RADIUS, None)
  provenance.record(description, f'shrunk from {len(bank.embeddings)} to {size} patches')
  return MemoryBank(
      np.asarray(bank.embeddings)[chosen], np.asarray(bank.indices)[chosen], description, dict(bank.extras))


def calibrate(
    bank: MemoryBank, image_scores: Sequence[float], map_maxima: Sequence[float], *,
    false_alarm_rate: float, allowances: tuple[float, float] = (0.0, 0.0)) -> MemoryBank:
  """The bank with thresholds from good images that are not in it; the guarantee is then exact.

  Args:
    image_scores, map_maxima: [n], of those images against `bank`.
    false_alarm_rate: of good images, in (0, 1).
    allowances: for other kinds of devices, see `calibration.Calibration`.
  """
  found = calibration.calibrate(
      image_scores, map_maxima, false_alarm_rate=false_alarm_rate, allowances=allowances)
  description = bank.description | {'calibration': calibration.to_json(found)}
  provenance.record(description, f'thresholds from {len(image_scores)} images that are not in the bank')
  return MemoryBank(bank.embeddings, bank.indices, description, bank.extras)


def _uncovered(points, rows, radius, most) -> np.ndarray:
  """Positions of at most `most` points, each farther than `radius` from all rows and those before it."""
  prepared = neighbors.prepare(rows)
  distances_sq = np.concatenate([
      np.asarray(neighbors.nearest_neighbors(points[i:i + 8 * _BLOCK], prepared)[0])[:, 0]
      for i in range(0, len(points), 8 * _BLOCK)])
  outside = np.flatnonzero(distances_sq > radius**2)
  if not len(outside):
    return outside
  points, distances_sq = points[outside], distances_sq[outside]
  size = min(most, len(points))
  # A selection that goes on: its distances so far are those to the bank.
  state = k_center.initial_state(jnp.asarray(distances_sq), size)
  order = coreset.greedy_k_center(points, size, start=[0], resume=state)
  inserted_sq = np.minimum(distances_sq[order], _to_earlier_sq(points[order]))
  return outside[order[:int(np.argmax(np.append(inserted_sq, 0) <= radius**2))]]


def _to_earlier_sq(points) -> np.ndarray:
  """[n] squared distance of every point to the nearest of those before it; infinite for the first."""
  result = np.full(len(points), np.inf, np.float32)
  points = points.astype(np.float64)  # near points are a small difference of large squares
  squares = (points**2).sum(axis=1)
  for i in range(0, len(points), _BLOCK):
    block, earlier = points[i:i + _BLOCK], points[:i + _BLOCK]
    found = squares[i:i + len(block), None] + squares[None, :len(earlier)] - 2 * (block @ earlier.T)
    found[np.arange(len(earlier))[None] >= np.arange(i, i + len(block))[:, None]] = np.inf
    result[i:i + len(block)] = np.maximum(found.min(axis=1), 0)
  return result


def _extended(
    bank, rows, indices, radius, *, names, files, image_scores, map_maxima, what, num_images=None,
    allowances=(0.0, 0.0)):
  num_images = len(names) if num_images is None else num_images
  grid = bank.description['grid']
  description = bank.description | {
      'images': [*bank.description.get('images', ()), *names],
      'num_images': bank.description['num_images'] + num_images,
      'num_patches': bank.description['num_patches'] + num_images * grid[0] * grid[1],
      _RADIUS: radius, _ORDERED: False}
  if found := description.get('calibration'):
    description['calibration'] = _recalibrated(
        found, [*found['image_scores'], *image_scores], [*found['map_maxima'], *map_maxima],
        tuple(map(max, _allowances(found), allowances)))
  provenance.record(description, what)
  return MemoryBank(
      np.concatenate([bank.embeddings, rows]),
      np.concatenate([bank.indices, indices]).astype(np.int32), description,
      provenance.pack([*provenance.thumbnails(bank), *files]))


def _recalibrated(found: dict[str, Any], image_scores, map_maxima, allowances=None):
  return calibration.to_json(calibration.calibrate(
      image_scores, map_maxima, false_alarm_rate=found['false_alarm_rate'], method=found['method'],
      allowances=allowances or _allowances(found)))


def _allowances(found: Mapping[str, Any]) -> tuple[float, float]:
  """Reads the allowances of a calibration, none where an older version made it."""
  return found.get('image_allowance', 0.0), found.get('pixel_allowance', 0.0)


def _position(name, images):
  at = [i for i, image in enumerate(images) if image == name] or [
      i for i, image in enumerate(images) if PurePath(image).match(name)]
  if len(at) == 1:
    return at[0]
  if at:
    several = ', '.join(images[i] for i in at[:5])
    raise ValueError(f'{name} may be each of {several}: give more of the path.')
  near = difflib.get_close_matches(name, [*images, *(PurePath(i).name for i in images)], 1)
  raise ValueError(
      f'The bank has no training image {name!r}' + (f'; did you mean {near[0]!r}?' if near else '.') +
      ' `experiments.bank info` lists them.')
