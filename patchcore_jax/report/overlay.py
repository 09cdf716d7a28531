"""Pictures for people: an image under its anomaly map, and a patch beside the normal one nearest to it."""

import numpy as np
from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; right and bottom exclusive."""

_STRENGTH = 0.75  # opacity of the strongest colour: the part stays visible under it
_UNSEEN = 0.45  # brightness of what the network did not see
_ROWS = 256  # rows at once, so that a large image does not take many times its size
_PANEL = 288  # pixels, each side of a comparison
_AROUND = 9  # patches that a comparison shows along its longer side


def overlay(image: np.ndarray, anomaly_map: np.ndarray, low: float, high: float) -> np.ndarray:
  """Lays a map over its image, from clear (low) over yellow to red (high).

  Args:
    image: [h, w, 3] uint8.
    anomaly_map: [h, w] float; where it is NaN, the network saw nothing, and the image is darkened.
    low, high: values of the map where colour begins, and where it is strongest.

  Returns:
    [h, w, 3] uint8.

  Raises:
    ValueError: shapes that differ, or high not above low.

  >>> overlay(np.full((1, 3, 3), 100, np.uint8), np.array([[0, 1, np.nan]]), 0, 1).tolist()
  [[[100, 100, 100], [216, 25, 25], [45, 45, 45]]]
  """
  image, anomaly_map = np.asarray(image), np.asarray(anomaly_map)
  if image.shape != (*anomaly_map.shape, 3):
    raise ValueError(
        f'An image of shape {image.shape} and a map of shape {anomaly_map.shape}: expected [h, w, 3] and '
        '[h, w].')
  if not high > low:
    raise ValueError(f'The colours begin at {low} and end at {high}: expected the end above the beginning.')
  result = np.empty(image.shape, np.uint8)
  for i in range(0, len(image), _ROWS):
    values = anomaly_map[i:i + _ROWS].astype(np.float32)
    unseen = np.isnan(values)
    heat = np.clip((np.where(unseen, low, values) - low) / (high - low), 0, 1)[..., None]
    colour = np.concatenate([np.ones_like(heat), 0.8 - 0.8 * heat, np.zeros_like(heat)], axis=-1)
    alpha = _STRENGTH * np.minimum(2 * heat, 1)
    part = image[i:i + _ROWS] * (1 - alpha) + 255 * colour * alpha
    part[unseen] *= _UNSEEN
    result[i:i + _ROWS] = part
  return result


def darkened(image: Image.Image, seen: Box) -> Image.Image:
  """Darkens an image outside of what the network saw, a box in fractions of its width and height."""
  result = Image.eval(image, lambda value: round(_UNSEEN * value))
  box = tuple(round(part * size) for part, size in zip(seen, 2 * image.size, strict=True))
  result.paste(image.crop(box), box)
  return result


def outlined(image: np.ndarray, *boxes: Box) -> np.ndarray:
  """Draws a frame just around each box: white within black, so that it shows on any image.

  Args:
    image: [h, w, 3] uint8.
    boxes: what is framed. The frames lie outside of them where there is room.

  Returns:
    [h, w, 3] uint8.
  """
  picture = Image.fromarray(np.asarray(image))
  draw, thick = ImageDraw.Draw(picture), max(1, round(max(picture.size) / 400))
  for color, away, width in (('black', 2 * thick, 2 * thick), ('white', thick, thick)):
    for left, top, right, bottom in boxes:
      corners = (max(left - away, 0), max(top - away, 0),
                 min(right - 1 + away, picture.width - 1), min(bottom - 1 + away, picture.height - 1))
      draw.rectangle(corners, outline=color, width=width)
  return np.asarray(picture)


def comparison(
    image: np.ndarray, box: Box, normal: np.ndarray | None, normal_box: Box | None,
    captions: tuple[str, str]) -> np.ndarray:
  """Draws a patch and the normal patch most like it side by side, each with its surroundings.

  Args:
    image: [h, w, 3] uint8, as the network saw it.
    box: where the patch lies.
    normal: [h', w', 3] uint8, a training image as the network saw it; None if there is no picture of it.
    normal_box: where the normal patch lies.
    captions: what is written above the two.

  Returns:
    [height, width, 3] uint8: two panels, both patches framed and enlarged alike.
  """
  panels = [_panel(image, box), None if normal is None else _panel(normal, normal_box)]
  gap, line = 12, 18
  sheet = Image.new('RGB', (2 * _PANEL + 3 * gap, _PANEL + 2 * gap + line), 'white')
  draw = ImageDraw.Draw(sheet)
  for i, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
    left = gap + i * (_PANEL + gap)
    # The font that Pillow holds writes Latin letters only.
    caption = caption.encode('latin-1', 'replace').decode('latin-1')
    draw.text((left, gap // 2 + 2), _fitting(draw, caption), 'black')
    if panel is None:
      draw.rectangle((left, gap + line, left + _PANEL - 1, gap + line + _PANEL - 1), 'lightgray')
      draw.text((left + gap, 2 * gap + line), 'The bank holds no pictures of its training images.', 'black')
    else:
      sheet.paste(panel, (left, gap + line))
  return np.asarray(sheet)


def _panel(image, box):
  """Cuts out a square with the patch near its centre, and enlarges it without smoothing."""
  image = Image.fromarray(np.asarray(image))
  left, top, right, bottom = box
  side = min(_AROUND * max(right - left, bottom - top), *image.size)
  x, y = ((low + high - side) / 2 for low, high in ((left, right), (top, bottom)))
  x, y = (float(np.clip(v, 0, size - side)) for v, size in zip((x, y), image.size))
  panel = image.resize((_PANEL, _PANEL), Image.Resampling.NEAREST, box=(x, y, x + side, y + side))
  scale = _PANEL / side
  framed = outlined(np.asarray(panel), tuple(
      round(scale * (v - origin)) for v, origin in zip(box, (x, y, x, y))))
  return Image.fromarray(framed)


def _fitting(draw, text):
  """Shortens a text that is too long to its end, which tells files apart."""
  if draw.textlength(text) <= _PANEL:
    return text
  while text and draw.textlength('...' + text) > _PANEL:
    text = text[1:]
  return '...' + text
