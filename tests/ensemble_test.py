"""Ensembles: statistics against NumPy in float64, and means of members that are computed one by one."""

import dataclasses
import shutil
from importlib import resources

import numpy as np
import pytest

from patchcore_jax import backbones
from patchcore_jax.backbones import checkpoints
from patchcore_jax.banks.model import BankError
from patchcore_jax.detectors import (
    SPADE,
    Ensemble,
    MahalanobisAD,
    PaDiM,
    PatchCore,
    Run,
    ensemble,
    patchcore,
    streaming,
)
from patchcore_jax.detectors.patchcore import cross_scores, scores
from patchcore_jax.evaluation import networks
from patchcore_jax.settings import BackboneSpec, CoresetSpec, EmbeddingSpec, ScoringSpec, SearchSpec
from tests import precision, small

GOOD, NEW = small.images(10), small.images(6, 7)
PATCHCORE = PatchCore(0.3, EmbeddingSpec('mean', 1), CoresetSpec(projection_dim=4, num_start_points=3))
ONE = small.backbone(('a',))
# Of the same shapes, for which little is compiled anew. `detectors_contract_test` has one of other shapes.
OTHER = dataclasses.replace(
    ONE, variables={name: values[:, ::-1] - 0.3 for name, values in ONE.variables.items()}, name='other')


def scores_at(detector, model, ratios):
  """`NEW` at several ratios: a list of `Scores`."""
  score_fn = ensemble.score_fn_at(detector, model, (ONE, OTHER), ratios)
  return small.joined(streaming.predict(score_fn, small.data(NEW).batches()))


def scores_of(detector, model, networks=(ONE, OTHER)):
  score_fn = detector.score_fn(model, networks)
  return small.joined(streaming.predict(score_fn, small.data(NEW).batches()))


class TestStatisticsOfPatchCore:

  def _statistics(self, model, detector=PATCHCORE, ratios=(0.3,), good=GOOD, network=ONE, batch_size=8):
    calls = []
    found = patchcore.statistics_at(
        detector, model, small.data(good, batch_size), (network,),
        Run(progress=lambda *call: calls.append(call)), ratios, search=SearchSpec())
    assert calls[-1] == ('statistics', len(good), len(good))
    return found

  @pytest.mark.parametrize('spec', [ScoringSpec(), ScoringSpec(2, 'root')])
  def test_equals_float64(self, spec):
    detector = dataclasses.replace(PATCHCORE, scoring=spec)
    model = small.fit(detector, GOOD, network=ONE)
    found = self._statistics(model, detector, (0.3, 0.1))
    patches = small.maps(GOOD, ('a',))[0].reshape(10, 48, 7)
    for value, size in zip(found, (144, 48), strict=True):
      indices = model.arrays['indices'][:size]
      rows, image = patches.reshape(-1, 7)[indices], indices // 48
      expected = []
      for number, queries in enumerate(patches):
        others = rows[image % 2 != number % 2]
        nearest = np.sort(np.linalg.norm(queries[:, None] - others, axis=-1))[:, :spec.num_neighbors]
        expected.append((nearest if spec.distance == 'root' else nearest**2).mean(-1))
      np.testing.assert_allclose(value, (np.mean(expected), np.std(expected)), rtol=1e-5)

  def test_errors(self):
    model = small.fit(PATCHCORE, GOOD, network=ONE)
    with pytest.raises(ValueError, match='8 images were given, the bank was fitted on 10'):
      patchcore.statistics(
          PATCHCORE, model, small.data(GOOD[:8]), (ONE,), Run(), search=SearchSpec())
    alone = small.fit(PATCHCORE, GOOD[:1], network=ONE)
    with pytest.raises(ValueError, match='has 0 patches of every other of the 1 training images'):
      self._statistics(alone, good=GOOD[:1])


class TestStatisticsOfOthers:

  @pytest.mark.parametrize('detector', [PaDiM(num_dims=5), MahalanobisAD()])
  def test_two_halves_each_by_a_model_of_the_other(self, detector):
    model = small.fit(detector, GOOD, network=ONE)
    found = detector.statistics(model, small.data(GOOD), (ONE,))
    expected = []
    for part, others in ((GOOD[::2], GOOD[1::2]), (GOOD[1::2], GOOD[::2])):
      value = small.predict(detector, small.fit(detector, others, network=ONE), part, network=ONE)
      expected.append(np.ravel(value.image if value.map is None else value.map))
    expected = np.concatenate(expected).astype(np.float64)
    np.testing.assert_allclose(found, (expected.mean(), expected.std()), rtol=1e-6)


