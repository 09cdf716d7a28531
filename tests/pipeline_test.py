"""Batches: order, padding, errors, worker processes."""

import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from patchcore_jax.data import pipeline, preprocess
from patchcore_jax.data.folder import Example
from patchcore_jax.data.image_errors import ImageError
from patchcore_jax.settings import Preprocessing

SPEC = Preprocessing(resize=(), crop=(16,))


@pytest.fixture
def examples(tmp_path):
  result = []
  for i in range(7):
    Image.new('RGB', (20, 18), (i, 0, 0)).save(tmp_path / f'{i}.png')
    Image.new('L', (20, 18), 255 * (i % 2)).save(tmp_path / f'{i}_mask.png')
    result.append(Example(
        str(tmp_path / f'{i}.png'), (str(tmp_path / f'{i}_mask.png'),) if i % 2 else (), i % 2,
        'c', 'd'))
  return result


@pytest.mark.parametrize('num_workers', [0, 2])
def test_order_shape_and_padding(examples, num_workers):
  batches = list(pipeline.batches(
      examples, SPEC, batch_size=3, num_workers=num_workers, with_masks=True))
  assert [b.index.tolist() for b in batches] == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
  assert all(b.image.shape == (3, 16, 16, 3) and b.image.dtype == np.uint8 for b in batches)
  assert all(b.mask.shape == (3, 16, 16) and b.mask.dtype == bool for b in batches)
  pixels = np.concatenate([b.image[b.valid] for b in batches])
  np.testing.assert_array_equal(pixels[:, 0, 0, 0], np.arange(7))
  masks = np.concatenate([b.mask[b.valid] for b in batches])
  np.testing.assert_array_equal(masks.all((1, 2)), np.arange(7) % 2 == 1)
  assert not batches[-1].image[1:].any()


def test_no_masks_unless_asked(examples):
  assert all(b.mask is None for b in pipeline.batches(examples, SPEC, batch_size=4))


@pytest.mark.parametrize('num_workers', [0, 1])
def test_unreadable_image_is_raised_by_name(examples, num_workers):
  with open(examples[4].image_path, 'wb') as f:
    f.write(b'nothing')
  with pytest.raises(ImageError, match='4.png'):
    list(pipeline.batches(examples, SPEC, batch_size=3, num_workers=num_workers))


def test_unreadable_images_are_left_out_and_reported(examples):
  for i in (3, 4, 5):  # a whole batch
    with open(examples[i].image_path, 'wb') as f:
      f.write(b'nothing')
  errors = []
  batches = list(pipeline.batches(examples, SPEC, batch_size=3, on_error=errors.append))
  assert [b.index.tolist() for b in batches] == [[0, 1, 2], [6, -1, -1]]
  assert [e.args[0].split('.png')[0][-1] for e in errors] == ['3', '4', '5']


def test_images_of_different_sizes_are_named(examples):
  Image.new('RGB', (30, 18)).save(examples[5].image_path)
  with pytest.raises(ValueError, match=r'0.png has \(18, 20\), .*5.png has \(18, 30\)'):
    list(pipeline.batches(examples, Preprocessing(resize=(), crop=()), batch_size=3))


def test_sizes_must_be_positive(examples):
  with pytest.raises(ValueError, match='batch_size >= 1'):
    list(pipeline.batches(examples, SPEC, batch_size=0))


class TestThreads:

  def test_they_end_with_the_consumer(self, examples):
    before = threading.active_count()
    stream = pipeline.batches(examples, SPEC, batch_size=2)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before

  def test_they_end_with_an_error(self, examples):
    before = threading.active_count()
    examples[0] = examples[0]._replace(image_path='missing.png')
    with pytest.raises(ImageError):
      list(pipeline.batches(examples, SPEC, batch_size=2))
    assert threading.active_count() == before

  def test_what_is_read_ahead_is_bounded(self, examples, monkeypatch):
    begun, load = [], preprocess.load
    monkeypatch.setattr(preprocess, 'load', lambda *a, **k: begun.append(0) or load(*a, **k))
    monkeypatch.setattr(pipeline, '_MOST_THREADS', 1)
    next(stream := pipeline.batches(examples * 9, SPEC, batch_size=2))
    stream.close()
    assert 2 <= len(begun) <= 7  # the batch, and 2 batches and a thread ahead

  def test_they_give_what_worker_processes_give(self, examples):
    with open(examples[4].image_path, 'wb') as f:
      f.write(b'nothing')
    errors = []
    ours, grains = (
        list(pipeline.batches(examples, SPEC, batch_size=3, num_workers=n, with_masks=True,
                              on_error=lambda e: errors.append(str(e)))) for n in (0, 2))
    for one, other in zip(ours, grains, strict=True):
      jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len(errors) == 2 and errors[0] == errors[1]


def test_worker_processes_name_their_extra(examples, monkeypatch):
  monkeypatch.setitem(sys.modules, 'grain', None)
  with pytest.raises(ValueError, match=r"1 processes needs .* grain, .*'patchcore_jax\[workers\]'"):
    list(pipeline.batches(examples, SPEC, batch_size=3, num_workers=1))
