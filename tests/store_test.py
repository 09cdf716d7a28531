"""Banks: round trip, description, interruption."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from patchcore_jax.banks import store
from patchcore_jax.banks.store import BankError, MemoryBank


def _bank(m=40, d=8):
  rng = np.random.default_rng(0)
  return MemoryBank(
      rng.standard_normal((m, d)).astype(np.float32), rng.permutation(m).astype(np.int32),
      {'num_patches': 100, 'backbone': {'name': 'net', 'layers': ['a', 'b']}, 'image_size': [8, 8]})


class TestSaveAndRestore:

  def test_round_trip(self, tmp_path):
    bank = _bank()
    store.save(tmp_path / 'banks' / 'nut', bank)
    again = store.restore(tmp_path / 'banks' / 'nut')
    np.testing.assert_array_equal(again.embeddings, bank.embeddings)
    np.testing.assert_array_equal(again.indices, bank.indices)
    assert again.indices.dtype == np.int32 and again.description == bank.description

  def test_named_arrays(self, tmp_path):
    arrays = {'mean': np.arange(3.0, dtype=np.float32), 'gamma': np.float32(2)}
    store.save_arrays(tmp_path / 'm', arrays, {'detector': 'other'})
    again, description = store.restore_arrays(tmp_path / 'm', expected={'detector': 'other'})
    assert again.keys() == arrays.keys() and description == {'detector': 'other'}
    assert again['mean'].tolist() == [0, 1, 2] and again['gamma'].shape == () and again['gamma'] == 2
    with pytest.raises(BankError, match='holds gamma, mean: the model of another detector'):
      store.restore(tmp_path / 'm')

  def test_differences_are_all_named(self, tmp_path):
    store.save(tmp_path / 'b', _bank())
    same = {'backbone': {'layers': ('a', 'b')}}
    store.restore(tmp_path / 'b', expected=same)
    with pytest.raises(BankError) as error:
      store.restore(
          tmp_path / 'b', expected={'backbone': {'name': 'other'}, 'image_size': (16, 8)})
    assert "backbone.name: the bank has 'net', asked for is 'other'" in str(error.value)
    assert 'image_size: the bank has [8, 8], asked for is [16, 8]' in str(error.value)

  def test_nothing_there(self, tmp_path):
    with pytest.raises(BankError, match='No memory bank at'):
      store.restore(tmp_path / 'none')

  def test_a_bank_is_not_overwritten(self, tmp_path):
    store.save(tmp_path / 'b', _bank())
    with pytest.raises(ValueError, match='exists'):
      store.save(tmp_path / 'b', _bank())

  @pytest.mark.parametrize('what', ['folder', 'arrays', 'description'])
  def test_damaged_bank_does_not_restore(self, what, tmp_path):
    path = tmp_path / 'b'
    store.save(path, _bank())
    files = sorted((p for p in path.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    for p in files:
      if what == 'folder' or f'/{what}/' in str(p):
        p.unlink()
    with pytest.raises(BankError, match='not a complete memory bank'):
      store.restore(path)

  def test_killed_while_writing_leaves_nothing_that_restores(self, tmp_path):
    # The process dies at the last moment before Orbax gives the folder its name.
    script = textwrap.dedent(f'''
        import os, signal, pathlib
        import numpy as np
        from patchcore_jax.banks import store
        def die(*args, **kwargs):
          os.kill(os.getpid(), signal.SIGKILL)
        bank = store.MemoryBank(
            np.zeros((9, 4), np.float32), np.arange(9, dtype=np.int32), {{'num_patches': 9}})
        import orbax.checkpoint as ocp
        ocp.CompositeCheckpointHandler.finalize = die
        store.save({str(tmp_path / "b")!r}, bank)
    ''')
    result = subprocess.run([sys.executable, '-c', script], check=False, cwd=os.getcwd())
    assert result.returncode == -signal.SIGKILL
    assert any(tmp_path.iterdir())  # it had begun
    with pytest.raises(BankError):
      store.restore(tmp_path / 'b')
    store.save(tmp_path / 'b', _bank())
    assert store.restore(tmp_path / 'b').description['num_patches'] == 100
    assert [p.name for p in tmp_path.iterdir()] == ['b']


class TestMemoryBank:

  def test_is_a_pytree(self):
    bank = jax.tree.map(lambda x: x[:3], _bank())
    assert bank.embeddings.shape == (3, 8) and bank.description == _bank().description
    assert jax.jit(lambda b: b.embeddings.sum())(_bank()).shape == ()

  def test_sizes(self):
    assert _bank().sizes((0.4, 0.1, 0.01)) == (40, 10, 1)
    with pytest.raises(ValueError, match='ratio 0.5 needs 50'):
      _bank().sizes((0.5,))
