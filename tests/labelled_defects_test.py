"""Labelled defects, of which some methods learn, or that pass for good images: how they come in, and that
none is counted twice or lost."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

import patchcore_jax as pc
from patchcore_jax.banks import provenance
from patchcore_jax.data import folder
from patchcore_jax.data.dataset import ArrayData
from patchcore_jax.detectors import Run, cross_fitting
from patchcore_jax.evaluation.images import Images
from patchcore_jax.evaluation.settings import Settings
from patchcore_jax.learned import loop
from patchcore_jax.settings import DataSpec, Preprocessing, SearchSpec
from tests import command, small, trained
from tests.trained import MeanImage, defective, parts


@dataclasses.dataclass(frozen=True)
class Labelled(MeanImage):
  """Learns the mean of all images, and reports as its loss how many of a step are labelled as defects."""

  name: ClassVar[str] = 'tests.labelled_defects_test:Labelled'
  method: ClassVar[str] = 'tests.labelled_defects_test'
  uses_defects: ClassVar[bool] = True

  size: int = 32
  batch_size: int = 4
  steps: int = 2


@functools.lru_cache
def method(detector):
  made = trained.method(detector)

  def step(state, examples, key):
    state, _ = made.task.step(state, examples['image'], key)
    return state, {'loss': examples['label'].mean()}

  return made._replace(task=loop.Task(made.task.init, step))


GOOD, (BAD, _) = parts(8, 32), defective(3, 32)
# Not the good ones first.
LABELS = [0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0]
IMAGES = np.zeros((11, 32, 32, 3), np.uint8)
IMAGES[np.array(LABELS) == 0], IMAGES[np.array(LABELS) == 1] = GOOD, BAD
DATA = ArrayData(IMAGES, 4, names=[f'{i}.png' for i in range(11)], labels=LABELS)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A data set of one category: 8 good images to train on; 3 good ones and 5 defects to test."""
  folder_of = tmp_path_factory.mktemp('data')
  bad, masks = defective(5, 32, seed=4)
  for name, images in (('train/good', GOOD), ('test/good', parts(3, 32, seed=3)), ('test/square', bad)):
    (folder_of / 'part' / name).mkdir(parents=True)
    for i, image in enumerate(images):
      Image.fromarray(image).save(folder_of / 'part' / name / f'{i}.png')
  (folder_of / 'part/ground_truth/square').mkdir(parents=True)
  for i, mask in enumerate(masks):
    Image.fromarray(np.uint8(255 * mask)).save(folder_of / 'part/ground_truth/square' / f'{i}_mask.png')
  return folder_of


class TestContract:

  def test_all_are_learned_from_and_told_apart(self):
    model = Labelled(batch_size=11).fit(DATA, (), Run(keep_images=True))
    np.testing.assert_allclose(model.arrays['losses'], 3 / 11, rtol=1e-6)  # each image once a step
    found = model.description
    assert (found.num_images, found.num_defects, found.num_skipped) == (8, 3, 0)
    assert found.images == tuple(f'{i}.png' for i in range(11) if not LABELS[i])
    assert len(provenance.thumbnails(model)) == 8

  def test_only_good_ones_are_held_out(self):
    model = Labelled(batch_size=7, held_out=0.5).fit(DATA, ())
    np.testing.assert_allclose(model.arrays['losses'], 3 / 7, rtol=1e-6)

  def test_thresholds_are_of_good_ones_alone(self):
    detector = Labelled()
    _, scores = detector.fit_and_cross_score(DATA, (), folds=2)
    assert scores.image.shape == scores.map_maxima.shape == (8,)
    fold_of = np.random.default_rng(0).permutation(np.arange(8) % 2)
    good, bad = np.flatnonzero(np.equal(LABELS, 0)), np.flatnonzero(LABELS)
    for fold in range(2):
      model = detector.fit(DATA.part([*good[fold_of != fold], *bad]), ())
      found = cross_fitting.score_maxima(
          detector, model, DATA.part(good[fold_of == fold]), (), SearchSpec())
      np.testing.assert_allclose(scores.image[fold_of == fold], found.image, rtol=1e-5)

  def test_methods_without_use_for_them_refuse_them(self):
    for detector, networks in ((pc.PaDiM(num_dims=6), (small.backbone(),)), (MeanImage(size=32), ())):
      with pytest.raises(ValueError, match=f'^3 of the training images are labelled as .*{detector.title}'):
        detector.fit(DATA, networks)
      with pytest.raises(ValueError, match='labelled as defects'):
        detector.fit_and_cross_score(DATA, networks, folds=2)

  def test_a_method_that_needs_some_says_so(self):
    with pytest.raises(ValueError, match='learns from labelled defects too, and there are none'):
      Labelled().fit(ArrayData(GOOD), ())
    with pytest.raises(ValueError, match='^No images'):
      Labelled().fit(ArrayData(BAD, labels=[1, 1, 1]), ())


