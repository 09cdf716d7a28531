"""Maps and patches of an answer, as files in base64."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from patchcore_jax.banks import provenance
from patchcore_jax.data import placement
from patchcore_jax.inspection import Finding, Inspector, colours, regions
from patchcore_jax.report import overlay

_SHOWN = 1024  # pixels: the longer side of a drawn map


def made_smaller(image: Image.Image) -> Image.Image:
  """Makes an image smaller, so that its longer side is at most 1024 pixels."""
  shrink = max(1.0, *(n / _SHOWN for n in image.size))
  size = [max(1, round(n / shrink)) for n in image.size]
  return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2)


def map_file(
    inspector: Inspector, found: Finding, original_size: tuple[int, int], shown: Image.Image | None
) -> dict[str, Any]:
  """Encodes the map of a finding.

  Args:
    original_size: (height, width) of the image as it came.
    shown: the image, smaller or not, to draw the map on.

  Returns:
    'type' and 'data' of a file, in base64: a PNG, or without `shown` an npy, [h, w] float32 of the size of
    the network's input; and 'box' (left, top, right, bottom), the part of the image, in its pixels, that the
    network saw and the map covers.
  """
  place = placement.placement(*original_size, inspector.preprocessing)
  if shown is None:
    file = io.BytesIO()
    np.save(file, np.asarray(found.map, np.float32))
    data, media_type = file.getvalue(), 'application/octet-stream'
  else:
    data, media_type = _png(_drawn(inspector, np.asarray(shown), found.map, place)), 'image/png'
  height, width = found.map.shape
  seen = placement.box_to_original((0, 0, width, height), place)
  return {'type': media_type, 'box': [int(v) for v in seen], 'data': base64.b64encode(data).decode()}


def mask_file(
    inspector: Inspector, found: Finding, original_size: tuple[int, int], min_area: float) -> dict[str, str]:
  """Draws the regions of a finding: 'type' and 'data' in base64 of a PNG of the original's size."""
  place = placement.placement(*original_size, inspector.preprocessing)
  mask = regions.mask(found.map, inspector.calibration.pixel_threshold, place, min_area)
  data = base64.b64encode(_png(255 * mask.astype(np.uint8))).decode()
  return {'type': 'image/png', 'data': data}


def _drawn(inspector, shown, anomaly_map, place) -> np.ndarray:
  """Draws the map over the part of the image [h, w, 3] that the network saw."""
  ratios = [new / old for new, old in zip(shown.shape, place.original)]
  heat = placement.to_original(anomaly_map, place._replace(
      original=shown.shape[:2], scale=tuple(s * r for s, r in zip(place.scale, ratios)),
      offset=tuple(o * r for o, r in zip(place.offset, ratios))))
  ends = colours.limits(inspector) or colours.limits_of_map(anomaly_map)
  return overlay.overlay(shown, heat, *ends)


def why(inspector: Inspector, pixels: np.ndarray, found: Finding) -> dict[str, str | None]:
  """Draws the most anomalous patch, and the nearest normal one.

  Args:
    pixels: [h, w, 3] uint8, the image as the network sees it.

  Returns:
    PNG files in base64: 'patch', the most anomalous one with what is around it, and 'nearest', the same of
    the normal patch nearest to it; None for what the method, or a model without pictures, does not know.
  """
  pictures, grid = {'patch': None, 'nearest': None}, inspector.model.description.grid
  if found.patch is not None:
    pictures['patch'] = _surroundings(pixels, found.patch, grid)
  if found.nearest is not None:
    normal = provenance.thumbnail(inspector.model, found.nearest.image)
    if normal is not None:
      pictures['nearest'] = _surroundings(normal, (found.nearest.row, found.nearest.column), grid)
  return {name: picture and base64.b64encode(picture).decode() for name, picture in pictures.items()}


def _surroundings(pixels: np.ndarray, patch: tuple[int, int], grid: Sequence[int]) -> bytes:
  """Cuts out a square around a patch, a quarter of the image wide, as PNG; at the border it moves inside."""
  height, width = pixels.shape[:2]
  side = min(height, width, max(32, min(height, width) // 4))
  top, left = (
      min(max(round((p + 0.5) * size / n - side / 2), 0), size - side)
      for p, n, size in zip(patch, grid, (height, width)))
  return _png(pixels[top:top + side, left:left + side])


def _png(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG', compress_level=2)  # half the time of the default level
  return file.getvalue()
