"""Banks that are added to, united, cut."""

import dataclasses

import numpy as np
import pytest

from patchcore_jax.banks import editing, provenance
from patchcore_jax.banks.model import BankError
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import PaDiM, PatchCore, Run, patchcore
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, ScoringSpec
from tests import small

DETECTOR = PatchCore(
    0.3, EmbeddingSpec('mean', patch_size=1), CoresetSpec(projection_dim=8), ScoringSpec(sigma=0))
BACKBONE = small.backbone(('a', 'b'))


def _fit(images, names):
  """A bank with thresholds and pictures."""
  bank, scores = DETECTOR.fit_and_cross_score(
      ArrayData(images, 4, names), (BACKBONE,), Run(keep_images=True), folds=3)
  return editing.calibrate(bank, *scores, false_alarm_rate=0.2)


def _embeddings(images):
  return patchcore.embed(BACKBONE, ArrayData(images, 4), embedding=DETECTOR.embedding)[0]


def _rows(bank):
  return bank.arrays['embeddings']


def _distances(points, rows):
  """Computes the distances to the nearest row, in float64."""
  points, rows = points.reshape(-1, points.shape[-1]).astype(np.float64), rows.astype(np.float64)
  return np.sqrt(((points[:, None] - rows[None]) ** 2).sum(-1)).min(1)


@pytest.fixture(scope='module')
def images():
  return small.images(12)


@pytest.fixture(scope='module')
def half(images):
  return _fit(images[:6], [f'{i}.png' for i in range(6)])


@pytest.fixture(scope='module')
def grown(images, half):
  new = _embeddings(images[6:])
  scores = patchcore.score_embeddings(new, _rows(half), (32, 24), scoring_spec=DETECTOR.scoring, batch_size=4)
  return editing.append(
      half, new, [f'{i}.png' for i in range(6, 12)],
      files=[provenance.encode(image) for image in images[6:]], image_scores=scores[0], map_maxima=scores[1])


class TestAppend:

  def test_old_rows_stay_and_new_ones_were_not_covered(self, images, half, grown):
    m, radius = len(_rows(half)), editing.covering_radius(half)
    np.testing.assert_array_equal(_rows(grown)[:m], _rows(half))
    assert m < len(_rows(grown)) <= m + 0.3 * 6 * 48
    added = _rows(grown)[m:]
    assert (_distances(added, _rows(half)) > radius * (1 - 1e-5)).all()
    for i in range(1, len(added)):  # nor by one another
      assert _distances(added[i:i + 1], added[:i]) > radius * (1 - 1e-5)

  def test_the_farthest_first_until_all_is_covered(self, images, half, grown):
    radius = editing.covering_radius(half)
    new = _embeddings(images[6:])
    left = _distances(new, _rows(grown))
    if len(_rows(grown)) < len(_rows(half)) + int(0.3 * 6 * 48):
      assert left.max() <= radius * (1 + 1e-5)
    first = new.reshape(-1, new.shape[-1])[np.argmax(_distances(new, _rows(half)))]
    np.testing.assert_array_equal(_rows(grown)[len(_rows(half))], first)

  def test_rows_know_where_they_come_from(self, images, half, grown):
    embeddings = _embeddings(images)
    for row in (0, len(_rows(half)), len(_rows(grown)) - 1):
      origin = provenance.origin(grown, row)
      assert origin.name == f'{origin.image}.png'
      np.testing.assert_allclose(
          _rows(grown)[row], embeddings[origin.image, origin.row, origin.column], rtol=1e-6)
    assert np.abs(provenance.thumbnail(grown, 8).astype(int) - images[8]).mean() < 30

  def test_the_thresholds_count_the_new_images(self, half, grown):
    before, after = half.description.calibration, grown.description.calibration
    assert after.image_scores[:6] == before.image_scores and len(after.image_scores) == 12
    assert grown.description.num_images == 12 and grown.description.num_patches == 12 * 48
    assert 'appended 6 images' in grown.description.history[-1].what

  def test_the_same_images_again_add_nothing(self, images, grown):
    again = editing.append(
        grown, _embeddings(images[6:8]), ['a', 'b'], files=[b'', b''], image_scores=[1, 1], map_maxima=[1, 1])
    covered = _distances(_embeddings(images[6:8]), _rows(grown)) <= editing.covering_radius(grown)
    assert len(_rows(again)) - len(_rows(grown)) <= (~covered).sum()

  def test_errors(self, half, images):
    with pytest.raises(ValueError, match='expected \\[n, 8, 6'):
      editing.append(half, np.zeros((1, 4, 6, 13), np.float32), ['a'])
    with pytest.raises(ValueError, match='files: expected 1 for this bank, got 0'):
      editing.append(half, _embeddings(images[:1]), ['a'])


