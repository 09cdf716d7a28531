"""What the drawn parts have in common: shapes, noise, lamp, camera, and marks of bad handling.

A part is a function `part(rng, flaw, size) -> Surface`. A surface is what lies under the camera:
colour, height and gloss at each point. `photograph` lights it and takes the picture. A flaw changes
the *surface* - a scratch is a groove with another gloss, a missing part shows its empty pads - so
that light and shadow follow by themselves.

Everything that varies naturally is drawn from `rng`, everything about the flaw from `flaw.rng`.
So the same seed with and without a flaw gives the same part under the same light, and where the two
pictures differ is the exact mask.

Coordinates are image pixels, x to the right and y down. Maps are sampled `OVERSAMPLING` times as
densely in both directions, which the camera averages away: that makes edges smooth. Shapes are
signed distances in pixels, negative inside. Colours are linear light in [0, 1], channels first.
Maps are float32 throughout; the casts of scalars are there because a NumPy float64 scalar would
turn a whole map into float64 and halve the speed.
"""

import dataclasses

import numpy as np
from PIL import Image

OVERSAMPLING = 2


@dataclasses.dataclass
class Flaw:
  """What is wrong with a part.

  Attributes:
    kind: name of the defect; 'good' for none.
    severity: how plain it is, from 0 (hard to find) to 1.
    rng: dice of its own, see the module's docstring.
  """

  kind: str
  severity: float
  rng: np.random.Generator

  def between(self, faint: float, strong: float) -> float:
    """Interpolates between `faint` and `strong` by the severity.

    >>> Flaw('hole', 0.5, np.random.default_rng(0)).between(2, 4)
    3.0
    """
    return float(faint + (strong - faint) * self.severity)


@dataclasses.dataclass
class Surface:
  """Maps of one scene, float32.

  Attributes:
    colour: `[c, H, W]` share of the light that is scattered back; c is 3, or 1 for a grey camera.
    height: `[H, W]` in pixels; only its slopes matter.
    gloss: `[H, W]` strength of the highlight.
  """

  colour: np.ndarray
  height: np.ndarray
  gloss: np.ndarray

  def paint(self, cover, colour, gloss=None):
    """Lays `colour` (one per channel, or a map) on where `cover [H, W]` is 1."""
    colour = np.asarray(colour, np.float32)
    self.colour += cover * ((colour if colour.ndim == 3 else colour[:, None, None]) - self.colour)
    if gloss is not None:
      self.gloss += cover * (np.float32(gloss) - self.gloss)

  def build(self, distance, chamfer):
    """Puts a flat body with bevelled edges on the inside of a shape."""
    body = np.clip(-distance, 0, chamfer)
    self.height[...] = np.where(distance < 0.5, body, self.height)

  def window(self, rows: slice, columns: slice) -> 'Surface':
    """Returns a view of a part of the surface; what changes there changes here."""
    return Surface(
        self.colour[:, rows, columns], self.height[rows, columns], self.gloss[rows, columns])


# Shapes and noise.


def grid(size):
  """Makes pixel coordinates `(x, y)`, each `[H, W]`, for an image of `size = (height, width)` pixels.

  >>> x, y = grid((2, 3))
  >>> x.shape, float(x[0, 0]), float(x[0, -1])
  ((4, 6), 0.25, 2.75)
  """
  y, x = ((np.arange(n * OVERSAMPLING, dtype=np.float32) + 0.5) / OVERSAMPLING for n in size)
  return np.meshgrid(x, y)


def turned(x, y, centre, angle):
  """Converts coordinates to those of a thing at `centre` that is turned clockwise by `angle` radians."""
  cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
  x, y = x - np.float32(centre[0]), y - np.float32(centre[1])
  return cos * x + sin * y, cos * y - sin * x


def noise(rng, like, cell):
  """Makes smooth noise in the shape of `like`, of deviation about 0.7, with bumps `cell` pixels wide.

  `cell` is a number, or (along y, along x) for stretched noise such as fibres.
  """
  high, wide = like.shape
  cell_y, cell_x = (c * OVERSAMPLING for c in (cell if isinstance(cell, tuple) else (cell, cell)))
  knots = rng.standard_normal((int(high / cell_y) + 4, int(wide / cell_x) + 4), dtype=np.float32)
  left, top = rng.uniform(1, 2, 2)
  return np.asarray(Image.fromarray(knots).resize(
      (wide, high), Image.Resampling.BICUBIC,
      box=(left, top, left + wide / cell_x, top + high / cell_y)))


