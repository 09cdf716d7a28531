"""Folders in MVTec layout."""

import pytest

from patchcore_jax.data import folder


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
