"""What holds for every detector. A new one is one line in `CASES`; what is its own is in its own test."""

import dataclasses
import json
import types
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax import export
from PIL import Image

from patchcore_jax import inspection
from patchcore_jax.banks import calibration, provenance, store
from patchcore_jax.banks.model import BankError, Model
from patchcore_jax.data.dataset import FileData
from patchcore_jax.data.folder import Example
from patchcore_jax.detectors import (
    AESSIM,
    CAVGA,
    DETECTORS,
    DSEBM,
    ITAE,
    OCSVM,
    RAD,
    SPADE,
    AnomalyDINO,
    Detector,
    DifferNet,
    Ensemble,
    ExplainedVAE,
    GammaVAE,
    GANomaly,
    GeoTrans,
    MahalanobisAD,
    MHPatchCore,
    MuSc,
    PaDiM,
    PatchCore,
    PatchSVDD,
    PixelStatistics,
    Run,
    SoftPatch,
    Student,
    SuperADD,
    find,
    of_model,
    of_settings,
    streaming,
)
from patchcore_jax.detectors.base import LIVE, LOOP_FREE, PORTABLE
from patchcore_jax.detectors.trained_settings import Trained
from patchcore_jax.export import folder
from patchcore_jax.inspection import Inspector
from patchcore_jax.learned import layers
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing, ScoringSpec, SearchSpec
from tests import precision, small
from tests.toy import Toy

pytestmark = pytest.mark.accelerator

GOOD, NEW = small.images(12), small.images(7, seed=3)
FOLDS = 2


class Case(NamedTuple):
  """A detector with settings for `small.backbone`, and what is to be known of it here.

  Attributes:
    detector, networks: what is fitted.
    another_fit: settings of which a model depends on some, and the field that differs; None if it depends on
      none.
    another_scoring: settings of which a model depends on none; None if there are none.
    maps: whether it has anomaly maps.
    evidence: what it tells besides.
    bank: whether there is one that can be sharded over devices.
  """

  detector: Detector
  networks: tuple[Any, ...]
  another_fit: tuple[Detector, str] | None
  another_scoring: Detector | None
  maps: bool = True
  evidence: tuple[str, ...] = ()
  bank: bool = False


NETWORK = (small.backbone(),)
PATCHCORE = PatchCore(0.5, EmbeddingSpec('mean'), CoresetSpec(projection_dim=4))
RETRIEVED = RAD(num_images=3, map_size=(16, 16))
THINNED = SuperADD(window=24, overlap=8, bank_rows=60, rounds=3, thinning_neighbors=5, radius=2)
TRAINED = {'size': 32, 'batch_size': 4, 'steps': 2}
# What all trainings share is seen with three methods. These compile for long; their own tests train them.
UNTRAINED = TRAINED | {'steps': 0}
AE_SSIM = AESSIM(**TRAINED, latent=4)
GANOMALY = GANomaly(**TRAINED | {'size': 16}, filters=4, latent=4, maps=True)
DSEBM_ENERGY = DSEBM(**TRAINED | {'size': 16}, filters=4, hidden=8)
GAMMA_VAE = GammaVAE(**UNTRAINED, latent=4, moves=4)
EXPLAINED_VAE = ExplainedVAE(**UNTRAINED, latent=4, width=4)
DIFFERNET = DifferNet(**UNTRAINED | {'size': 16}, turns=2, test_turns=2, blocks=1, hidden=4)
PATCH_SVDD = PatchSVDD(**UNTRAINED | {'size': 64}, width=2, code=3, bank_ratio=0.5)
SOFT_PATCH = SoftPatch(0.5, 'mean', num_neighbors=3, projection_dim=4)
MH_PATCHCORE = MHPatchCore('mean', variance=1.0, block_images=3, block_patches=20)
STUDENT = Student(**UNTRAINED | {'size': 16}, field=17, width=2, descriptor=3, teacher_steps=0)
GEOTRANS = GeoTrans(**UNTRAINED | {'size': 16}, width=1)
OF_ATTRIBUTES = ITAE(**UNTRAINED | {'size': 16}, width=2)
OF_ATTENTION = CAVGA(**UNTRAINED, widths=(4, 6), latent=3)
TURNED = dataclasses.replace(
    PATCHCORE, embedding=EmbeddingSpec('mean', unit_length=True, rotations=2),
    scoring=ScoringSpec(foreground='pca'))