class TestFit:

  def test_arrays(self):
    inspector = pc.fit(GOOD, defects=BAD, detector=Labelled())
    found = inspector.model.description
    assert (found.num_images, found.num_defects) == (8, 3)
    assert len(found.calibration.image_scores) == 8
    assert found.history[-1].what == 'fitted on 8 images and 3 defects'

  def test_files(self, root):
    inspector = pc.fit(root / 'part/train/good', defects=root / 'part/test/square', detector=Labelled())
    found = inspector.model.description
    assert (found.num_images, found.num_defects) == (8, 5)
    assert len(found.images) == len(found.calibration.image_scores) == 8

  @pytest.mark.parametrize('good, bad, words', [
      (GOOD, BAD[:, :16], 'The defects are of shape .*expected one height'),
      (GOOD, 'bad', 'as an array and as files')])
  def test_others_than_the_good_ones(self, good, bad, words):
    with pytest.raises(ValueError, match=words):
      pc.fit(good, defects=bad, detector=Labelled())

  def test_files_that_are_good_too(self, root):
    with pytest.raises(ValueError, match='^3 files are given as good and as defects, such as .*0.png'):
      pc.fit(str(root / 'part/test/*/*.png'), defects=root / 'part/test/good', detector=Labelled())

  def test_refused_before_anything_is_read(self, root):
    with pytest.raises(ValueError, match='5 of the training images are labelled as defects'):
      pc.fit(root / 'part/train/good', defects=root / 'part/test/square', detector='ae_ssim')

  def test_command(self, root, tmp_path):
    arguments = ('fit', root / 'part/train/good', '--defects', root / 'part/test/square', '--folds', 2)
    name = f'{Labelled.name}'
    said = command.run(*arguments, '--detector', name, '--out', tmp_path / 'model')
    assert said.code == 0, said.err
    assert '5 of them are labelled defects' in said.err + said.out
    assert pc.load(tmp_path / 'model').model.description.num_defects == 5
    said = command.run(*arguments, '--detector', 'ae_ssim', '--out', tmp_path / 'none')
    assert said.code != 0 and 'expected good images only' in said.err
    said = command.run(*arguments[:2], '--detector', name, '--out', tmp_path / 'none')
    assert said.code != 0 and 'learns from labelled defects too' in said.err


