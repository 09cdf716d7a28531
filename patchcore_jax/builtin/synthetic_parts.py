"""Three of the drawn parts: woven fabric, wood veneer, gear. (`synthetic_board` draws the fourth.)

Each is a function `(rng, flaw, size) -> Surface`; see `synthetic_scene`.
"""

import numpy as np

from patchcore_jax.builtin.synthetic_scene import (
  OVERSAMPLING,
  Flaw,
  Surface,
  blob,
  box,
  disc,
  grid,
  inside,
  noise,
  path,
  scratch,
  somewhere,
  stain,
  stroke,
  turned,
)


def woven_fabric(rng: np.random.Generator, flaw: Flaw, size: tuple[int, int]) -> Surface:
  """Draws upholstery in a 2/2 twill: dark warp (upright), light weft (across), yarns of uneven twist.

  Flaws: 'hole', 'snag' (a yarn pulled out into a loop), 'stain', 'wrong_yarn' (of another dye).
  """
  x, y = grid(size)
  drape_x, drape_y = 1.6 * noise(rng, x, 80.0), 1.6 * noise(rng, x, 80.0)
  u, v = turned(x + drape_x, y + drape_y, rng.uniform(-200, -60, 2), rng.normal(0, 0.022))
  place = somewhere(flaw.rng, size, 50)
  if flaw.kind == 'snag':  # the cloth crowds together along the yarn that was pulled
    a, b = turned(x, y, place, flaw.rng.normal(0, 0.05))
    pull = np.clip(1 - (a / flaw.between(22, 45)) ** 2 - (b / 15) ** 2, 0, 1)
    u, v = u + flaw.between(0.2, 0.5) * a * pull, v - flaw.between(0.4, 0.85) * b * pull
  pitch = 7.5
  u, v = u / pitch, v / pitch
  warp_no, weft_no = np.floor(u), np.floor(v)
  warp_side, weft_side = u - warp_no - 0.5, v - weft_no - 0.5  # across a yarn, -0.5 to 0.5
  # A yarn floats over two others, then dives under two; the higher of two yarns is the one seen.
  warp_rides = np.cos((np.pi / 2) * (v - warp_no))
  weft_rides = np.cos((np.pi / 2) * (u - weft_no - 3))
  warp_no, weft_no = warp_no.astype(np.int32) % 128, weft_no.astype(np.int32) % 128
  thick = rng.normal(0.93, 0.045, (2, 128)).astype(np.float32)
  shade = np.exp(rng.normal(0, 0.07, (2, 128))).astype(np.float32)
  warp_round = np.sqrt(np.maximum(1 - (2 * warp_side / thick[0][warp_no]) ** 2, 0))
  weft_round = np.sqrt(np.maximum(1 - (2 * weft_side / thick[1][weft_no]) ** 2, 0))
  warp = np.where(warp_round > 0, 0.9 * warp_rides + warp_round, -2)
  weft = np.where(weft_round > 0, 0.9 * weft_rides + weft_round, -2)
  if flaw.kind == 'hole':  # each yarn breaks off at its own length, so the edge frays
    radius = flaw.between(5, 17)
    distance = blob(flaw.rng, x, y, place, radius, 0.2)
    fray = flaw.rng.normal(-1, 0.35 * radius, (2, 128)).astype(np.float32)
    warp = np.where(distance < fray[0][warp_no], -5, warp)
    weft = np.where(distance < fray[1][weft_no], -5, weft)
  top = np.maximum(np.maximum(warp, weft), -2.5)
  is_warp = warp >= weft

  lots = np.exp(rng.normal(0, 0.05, 2))  # two lots of dye are never quite the same
  warp_dye = np.float32(lots[0] * np.array([0.055, 0.085, 0.15]))[:, None, None]
  weft_dye = np.float32(lots[1] * np.array([0.40, 0.375, 0.32]))[:, None, None]
  colour = np.where(is_warp, warp_dye, weft_dye)
  if flaw.kind == 'wrong_yarn':
    column, row = (int(p * OVERSAMPLING) for p in place)
    begin = flaw.rng.uniform(-40, 0.5 * size[1])
    odd = (weft_no - weft_no[row, column]) % 128 < int(flaw.between(1, 3.9))
    odd = odd & (x > begin) & (x < begin + flaw.between(110, 260))
    dye = [(0.50, 0.16, 0.10), (0.16, 0.30, 0.17), (0.62, 0.52, 0.24)][flaw.rng.integers(3)]
    dye = np.float32(dye)[:, None, None]
    colour += (odd & ~is_warp) * (flaw.between(0.3, 1.0) * (dye - colour))
  twist = np.where(is_warp, 1.5 * warp_side + 2.1 * v, 1.5 * weft_side - 2.1 * u)
  twist = np.sin(2 * np.pi * twist)
  fibre = np.where(is_warp, noise(rng, x, (5.0, 0.8)), noise(rng, x, (0.8, 5.0)))
  slub = noise(rng, x, (30.0, 9.0)) + noise(rng, x, (9.0, 30.0))
  depth = np.clip(0.62 + 0.22 * top, 0.25, 1)  # little light comes down between the yarns
  shade = np.where(is_warp, shade[0][warp_no], shade[1][weft_no])
  colour *= shade * depth * (1 + 0.10 * twist + 0.16 * fibre + 0.04 * slub)
  if flaw.kind == 'hole':
    colour = np.where(top == -2.5, np.float32(0.004), colour)
  surface = Surface(colour, 1.5 * top + 0.18 * fibre + 0.12 * twist, np.full_like(x, 0.012))

  if flaw.kind == 'stain':
    tint = [(0.35, 0.17, 0.06), (0.42, 0.36, 0.24)][flaw.rng.integers(2)]  # coffee, machine oil
    distance = blob(flaw.rng, x, y, place, flaw.between(14, 32))
    stain(surface, flaw, distance, tint=tint, opacity=flaw.between(0.25, 0.8), rim=0.35)
  elif flaw.kind == 'snag':  # the loop of yarn that stands out
    angle = flaw.rng.uniform(0, 2 * np.pi)
    turn = np.linspace(angle, angle + 4.2, 9)
    reach = flaw.between(3, 11)
    points = np.stack([1.5 * np.cos(turn), np.sin(turn)], axis=1) * reach + place
    shadow, _ = stroke(x - 1.8, y - 2.4, points)
    surface.colour *= 1 - 0.5 * inside(shadow - 1.2, 3.0)
    distance, along = stroke(x, y, points)
    ply = 0.8 + 0.2 * np.sin(16 * np.pi * along + 2 * distance)
    surface.paint(inside(distance - 1.5), weft_dye * ply)
    surface.build(distance - 1.5, 1.2)
  return surface