CASES = {
    'patchcore': Case(
        PATCHCORE, NETWORK, (dataclasses.replace(PATCHCORE, ratio=0.4), 'settings.ratio'),
        dataclasses.replace(PATCHCORE, scoring=ScoringSpec(num_neighbors=2)),
        evidence=('patch', 'nearest'), bank=True),
    'patchcore_of_turned_parts': Case(
        TURNED, NETWORK, (dataclasses.replace(TURNED, ratio=0.4), 'settings.ratio'),
        dataclasses.replace(TURNED, scoring=ScoringSpec(num_neighbors=2, foreground='pca')),
        evidence=('patch', 'nearest', 'background_share'), bank=True),
    'spade': Case(SPADE(num_images=3), NETWORK, None, SPADE(num_images=2)),
    'anomaly_dino': Case(
        AnomalyDINO(rotations=2), NETWORK, (AnomalyDINO(rotations=3), 'settings.rotations'),
        AnomalyDINO(rotations=2, foreground='pca', num_neighbors=2), evidence=('patch', 'nearest'),
        bank=True),
    'rad': Case(
        RETRIEVED, (small.with_token(),), (dataclasses.replace(RETRIEVED, dtype='float32'), 'settings.dtype'),
        dataclasses.replace(RETRIEVED, radius=-1), evidence=('patch',)),
    'super_add': Case(
        THINNED, (small.backbone(('b', 'c')),),
        (dataclasses.replace(THINNED, brightness=0.1), 'settings.brightness'),
        dataclasses.replace(THINNED, sigma=2.0), evidence=('patch',), bank=True),
    'padim': Case(
        PaDiM(num_dims=6), NETWORK, (PaDiM(num_dims=6, epsilon=0.1), 'settings.epsilon'),
        PaDiM(num_dims=6, sigma=0.0), evidence=('patch',)),
    # More dimensions than images: the other form of its factor.
    'padim_of_low_rank': Case(
        PaDiM(num_dims=0), NETWORK, (PaDiM(num_dims=5), 'settings.num_dims'),
        PaDiM(num_dims=0, image_score='map'), evidence=('patch',)),
    'mahalanobis_ad': Case(
        MahalanobisAD(), NETWORK, (MahalanobisAD(0.5), 'settings.shrinkage'), None, maps=False),
    'ocsvm': Case(OCSVM(nu=0.5), NETWORK, (OCSVM(nu=0.2), 'settings.nu'), None, maps=False),
    # Of PatchCore there are ensembles in `ensemble_test`; this one compiles quickly.
    'ensemble': Case(
        Ensemble(PaDiM(num_dims=6)), (small.backbone(('a',)), small.backbone(('b', 'c'))),
        (Ensemble(PaDiM(num_dims=5)), 'settings.member.settings.num_dims'), None),
    'soft_patch': Case(
        SOFT_PATCH, NETWORK, (dataclasses.replace(SOFT_PATCH, noise_share=0.1), 'settings.noise_share'),
        dataclasses.replace(SOFT_PATCH, weighted=False), evidence=('patch', 'nearest'), bank=True),
    'mh_patchcore': Case(
        MH_PATCHCORE, NETWORK, (dataclasses.replace(MH_PATCHCORE, variance=0.9), 'settings.variance'),
        dataclasses.replace(MH_PATCHCORE, support_neighbors=1), evidence=('patch', 'nearest'), bank=True),
    'ae_ssim': Case(
        AE_SSIM, (), (dataclasses.replace(AE_SSIM, latent=5), 'settings.latent'),
        dataclasses.replace(AE_SSIM, stride=20)),
    'ganomaly': Case(
        GANOMALY, (), (dataclasses.replace(GANOMALY, latent=5), 'settings.latent'),
        dataclasses.replace(GANOMALY, bn='batch1')),
    'dsebm': Case(
        DSEBM_ENERGY, (), (dataclasses.replace(DSEBM_ENERGY, hidden=9), 'settings.hidden'),
        dataclasses.replace(DSEBM_ENERGY, score='reconstruction')),
    'pixel_statistics': Case(
        PixelStatistics(), (), (PixelStatistics(size=16), 'settings.size'), PixelStatistics('mean_image'),
        maps=False),
    'cavga': Case(
        OF_ATTENTION, (), (dataclasses.replace(OF_ATTENTION, latent=4), 'settings.latent'),
        dataclasses.replace(OF_ATTENTION, image_score='map')),
    'gamma_vae': Case(
        GAMMA_VAE, (), (dataclasses.replace(GAMMA_VAE, stride=20), 'settings.stride'),
        dataclasses.replace(GAMMA_VAE, map='residual'), evidence=('moves', 'halvings')),
    'explained_vae': Case(
        EXPLAINED_VAE, (), (dataclasses.replace(EXPLAINED_VAE, deviation=0.2), 'settings.deviation'),
        dataclasses.replace(EXPLAINED_VAE, inference='per_latent')),
    'differnet': Case(
        DIFFERNET, NETWORK, (dataclasses.replace(DIFFERNET, turns=3), 'settings.turns'),
        dataclasses.replace(DIFFERNET, test_turns=3), maps=False),
    'patch_svdd': Case(
        PATCH_SVDD, (), (dataclasses.replace(PATCH_SVDD, bank_ratio=0.4), 'settings.bank_ratio'), None),
    'student': Case(
        STUDENT, NETWORK, (dataclasses.replace(STUDENT, students=3), 'settings.students'), None),
    'geotrans': Case(
        GEOTRANS, (), (dataclasses.replace(GEOTRANS, depth=16), 'settings.depth'),
        dataclasses.replace(GEOTRANS, score='simple'), maps=False),
    'itae': Case(
        OF_ATTRIBUTES, (), (dataclasses.replace(OF_ATTRIBUTES, flip='none'), 'settings.flip'), None),
    'toy': Case(Toy(), (), (Toy(range=2.0), 'settings.range'), Toy(weight=2.0)),
}