class TestEnsemble:

  def test_mean_of_members_in_units_of_their_spread(self):
    detector = Ensemble(PATCHCORE, ratios=(0.1,))
    model = detector.fit(small.data(GOOD), (ONE, OTHER))
    assert model.arrays['mean'].shape == model.arrays['std'].shape == (2, 2)
    members = []
    for member, network in zip(ensemble.members(model), (ONE, OTHER), strict=True):
      alone = small.fit(PATCHCORE, GOOD, network=network)
      np.testing.assert_array_equal(member.arrays['embeddings'], alone.arrays['embeddings'])
      assert member.description == alone.description
      score_fn = patchcore.score_fn_at(PATCHCORE, member, (network,), (0.3, 0.1))
      found = small.joined(streaming.predict(score_fn, small.data(NEW).batches()))
      statistics = patchcore.statistics_at(
          PATCHCORE, alone, small.data(GOOD), (network,), Run(), (0.3, 0.1), search=SearchSpec())
      members.append(list(zip(found, statistics, strict=True)))
    at = scores_at(detector, model, (0.3, 0.1))
    for value, *found in zip(at, *members, strict=True):
      for name in ('image', 'map'):
        expected = np.mean([
            (getattr(each, name).astype(np.float64) - mean) / std for each, (mean, std) in found], axis=0)
        # Differences from the mean, of which there may be little: a millionth of the spread.
        np.testing.assert_allclose(getattr(value, name), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores_of(detector, model).image, at[0].image)

  def test_the_unit_of_a_member_has_no_influence(self):
    detector = Ensemble(MahalanobisAD())
    model = detector.fit(small.data(GOOD), (ONE, ONE))  # the same network twice
    twice = scores_of(detector, model, (ONE, ONE)).image
    (mean, _), (std, _) = (model.arrays[name][:, 0] for name in ('mean', 'std'))
    alone = small.predict(MahalanobisAD(), ensemble.members(model)[0], NEW, network=ONE).image
    np.testing.assert_allclose(twice, (alone - mean) / std, rtol=1e-5, atol=1e-6)
    changes = {name: model.arrays[name] * [[1], [7]] for name in ('mean', 'std')}
    changes['1.factor_a'] = 7 * model.arrays['1.factor_a']  # distances of the second are seven times as long
    scaled = scores_of(detector, model._replace(arrays=model.arrays | changes), (ONE, ONE)).image
    np.testing.assert_allclose(scaled, twice, rtol=1e-5, atol=1e-6)

  def test_description_has_those_of_the_members(self):
    detector = Ensemble(MahalanobisAD())
    found = detector.fit(small.data(GOOD), (ONE, OTHER)).description
    assert found.backbones == (streaming.identity(ONE), streaming.identity(OTHER))
    assert [member.detector for member in found.members] == ['mahalanobis_ad'] * 2
    assert [member.backbones for member in found.members] == [(b,) for b in found.backbones]

  def test_a_killed_fit_goes_on(self, tmp_path):
    detector = Ensemble(MahalanobisAD())

    def fails(variables, images):
      raise KeyboardInterrupt

    killed = dataclasses.replace(OTHER, apply=fails)
    with pytest.raises(KeyboardInterrupt):
      detector.fit(small.data(GOOD), (ONE, killed), Run(checkpoints=tmp_path))
    stages = []
    model = detector.fit(
        small.data(GOOD), (ONE, OTHER), Run(checkpoints=tmp_path, progress=lambda *c: stages.append(c)))
    assert stages.count(('embed', 10, 10)) == 1  # of the second alone
    whole = detector.fit(small.data(GOOD), (ONE, OTHER))
    assert model.description == whole.description
    for name, array in whole.arrays.items():
      np.testing.assert_array_equal(model.arrays[name], array)
    with pytest.raises(BankError, match='seed: the model has 0, asked for is 1'):
      detector.fit(small.data(GOOD), (ONE, OTHER), Run(checkpoints=tmp_path, seed=1))

  def test_errors(self):
    detector = Ensemble(MahalanobisAD())
    with pytest.raises(ValueError, match='An ensemble of 1 networks: expected two or more'):
      detector.fit(small.data(GOOD), (ONE,))
    with pytest.raises(ValueError, match='SPADE has no ensembles: it gathers'):
      Ensemble(SPADE())
    with pytest.raises(ValueError, match='MahalanobisAD has no coreset'):
      Ensemble(MahalanobisAD(), ratios=(0.1,))
    same = np.repeat(GOOD[:1], 4, axis=0)
    with pytest.raises(ValueError, match='scores have no scale'):
      Ensemble(PaDiM(num_dims=5)).fit(small.data(same), (ONE, OTHER))
    model = detector.fit(small.data(GOOD), (ONE, OTHER))
    with pytest.raises(ValueError, match=r'Ratios \[0.1\]: the statistics of this ensemble are of \[\]'):
      ensemble.score_fn_at(detector, model, (ONE, OTHER), (0.1,))


def test_each_network_can_have_a_file_of_its_own(tmp_path):
  built_in = resources.files(backbones).joinpath(f'weights/{checkpoints.BUILT_IN}.safetensors')
  for name in ('a', 'b'):
    shutil.copy(str(built_in), tmp_path / f'{name}.safetensors')
  files = '+'.join(str(tmp_path / f'{name}.safetensors') for name in ('a', 'b'))
  made = networks.create(BackboneSpec('resnet18_slim+resnet18_slim', files))
  assert [network.source[1] for network in made] == files.split('+')
  with pytest.raises(ValueError, match="3 for 2 networks. Expected a file for each, in their order"):
    networks.create(BackboneSpec('resnet18_slim+resnet18_slim', f'{files}+c'))


def test_products_of_the_statistics_ask_for_the_highest_precision():
  fn = cross_scores._halves_fn(
      scores.embed_fn_of(ONE, PATCHCORE.embedding), ScoringSpec(), ((40, 9), (40, 11)))
  bank = np.zeros((40, 7), np.float32)
  precision.assert_highest(fn, (ONE.variables, (bank, bank)), NEW)
