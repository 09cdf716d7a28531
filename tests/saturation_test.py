"""sPRO against its definition, and against what MVTec's functions made of every score as a threshold."""

import json

import numpy as np
import pytest

from patchcore_jax.metrics import saturation
from patchcore_jax.metrics.saturation import GOOD, LOGICAL, STRUCTURAL, Defect, spro, spro_areas

CONFIG = {
    255: Defect('part', 255, 1.0, True), 254: Defect('extra', 254, 5, False),
    200: Defect('place', 200, 0.5, True), 100: Defect('far', 100, 40, False),
    1: Defect('tiny', 1, 0.01, True)}
KINDS = [GOOD, STRUCTURAL, LOGICAL, GOOD, STRUCTURAL, LOGICAL, LOGICAL]


def _made(seed=0, levels=None):
  """Maps of several sizes, with one to three channels of any kind that may overlap."""
  rng = np.random.default_rng(seed)
  maps, channels = [], []
  for kind in KINDS:
    size = rng.integers(8, 14, 2)
    values, own = rng.random(size), []
    for _ in range(0 if kind == GOOD else rng.integers(1, 4)):
      mask = rng.random(size) < 0.2
      values = values + 0.4 * (mask & (rng.random(size) < 0.6))
      own.append((mask * rng.choice(list(CONFIG))).astype(np.uint8))
    maps.append(np.round(values * levels) / levels if levels else values)
    channels.append(own)
  return maps, channels


def _brute_force(maps, channels, limit):
  """The definition, threshold by threshold and channel by channel."""
  points = [(0.0, 0.0)]
  for t in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
    found, normal = [], []
    for values, own in zip(maps, channels):
      normal.append(values[~np.any([c > 0 for c in own], axis=0)] if own else values.ravel())
      for channel in own:
        defect = CONFIG[channel.max()]
        area = (channel > 0).sum()
        full = max(1, int(defect.saturation_threshold * area)) if defect.relative else min(
            defect.saturation_threshold, area)
        found.append(min((values[channel > 0] >= t).sum() / full, 1))
    points.append((np.mean(np.concatenate(normal) >= t), np.mean(found)))
  last = max(i for i, (x, _) in enumerate(points) if x <= limit)
  inside = points[:last + 1]
  if last + 1 < len(points):
    (x0, y0), (x1, y1) = points[last:last + 2]
    inside.append((limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)))
  x, y = np.array(inside).T
  return np.trapezoid(y, x) / limit


@pytest.mark.parametrize('levels', [None, 12, 3])
def test_equals_the_definition(levels):
  for seed in range(3):
    maps, channels = _made(seed, levels)
    limits = (0.01, 0.05, 0.3, 1)
    found = spro_areas(maps, channels, CONFIG, limits=limits)
    assert found.areas == pytest.approx([_brute_force(maps, channels, limit) for limit in limits], abs=1e-12)
    assert found.limits == limits and found.channels == sum(map(len, channels))


def test_kinds():
  maps, channels = _made(3)
  found = spro(maps, channels, KINDS, CONFIG, limits=(0.1, 1))
  for kind, areas in ((STRUCTURAL, found.structural), (LOGICAL, found.logical)):
    inside = [i for i, own in enumerate(KINDS) if own in (GOOD, kind)]
    assert areas == spro_areas(
        [maps[i] for i in inside], [channels[i] for i in inside], CONFIG, limits=(0.1, 1))._replace(
            notes=areas.notes)
  assert found.mean == tuple((a + b) / 2 for a, b in zip(found.structural.areas, found.logical.areas))


def test_saturates_at_a_part():
  """Five pixels of ten are found above all normal ones: enough for a saturation area of five, half of ten."""
  maps = [np.array([[9.0] * 5 + [0.0] * 5 + [1.0] * 10])]
  for value, expected in ((254, 1), (200, 1), (255, 0.5)):
    channel = np.array([[value] * 10 + [0] * 10])
    assert spro_areas(maps, [[channel]], CONFIG, limits=(0.3,)).areas == (expected,)


