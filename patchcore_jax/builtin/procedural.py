"""Training images for a backbone of our own, drawn by program: nothing photographed, nothing copied.

    leaves     shapes that cover one another, sizes by a power law (dead leaves)
    gratings   waves in a few directions, bent and crossed: weaves, brushed metal, rulings
    noise      coloured noise, isotropic or stretched, folded into veins and grain
    fractal    attractors of random iterated functions
    strokes    lines along a bent field of directions, short or long: fibres, hair, scratches
    parts      shaded bodies (bevelled, domed, threaded) with print and a shadow, on a ground
    tiles      a small motif repeated, turned and bent, no two repeats quite alike
    collage    two of the above in and around a blot

`draw` is a pure function of (seed, index), so that what a training step sees needs no record. It shares
no code with the built-in data set (`synthetic`), by which the trained network is judged.
"""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

# How many of 20 images are of each kind; there are more of those that show more local differences.
SHARES = {
    'leaves': 3, 'gratings': 2, 'noise': 2, 'fractal': 1, 'strokes': 3, 'parts': 5, 'tiles': 2,
    'collage': 2}
_FINE = 2  # outlines are drawn at this multiple of the size and averaged down
_LETTERS = 'ABCDEFGHKLMNPRSTUVXZ0123456789-+/.%'


def draw(seed: int, index: int, size: int = 128, kind: str = '') -> np.ndarray:
  """Draws one training image.

  Args:
    seed: seed of the whole collection.
    index: number of the image, at least 0.
    size: height and width in pixels, even, at least 16.
    kind: one of `SHARES`; '' for one that the seed and the index choose.

  Returns:
    [size, size, 3] uint8.

  Raises:
    ValueError: a size or kind that cannot be drawn.

  >>> draw(0, 7, 32).shape
  (32, 32, 3)
  >>> bool((draw(0, 7, 32) == draw(0, 7, 32)).all())
  True
  """
  if size < 16 or size % 2:
    raise ValueError(f'size={size}: expected an even number of pixels, at least 16.')
  if kind and kind not in SHARES:
    raise ValueError(f'kind={kind!r}: expected one of {", ".join(SHARES)}.')
  rng = np.random.default_rng((seed, index))
  image = _DRAWINGS[kind or _any_kind(rng)](rng, size)
  # Each image has a lamp of its own, and a lens that is not always sharp.
  x, y = _grid(size)
  slope = rng.normal(0, 0.12, 2)
  image *= (rng.uniform(0.7, 1.1) * (1 + slope[0] * x + slope[1] * y))[..., None]
  if rng.random() < 0.3:
    image = ndimage.gaussian_filter(image, (*2 * (rng.uniform(0.3, 1.0),), 0), truncate=2)
  return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _any_kind(rng, without=()):
  """Chooses a kind of image at random, by the shares."""
  kinds = [k for k in SHARES if k not in without]
  shares = np.array([SHARES[k] for k in kinds], float)
  return kinds[rng.choice(len(kinds), p=shares / shares.sum())]


@functools.lru_cache(maxsize=8)
def _grid(size):
  """Makes coordinates x, y [size, size] float32 from -1 to 1."""
  line = np.linspace(-1, 1, size, dtype=np.float32)
  return tuple(np.meshgrid(line, line))


def _turned(rng, size, angle=None):
  """Turns the grid by an angle, or to a random direction."""
  angle = rng.uniform(0, 2 * np.pi) if angle is None else angle
  x, y = _grid(size)
  c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
  return c * x + s * y, c * y - s * x


def _field(rng, size, slope, stretch=1.0, angle=0.0):
  """Makes Gaussian noise [size, size] float32 of unit variance with a spectrum of |f|^-slope."""
  fy = np.fft.fftfreq(size)[:, None]
  fx = np.fft.rfftfreq(size)[None]
  c, s = np.cos(angle), np.sin(angle)
  f = np.hypot((c * fx + s * fy) * stretch, c * fy - s * fx)
  f = np.maximum(f, 1 / size) ** (-slope / 2)
  f[0, 0] = 0
  white = np.fft.rfft2(rng.standard_normal((size, size), np.float32))
  field = np.fft.irfft2(white * f, (size, size)).astype(np.float32)
  return field / (field.std() + 1e-6)