class TestMerge:

  def test_covers_what_either_did(self, images, half):
    other = _fit(images[6:], [f'b{i}.png' for i in range(6)])
    both = editing.merge(half, other)
    radius = editing.covering_radius(half)
    assert (_distances(_rows(other), _rows(both)) <= radius * (1 + 1e-5)).all()
    assert both.description.images[6:] == other.description.images
    assert len(both.description.calibration.image_scores) == 12
    last = provenance.origin(both, len(_rows(both)) - 1)
    assert last.name.startswith('b') and provenance.thumbnail(both, last.image) is not None

  def test_with_itself_adds_nothing(self, half):
    assert len(_rows(editing.merge(half, half))) == len(_rows(half))

  def test_of_another_network(self, half):
    (network,) = half.description.backbones
    other = half.with_description(backbones=(dataclasses.replace(network, name='other'),))
    with pytest.raises(BankError, match='backbones.0.name'):
      editing.merge(half, other)


class TestDrop:

  def test_its_patches_are_gone_and_the_others_know_their_images(self, grown):
    less = editing.drop(grown, ['2.png', '7.png'])
    assert less.description.images == tuple(f'{i}.png' for i in range(12) if i not in (2, 7))
    origins = [provenance.origin(grown, i) for i in range(len(_rows(grown)))]
    kept = [i for i, o in enumerate(origins) if o.name not in ('2.png', '7.png')]
    np.testing.assert_array_equal(_rows(less), _rows(grown)[kept])
    for row, i in enumerate(kept):
      found = provenance.origin(less, row)
      assert (found.name, found.row, found.column) == (origins[i].name, origins[i].row, origins[i].column)
    assert len(provenance.thumbnails(less)) == 10
    assert len(less.description.calibration.image_scores) == 10

  def test_errors(self, half):
    with pytest.raises(ValueError, match="no training image '22.png'; did you mean '2.png'"):
      editing.drop(half, ['22.png'])
    with pytest.raises(ValueError, match='nothing would be left'):
      editing.drop(half, half.description.images)
    twice = half.with_description(images=('a/1.png', 'b/1.png', *'cdef'))
    with pytest.raises(ValueError, match='a/1.png, b/1.png'):
      editing.drop(twice, ['1.png'])


class TestShrink:

  def test_a_fitted_bank_is_cut(self, images, half):
    small_one = editing.shrink(half, 0.1)
    np.testing.assert_array_equal(_rows(small_one), _rows(half)[:28])
    assert small_one.description.calibration is None and small_one.description.settings['ratio'] == 0.1

  def test_one_that_was_added_to_is_selected_anew(self, images, grown):
    small_one = editing.shrink(grown, 0.1)
    cut = _rows(grown)[:len(_rows(small_one))]
    points = _embeddings(images)
    assert len(_rows(small_one)) == 57
    assert _distances(points, _rows(small_one)).max() < _distances(points, cut).max()

  def test_not_smaller(self, half):
    with pytest.raises(ValueError, match='expected a smaller one'):
      editing.shrink(half, 0.3)


class TestCalibrate:

  @pytest.mark.parametrize('detector', [DETECTOR, PaDiM(num_dims=4)], ids=lambda d: d.name)
  def test_a_model_of_any_method(self, detector):
    model = small.fit(detector, network=BACKBONE)
    found = editing.calibrate(model, [1.0, 2.0, 3.0], [4.0, 6.0, 5.0], false_alarm_rate=0.25)
    assert found.arrays is model.arrays
    assert found.description.calibration.image_threshold == pytest.approx(3, rel=1e-4)
    assert found.description.calibration.method == 'held out'
    assert 'thresholds from 3 images' in found.description.history[-1].what


class TestAtRate:

  def test_as_if_it_had_been_asked_for_at_the_fit(self, half):
    scores = [3.0, 1.0, 2.0, 4.0], [4.0, 6.0, 5.0, 7.0]
    model = editing.calibrate(half, *scores, false_alarm_rate=0.2, allowances=(0.5, 0.25))
    found = editing.at_rate(model, 0.4).description
    assert found.calibration == editing.calibrate(
        half, *scores, false_alarm_rate=0.4, allowances=(0.5, 0.25)).description.calibration
    assert found.calibration.image_threshold < model.description.calibration.image_threshold
    assert found.history[-1].what == (
        'thresholds for a false-alarm rate of 0.4, from the 4 scores that were there')

  def test_errors(self, half):
    with pytest.raises(ValueError, match='no thresholds, and so no scores'):
      editing.at_rate(half.with_description(calibration=None), 0.1)
    with pytest.raises(ValueError, match='expected a share between 0 and 1'):
      editing.at_rate(half, 5)


class TestOtherModels:

  def test_that_have_no_rows(self, half):
    model = small.fit(PaDiM(num_dims=4), network=BACKBONE)
    for edit in (
        lambda: editing.append(model, np.zeros((1, 8, 6, 13), np.float32), ['a']),
        lambda: editing.merge(model, model), lambda: editing.merge(half, model),
        lambda: editing.drop(model, ['/line/good/1.png']), lambda: editing.shrink(model, 0.1)):
      with pytest.raises(BankError, match='model of padim has no rows'):
        edit()
