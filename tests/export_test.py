"""Exported programs: against the package, in a process that cannot import it, and made wrong on purpose."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from patchcore_jax import backbones, inspection
from patchcore_jax.banks import calibration, editing, provenance, store
from patchcore_jax.banks.model import to_json
from patchcore_jax.data import decoding, preprocess
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.detectors import OCSVM, SPADE, AnomalyDINO, MahalanobisAD, PaDiM, PatchCore, Run
from patchcore_jax.export import folder, program, run
from patchcore_jax.settings import CoresetSpec, EmbeddingSpec, Preprocessing, ScoringSpec
from tests import small, tiff

PREPROCESSING = Preprocessing(resize=(26,), crop=(32, 24))
CAMERA = 50, 38  # height, width of frames that become 32 x 24
AT_ONCE = 3


def fitted(detector=None):
  """A small calibrated model with pictures, as `patchcore fit` makes them."""
  detector = detector or PatchCore(
      0.3, EmbeddingSpec('mean'), CoresetSpec(projection_dim=8), ScoringSpec(sigma=2.0))
  networks = (backbones.create('tests.small:backbone'),)
  model, scores = detector.fit_and_cross_score(
      small.data(small.images(12), 4), networks, Run(keep_images=True), folds=3)
  model = editing.calibrate(model, *scores, false_alarm_rate=0.2)
  return inspection.Inspector(detector, model.with_description(preprocessing=PREPROCESSING), networks)


@pytest.fixture(scope='module')
def inspector():
  return fitted()


@pytest.fixture(scope='module')
def exported(inspector, tmp_path_factory):
  path = tmp_path_factory.mktemp('export') / 'made'
  folder.write(path, inspector, at_once=AT_ONCE)
  return path


@pytest.fixture(scope='module')
def of_camera(inspector, tmp_path_factory):
  path = tmp_path_factory.mktemp('export') / 'made'
  folder.write(path, inspector, at_once=AT_ONCE, camera=CAMERA, platforms=['cpu'])
  return path


@pytest.fixture(scope='module')
def exported_program(exported):
  return run.load(exported)[0]


def described(inspector, **changes):
  return dataclasses.replace(inspector, model=inspector.model.with_description(**changes))


def with_arrays(inspector, arrays):
  return dataclasses.replace(inspector, model=inspector.model._replace(arrays=arrays))


def predicted(inspector, images):
  return inspection.scorer(inspector, len(images))(images)


class TestProgram:

  @pytest.mark.parametrize('count', [2, 2 * AT_ONCE])  # the comparison before writing has 1 and AT_ONCE + 3
  def test_any_batch_size_answers_as_predict(self, inspector, exported_program, count):
    images = small.images(count, seed=7)
    want, got = predicted(inspector, images), exported_program(images)
    # Sums in another order; 1e-6 is ten times their rounding.
    np.testing.assert_allclose(got['image_score'], want.image, rtol=1e-6)
    np.testing.assert_allclose(got['anomaly_map'], want.map, rtol=1e-5)
    c = inspector.calibration
    np.testing.assert_allclose(
        got['calibrated_score'], [calibration.calibrated_score(c, s) for s in want.image],
        atol=1e-5)
    np.testing.assert_array_equal(got['anomalous'], want.image >= c.image_threshold)

  @pytest.mark.parametrize('make', [program.program, program.program_in_one_pass])
  def test_another_way_of_scoring(self, inspector, make):
    scoring = ScoringSpec(num_neighbors=3, distance='root', image_score='reweighted')
    other = dataclasses.replace(inspector, detector=dataclasses.replace(inspector.detector, scoring=scoring))
    images = folder.probes(other, 5)
    assert folder.check(jax.jit(make(other)), other, images, sizes=(5,)) < 1e-5

  def test_in_one_pass_has_no_loop(self, inspector):
    looped, straight = (
        str(jax.make_jaxpr(make(inspector))(small.images(1)))
        for make in (program.program, program.program_in_one_pass))
    assert 'while' in looped and 'while' not in straight and 'scan' not in straight

  def test_without_thresholds(self, inspector):
    fn = program.program(described(inspector, calibration=None))
    assert set(jax.eval_shape(fn, small.images(2))) == {'image_score', 'anomaly_map'}

  def test_errors(self, inspector):
    with pytest.raises(ValueError, match='at_once=0'):
      program.program(inspector, at_once=0)
    with pytest.raises(ImageError, match='24 x 31 pixels'):
      wrong = described(inspector, preprocessing=Preprocessing(resize=(26,), crop=(31, 24)))
      program.program(wrong, camera=CAMERA)


class TestWrite:

  def test_the_folder(self, exported):
    assert {p.name for p in exported.iterdir()} == {'program.jax', 'description.json', 'run.py', 'README.md'}
    assert [p.name for p in exported.parent.iterdir()] == ['made']
    description = json.loads((exported / 'description.json').read_text())
    assert description['sha256'] == hashlib.sha256((exported / 'program.jax').read_bytes()).hexdigest()
    assert description['platforms'] == ['cpu', 'cuda', 'tpu']
    assert description['input']['shape'] == ['b', 32, 24, 3]
    assert description['outputs']['anomaly_map']['shape'] == ['b', 32, 24]
    assert description['parity']['largest_difference'] < 1e-5
    assert description['thresholds']['false_alarm_rate'] == 0.2

  def test_nothing_of_this_machine_is_in_it(self, exported):
    assert str(Path(__file__).parents[1]).encode() not in (exported / 'program.jax').read_bytes()

  @pytest.mark.parametrize('camera', [False, True])
  def test_runs_where_the_package_cannot_be_imported(
      self, inspector, exported, of_camera, camera, tmp_path):
    shutil.copytree(of_camera if camera else exported, tmp_path / 'there')
    frames = np.random.default_rng(3).integers(0, 256, (5, *CAMERA, 3), dtype=np.uint8)
    names = [f'{i}.png' for i in range(len(frames))]
    for name, frame in zip(names, frames):
      Image.fromarray(frame).save(tmp_path / name)
    blocked = ('patchcore_jax', 'flax', 'orbax', 'grain', 'sklearn')
    script = (
        f'import runpy, sys\nsys.modules.update(dict.fromkeys({blocked}))\nsys.argv[1:] = '
        f'{["--maps=maps", *names]}\nrunpy.run_path("there/run.py", run_name="__main__")')
    result = subprocess.run(
        [sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [line.split() for line in result.stdout.splitlines()]
    images = np.stack([
        np.asarray(preprocess.transform(Image.fromarray(frame), PREPROCESSING)) for frame in frames])
    want = predicted(inspector, images)
    assert [row[3] for row in rows] == names
    np.testing.assert_allclose([float(row[0]) for row in rows], want.image, rtol=1e-5)
    share = round(100 * preprocess.not_inspected(*CAMERA, PREPROCESSING))
    assert share and result.stderr.count(f'{share} % of 0.png is not inspected') == 1
    assert result.stderr.count('not inspected') == 1
    alarms = want.image >= inspector.calibration.image_threshold
    assert [row[2] for row in rows] == ['ANOMALOUS' if alarm else 'good' for alarm in alarms]
    np.testing.assert_allclose(np.load(tmp_path / 'maps/4_4.npy'), want.map[4], rtol=1e-5)

  def test_another_bank_does_not_pass(self, inspector, tmp_path, monkeypatch):
    rows = inspector.model.arrays['embeddings'].copy()
    rows[:, 0] += 0.01 * np.abs(rows).max()
    changed = with_arrays(inspector, inspector.model.arrays | {'embeddings': rows})
    make = program.program
    monkeypatch.setattr(program, 'program', lambda _, **arguments: make(changed, **arguments))
    with pytest.raises(folder.ParityError, match=r'image_score by .* tolerance 1e-04, on probe image \d'):
      folder.write(tmp_path / 'made', inspector, at_once=AT_ONCE)
    assert not list(tmp_path.iterdir())

  def test_errors(self, inspector, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='exists'):
      folder.write(tmp_path, inspector)
    out = tmp_path / 'made'
    with pytest.raises(ValueError, match='Platforms gpu: expected some of cpu, cuda'):
      folder.write(out, inspector, platforms=['cpu', 'gpu'])
    with pytest.raises(ValueError, match='expected cpu among the platforms tpu'):
      folder.write(out, inspector, platforms=['tpu'])
    monkeypatch.setattr(program, '_MOST_BYTES', 20_000)
    with pytest.raises(ValueError, match=r'jax.export holds at most 0.0 GB.*Shrink the bank'):
      folder.write(out, inspector)
    assert not list(tmp_path.iterdir())


class TestOtherMethods:

  @pytest.mark.parametrize('detector', [PaDiM(num_dims=4), MahalanobisAD(), OCSVM()], ids=lambda d: d.name)
  def test_they_are_written_too(self, detector, tmp_path):
    inspector = fitted(detector)
    description = folder.write(tmp_path / 'made', inspector, at_once=AT_ONCE, platforms=['cpu'])
    has_map = detector.name == 'padim'
    assert ('anomaly_map' in description['outputs']) == has_map
    assert (description['thresholds']['pixel_threshold'] is None) == (not has_map)
    assert description['bank']['detector'] == detector.name and description['bank']['patches'] == 0
    images = small.images(2, seed=7)
    want, got = predicted(inspector, images), run.load(tmp_path / 'made')[0](images)
    assert set(got) == set(description['outputs'])
    np.testing.assert_allclose(got['image_score'], want.image, rtol=1e-5)
    found = inspector.calibration
    # An OCSVM's good images have negative scores, and a scale of their own.
    assert (min(found.image_scores) < 0) == (detector.name == 'ocsvm')
    calibrated = calibration.calibrated_scores(found, want.image.astype(np.float64))
    np.testing.assert_allclose(got['calibrated_score'], calibrated, atol=1e-5)
    np.testing.assert_array_equal(got['anomalous'], want.image >= found.image_threshold)

  def test_run_where_there_are_no_maps(self, tmp_path):
    """The script beside the program says so instead of failing."""
    folder.write(tmp_path / 'made', fitted(MahalanobisAD()), at_once=AT_ONCE, platforms=['cpu'])
    Image.fromarray(small.images(1)[0]).save(tmp_path / '0.png')
    result = subprocess.run(
        [sys.executable, tmp_path / 'made/run.py', '--maps=maps', '0.png'], cwd=tmp_path, capture_output=True,
        text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        'error: this program scores whole images and makes no maps: leave out --maps.')

  def test_with_a_step_on_the_host_cannot(self, tmp_path):
    networks = (backbones.create('tests.small:backbone'),)
    detector = SPADE(num_images=2)
    inspector = inspection.Inspector(detector, small.fit(detector, network=networks[0]), networks)
    with pytest.raises(ValueError, match='SPADE cannot be exported: it gathers') as error:
      folder.write(tmp_path / 'made', inspector)
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


class TestSerialize:

  def test_what_a_platform_lacks(self):
    def only_there(images):
      return jax.lax.platform_dependent(images, tpu=lambda x: x + 1)

    with pytest.raises(ValueError, match='cannot be exported for cpu'):
      program.serialize(only_there, (4, 4, 3), ['cpu'])


class TestCheck:

  @pytest.mark.parametrize('name, change, match', [
      ('image_score', lambda x: x * (1 + 1e-3), 'image_score by 1.0e-03'),
      ('image_score', lambda x: x * np.nan, 'image_score by nan'),
      ('anomaly_map', lambda x: x + 1e-3 * x.max(), 'anomaly_map by'),
      ('anomaly_map', lambda x: x[:, 1:], r'anomaly_map is \(2, 31, 24\), expected \(2, 32, 24\)'),
      ('calibrated_score', lambda x: x + 0.01, 'calibrated_score of the exported program'),
      ('anomalous', lambda x: ~x, 'anomalous of the exported program')])
  def test_notices(self, inspector, exported_program, name, change, match):

    def changed(images):
      results = jax.device_get(exported_program(images))
      return results | {name: change(results[name])}

    images = folder.probes(inspector, 2)
    assert folder.check(exported_program, inspector, images, sizes=(2,)) < 1e-5
    with pytest.raises(folder.ParityError, match=match):
      folder.check(changed, inspector, images, sizes=(2,))


class TestProbes:

  def test_the_banks_own_images_are_among_them(self, inspector):
    images = folder.probes(inspector, 6)
    assert images.shape == (6, 32, 24, 3) and images.dtype == np.uint8
    assert len(np.unique(images[1])) == 1
    np.testing.assert_array_equal(images[3], provenance.thumbnail(inspector.model, 0))

  def test_of_a_camera_and_without_pictures(self, inspector):
    arrays = inspector.model.arrays
    bare = with_arrays(inspector, {k: arrays[k] for k in ('embeddings', 'indices')})
    images = folder.probes(bare, 6, CAMERA)
    assert images.shape == (6, *CAMERA, 3)
    assert len({image.tobytes() for image in images}) == 6


class TestRunScript:

  @pytest.mark.parametrize('size', [(70, 50), (50, 70), (64, 64), (33, 90)])
  @pytest.mark.parametrize('sizes', [
      {}, {'crop': (25, 31)}, {'crop': ()}, {'resize': (), 'crop': (20,)}, {'resize': (40, 30), 'crop': ()},
      {'resize_side': 'long', 'pad': (32, 37), 'crop': (30,)}])
  def test_prepares_as_the_package(self, size, sizes):
    preprocessing = Preprocessing(**{'resize': (32,), 'crop': (32,)} | sizes)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    as_json = json.loads(json.dumps(to_json(preprocessing)))
    np.testing.assert_array_equal(
        run.prepare(image, as_json), preprocess.transform(image, preprocessing))
    assert run.left_out(image, as_json) == pytest.approx(preprocess.not_inspected(*size, preprocessing))

  @pytest.mark.parametrize('kind', ['gray16', 'floats', 'rgba', 'la', 'palette', 'turned', 'cmyk', 'L'])
  def test_reads_as_the_package(self, kind, tmp_path):
    """Range, background and orientation count as they do where the model was made."""
    rng = np.random.default_rng(1)
    preprocessing = Preprocessing(
        resize=(), crop=(), value_range=(100.0, 300.5) if kind in ('gray16', 'floats') else (),
        background=(250, 3, 90))
    rgba, exif = Image.fromarray(rng.integers(0, 256, (9, 12, 4), np.uint8)), Image.Exif()
    exif[0x0112] = 6
    image, arguments = {
        'gray16': (Image.fromarray(rng.integers(0, 400, (9, 12), np.uint16)), {}),
        'floats': (Image.fromarray(rng.normal(200, 100, (9, 12)).astype(np.float32)), {}),
        'rgba': (rgba, {}), 'la': (rgba.convert('LA'), {}),
        'palette': (rgba.convert('RGB').quantize(8), {'transparency': 2}),
        'turned': (rgba.convert('RGB'), {'exif': exif}), 'cmyk': (rgba.convert('RGB').convert('CMYK'), {}),
        'L': (rgba.convert('L'), {})}[kind]
    path = tmp_path / ('i.tif' if kind in ('floats', 'cmyk') else 'i.png')
    image.save(path, **arguments)
    want = decoding.decode(path, preprocessing)
    shape = list(np.asarray(want.image).shape)
    got, outside, left_out = run.read(path, {
        'preprocess': json.loads(json.dumps(to_json(preprocessing))), 'camera': None,
        'input': {'shape': ['b', *shape]}})
    np.testing.assert_array_equal(got, want.image)
    assert left_out == 0
    assert outside == pytest.approx(want.outside) and (outside > 0) == (kind in ('gray16', 'floats'))

  def test_errors(self, of_camera, tmp_path):
    description = json.loads((of_camera / 'description.json').read_text())
    Image.new('RGB', (9, 9)).save(tmp_path / 'small.png')
    with pytest.raises(ValueError, match='9 x 9 pixels, expected 38 x 50'):
      run.read(tmp_path / 'small.png', description)
    with pytest.raises(ValueError, match='8.1e-05 megapixels; allowed are 8e-05'):
      run.read(tmp_path / 'small.png', description, 80)
    Image.fromarray(small.images(1)[0]).save(tmp_path / 'cut.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'cut.png').read_bytes()[:200])
    with pytest.raises(ValueError, match='cut.png cannot be read'):
      run.read(tmp_path / 'cut.png', description)
    copy = shutil.copytree(of_camera, tmp_path / 'copy')
    with open(copy / 'program.jax', 'r+b') as file:
      file.seek(1000)
      file.write(b'changed')
    with pytest.raises(SystemExit, match='damaged or changed'):
      run.load(copy)
    (copy / 'description.json').unlink()
    with pytest.raises(SystemExit, match='no complete export'):
      run.load(copy)

  def test_what_it_cannot_read_is_one_line_each(self, of_camera, tmp_path):
    """Nothing is dropped unsaid: what the package reads and this does not is refused, and the rest scored."""
    good = Image.fromarray(small.images(1)[0]).resize(CAMERA[::-1])
    good.save(tmp_path / 'good.png')
    good.save(tmp_path / 'pages.tif', save_all=True, append_images=[good])
    tiff.write(tmp_path / 'five.tif', np.zeros((*CAMERA, 5), np.uint8))
    tiff.write(tmp_path / 'deep.tif', np.zeros((*CAMERA, 3), np.uint16))
    Image.fromarray(np.zeros(CAMERA, np.float32)).save(tmp_path / 'float.tif')
    (tmp_path / 'text.png').write_text('text')
    names = ['pages.tif', 'five.tif', 'deep.tif', 'float.tif', 'text.png', 'none.png', 'good.png']
    result = subprocess.run(
        [sys.executable, of_camera / 'run.py', *names], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ['good.png']
    said = [line for line in result.stderr.splitlines() if line.startswith('not scored: ')]
    words = ['has 2 pages', 'has 5 bands', 'has 16 bits a colour', '32-bit values', 'cannot be read',
             'No such file']
    assert len(said) == len(words) and 'Traceback' not in result.stderr
    for line, name, word in zip(said, names, words, strict=False):
      assert name in line and word in line


class TestBinary:

  def _run(self, *arguments):
    return subprocess.run(
        [sys.executable, '-m', 'patchcore_jax', 'export', *arguments], capture_output=True, text=True,
        cwd=Path(__file__).parents[1])

  def test_from_a_bank_to_a_program(self, inspector, tmp_path):
    store.save(tmp_path / 'bank', inspector.model)
    result = self._run(
        tmp_path / 'bank', f'--out={tmp_path / "out"}', '--platforms=cpu',
        f'--camera={CAMERA[0]}x{CAMERA[1]}', '--at-once=2')
    assert result.returncode == 0, result.stderr
    assert 'takes b x 50 x 38 x 3 uint8, for cpu' in result.stdout
    assert run.load(tmp_path / 'out')[1]['images_at_once'] == 2

  def test_mistakes_are_one_line(self, tmp_path):
    result = self._run(tmp_path / 'none', f'--out={tmp_path / "out"}')
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith('error: No model')


@pytest.mark.parametrize('detector, told', [
    (AnomalyDINO(rotations=1, foreground='pca'), True), (AnomalyDINO(rotations=1), False),
    (PatchCore(0.3, EmbeddingSpec('mean'), scoring=ScoringSpec(foreground='pca')), True)])
def test_what_is_taken_for_background_is_told(detector, told):
  found = folder.describe(
      small.inspector(detector), None, ('cpu',), 1, has_map=True, digest='', size=0, parity={})
  assert ('taken for background' in found['outputs']['anomaly_map']['meaning']) == told
