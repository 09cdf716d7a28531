"""Arrays on disk behave as NumPy's, and leave nothing behind."""

import mmap

import numpy as np
import pytest

from patchcore_jax import disk_arrays


class TestDiskArray:

  def test_equals_numpy(self, tmp_path):
    expected = np.random.default_rng(0).standard_normal((50, 3, 4)).astype(np.float32)
    array = disk_arrays.DiskArray(tmp_path, expected.shape)
    array[:20], array[20:] = expected[:20], expected[20:]
    assert array.shape == (50, 3, 4) and len(array) == 50 and array.ndim == 3
    assert array.nbytes == expected.nbytes
    for key in (slice(None), slice(3, 9), 7, [4, 4, 0], np.array([49, 2]), slice(None, None, 7)):
      value = array[key]
      np.testing.assert_array_equal(value, expected[key])
      value[...] = 0  # a copy
    np.testing.assert_array_equal(array[:], expected)

  def test_no_file_is_seen_or_left(self, tmp_path):
    array = disk_arrays.DiskArray(tmp_path, (4, 2))
    assert not list(tmp_path.iterdir())
    assert array[:].tolist() == [[0, 0]] * 4

  def test_too_little_disk(self, tmp_path):
    with pytest.raises(OSError, match=r'4000000.0 GB are needed on the disk .* GB are free'):
      disk_arrays.DiskArray(tmp_path, (10**9, 10**6))

  def test_the_process_stays_small(self, tmp_path):
    array = disk_arrays.DiskArray(tmp_path, (64, 2**20))  # 256 MB
    before = disk_arrays.resident_bytes()
    for i in range(len(array)):
      array[i] = i
    assert all(array[i][-1] == i for i in range(len(array)))
    assert disk_arrays.resident_bytes() - before < 64 * 2**20


class TestView:

  @pytest.mark.parametrize('on_disk', [False, True])
  def test_is_the_beginning_without_a_copy(self, tmp_path, on_disk):
    array = disk_arrays.allocate((5, 2, 3), on_disk=on_disk, folder=tmp_path)
    array[:] = np.arange(30).reshape(5, 2, 3)
    view = disk_arrays.view(array, (8, 3))
    np.testing.assert_array_equal(view[:], np.arange(24).reshape(8, 3))
    array[0] = -1
    assert view[0].tolist() == [-1, -1, -1]


class TestTake:

  @pytest.mark.parametrize('on_disk', [False, True])
  def test_equals_numpy(self, tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr(disk_arrays, '_ROWS', 3)
    array = disk_arrays.allocate((20, 2), on_disk=on_disk, folder=tmp_path)
    array[:] = np.arange(40).reshape(20, 2)
    indices = np.random.default_rng(0).permutation(20)[:10]
    np.testing.assert_array_equal(disk_arrays.read_rows(array, indices), array[indices])


def test_memory_of_the_process():
  before = disk_arrays.resident_bytes()
  # Mapped, not allocated: malloc may hand out pages that an earlier test freed and this process still holds.
  with mmap.mmap(-1, 2**27) as block:
    for _ in range(128):
      block.write(bytes(2**20))
    assert disk_arrays.resident_bytes() >= before + 0.9 * len(block)
  assert disk_arrays.peak_bytes() >= 0.99 * disk_arrays.resident_bytes()  # the system's counts are not exact
