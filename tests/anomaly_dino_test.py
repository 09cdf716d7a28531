"""AnomalyDINO and what it shares, against NumPy in float64; `parity_test` has its released code beside it."""

import re

import numpy as np
import pytest
from scipy import ndimage

from patchcore_jax import rotation
from patchcore_jax.banks import editing
from patchcore_jax.banks.model import BankError
from patchcore_jax.detectors import AnomalyDINO, Run
from patchcore_jax.inspection import colours
from tests import small

pytestmark = pytest.mark.accelerator


def _close(found, expected, tolerance=1e-6):
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


class TestRotation:

  def test_by_interpolation(self):
    image = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    angle = np.deg2rad(30)
    y, x = np.mgrid[:9, :14] - np.array([4.5, 7])[:, None, None]
    at = [np.sin(angle) * x + np.cos(angle) * y + 4.5, np.cos(angle) * x - np.sin(angle) * y + 7]
    channels = np.moveaxis(image.astype(float), -1, 0)
    expected = np.stack([ndimage.map_coordinates(c, at, order=1, mode='mirror') for c in channels], -1)
    found = rotation.turned(image[None], *rotation.tables((9, 14), 30))[0]
    np.testing.assert_allclose(found, expected, atol=0.501)

  def test_counterclockwise_as_seen(self):
    image = np.zeros((1, 40, 40, 1), np.uint8)
    image[0, 18:22, 35:38] = 255  # at the right
    found = np.asarray(rotation.turned(image, *rotation.tables((40, 40), 90)))[0, ..., 0]
    rows, columns = np.nonzero(found > 128)
    assert rows.max() < 6 and 15 < columns.mean() < 25  # at the top

  def test_of_one_pixel(self):
    image = np.full((1, 1, 1, 3), 7, np.uint8)
    np.testing.assert_array_equal(rotation.turned(image, *rotation.tables((1, 1), 45)), image)


class TestFit:

  @pytest.mark.parametrize('detector', [
      AnomalyDINO(rotations=2), AnomalyDINO(rotations=1, num_neighbors=3, top_share=0.2, sigma=0.0),
      AnomalyDINO(rotations=1, distance='euclidean', top_share=0)])
  def test_equals_brute_force(self, detector):
    good, new = small.images(3), small.images(4, 7)
    model = small.fit(detector, good, network=small.backbone(('a',)))
    copies = [good]
    if detector.rotations == 2:
      # Half a turn about the corner of four pixels: pixel i is pixel n - i, and 0 is n, mirrored: n - 2.
      rows, columns = (np.r_[n - 2, np.arange(n - 1, 0, -1)] for n in good.shape[1:3])
      copies.append(good[:, rows][:, :, columns])
    bank = np.stack([small.maps(x, ('a',))[0] for x in copies], 1).reshape(-1, 7)
    tokens = small.maps(new, ('a',))[0]
    if detector.distance == 'cosine':
      bank, unit = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (bank, tokens))
      each = np.sort(1 - unit @ bank.T, -1)[..., :detector.num_neighbors].mean(-1)
    else:
      each = np.linalg.norm(tokens[..., None, :] - bank, axis=-1).min(-1)
    _close(model.arrays['embeddings'], bank, 1e-5)
    found = small.predict(detector, model, new, network=small.backbone(('a',)))
    flat = -np.sort(-each.reshape(4, -1), 1)
    _close(found.image, flat[:, :max(1, int(detector.top_share * flat.shape[1]))].mean(1), 1e-5)
    np.testing.assert_array_equal(found.evidence['patch'], each.reshape(4, -1).argmax(1))

  def test_says_that_background_is_not_scored(self):
    said = 'foreground=pca: what is taken for background scores 0, whatever is on it'
    for foreground_of, told in (('none', []), ('pca', [said])):
      lines = []
      AnomalyDINO(rotations=1, foreground=foreground_of).fit(
          small.data(small.images(2)), (small.backbone(('a',)),), Run(notify=lines.append))
      assert lines == told

  def test_a_finding_tells_how_much_is_background(self):
    for foreground_of in ('none', 'pca'):
      inspector = small.inspector(AnomalyDINO(rotations=1, foreground=foreground_of))
      note = inspector.inspect(small.images(1)[0]).note
      found = re.search(r'([\d.]+) % of the image is taken for background and not scored', note)
      assert bool(found) == (foreground_of == 'pca') and (not found or 0 < float(found[1]) <= 100)

  def test_a_row_knows_the_patch_that_it_came_from(self):
    model = small.fit(AnomalyDINO(rotations=4), small.images(2), network=small.backbone(('a',)))
    rows, columns = model.description.grid
    indices = model.arrays['indices'].reshape(2, 4, rows, columns)
    upright = np.arange(rows * columns).reshape(rows, columns)
    np.testing.assert_array_equal(indices[:, 0], [upright, upright + upright.size])
    # Half a turn, about the middle of a cell's pixels: at most one cell beside the opposite one.
    opposite = np.stack(np.divmod(upright[::-1, ::-1], columns))
    assert np.abs(np.stack(np.divmod(indices[0, 2], columns)) - opposite).max() <= 1
    assert indices.min() == 0 and indices.max() < 2 * rows * columns


@pytest.mark.parametrize('fields, message', [
    ({'rotations': 0}, 'rotations=0'), ({'num_neighbors': 0}, 'num_neighbors=0'),
    ({'distance': 'other'}, "distance='other'"), ({'foreground': 'other'}, "foreground='other'"),
    ({'top_share': 1.5}, 'top_share=1.5'), ({'sigma': -1.0}, 'sigma=-1.0')])
def test_values_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    AnomalyDINO(**fields)


class TestModel:
  """What other rooms make of a bank that is not PatchCore's."""

  def test_is_not_changed_row_by_row(self):
    model = small.fit(AnomalyDINO(rotations=1), small.images(2), network=small.backbone(('a',)))
    with pytest.raises(BankError, match='A model of anomaly_dino has no rows to add or take out'):
      editing.check_is_bank(model)

  def test_colours_of_maps_without_thresholds(self):
    inspector = small.inspector(AnomalyDINO(rotations=1), calibration=None)
    assert colours.limits(inspector) is None
