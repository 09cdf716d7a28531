"""The fourth drawn part, a populated circuit board: first its plan, then how to draw it.

Board coordinates are pixels from the middle of the board, x to the right and y down.
"""

import functools

import numpy as np
from PIL import Image, ImageDraw

from patchcore_jax.builtin.synthetic_scene import (
  OVERSAMPLING,
  Flaw,
  Surface,
  box,
  disc,
  grid,
  inside,
  noise,
  path,
  scratch,
  somewhere,
  turned,
)

WIDTH, HEIGHT = 300, 258
ART = 4  # printed artwork has this many dots per pixel

# Every component: name, kind, x, y, direction in degrees.
PLACES = (
    ('U1', 'controller', -38, -16, 0), ('U2', 'driver', 66, -66, 0), ('C1', 'can', 108, 2, 0),
    ('Y1', 'crystal', -40, 62, 0), ('R1', 'resistor', 18, -100, 0), ('R2', 'resistor', 18, -83, 0),
    ('R3', 'resistor', 52, -16, 90), ('R4', 'resistor', 70, -16, 90),
    ('R5', 'resistor', -116, 28, 90), ('C2', 'ceramic', -76, 62, 90),
    ('C3', 'ceramic', -4, 62, 90), ('C4', 'ceramic', 112, -74, 90), ('C5', 'ceramic', -98, 28, 90),
    ('C6', 'ceramic', 60, 22, 0), ('D1', 'diode', 60, 42, 0), ('D2', 'diode', 112, -42, 0),
    ('L1', 'lamp', -116, 66, 90), ('L2', 'lamp', -116, 90, 90))
# Every kind of component: half width, half height, colour, gloss.
KINDS = {
    'controller': (30, 30, (0.022, 0.022, 0.024), 0.1),
    'driver': (17, 12, (0.022, 0.022, 0.024), 0.1),
    'can': (20, 20, (0.60, 0.60, 0.59), 0.5),
    'crystal': (19, 8, (0.52, 0.52, 0.50), 0.7),
    'resistor': (7.5, 4.4, (0.018, 0.018, 0.022), 0.1),
    'ceramic': (7.5, 4.4, (0.34, 0.20, 0.10), 0.1),
    'diode': (8.5, 4.6, (0.030, 0.028, 0.028), 0.1),
    'lamp': (7, 4.6, (0.66, 0.64, 0.58), 0.3)}
# The components that a flaw may befall, the hard cases first.
VICTIMS = {
    'missing_part': ('R3', 'C2', 'R1', 'D1', 'C5', 'L1', 'Y1', 'U2', 'C1'),
    'misplaced_part': ('R4', 'C3', 'R2', 'D2', 'C4', 'L2', 'U2'),
    'wrong_part': ('D1', 'D2', 'C6', 'R5', 'L2', 'U2', 'R2', 'C3', 'C1')}
# Letters of three by five dots, one octal digit a row.
LETTERS = {
    'A': 0o25755, 'B': 0o65656, 'C': 0o34443, 'D': 0o65556, 'E': 0o74647, 'J': 0o11153,
    'L': 0o44447, 'P': 0o65644, 'R': 0o65655, 'U': 0o55557, 'V': 0o55552, 'X': 0o55255,
    'Y': 0o55222, '0': 0o75557, '1': 0o26227, '2': 0o61247, '3': 0o61216, '4': 0o55711,
    '5': 0o74616, '6': 0o34757, '8': 0o75757, '-': 0o00700, ' ': 0}