def inside(distance, soft=1 / OVERSAMPLING):
  """Computes the cover of a shape: 1 inside, 0 outside, and a ramp `soft` pixels wide between.

  >>> inside(np.float32([-2, 0, 2]), soft=8).tolist()
  [0.75, 0.5, 0.25]
  """
  return np.clip(0.5 - distance * np.float32(1 / soft), 0, 1)


def box(x, y, half_width, half_height, corner=0.0):
  """Computes the signed distance to a rectangle about the origin with rounded corners."""
  dx = np.abs(x) - np.float32(half_width - corner)
  dy = np.abs(y) - np.float32(half_height - corner)
  beyond = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
  return beyond + np.minimum(np.maximum(dx, dy), 0) - np.float32(corner)


def disc(x, y, radius):
  """Computes the signed distance to a disc about the origin."""
  return np.sqrt(x * x + y * y) - np.float32(radius)


def blob(rng, x, y, centre, radius, ragged=0.3):
  """Makes an irregular patch, as the rough signed distance to it."""
  u, v = turned(x, y, centre, rng.uniform(0, np.pi))
  stretch = np.float32(rng.uniform(1.0, 1.5))
  rough = noise(rng, x, max(radius * 0.7, 2.0)) + 0.5 * noise(rng, x, max(radius * 0.25, 1.0))
  return disc(u / stretch, v * stretch, radius) + np.float32(radius * ragged) * rough


def path(rng, middle, angle, length, bend, steps=7):
  """Makes the points `[steps + 1, 2]`, (x, y), of a line drawn by a not quite steady hand."""
  angles = angle + np.cumsum(rng.normal(0, bend, steps))
  moves = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (length / steps)
  points = np.concatenate([np.zeros((1, 2)), np.cumsum(moves, axis=0)])
  return points - points.mean(axis=0) + middle


def stroke(x, y, points):
  """Computes the distance to the line through `points`, and the place along it in [0, 1]."""
  nearest, along = np.full_like(x, 1e9), np.zeros_like(x)
  steps = np.asarray(points, np.float32)
  for n, ((x0, y0), (dx, dy)) in enumerate(zip(steps[:-1], np.diff(steps, axis=0), strict=True)):
    px, py = x - x0, y - y0
    t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
    distance_sq = (px - t * dx) ** 2 + (py - t * dy) ** 2
    along = np.where(distance_sq < nearest, (n + t) / np.float32(len(steps) - 1), along)
    nearest = np.minimum(nearest, distance_sq)
  return np.sqrt(nearest), along


def somewhere(rng, size, margin):
  """Picks a random place (x, y) at least `margin` pixels from the border of the image."""
  return rng.uniform(margin, size[1] - margin), rng.uniform(margin, size[0] - margin)


# Lamp and camera.


@dataclasses.dataclass
class Camera:
  """One exposure: where the lamp stands, how bright, even and warm it is, how sharp the lens."""

  azimuth: float
  elevation: float
  exposure: float
  warmth: float
  falloff: tuple[float, float]
  blur: float

  @classmethod
  def placed(cls, rng) -> 'Camera':
    """Sets up the camera of the line, with its small daily variation."""
    return cls(
        azimuth=float(np.deg2rad(rng.normal(-125, 7))),
        elevation=float(np.deg2rad(rng.normal(52, 2.5))),
        exposure=float(2.0 ** np.clip(rng.normal(0, 0.10), -0.25, 0.25)),
        warmth=rng.normal(0, 0.02),
        falloff=(rng.normal(-0.05, 0.035), rng.normal(-0.04, 0.035)),
        blur=rng.uniform(0.12, 0.2))


