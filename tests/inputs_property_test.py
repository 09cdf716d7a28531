"""Nothing is looked past: whatever changes in a file changes what the network sees, or is declared unseen."""

import itertools
import warnings

import numpy as np
import pytest
from PIL import Image

from patchcore_jax import inspection
from patchcore_jax.data import decoding, image_finding, placement, preprocess, value_range
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.detectors import Scores
from patchcore_jax.inspection import inputs
from patchcore_jax.settings import Preprocessing
from tests import drawn_files, small

CASES = 10  # of each kind of file
# Pixels of the input that a change covers, at the least, for 8 bits to show it: a quarter of a pixel at the
# corner of four has a weight of 1/16 in each, and half the range is 128 levels.
_LEAST = 0.25


def _sizes(rng, kind):
  """Draws the (height, width) of each page."""
  number = rng.integers(1, 4) if kind.pages else 1
  size = rng.integers(1, 50, 2)
  # The frames of an animation are of one size.
  return [tuple(size if kind.suffix == '.gif' else rng.integers(1, 50, 2)) for _ in range(number)]


def _page(rng, kind, size):
  """Draws the values of a page, in the lower half of their range; some pixels are transparent."""
  if kind.mode == '1':
    return (rng.random((*size, 1)) < 0.2).astype(np.uint8)
  page = _scaled(rng.integers(0, 100, (*size, kind.channels)), kind)
  if kind.alpha:
    opacity = rng.integers(128, 256, size)
    top, left = (rng.integers(0, n) for n in size)
    opacity[top:top + rng.integers(1, 30), left:left + rng.integers(1, 30)] = 0
    page[..., -1] = opacity if kind.dtype == 'u1' else opacity * 257
  return page


def _scaled(levels, kind):
  """Makes values of a kind of 256 levels."""
  scale, start = {'u1': (1, 0), 'u2': (257, 0), 'i2': (100, -15000), 'u4': (10**6, 10**6)}.get(
      kind.dtype, (0.01, -0.7))
  return (levels * scale + start).astype(kind.dtype)


def _changed(rng, kind, page):
  """Changes a block of a page, upwards by half the range.

  Returns the page, and which of its pixels differ to the eye.
  """
  (top, height), (left, width) = (
      (begin, rng.integers(1, n - begin + 1)) for n in page.shape[:2] for begin in [rng.integers(0, n)])
  block = np.zeros(page.shape[:2], bool)
  block[top:top + height, left:left + width] = True
  result = page.copy()
  colours = kind.channels - kind.alpha
  if kind.mode == '1':
    result[block] = 1
  else:
    step = _scaled(np.array(128), kind) - _scaled(np.array(0), kind)
    result[block, :colours] += step.astype(kind.dtype)
  differs = (result != page).any(-1)
  return result, differs & (page[..., -1] > 0) if kind.alpha else differs


def _preprocessing(rng, kind, sizes):
  """Draws a preprocessing that images of all these sizes can go through."""
  bands = kind.channels not in (1, 3) and not kind.alpha and not kind.mode
  chosen = tuple(map(int, rng.choice(kind.channels, 3, replace=kind.channels < 3) + 1)) if bands else ()


  def size():
    """Draws none, one number or two."""
    return tuple(map(int, rng.integers(1, 60, rng.integers(3))))

  while True:
    try:
      result = Preprocessing(
          size(), str(rng.choice(['short', 'long'])), size(), size(), bands=chosen,
          background=tuple(map(int, rng.integers(150, 256, 3))))
      if all(np.prod(preprocess.geometry_of(h, w, result).size) < 300**2 for h, w in sizes):
        return result
    except ValueError:  # no such settings, or an image that is smaller than the crop
      continue


def _input(path, preprocessing):
  """What the network sees: the same when fitting and when inspecting."""
  pixels, _ = preprocess.load(Example(path, (), 0, '', 'good'), preprocessing)
  ((_, (image, outside, _)),) = inputs.opened([path], preprocessing)
  np.testing.assert_array_equal(np.asarray(preprocess.transform(image, preprocessing)), pixels)
  return pixels, image.size[::-1], outside


@pytest.fixture(scope='module')
def inspector():
  return small.inspector()


