"""Which files below a folder are images to look at, and what is said of the others."""

import os
from pathlib import Path

import pytest
from PIL import Image

from patchcore_jax.data import image_files, image_finding, passed_by
from patchcore_jax.report import predictions


def _touch(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def _stack(path, pages=3):
  path.parent.mkdir(parents=True, exist_ok=True)
  images = [Image.new('L', (8, 6), 90 * i) for i in range(pages)]
  images[0].save(path, save_all=True, append_images=images[1:])


def _found(root, where=''):
  """The images of a folder or pattern below root, named from there."""
  return [os.path.relpath(path, root) for path in image_finding.find_images(root / where)]


class TestFolders:

  def test_all_images_below_are_found_whatever_the_folders_are_called(self, tmp_path):
    _touch(tmp_path, 'good/a.png', 'bent/b.jpg', 'bent/deep/er/c.bmp', 'd.png', 'train/good/e.png')
    assert _found(tmp_path) == ['bent/b.jpg', 'bent/deep/er/c.bmp', 'd.png', 'good/a.png', 'train/good/e.png']
    (line,) = passed_by.origins(tmp_path, image_finding.find_images(tmp_path))
    assert line == ('images of 5 folders: bent (1), bent/deep/er (1), the folder itself (1), good (1), '
                    'train/good (1)')
    assert passed_by.left_out(tmp_path, image_finding.find_images(tmp_path)) == []

  @pytest.mark.parametrize('suffix', [
      'PNG', 'JPeG', 'jpe', 'jfif', 'dib', 'TIFF', 'webp', 'gif', 'ppm', 'pgm'])
  def test_suffixes(self, suffix, tmp_path):
    _touch(tmp_path, f'a.{suffix}')
    assert _found(tmp_path) == [f'a.{suffix}']

  def test_what_is_hidden_or_left_behind_is_no_data_and_counted(self, tmp_path):
    _touch(tmp_path, 'a.png', '.b.png', '._a.png', '.ipynb_checkpoints/a-checkpoint.png', '__MACOSX/x/a.png',
           '@eaDir/a.png', 'Thumbs.db', '.DS_Store', 'desktop.ini')
    assert _found(tmp_path) == ['a.png']
    (line,) = passed_by.passed_by(tmp_path)
    assert line.startswith('not read, hidden: 5 (._a.png, .b.png, ') and '.DS_Store' not in line

  def test_a_folder_that_is_named_counts_though_it_is_hidden(self, tmp_path):
    _touch(tmp_path, '.data/a.png', '.data/.b.png')
    assert _found(tmp_path, '.data') == ['.data/a.png'] and _found(tmp_path, '.data/*.png') == ['.data/a.png']

  def test_other_files_are_named_by_kind_those_that_look_like_images_first(self, tmp_path):
    _touch(tmp_path, 'a.png', 'b.txt', 'c.AVI', 'sub/d.avi', 'e.npy', 'f.heic', 'noext')
    (tmp_path / 'g.dat').write_bytes(b'\x89PNG\r\n\x1a\n')
    os.mkfifo(tmp_path / 'h.png')  # would be waited for
    (line,) = passed_by.passed_by(tmp_path)
    assert line.startswith(
        'not read, because of their names: 2 .avi video (c.AVI, sub/d.avi), 1 .dat, images by their content '
        '(g.dat), 1 .heic (f.heic), 1 .npy (e.npy), 1 .png, not a file (h.png), 1 .txt (b.txt), 1 without '
        'suffix (noext). Images are named png jpg')

  def test_what_an_earlier_run_wrote_is_no_data(self, tmp_path):
    _touch(tmp_path, 'a.png', 'out/predictions.jsonl', 'out/predictions.csv', 'out/report.html',
           'out/overlays/a.png', 'out/masks/a.png', 'out/maps/a.tif', 'out/why/a.png', 'out/new.png',
           'half/predictions.unfinished/overlays/a.png', 'maps/b.png')
    assert _found(tmp_path) == ['a.png', 'maps/b.png', 'out/new.png']
    (line,) = passed_by.passed_by(tmp_path)
    assert line.startswith('not read, pictures of an earlier prediction: 5 (half/')
    assert passed_by.passed_by(tmp_path, tmp_path / 'out') == [
        'not read, pictures of an earlier prediction: 1 (half/predictions.unfinished/overlays/a.png)']
    with pytest.raises(ValueError, match='No images in .*; found not read, pictures of an earlier .*: 1'):
      image_finding.find_images(tmp_path / 'half')

  def test_the_names_are_those_that_runs_write(self):
    assert {*predictions._ENTRIES, predictions._UNFINISHED} == {
        *image_files.RUN_FILES, *image_files.RUN_FOLDERS}

  def test_folders_that_cannot_be_read(self, tmp_path, monkeypatch):
    """Permissions do not bind every user, so they are played."""
    _touch(tmp_path, 'a/1.png', 'b/2.png')
    real = os.scandir

    def denied(path):
      if os.path.basename(os.fspath(path)) == 'b':
        raise PermissionError(13, 'Permission denied', path)
      return real(path)

    monkeypatch.setattr(os, 'scandir', denied)
    assert _found(tmp_path) == ['a/1.png']
    assert passed_by.passed_by(tmp_path) == ['not read, folders that cannot be read: 1 (b)']
    assert image_files.listed(tmp_path / '**' / '*.png').denied == [str(tmp_path / 'b')]
    with pytest.raises(OSError, match='Permission denied'):
      image_finding.find_images(tmp_path / 'b')

  def test_nothing(self, tmp_path):
    (tmp_path / 'empty').mkdir()
    _touch(tmp_path, 'texts/a.txt')
    for where, words in (('empty', 'No images in .* or below it: .* png jpg .*found nothing'),
                         ('texts', r'No images in .*1 \.txt \(a\.txt\)'), ('*.png', 'matches no image'),
                         ('none', 'does not exist'), ('none/*.png', 'there is no folder .*none')):
      with pytest.raises(ValueError, match=words):
        image_finding.find_images(tmp_path / where)


class TestLinks:

  @pytest.fixture
  def root(self, tmp_path):
    _touch(tmp_path, *(f'parts/{i}.png' for i in range(8)))
    return tmp_path

  @pytest.mark.parametrize('where', ['parts', 'parts/**/*.png', 'parts/**', 'parts/*', '**/*.png', 'p*/**/*'])
  def test_a_link_to_itself_or_above_leads_nowhere(self, where, root):
    expected = [f'parts/{i}.png' for i in range(8)]
    (root / 'parts/loop').symlink_to('.')
    (root / 'parts/up').symlink_to('..')
    (root / 'parts/again').symlink_to(root / 'parts', target_is_directory=True)
    assert _found(root, where) == expected
    assert image_files.listed(root / where).linked

  def test_a_folder_elsewhere_is_looked_into_once_by_its_own_name_if_it_has_one(self, root):
    _touch(root, 'elsewhere/x.png')
    (root / 'parts/a').symlink_to(root / 'elsewhere')
    (root / 'parts/b').symlink_to(root / 'elsewhere')
    assert _found(root, 'parts')[-1:] == ['parts/a/x.png'] and len(_found(root, 'parts')) == 9
    (root / 'parts/z').mkdir()
    _touch(root, 'parts/z/y.png')
    (root / 'parts/c').symlink_to('z')
    for where in ('parts', 'parts/**/*.png', 'parts/*/*.png'):
      assert 'parts/z/y.png' in _found(root, where) and 'parts/c/y.png' not in _found(root, where)

  def test_a_link_to_an_image_that_is_there_is_no_second_one(self, root):
    (root / 'parts/0latest.png').symlink_to('7.png')
    (root / 'parts/gone.png').symlink_to('nowhere.png')  # an error of its own, by name
    assert _found(root, 'parts') == [f'parts/{i}.png' for i in range(8)] + ['parts/gone.png']
    assert passed_by.passed_by(root / 'parts') == [
        'not read, links to what is taken anyway: 1 (0latest.png)']


class TestPatterns:

  def test_folders_that_match_count_with_all_below(self, tmp_path):
    _touch(tmp_path, 'a/good/1.png', 'a/good/x/2.png', 'b/good/3.png', 'b/bad/4.png', 'c.png')
    assert _found(tmp_path, '*/good') == ['a/good/1.png', 'a/good/x/2.png', 'b/good/3.png']
    assert _found(tmp_path, '*/[gb]*d/*.png') == ['a/good/1.png', 'b/bad/4.png', 'b/good/3.png']
    assert _found(tmp_path, '**/?.png') == [
        'a/good/1.png', 'a/good/x/2.png', 'b/bad/4.png', 'b/good/3.png', 'c.png']

  def test_relative_ones(self, tmp_path, monkeypatch):
    _touch(tmp_path, 'a/1.png', '2.png', '.hidden/3.png')
    monkeypatch.chdir(tmp_path)
    assert image_finding.find_images('**/*.png') == ['2.png', 'a/1.png']
    assert image_finding.find_images('*') == ['2.png', 'a/1.png']
    assert image_finding.find_images('a/*') == ['a/1.png']
    assert image_files.root_of('**/*.png') == Path() and image_files.root_of('a/*.png') == Path('a')

  def test_what_is_really_called_so_wins(self, tmp_path):
    _touch(tmp_path, 'line[2]/a.png', 'line2/b.png', 'c[1].png', 'c1.png', 'd*/e.png', 'dx/f.png')
    assert _found(tmp_path, 'line[2]') == ['line[2]/a.png']
    assert _found(tmp_path, 'line[2]/*.png') == ['line[2]/a.png']
    assert _found(tmp_path, 'line[2]/**/*.png') == ['line[2]/a.png']
    assert _found(tmp_path, 'line[23]/*.png') == ['line2/b.png']
    assert _found(tmp_path, 'c[1].png') == ['c[1].png']
    assert not image_files.is_pattern(str(tmp_path / 'c[1].png'))
    assert _found(tmp_path, 'd*/*.png') == ['d*/e.png']
    assert image_files.root_of(str(tmp_path / 'line[2]/*.png')) == tmp_path / 'line[2]'


class TestPages:

  @pytest.mark.parametrize('suffix', ['tif', 'gif', 'webp', 'png'])
  def test_each_is_an_image(self, suffix, tmp_path):
    _stack(tmp_path / f'b.{suffix}')
    _touch(tmp_path, 'a.png', 'c.png')
    assert _found(tmp_path) == ['a.png', *(f'b.{suffix}#{i}' for i in (1, 2, 3)), 'c.png']
    assert _found(tmp_path, f'b.{suffix}') == [f'b.{suffix}#{i}' for i in (1, 2, 3)]
    assert passed_by.origins(tmp_path, image_finding.find_images(tmp_path)) == [
        f'each page is an image of its own: b.{suffix} has 3']

  def test_one_of_them(self, tmp_path):
    _stack(tmp_path / 'b.tif')
    assert _found(tmp_path, 'b.tif#2') == ['b.tif#2']
    with pytest.raises(ValueError, match='none.tif#2 does not exist'):
      image_finding.find_images(tmp_path / 'none.tif#2')

  def test_a_file_that_is_called_like_a_page_is_told(self, tmp_path):
    _touch(tmp_path, 'a.tif#2')
    assert _found(tmp_path, 'a.tif#2') == ['a.tif#2']
    _stack(tmp_path / 'a.tif')
    with pytest.raises(ValueError, match='a.tif#2 is a file of its own, and page 2 of .*a.tif too'):
      image_finding.find_images(tmp_path)


class TestTrainingFolder:

  @pytest.mark.parametrize('names, taken', [
      (['train/good/1.png', 'test/good/2.png', '3.png'], 'train/good'), (['Train/OK/1.png'], 'Train/OK'),
      (['Good/1.png', 'bent/2.png'], 'Good'), (['train/1.png', 'new/2.png'], 'train'),
      (['a/1.png', 'b/2.png'], ''), (['2025/ok/1.png', '2026/ok/2.png'], ''),
      (['train/good/notes.txt', '1.png'], ''), (['train/.good/1.png', '1.png'], '')])
  def test_which(self, names, taken, tmp_path):
    _touch(tmp_path, *names)
    assert image_files.training_folder(tmp_path) == str(tmp_path / taken)

  def test_what_lies_beside_is_told(self, tmp_path):
    _touch(tmp_path, 'train/OK/1.png', 'train/NG/2.png', 'test/NG/3.png', 'test/NG/4.png', '5.png', '6.avi')
    taken = image_files.training_folder(tmp_path)
    first, second = passed_by.left_out(tmp_path, image_finding.find_images(taken))
    assert first == (f'taken: {tmp_path}/train/OK. Not read, beside it: the folder itself (1), test/NG (2), '
                     'train/NG (1)')
    assert '1 .avi video (6.avi)' in second

  def test_what_cannot_be_meant(self, tmp_path):
    _touch(tmp_path, 'a/train/good/1.png', 'a/test/bent/2.png')
    with pytest.raises(ValueError, match="folders of good parts, such as .*a/train/good, beside other"):
      image_files.training_folder(tmp_path)
    _touch(tmp_path, 'good/1.png', 'ok/2.png')
    with pytest.raises(ValueError, match='several folders of good parts, .*/good, .*/ok: expected one'):
      image_files.training_folder(tmp_path)


@pytest.mark.parametrize('name, good', [
    ('good', True), ('Good', True), ('OK', True), ('ok', True), ('i.O.', True), ('defect_free', True),
    ('normal', True), ('Pass', True), ('NG', False), ('not_good', False), ('nok', False), ('n.i.O.', False),
    ('broken', False), ('.good', False), ('goods', False)])
def test_names_of_good_parts(name, good):
  assert image_files.is_good(name) == good
  assert image_files.is_good(name, ['NOK', 'x']) == (name == 'nok')