class TestEvaluation:

  def settings(self, root, share=0.25, detector=None, **data):
    return Settings(DataSpec(root=str(root), labelled_defects=share, **data), detector or Labelled(),
                    preprocessing=Preprocessing(resize=(), crop=()))

  def test_drawn_from_the_test_images_and_gone_from_there(self, root):
    category, settings = folder.MVTEC.load_category(root, 'part'), self.settings(root)
    images = Images(settings, category)
    assert len(images.defects) == 2 and all(example.label for example in images.defects)
    assert list(images.train.examples) == [*category.train, *images.defects]
    assert sorted([*images.test.examples, *images.defects]) == sorted(category.test)
    assert Images(settings, category).defects == images.defects
    draws = {tuple(e.image_path for e in Images(self.settings(root, draw=i), category).defects)
             for i in range(8)}
    assert len(draws) > 1
    assert len(Images(self.settings(root, 0.02), category).defects) == 1  # the least
    assert not Images(self.settings(root, 0, MeanImage()), category).defects

  def test_counted_and_told(self, root, tmp_path):
    preprocessing = Preprocessing(resize=(), crop=())
    with pytest.warns(UserWarning, match='2 defects are learned from, and are no test images .*: 2 square'):
      (row,) = pc.evaluate(
          root, detector=Labelled(), labelled_defects=0.25, preprocessing=preprocessing, out=tmp_path)
    assert (row['num_train'], row['num_defects'], row['num_test'], row['num_skipped']) == (8, 2, 6, 0)
    assert row['num_leaked'] == 0 and row['image_auroc'] is not None
    # It goes on, from the file.
    assert pc.evaluate(root, detector=Labelled(), labelled_defects=0.25, preprocessing=preprocessing,
                       out=tmp_path)[0]['num_defects'] == 2
    with pytest.raises(ValueError, match='data.labelled_defects was 0.25, now 0.5'):
      pc.evaluate(root, detector=Labelled(), labelled_defects=0.5, preprocessing=preprocessing, out=tmp_path)

  def test_errors(self, root):
    category = folder.MVTEC.load_category(root, 'part')
    with pytest.raises(ValueError, match=r'=0.7: 6 of the 5 defects among the test images of part .*fewer'):
      Images(self.settings(root, 0.7), category)
    with pytest.raises(ValueError, match='labelled_defects=1.5: expected 0 to 1'):
      self.settings(root, 1.5)
    with pytest.raises(ValueError, match='labelled_defects=0.25: Mean image .* good images only'):
      self.settings(root, detector=MeanImage())
    with pytest.raises(ValueError, match='labelled defects too, and there are none'):
      self.settings(root, 0)


class TestNoise:
  """Defects that pass for good training images."""

  def images(self, root, noise, **data):
    settings = Settings(DataSpec(root=str(root), noise=noise, **data), MeanImage(),
                        preprocessing=Preprocessing(resize=(), crop=()))
    return Images(settings, folder.MVTEC.load_category(root, 'part'))

  def test_drawn_from_the_test_images_and_gone_from_there(self, root):
    category, images = folder.MVTEC.load_category(root, 'part'), self.images(root, 0.49)
    assert len(images.noise) == 3  # of 8, rounded down
    assert list(images.train.examples) == [*category.train, *images.noise]
    assert not any(example.label for example in images.train.examples)
    drawn = [example._replace(label=1) for example in images.noise]
    assert sorted([*images.test.examples, *drawn]) == sorted(category.test)
    assert self.images(root, 0.49).noise == images.noise
    assert len({tuple(self.images(root, 0.49, draw=i).noise) for i in range(8)}) > 1
    assert not self.images(root, 0).noise

  def test_counted_and_named(self, root, tmp_path):
    given = {'detector': MeanImage(size=32, batch_size=4, steps=2), 'out': tmp_path,
             'preprocessing': Preprocessing(resize=(), crop=())}
    with pytest.warns(UserWarning, match=r'2 anomalous images are trained on .*: square/\d.png, square/'):
      (row,) = pc.evaluate(root, noise=0.25, **given)
    assert (row['num_train'], row['num_noise'], row['num_test'], row['num_leaked']) == (10, 2, 6, 0)
    assert pc.evaluate(root, noise=0.25, **given)[0]['num_noise'] == 2  # from the file
    with pytest.raises(ValueError, match='data.noise was 0.25, now 0.5'):
      pc.evaluate(root, noise=0.5, **given)

  @pytest.mark.parametrize('noise, words', [
      (0.1, '0 of the 5 anomalous test images of part would join the 8 training images'),
      (0.7, '5 of the 5 anomalous test images'), (1.5, 'data.noise=1.5: expected 0 to 1')])
  def test_errors(self, root, noise, words):
    with pytest.raises(ValueError, match=words):
      self.images(root, noise)