# Their networks take long to compile, and are scored and exported by the same code as AE-SSIM's.
slow_for_others = pytest.mark.slow_for(
    'ganomaly', 'dsebm', 'cavga', 'gamma_vae', 'explained_vae', 'patch_svdd', 'student', 'geotrans', 'itae')


class Fitted(NamedTuple):
  """A case with its model and what that says of `NEW`, made once."""

  case: Case
  model: Model
  scores: Any

  @property
  def detector(self):
    return self.case.detector

  def fit(self, good=GOOD, batch_size=8, **run):
    return fit(self.case, good, batch_size, **run)

  def predict(self, model=None, images=NEW, batch_size=8):
    return predict(self.case, model or self.model, images, batch_size)


@pytest.fixture(scope='module', autouse=True)
def toy_in_the_table():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(DETECTORS, 'toy', 'tests.toy:Toy')
    yield


@pytest.fixture(scope='module', params=CASES)
def fitted(request):
  case = CASES[request.param]
  model = fit(case)
  return Fitted(case, model, predict(case, model))


@pytest.fixture(scope='module')
def crossed(fitted):
  """The model of a fit with cross scores, and these."""
  return fitted.detector.fit_and_cross_score(small.data(GOOD), fitted.case.networks, folds=FOLDS)


@pytest.fixture(scope='module')
def inspector(fitted, crossed):
  """An inspector with thresholds, of each detector."""
  _, scores = crossed
  found = calibration.calibrate(scores.image, scores.map_maxima, false_alarm_rate=0.2, method='cross')
  model = fitted.model.with_description(calibration=found)
  return Inspector(fitted.detector, model, fitted.case.networks)