def wood_veneer(rng: np.random.Generator, flaw: Flaw, size: tuple[int, int]) -> Surface:
  """Draws varnished oak, cut lengthwise: growth rings in gentle arches, pores and fibres along them.

  Flaws: 'crack', 'scratch', 'stain', 'worm_holes'.
  """
  x, y = grid(size)
  gx, gy = turned(x, y, (size[1] / 2, size[0] / 2), rng.normal(0, 0.03))
  sway = 9 * noise(rng, x, (170.0, 55.0)) + 2.2 * noise(rng, x, (60.0, 16.0))
  bulge = rng.uniform(-70, 70) * np.exp(-(((gx - rng.uniform(-90, 90)) / 70) ** 2))
  ring = gx + sway + bulge * (gy / 150) ** 2 + rng.uniform(0, 100)
  # The years differ in width. `year` maps the place along the rings to years; a table does it.
  edges = np.cumsum(rng.uniform(9, 24, 50)) - 300
  table = np.interp(np.arange(-320, 480, 0.25), edges, np.arange(50.0)).astype(np.float32)
  year = table[np.clip(4 * (ring + 320), 0, len(table) - 1).astype(np.int32)]
  number = np.floor(year)
  phase = year - number
  late = phase ** 3 * np.clip(9 - 9 * phase, 0, 1)  # darkens slowly towards autumn, ends at once
  tone = rng.normal(0, 0.05, 64).astype(np.float32)[number.astype(np.int32)]
  fibre, fine = noise(rng, x, (45.0, 0.9)), noise(rng, x, (9.0, 0.6))
  pores = np.clip(noise(rng, x, (11.0, 0.9)) - 1.0 + 0.5 * inside(phase - 0.35, 0.1), 0, 1)
  dark = 0.22 + 0.50 * late + 0.07 * fibre + 0.05 * fine + 0.55 * pores + tone
  dark = np.clip(dark + 0.07 * noise(rng, x, (110.0, 45.0)) + rng.normal(0, 0.03), 0, 1)
  pale, deep = np.float32([[0.60, 0.36, 0.17], [0.17, 0.075, 0.028]])[:, :, None, None]
  surface = Surface(
      pale + dark * (deep - pale), 0.10 * fibre - 0.45 * pores + 0.06 * fine, np.full_like(x, 0.1))

  place = somewhere(flaw.rng, size, 70)
  if flaw.kind == 'scratch':
    # The faint ones run with the grain and hide in it.
    angle = np.pi / 2 + float(flaw.rng.choice([-1, 1])) * flaw.between(0.06, 1.2)
    points = path(flaw.rng, place, angle, flaw.between(60, 130), 0.06)
    scratch(surface, x, y, flaw, points, width=flaw.between(1.0, 2.0),
            depth=flaw.between(0.35, 1.1), colour=(0.72, 0.52, 0.32),
            strength=flaw.between(0.35, 0.8))
  elif flaw.kind == 'stain':
    tint = [(0.32, 0.28, 0.27), (0.60, 0.33, 0.24)][flaw.rng.integers(2)]  # iron water, lacquer
    distance = blob(flaw.rng, x, y, place, flaw.between(13, 30), 0.2)
    stain(surface, flaw, distance, tint=tint, opacity=flaw.between(0.25, 0.7), rim=0.4)
  elif flaw.kind == 'worm_holes':
    for _ in range(int(flaw.between(1, 5.9))):
      radius = flaw.rng.uniform(0.8, 1.2) * flaw.between(1.5, 3.4)
      hole = disc(*turned(x, y, flaw.rng.normal(place, 13), 0), radius)
      hole = hole + 0.35 * noise(flaw.rng, x, 2.0)
      surface.paint(inside(hole - 1.2, 1.5) * 0.45, (0.62, 0.42, 0.24))
      surface.paint(inside(hole), (0.012, 0.006, 0.004), gloss=0)
      surface.height -= 1.5 * inside(hole, 2.0)
  elif flaw.kind == 'crack':
    points = path(flaw.rng, place, np.pi / 2, flaw.between(45, 130), 0.10)
    distance, along = stroke(x + 0.8 * noise(flaw.rng, x, (5.0, 40.0)), y, points)
    gape = flaw.between(0.5, 1.8) * np.sin(np.pi * along) + 0.15
    surface.paint(inside(distance - gape), (0.02, 0.010, 0.006), gloss=0)
    surface.height -= 0.8 * gape * np.exp(-((distance / (gape + 1)) ** 2))
  return surface


