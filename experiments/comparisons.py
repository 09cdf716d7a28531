"""Comparisons with reference arrays: rows of a table, and the arrays of a file."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Row(NamedTuple):
  """One comparison.

  Attributes:
    quantity, origin: what is compared, and whose it is.
    absolute, relative: largest differences; what `relative` is relative to is said in `reason`.
    tolerance: limit on the relative difference, or on the absolute one where `limits` says so.
    reason: why the tolerance is what it is.
    limits: 'relative' or 'absolute'.
  """

  quantity: str
  origin: str
  absolute: float
  relative: float
  tolerance: float
  reason: str
  limits: str = 'relative'

  @property
  def passed(self) -> bool:
    return bool(getattr(self, self.limits) <= self.tolerance)  # False for NaN


def path_of(folder: Path, name: str) -> Path:
  """Finds a file in a folder or in one of its subfolders; where it would be if there is none."""
  inside = (folder / subfolder / name for subfolder in ('evaluation', 'successors'))
  return next((path for path in inside if path.exists()), folder / name)


def load(folder: Path, name: str) -> Arrays:
  """Loads the arrays of a file, which `path_of` finds; {} if it does not exist."""
  path = path_of(folder, name)
  if not path.exists():
    return {}
  with np.load(path) as arrays:
    return dict(arrays)


def compare(quantity: str, origin: str, value, truth, tolerance: float, reason: str) -> Row:
  """Compares numbers by their largest absolute difference. None has to be where the reference has NaN.

  >>> compare('values', 'hand', [1.0, None], [1.5, np.nan], 0.1, 'rounding').absolute
  0.5
  """
  value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
  if value.shape != truth.shape or not np.array_equal(np.isnan(value), np.isnan(truth)):
    return Row(quantity, origin, np.inf, np.inf, tolerance, 'shapes or places of None', 'absolute')
  difference = float(np.nanmax(np.abs(value - truth), initial=0))
  scale = max(float(np.nanmax(np.abs(truth), initial=0)), 1e-12)
  return Row(quantity, origin, difference, difference / scale, tolerance, reason, 'absolute')


def of_largest(quantity: str, origin: str, value, truth, tolerance: float = 1e-6, reason: str = '') -> Row:
  """Compares numbers by the largest difference over the largest number.

  >>> of_largest('scores', 'hand', [1.0, 2.5], [1.0, 2.0]).relative
  0.25
  """
  row = compare(quantity, origin, value, truth, tolerance, reason or 'float32 sums, of the largest value')
  return row._replace(limits='relative') if np.isfinite(row.absolute) else row


def refusal(quantity: str, origin: str, compute: Callable[[], object], reason: str) -> Row:
  """Checks that input is refused of which the original makes a number, or an error of its own."""
  try:
    compute()
  except ValueError:
    return Row(quantity, origin, 0.0, 0.0, 0.0, reason, 'absolute')
  return Row(quantity, origin, np.inf, np.inf, 0.0, reason, 'absolute')