def fit(case, good=GOOD, batch_size=8, **run):
  return case.detector.fit(small.data(good, batch_size), case.networks, Run(**run))


def predict(case, model, images=NEW, batch_size=8, **search):
  score_fn = case.detector.score_fn(model, case.networks, search=SearchSpec(**search))
  return small.joined(streaming.predict(
      score_fn, small.data(images, batch_size).batches(), image_size=model.description.image_size))


def assert_same_model(model, expected):
  """Bit for bit, and told in the same words."""
  assert model.description == expected.description
  assert model.arrays.keys() == expected.arrays.keys()
  for name, array in expected.arrays.items():
    assert model.arrays[name].dtype == array.dtype, name
    np.testing.assert_array_equal(model.arrays[name], array, err_msg=name)


def assert_same_scores(scores, expected):
  """Bit for bit."""
  assert (scores.map is None) == (expected.map is None)
  np.testing.assert_array_equal(scores.image, expected.image)
  np.testing.assert_array_equal(scores.map, expected.map)
  for name, values in expected.evidence.items():
    np.testing.assert_array_equal(scores.evidence[name], values)


def assert_close(value, expected):
  """Within a hundred-thousandth of the largest.

  What is promised is the same computation, not the same order of sums: a product of a batch of another size
  may be blocked in another way, on some processors, so that features differ by 1e-7. Distances that are
  weighed by the inverse of a small variance (PaDiM's is 0.01 in places) make up to 1e-6 of it.
  """
  np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def assert_close_scores(scores, expected):
  assert_close(scores.image, expected.image)
  assert (scores.map is None) == (expected.map is None)
  if scores.map is not None:
    assert_close(scores.map, expected.map)


class TestSettings:

  def test_survive_json(self, fitted):
    detector = fitted.detector
    for each in (detector, type(detector)()):
      assert of_settings(each.name, json.loads(json.dumps(each.settings()))) == each

  def test_are_found_by_name(self, fitted):
    assert find(fitted.detector.name) is type(fitted.detector) and fitted.detector.title

  def test_those_of_the_fit_are_the_rest(self, fitted):
    settings, of_fit = fitted.detector.settings(), fitted.detector.fit_settings()
    assert settings.keys() - of_fit.keys() == set(fitted.detector.only_scoring)

  def test_none_hides_what_the_contract_has(self, fitted):
    assert not {field.name for field in dataclasses.fields(fitted.detector)} & set(dir(Detector))

  def test_every_detector_is_here(self):
    scored_alone = {name for name in DETECTORS if not find(name).of_a_set}  # `musc_test` has the other
    assert {case.detector.name for case in CASES.values()} == scored_alone