def test_perfect_maps_give_exactly_one():
  maps, channels = _made(5)
  perfect = [np.max([c > 0 for c in own], axis=0) * 1.0 if own else 0 * m for m, own in zip(maps, channels)]
  found = spro(perfect, channels, KINDS, CONFIG)
  assert found.mean == found.structural.areas == found.logical.areas == (1,) * 5


def test_reads_maps_and_channels_when_they_are_asked_for():
  maps, channels = _made(6)

  class Lazy(list):
    reads = 0

    def __getitem__(self, i):
      self.reads += 1
      return super().__getitem__(i)

  lazy_maps, lazy_channels = Lazy(maps), Lazy(channels)
  assert spro_areas(lazy_maps, lazy_channels, CONFIG) == spro_areas(maps, channels, CONFIG)
  assert lazy_maps.reads == lazy_channels.reads == 2 * len(maps)


def test_not_defined():
  maps, channels = _made()
  only_good = spro(maps[:1], channels[:1], [GOOD], CONFIG)
  assert only_good.mean == only_good.structural.areas == (None,) * 5
  whole = spro_areas([np.eye(2)], [[np.full((2, 2), 255)]], CONFIG)
  assert whole.areas == (None,) * 5


def test_notes():
  maps = [np.arange(12.0).reshape(3, 4)]
  few = np.zeros((3, 4), int)
  few[0, :3] = 1
  for value, words in (
      (100, 'a defect far has 3 pixels, fewer than the 40'), (1, 'taken as 1 pixel'), (255, None)):
    notes = spro_areas(maps, [[few * value]], CONFIG).notes
    assert len(notes) == (words is not None) and all(words in note for note in notes)


class TestImageAuroc:

  def test_by_kinds(self):
    kinds = [GOOD, GOOD, STRUCTURAL, LOGICAL, LOGICAL]
    assert saturation.image_auroc(kinds, [1, 3, 2, 4, 3])[:3] == (0.5, 0.875, 0.6875)
    assert saturation.image_auroc(kinds[:3], [1, 3, 2])[:3] == (0.5, None, None)


@pytest.mark.parametrize('change, words', [
    ({'kinds': KINDS[:2]}, 'for each of 7 maps, got 2'),
    ({'kinds': ['bad', *KINDS[1:]]}, "got 7, among them .'bad'"),
    ({'kinds': [STRUCTURAL, *KINDS[1:]]}, 'image 0: expected channels of anomalous images only'),
    ({'kinds': [GOOD, GOOD, *KINDS[2:]]}, 'image 1: expected channels of anomalous images only'),
    ({'channels': _made()[1][:5]}, 'channels for each of 7 maps, got those of 5'),
    ({'config': {255: CONFIG[255]}}, r'image \d: expected a channel of 0 and one of the values \[255\]'),
    ({'maps': [*_made()[0][:6], np.full_like(_made()[0][6], np.nan)]}, 'image 6, maps: expected finite'),
    ({'maps': [*_made()[0][:6], _made()[0][6][1:]]}, 'image 6: expected channels of the size of its map'),
    ({'limits': (0.3, 0)}, 'max_fpr')])
def test_errors(change, words):
  maps, channels = _made()
  arguments = {'maps': maps, 'channels': channels, 'kinds': KINDS, 'config': CONFIG} | change
  with pytest.raises(ValueError, match=words):
    spro(**arguments)


@pytest.mark.parametrize('channel, words', [
    (np.zeros((2, 2)), '0 only'), (np.array([[255, 254], [0, 0]]), r'\[254, 255\]')])
def test_a_channel_has_one_value(channel, words):
  with pytest.raises(ValueError, match=words):
    spro_areas([np.eye(2)], [[channel]], CONFIG)


