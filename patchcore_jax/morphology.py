"""Closes gaps and holes of binary maps, on the host (SuperADD)."""

import functools
from collections.abc import Sequence

import numpy as np


@functools.lru_cache(maxsize=8)
def line_elements(radius: int, number: int = 16) -> tuple[np.ndarray, ...]:
  """Draws lines through the middle of a square, in so many directions over half a circle.

  A line ends at the pixels nearest to `radius` from the middle, is two pixels wide between its edges, and has
  every pixel that an edge passes, and round ends. OpenCV's lines of thickness 2 are the same for a radius of
  5; for 26, it sets two pixels more in four of the 16.

  Returns:
    [2 radius + 1, 2 radius + 1] bool each.

  >>> line_elements(2, 2)[0].astype(int).tolist()
  [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
  """
  return tuple(_line(radius, np.pi * i / number) for i in range(number))


def closed_along_lines(marked: np.ndarray, radius: int, number: int = 16) -> np.ndarray:
  """Closes gaps along lines: adds to a map its closing by each of `line_elements`.

  A closing grows by a line that is a pixel wider at the right and below, and shrinks by the line.

  Args:
    marked: [h, w] bool.

  Returns:
    [h, w] bool; what lies outside is not marked.
  """
  margin = radius + 1
  padded = np.pad(marked, margin)
  found = padded.copy()
  for element in line_elements(radius, number):
    wider = element.copy()  # within the square
    wider[1:] |= element[:-1]
    wider[:, 1:] |= wider[:, :-1].copy()
    grown = _any_of(padded, _offsets(wider))
    found |= ~_any_of(~grown, _offsets(element))
  return found[margin:-margin, margin:-margin]


def without_holes(marked: np.ndarray) -> np.ndarray:
  """Marks what marked pixels enclose: all that is not reached from the border by way of 4 neighbours."""
  from scipy import ndimage  # which takes a while to import

  return ndimage.binary_fill_holes(marked)


def eroded(marked: np.ndarray) -> np.ndarray:
  """Takes away pixels beside unmarked ones, of 4 neighbours; what lies outside does not count.

  >>> eroded(np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)).astype(int).tolist()
  [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
  """
  return ~_any_of(~marked, [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])


def _line(radius, angle):
  """Draws one line."""
  side = 2 * radius + 1
  pixels = np.zeros((side + 4, side + 4), bool)  # the corners may lie a little outside
  middle, end = radius + 2.0, np.round([radius * np.cos(angle), radius * np.sin(angle)])
  across = np.array([-end[1], end[0]]) / np.linalg.norm(end)
  ends = middle - end, middle + end
  corners = [ends[0] + across, ends[0] - across, ends[1] - across, ends[1] + across]

  def mark(points):
    x, y = np.floor(np.asarray(points) + 0.5).astype(int).T
    pixels[y, x] = True

  for begin, stop in zip(corners, corners[1:] + corners[:1]):
    way = stop - begin
    begin, way = (begin, way) if way[np.abs(way).argmax()] >= 0 else (stop, -way)
    steps = np.arange(int(np.abs(way).max() + 1e-9) + 1)
    mark([*(begin + steps[:, None] * way / np.abs(way).max()), begin + way])
  for row in pixels:
    (columns,) = np.nonzero(row)
    if len(columns):
      row[columns[0]:columns[-1]] = True
  for point in ends:
    mark(point + [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
  return pixels[2:-2, 2:-2]


def _offsets(element):
  """Lists the places of the ones of an element, counted from its middle."""
  return [tuple(place) for place in np.argwhere(element) - np.array(element.shape) // 2]


def _any_of(marked: np.ndarray, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
  """Finds the pixels of which any at one of the offsets is marked; nothing outside is."""
  margin = max(abs(step) for offset in offsets for step in offset)
  padded = np.pad(marked, margin)
  found, (rows, columns) = np.zeros_like(marked), marked.shape
  for down, right in offsets:
    found |= padded[margin + down:margin + down + rows, margin + right:margin + right + columns]
  return found
