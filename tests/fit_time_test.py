"""Tests of what a fit says of its time before the long work begins."""

import dataclasses

import jax
import pytest

from patchcore_jax.detectors import Run
from patchcore_jax.detectors.patchcore import fit_time
from patchcore_jax.detectors.patchcore.fit_time import FitTime, Rates, Work
from patchcore_jax.search import slots

WORK = Work(213, 784, 1024, 128, 10_000, folds=5)


class TestEstimate:

  @pytest.mark.parametrize('more', [
      {'num_images': 400}, {'patches': 3136}, {'num_selected': 20_000}, {'folds': 10}, {'stream': True}])
  def test_more_work_takes_longer(self, more):
    more = fit_time.estimate(dataclasses.replace(WORK, **more), Rates())
    assert more.total > 1.1 * fit_time.estimate(WORK, Rates()).total

  @pytest.mark.parametrize('name', [field.name for field in dataclasses.fields(Rates)])
  def test_a_slower_machine_takes_longer(self, name):
    slower = dataclasses.replace(Rates(), **{name: 2 * getattr(Rates(), name)})
    assert fit_time.estimate(WORK, slower).total > fit_time.estimate(WORK, Rates()).total

  def test_stages_are_what_is_done(self):
    found = fit_time.estimate(WORK, Rates(image=0.1), images_left=13)
    assert found.embedding == pytest.approx(1.3)
    assert found.total == found.embedding + found.selection + found.thresholds
    assert fit_time.estimate(dataclasses.replace(WORK, folds=0), Rates()).thresholds == 0
    assert fit_time.estimate(dataclasses.replace(WORK, method='random'), Rates()).selection == 0
    thinned = [fit_time.estimate(dataclasses.replace(WORK, method='thinning', rounds=rounds), Rates())
               for rounds in (100, 10)]
    assert 0 < 9 * thinned[0].selection < thinned[1].selection
    assert thinned[0].thresholds < thinned[1].thresholds

  def test_folds_take_about_as_many_selections(self):
    """Each is of the same points, for four fifths of the bank, and is not compiled again."""
    found = fit_time.estimate(WORK, Rates(compile_selection=0, compile_search=0))
    assert 0.7 * 5 < found.thresholds / found.selection < 10
    compiled = fit_time.estimate(WORK, Rates(compile_selection=7, compile_search=0))
    assert compiled.thresholds == found.thresholds
    assert compiled.selection == pytest.approx(found.selection + 7)

  def test_several_devices_are_faster(self):
    work = dataclasses.replace(WORK, num_images=10_000)
    assert fit_time.estimate(dataclasses.replace(work, num_devices=4), Rates()).total < fit_time.estimate(
        work, Rates()).total

  def test_is_written_in_a_fitting_unit(self):
    assert str(FitTime(0.2, 3, 0)) == 'about 3 s from here: embedding under 1, selection 3'
    assert str(FitTime(0, 60, 6000)) == 'about 101 min from here: selection 1, thresholds 100'
    assert str(FitTime(3600, 7200, 18_000)) == 'about 8 h from here: embedding 1, selection 2, thresholds 5'


class TestTeller:

  def _told(self, batches, work=WORK, notify=True):
    calls = []
    run = Run(progress=lambda stage, *_: calls.append(stage),
              **({'notify': lambda line: calls.append(line)} if notify else {}))
    tell = fit_time.Teller(run, work)
    for done in batches:
      tell('embed', done, batches[-1])
    return calls

  def test_is_told_once_after_three_batches(self):
    calls = self._told([32, 64, 96, 128, 160])
    assert [call[:5] for call in calls] == ['embed'] * 3 + ['about'] + ['embed'] * 2

  def test_few_images_are_told_when_all_are_embedded(self):
    assert [call[:5] for call in self._told([32, 40])] == ['embed', 'embed', 'about']

  def test_nothing_is_told_where_it_takes_a_moment_or_nobody_listens(self):
    short = Work(4, 64, 16, 16, 25)
    assert self._told([2, 4], short) == ['embed', 'embed']
    assert self._told([32, 64, 96], notify=False) == ['embed'] * 3

  def test_nothing_is_told_on_accelerators(self, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert self._told([32, 64, 96]) == ['embed'] * 3

  def test_a_slower_product_is_taken_into_account(self, monkeypatch):
    usual = self._told([32, 64, 96])[-1]
    monkeypatch.setattr(slots, 'product_seconds', lambda: 1e-7)
    assert usual.startswith('about ') and ' h from here' in self._told([32, 64, 96])[-1]
