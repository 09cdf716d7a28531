"""Banks live on: later good images are added, banks united, images taken out, banks made smaller.

Every function takes banks and gives a new one, with a line in its history; nothing is written. What happens
to the thresholds is said at each.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from patchcore_jax import scoring
from patchcore_jax.banks import calibration, provenance
from patchcore_jax.banks.model import BankError, Calibration, Model, from_json, to_json
from patchcore_jax.search import coreset, k_center, neighbors, search_bank
from patchcore_jax.settings import ScoringSpec

_LAST = 0.02  # share of the rows, the last selected, that tell how densely the bank covers
_BLOCK = 1024
_PARTS = 5  # of the images, whose rows are measured against those of the others
_TINY = 1e-30  # in place of a radius of 0
# Two banks that differ in these cannot be one.
_ALIKE = ('preprocessing', 'grid', 'image_size')


def covering_radius(bank: Model) -> float:
  """Measures how near a patch must be to one of the bank to count as covered.

  Greedy selection takes the patch that is farthest from all before it: when it stops, all others are nearer
  than the last one was. This is the median distance of the last 2 % to their nearest neighbours.
  """
  if known := bank.description.covering_radius:
    return known
  rows = _rows(bank)
  last = max(1, int(_LAST * len(rows)))
  k = min(2, len(rows))  # the nearest is the row itself
  distances_sq, _ = neighbors.nearest_neighbors(rows[-last:], rows, k=k)
  return float(np.median(np.sqrt(np.asarray(distances_sq)[:, k - 1])))


def append(
    bank: Model,
    embeddings: np.ndarray,
    names: Sequence[str],
    *,
    files: Sequence[bytes] = (),
    image_scores: Sequence[float] = (),
    map_maxima: Sequence[float] = (),
    cells: np.ndarray | None = None,
) -> Model:
  """Adds patches of further good images, as far as the bank does not cover them yet.

  Args:
    bank: its rows stay, in front.
    embeddings: [n, rows, columns, d] of the new images; of a bank of turned images, at all angles one below
      the other.
    names: [n] of their files.
    files: [n] their pictures (`provenance.encode`), if the bank has pictures.
    image_scores, map_maxima: [n], of the new images against `bank`, if it has thresholds. They had not been
      seen by it, so they count for the thresholds beside the scores that are there.
    cells: [k], the patch of the upright image that each of an image's k embeddings shows; None where images
      are not turned.

  Returns:
    The bank with at most the share of new patches with which it was selected: the farthest first, as greedy
    selection would, down to `covering_radius`.

  Raises:
    ValueError: embeddings of another grid or size, or lists that differ in length.
  """
  _check_grid(bank, embeddings)
  n, with_thresholds = len(embeddings), bank.description.calibration
  for what, values, needed in (
      ('names', names, True), ('files', files, provenance.has_thumbnails(bank)),
      ('image_scores', image_scores, with_thresholds), ('map_maxima', map_maxima, with_thresholds)):
    if len(values) != (n if needed else 0):
      raise ValueError(f'{what}: expected {n if needed else 0} for this bank, got {len(values)}.')
  points, chosen, radius = _chosen(bank, embeddings)
  positions = upright(bank.description.grid, chosen, cells)
  return _extended(
      bank, points[chosen], bank.description.num_patches + positions, radius,
      names=names, files=files, image_scores=image_scores, map_maxima=map_maxima,
      what=f'appended {n} images, {len(chosen)} patches')


def upright(grid: tuple[int, int], positions: np.ndarray, cells: np.ndarray | None) -> np.ndarray:
  """Converts positions among the patches of images at all angles to those of the upright images.

  Args:
    grid: (rows, columns) of an image's patches.
    positions: image * k + patch, with k patches at all angles.
    cells: [k], see `append`; None where images have one angle.
  """
  if cells is None:
    return positions
  image, patch = np.divmod(positions, len(cells))
  return image * (grid[0] * grid[1]) + cells[patch]


def appended_rows(bank: Model, embeddings: np.ndarray) -> np.ndarray:
  """Computes the rows that the bank would have if these embeddings [n, rows, columns, d] were appended."""
  _check_grid(bank, embeddings)
  points, chosen, _ = _chosen(bank, embeddings)
  return np.concatenate([_rows(bank), points[chosen]])


class Comparison(NamedTuple):
  """How the rows of another bank, made in the same way, lie to those of a bank.

  Attributes:
    distance: the median distance of the other's rows to the nearest of the bank, in its covering radii.
    own: the same of the bank's own rows to those of its other images. Those of new good images lie nearer,
      because no selection kept them apart. 1 for a bank of one image.
    rows: [m] of each training image of the other that has rows, the one farthest from the bank.
    nearest: [m] the rows of the bank nearest to those.
    scores: [m] what those images score at least; with a foreground, unless those rows are background.
  """

  distance: float
  own: float
  rows: np.ndarray
  nearest: np.ndarray
  scores: np.ndarray


def compare(bank: Model, other: Model) -> Comparison:
  """Compares another bank with a bank, before the two are merged.

  Raises:
    BankError: they were made in different ways, or not both are banks.
  """
  check_alike(bank, other)
  spec = from_json(ScoringSpec, bank.description.settings['scoring'])
  theirs, prepared = _rows(other), search_bank.prepare(_rows(bank))
  distances_sq, indices = _nearest(theirs, prepared, spec.num_neighbors)
  scores = np.asarray(scoring.patch_scores(jnp.asarray(distances_sq), spec))
  order = np.lexsort((-scores, _images_of(other)))  # by image, the farthest row of each first
  _, first = np.unique(_images_of(other)[order], return_index=True)
  rows = order[first]
  if spec.image_score in ('reweighted', 'reweighted_squared'):
    scores = np.full(len(scores), np.nan)
    scores[rows] = scoring.reweighted_image_scores(
        jnp.asarray(theirs[rows, None]), jnp.asarray(distances_sq[rows, None]),
        jnp.asarray(indices[rows, None]), prepared, spec)
  elif spec.image_score == 'top_share':  # the others may be 0
    scores = scores / scoring.top_count(math.prod(bank.description.grid), spec.top_share)
  radius = max(covering_radius(bank), _TINY)
  return Comparison(
      float(np.median(np.sqrt(distances_sq[:, 0]))) / radius, _own_distance(bank) / radius, rows,
      indices[rows, 0], scores[rows])


def merge(bank: Model, other: Model) -> Model:
  """Unites two banks in one that covers what either does.

  Args:
    bank: its rows stay, in front; its covering radius and false-alarm rate hold.
    other: made in the same way; its rows are added where `bank` does not cover them. Where only one of the
      two has thresholds the result has none; else they are made of the scores of both: each image was scored
      against a bank without it, and a larger bank gives smaller scores, so the thresholds err towards fewer
      alarms. Pictures are kept if both have them.

  Raises:
    BankError: they were made in different ways, or not both are banks.
  """
  check_alike(bank, other)
  radius = covering_radius(bank)
  chosen = _uncovered(_rows(other), _rows(bank), radius, len(_rows(other)))
  found = other.description.calibration
  result = _extended(
      bank, _rows(other)[chosen], bank.description.num_patches + np.asarray(other.arrays['indices'])[chosen],
      radius, names=other.description.images, files=provenance.thumbnails(other),
      image_scores=found.image_scores if found else (), map_maxima=found.map_maxima if found else (),
      allowances=_allowances(found), num_images=other.description.num_images,
      what=f'merged with a bank of {len(_rows(other))} patches, {len(chosen)} of them added')
  result = result.with_description(
      outside_range=max(bank.description.outside_range, other.description.outside_range),
      colours=provenance.colours_of_both(bank.description.colours, other.description.colours))
  if not found:
    result = result.with_description(calibration=None)
  if not (provenance.has_thumbnails(bank) and provenance.has_thumbnails(other)):
    result = result._replace(arrays={k: result.arrays[k] for k in ('embeddings', 'indices')})
  return result


def drop(bank: Model, names: Sequence[str]) -> Model:
  """Takes the patches of some training images out, as of one that was not good after all.

  What only they covered is covered no more. Their scores leave the thresholds; the scores of the others stay,
  though they were made with these patches in the bank.

  Args:
    bank: a bank that knows its images.
    names: names of images, as the bank has them, or their last parts if that is clear.

  Raises:
    ValueError: an image that the bank does not have, a part that several have, or nothing left.
  """
  check_is_bank(bank)
  description, images = bank.description, bank.description.images
  gone = sorted({
      position(name, images, f'The bank has no training image {name!r}', '`patchcore bank info` lists them.')
      for name in names})
  patches = description.grid[0] * description.grid[1]
  indices = np.asarray(bank.arrays['indices'])
  image = indices // patches
  keep = ~np.isin(image, gone)
  if not keep.any():
    raise ValueError(f'These {len(gone)} images are all that the bank has: nothing would be left.')
  renumbered = np.cumsum(~np.isin(np.arange(len(images)), gone)) - 1

  def remaining(values):
    return tuple(v for i, v in enumerate(values) if i not in gone)

  found = description.calibration
  arrays = {
      'embeddings': _rows(bank)[keep],
      'indices': (renumbered[image[keep]] * patches + indices[keep] % patches).astype(np.int32)}
  dropped = Model(arrays | provenance.pack(remaining(provenance.thumbnails(bank))), description)
  return dropped.with_description(
      images=remaining(images), num_images=len(images) - len(gone),
      calibration=found and _recalibrated(
          found, remaining(found.image_scores), remaining(found.map_maxima))).recorded(
              f'dropped {", ".join(images[i] for i in gone)}: {int((~keep).sum())} patches')


def shrink(bank: Model, ratio: float) -> Model:
  """Makes the bank of a smaller ratio.

  The first rows of a greedy selection are that bank; where rows were added since, they are selected anew. A
  smaller bank gives larger scores, so the thresholds are gone: `calibrate` with good images makes new ones.

  Args:
    ratio: the share of the training patches, in (0, 1].

  Raises:
    ValueError: a ratio that is not smaller.
  """
  rows, description = _rows(bank), bank.description
  size = coreset.coreset_size(description.num_candidates, ratio)
  if size >= len(rows):
    raise ValueError(
        f'Ratio {ratio} keeps {size} of {description.num_candidates} patches, and the bank holds '
        f'{len(rows)}: expected a smaller one.')
  if description.ordered and description.settings['coreset']['method'] in ('greedy', 'merge_reduce'):
    chosen = np.arange(size)
  else:
    chosen = coreset.greedy_k_center(rows, size, start=np.arange(min(10, len(rows))))
  arrays = {'embeddings': rows[chosen], 'indices': np.asarray(bank.arrays['indices'])[chosen]}
  return Model(bank.arrays | arrays, description).with_description(
      settings=description.settings | {'ratio': ratio}, ordered=True, covering_radius=None,
      calibration=None).recorded(f'shrunk from {len(rows)} to {size} patches')


def calibrate(
    model: Model, image_scores: Sequence[float], map_maxima: Sequence[float] | None, *,
    false_alarm_rate: float, allowances: tuple[float, float] = (0.0, 0.0)) -> Model:
  """Gives a model, of any method, thresholds from good images that it was not fitted on.

  The guarantee is then exact.

  Args:
    image_scores, map_maxima: [n], of those images; None for the maxima where the method has no maps.
    false_alarm_rate: the share of good images that may be called anomalous, in (0, 1).
    allowances: for other kinds of devices, see `Calibration`.
  """
  found = calibration.calibrate(
      image_scores, map_maxima, false_alarm_rate=false_alarm_rate, allowances=allowances)
  return model.with_description(calibration=found).recorded(
      f'thresholds from {len(image_scores)} images that were given as new')


def at_rate(model: Model, false_alarm_rate: float) -> Model:
  """Gives a model, of any method, thresholds for another rate, from the scores that it keeps.

  Args:
    false_alarm_rate: the share of good images that may be called anomalous, in (0, 1).

  Raises:
    ValueError: a model without thresholds, which keeps no scores, or a rate out of range.
  """
  found = model.description.calibration
  if found is None:
    raise ValueError('The model has no thresholds, and so no scores to make others from: give good images.')
  found = _recalibrated(
      dataclasses.replace(found, false_alarm_rate=false_alarm_rate), found.image_scores, found.map_maxima)
  return model.with_description(calibration=found).recorded(
      f'thresholds for a false-alarm rate of {false_alarm_rate:g}, from the {len(found.image_scores)} scores '
      'that were there')


def check_is_bank(model: Model) -> None:
  """Raises BankError for the model of a method without rows that can be added or taken out."""
  if 'embeddings' not in model.arrays or 'coreset' not in model.description.settings:
    raise BankError(
        f'A model of {model.description.detector} has no rows to add or take out: expected a bank of '
        'patchcore. Fit again with other images.')


def _rows(bank: Model) -> np.ndarray:
  """Returns the rows of a bank, or raises BankError for another model."""
  check_is_bank(bank)
  return np.asarray(bank.arrays['embeddings'])


def check_alike(bank: Model, other: Model) -> None:
  """Raises BankError for two banks that were made in different ways, or models that are none."""
  check_is_bank(bank)
  check_is_bank(other)
  theirs = to_json(other.description)
  bank.description.check({k: theirs[k] for k in _ALIKE} | {
      'backbones': [{k: v for k, v in network.items() if k != 'source'} for network in theirs['backbones']],
      'settings': {k: theirs['settings'][k] for k in ('embedding', 'scoring')}})


def _images_of(bank: Model) -> np.ndarray:
  """Computes the number of the training image of each row."""
  return np.asarray(bank.arrays['indices']) // (bank.description.num_patches // bank.description.num_images)


def _own_distance(bank: Model) -> float:
  """Measures the median distance of rows to the nearest one of other images."""
  rows, part = _rows(bank), _images_of(bank) % _PARTS
  found = [np.sqrt(_nearest(rows[part == i], search_bank.prepare(rows[part != i]))[0][:, 0])
           for i in range(_PARTS) if (part == i).any() and (part != i).any()]
  return float(np.median(np.concatenate(found))) if found else covering_radius(bank)


def _nearest(points, prepared, k=1) -> tuple[np.ndarray, np.ndarray]:
  """Finds the k nearest rows of points [n, d]: squared distances [n, k] and positions [n, k]."""
  found = [neighbors.nearest_neighbors(points[i:i + 8 * _BLOCK], prepared, k=k)
           for i in range(0, len(points), 8 * _BLOCK)]
  return tuple(np.concatenate([np.asarray(values) for values in part]) for part in zip(*found, strict=True))


def _check_grid(bank, embeddings) -> None:
  """Raises ValueError for embeddings of another grid or size than the bank's."""
  description, (_, *grid, dim), dim_of_rows = bank.description, embeddings.shape, _rows(bank).shape[1]
  angles = description.num_candidates // description.num_patches
  rows, columns = description.grid
  if grid != [angles * rows, columns] or dim != dim_of_rows:
    raise ValueError(
        f'Embeddings {embeddings.shape}: expected [n, {angles * rows}, {columns}, {dim_of_rows}], as the '
        'bank has them.')


