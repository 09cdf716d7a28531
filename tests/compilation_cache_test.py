"""Compiled programs are kept for the next run, and a damaged one is no harm."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from patchcore_jax.cli import terminal


@pytest.fixture
def fresh(monkeypatch):
  """A process that has no cache yet, and keeps whatever it compiles."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setattr(terminal, '_WORTH_KEEPING', 0.0)
  jax.config.update(names[0], None)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def _compile():
  return float(jax.jit(lambda x: jnp.sin(x).sum() + 41)(jnp.zeros(7)))


@pytest.mark.usefixtures('fresh')
class TestKeepCompiled:

  def test_a_second_process_finds_what_the_first_compiled(self, tmp_path):
    terminal.keep_compiled(str(tmp_path / 'here'))
    jax.clear_caches()  # of programs that other tests compiled
    assert _compile() == 41
    kept = {p.name for p in (tmp_path / 'here').iterdir() if p.name.endswith('-cache')}
    assert kept
    jax.clear_caches()
    _compile()  # nothing new
    assert {p.name for p in (tmp_path / 'here').iterdir() if p.name.endswith('-cache')} == kept

  @pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')
  def test_a_damaged_entry_is_compiled_anew(self, tmp_path):
    terminal.keep_compiled(str(tmp_path))
    _compile()
    for path in tmp_path.iterdir():
      path.write_bytes(b'damaged')
    jax.clear_caches()
    assert _compile() == 41

  def test_the_users_cache_folder_by_default(self, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    terminal.keep_compiled('auto')
    (folder,) = (tmp_path / 'patchcore_jax' / 'compiled').iterdir()
    assert jax.config.jax_compilation_cache_dir == str(folder) and jax.__version__ in folder.name

  def test_none_where_none_is_wanted_or_none_can_be(self, tmp_path, monkeypatch):
    terminal.keep_compiled('off')
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    terminal.keep_compiled('auto')
    assert jax.config.jax_compilation_cache_dir is None
    with pytest.raises(ValueError, match='cache .* cannot be made: Not a directory. Name another folder'):
      terminal.keep_compiled(str(tmp_path / 'file' / 'x'))

  def test_a_folder_that_jax_was_told_stays(self, tmp_path):
    jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'other'))
    terminal.keep_compiled('auto')
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'other')
