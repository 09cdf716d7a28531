"""Each layout on a made miniature, from files to labels and masks; no copy of the data sets was at hand."""

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.data import preprocess
from patchcore_jax.data.folder import FolderLayout
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.data.layouts import LAYOUTS
from patchcore_jax.settings import Preprocessing

WHOLE = Preprocessing(resize=(), crop=())


def _image(path, value=0, mode='RGB'):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, (6, 4), value).save(path)


def _mask(path, *columns, value=255):
  """Positive in the given columns."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.zeros((4, 6), np.uint8)
  pixels[:, list(columns)] = value
  Image.fromarray(pixels).save(path)


def _seen(root, examples):
  """(path, defect, label, columns of the mask): what the metrics are computed from."""
  result = []
  for e in examples:
    _, mask = preprocess.load(e, WHOLE, with_mask=True)
    result.append((e.image_path.removeprefix(f'{root}/'), e.defect, e.label,
                   np.flatnonzero(mask.all(0)).tolist()))
  return result


class TestBtad:

  @pytest.fixture
  def root(self, tmp_path):
    root = tmp_path / 'BTech_Dataset_transformed'
    for path in ('01/train/ok/1.bmp', '01/train/ok/0.bmp', '01/test/ok/2.bmp', '01/test/ko/4.bmp',
                 '02/train/ok/0.png', '02/test/ko/1.png'):
      _image(root / path)
    _mask(root / '01/ground_truth/ko/4.png', 2)
    _mask(root / '02/ground_truth/ko/1.bmp', 0)
    return root

  def test_images_and_masks(self, root):
    layout = LAYOUTS['btad']
    assert layout.list_categories(root) == ['01', '02']
    category = layout.load_category(root, '01')
    assert _seen(root, category.train) == [
        ('01/train/ok/0.bmp', 'good', 0, []), ('01/train/ok/1.bmp', 'good', 0, [])]
    assert _seen(root, category.test) == [
        ('01/test/ko/4.bmp', 'ko', 1, [2]), ('01/test/ok/2.bmp', 'good', 0, [])]
    assert category.has_masks
    assert _seen(root, layout.load_category(root, '02').test) == [('02/test/ko/1.png', 'ko', 1, [0])]

  def test_wrong_roots_name_the_right_one(self, root, tmp_path):
    with pytest.raises(ValueError, match=f'but in {root}: pass that folder'):
      LAYOUTS['btad'].list_categories(tmp_path)
    with pytest.raises(ValueError, match=f"Pass the folder above it, {root}, .* '01'"):
      LAYOUTS['btad'].list_categories(root / '01')

  def test_the_usual_layout_knows_such_names_too(self, root):
    usual = LAYOUTS['folder'].load_category(root, '01')
    assert (usual.train, usual.test) == LAYOUTS['btad'].load_category(root, '01')[1:3]
    with pytest.raises(ValueError, match=r"train has images, .* one called good, found ok. .*--good NAME"):
      FolderLayout(good=('good',)).list_categories(root)


class TestMvtecLoco:

  @pytest.fixture
  def root(self, tmp_path):
    for path in ('train/good/000.png', 'validation/good/000.png', 'test/good/000.png',
                 'test/logical_anomalies/000.png', 'test/structural_anomalies/000.png'):
      _image(tmp_path / 'pushpins' / path)
    _mask(tmp_path / 'pushpins/ground_truth/logical_anomalies/000/000.png', 1)
    _mask(tmp_path / 'pushpins/ground_truth/logical_anomalies/000/001.png', 1, 4, value=200)
    _mask(tmp_path / 'pushpins/ground_truth/structural_anomalies/000/000.png', 5)
    return tmp_path

  def test_the_union_of_several_masks_counts_and_validation_is_not_used(self, root):
    category = LAYOUTS['mvtec_loco'].load_category(root, 'pushpins')
    assert _seen(root, category.train) == [('pushpins/train/good/000.png', 'good', 0, [])]
    assert _seen(root, category.test) == [
        ('pushpins/test/good/000.png', 'good', 0, []),
        ('pushpins/test/logical_anomalies/000.png', 'logical_anomalies', 1, [1, 4]),
        ('pushpins/test/structural_anomalies/000.png', 'structural_anomalies', 1, [5])]

  def test_a_missing_mask_is_named(self, root):
    (root / 'pushpins/ground_truth/structural_anomalies/000/000.png').unlink()
    with pytest.raises(ValueError, match=r'No mask for .*expected .*structural_anomalies/000/\*'):
      LAYOUTS['mvtec_loco'].load_category(root, 'pushpins')

  def test_one_mask_of_several_of_another_size_is_named(self, root):
    Image.new('L', (9, 9)).save(root / 'pushpins/ground_truth/logical_anomalies/000/001.png')
    with pytest.raises(ImageError, match='logical_anomalies/000/001.png is 9 x 9 pixels'):
      _seen(root, LAYOUTS['mvtec_loco'].load_category(root, 'pushpins').test)


class TestMvtecAd2:

  @pytest.fixture(params=['can', 'can/can'])
  def root(self, request, tmp_path):
    folder = tmp_path / request.param
    for path in ('train/good/000_regular.png', 'validation/good/000_regular.png',
                 'test_public/good/000_regular.png', 'test_public/bad/000_regular.png',
                 'test_public/bad/000_shift_1.png', 'test_private/000_regular.png'):
      _image(folder / path)
    _mask(folder / 'test_public/ground_truth/bad/000_regular_mask.png', 3)
    _mask(folder / 'test_public/ground_truth/bad/000_shift_1_mask.png', 4)
    return tmp_path

  def test_public_test_images(self, root):
    layout = LAYOUTS['mvtec_ad_2']
    assert layout.list_categories(root) == ['can']
    category = layout.load_category(root, 'can')
    assert len(category.train) == 1 and category.has_masks
    seen = [(path.split('can/')[-1], *rest) for path, *rest in _seen(root, category.test)]
    assert seen == [
        ('test_public/bad/000_regular.png', 'bad', 1, [3]),
        ('test_public/bad/000_shift_1.png', 'bad', 1, [4]),
        ('test_public/good/000_regular.png', 'good', 0, [])]

  def test_no_public_test_images(self, tmp_path):
    _image(tmp_path / 'can/train/good/000_regular.png')
    with pytest.raises(ValueError, match='has no test_public folder: expected test_public/good and'):
      LAYOUTS['mvtec_ad_2'].load_category(tmp_path, 'can')


class TestMpdd:

  def test_it_is_the_mvtec_layout(self, tmp_path):
    for path in ('train/good/0.png', 'test/good/0.png', 'test/hole/0.png'):
      _image(tmp_path / 'bracket_black' / path)
    _mask(tmp_path / 'bracket_black/ground_truth/hole/0_mask.png', 1)
    category = LAYOUTS['mpdd'].load_category(tmp_path, 'bracket_black')
    assert _seen(tmp_path, category.test) == [
        ('bracket_black/test/good/0.png', 'good', 0, []), ('bracket_black/test/hole/0.png', 'hole', 1, [1])]


class TestVisa:

  ROWS = ('object,split,label,image,mask\n'
          'pcb1,train,normal,pcb1/Data/Images/Normal/0002.JPG,\n'
          'pcb1,train,normal,pcb1/Data/Images/Normal/0001.JPG,\n'
          'candle,train,normal,candle/Data/Images/Normal/0001.JPG,\n'
          'candle,test,normal,candle/Data/Images/Normal/0002.JPG,\n'
          'pcb1,test,normal,pcb1/Data/Images/Normal/0003.JPG,\n'
          'pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/Data/Masks/Anomaly/000.png\n')

  @pytest.fixture
  def root(self, tmp_path):
    root = tmp_path / 'VisA'
    for row in self.ROWS.splitlines()[1:]:
      _image(root / row.split(',')[3])
    _mask(root / 'pcb1/Data/Masks/Anomaly/000.png', 2, value=1)  # not 255: the value numbers the defect
    self._write(root, self.ROWS)
    return root

  def _write(self, root, text):
    (root / 'split_csv').mkdir(exist_ok=True)
    (root / 'split_csv/1cls.csv').write_text(text)

  def test_images_and_masks(self, root):
    layout = LAYOUTS['visa']
    assert layout.list_categories(root) == ['candle', 'pcb1']
    category = layout.load_category(root, 'pcb1')
    assert [path for path, *_ in _seen(root, category.train)] == [
        'pcb1/Data/Images/Normal/0001.JPG', 'pcb1/Data/Images/Normal/0002.JPG']
    assert _seen(root, category.test) == [
        ('pcb1/Data/Images/Anomaly/000.JPG', 'anomaly', 1, [2]),
        ('pcb1/Data/Images/Normal/0003.JPG', 'good', 0, [])]
    assert category.has_masks and not layout.load_category(root, 'candle').has_masks

  def test_wrong_roots_name_the_right_one(self, root):
    for wrong in (root.parent, root / 'pcb1', root / 'pcb1/Data', root / 'split_csv'):
      with pytest.raises(ValueError, match=rf'No split file .*1cls.csv. Pass .* data set: {root}\.'):
        LAYOUTS['visa'].list_categories(wrong)

  def test_no_split_file(self, root):
    (root / 'split_csv/1cls.csv').unlink()
    with pytest.raises(ValueError, match='No split file .*1cls.csv. Pass the folder of the extracted'):
      LAYOUTS['visa'].load_category(root, 'pcb1')

  def test_unknown_object(self, root):
    with pytest.raises(ValueError, match="'screw' in .* There are: candle, pcb1"):
      LAYOUTS['visa'].load_category(root, 'screw')

  def test_missing_images_are_counted(self, root):
    (root / 'pcb1/Data/Images/Normal/0003.JPG').unlink()
    (root / 'pcb1/Data/Masks/Anomaly/000.png').unlink()
    with pytest.raises(ValueError, match='2 files that .* missing, .*0003.JPG among'):
      LAYOUTS['visa'].load_category(root, 'pcb1')

  @pytest.mark.parametrize('old, new, words', [
      ('object,split', 'class,split', 'expected the columns object,split,label,image,mask'),
      ('pcb1,test,normal', 'pcb1,val,normal', "line 6: expected split 'train' or 'test'"),
      ('pcb1,test,normal', 'pcb1,test,good', "line 6: expected split .*'good'"),
      ('pcb1,test,anomaly', 'pcb1,train,anomaly', 'anomalies in the test split only'),
      (',pcb1/Data/Masks/Anomaly/000.png', ',', 'and with a mask')])
  def test_bad_split_files(self, old, new, words, root):
    self._write(root, self.ROWS.replace(old, new))
    with pytest.raises(ValueError, match=words):
      LAYOUTS['visa'].load_category(root, 'pcb1')


class TestKolektorSdd2:

  @pytest.fixture
  def root(self, tmp_path):
    root = tmp_path / 'KolektorSDD2'
    for path, *columns in (('train/10000',), ('train/10001', 2), ('train/10002',), ('test/20000',),
                           ('test/20001', 0, 1)):
      _image(root / f'{path}.png')
      _mask(root / f'{path}_GT.png', *columns)
    return root

  def test_the_masks_say_what_is_defective_and_such_training_images_are_left_out(self, root):
    layout = LAYOUTS['kolektor_sdd2']
    assert layout.list_categories(root) == ['kolektor_sdd2']
    category = layout.load_category(root, 'kolektor_sdd2')
    assert _seen(root, category.train) == [
        ('train/10000.png', 'good', 0, []), ('train/10002.png', 'good', 0, [])]
    assert _seen(root, category.test) == [
        ('test/20000.png', 'good', 0, []), ('test/20001.png', 'defect', 1, [0, 1])]
    assert category.has_masks

  def test_wrong_roots_name_the_right_one(self, root):
    for wrong in (root.parent, root / 'train'):
      with pytest.raises(ValueError, match=f'no folders train and test.*data set: {root}'):
        LAYOUTS['kolektor_sdd2'].list_categories(wrong)

  def test_a_missing_mask_is_named(self, root):
    (root / 'test/20000_GT.png').unlink()
    with pytest.raises(ValueError, match='No mask for .*20000.png: expected .*20000_GT.png'):
      LAYOUTS['kolektor_sdd2'].load_category(root, 'kolektor_sdd2')

  def test_a_damaged_mask_is_named(self, root):
    (root / 'test/20000_GT.png').write_bytes(b'nothing')
    with pytest.raises(ImageError, match='20000_GT.png'):
      LAYOUTS['kolektor_sdd2'].load_category(root, 'kolektor_sdd2')

  def test_another_category(self, root):
    with pytest.raises(ValueError, match='There is: kolektor_sdd2'):
      LAYOUTS['kolektor_sdd2'].load_category(root, 'screw')

  def test_nothing_good_to_train_on(self, root):
    for name in ('10000', '10002'):
      _mask(root / f'train/{name}_GT.png', 0)
    with pytest.raises(ValueError, match='No good images in .*train'):
      LAYOUTS['kolektor_sdd2'].load_category(root, 'kolektor_sdd2')


@pytest.mark.parametrize('name', LAYOUTS)
def test_no_such_root(name, tmp_path):
  with pytest.raises(ValueError, match='The data folder .*none does not exist'):
    LAYOUTS[name].list_categories(tmp_path / 'none')
