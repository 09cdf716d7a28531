"""Models: round trip, description, interruption, and banks of versions before."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from patchcore_jax import inspection
from patchcore_jax.banks import editing, model, provenance, store
from patchcore_jax.banks.model import (
    BankError,
    Calibration,
    Description,
    Event,
    Model,
    Network,
    Source,
)
from patchcore_jax.cli import bank
from patchcore_jax.detectors import Ensemble, PaDiM, PatchCore, patchcore
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing, ScoringSpec
from tests import small

_TESTDATA = Path(__file__).parent / 'testdata'
_NETWORK = Network('net', ('a', 'b'), (0.5,) * 3, (0.25,) * 3, 'float32', 'abc')
_SHORT = Description('patchcore', {'ratio': 0.4}, (_NETWORK,), (8, 8), 25, grid=(2, 2))


def _model(m=40, d=8):
  rng = np.random.default_rng(0)
  return Model({
      'embeddings': rng.standard_normal((m, d)).astype(np.float32),
      'indices': rng.permutation(m).astype(np.int32)}, _SHORT)


def _full_description():
  """Makes a description with every field set to something that is not its default."""
  network = dataclasses.replace(_NETWORK, source=Source('net.tag', 'file.safetensors', 3))
  return Description(
      'padim', {'num_dims': 7, 'sigma': 2.5, 'none': None, 'list': [1, 'a'], 'nested': {'b': True}},
      (network, _NETWORK), (32, 24), 12, grid=(8, 6), images=('a.png', 'b.png'), num_skipped=2,
      original_size=(64, 48), outside_range=0.25, num_defects=2, colours='gray',
      category='nut', seed=5, shots=('a.png',),
      preprocessing=Preprocessing(
          resize=(40,), crop=(32, 24), value_range=(-1.5, 20.0), bands=(4, 2, 1), background=(0, 9, 8)),
      calibration=Calibration(0.01, 0.1, (1.0, 2.0), (3.0, 4.0), 2.5, 4.5, 'cross', 0.25, 0.5),
      device='tpu', versions={'jax': '1.2'}, fit_seconds=1.5, history=(Event('now', 'fitted', '3'),),
      covering_radius=0.75, ordered=False, members=(_SHORT, dataclasses.replace(_SHORT, members=(_SHORT,))))


class TestDescription:

  def test_round_trip_through_json_with_every_field_set(self):
    full = _full_description()
    for field in dataclasses.fields(Description):
      if field.default is not dataclasses.MISSING:
        assert getattr(full, field.name) != field.default, field.name
    again = Description.from_json(json.loads(json.dumps(full.to_json())))
    assert again == full
    assert isinstance(again.members[1].members[0], Description)
    assert isinstance(again.backbones[0].source, Source) and again.backbones[1].source is None

  def test_what_an_older_version_lacked_has_its_default(self):
    values = _full_description().to_json()
    lacking = ('members', 'covering_radius', 'device', 'shots')
    for name in lacking:
      del values[name]
    del values['calibration']['image_allowance'], values['backbones'][0]['source']['seed']
    found = Description.from_json(values)
    assert [getattr(found, name) for name in lacking] == [(), None, '', ()]
    assert found.calibration.image_allowance == 0 and found.calibration.pixel_allowance == 0.5
    assert found.backbones[0].source == Source('net.tag', 'file.safetensors')

  def test_models_that_dropped_transparency_go_on_so(self):
    values = _full_description().to_json()
    for one in (values, values['members'][0]):
      one['preprocessing'] = {'resize': [40], 'crop': [32, 24]}
    found = Description.from_json(values)
    assert found.preprocessing.background == found.members[0].preprocessing.background == ()
    assert Preprocessing().background == (255, 255, 255)

  def test_settings_that_came_later_have_their_defaults(self):
    """So a run goes on with its older model, whichever record of the settings grew."""
    values = _full_description().to_json()
    detector = PatchCore()
    values['settings'], values['members'][0]['settings'] = detector.settings(), Ensemble(detector).settings()
    for settings in (values['settings'], values['members'][0]['settings']['member']['settings']):
      del settings['scoring']['top_share'], settings['coreset']['start'], settings['embedding']['patch_size']
    found = Description.from_json(values)
    found.check({'settings': detector.settings()})
    found.members[0].check({'settings': Ensemble(detector).settings()})

  @pytest.mark.parametrize('change', [
      lambda v: v.pop('image_size'), lambda v: v.update(unheard_of=1),
      lambda v: v['preprocessing'].update(resize_side='upper'), lambda v: v.update(backbones=3)])
  def test_what_is_none_is_one_line(self, change):
    values = _full_description().to_json()
    change(values)
    with pytest.raises(BankError, match='description of the model cannot be read') as error:
      Description.from_json(values)
    assert '\n' not in str(error.value)

  def test_of_networks_every_difference_is_named(self):
    other = dataclasses.replace(_NETWORK, name='other', layers=('a', 'c'))
    with pytest.raises(BankError) as error:
      _SHORT.check({'backbones': [vars(other)]}, 'banks/nut')
    assert "banks/nut was made in another way. backbones.0.name: the model has 'net'" in str(error.value)
    assert "backbones.0.layers: the model has ['a', 'b'], asked for is ['a', 'c']" in str(error.value)


class TestSaveAndRestore:

  def test_round_trip(self, tmp_path):
    made = _model()._replace(description=_full_description())
    store.save(tmp_path / 'banks' / 'nut', made)
    again = store.restore(tmp_path / 'banks' / 'nut')
    assert again.description == made.description and again.arrays.keys() == made.arrays.keys()
    for name, array in made.arrays.items():
      np.testing.assert_array_equal(again.arrays[name], array)
      assert again.arrays[name].dtype == array.dtype

  def test_any_arrays(self, tmp_path):
    arrays = {'mean': np.arange(3.0, dtype=np.float32), 'gamma': np.float32(2)}
    store.save(tmp_path / 'm', Model(arrays, _SHORT))
    again = store.restore(tmp_path / 'm', expected={'detector': 'patchcore'}).arrays
    assert again.keys() == arrays.keys()
    assert again['mean'].tolist() == [0, 1, 2] and again['gamma'].shape == () and again['gamma'] == 2

  def test_of_what_is_no_model(self, tmp_path):
    """Such as the state of a training: arrays, and a description of its own."""
    store.save_arrays(tmp_path / 's', {'w': np.arange(3)}, {'rate': 0.5, 'net': {'layers': ('a', 'b')}})
    seen = []
    arrays, values = store.restore_arrays(tmp_path / 's', seen.append)
    assert seen == [values] == [{'rate': 0.5, 'net': {'layers': ['a', 'b']}}]
    np.testing.assert_array_equal(arrays['w'], np.arange(3))
    with pytest.raises(BankError, match='rate: the model has 0.5, asked for is 0.25'):
      store.restore_arrays(tmp_path / 's', lambda values: model.check(values, {'rate': 0.25}))
    with pytest.raises(BankError, match='description of the model cannot be read'):
      store.restore(tmp_path / 's')

  def test_of_another_detector(self, tmp_path):
    store.save(tmp_path / 'm', _model())
    with pytest.raises(BankError, match="detector: the model has 'patchcore', asked for is 'padim'"):
      store.restore(tmp_path / 'm', expected={'detector': 'padim'})
    model = small.fit(PaDiM(num_dims=4))
    with pytest.raises(BankError, match="detector: the model has 'padim', asked for is 'patchcore'"):
      PatchCore().score_fn(model, (small.backbone(),))

  def test_differences_are_all_named(self, tmp_path):
    store.save(tmp_path / 'b', _model())
    store.restore(tmp_path / 'b', expected={'backbones': [{'layers': ('a', 'b')}]})
    with pytest.raises(BankError) as error:
      store.restore(tmp_path / 'b', expected={'backbones': [{'name': 'other'}], 'image_size': (16, 8)})
    assert "backbones.0.name: the model has 'net', asked for is 'other'" in str(error.value)
    assert 'image_size: the model has [8, 8], asked for is [16, 8]' in str(error.value)

  def test_nothing_there(self, tmp_path):
    with pytest.raises(BankError, match='No model at'):
      store.restore(tmp_path / 'none')

  def test_a_bank_is_not_overwritten(self, tmp_path):
    store.save(tmp_path / 'b', _model())
    with pytest.raises(ValueError, match='exists'):
      store.save(tmp_path / 'b', _model())

  @pytest.mark.parametrize('what', ['folder', 'arrays', 'description'])
  def test_damaged_bank_does_not_restore(self, what, tmp_path):
    path = tmp_path / 'b'
    store.save(path, _model())
    for p in [p for p in path.rglob('*') if p.is_file()]:
      if what == 'folder' or f'/{what}/' in str(p):
        p.unlink()
    with pytest.raises(BankError, match='not a complete model'):
      store.restore(path)

  def test_what_damage_does_is_an_error_and_nothing_else(self, tmp_path):
    """Each in turn of many files is cut, changed or removed; no thread of a reader prints a trace."""
    store.save(tmp_path / 'b', _model()._replace(arrays={
        name: np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32) for name in 'abcd'}))
    script = textwrap.dedent(f'''
        import pathlib, shutil, time
        from patchcore_jax.banks import model, store
        whole = pathlib.Path({str(tmp_path / "b")!r})
        refused = 0
        for i, file in enumerate(sorted(p.relative_to(whole) for p in whole.rglob('*') if p.is_file())):
          for kind in ('cut', 'changed', 'gone'):
            copy = whole.with_name(f'{{i}}.{{kind}}')
            shutil.copytree(whole, copy)
            data = (copy / file).read_bytes()
            if kind == 'gone':
              (copy / file).unlink()
            else:
              (copy / file).write_bytes(data[:len(data) // 2] + (b'?' * 99 if kind == 'changed' else b''))
            try:
              store.restore(copy)
            except model.BankError as e:
              refused += 1
              assert str(copy) in str(e) and 'again' in str(e), e
              assert '\\n' not in str(e) and 'tensorstore_spec' not in str(e), e
        time.sleep(0.5)
        assert refused >= 10, refused
    ''')
    result = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=False, cwd=os.getcwd())
    assert (result.returncode, result.stderr) == (0, '')

  def test_a_future_format_is_refused_in_one_line(self, tmp_path):
    store.save(tmp_path / 'b', _model())
    file = next(tmp_path.glob('b/description/metadata'))
    values = json.loads(file.read_text())
    # Whatever its description may look like.
    file.write_text(json.dumps(values | {'format': store.FORMAT + 1, 'description': {'new': 1}}))
    with pytest.raises(BankError, match='made by a newer one. Upgrade') as error:
      store.restore(tmp_path / 'b')
    assert '\n' not in str(error.value)

  def test_killed_while_writing_leaves_nothing_that_restores(self, tmp_path):
    # The process dies at the last moment before Orbax gives the folder its name.
    script = textwrap.dedent(f'''
        import os, signal
        from tests import store_test
        def die(*args, **kwargs):
          os.kill(os.getpid(), signal.SIGKILL)
        import orbax.checkpoint as ocp
        ocp.CompositeCheckpointHandler.finalize = die
        store_test.store.save({str(tmp_path / "b")!r}, store_test._model())
    ''')
    result = subprocess.run([sys.executable, '-c', script], check=False, cwd=os.getcwd())
    assert result.returncode == -signal.SIGKILL
    assert any(tmp_path.iterdir())  # it had begun
    with pytest.raises(BankError):
      store.restore(tmp_path / 'b')
    store.save(tmp_path / 'b', _model())
    assert store.restore(tmp_path / 'b').description.num_patches == 100
    assert [p.name for p in tmp_path.iterdir()] == ['b']


class TestModel:

  def test_arrays_are_a_pytree(self):
    model = _model()
    assert jax.tree.map(lambda x: x[:3], model.arrays)['embeddings'].shape == (3, 8)
    assert jax.jit(lambda arrays: arrays['embeddings'].sum())(model.arrays).shape == ()

  def test_history(self):
    model = _model().recorded('fitted').recorded('shrunk')
    assert [event.what for event in model.description.history] == ['fitted', 'shrunk']
    assert _model().description.history == ()

  def test_bank_size(self):
    model = _model().with_description(settings=PatchCore(0.4).settings())
    assert [patchcore.bank_size(model, ratio) for ratio in (0.4, 0.1, 0.01)] == [40, 10, 1]
    with pytest.raises(ValueError, match='ratio 0.5 needs 50'):
      patchcore.bank_size(model, 0.5)


class TestBankOfFormat2:
  """What the code of before wrote, and what it answered: see testdata/README.md."""

  @pytest.fixture
  def old(self):
    return store.restore(_TESTDATA / 'bank_of_format_2')

  @pytest.fixture
  def expected(self):
    return np.load(_TESTDATA / 'bank_of_format_2.npz')

  def _check(self, inspector, expected):
    scores = inspection.scorer(inspector, 4)(small.images(4, seed=7))
    # Not bit for bit: CPUs with other vector instructions sum in another order.
    _nearly(scores.image, expected['image'])
    _nearly(scores.map, expected['map'])
    for name in ('patch', 'nearest'):
      np.testing.assert_array_equal(scores.evidence[name], expected[name])
    found = [inspection.find(inspector, scores, i, (32, 24)) for i in range(4)]
    _nearly([f.calibrated_score for f in found], expected['calibrated'])
    _nearly([f.p_value for f in found], expected['p_value'])
    np.testing.assert_array_equal([f.box for f in found], expected['box'])
    _nearly([f.centroid for f in found], expected['centroid'])

  def test_it_answers_what_it_answered(self, expected):
    self._check(inspection.load(_TESTDATA / 'bank_of_format_2'), expected)

  def test_its_description_is_typed(self, old):
    images = tuple(f'/tmp/old/good/{i}.png' for i in range(10))
    cross = old.description.calibration
    assert old.description == Description(
        detector='patchcore', settings=PatchCore(
            0.5, EmbeddingSpec('mean'), CoresetSpec(projection_dim=4), ScoringSpec()).settings(),
        backbones=(Network(
            'tests.small:backbone', ('a', 'b', 'c'), (0.5,) * 3, (0.25,) * 3, 'float32', 'd57debe3b7ccc277',
            Source('tests.small:backbone')),),
        image_size=(32, 24), num_images=10, grid=(8, 6), images=images, category='old',
        preprocessing=Preprocessing(resize=(), crop=(), background=()), calibration=cross, device='cpu',
        versions={'patchcore_jax': '0.1.0', 'jax': '0.10.2'}, fit_seconds=3.1508725709999794,
        history=(Event('2026-11-26T09:13:27+00:00', 'fitted on 10 images of /tmp/old/good', '0.1.0'),))
    assert (cross.false_alarm_rate, cross.guaranteed_rate) == pytest.approx((0.01, 1 / 11))
    assert cross.image_threshold == np.nextafter(np.float32(max(cross.image_scores)), np.float32(np.inf))
    assert cross.pixel_threshold == np.nextafter(np.float32(max(cross.map_maxima)), np.float32(np.inf))
    assert (cross.method, cross.image_allowance, cross.pixel_allowance) == ('cross', 0, 0)
    assert len(cross.image_scores) == len(cross.map_maxima) == 10
    assert provenance.thumbnail(old, 9).shape == (32, 24, 3)

  def test_saved_again_it_is_the_same(self, old, expected, tmp_path):
    store.save(tmp_path / 'new', old)
    again = store.restore(tmp_path / 'new')
    values = json.loads((tmp_path / 'new/description/metadata').read_text())
    assert values['format'] == store.FORMAT and values['description'] == old.description.to_json()
    assert again.description == old.description and again.arrays.keys() == old.arrays.keys()
    for name, array in old.arrays.items():
      np.testing.assert_array_equal(again.arrays[name], array)
    self._check(inspection.load(tmp_path / 'new'), expected)

  def test_it_is_edited(self, old):
    less = editing.drop(old, ['3.png'])
    assert less.description.num_images == 9 and len(less.description.calibration.image_scores) == 9
    assert len(provenance.thumbnails(less)) == 9
    small_one = editing.shrink(old, 0.25)
    np.testing.assert_array_equal(small_one.arrays['embeddings'], old.arrays['embeddings'][:120])
    assert small_one.description.settings['ratio'] == 0.25 and small_one.description.calibration is None
    embeddings, _ = patchcore.embed(
        small.backbone(), small.data(small.images(2, seed=9)), embedding=EmbeddingSpec('mean'))
    more = editing.append(
        old, embeddings, ['a', 'b'], files=[b'', b''], image_scores=[0.1, 0.2], map_maxima=[0.1, 0.2])
    assert more.description.images[10:] == ('a', 'b') and len(more.description.calibration.map_maxima) == 12

  def test_it_is_one_of_todays_with_the_same_settings(self, old):
    """So a run that finds it goes on with it, and a fit of today makes it again."""
    detector = PatchCore(0.5, EmbeddingSpec('mean'), CoresetSpec(projection_dim=4))
    model = small.fit(detector, small.images(10), network=inspection.of_model(old).backbones[0])
    (network,) = model.description.backbones
    old.description.check({
        'settings': model.description.settings,
        'backbones': [{k: v for k, v in vars(network).items() if k != 'source'}]})
    np.testing.assert_array_equal(model.arrays['indices'], old.arrays['indices'])
    np.testing.assert_allclose(model.arrays['embeddings'], old.arrays['embeddings'], rtol=1e-5, atol=1e-6)

  def test_one_of_format_1(self, old, tmp_path):
    """It knows neither of devices nor of allowances, and has no digest."""
    path = shutil.copytree(_TESTDATA / 'bank_of_format_2', tmp_path / 'older')
    values = json.loads((path / 'description/metadata').read_text())
    del values['format'], values['digest'], values['description']['device']
    for name in ('image_allowance', 'pixel_allowance'):
      del values['description']['calibration'][name]
    (path / 'description/metadata').write_text(json.dumps(values))
    found = store.restore(path)
    assert found.description == dataclasses.replace(old.description, device='')
    assert 'made on an unknown device' in ' '.join(bank.info(found))
    assert any(line.startswith('method patchcore, with ratio 0.') for line in bank.info(found))
    assert editing.drop(found, ['0.png']).description.calibration.image_allowance == 0

  def test_a_threshold_that_was_changed_is_noticed(self, tmp_path):
    path = shutil.copytree(_TESTDATA / 'bank_of_format_2', tmp_path / 'copy')
    file = path / 'description/metadata'
    file.write_text(file.read_text().replace('0.4963606894016266', '0.5'))
    with pytest.raises(BankError, match='not what was saved'):
      store.restore(path)


def _nearly(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_folder_of_images_is_no_model(tmp_path):
  (tmp_path / 'a.png').write_bytes(b'')
  with pytest.raises(BankError, match='is a folder, and no model: expected one that `patchcore fit`') as e:
    store.restore(tmp_path)
  assert 'emove' not in str(e.value)  # it holds somebody's images
