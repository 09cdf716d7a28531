"""Folders in MVTec layout."""

import pytest
from PIL import Image

from patchcore_jax.data import folder
from patchcore_jax.evaluation import data
from patchcore_jax.settings import DataSpec


@pytest.fixture
def root(tmp_path):
  for path in ('nut/train/good/b.png', 'nut/train/good/a.PNG', 'nut/train/good/.hidden.png',
               'nut/train/good/notes.txt', 'nut/test/good/0.jpg', 'nut/test/bent/1.webp',
               'nut/test/bent/0.tif', 'nut/ground_truth/bent/0_mask.png',
               'nut/ground_truth/bent/1.png', 'bolt/train/good/0.bmp', 'bolt/test/bent/0.png',
               'license.txt'):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
  (tmp_path / 'empty').mkdir()
  return tmp_path


class TestListCategories:

  def test_sorted_folders_with_good_images(self, root):
    assert folder.MVTEC.list_categories(root) == ['bolt', 'nut']

  def test_no_such_folder(self, tmp_path):
    with pytest.raises(ValueError, match='does not exist'):
      folder.MVTEC.list_categories(tmp_path / 'none')

  def test_empty_folder(self, tmp_path):
    with pytest.raises(ValueError, match='No category found .* found nothing'):
      folder.MVTEC.list_categories(tmp_path)

  def test_category_instead_of_its_parent(self, root):
    with pytest.raises(ValueError, match="is itself a category.*'nut'"):
      folder.MVTEC.list_categories(root / 'nut')


class TestLoadCategory:

  def test_sorted_and_labelled(self, root):
    nut = folder.MVTEC.load_category(root, 'nut')
    assert [e.image_path for e in nut.train] == [
        str(root / 'nut/train/good' / n) for n in ('a.PNG', 'b.png')]
    assert [(e.defect, e.label, e.image_path[-6:]) for e in nut.test] == [
        ('bent', 1, '/0.tif'), ('bent', 1, '1.webp'), ('good', 0, '/0.jpg')]
    assert [[m[-10:] for m in e.mask_paths] for e in nut.test] == [['0_mask.png'], ['bent/1.png'], []]
    assert nut.has_masks

  def test_a_category_without_masks(self, root):
    bolt = folder.MVTEC.load_category(root, 'bolt')
    assert not bolt.has_masks and bolt.test[0].mask_paths == ()

  def test_one_missing_mask_is_named(self, root):
    (root / 'nut/ground_truth/bent/1.png').unlink()
    with pytest.raises(ValueError, match='No mask for .*1.webp: expected .*1_mask.png'):
      folder.MVTEC.load_category(root, 'nut')

  def test_unknown_category_lists_those_there_are(self, root):
    with pytest.raises(ValueError, match="No category 'screw' .* There are: bolt, nut"):
      folder.MVTEC.load_category(root, 'screw')

  def test_no_good_images(self, root):
    with pytest.raises(ValueError, match='has no train/good folder'):
      folder.MVTEC.load_category(root, 'empty')
    (root / 'bolt/train/good/0.bmp').unlink()
    with pytest.raises(ValueError, match='No images in .*found nothing'):
      folder.MVTEC.load_category(root, 'bolt')

  def test_no_test_images(self, root):
    (root / 'bolt/test/bent/0.png').unlink()
    with pytest.raises(ValueError, match='No images in .*test'):
      folder.MVTEC.load_category(root, 'bolt')


