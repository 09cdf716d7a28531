"""Files that appear whole."""

import pytest

from patchcore_jax import atomic_files


class TestWritten:

  def test_replaces_in_one_step(self, tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    with atomic_files.written(path) as aside:
      aside.write_text('new')
      assert path.read_text() == 'old'
    assert path.read_text() == 'new' and [p.name for p in tmp_path.iterdir()] == ['a.txt']

  @pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
  def test_an_error_leaves_what_was_there(self, tmp_path, error):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    with pytest.raises(error), atomic_files.written(path) as aside:
      aside.write_text('ne')
      raise error
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_what_cannot_be_written_is_known_before(tmp_path):
  atomic_files.check_place(tmp_path / 'not/there/yet')
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='Cannot write to .*file/bank: .*choose another --out'):
    atomic_files.check_place(tmp_path / 'file/bank')