def circuit_board(rng: np.random.Generator, flaw: Flaw, size: tuple[int, int]) -> Surface:
  """Draws a controller board on an antistatic mat; its components and its print sit within tolerances.

  Flaws: 'misplaced_part', 'missing_part', 'scratch', 'solder_bridge' (between two pins),
  'wrong_part' (another type, or the right one turned by half a turn).
  """
  x, y = grid(size)
  centre, angle = rng.normal((size[1] / 2, size[0] / 2), 1.6), rng.normal(0, 0.012)
  surface, board = _bare_board(rng, x, y, *turned(x, y, centre, angle))
  if flaw.kind == 'scratch':  # before the components are mounted: it runs underneath them
    points = path(flaw.rng, somewhere(flaw.rng, size, 70), flaw.rng.uniform(0, np.pi),
                  flaw.between(35, 120), 0.08)
    scratch(surface, x, y, flaw, points, width=flaw.between(0.7, 1.8),
            depth=flaw.between(0.2, 0.7), colour=(0.55, 0.36, 0.16),
            strength=flaw.between(0.35, 0.9), within=board)

  def local(px, py, degrees, reach):
    """Cuts out the window of `reach` pixels about a place on the board, with coordinates of its own."""
    at_x, at_y = centre + _rotated(px, py, angle)
    rows, columns = (
        slice(max(int(OVERSAMPLING * (at - reach)), 0), int(OVERSAMPLING * (at + reach)))
        for at in (at_y, at_x))
    u, v = turned(x[rows, columns], y[rows, columns], (at_x, at_y), angle + np.deg2rad(degrees))
    return surface.window(rows, columns), u, v

  for _, kind, px, py, degrees in PLACES:
    for pin_x, pin_y, w, h in _pads(kind):
      dx, dy = _rotated(pin_x, pin_y, np.deg2rad(degrees))
      scene, u, v = local(px + dx, py + dy, degrees, np.hypot(w, h) + 2)
      _solder(scene, box(u, v, w, h, 1.2) + rng.normal(0, 0.25), rng.normal(1, 0.05))
  if flaw.kind == 'solder_bridge':
    _, kind, px, py, _ = PLACES[flaw.rng.integers(2)]
    pins = [pin for pin in _pads(kind) if pin[1] > abs(pin[0])]  # the lower row
    first = int(flaw.rng.integers(len(pins) - 1))
    half_gap = (pins[first + 1][0] - pins[first][0]) / 2
    side = float(flaw.rng.choice([-1, 1]))
    scene, u, v = local(px + side * (pins[first][0] + half_gap), py + side * pins[0][1], 0, 15)
    bridge = box(u, v, half_gap + flaw.between(-0.5, 3), flaw.between(1.0, 4.2), 1)
    _solder(scene, bridge + 0.5 * noise(flaw.rng, u, 2.0), 1.0)

  victim = _victim(flaw)
  for name, kind, px, py, degrees in PLACES:
    shift, turn, tone = rng.normal(0, 0.45, 2), rng.normal(0, 0.8), np.exp(rng.normal(0, 0.05))
    if name == victim and flaw.kind == 'missing_part':
      continue
    if name == victim and flaw.kind == 'misplaced_part':
      shift = shift + _rotated(flaw.between(2.0, 7.0), 0, flaw.rng.uniform(0, 2 * np.pi))
      turn = turn + float(flaw.rng.choice([-1, 1])) * flaw.between(7, 40)
    w, h = KINDS[kind][:2]
    scene, u, v = local(px + shift[0], py + shift[1], degrees + turn, np.hypot(w, h) + 6)
    tall = 3.5 if kind == 'can' else 1.6
    dx, dy = map(float, _rotated(tall, 1.2 * tall, -np.deg2rad(degrees)))
    shadow = disc(u - dx, v - dy, w) if kind == 'can' else box(u - dx, v - dy, w, h, 1)
    scene.colour *= 1 - 0.55 * inside(shadow, 1.5 * tall)
    _mount(scene, kind, u, v, tone, wrong=name == victim and flaw.kind == 'wrong_part')
  return surface