class TestConfig:

  ENTRY = {'defect_name': 'a', 'pixel_value': 255, 'saturation_threshold': 0.5, 'relative_saturation': True}

  def _read(self, tmp_path, content):
    path = tmp_path / 'defects_config.json'
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return saturation.read_config(path)

  def test_read(self, tmp_path):
    entries = [{'defect_name': d.name, 'pixel_value': d.pixel_value, 'relative_saturation': d.relative,
                'saturation_threshold': d.saturation_threshold} for d in CONFIG.values()]
    assert self._read(tmp_path, entries) == CONFIG

  @pytest.mark.parametrize('content, words', [
      ('{', 'expected a JSON file'), ({}, 'expected a list'), ([], 'expected a list'),
      ([1], 'defect 1: expected defect_name'), ([{'defect_name': 'a'}], 'expected defect_name, pixel_value'),
      ([ENTRY | {'other': 1}], 'expected defect_name'),
      ([ENTRY, ENTRY], 'defect 2: expected a pixel_value of its own'),
      ([ENTRY | {'pixel_value': 0}], '1 to 255, got 0'),
      ([ENTRY | {'pixel_value': 256}], '1 to 255, got 256'),
      ([ENTRY | {'pixel_value': 2.0}], 'pixel_value of another type'),
      ([ENTRY | {'pixel_value': True}], 'pixel_value of another type'),
      ([ENTRY | {'relative_saturation': 1}], 'relative_saturation of another type'),
      ([ENTRY | {'saturation_threshold': 1}], 'relative threshold such as 0.5 or 1.0, got 1'),
      ([ENTRY | {'saturation_threshold': 1.5}], 'got 1.5'),
      ([ENTRY | {'saturation_threshold': 0.0}], 'got 0.0'),
      ([ENTRY | {'relative_saturation': False}], 'whole pixels, got 0.5'),
      ([ENTRY | {'relative_saturation': False, 'saturation_threshold': 0}], 'whole pixels, got 0')])
  def test_errors(self, tmp_path, content, words):
    with pytest.raises(ValueError, match=f'defects_config.json.*{words}'):
      self._read(tmp_path, content)

  def test_no_file(self, tmp_path):
    with pytest.raises(ValueError, match='none.json: expected a JSON file'):
      saturation.read_config(tmp_path / 'none.json')


def test_stored_values(golden, tmp_path):
  arrays = np.load(golden / 'evaluation' / 'loco.npz')
  path = tmp_path / 'defects_config.json'
  path.write_text(str(arrays['config_json']))
  config = saturation.read_config(path)
  kinds = arrays['kinds'].tolist()
  channels = [[] for _ in kinds]
  for image, value, mask, area, saturated in zip(
      arrays['channel_image'], arrays['channel_value'], arrays['channel_masks'], arrays['defect_areas'],
      arrays['saturation_areas']):
    assert mask.sum() == area and config[int(value)].saturation_area(int(area)) == saturated
    channels[image].append(mask * value)
  limits = tuple(arrays['limits'])
  found = spro(arrays['maps'], channels, kinds, config, limits=limits)
  areas = (found.structural.areas, found.logical.areas, found.mean)
  np.testing.assert_allclose(areas, arrays['all_auc_spro'], rtol=0, atol=1e-12)
  pooled = spro_areas(arrays['maps'], channels, config, limits=limits)
  np.testing.assert_allclose(pooled.areas, arrays['all_auc_spro_all'], rtol=0, atol=1e-12)
  aurocs = saturation.image_auroc(kinds, arrays['maps'].max((1, 2)))[:3]
  np.testing.assert_allclose(aurocs, arrays['image_auroc'], rtol=0, atol=1e-12)
  for row, expected in zip(arrays['saturation_table'], arrays['saturation_table_area']):
    threshold, relative, area = row
    defect = Defect('', 1, threshold if relative else int(threshold), bool(relative))
    assert defect.saturation_area(int(area)) == max(1, expected)  # 0 in the original, which divides by it
