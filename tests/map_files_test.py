"""Anomaly maps on disk, and maps and masks at the size of the originals."""

import shutil
import sys
import tracemalloc

import numpy as np
import pytest
import tifffile
from PIL import Image

from patchcore_jax import metrics
from patchcore_jax.data import map_files, placement
from patchcore_jax.data.folder import MVTEC, Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.layouts import LAYOUTS
from patchcore_jax.settings import Preprocessing
from tests import tiff

HEIGHT, WIDTH = 60, 72  # of the plates


def _example(path, **fields):
  return Example(str(path), (), 0, 'nut', 'good')._replace(**fields)


def _map(seed=0, height=HEIGHT, width=WIDTH, dtype=np.float32):
  return np.random.default_rng(seed).standard_normal((height, width)).astype(dtype)


@pytest.fixture
def test(pristine):
  """The test images of a category."""
  return MVTEC.load_category(pristine, 'nut').test


@pytest.fixture
def written(pristine, test, tmp_path):
  """The folder of maps of a category, and the arguments of `MapFiles`."""
  names = map_files.map_names(test, pristine)
  map_files.write_maps(tmp_path / 'maps', names, [_map(i) for i in range(len(names))])
  return tmp_path / 'maps', names, map_files.original_sizes(test)


class TestOneMap:

  @pytest.mark.parametrize('dtype', [np.float16, np.float32])
  def test_is_read_as_it_was_written_by_three_readers(self, dtype, tmp_path):
    path, values = tmp_path / 'made' / 'a.tiff', _map(dtype=dtype)
    map_files.write_map(path, values)
    for found in (map_files.read_map(path), tifffile.imread(path)):
      assert found.dtype == dtype
      np.testing.assert_array_equal(found, values)
    if dtype == np.float32:  # Pillow knows no halves
      np.testing.assert_array_equal(np.asarray(Image.open(path)), values)
    assert [p.name for p in path.parent.iterdir()] == ['a.tiff']
    first = path.read_bytes()
    map_files.write_map(path, values)
    assert path.read_bytes() == first

  @pytest.mark.parametrize('dtype', ['f2', 'f4', 'f8', 'u1', 'i2', 'u4'])
  @pytest.mark.parametrize('how', [{}, {'order': '>'}, {'deflate': True, 'rows': 7}, {'big': True}])
  def test_of_other_tools(self, dtype, how, tmp_path):
    values = (100 * abs(_map())).astype(dtype)
    found = map_files.read_map(tiff.write(tmp_path / 'a.tif', values, **how))
    np.testing.assert_array_equal(found, values)
    assert found.dtype == (dtype if dtype[0] == 'f' else {'1': 'f4', '2': 'f4', '4': 'f8'}[dtype[1]])

  @pytest.mark.parametrize('arguments', [{'compression': 'zlib'}, {'tile': (32, 32)}, {'byteorder': '>'}])
  def test_of_tifffile(self, arguments, tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', _map(), **arguments)
    np.testing.assert_array_equal(map_files.read_map(tmp_path / 'a.tif'), _map())

  @pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
  def test_not_finite(self, value, tmp_path):
    values = _map()
    values[3, 4] = value
    with pytest.raises(ValueError, match='NaN or infinite'):
      map_files.write_map(tmp_path / 'a.tiff', values)
    assert not list(tmp_path.iterdir())
    path = tiff.write(tmp_path / 'b.tif', values)
    with pytest.raises(ImageError, match=f'^The map .*b.tif has 1 NaN or infinite values of {values.size}'):
      map_files.read_map(path)

  @pytest.mark.parametrize('values', [
      np.zeros((2, 3)), np.zeros((2, 3), int), np.zeros((1, 2, 3), np.float32), np.zeros((0, 3), np.float32)])
  def test_what_is_no_map_is_not_written(self, values, tmp_path):
    with pytest.raises(ValueError, match=r'shape \(.*a\.tiff: expected \[h, w\]'):
      map_files.write_map(tmp_path / 'a.tiff', values)

  @pytest.mark.parametrize('pages, how, words', [
      ([_map(), _map()], {}, 'has 2 pages'),
      ([np.stack([_map()] * 3, axis=-1)], {}, 'of 3 values a pixel'),
      ([_map().astype('i8')], {}, '64-bit integers'),
      ([_map()], {'tags': [(339, 6)]}, 'complex numbers')])
  def test_of_another_kind(self, pages, how, words, tmp_path):
    path = tiff.write(tmp_path / 'a.tif', *pages, **how)
    with pytest.raises(ImageError, match=f'a.tif.*{words}'):
      map_files.read_map(path)

  def test_damaged(self, tmp_path):
    path = tmp_path / 'a.tif'
    whole = tiff.tiff([_map()], deflate=True)
    for damaged in (b'', b'\x89PNG', whole[:8], whole[:-20], whole[:40] + bytes(400) + whole[440:]):
      path.write_bytes(damaged)
      with pytest.raises(ImageError, match='a.tif'):
        map_files.read_map(path)

  def test_an_older_file_stays_where_writing_fails(self, tmp_path, monkeypatch):
    path = tmp_path / 'a.tiff'
    map_files.write_map(path, _map())
    before = path.read_bytes()

    def fail(aside, *_, **__):
      aside.write_bytes(b'half')
      raise OSError('no room')

    monkeypatch.setattr(tifffile, 'imwrite', fail)
    with pytest.raises(OSError, match='no room'):
      map_files.write_map(path, _map(1))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

  def test_without_tifffile(self, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(ValueError, match=r'needs the package tifffile.*patchcore_jax\[tiff\]'):
      map_files.write_map(tmp_path / 'a.tiff', _map())
    path = tiff.write(tmp_path / 'b.tif', _map())  # reading needs none
    np.testing.assert_array_equal(map_files.read_map(path), _map())


class TestNames:

  def test_are_the_paths_below_the_root(self, pristine, test):
    names = map_files.map_names(test, pristine)
    assert names[0] == 'nut/test/good/000'
    assert [f'{pristine}/{name}.png' for name in names] == [e.image_path for e in test]

  @pytest.mark.parametrize('path, name', [
      ('nut/test/cut/left/deep/1.JPG', 'nut/test/cut/left/deep/1'),
      ('nut/test/cut/a.b.png', 'nut/test/cut/a.b'),
      ('nut/test/cut/stack.tif#2', 'nut/test/cut/stack#2'), ('nut/nut/test/cut/1.png', 'nut/test/cut/1')])
  def test_by_hand(self, path, name, tmp_path):
    assert map_files.map_names([_example(tmp_path / path)], tmp_path) == [name]
    inside = _example(path, read=bytes)  # of an archive, whose names are relative
    assert map_files.map_names([inside], tmp_path) == [name]

  def test_each_image_has_one_of_its_own(self, tmp_path):
    paths = ['c/a.png', 'c/a.jpg', 'c/b.png', 'c/s.tif#1', 'c/s.tif#2', 'c/s.gif#2']
    assert map_files.map_names([_example(tmp_path / p) for p in paths], tmp_path) == [
        'c/a.png', 'c/a.jpg', 'c/b', 'c/s#1', 'c/s.tif#2', 'c/s.gif#2']

  def test_errors(self, tmp_path):
    example = _example(tmp_path / 'c/a.png')
    with pytest.raises(ValueError, match='Two images would have the map c/a.png.tiff'):
      map_files.map_names([example, example], tmp_path)
    with pytest.raises(ValueError, match=r'a\.png does not lie in .*elsewhere'):
      map_files.map_names([example], tmp_path / 'elsewhere')

  def test_of_mvtec_ad_2(self, tmp_path):
    shutil.copytree(_plates_of_ad2(tmp_path / 'made'), tmp_path / 'data')
    test = LAYOUTS['mvtec_ad_2'].load_category(tmp_path / 'data', 'can').test
    assert map_files.map_names(test, tmp_path / 'data') == [
        'can/test_public/bad/000_regular', 'can/test_public/good/000_regular']


def _plates_of_ad2(root):
  for name in ('train/good/000', 'test_public/good/000', 'test_public/bad/000',
               'test_public/ground_truth/bad/000'):
    mask = '_mask' if 'ground_truth' in name else ''
    path = root / 'can' / f'{name}_regular{mask}.png'
    path.parent.mkdir(parents=True)
    Image.new('L', (8, 6), 255).save(path)
  return root


class TestFolder:

  def test_gives_each_image_its_map(self, written):
    maps = map_files.MapFiles(*written)
    assert len(maps) == len(written[1]) and maps.notes == ()
    for i, found in enumerate(maps):
      np.testing.assert_array_equal(found, _map(i))
    np.testing.assert_array_equal(maps[-1], _map(len(maps) - 1))

  @pytest.mark.parametrize('suffix', ['.tif', '.TIF', '.TIFF'])
  def test_other_suffixes(self, suffix, written):
    path = written[0] / f'{written[1][0]}.tiff'
    path.rename(path.with_suffix(suffix))
    np.testing.assert_array_equal(map_files.MapFiles(*written)[0], _map(0))

  def test_two_maps(self, written):
    path = written[0] / f'{written[1][3]}.tiff'
    shutil.copy(path, path.with_suffix('.TIF'))
    with pytest.raises(ValueError, match=rf'Two maps for one image, {path.with_suffix(".TIF")} and {path}'):
      map_files.MapFiles(*written)

  def test_missing_maps(self, written):
    folder, names, _ = written
    for name in names[2:4]:
      (folder / f'{name}.tiff').unlink()
    with pytest.raises(ValueError, match=rf'^2 of 8 images have no map in .*{names[2]}\.tiff'):
      map_files.MapFiles(*written)
    shutil.rmtree(folder / 'nut')
    with pytest.raises(ValueError, match='^8 of 8 images have no map .* holds nothing'):
      map_files.MapFiles(*written)
    folder.rmdir()
    with pytest.raises(ValueError, match=f'There is no folder {folder}'):
      map_files.MapFiles(*written)

  def test_superfluous_maps_are_named_and_counted(self, written):
    folder = written[0]
    map_files.write_map(folder / 'nut/test/good/999.tiff', _map())
    map_files.write_map(folder / 'nut/elsewhere.TIF', _map())
    map_files.write_map(folder / 'bolt/test/good/000.tiff', _map())  # of another category
    (folder / 'nut/test/good/note.txt').touch()
    (note,) = map_files.MapFiles(*written).notes
    assert note.startswith('maps of no image, which are not read: 2 (')
    assert 'good/999.tiff' in note and 'elsewhere' in note

  def test_sizes_are_checked_before_a_map_is_read(self, written):
    folder, names, sizes = written
    map_files.write_map(folder / f'{names[5]}.tiff', _map(height=WIDTH, width=HEIGHT))
    with pytest.raises(ImageError, match=rf'{names[5]}\.tiff is 60 x 72 pixels, its image .* is 72 x 60'):
      map_files.MapFiles(folder, names, sizes)

  def test_nan_is_refused_with_its_file(self, written):
    folder, names, _ = written
    tiff.write(folder / f'{names[1]}.tiff', np.full((HEIGHT, WIDTH), np.nan, np.float32))
    maps = map_files.MapFiles(*written)
    with pytest.raises(ImageError, match=rf'{names[1]}\.tiff has 4320 NaN'):
      maps[1]

  def test_counts_must_agree(self, written):
    folder, names, sizes = written
    with pytest.raises(ValueError, match='8 names of maps and 7 sizes'):
      map_files.MapFiles(folder, names, sizes[:-1])
    with pytest.raises(ValueError, match='1 maps for 8 names'):
      map_files.write_maps(folder, names, [_map()])

  def test_halves_that_overflow_are_refused(self, tmp_path):
    map_files.write_maps(tmp_path, ['a'], [np.float32([[65504]])], dtype=np.float16)
    assert map_files.read_map(tmp_path / 'a.tiff') == 65504
    with pytest.raises(ValueError, match=r'b\.tiff has NaN or infinite'):
      map_files.write_maps(tmp_path, ['b'], [np.float32([[70000]])], dtype=np.float16)

  @pytest.mark.parametrize('dtype', ['float32', 'float16'])
  def test_metrics_of_the_reference_maps_survive(self, dtype, golden, tmp_path):
    arrays = np.load(golden / 'evaluation' / 'mvtec.npz')
    maps, masks = arrays['basic_maps'], arrays['basic_masks']
    names = [f'nut/test/cut/{i}' for i in range(len(maps))]
    map_files.write_maps(tmp_path, names, maps, dtype=dtype)
    found = map_files.MapFiles(tmp_path, names, [maps.shape[1:]] * len(maps))
    expected = arrays[f'{"basic" if dtype == "float32" else dtype}_exact_au_pro'][3]
    assert metrics.aupro(np.stack(found), masks > 0, max_fpr=0.3) == pytest.approx(expected, abs=1e-12)

  def test_no_map_is_held(self, tmp_path):
    side, n = 500, 12
    names = [f'nut/test/good/{i:03}' for i in range(n)]
    map_files.write_maps(tmp_path, names, [_map(height=side, width=side)] * n)
    tracemalloc.start()
    try:
      maps = map_files.MapFiles(tmp_path, names, [(side, side)] * n)
      total = sum(float(values.sum()) for values in maps)
      peak = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
    assert total == pytest.approx(n * float(_map(height=side, width=side).sum()), rel=1e-4)
    assert peak < 5 * 4 * side**2


class TestMasks:

  def test_are_those_of_the_files(self, test):
    masks = map_files.OriginalMasks(test, map_files.original_sizes(test))
    assert len(masks) == 8
    for example, mask in zip(test, masks):
      assert mask.shape == (HEIGHT, WIDTH) and mask.dtype == bool
      assert mask.any() == example.label
      for path in example.mask_paths:
        np.testing.assert_array_equal(mask, np.asarray(Image.open(path)) > 0)

  def test_several_masks_are_joined_and_sizes_differ_between_images(self, tmp_path):
    for name, (width, height) in {'0': (9, 5), '1': (4, 7)}.items():
      Image.new('RGB', (width, height)).save(tmp_path / f'{name}.png')
    for name, row, value in (('a', 1, 255), ('b', 3, 1)):
      mask = np.zeros((7, 4), np.uint8)
      mask[row, :2] = value
      Image.fromarray(mask).save(tmp_path / f'{name}_mask.png')
    examples = [_example(tmp_path / '0.png'), _example(
        tmp_path / '1.png', label=1, mask_paths=tuple(str(tmp_path / f'{n}_mask.png') for n in 'ab'))]
    sizes = map_files.original_sizes(examples)
    assert sizes == [(5, 9), (7, 4)]
    masks = map_files.OriginalMasks(examples, sizes)
    assert not masks[0].any() and masks[0].shape == (5, 9)
    assert np.argwhere(masks[1]).tolist() == [[1, 0], [1, 1], [3, 0], [3, 1]]

  def test_errors(self, test, tmp_path):
    sizes = map_files.original_sizes(test)
    with pytest.raises(ValueError, match=f'1 anomalous images have no mask, {tmp_path}'):
      map_files.OriginalMasks([_example(tmp_path / 'a.png', label=1)], sizes[:1])
    with pytest.raises(ValueError, match='8 images and 7 sizes'):
      map_files.OriginalMasks(test, sizes[1:])
    wrong = map_files.OriginalMasks(test, [(height + 1, width) for height, width in sizes])
    marked = next(i for i, e in enumerate(test) if e.label)
    with pytest.raises(ImageError, match='The mask .* expected the same size'):
      wrong[marked]


class TestLaidOver:

  def test_unseen_pixels_have_the_smallest_score_of_all_maps(self):
    preprocessing = Preprocessing(resize=(8,), crop=(6,))
    sizes, rng = [(16, 24), (16, 16), (16, 24)], np.random.default_rng(0)
    run = rng.random((3, 6, 6)).astype(np.float32)
    maps = map_files.OriginalMaps(run, sizes, preprocessing)
    assert maps.smallest == run.min()
    unseen = 0
    for i, size in enumerate(sizes):
      laid = placement.to_original(run[i], placement.placement(*size, preprocessing))
      assert maps[i].shape == size and maps[i].dtype == np.float32
      np.testing.assert_array_equal(maps[i], np.where(np.isnan(laid), run.min(), laid))
      unseen += np.isnan(laid).sum()
    assert (maps.unseen, maps.pixels) == (unseen, 2 * 16 * 24 + 16 * 16)
    assert maps.notes[0].startswith(
        f'the network did not see {unseen} of 1024 pixels ({unseen / 10.24:.1f} %)')

  def test_what_was_seen_alone(self):
    preprocessing, sizes = Preprocessing(resize=(8,), crop=(6, 5)), [(16, 24), (16, 16)]
    run = np.random.default_rng(0).random((2, 6, 5)).astype(np.float32)
    seen = map_files.SeenMaps(run, sizes, preprocessing)
    assert len(seen) == 2
    for i, size in enumerate(sizes):
      laid = placement.to_original(run[i], placement.placement(*size, preprocessing))
      np.testing.assert_array_equal(seen[i].ravel(), laid[~np.isnan(laid)])
      assert seen[i].ndim == 2
    with pytest.raises(ValueError, match='2 maps for 1 images'):
      map_files.SeenMaps(run, sizes[:1], preprocessing)

  def test_whole_images_have_no_note(self):
    maps = map_files.OriginalMaps([_map(height=6, width=6)], [(12, 12)], Preprocessing(resize=(6,), crop=()))
    assert maps.unseen == 0 and maps.notes == () and np.isfinite(maps[0]).all()

  @pytest.mark.parametrize('damage, words', [
      (lambda m: m[:1], '1 maps for 2 images'), (lambda m: m[:, 1:], 'expected .6, 6.'),
      (lambda m: np.where(m == m[1].max(), np.nan, m), 'Map 1 has NaN or infinite')])
  def test_errors(self, damage, words):
    run = np.random.default_rng(0).random((2, 6, 6))
    with pytest.raises(ValueError, match=words):
      map_files.OriginalMaps(damage(run), [(12, 12)] * 2, Preprocessing(resize=(6,), crop=()))[0]

  def test_written_and_read_again(self, pristine, test, tmp_path):
    run = np.random.default_rng(0).random((len(test), 56, 56)).astype(np.float32)
    names, sizes = map_files.map_names(test, pristine), map_files.original_sizes(test)
    maps = map_files.OriginalMaps(run, sizes, Preprocessing(resize=(64,), crop=(56,)))
    map_files.write_maps(tmp_path, names, maps)
    for made, found in zip(maps, map_files.MapFiles(tmp_path, names, sizes)):
      np.testing.assert_array_equal(found, made)
