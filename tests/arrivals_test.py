"""Files that arrive."""

import itertools
import os
import threading
import time

import pytest

from patchcore_jax.data import arrivals


def _start(where, **kwargs):
  """The generator, and an event that stops it."""
  stop = threading.Event()
  return arrivals.arriving(where, stop=stop, **({'settle': 0.1, 'settle_empty': 0.3} | kwargs)), stop


def _take(generator, seconds=1.0):
  """What comes in that time."""
  end, found = time.monotonic() + seconds, []
  for path in generator:
    if path is not None:
      found.append(os.path.basename(path))
    elif time.monotonic() > end:
      break
  return found


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch):
  monkeypatch.setattr(arrivals, '_POLL', 0.02)


class TestArriving:

  def test_what_is_there_and_what_comes_each_once(self, tmp_path):
    for name in ('b.png', 'a.jpg', 'notes.txt', '.hidden.png'):
      (tmp_path / name).write_bytes(b'1')
    generator, _ = _start(tmp_path)
    assert _take(generator, 0.3) == ['a.jpg', 'b.png']
    (tmp_path / 'c.png').write_bytes(b'1')
    assert _take(generator, 0.3) == ['c.png']

  def test_a_growing_file_is_taken_when_it_stands_still(self, tmp_path):
    generator, _ = _start(tmp_path, settle=0.25)
    path = tmp_path / 'a.png'
    for i in range(5):
      path.write_bytes(b'1' * (i + 1))
      assert _take(generator, 0.08) == []
    assert _take(generator, 0.5) == ['a.png']

  def test_a_file_that_changed_later_is_taken_again(self, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'half')
    generator, _ = _start(tmp_path)
    assert _take(generator, 0.3) == ['a.png']
    (tmp_path / 'a.png').write_bytes(b'half and whole')
    assert _take(generator, 0.3) == ['a.png']

  def test_an_empty_file_is_given_more_time(self, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'')
    generator, _ = _start(tmp_path)
    began = time.monotonic()
    assert next(path for path in generator if path is not None).endswith('a.png')
    assert time.monotonic() - began >= 0.3

  def test_a_file_that_came_again_is_taken_again(self, tmp_path):
    (tmp_path / 'a.png').write_bytes(b'1')
    generator, _ = _start(tmp_path)
    assert _take(generator, 0.3) == ['a.png']
    (tmp_path / 'a.png').unlink()
    assert _take(generator, 0.1) == []
    (tmp_path / 'a.png').write_bytes(b'1')
    assert _take(generator, 0.3) == ['a.png']

  def test_a_pattern_looks_into_new_folders(self, tmp_path):
    generator, _ = _start(str(tmp_path / '**' / '*.png'))
    assert _take(generator, 0.1) == []
    (tmp_path / 'today').mkdir()
    (tmp_path / 'today' / 'a.png').write_bytes(b'1')
    assert _take(generator, 0.3) == ['a.png']

  def test_a_folder_is_looked_at_with_all_below(self, tmp_path):
    (tmp_path / '.hidden').mkdir()
    (tmp_path / '.hidden/a.png').write_bytes(b'1')
    (tmp_path / 'loop').symlink_to('.')
    generator, _ = _start(tmp_path)
    assert _take(generator, 0.1) == []
    (tmp_path / 'today/line[2]').mkdir(parents=True)
    (tmp_path / 'today/line[2]/a.png').write_bytes(b'1')
    (tmp_path / 'b.png').write_bytes(b'1')
    assert _take(generator, 0.3) == ['b.png', 'a.png']

  def test_what_looks_like_images_and_is_not_read_is_told_once(self, tmp_path):
    said = []
    generator, _ = _start(tmp_path, notify=said.append)
    for name in ('a.avi', 'b.txt', 'c.heic'):
      (tmp_path / name).write_bytes(b'1')
    assert _take(generator, 0.3) == []
    assert said == ['not read, because of their names: 1 .avi video (a.avi), 1 .heic (c.heic).']
    (tmp_path / 'd.avi').write_bytes(b'1')
    assert _take(generator, 0.2) == [] and said[1:] == [
        'not read, because of their names: 1 .avi video (d.avi).']

  def test_what_is_left_at_the_end_is_told(self, tmp_path):
    said = []
    for name in 'abc':
      (tmp_path / f'{name}.png').write_bytes(b'1')
    generator, stop = _start(tmp_path, notify=said.append)
    assert next(path for path in generator if path is not None).endswith('a.png')
    stop.set()
    assert list(generator) == []
    assert said == [f'2 images have arrived and not been looked at, such as {tmp_path / "b.png"}.']

  def test_ends_after_its_time_and_when_it_is_stopped(self, tmp_path):
    began = time.monotonic()
    assert set(_start(tmp_path, seconds=0.2)[0]) == {None}
    assert 0.2 <= time.monotonic() - began < 1
    generator, stop = _start(tmp_path)
    assert list(itertools.islice(generator, 3)) == [None] * 3
    stop.set()
    assert list(generator) == []

  def test_a_folder_that_goes_away_is_said_once_and_awaited(self, tmp_path):
    folder, said = tmp_path / 'share', []
    folder.mkdir()
    (folder / 'a.png').write_bytes(b'1')
    generator, _ = _start(folder, notify=said.append)
    assert _take(generator, 0.3) == ['a.png']
    folder.rename(tmp_path / 'away')
    assert _take(generator, 0.2) == [] and len(said) == 1 and 'still waiting' in said[0]
    (tmp_path / 'away').rename(folder)
    (folder / 'b.png').write_bytes(b'1')
    assert _take(generator, 0.3) == ['b.png']  # not a.png again

  def test_no_folder(self, tmp_path):
    with pytest.raises(ValueError, match='is no folder'):
      _start(tmp_path / 'none')