def _chosen(bank, embeddings):
  """Chooses what `append` adds of embeddings: returns their patches [n, d], positions in them, the radius."""
  points, radius = embeddings.reshape(-1, embeddings.shape[-1]), covering_radius(bank)
  most = coreset.coreset_size(len(points), bank.description.settings['ratio'])
  return points, _uncovered(points, _rows(bank), radius, most), radius


def _uncovered(points, rows, radius, most) -> np.ndarray:
  """Lists positions of at most `most` points, each beyond `radius` from all rows and from those before it."""
  distances_sq = _nearest(points, search_bank.prepare(rows))[0][:, 0]
  outside = np.flatnonzero(distances_sq > radius**2)
  if not len(outside):
    return outside
  points, distances_sq = points[outside], distances_sq[outside]
  size = min(most, len(points))
  # This continues a selection, whose distances so far are those to the bank.
  state = k_center.initial_state(jnp.asarray(distances_sq), size)
  order = coreset.greedy_k_center(points, size, start=[0], resume=state)
  inserted_sq = np.minimum(distances_sq[order], _to_earlier_sq(points[order]))
  return outside[order[:int(np.argmax(np.append(inserted_sq, 0) <= radius**2))]]


def _to_earlier_sq(points) -> np.ndarray:
  """Computes squared distances [n] of points to the nearest of those before; infinite for the first."""
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
  """Adds rows and images to a bank, and makes its thresholds from the scores of old and new images."""
  description, found = bank.description, bank.description.calibration
  if found:
    found = _recalibrated(
        found, [*found.image_scores, *image_scores], [*found.map_maxima, *map_maxima],
        tuple(map(max, _allowances(found), allowances)))
  arrays = {
      'embeddings': np.concatenate([_rows(bank), rows]),
      'indices': np.concatenate([bank.arrays['indices'], indices]).astype(np.int32)}
  extended = Model(arrays | provenance.pack([*provenance.thumbnails(bank), *files]), description)
  return extended.with_description(
      # A bank that does not know its first images cannot tell the later ones by their numbers.
      images=(*description.images, *names) if description.images else (),
      num_images=description.num_images + (len(names) if num_images is None else num_images),
      covering_radius=radius, ordered=False, calibration=found).recorded(what)