def photograph(surface: Surface, camera: Camera) -> np.ndarray:
  """Lights a surface and takes its picture: `[h, w, c]` float32 in [0, 255], without grain."""
  # Lambert's law for the colour, Blinn and Phong's half vector for the highlight; the eye is far
  # above, the lamp is far away.
  flat = np.cos(camera.elevation)
  light = np.array([np.cos(camera.azimuth) * flat, np.sin(camera.azimuth) * flat,
                    np.sin(camera.elevation)])
  half = light + [0, 0, 1]
  half = (half / np.linalg.norm(half)).astype(np.float32)
  light = light.astype(np.float32)
  slope_y, slope_x = _slopes(surface.height)
  upright = 1 / np.sqrt(slope_x * slope_x + slope_y * slope_y + 1)
  facing = np.maximum(light[2] - slope_x * light[0] - slope_y * light[1], 0) * upright / light[2]
  mirror = np.maximum(half[2] - slope_x * half[0] - slope_y * half[1], 0) * upright
  for _ in range(5):  # the 32nd power: a satin highlight
    mirror = mirror * mirror

  high, wide = (n // OVERSAMPLING for n in surface.height.shape)
  x, y = grid((high, wide))
  x, y = 2 * x / wide - 1, 2 * y / high - 1
  lamp = 1 + camera.falloff[0] * x + camera.falloff[1] * y - 0.05 * (x * x + y * y)
  lamp = lamp * camera.exposure
  picture = surface.colour * (lamp * (0.38 + 0.62 * facing)) + surface.gloss * mirror * lamp

  n = OVERSAMPLING
  picture = sum(picture[:, i::n, j::n] for i in range(n) for j in range(n)) * np.float32(1 / n ** 2)
  if len(picture) == 3:
    picture *= np.float32([1 + camera.warmth, 1, 1 - camera.warmth])[:, None, None]
  b = camera.blur  # the lens: three taps along each axis
  picture = np.pad(picture, ((0, 0), (1, 1), (1, 1)), mode='edge')
  picture = (1 - 2 * b) * picture[:, 1:-1] + b * (picture[:, :-2] + picture[:, 2:])
  picture = (1 - 2 * b) * picture[:, :, 1:-1] + b * (picture[:, :, :-2] + picture[:, :, 2:])
  return 255 * np.clip(picture, 0, 1).transpose(1, 2, 0) ** np.float32(1 / 2.2)


def _slopes(height):
  """Computes the slopes of a height map along y and x, in pixels per pixel."""
  dy, dx = np.empty_like(height), np.empty_like(height)
  dy[1:-1] = (height[2:] - height[:-2]) * (OVERSAMPLING / 2)
  dx[:, 1:-1] = (height[:, 2:] - height[:, :-2]) * (OVERSAMPLING / 2)
  dy[[0, -1]], dx[:, [0, -1]] = dy[[1, -2]], dx[:, [1, -2]]
  return dy, dx


def grain(rng, picture: np.ndarray) -> np.ndarray:
  """Adds the sensor's noise, which grows with the light, and rounds to uint8."""
  sigma = np.sqrt(0.6 + 0.012 * picture)
  noisy = picture + sigma * rng.standard_normal(picture.shape, dtype=np.float32)
  return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


# Flaws that happen to any surface.


def scratch(surface, x, y, flaw, points, *, width, depth, colour, strength, within=1):
  """Cuts a groove along `points`: bare bottom, raised lips, uneven pressure, fading ends."""
  distance, along = stroke(x, y, points)
  pressure = np.clip(6 * along, 0, 1) * np.clip(6 - 6 * along, 0, 1)
  pressure = pressure * within * np.clip(0.8 + 0.5 * noise(flaw.rng, x, 6.0), 0, 1)
  groove = inside(distance - width / 2) * pressure
  surface.paint(groove * strength, colour)
  surface.gloss += groove * (0.3 * strength)
  d = np.minimum(distance / width, 9)
  surface.height -= depth * pressure * (np.exp(-d * d) - 0.6 * np.exp(-((d - 1.4) ** 2)))


def stain(surface, flaw, distance, *, tint, opacity, rim):
  """Lets a liquid soak in: translucent, cloudy, darker along its dried rim."""
  cloud = np.clip(0.85 + 0.25 * noise(flaw.rng, distance, 9.0), 0, 1)
  cover = inside(distance, 3.0) * cloud + rim * inside(np.abs(distance + 1.5) - 1.0, 2.5)
  kept = 1 - np.minimum(opacity * cover, 1) * (1 - np.float32(tint)[:, None, None])
  surface.colour *= kept
