"""Parts images into overlapping windows, and joins the maps that a network makes of them (SuperADD)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Window(NamedTuple):
  """A window along one axis, in cells of the maps.

  Attributes:
    start: its first cell.
    first, last: those of its own cells that are kept: first, ..., last - 1.
  """

  start: int
  first: int
  last: int


def plan(cells: int, window: int, overlap: int) -> list[Window]:
  """Places windows along an axis, evenly, so that neighbours share at least twice the overlap.

  Of what two share, each keeps the half on its own side.

  Args:
    cells: of the axis.
    window, overlap: in cells; the overlap is less than half a window.

  Raises:
    ValueError: a window larger than the axis, or an overlap of half a window or more.

  >>> plan(5, 4, 1)
  [Window(start=0, first=0, last=3), Window(start=1, first=2, last=4)]
  """
  if window > cells:
    raise ValueError(f'A window of {window} cells does not fit into {cells}: expected one of at most that.')
  if 2 * overlap >= window:
    raise ValueError(f'Windows of {window} cells overlap by {overlap}: expected less than half of a window.')
  number = -(-(cells - window) // (window - 2 * overlap)) + 1
  starts = [i * (cells - window) // max(1, number - 1) for i in range(number)]
  shared = [before + window - start for before, start in zip(starts, starts[1:])]
  return [
      Window(start, -(-before // 2), window - after // 2)
      for start, before, after in zip(starts, [0, *shared], [*shared, 0])]


def joined_maps(
    fn: Callable[[jax.Array], Sequence[jax.Array]], images: jax.Array, rows: Sequence[Window],
    columns: Sequence[Window], window: int, pixels: int, *, loops: bool = True) -> list[jax.Array]:
  """Computes maps of every window alone, and joins what is kept of them.

  Args:
    fn: (windows [b, window, window, 3]) -> maps [b, cells, cells, c] of each layer.
    images: [b, h, w, 3]; where the last cells are not whole, the edge is repeated.
    rows, columns: by `plan`, of all cells, the last ones too.
    window: the side of a window, in pixels.
    pixels: the side of a cell.
    loops: whether the windows pass one after another, in the memory of one; else all at once.

  Returns:
    Maps [b, rows, columns, c] of each layer.
  """
  sides = zip(images.shape[1:3], (rows, columns))
  missing = [(0, (places[-1].start + places[-1].last) * pixels - length) for length, places in sides]
  images = jnp.pad(images, [(0, 0), *missing, (0, 0)], mode='edge')
  parts = jnp.stack([
      images[:, row.start * pixels:, column.start * pixels:][:, :window, :window]
      for row in rows for column in columns])
  if loops and len(parts) > 1:
    layers = lax.map(fn, parts)
  else:
    layers = fn(parts.reshape(-1, *parts.shape[2:]))
    layers = [layer.reshape(*parts.shape[:2], *layer.shape[1:]) for layer in layers]
  found = []
  for layer in layers:
    layer = layer.reshape(len(rows), len(columns), *layer.shape[1:])
    bands = [
        jnp.concatenate([
            layer[i, j, :, row.first:row.last, column.first:column.last]
            for j, column in enumerate(columns)], 2)
        for i, row in enumerate(rows)]
    found.append(jnp.concatenate(bands, 1))
  return found


def cells_of(windows: Sequence[Window]) -> np.ndarray:
  """Lists for every cell of an axis its window and its place in it, [cells, 2].

  >>> cells_of(plan(5, 4, 1)).tolist()
  [[0, 0], [0, 1], [0, 2], [1, 2], [1, 3]]
  """
  return np.array([
      (i, cell) for i, window in enumerate(windows) for cell in range(window.first, window.last)])