def _bare_board(rng, x, y, bx, by):
  """Draws the board with copper, lacquer, print and socket strip, on its mat: (surface, board's cover)."""
  edge = box(bx, by, WIDTH / 2, HEIGHT / 2, 5)
  bolt = disc(np.abs(bx) - 138, np.abs(by) - 117, 5)
  board = inside(np.maximum(edge, -bolt))
  mat = 0.045 * (1 + 0.25 * noise(rng, x, 1.2) + 0.1 * noise(rng, x, 40.0))
  mat *= 1 - 0.6 * inside(box(bx - 4, by - 5, WIDTH / 2 - 3, HEIGHT / 2 - 3, 5), 10)
  surface = Surface(mat * np.float32([0.85, 0.95, 1.15])[:, None, None],
                    0.1 * noise(rng, x, 1.5), np.full_like(x, 0.02))

  copper_art, print_art = _artwork()
  copper = _stamp(copper_art, bx, by)
  slip_x, slip_y = (float(s) for s in rng.normal(0, 0.7, 2))  # the print never sits quite right
  printed = _stamp(print_art, bx - slip_x, by - slip_y)
  printed = printed * np.clip(0.9 + 0.25 * noise(rng, x, 2.5), 0, 1)
  lacquer = np.array([0.018, 0.125, 0.052]) * np.exp(rng.normal(0, 0.06, 3))
  uneven = 1 + 0.05 * noise(rng, x, 1.5) + 0.03 * noise(rng, x, 60.0)
  lacquer = np.float32(lacquer)[:, None, None] * uneven
  surface.build(edge, 1.2)
  surface.height += board * (0.35 * copper + 0.018 * noise(rng, x, 2.0))
  surface.paint(board, lacquer, gloss=0.16)
  surface.paint(board * copper * 0.5, 2.2 * lacquer + np.float32([0.03, 0.04, 0])[:, None, None])
  surface.paint(inside(np.maximum(bolt - 4, -bolt)), (0.62, 0.44, 0.16), gloss=0.6)
  surface.paint(printed * board * 0.9, (0.62, 0.63, 0.60), gloss=0.03)

  below = slice(len(x) * 3 // 4, None)  # the socket strip: black, eight gilded pins
  scene, bx, by = surface.window(below, slice(None)), bx[below] - 66, by[below] - 108
  scene.colour *= 1 - 0.5 * board[below] * inside(box(bx - 2, by - 3, 52, 7, 1), 5)
  strip = box(bx, by, 52, 7, 1)
  scene.build(strip, 2)
  scene.paint(inside(strip), (0.020, 0.020, 0.022), gloss=0.12)
  pin = np.maximum(np.abs(bx % 12.5 - 6.25), np.abs(by)) - 2.6
  pin = np.maximum(pin, strip + 2)
  scene.paint(inside(pin), (0.60, 0.43, 0.15), gloss=0.8)
  scene.height += np.clip(-pin, 0, 1.5)
  return surface, board


@functools.cache
def _artwork():
  """Draws the copper and the white print of the bare board: two uint8 maps, `ART` dots a pixel."""
  copper, paper = (Image.new('L', (WIDTH * ART, HEIGHT * ART)) for _ in range(2))
  tracer, pen = ImageDraw.Draw(copper), ImageDraw.Draw(paper)

  def at(*points):
    return [((px + WIDTH / 2) * ART, (py + HEIGHT / 2) * ART) for px, py in points]

  def wire(*points, wide=1.8, via=True):
    tracer.line(at(*points), fill=255, width=int(wide * ART), joint='curve')
    if via:
      (px, py), = at(points[-1])
      tracer.ellipse((px - 2.6 * ART, py - 2.6 * ART, px + 2.6 * ART, py + 2.6 * ART), fill=255)

  for k in range(8):  # the controller's pins fan out, parallel, in bends of 45 degrees
    a, b = -23.1 + 6.6 * k, 3.4 * k
    spread = 2 * a - 6
    wire((a - 38, 22), (a - 38, 40 - b / 3), (spread - 38, 40 - b / 3 + abs(a - 6)),
         (spread - 38, 84 + b))
    wire((0, a - 16), (6 + b, a - 16), (14 + b, a - 8 + b / 3), (14 + b, 70 + b / 4),
         (22 + 12.5 * k, 84 + b / 4), (22 + 12.5 * k, 108), via=False)
    wire((-76, a - 16), (-90 - b / 3, a - 16), (-104 - b / 3, 1.2 * a - 30), (-128, 1.2 * a - 30))
    wire((a - 38, -54), (a - 38, -60 - b), (a - 16, -82 - b), (6 - b, -82 - b), via=False)
  for k in range(4):
    wire((54 + 8 * k, -50), (54 + 8 * k, 2 * k - 42), (48 + 8 * k, 2 * k - 34), (48 + 8 * k, 60))
    wire((54 + 8 * k, -82), (54 + 8 * k, -90 - 4 * k), (84 + 12 * k, -90 - 4 * k))
  wire((97, 2), (84, 2), (84, 62), (98, 76), (136, 76), wide=5)
  wire((119, 2), (134, 2), (134, -88), (112, -88), wide=5)
  wire((-116, 20), (-116, 100), wide=4, via=False)
  wire((-52, 62), (-52, 78), (-70, 96), (-100, 96))

  for name, kind, px, py, degrees in PLACES:
    w, h = KINDS[kind][:2] if degrees == 0 else KINDS[kind][1::-1]
    if kind == 'can':
      pen.ellipse(at((px - 23.5, py - 23.5), (px + 23.5, py + 23.5)), outline=255, width=ART)
    elif kind == 'driver':
      pen.rectangle(at((px - w, py - h - 8), (px + w, py + h + 8)), outline=255, width=ART)
    elif kind != 'controller':
      pen.rectangle(at((px - w - 3, py - h - 3), (px + w + 3, py + h + 3)), outline=255, width=ART)
    if name not in ('R1', 'R3', 'R5', 'C6'):  # no room beside these
      beside = degrees or kind in ('can', 'resistor')
      corner = (px + w + 5, py - 4) if beside else (px - w, py + h + 10)
      _letter(pen, name, *at(corner)[0], 1.5 * ART)
  _letter(pen, 'PCX-04 REV B', *at((-92, -122))[0], 2 * ART)
  _letter(pen, 'J1', *at((-2, 102))[0], 2 * ART)
  return np.asarray(copper), np.asarray(paper)


def _letter(pen, text, x, y, dot):
  """Writes `text` with its top left corner at (x, y); a dot of a letter is `dot` wide."""
  for n, letter in enumerate(text):
    for k in range(15):
      if LETTERS[letter] >> (14 - k) & 1:
        left, top = x + (4 * n + k % 3) * dot, y + k // 3 * dot
        pen.rectangle((left, top, left + dot - 0.5, top + dot - 0.5), fill=255)


@functools.cache
def _marking(text):
  """Draws what is printed on a chip: a uint8 map, `ART` dots a pixel, with the text in its middle."""
  image = Image.new('L', (64 * ART, 12 * ART))
  dot = 1.7 * ART
  _letter(ImageDraw.Draw(image), text, 32 * ART - (2 * len(text) - 0.5) * dot, 1.5 * ART, dot)
  return np.asarray(image)


def _stamp(art, x, y):
  """Looks a printed map up at pixels (x, y) from its middle: in [0, 1], and 0 beyond its border."""
  high, wide = art.shape
  column = (x * ART + wide / 2).astype(np.int32)
  row = (y * ART + high / 2).astype(np.int32)
  valid = (column >= 0) & (row >= 0) & (column < wide) & (row < high)
  index = np.where(valid, row * wide + column, 0)
  return art.ravel()[index] * (valid * np.float32(1 / 255))


def _pads(kind):
  """Lists the solder pads of a component: (x, y, half width, half height) about its centre."""
  w, h = KINDS[kind][:2]
  if kind == 'controller':
    pins = [6.6 * k - 23.1 for k in range(8)]
    return [(p, side * 35, 1.7, 4.2) for side in (-1, 1) for p in pins] + [
        (side * 35, p, 4.2, 1.7) for side in (-1, 1) for p in pins]
  if kind == 'driver':
    return [(8 * k - 12, side * 16, 2.0, 4.0) for side in (-1, 1) for k in range(4)]
  if kind == 'can':  # sits on its pads and hides them
    return []
  return [(side * (w - 1.5), 0, 4.2, h + 0.6) for side in (-1, 1)]


def _solder(scene, distance, tone):
  """Lays a bright dome of solder over the inside of a shape."""
  scene.paint(inside(distance), tone * np.array([0.50, 0.51, 0.52]), gloss=0.9)
  scene.height += 1.6 * np.sqrt(np.clip(-distance / 2, 0, 1))


def _mount(scene, kind, x, y, tone, wrong):
  """Draws the body of a component; `wrong` swaps its type, or turns it where it has a direction."""
  w, h, colour, gloss = KINDS[kind]
  if wrong and kind in ('resistor', 'ceramic'):
    colour = KINDS['ceramic' if kind == 'resistor' else 'resistor'][2]
  way = -1 if wrong else 1
  corner = {'crystal': 7, 'lamp': 1}.get(kind, 0.6)
  body = disc(x, y, w) if kind == 'can' else box(x, y, w, h, corner)
  solid = inside(body)
  scene.build(body, 2.0)
  scene.paint(solid, np.array(colour) * tone, gloss=gloss)
  if kind in ('resistor', 'ceramic', 'diode'):  # metal ends
    scene.paint(solid * inside(w - 2.6 - np.abs(x)), (0.52, 0.52, 0.53), gloss=0.7)
  if kind == 'diode':  # the bar marks the cathode
    scene.paint(solid * inside(np.abs(way * x + 3.2) - 1.1), (0.55, 0.55, 0.53))
  elif kind == 'lamp':
    lens = disc(x, y, 3.5)
    scene.paint(inside(lens), (0.10, 0.42, 0.12) if wrong else (0.55, 0.07, 0.04), gloss=1)
    scene.height += 0.6 * np.sqrt(np.clip(-lens / 3.5, 0, 1))
  elif kind == 'can':  # the black segment marks the negative pole; the cross is the vent
    scene.paint(inside(np.maximum(body + 2.5, way * x + 8.5)), (0.02, 0.02, 0.022), gloss=0.1)
    cross = 0.7 * np.minimum(np.abs(x - y), np.abs(x + y)) - 0.5
    cross = inside(np.maximum(cross, body + 8), 1.5)
    scene.paint(0.5 * cross, (0.25, 0.25, 0.25))
    scene.height -= 0.6 * cross + 0.8 * inside(np.abs(body + 2) - 0.7, 1.5)
  elif kind == 'crystal':
    scene.height -= 0.7 * inside(np.abs(body + 2.2) - 0.7, 1.5)
  elif kind in ('controller', 'driver'):  # its name, and the dimple at pin 1
    text = _stamp(_marking('PCX 832' if kind == 'controller' else 'LD3'), way * x, way * y)
    scene.paint(0.75 * text, (0.20, 0.20, 0.20))
    dimple = disc(way * x + w - 5.5, way * y - h + 5.5, 2)
    scene.paint(inside(dimple), (0.010, 0.010, 0.010), gloss=0.02)
    scene.height -= 0.5 * inside(dimple, 1.5)


def _victim(flaw):
  """Chooses the component that the flaw befalls: its name, or None."""
  names = VICTIMS.get(flaw.kind)
  if names is None:
    return None
  pick = round(flaw.severity * (len(names) - 1) + flaw.rng.normal(0, 0.7))
  return names[min(max(pick, 0), len(names) - 1)]


def _rotated(x, y, angle):
  """Turns the vector (x, y) clockwise by `angle` radians."""
  cos, sin = np.cos(angle), np.sin(angle)
  return np.array([cos * x - sin * y, sin * x + cos * y])