def gear(rng: np.random.Generator, flaw: Flaw, size: tuple[int, int]) -> Surface:
  """Draws a turned and hobbed steel gear of 24 teeth, in grey, on a rubber belt in any direction.

  Flaws: 'broken_tooth', 'dent', 'rust', 'scratch', 'wrong_hole' (drilled too small or not at all).
  """
  x, y = grid(size)
  angle, centre = rng.uniform(0, 2 * np.pi), rng.normal((size[1] / 2, size[0] / 2), 2.5)
  gx, gy = turned(x, y, centre, angle)
  scale = rng.normal(1, 0.006)
  gx, gy = gx * scale, gy * scale
  r, theta = np.sqrt(gx * gx + gy * gy), np.arctan2(gy, gx)

  # Outline: the root circle, and trapezoid teeth below the tip circle.
  teeth, root, tip = 24, 103.0, 122.0
  turn = theta * (teeth / (2 * np.pi))
  tooth_no = np.round(turn)
  sideways = (turn - tooth_no) * r * (2 * np.pi / teeth)
  tooth = np.maximum(r - tip, 0.94 * (np.abs(sideways) - 7.6 + 0.24 * (r - root)))
  if flaw.kind == 'broken_tooth':  # what lies above a slanted, gritty fracture is gone
    slant = float(flaw.rng.choice([-1, 1])) * flaw.rng.uniform(0.4, 0.9)
    fracture = r - flaw.between(tip - 2.5, root + 3) + slant * sideways
    fracture = fracture + 0.9 * noise(flaw.rng, x, 2.5)
    victim = int(flaw.rng.integers(-11, 12))
    tooth = np.where(tooth_no == victim, np.maximum(tooth, fracture), tooth)
  outline = np.minimum(r - root, tooth)
  # Openings: the bore with its keyway, and five holes; `spoke` is the angle to the nearest one.
  bore = np.minimum(r - 21, box(gx - 22, gy, 6, 5))
  radii = np.full(5, 13, np.float32)
  if flaw.kind == 'wrong_hole':
    radii[flaw.rng.integers(5)] = flaw.between(11.2, -4.0)
  fifth = 2 * np.pi / 5
  hole_no = np.round((theta - 0.3) / fifth)
  spoke = theta - 0.3 - hole_no * fifth
  hole = np.sqrt((r * np.cos(spoke) - 64) ** 2 + (r * np.sin(spoke)) ** 2)
  openings = np.minimum(bore, hole - radii[hole_no.astype(np.int32) % 5])
  metal = np.maximum(outline, -openings)

  # The belt: woven rubber, some dust, the gear's shadow, and the dark at the bottom of its holes.
  weave = np.sin(x * 1.3 + 0.6 * noise(rng, x, 60.0)) * np.sin(y * 1.3)
  belt = 1 + 0.22 * weave + 0.15 * noise(rng, x, 1.5) + 0.12 * noise(rng, x, 50.0)
  belt = 0.035 * belt + 0.05 * np.clip(noise(rng, x, 1.2) - 1.2, 0, 1)
  away_x, away_y = turned(7.0, 9.0, (0, 0), angle)
  belt *= 1 - 0.55 * inside(disc(gx - away_x, gy - away_y, 112), 22)
  belt *= 1 - 0.5 * inside(openings - 1, 4) * (r < 90)
  surface = Surface(belt[None], 0.25 * weave, np.full_like(x, 0.01))

  # Lathe marks: uneven rings, brightest where they run across the light.
  lathe = np.zeros((2, 800), np.float32)
  lathe = noise(rng, lathe, (4.0, 0.55))[0] + 0.8 * noise(rng, lathe, (4.0, 6.0))[0]
  rings = lathe[np.minimum(4 * r, 799).astype(np.int32)] * inside(r - root - 4, 20)
  glint = np.cos(theta + (angle + np.pi * rng.normal(0.69, 0.03))) ** 2
  glint = glint * glint * glint
  web = inside(np.maximum(r - 87, 40 - r), 1.5)  # the thinner part between hub and rim
  steel = 0.30 + 0.26 * glint * (1 - 0.6 * web) + (0.035 + 0.05 * glint) * rings * (1 - 0.5 * web)
  steel *= 1 + 0.05 * noise(rng, x, 1.0) + 0.04 * noise(rng, x, 40.0)
  solid = inside(metal)
  surface.build(metal, 2.2)
  step = np.clip(np.maximum(r - 86, 41 - r), -3.5, 0)
  surface.height += (metal < 0.5) * (step + 0.03 * rings)
  surface.paint(solid, (steel * (1 - 0.22 * web))[None], gloss=0.55)

  if flaw.kind == 'scratch':
    place = centre + _polar(flaw.rng, 35, 95)
    points = path(flaw.rng, place, flaw.rng.uniform(0, np.pi), flaw.between(25, 80), 0.08)
    scratch(surface, x, y, flaw, points, width=flaw.between(0.7, 1.6),
            depth=flaw.between(0.25, 0.9), colour=(0.62,), strength=flaw.between(0.35, 0.9),
            within=solid)
  elif flaw.kind == 'dent':
    ring, radius = (30.5, 94.0)[flaw.rng.integers(2)], flaw.between(2.5, 9.0)
    u, v = turned(x, y, centre + _polar(flaw.rng, ring, ring), flaw.rng.uniform(0, np.pi))
    d = np.sqrt(u * u + (1.5 * v) ** 2) / radius + 0.10 * noise(flaw.rng, x, 3.0)
    crater = 0.28 * np.exp(-(((d - 1.15) / 0.22) ** 2)) - np.clip(1 - d * d, 0, 1)
    surface.height += solid * crater * (radius * flaw.between(0.2, 0.42))
  elif flaw.kind == 'rust':
    patch = blob(flaw.rng, x, y, centre + _polar(flaw.rng, 30, 100), flaw.between(7, 24), 0.4)
    spots = 0.7 + 0.5 * noise(flaw.rng, x, 2.5) + 0.4 * noise(flaw.rng, x, 6.0)
    cover = solid * inside(patch, 6) * np.clip(spots, 0, 1) * flaw.between(0.3, 0.9)
    surface.paint(cover, (0.11,), gloss=0)
    surface.height += 0.3 * cover * noise(flaw.rng, x, 1.2)
  return surface


def _polar(rng, near, far):
  """Picks a random point (x, y) whose distance from the origin lies in [near, far]."""
  radius, angle = rng.uniform(near, far), rng.uniform(0, 2 * np.pi)
  return np.array([radius * np.cos(angle), radius * np.sin(angle)])