def _declared(inspector, preprocessing, original, size):
  """Which pixels of the original a finding declares as not inspected: [height, width] bool."""
  model = inspector.model.with_description(preprocessing=preprocessing, image_size=size)
  scores = Scores(np.zeros(1, np.float32), np.zeros((1, *size), np.float32))
  finding = inspection.find(inspector.with_model(model), scores, 0, original)
  place = placement.placement(*original, preprocessing)
  unseen = np.isnan(placement.to_original(finding.map, place))
  # Shares count parts of pixels, the map those whose centre is seen: half a pixel on each side.
  slack = 1 - np.prod([max(n - 1, 0) / n for n in original])
  assert abs(unseen.mean() - finding.not_inspected) <= slack + 1e-9
  assert finding.image_size == original[::-1]
  return unseen


@pytest.mark.parametrize('number', range(len(drawn_files.KINDS)), ids=lambda i: '-'.join(
    str(value) for value in (i, *drawn_files.KINDS[i][:4]) if value != ''))
def test_a_changed_block_changes_the_input_or_is_declared(number, inspector, tmp_path):
  kind, told = drawn_files.KINDS[number], 0
  for case in range(CASES):
    rng = np.random.default_rng([number, case])
    orientation = int(rng.integers(1, 9)) if kind.turns else 1
    sizes = _sizes(rng, kind)
    pages = [_page(rng, kind, size) for size in sizes]
    which = int(rng.integers(len(pages)))
    others = list(pages)
    others[which], differs = _changed(rng, kind, pages[which])
    files = [tmp_path / f'{case}{name}{kind.suffix}' for name in 'ab']
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Pillow's, where it turns CMYK
      for file, content in zip(files, (pages, others), strict=True):
        drawn_files.write(file, kind, content, orientation)
    names = [image_finding.find_images(file) for file in files]
    expected = len(pages)
    if kind.suffix == '.gif' and not differs.any():
      expected = len(names[0])
    assert [len(n) for n in names] == [expected] * 2
    upright = [s if orientation < 5 else s[::-1] for s in sizes]
    preprocessing = _preprocessing(rng, kind, upright)
    preprocessing, usual = value_range.measured([*names[0], *names[1]], preprocessing)
    visible = any((page[..., -1] > 0).any() for page in (*pages, *others)) or not kind.alpha
    assert bool(preprocessing.value_range) == (kind.dtype != 'u1' and visible)
    for page, (before, after) in enumerate(zip(*names, strict=True)):
      (one, size, outside), (other, _, _) = (_input(path, preprocessing) for path in (before, after))
      assert size == upright[page] and outside <= usual + 1e-9
      same = np.array_equal(one, other)
      if page != which:
        assert same or kind.suffix == '.gif'  # whose frames are drawn over each other
        continue
      seen = np.asarray(decoding.turned(Image.fromarray(differs), orientation)) & ~_declared(
          inspector, preprocessing, size, one.shape[:2])
      place = placement.placement(*size, preprocessing)
      if seen.sum() / np.prod(place.scale) >= _LEAST:
        assert not same, (kind, case, preprocessing)
        told += 1
  assert told >= CASES // 4  # otherwise nothing was tested


@pytest.mark.parametrize('dtype, channels', [*itertools.product(('u1', 'u2', 'f4'), (2, 4, 5))])
def test_bands_that_are_not_chosen_are_refused(dtype, channels, tmp_path):
  kind = drawn_files.Kind('.tif', dtype, channels)
  drawn_files.write(tmp_path / 'a.tif', kind, [np.ones((6, 5, channels), dtype)])
  with pytest.raises(ImageError, match=f'has {channels} bands'):
    decoding.read_image(tmp_path / 'a.tif', preprocessing=Preprocessing(value_range=(0.0, 2.0)))


@pytest.mark.parametrize('dtype', ['u2', 'i2', 'u4', 'f4', 'f8'])
def test_values_outside_of_the_range_are_told(dtype, tmp_path):
  pixels = np.full((10, 10, 1), 100, dtype)
  pixels[:3, :5] = 120
  drawn_files.write(tmp_path / 'a.tif', drawn_files.Kind('.tif', dtype, 1), [pixels])
  for span, share in (((100.0, 120.0), 0), ((100.0, 119.0), 0.15), ((110.0, 119.0), 1.0)):
    _, _, outside = _input(str(tmp_path / 'a.tif'), Preprocessing((), crop=(), value_range=span))
    assert outside == pytest.approx(share)