def _colours(rng, count):
  """Chooses a palette [count, 3] float32 in 0..1: mostly muted, sometimes loud, sometimes gray."""
  loudness = rng.choice([0.0, 0.04, 0.1, 0.3])
  gray = rng.uniform(0.05, 0.95) + rng.uniform(0.05, 0.45) * rng.standard_normal((count, 1))
  tint = rng.normal(0, 0.12, 3) * (loudness > 0)
  return np.clip(gray + tint + loudness * rng.standard_normal((count, 3)), 0.02, 0.98).astype(np.float32)


def _coloured(rng, field):
  """Colours values [h, w] in 0..1 by a ramp of a few colours: [h, w, 3]."""
  colours = _colours(rng, rng.integers(2, 5))
  stops = np.linspace(0, 1, len(colours))
  return np.stack([np.interp(field, stops, c) for c in colours.T], -1).astype(np.float32)


def _spread(field):
  """Scales any values to 0..1, by their 2nd and 98th percentile."""
  low, high = np.percentile(field[::2, ::2], (2, 98))
  return np.clip((field - low) / (high - low + 1e-6), 0, 1)


def _wave(rng, phase):
  """Computes a random periodic function of the phase (period 1), values 0..1."""
  form = rng.integers(4)
  if form == 0:
    return 0.5 + 0.5 * np.sin(2 * np.pi * phase)
  t = phase - np.floor(phase)
  if form == 1:
    return np.abs(2 * t - 1)
  if form == 2:
    duty = rng.uniform(0.2, 0.8)
    return np.clip((np.abs(2 * t - 1) - duty) * rng.uniform(4, 12) + 0.5, 0, 1)
  return np.sqrt(np.clip(1 - (2 * t - 1) ** 2, 0, 1))  # round, as threads are


def _ground(rng, size):
  """Draws a quiet surface to put things on: [size, size, 3]."""
  base = np.broadcast_to(_colours(rng, 1)[0], (size, size, 3))
  choice = rng.random()
  if choice < 0.25:
    return base.copy()
  if choice < 0.75:
    field = _field(rng, size, rng.uniform(0, 3), rng.choice([1, 1, 6, 20]), rng.uniform(0, np.pi))
  else:
    field = 4 * _wave(rng, _turned(rng, size)[0] * rng.uniform(2, 2 + size / 10)) - 2
  return base + (rng.uniform(0.01, 0.12) * field)[..., None]


def _leaves(rng, size):
  fine = size * _FINE
  count = int(rng.integers(30, 250))
  labels = Image.new('I', (fine, fine), 0)
  pen = ImageDraw.Draw(labels)
  power, form = rng.uniform(1.5, 3), rng.integers(4)
  smallest = rng.uniform(0.012, 0.04)
  # Radii r with density r^-power between the smallest and a third of the image.
  u = rng.random(count)
  a, b = smallest ** (1 - power), 0.35 ** (1 - power)
  radii = (a + u * (b - a)) ** (1 / (1 - power))
  for i in range(count):
    shape = form if form < 3 else rng.integers(3)
    x, y = rng.random(2) * fine
    _outline(rng, pen, shape, x, y, radii[i] * fine, i + 1)
  labels = np.asarray(labels)
  colours = _colours(rng, count + 1)
  image = colours[labels]
  if rng.random() < 0.7:  # each leaf has its own part of a texture
    grain = _field(rng, size, rng.uniform(0.5, 2.5)).repeat(_FINE, 0).repeat(_FINE, 1)
    strength = rng.uniform(0, 0.15, count + 1).astype(np.float32)
    shift = rng.integers(0, fine, count + 1)
    flat = grain.ravel()[(np.arange(fine * fine).reshape(fine, fine) + shift[labels]) % (fine * fine)]
    image += (strength[labels] * flat)[..., None]
  return _down(image)