def _recalibrated(found: Calibration, image_scores, map_maxima, allowances=None) -> Calibration:
  """Makes thresholds from other scores, with the rate and the method of `found`."""
  return calibration.calibrate(
      image_scores, map_maxima, false_alarm_rate=found.false_alarm_rate, method=found.method,
      allowances=allowances or _allowances(found))


def _allowances(found: Calibration | None) -> tuple[float, float]:
  """Reads the allowances (images, pixels) of thresholds; 0 where there are none."""
  return (found.image_allowance, found.pixel_allowance) if found else (0.0, 0.0)


def position(name: str, names: Sequence[str], unknown: str, which: str) -> int:
  """Finds the position of the one that has a name, or whose path ends in it.

  Args:
    name: what is looked for.
    names: names to look among.
    unknown, which: what the error says where there is none: that, and how to learn which there are.

  Raises:
    ValueError: none or several.
  """
  at = positions(name, names)
  if len(at) == 1:
    return at[0]
  if at:
    several = ', '.join(names[i] for i in at[:5])
    raise ValueError(f'{name} may be each of {several}: give more of the path.')
  near = difflib.get_close_matches(name, [*names, *(PurePath(i).name for i in names)], 1)
  raise ValueError(unknown + (f'; did you mean {near[0]!r}?' if near else '.') + f' {which}')


def positions(name: str, names: Sequence[str]) -> list[int]:
  """Lists the positions of those that have a name, or else of those whose path ends in it.

  >>> positions('c.png', ['a/c.png', 'b/c.png', 'c.png']), positions('b/c.png', ['a/c.png', 'b/c.png'])
  ([2], [1])
  """
  parts = PurePath(name).parts
  return [i for i, known in enumerate(names) if known == name] or [
      i for i, known in enumerate(names) if parts and PurePath(known).parts[-len(parts):] == parts]