def _touch(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def _seen(category, root):
  """(train, test) as (path below root, label, kind)."""
  return tuple([(e.image_path.removeprefix(f'{root}/'), e.label, e.defect) for e in split]
               for split in (category.train, category.test))


class TestGoodFolders:

  @pytest.mark.parametrize('train, test, told', [
      ('good', 'good', False), ('OK', 'OK', True), ('good', 'Good', True), ('Normal', 'ok', True)])
  def test_usual_names_are_known_and_told(self, train, test, told, tmp_path):
    _touch(tmp_path, f'a/train/{train}/0.png', f'a/test/{test}/1.png', 'a/test/NG/2.png')
    assert folder.MVTEC.list_categories(tmp_path) == ['a']
    category = folder.MVTEC.load_category(tmp_path, 'a')
    seen = _seen(category, tmp_path / 'a')
    assert seen[0] == [(f'train/{train}/0.png', 0, 'good')]
    assert sorted(seen[1]) == sorted([('test/NG/2.png', 1, 'NG'), (f'test/{test}/1.png', 0, 'good')])
    assert category.notes == (
        (f'good parts are those in {tmp_path}/a/train/{train}, {tmp_path}/a/test/{test}',) if told else ())

  def test_own_names(self, tmp_path):
    _touch(tmp_path, 'a/train/golden/0.png', 'a/test/Golden/1.png', 'a/test/good/2.png')
    with pytest.raises(ValueError, match=r'train has images, and no folder .*, found golden. .*--good NAME'):
      folder.MVTEC.list_categories(tmp_path)
    with pytest.raises(ValueError, match='train has images'):
      folder.MVTEC.load_category(tmp_path, 'a')
    layout = folder.FolderLayout(good=('golden',))
    assert layout.list_categories(tmp_path) == ['a']
    category = layout.load_category(tmp_path, 'a')
    assert [e.label for e in category.test] == [0, 1] and category.notes == ()

  def test_no_category_is_dropped_in_silence(self, root):
    _touch(root, 'odd/train/parts/0.png', 'notes/readme.txt')
    with pytest.raises(ValueError, match=r'odd/train has images, and no folder of good parts.*found parts'):
      folder.MVTEC.list_categories(root)

  def test_several_in_a_split_all_count_and_are_told(self, tmp_path):
    _touch(tmp_path, 'a/train/good/0.png', 'a/test/good/1.png', 'a/test/OK/2.png', 'a/test/NG/3.png')
    category = folder.MVTEC.load_category(tmp_path, 'a')
    assert [e.label for e in category.test] == [1, 0, 0]
    (note,) = category.notes
    assert note.endswith(f'{tmp_path}/a/test/OK, {tmp_path}/a/test/good')

  def test_none_in_the_test_split_is_told(self, tmp_path):
    _touch(tmp_path, 'a/train/good/0.png', 'a/test/bent/1.png', 'a/test/fine/2.png')
    (note,) = folder.MVTEC.load_category(tmp_path, 'a').notes
    assert note.startswith('no good image in ') and 'all of bent, fine count as defective' in note


class TestWhatIsNoData:

  def test_hidden_folders_are_no_kinds_and_no_categories(self, root):
    before = folder.MVTEC.load_category(root, 'nut')
    _touch(root, 'nut/test/.ipynb_checkpoints/0-checkpoint.png', 'nut/train/good/.ipynb_checkpoints/a.png',
           'nut/test/bent/._0.png', 'nut/test/__MACOSX/0.png', '__MACOSX/train/good/0.png',
           '.cache/train/good/0.png', 'nut/ground_truth/.ipynb_checkpoints/0_mask.png',
           'nut/ground_truth/bent/._0_mask.png')
    after = folder.MVTEC.load_category(root, 'nut')
    assert after[:4] == before[:4] and folder.MVTEC.list_categories(root) == ['bolt', 'nut']
    (note,) = after.notes
    assert note.startswith('not read, hidden: 5 (')

  def test_what_is_not_read_is_told(self, root):
    _touch(root, 'nut/validation/good/0.png', 'nut/train/bad/1.png', 'nut/test/loose.png',
           'nut/test/bent/c.avi')
    unread, hidden, others = folder.MVTEC.load_category(root, 'nut').notes
    assert unread == 'not read: test (1), train/bad (1), validation/good (1)'
    assert hidden == 'not read, hidden: 1 (train/good/.hidden.png)'
    assert others == 'not read, because of their names: 1 .avi video (test/bent/c.avi)'


class TestDeeperAndPages:

  def test_images_below_a_kind_have_masks_in_the_same_folders(self, tmp_path):
    _touch(tmp_path, 'a/train/good/x/0.png', 'a/test/bent/cam1/1.png', 'a/test/bent/cam2/1.png',
           'a/ground_truth/bent/cam1/1_mask.png', 'a/ground_truth/bent/cam2/1_MASK.PNG')
    category = folder.MVTEC.load_category(tmp_path, 'a')
    assert _seen(category, tmp_path / 'a')[0] == [('train/good/x/0.png', 0, 'good')]
    masks = [e.mask_paths[0].removeprefix(f'{tmp_path}/a/ground_truth/bent/') for e in category.test]
    assert masks == ['cam1/1_mask.png', 'cam2/1_MASK.PNG']
    assert not category.unused_masks
    (tmp_path / 'a/ground_truth/bent/cam2/1_MASK.PNG').unlink()
    with pytest.raises(ValueError, match='No mask for .*cam2/1.png: expected .*bent/cam2/1_mask.png'):
      folder.MVTEC.load_category(tmp_path, 'a')

  def test_pages_are_images_and_have_the_same_pages_of_their_masks(self, tmp_path):
    for name, pages in (('train/good/a.tif', 2), ('test/bent/b.tif', 3), ('ground_truth/bent/b_mask.tif', 3)):
      (tmp_path / 'a' / name).parent.mkdir(parents=True, exist_ok=True)
      images = [Image.new('L', (8, 6), i) for i in range(pages)]
      images[0].save(tmp_path / 'a' / name, save_all=True, append_images=images[1:])
    category = folder.MVTEC.load_category(tmp_path, 'a')
    assert [e.image_path[-7:] for e in category.train] == ['a.tif#1', 'a.tif#2']
    assert [(e.image_path[-7:], e.mask_paths[0][-12:]) for e in category.test] == [
        (f'b.tif#{i}', f'b_mask.tif#{i}') for i in (1, 2, 3)]
    assert not category.unused_masks
    mask = tmp_path / 'a/ground_truth/bent/b_mask.tif'
    Image.new('L', (8, 6)).save(mask)
    with pytest.raises(ValueError, match='b_mask.tif has 1 page, and its image .*b.tif has 3: expected'):
      folder.MVTEC.load_category(tmp_path, 'a')
    mask.unlink()
    _touch(tmp_path, *(f'a/ground_truth/bent/b#{i}_mask.png' for i in (1, 2, 3)))
    assert [e.mask_paths[0][-12:] for e in folder.MVTEC.load_category(tmp_path, 'a').test] == [
        f'b#{i}_mask.png' for i in (1, 2, 3)]


class TestSetting:

  def test_the_name_of_the_good_folder(self, tmp_path):
    _touch(tmp_path, 'a/train/golden/0.png', 'a/test/golden/1.png', 'a/test/x/2.png', 'b/train/good/0.png',
           'b/test/good/1.png')
    spec = DataSpec(root=str(tmp_path), good=('golden', 'good'))
    assert [c.name for c in data.load_categories(data.located(spec))] == ['a', 'b']
    with pytest.raises(ValueError, match='--good NAME'):
      data.located(DataSpec(root=str(tmp_path)))
    chosen = data.located(DataSpec(root=str(tmp_path), categories=('b',)))  # the other one is no matter then
    assert [c.name for c in data.load_categories(chosen)] == ['b']
    with pytest.raises(ValueError, match="'visa' says by other means what is good"):
      data.located(DataSpec('visa', str(tmp_path), good=('golden',)))