def _outline(rng, pen, shape, x, y, r, fill):
  """Draws an ellipse, a convex polygon, or a blot, of radius r pixels."""
  if shape == 0:
    ry = r * rng.uniform(0.4, 1)
    pen.ellipse((x - r, y - ry, x + r, y + ry), fill=fill)
    return
  corners = int(rng.integers(3, 8)) if shape == 1 else 14
  angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners + rng.uniform(0, 6)
  lengths = r * (np.ones(corners) if shape == 1 else rng.uniform(0.5, 1.2, corners))
  pen.polygon([(x + s * np.cos(t), y + s * np.sin(t)) for s, t in zip(lengths, angles)], fill=fill)


def _down(image):
  """Averages _FINE x _FINE pixels to one; returns [h, w, ...] float32."""
  h, w = image.shape[:2]
  image = image.reshape(h // _FINE, _FINE, w // _FINE, _FINE, *image.shape[2:])
  return image.mean((1, 3), dtype=np.float32)


def _gratings(rng, size):
  bend = rng.choice([0, 0.02, 0.1]) * _field(rng, size, 3)
  first = rng.uniform(0, np.pi)
  height, base = 0, 1.5 ** rng.uniform(2, 7.5)
  mix = rng.integers(3)
  for i in range(rng.integers(1, 4)):
    angle = first + (i * np.pi / 2 if rng.random() < 0.7 else rng.uniform(0, np.pi))
    along, across = _turned(rng, size, angle)
    stagger = 0.5 * np.floor(across * base) if rng.random() < 0.3 else 0
    wave = _wave(rng, (along + bend) * base * rng.uniform(0.8, 1.25) + stagger + rng.random())
    height = wave if i == 0 else (height * wave, np.maximum(height, wave), height + wave)[mix]
  grain = rng.uniform(0, 0.15) * _field(rng, size, rng.uniform(0, 2))
  return _coloured(rng, _spread(height + grain))


def _noise(rng, size):
  field = _field(
      rng, size, rng.uniform(0.5, 3.5), rng.choice([1, 1, 3, 8, 25]), rng.uniform(0, np.pi))
  form = rng.integers(5)
  if form == 0:
    field = -np.abs(field)  # veins
  elif form == 1:
    field = np.sin(field * rng.uniform(2, 8))  # contour lines, rings of wood
  elif form == 2:
    field = np.tanh(4 * (field - rng.uniform(-1, 1)))  # islands
  elif form == 3:
    other = _field(rng, size, rng.uniform(0.5, 2))
    field = field * np.clip(other, 0, None)  # patches of grain
  return _coloured(rng, _spread(field))


def _fractal(rng, size):
  maps = int(rng.integers(2, 6))
  # Contractions: singular values below 1, so that the points stay together.
  turn = rng.uniform(0, 2 * np.pi, (2, maps))
  stretch = rng.uniform(0.3, 0.85, (2, maps)) * rng.choice([-1, 1], (2, maps))

  def rotation(t):
    return np.stack([np.cos(t), -np.sin(t), np.sin(t), np.cos(t)], -1).reshape(-1, 2, 2)

  matrices = rotation(turn[0]) * stretch.T[:, None, :] @ rotation(turn[1])
  shifts = rng.uniform(-1, 1, (maps, 2))
  points, visited = rng.uniform(-1, 1, (1500, 2)), []
  for i in range(36):
    which = rng.integers(maps, size=len(points))
    points = np.einsum('nij,nj->ni', matrices[which], points) + shifts[which]
    if i >= 10:
      visited.append(points)
  points = np.concatenate(visited)
  low, high = np.percentile(points, (1, 99), axis=0)
  cells = ((points - low) / (high - low + 1e-6) * (size - 1)).astype(int)
  cells = cells[((cells >= 0) & (cells < size)).all(1)]
  counts = np.bincount(cells[:, 1] * size + cells[:, 0], minlength=size * size).reshape(size, size)
  density = _spread(ndimage.gaussian_filter(np.log1p(counts), rng.uniform(0.5, 1.0), truncate=2))
  return _coloured(rng, density.astype(np.float32))


def _strokes(rng, size):
  fine = size * _FINE
  image = Image.fromarray(_bytes(_ground(rng, size))).resize((fine, fine))
  pen = ImageDraw.Draw(image)
  count = int(4 * 1.5 ** rng.uniform(0, 9))
  field = _field(rng, size, 3) * rng.choice([0.1, 0.5, 2.0])
  main, steps = rng.uniform(0, np.pi), int(rng.integers(1, 8))
  length = rng.uniform(0.02, 0.2) * fine
  width = rng.uniform(1, 3 if count > 60 else 8) * _FINE / 2
  colours = _bytes(_colours(rng, 6))
  crossing = rng.random() < 0.3
  points = rng.random((count, 2)) * fine
  paths = [points]
  angles = main + (np.pi / 2) * crossing * rng.integers(0, 2, count) + rng.normal(0, 0.1, count)
  for _ in range(steps):
    row, column = (np.clip(points[:, ::-1] / _FINE, 0, size - 1).astype(int)).T
    t = angles + field[row, column]
    points = points + length * np.stack([np.cos(t), np.sin(t)], -1)
    paths.append(points)
  widths = np.maximum(1, rng.normal(width, 0.3 * width, count)).astype(int)
  for i, path in enumerate(np.stack(paths, 1)):
    pen.line([tuple(p) for p in path.tolist()], fill=tuple(colours[i % 6].tolist()), width=int(widths[i]))
  return np.asarray(image.reduce(_FINE), np.float32) / 255


def _bytes(values):
  return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def _body(rng, size, x, y, r):
  """Draws a body: its signed distance (negative inside) in units of the grid, and coordinates along it."""
  u, v = _turned(rng, size)
  c, s = rng.uniform(-1, 1, 2)
  u, v = u - x * c - y * s, v - y * c + x * s
  form, flat = rng.integers(5), rng.uniform(0.15, 1)
  if form == 0:  # ellipse, about
    distance = (np.sqrt(u**2 + (v / flat) ** 2) - r) * min(1, flat * 1.5)
  elif form == 1:  # box with round corners
    corner = rng.uniform(0, 0.5) * r * flat
    a, b = np.abs(u) - r + corner, np.abs(v) - r * flat + corner
    distance = np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - corner
  elif form == 2:  # ring
    distance = np.abs(np.hypot(u, v) - r * 0.7) - r * 0.3 * flat
  elif form == 3:  # bar with round ends
    distance = np.hypot(u - np.clip(u, -r, r), v) - 0.3 * r * flat
  else:  # star or polygon
    corners, depth = rng.integers(3, 9), rng.uniform(0, 0.3)
    distance = np.hypot(u, v) - r * (1 - depth + depth * np.cos(corners * np.arctan2(v, u)))
  return distance, u, v


def _parts(rng, size):
  albedo = _ground(rng, size)
  height = np.zeros((size, size), np.float32)
  count = int(1.6 ** rng.uniform(0, 6))
  largest = rng.uniform(0.5, 1.0) / count**0.5
  shine = np.zeros((size, size), np.float32)
  cast = rng.random() < 0.6
  for _ in range(count):
    r = largest * rng.uniform(0.4, 1)
    x, y = rng.uniform(-0.9, 0.9, 2)
    distance, u, v = _body(rng, size, x, y, r)
    inside = np.clip(0.5 - distance * size / 2, 0, 1)
    if cast:
      shadow = np.clip(0.5 - distance * size / 12, 0, 1)
      move = int(rng.integers(1, 4))
      albedo *= 1 - 0.35 * np.roll(shadow, (move, move), (0, 1))[..., None]
    depth, bevel = np.maximum(-distance, 0), r * rng.uniform(0.08, 0.8)
    profile = np.sqrt(1 - (1 - np.minimum(depth / bevel, 1)) ** 2) * bevel * rng.uniform(0.2, 1)
    if rng.random() < 0.35:  # threads, ribs, knurls
      along = (u if rng.random() < 0.7 else v) * rng.uniform(5, 25)
      profile += 0.02 * rng.uniform(0.3, 1.5) * _wave(rng, along)
    height += inside * (profile - height * rng.choice([0, 1]))
    colour = _colours(rng, 1)[0]
    if rng.random() < 0.4:
      colour = colour + (rng.uniform(0.01, 0.1) * _field(
          rng, size, rng.uniform(0, 2.5), rng.choice([1, 10])))[..., None]
    albedo += inside[..., None] * (colour - albedo)
    shine += inside * (rng.choice([0, 0.2, 0.7]) - shine)
  if rng.random() < 0.45:
    albedo = _print(rng, albedo)
  # Lambert's law and a highlight.
  light = np.array([*rng.normal(0, 0.6, 2), 1.0])
  light /= np.linalg.norm(light)
  dy, dx = np.gradient(height * (size / 2))
  norm = 1 / np.sqrt(1 + dx * dx + dy * dy)
  facing = np.clip((light[2] - light[0] * dx - light[1] * dy) * norm, 0, 1).astype(np.float32)
  half = light + (0, 0, 1)
  half /= np.linalg.norm(half)
  gloss = np.clip((half[2] - half[0] * dx - half[1] * dy) * norm, 0, 1) ** rng.uniform(10, 60)
  dark = rng.uniform(0.2, 0.6)
  return albedo * (dark + (1 - dark) * facing / light[2])[..., None] + (shine * gloss)[..., None]


@functools.lru_cache(maxsize=32)
def _font(size):
  return ImageFont.load_default(size)


def _print(rng, albedo):
  """Prints a few words in a colour of their own, any way round."""
  size = len(albedo)
  mask = Image.new('L', (size, size))
  for _ in range(rng.integers(1, 5)):
    letters = ''.join(rng.choice(list(_LETTERS), rng.integers(1, 8)))
    word = Image.new('L', (size, size))
    ImageDraw.Draw(word).text(
        tuple(rng.uniform(0, 0.7, 2) * size), letters, fill=255,
        font=_font(int(size * rng.uniform(0.08, 0.3))))
    if rng.random() < 0.5:
      word = word.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
    mask.paste(255, (0, 0), word)
  mask = np.asarray(mask, np.float32)[..., None] / 255 * np.float32(rng.uniform(0.5, 1))
  return albedo + mask * (_colours(rng, 1)[0] - albedo)


def _tiles(rng, size):
  motif = _DRAWINGS[_any_kind(rng, ('tiles', 'collage', 'fractal'))](rng, 2 * int(rng.integers(12, 33)))
  n = len(motif)
  period = rng.uniform(0.12, 0.6) * size
  u, v = _turned(rng, size, rng.choice([0, rng.uniform(0, 2 * np.pi)]))
  u, v = u * size / 2 / period, v * size / 2 / period * rng.uniform(0.7, 1.4)
  row = np.floor(v)
  u = u + rng.choice([0, 0, 0.5]) * row
  bend = rng.choice([0, 0, 0.02, 0.06])
  if bend:
    u, v = u + bend * _field(rng, size, 3), v + bend * _field(rng, size, 3)
  column = np.floor(u)
  # A hash of the cell, so that every repeat has its own shade.
  cell = ((row * 37 + column * 101) % 64).astype(int)
  shade = rng.normal(0, rng.choice([0, 0.03, 0.1]), 64).astype(np.float32)[cell]
  # A margin, so that interpolation wraps around.
  motif = np.pad(motif, ((0, 1), (0, 1), (0, 0)), mode='wrap')
  where = np.stack([(v - row) * n, (u - column) * n])
  image = np.stack([
      ndimage.map_coordinates(motif[..., c], where, order=1, mode='nearest') for c in range(3)], -1)
  return image + shade[..., None]


def _collage(rng, size):
  first, second = (_DRAWINGS[_any_kind(rng, ('collage',))](rng, size) for _ in range(2))
  if rng.random() < 0.5:
    mask = np.clip((_field(rng, size, rng.uniform(2.5, 4)) - rng.uniform(-0.5, 1)) * 8, 0, 1)
  else:
    mask = np.clip(0.5 - _body(rng, size, 0, 0, rng.uniform(0.4, 0.9))[0] * size / 2, 0, 1)
  return first + mask[..., None] * (second - first)


_DRAWINGS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    'leaves': _leaves, 'gratings': _gratings, 'noise': _noise, 'fractal': _fractal, 'strokes': _strokes,
    'parts': _parts, 'tiles': _tiles, 'collage': _collage}
