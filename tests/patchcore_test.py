"""PatchCore against NumPy in float64. What holds for every detector is in `detectors_contract_test`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patchcore_jax import foreground, scoring
from patchcore_jax.banks import editing
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import PatchCore, Run, patchcore, streaming
from patchcore_jax.detectors.patchcore import fit_plan
from patchcore_jax.detectors.patchcore.fit_plan import FitPlan
from patchcore_jax.embedding import patch_embeddings
from patchcore_jax.search import coreset, thinning
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing, ScoringSpec
from tests import precision, small

pytestmark = pytest.mark.accelerator

LAYERS = ('a', 'b')  # 8 x 6 patches of 7 + 6 channels
NETWORK = small.backbone(LAYERS)
GOOD, NEW = small.images(10), small.images(6, 7)
DETECTOR = PatchCore(0.2, EmbeddingSpec('mean', 3), CoresetSpec(projection_dim=8, num_start_points=3))


def at_ratio(model, ratio):
  """The bank of a smaller ratio: the first rows of a greedy selection."""
  size = patchcore.bank_size(model, ratio)
  arrays = {k: model.arrays[k][:size] for k in ('embeddings', 'indices')}
  return model._replace(arrays=model.arrays | arrays).with_description(
      settings=model.description.settings | {'ratio': ratio})


def fit(detector=DETECTOR, good=GOOD, batch_size=8, **run):
  return small.fit(detector, good, network=NETWORK, batch_size=batch_size, **run)


def predict_at(model, ratios, detector=DETECTOR, batch_size=8, **arguments):
  """`NEW` at several ratios: a list of `Scores`."""
  score_fn = patchcore.score_fn_at(detector, model, (NETWORK,), ratios, **arguments)
  return small.joined(streaming.predict(score_fn, small.data(NEW, batch_size).batches()))


def points_of(images):
  """[n, 48, 13] embeddings in float64."""
  with jax.enable_x64(True):
    maps = [jnp.asarray(m, jnp.float64) for m in small.maps(images, LAYERS)]
    return np.asarray(patch_embeddings(maps, DETECTOR.embedding)).reshape(len(images), 48, 13)


def plan(embeddings_on_disk, points_on_disk, stream, embeddings_on_device=False):
  return FitPlan(480, 96, embeddings_on_disk, points_on_disk, stream, 0, 0, embeddings_on_device)


ON_DEVICE = plan(False, False, False, True)
PLANS = {
    'stream': plan(False, False, True), 'disk': plan(True, False, False),
    'disk, stream': plan(True, False, True), 'disk, stream from disk': plan(True, True, True),
    'device': ON_DEVICE}


@dataclasses.dataclass(frozen=True)
class _SomeUnreadable(ArrayData):
  """Twice as many examples as there are images."""

  @property
  def examples(self):
    return super().examples * 2


@pytest.fixture(scope='module')
def model():
  return fit()


class TestFit:

  def test_bank_is_the_greedy_selection_of_all_patches(self, model):
    embeddings, indices = model.arrays['embeddings'], model.arrays['indices']
    assert embeddings.shape == (96, 13)  # 20 % of 10 * 8 * 6
    points = points_of(GOOD).reshape(480, 13)
    np.testing.assert_allclose(embeddings, points[indices], atol=1e-6)  # float32
    keys = jax.random.split(jax.random.key(0))
    projected = points @ np.asarray(coreset.projection_matrix(keys[0], 13, 8), np.float64)
    start = jax.random.choice(keys[1], 480, (3,), replace=False)
    assert indices.tolist() == coreset.greedy_k_center(projected, 96, start=start).tolist()

  def test_prefixes_are_banks_of_smaller_ratios(self, model):
    smaller, expected = fit(dataclasses.replace(DETECTOR, ratio=0.1)), at_ratio(model, 0.1)
    assert smaller.description == expected.description
    for name in ('embeddings', 'indices'):
      np.testing.assert_array_equal(smaller.arrays[name], expected.arrays[name])

  @pytest.mark.parametrize('where', PLANS)
  def test_where_the_arrays_lie_has_no_influence(self, model, monkeypatch, tmp_path, where):
    lines = []
    monkeypatch.setattr(fit_plan, 'plan', lambda *args, **kwargs: PLANS[where])
    found = fit(scratch=tmp_path, notify=lines.append)
    assert lines == [str(PLANS[where])] and not list(tmp_path.iterdir())
    assert found.description == model.description
    for name, array in model.arrays.items():
      np.testing.assert_array_equal(found.arrays[name], array)

  @pytest.mark.parametrize('where', ['disk, stream from disk', 'device'])
  def test_room_for_images_that_cannot_be_read_is_given_back(self, model, monkeypatch, tmp_path, where):
    monkeypatch.setattr(fit_plan, 'plan', lambda *args, **kwargs: PLANS[where])
    found = DETECTOR.fit(_SomeUnreadable(GOOD, 8), (NETWORK,), Run(scratch=tmp_path))
    np.testing.assert_array_equal(found.arrays['embeddings'], model.arrays['embeddings'])
    assert found.description.num_patches == 480 and found.description.num_skipped == 10

  def test_other_subsets(self):
    everything, read = patchcore.embed(NETWORK, small.data(GOOD), embedding=DETECTOR.embedding)
    everything = everything.reshape(480, 13)
    assert read.index == list(range(10))

    def subset(method, ratio, **run):
      model = fit(dataclasses.replace(DETECTOR, ratio=ratio, coreset=CoresetSpec(method)), **run)
      return model.arrays['embeddings'], model.arrays['indices']

    whole, indices = subset('identity', 1.0)
    np.testing.assert_array_equal(indices, np.arange(480))
    np.testing.assert_array_equal(whole, everything)
    (_, few), (bank, more) = (subset('random', ratio) for ratio in (0.1, 0.2))
    assert len(set(more)) == 96
    np.testing.assert_array_equal(few, more[:48])  # one fit serves every ratio
    np.testing.assert_array_equal(bank, everything[more])
    assert (more != subset('random', 0.2, seed=1)[1]).any()
    # Centres of clusters lie nearer to all patches than as many patches at random.
    centers, nearest = subset('kmeans', 0.05)
    assert centers.shape == (24, 13) and nearest.max() < 480
    spread = [np.square(everything[:, None] - rows).sum(-1).min(1).mean()
              for rows in (centers, subset('random', 0.05)[0])]
    assert spread[0] < 0.9 * spread[1]

  def test_a_thinned_bank(self, tmp_path):
    spec = CoresetSpec('thinning', rounds=6)
    thin = functools.partial(fit, dataclasses.replace(DETECTOR, coreset=spec))
    found, calls = thin(), []
    everything, _ = patchcore.embed(NETWORK, small.data(GOOD), embedding=DETECTOR.embedding)
    everything, indices = everything.reshape(480, 13), found.arrays['indices']
    assert len(indices) == 96 and (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(found.arrays['embeddings'], everything[indices])
    expected = thinning.thinned(everything, 96, rounds=6, num_neighbors=100, rng=np.random.RandomState(0))
    np.testing.assert_array_equal(indices, expected)
    elsewhere = thin(scratch=tmp_path, progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(elsewhere.arrays['indices'], indices)
    assert ('coreset', 6, 6) in calls
    assert (thin(seed=1).arrays['indices'] != indices).any()
    detector = dataclasses.replace(DETECTOR, coreset=spec)
    assert detector.bank_size(found, 0.2) == 96
    with pytest.raises(ValueError, match="'thinning' makes another bank for every ratio. Fit one, or shrink"):
      detector.score_fn_at(found, (NETWORK,), (0.2, 0.1))
    assert len(editing.shrink(found, 0.1).arrays['indices']) == 48
    _, scores = dataclasses.replace(DETECTOR, coreset=spec).fit_and_cross_score(
        small.data(GOOD), (NETWORK,), folds=2)
    assert (scores.image > 0).all()

  def test_progress(self):
    calls = []
    fit(progress=lambda *call: calls.append(call))
    assert calls[-1] == ('coreset', 96, 96) and {'embed', 'project', 'coreset'} == {c[0] for c in calls}

  @pytest.mark.parametrize('enough, rows', [(60, 60), (10_000, 120)])
  def test_a_bank_as_large_as_is_enough(self, enough, rows, monkeypatch):
    monkeypatch.setattr('patchcore_jax.detectors.settings._ENOUGH', enough)
    model = fit(dataclasses.replace(DETECTOR, ratio=0))
    assert len(model.arrays['embeddings']) == rows  # a quarter of 480 at the most
    settled = dataclasses.replace(DETECTOR, ratio=rows / 480)
    assert model.description.settings['ratio'] == settled.ratio
    np.testing.assert_array_equal(model.arrays['indices'], fit(settled).arrays['indices'])

  def test_errors(self):
    with pytest.raises(ValueError, match='keeps none of 480 patches'):
      fit(dataclasses.replace(DETECTOR, ratio=0.001))
    with pytest.raises(ValueError, match=r'fit.memory_gb=0.01: the fit takes at least \d.\d GB'):
      fit(memory_gb=0.01)
    with pytest.raises(ValueError, match='expected 0 < ratio <= 1'):
      PatchCore(-0.1)
    with pytest.raises(ValueError, match="coreset.method='best': expected 'greedy', 'random'"):
      CoresetSpec('best')
    with pytest.raises(ValueError, match='keeps all patches: expected ratio 1, got 0.1'):
      PatchCore(coreset=CoresetSpec('identity'))


class TestTurnedImages:
  DETECTOR = dataclasses.replace(
      DETECTOR, ratio=1.0, embedding=EmbeddingSpec('mean', 1, rotations=2, unit_length=True),
      coreset=CoresetSpec('identity'))

  def both(self, images):
    """Returns unit embeddings [n, 2, patches, d] of images as they are, and by half a turn, in float64."""
    # About the corner of four pixels: pixel i is pixel n - i, and 0 is n, mirrored: n - 2.
    rows, columns = (np.r_[n - 2, np.arange(n - 1, 0, -1)] for n in images.shape[1:3])
    found = [small.maps(x, ('a',))[0].reshape(len(images), 48, 7)
             for x in (images, images[:, rows][:, :, columns])]
    return np.stack([x / np.linalg.norm(x, axis=-1, keepdims=True) for x in found], 1)

  def test_a_bank_has_patches_of_all_angles(self):
    network = small.backbone(('a',))
    model = small.fit(self.DETECTOR, GOOD, network=network)
    np.testing.assert_allclose(model.arrays['embeddings'], self.both(GOOD).reshape(-1, 7), atol=1e-5)
    assert (model.description.num_patches, model.description.num_candidates) == (480, 960)
    image, patch = np.divmod(model.arrays['indices'].reshape(10, 2, 48), 48)
    assert (image == np.arange(10)[:, None, None]).all() and (patch[:, 0] == np.arange(48)).all()
    # Half a turn: at most one cell beside the opposite one.
    beside = np.stack(np.divmod(patch[0, 1], 6)) - np.stack(np.divmod(np.arange(48)[::-1], 6))
    assert np.abs(beside).max() <= 1
    greedy = dataclasses.replace(self.DETECTOR, ratio=0.1, coreset=CoresetSpec(projection_dim=4))
    bank = small.fit(greedy, GOOD, network=network)
    assert len(bank.arrays['indices']) == 96 == greedy.bank_size(bank, 0.1)
    assert len(editing.shrink(bank, 0.05).arrays['indices']) == 48

  def test_images_are_scored_upright(self):
    network = small.backbone(('a',))
    model, cross = self.DETECTOR.fit_and_cross_score(small.data(GOOD), (network,), folds=10)
    found = small.predict(self.DETECTOR, model, NEW, network=network)
    bank = self.both(GOOD)
    distances_sq = np.square(self.both(NEW)[:, 0, :, None] - bank.reshape(-1, 7)).sum(-1).min(-1)
    np.testing.assert_allclose(found.image, distances_sq.max(-1), rtol=1e-4)
    for i, score in enumerate(cross.image):
      others = np.delete(bank, i, 0).reshape(-1, 7)
      expected = np.square(bank[i, 0, :, None] - others).sum(-1).min(-1).max()
      np.testing.assert_allclose(score, expected, rtol=1e-4)

  def test_appended_images_are_turned_too(self):
    detector = dataclasses.replace(self.DETECTOR, coreset=CoresetSpec(projection_dim=4))
    inspector = small.inspector(
        detector, layers=('a',), preprocessing=Preprocessing(resize=(), crop=()))
    extended = inspector.append(NEW[:2], accept='all').model
    added = extended.arrays['embeddings'][len(inspector.model.arrays['embeddings']):]
    position = extended.arrays['indices'][-len(added):] - inspector.model.description.num_patches
    image, patch = np.divmod(position, 48)
    candidates = self.both(NEW[:2])
    turned = 0
    for row, i, p in zip(added, image, patch, strict=True):
      k = int(np.abs(candidates[i].reshape(-1, 7) - row).max(-1).argmin())
      np.testing.assert_allclose(candidates[i].reshape(-1, 7)[k], row, atol=1e-5)
      assert k == p or k >= 48
      turned += k >= 48
    assert 0 < turned < len(added)

  def test_refused_where_images_are_many(self):
    with pytest.raises(ValueError, match="'merge_reduce' is for many images, and embedding.rotations=2"):
      dataclasses.replace(self.DETECTOR, coreset=CoresetSpec('merge_reduce'))


class TestCrossScores:

  def test_where_the_arrays_lie_has_no_influence(self, tmp_path, monkeypatch):
    def run(**arguments):
      return DETECTOR.fit_and_cross_score(small.data(GOOD), (NETWORK,), Run(**arguments), folds=2)[1]

    expected = run()
    for where in ('stream', 'disk, stream', 'disk, stream from disk', 'device'):
      monkeypatch.setattr(fit_plan, 'plan', lambda *args, where=where, **kwargs: PLANS[where])
      found = run(scratch=tmp_path)
      np.testing.assert_allclose(found.image, expected.image, rtol=1e-6, err_msg=where)
      np.testing.assert_allclose(found.map_maxima, expected.map_maxima, rtol=1e-6, err_msg=where)
      assert not list(tmp_path.iterdir())

  def test_errors(self):
    centers = dataclasses.replace(DETECTOR, coreset=CoresetSpec('kmeans'))
    with pytest.raises(ValueError, match='thresholds need a method that selects patches'):
      centers.fit_and_cross_score(small.data(GOOD), (NETWORK,), folds=3)
    with pytest.raises(ValueError, match='One image: thresholds take at least 2'):
      DETECTOR.fit_and_cross_score(small.data(GOOD[:1]), (NETWORK,), folds=2)


class TestScores:

  @pytest.mark.parametrize('spec', [
      ScoringSpec(), ScoringSpec(num_neighbors=3, distance='root'),
      ScoringSpec(distance='root', image_score='reweighted', support_neighbors=4),
      ScoringSpec(image_score='top_share', top_share=0.1)])
  def test_equals_float64(self, model, spec):
    found = predict_at(model, (0.2, 10 / 480), dataclasses.replace(DETECTOR, scoring=spec))
    queries = points_of(NEW)
    for value, size in zip(found, (96, 10), strict=True):
      rows = model.arrays['embeddings'][:size].astype(np.float64)
      distances = np.linalg.norm(queries[:, :, None] - rows, axis=-1)
      nearest = np.sort(distances, axis=-1)[..., :spec.num_neighbors]
      patches = (nearest if spec.distance == 'root' else nearest**2).mean(-1)
      worst, image = patches.argmax(-1), patches.max(-1)
      if spec.image_score == 'reweighted':
        for j, patch in enumerate(worst):
          m = distances[j, patch].argmin()
          support = np.linalg.norm(rows - rows[m], axis=-1).argsort()[:4]
          e = np.exp(distances[j, patch])
          image[j] *= 1 - e[m] / e[support].sum()
      if spec.image_score == 'top_share':  # 4 of 48 patches
        image = np.sort(patches, -1)[:, -4:].mean(-1)
      # Embeddings are right to 1e-7 of their length, which weighs up to 1e-5 in a small distance.
      np.testing.assert_allclose(value.image, image, rtol=1e-5)
      maps = scoring.anomaly_maps(jnp.asarray(patches.reshape(6, 8, 6)), (32, 24), spec)
      np.testing.assert_allclose(value.map, maps, rtol=1e-5)
      assert value.evidence['patch'].tolist() == worst.tolist()
      assert value.evidence['nearest'].tolist() == distances[np.arange(6), worst].argmin(-1).tolist()

  @pytest.mark.parametrize('spec', [
      ScoringSpec(foreground='pca'), ScoringSpec(num_neighbors=2, distance='root', foreground='pca'),
      ScoringSpec(distance='root', image_score='reweighted', support_neighbors=4, foreground='pca')])
  def test_background_scores_nothing(self, model, spec):
    (found,) = predict_at(model, (0.2,), dataclasses.replace(DETECTOR, scoring=spec))
    seen = np.asarray(foreground.objects(jnp.asarray(points_of(NEW).reshape(6, 8, 6, -1), jnp.float32)))
    assert 0 < seen.mean() < 1
    np.testing.assert_allclose(found.evidence['background_share'], 1 - seen.mean((1, 2)), rtol=1e-6)
    (everywhere,) = predict_at(
        model, (0.2,), dataclasses.replace(DETECTOR, scoring=dataclasses.replace(spec, foreground='none')))
    rows = model.arrays['embeddings'].astype(np.float64)
    distances = np.sort(np.linalg.norm(points_of(NEW)[:, :, None] - rows, axis=-1))[..., :spec.num_neighbors]
    patches = (distances if spec.distance == 'root' else distances**2).mean(-1).reshape(6, 8, 6) * seen
    np.testing.assert_allclose(
        found.map, scoring.anomaly_maps(jnp.asarray(patches), (32, 24), spec), rtol=1e-5, atol=1e-7)
    assert found.evidence['patch'].tolist() == patches.reshape(6, -1).argmax(-1).tolist()
    if spec.image_score == 'max':
      np.testing.assert_allclose(found.image, patches.max((1, 2)), rtol=1e-5)
    else:  # of the worst patch that is seen, where that is the worst of all
      same = found.evidence['patch'] == everywhere.evidence['patch']
      assert 0 < same.sum() < 6
      np.testing.assert_allclose(found.image[same], everywhere.image[same], rtol=1e-6)
      assert (found.image[~same] < patches.max((1, 2))[~same]).all()

  def test_several_ratios_equal_each_alone(self, model):
    small_ratio = 10 / 480
    _, value = predict_at(model, (0.2, small_ratio))
    detector = dataclasses.replace(DETECTOR, ratio=small_ratio)
    alone = small.predict(detector, at_ratio(model, small_ratio), NEW, network=NETWORK)
    np.testing.assert_allclose(value.image, alone.image, rtol=1e-6)
    np.testing.assert_allclose(value.map, alone.map, rtol=1e-6)
    for name, places in alone.evidence.items():
      np.testing.assert_array_equal(value.evidence[name], places)

  def test_compiles_once_whatever_the_last_batch(self, model):
    traces = []

    def counted(variables, images):
      traces.append(images.shape)
      return small.apply(variables, images)

    network = dataclasses.replace(NETWORK, apply=counted)
    for n in (6, 7, 9):
      small.predict(DETECTOR, model, small.images(n), network=network)
    assert len(traces) == 1

  def test_errors(self, model):
    with pytest.raises(ValueError, match='30 neighbours are asked for'):
      predict_at(model, (10 / 480,), dataclasses.replace(DETECTOR, scoring=ScoringSpec(num_neighbors=30)))
    with pytest.raises(ValueError, match='The bank holds 96 patches, ratio 0.5 needs 240'):
      predict_at(model, (0.2, 0.5))


def test_products_ask_for_the_highest_precision(model):
  # Of the plain score they are looked at with those of all detectors.
  detector = dataclasses.replace(DETECTOR, scoring=ScoringSpec(image_score='reweighted', num_neighbors=2))
  score_fn = detector.score_fn(model, (NETWORK,))
  precision.assert_highest(score_fn.fn, score_fn.parameters, NEW)
