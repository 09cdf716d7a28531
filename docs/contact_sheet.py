"""The picture of the built-in data set.

    python docs/contact_sheet.py            writes docs/synthetic.png
"""

from collections.abc import Iterable

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from patchcore_jax.builtin import synthetic


def contact_sheet(categories: Iterable[str] = synthetic.CATEGORIES, *, tile: int = 120) -> Image.Image:
  """Draws an overview: a block for each category, good parts left, then the kinds of defect.

  The upper row shows the second faintest of each kind, the lower row the plainest. A red line surrounds the
  mask.

  Args:
    categories: names of the categories, top to bottom.
    tile: width of each picture in pixels.

  Returns:
    A picture with a palette (mode 'P'), which keeps the file small.
  """
  subjects = {category: synthetic.SUBJECTS[category] for category in categories}
  gap, line, num_colours = 6, 16, 80
  columns = 2 + max(len(s.defects) for s in subjects.values())
  tiles = {c: round(tile * s.size[0] / s.size[1]) for c, s in subjects.items()}
  high = gap + sum(2 * line + 2 * (tall + gap) + gap for tall in tiles.values())
  sheet = Image.new('RGB', (gap + columns * (tile + gap), high), 'white')
  outlines = Image.new('L', sheet.size)
  pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  y = gap
  for category, subject in subjects.items():
    pen.text((gap, y), category.replace('_', ' ').upper(), 'black', font)
    kinds = ('good',) * (columns - len(subject.defects)) + subject.defects
    for column, kind in enumerate(kinds):
      x = gap + column * (tile + gap)
      pen.text((x, y + line), kind.replace('_', ' '), '#555555', font)
      for row in range(2):
        index = (subject.num_each - 1 if row else 1) if kind != 'good' else 2 * column + row
        at = x, y + 2 * line + row * (tiles[category] + gap)
        image, mask = synthetic.draw(category, 'test', kind, index)
        size = tile, tiles[category]
        sheet.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), at)
        outlines.paste(_outline(mask, size), at)
    y += 2 * line + 2 * (tiles[category] + gap) + gap
  # The red of the lines is added to the palette: it is too rare to be given a place there.
  sheet = sheet.quantize(num_colours, dither=Image.Dither.NONE)
  palette = sheet.getpalette()[:3 * num_colours]
  palette += [0] * (3 * num_colours - len(palette)) + [255, 30, 30]
  sheet.putpalette(palette)
  sheet.paste(num_colours, mask=outlines)
  return sheet


def _outline(mask, size):
  """Draws a line one pixel wide just outside the mask, at another size: mode 'L', 255 on the line."""
  # The mask grows by a pixel before it is made smaller, so that no speck is lost.
  area = Image.fromarray(mask).filter(ImageFilter.MaxFilter(3)).resize(size, Image.Resampling.BOX)
  area = area.point(lambda level: 255 * (level > 40))
  return ImageChops.subtract(
      area.filter(ImageFilter.MaxFilter(5)), area.filter(ImageFilter.MaxFilter(3)))


if __name__ == '__main__':
  contact_sheet().save('docs/synthetic.png', optimize=True)
