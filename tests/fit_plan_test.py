"""Which way to fit is chosen, and what is said of it."""

import pytest

from patchcore_jax.detectors.patchcore import fit_plan

# 7,000 images at 224 px: 22.5 GB of embeddings, 2.8 GB of points, 0.2 GB of state and bank each.
LARGE = (5_488_000, 54_880, 1024, 128)


class TestPlan:

  @pytest.mark.parametrize('memory_gb, on_disk, points_on_disk, stream', [
      (100, False, False, False), (28, False, False, False), (8, True, False, False),
      (5, True, False, False), (2, True, True, True)])
  def test_less_memory_more_disk(self, memory_gb, on_disk, points_on_disk, stream):
    plan = fit_plan.plan(*LARGE, memory_gb=memory_gb, base_bytes=500_000_000)
    assert (plan.embeddings_on_disk, plan.points_on_disk, plan.stream) == (
        on_disk, points_on_disk, stream)
    assert plan.memory_bytes <= memory_gb * 1e9
    embeddings, points = 5_488_000 * 1024 * 4, 5_488_000 * 128 * 4
    assert plan.disk_bytes == on_disk * embeddings + points_on_disk * points
    if not on_disk:
      assert plan.memory_bytes > embeddings

  def test_folds_take_more_and_stay_within_the_memory(self):
    plain, folds = (
        fit_plan.plan(*LARGE, memory_gb=64, folds=folds).memory_bytes for folds in (False, True))
    assert folds - plain >= 4 * LARGE[1] * LARGE[2]  # another bank
    assert fit_plan.plan(*LARGE, memory_gb=8, folds=True).memory_bytes <= 8e9

  def test_several_folds_at_once_as_far_as_memory_allows(self, monkeypatch):
    monkeypatch.setattr(fit_plan.os, 'cpu_count', lambda: 4)
    one, few, all_ = (fit_plan.plan(*LARGE, memory_gb=gb, folds=5) for gb in (5.2, 6, 64))
    assert one.folds_at_once == 1 and 1 < few.folds_at_once < 4 and few.memory_bytes <= 6e9
    assert all_.folds_at_once == 4 and fit_plan.plan(*LARGE, memory_gb=64).folds_at_once == 1
    assert fit_plan.plan(*LARGE, memory_gb=64, folds=5, device_bytes=80 * 10**9).folds_at_once == 1

  def test_points_that_devices_cannot_hold_are_streamed(self):
    large, small = 80 * 10**9, 4 * 10**9
    assert not fit_plan.plan(*LARGE, memory_gb=64, device_bytes=large).stream
    assert fit_plan.plan(*LARGE, memory_gb=64, device_bytes=small).stream
    assert not fit_plan.plan(*LARGE, memory_gb=64, device_bytes=small, num_devices=8).stream

  def test_embeddings_stay_on_a_device_that_can_hold_them(self):
    large = fit_plan.plan(*LARGE, memory_gb=8, device_bytes=140 * 10**9)
    assert large.embeddings_on_device and not large.disk_bytes
    assert 22.5e9 + 3 * 2.8e9 < large.device_bytes < 35e9
    assert str(large).endswith(f'none of disk for a time, {large.device_bytes / 1e9:.1f} GB on each device')
    small = fit_plan.plan(*LARGE, memory_gb=64, device_bytes=24 * 10**9)
    assert not small.embeddings_on_device and small.device_bytes < 0.85 * 24e9
    several = fit_plan.plan(*LARGE, memory_gb=64, device_bytes=140 * 10**9, num_devices=4)
    assert not several.embeddings_on_device
    assert fit_plan.plan(*LARGE, memory_gb=64).device_bytes == 0  # the host's

  def test_too_little_memory(self):
    with pytest.raises(ValueError, match=r'fit.memory_gb=1: the fit takes at least 1.\d GB.*coreset'):
      fit_plan.plan(*LARGE, memory_gb=1, base_bytes=500_000_000)
    with pytest.raises(ValueError, match=r'9.0 for a batch of images.*lower data.batch_size'):
      fit_plan.plan(*LARGE, memory_gb=8, batch_bytes=9 * 10**9)

  def test_one_line_for_the_user(self):
    assert str(fit_plan.plan(*LARGE, memory_gb=8)) == (
        '54880 of 5488000 patches; about 4.0 GB of memory, 22.5 GB of disk for a time')
    assert str(fit_plan.plan(10, 1, 4, 2, memory_gb=1)).endswith('none of disk for a time')