class TestFit:

  def test_description(self, fitted):
    found = fitted.model.description
    assert (found.detector, found.settings) == (fitted.detector.name, fitted.detector.settings())
    assert [network.name for network in found.backbones] == ['small'] * len(fitted.case.networks)
    assert (found.image_size, found.num_images, found.num_skipped, found.seed) == ((32, 24), 12, 0, 0)
    assert found.images == tuple(f'/line/good/{i}.png' for i in range(12))
    assert found.device and found.versions.keys() == {'patchcore_jax', 'jax'}
    assert of_model(fitted.model) == fitted.detector

  def test_arrays_are_of_numpy_and_not_of_one_batch(self, fitted):
    assert fitted.model.arrays
    assert all(isinstance(array, np.ndarray) for array in fitted.model.arrays.values())

  def test_same_seed_same_model_whatever_it_may_use(self, fitted, tmp_path):
    calls, lines = [], []
    model = fitted.fit(
        memory_gb=100, scratch=tmp_path, progress=lambda *call: calls.append(call), notify=lines.append)
    assert_same_model(model, fitted.model)
    assert not list(tmp_path.iterdir())
    assert {('embed', 12, 12), ('read', 12, 12)} & set(calls)
    assert all(0 <= done <= total for _, done, total in calls)
    assert all(isinstance(line, str) and '\n' not in line for line in lines)

  def test_batch_size_has_no_influence(self, fitted):
    model = fitted.fit(batch_size=4)
    assert model.description == fitted.model.description
    assert_close_scores(fitted.predict(model), fitted.scores)

  @slow_for_others
  def test_an_unreadable_file_is_left_out_and_counted(self, fitted, crossed, tmp_path):
    examples = []
    for i, image in enumerate(GOOD):
      Image.fromarray(image).save(tmp_path / f'{i}.png')
      examples.append(Example(str(tmp_path / f'{i}.png'), (), 0, 'line', 'good'))
    (tmp_path / 'damaged.png').write_bytes(b'none')
    examples.insert(3, Example(str(tmp_path / 'damaged.png'), (), 0, 'line', 'good'))
    skipped, as_they_are = [], Preprocessing(resize=(), crop=())
    data = FileData(examples, as_they_are, 8, on_error=skipped.append)
    model, scores = fitted.detector.fit_and_cross_score(
        data, fitted.case.networks, Run(keep_images=True), folds=FOLDS)
    assert 'damaged.png' in str(skipped[0])
    found = model.description
    assert (found.num_images, found.num_skipped, found.category) == (12, 1, 'line')
    assert found.images == tuple(str(tmp_path / f'{i}.png') for i in range(12))
    assert found.preprocessing == as_they_are
    kept = 0 if isinstance(fitted.detector, Ensemble) else 12
    assert len(provenance.thumbnails(model)) == kept
    # The same images in other batches.
    assert_close_scores(fitted.predict(model), fitted.scores)
    assert_close(scores.image, crossed[1].image)
    none = data.part([3])
    with pytest.raises(ValueError, match='images'):
      fitted.detector.fit(none, fitted.case.networks)

  def test_no_images(self, fitted):
    with pytest.raises(ValueError, match='images'):
      fitted.fit(GOOD[:0])


