"""The images of a fit, of files and of an array: read as often as wanted, in any order, changed or not."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from patchcore_jax.data.dataset import ArrayData, FileData
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.settings import Preprocessing
from tests import small

IMAGES = small.images(7)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  root, examples = tmp_path_factory.mktemp('files'), []
  for i, image in enumerate(IMAGES):
    path = root / f'{i}.png'
    Image.fromarray(image).save(path)
    examples.append(Example(str(path), (), 0, 'line', 'good'))
  return FileData(examples, Preprocessing(resize=(), crop=()), 3)


@pytest.fixture(params=['array', 'files'])
def data(request):
  if request.param == 'files':
    return request.getfixturevalue('files')
  return ArrayData(IMAGES, 3, [f'{i}.png' for i in range(7)])


def read(batches):
  """Images by their position in the examples, in the order in which they came."""
  return {int(i): image for batch in batches for i, image in zip(batch.index, batch.image) if i >= 0}


def assert_same(found, expected):
  assert list(found) == list(expected)
  np.testing.assert_array_equal(list(found.values()), list(expected.values()))


def noise(rng, image):
  return np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def test_every_image_once_in_batches_of_one_shape(data):
  assert len(data) == len(data.examples) == 7
  for _ in range(2):  # as often as wanted
    batches = list(data.batches())
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert all(batch.image.shape == (3, 32, 24, 3) and batch.image.dtype == np.uint8 for batch in batches)
    assert_same(read(batches), dict(enumerate(IMAGES)))


def test_shuffled_by_a_seed(data):
  order = list(read(data.batches(shuffle=1)))
  assert sorted(order) == list(range(7)) != order
  assert_same(read(data.batches(shuffle=1)), {i: IMAGES[i] for i in order})
  assert list(read(data.batches(shuffle=2))) != order


@pytest.mark.parametrize('shuffle', [None, 5])
def test_augmented_by_the_seed_and_the_image_alone(data, shuffle):
  changed = read(data.batches(shuffle=shuffle, augment=noise))
  assert all((changed[i] != IMAGES[i]).any() for i in range(7))
  assert_same(read(data.batches(shuffle=shuffle, augment=noise)), changed)
  other_batches = dataclasses.replace(data, batch_size=2)
  assert_same(read(other_batches.batches(shuffle=shuffle, augment=noise)), changed)
  other_seed = read(data.batches(shuffle=6, augment=noise))
  assert all((changed[i] != other_seed[i]).any() for i in range(7))


def test_padding_is_not_augmented(data):
  *_, last = data.batches(augment=lambda rng, image: image + 1)
  assert not last.image[1:].any()


def test_part(data):
  part = data.part([5, 1, 2, 3])
  assert [e.image_path for e in part.examples] == [data.examples[i].image_path for i in (5, 1, 2, 3)]
  assert_same(read(part.batches()), dict(enumerate(IMAGES[[5, 1, 2, 3]])))
  assert list(data.part([]).batches()) == [] == list(data.part([]).examples)


def test_files_that_cannot_be_read(files, tmp_path):
  (tmp_path / 'damaged.png').write_bytes(b'none')
  examples = [*files.examples[:2], Example(str(tmp_path / 'damaged.png'), (), 0, 'line', 'good'),
              *files.examples[2:]]
  data = dataclasses.replace(files, examples=examples)
  with pytest.raises(ImageError, match='damaged.png'):
    list(data.batches())
  skipped = []
  data = dataclasses.replace(data, on_error=skipped.append)
  found = read(data.batches())
  assert list(found) == [0, 1, 3, 4, 5, 6, 7] and len(skipped) == 1
  np.testing.assert_array_equal(list(found.values()), IMAGES)
  assert 2 not in read(data.batches(shuffle=3, augment=noise))


def test_images_at_hand_may_have_no_names():
  data = ArrayData(IMAGES)
  assert data.preprocessing is None and {e.image_path for e in data.examples} == {''}
  assert len(data.part([0, 3]).examples) == 2
