"""Races, shares of the machine's limits, and what is read out of a profile."""

import time

import jax
import pytest

from experiments import timing
from experiments.timing import Entry, Limits, Profile

_TRACE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #7(Compute,MemcpyD2H)"
    events { metadata_id: 1 duration_ps: 2000000 }
    events { metadata_id: 1 duration_ps: 1000000 }
    events { metadata_id: 2 duration_ps: 500000 }
  }
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "gemm" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2H" } }
}
planes {
  name: "/host:CPU"
  lines { name: "python" events { metadata_id: 1 } events { metadata_id: 2 } }
  event_metadata { key: 1 value { id: 1 name: "cuLaunchKernel" } }
  event_metadata { key: 2 value { id: 2 name: "dispatch" } }
}
"""


class TestRace:

  def test_every_entry_runs_once_more_than_is_counted(self):
    runs = []
    seconds = timing.race({'a': Entry(lambda: runs.append('a')), 'b': Entry(lambda: runs.append('b'))}, 2)
    assert runs == ['a', 'b', 'a', 'b', 'a', 'b']
    assert [len(seconds[name]) for name in 'ab'] == [2, 2]

  def test_times_are_scaled(self):
    values = timing.race({'': Entry(lambda: time.sleep(0.01), scale=100.0)}, 1)['']
    assert values[0] >= 1

  def test_an_entry_that_fails_is_left_out_where_it_may(self):
    entries = {'good': Entry(int), 'bad': Entry(lambda: 1 / 0)}
    failures = {}
    assert list(timing.race(entries, 1, failures)) == ['good']
    assert failures == {'bad': 'ZeroDivisionError: division by zero'}
    with pytest.raises(ZeroDivisionError):
      timing.race(entries, 1)

  def test_share_of_the_limit(self):
    entry = Entry(int, flops={'float32': 2e9, 'bfloat16': 4e9}, traffic=3e9)
    limits = Limits({'float32': 2e9, 'bfloat16': 8e9}, 6e9)
    assert limits.least_seconds(entry) == pytest.approx(1 + 0.5 + 0.5)
    lines = list(timing.table('it', {'a': entry}, {'a': [4.0]}, {}, limits))
    assert '50 %' in lines[-2]


class TestLimits:

  def test_every_precision_is_measured(self):
    limits = timing.limits(small=True)
    assert set(limits.products) == set(timing.PRECISIONS)
    assert min(limits.products.values()) > 0 and limits.copies > 0
    assert jax.__version__ in timing.machine(limits)


class TestProfile:

  def test_what_ran_on_streams_is_counted(self):
    trace = jax.profiler.ProfileData.from_serialized_xspace(
        jax.profiler.ProfileData.text_proto_to_serialized_xspace(_TRACE))
    profile = timing.read_profile([trace])
    assert profile.launches == (2, 1)
    assert profile.kernels['gemm'] == timing.Kernel(2, pytest.approx(3e-6))
    assert profile.calls == {'cuLaunchKernel': 1}
    assert 'gemm' in list(profile.table())[2]

  def test_without_an_accelerator_nothing_is_counted(self):
    if jax.default_backend() == 'cpu':
      assert timing.profile(int).launches == timing.NOT_COUNTED
    assert Profile({}, {}).launches == timing.NOT_COUNTED


def test_a_block_is_stopped_when_its_time_is_over():
  with pytest.raises(TimeoutError), timing.at_most(0.05):
    while True:
      time.sleep(0.01)
  with timing.at_most(10):
    pass