class TestScores:

  def test_a_score_for_each_image(self, fitted):
    scores = fitted.scores
    assert scores.image.shape == (7,) and scores.image.dtype == np.float32
    assert np.isfinite(scores.image).all() and len(set(scores.image.tolist())) == 7
    assert (scores.map is not None) == fitted.case.maps
    if fitted.case.maps:
      assert scores.map.shape == (7, 32, 24) and scores.map.dtype == np.float32
      assert np.isfinite(scores.map).all()
    assert scores.evidence.keys() == set(fitted.case.evidence)
    assert all(
        v.shape == (7,) and v.dtype == (np.float32 if name == 'background_share' else np.int32)
        for name, v in scores.evidence.items())

  @slow_for_others
  def test_batch_size_and_padding_have_no_influence(self, fitted):
    assert_close_scores(fitted.predict(batch_size=4), fitted.scores)
    score_fn = fitted.detector.score_fn(fitted.model, fitted.case.networks)
    batches = small.data(NEW, 4).batches()
    index = [index.tolist() for index, _ in streaming.predict(score_fn, batches)]
    assert index == [[0, 1, 2, 3], [4, 5, 6]]

  def test_what_else_is_scored_has_no_influence(self, fitted):
    scores = fitted.predict(images=NEW[::-1])
    expected = jax.tree.map(lambda x: x[::-1], fitted.scores)
    if fitted.detector.needs_network and not fitted.detector.trains:
      assert_same_scores(scores, expected)
    else:  # a dense layer's sums are taken in an order that depends on the place in the batch
      assert_close_scores(scores, expected)

  def test_compiled_once(self, fitted):
    one, other = (fitted.detector.score_fn(fitted.model, fitted.case.networks) for _ in range(2))
    assert one.fn is other.fn

  @pytest.mark.parametrize('program', [LIVE, PORTABLE, LOOP_FREE])
  def test_products_ask_for_the_highest_precision(self, fitted, program):
    if fitted.detector.name != 'toy':  # it has no product
      score_fn = fitted.detector.score_fn(fitted.model, fitted.case.networks, program=program)
      precision.assert_highest(score_fn.fn, score_fn.parameters, NEW)

  def test_search_has_no_influence(self, fitted):
    scores = predict(fitted.case, fitted.model, shortlist='float32')
    assert_same_scores(scores, fitted.scores)

  def test_survive_disk(self, fitted, tmp_path):
    store.save(tmp_path / 'model', fitted.model)
    model = store.restore(tmp_path / 'model')
    assert_same_model(model, fitted.model)
    assert of_model(model) == fitted.detector
    assert_same_scores(fitted.predict(model), fitted.scores)

  def test_other_networks_are_named(self, fitted):
    *others, last = fitted.case.networks or [None]
    if last:
      double = {k: 2 * v for k, v in last.variables.items()}
      other = dataclasses.replace(last, variables=double, name='other')
      with pytest.raises(BankError, match=r"name: the model has 'small', .*'other'; .*weights: the model"):
        fitted.detector.score_fn(fitted.model, (*others, other))
      with pytest.raises(BankError, match=r'networks: the model has \d, given are \d'):
        fitted.detector.score_fn(fitted.model, others)
    with pytest.raises(BankError, match=r'networks: the model has \d, given are \d'):
      fitted.detector.score_fn(fitted.model, (*fitted.case.networks, *NETWORK))

  def test_other_settings_of_the_fit_are_named(self, fitted):
    if fitted.case.another_fit is None:
      assert not fitted.detector.fit_settings()
    else:
      other, field = fitted.case.another_fit
      with pytest.raises(BankError, match=f'{field}: the model has .*, asked for is'):
        other.score_fn(fitted.model, fitted.case.networks)

  def test_other_settings_of_scoring_are_used(self, fitted):
    if fitted.case.another_scoring is None:
      assert not fitted.detector.only_scoring
    else:
      fitted.case.another_scoring.score_fn(fitted.model, fitted.case.networks)

  def test_another_method_is_named(self, fitted):
    other = SPADE(num_images=3) if fitted.detector.name != 'spade' else OCSVM()
    with pytest.raises(BankError, match=f"detector: the model has '{fitted.detector.name}'"):
      other.score_fn(fitted.model, fitted.case.networks)

  def test_another_image_size_is_named(self, fitted):
    wide = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(BankError, match=r'image_size: the model has \[32, 24\], these images \[32, 32\]'):
      fitted.predict(images=wide)


class TestCrossScores:

  @slow_for_others
  def test_come_with_the_model_of_a_plain_fit(self, fitted, crossed):
    assert_same_model(crossed[0], fitted.model)

  @slow_for_others
  def test_are_those_of_models_of_the_other_images(self, fitted, crossed):
    _, scores = crossed
    assert scores.image.shape == (12,) and scores.image.dtype == np.float32
    assert (scores.map_maxima is not None) == fitted.case.maps
    fold_of = np.random.default_rng(0).permutation(np.arange(12) % FOLDS)
    for fold in range(FOLDS):
      found = fitted.predict(fitted.fit(GOOD[fold_of != fold]), GOOD[fold_of == fold])
      assert_close(scores.image[fold_of == fold], found.image)
      if fitted.case.maps:
        assert_close(scores.map_maxima[fold_of == fold], found.map.max(axis=(1, 2)))

  def test_errors(self, fitted):
    data = small.data(GOOD[:1])
    with pytest.raises(ValueError, match='folds=1: expected at least 2'):
      fitted.detector.fit_and_cross_score(data, fitted.case.networks, folds=1)
    with pytest.raises(ValueError):  # one image; some methods have more to say of it
      fitted.detector.fit_and_cross_score(data, fitted.case.networks, folds=2)


  def test_folds_that_leave_too_few_are_seen_before_the_fit(self, fitted):
    fewest = fitted.detector.fewest_images()
    # They cannot be read.
    data = types.SimpleNamespace(examples=small.data(np.resize(GOOD, (fewest, *GOOD.shape[1:]))).examples)
    if fewest > 1:
      with pytest.raises(ValueError, match=f'^{fewest} good images in 2 folds leave .* at least {fewest}: '):
        fitted.detector.fit_and_cross_score(data, fitted.case.networks, folds=2)


class TestInspector:

  @slow_for_others
  def test_findings(self, fitted, inspector):
    threshold = inspector.calibration.image_threshold
    for i in range(7):
      finding = inspection.find(inspector, fitted.scores, i, (32, 24))
      assert finding.score == fitted.scores.image[i] and finding.threshold == threshold
      assert finding.anomalous == (finding.score >= threshold) == (finding.calibrated_score >= 0.5)
      assert 0 < finding.p_value <= 1
      assert (finding.map is not None) == (finding.box is not None) == (finding.centroid is not None)
      assert (finding.map is not None) == fitted.case.maps
      assert (finding.patch_box is not None) == (finding.patch is not None) == (
          'patch' in fitted.case.evidence)
      assert (finding.nearest is not None) == ('nearest' in fitted.case.evidence)
      text = finding.to_json()
      assert json.loads(json.dumps(text, allow_nan=False)) == text

  @slow_for_others
  def test_scores_images_that_come_one_by_one(self, fitted, inspector):
    score = inspection.scorer(inspector, 8)
    for n in (7, 1):
      scores = score(NEW[:n])
      assert_same_scores(scores, fitted.predict(images=NEW[:n]))

  @slow_for_others
  def test_export(self, fitted, inspector, tmp_path):
    platforms = (export.default_export_platform(),)
    if fitted.detector.host_step:
      with pytest.raises(ValueError, match=f'^{fitted.detector.title} cannot be exported: .*[^\n]$'):
        folder.write(tmp_path / 'exported', inspector, platforms=platforms)
      assert not list(tmp_path.iterdir())
    else:
      # It compares the program with `inspection.predict`, in batches of 1 and 8, before it writes.
      written = folder.write(tmp_path / 'exported', inspector, platforms=platforms, at_once=5)
      assert ('anomaly_map' in written['outputs']) == fitted.case.maps
      assert {'image_score', 'calibrated_score', 'anomalous'} <= written['outputs'].keys()
      assert written['bank']['detector'] == fitted.detector.name


def scores_of_detectors(*names):
  """[cases, 2, 7], of fits and predictions of this process; image scores, and the maxima of maps.

  Networks are not trained here: Adam's first steps are as long for a gradient of rounding as for any other.
  That devices share a training is tested in float64, by `loop_test`. Scoring by such networks is split by the
  same code, so one of them stands for all, which would be minutes of compiling.
  """
  layers._FEWEST_CELLS = 10**9  # as by `small_programs`, which another process knows nothing of
  found = []
  for name in names or CASES:
    case = CASES[name]
    if isinstance(case.detector, Trained):
      if name != 'ae_ssim':
        continue
      case = case._replace(detector=dataclasses.replace(case.detector, steps=0))
    model = fit(case)
    for bank in ('replicated', 'sharded') if case.bank else ('replicated',):
      scores = predict(case, model, bank=bank)
      found.append((scores.image, scores.image if scores.map is None else scores.map.max(axis=(1, 2))))
  of_a_set = Case(MuSc(degrees=(1,)), (small.with_token(),), None, None)
  scores = predict(of_a_set, fit(of_a_set, NEW))
  found.append((scores.image, scores.map.max(axis=(1, 2))))
  return np.array(found)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='Only of a CPU can there be several for a test.')
@pytest.mark.parametrize('names', [
    ('patchcore', 'padim', 'anomaly_dino', 'rad'), pytest.param((), marks=pytest.mark.slow)])  # () for all
def test_number_of_devices_has_no_influence(names):
  value = np.array(small.on_devices(2, 'detectors_contract_test', f'scores_of_detectors(*{names})'))
  expected = scores_of_detectors(*names)
  for one, want in zip(value, expected, strict=True):
    assert_close(one, want)
